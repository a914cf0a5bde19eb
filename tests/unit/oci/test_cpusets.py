"""Lists of processors."""

from __future__ import annotations

import pytest

from vmsandbox.errors import InvalidBundleError
from vmsandbox.oci import cpusets


@pytest.mark.parametrize(("text", "numbers"), [("", []), ("0", [0]), ("0-2,4", [0, 1, 2, 4]), (" 1 , 1-1 ,", [1])])
def test_lists_are_read_as_the_kernel_reads_them(text: str, numbers: list[int]) -> None:
    assert sorted(cpusets.parse(text, name="cpus")) == numbers


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "1--2", "99999", "1-2-3", "\u0663"])
def test_what_is_no_list_is_named(text: str) -> None:
    with pytest.raises(InvalidBundleError, match="'cpus' is"):
        cpusets.parse(text, name="cpus")
