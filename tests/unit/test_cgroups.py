"""The host's cgroups of containers, on ordinary directories: what is made is removed, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox import cgroups
from vmsandbox.errors import InvalidBundleError

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_made_is_removed_with_the_parents_that_were_missing(tmp_path: Path) -> None:
    places = [str(tmp_path / controller / "docker/one") for controller in ("cpu", "memory")]
    (tmp_path / "cpu").mkdir()
    made = cgroups.make(places)
    assert made.places == places
    assert made.above == [str(tmp_path / "cpu/docker"), str(tmp_path / "memory"), str(tmp_path / "memory/docker")]
    cgroups.remove(made.places, reversed(made.above))
    assert [*tmp_path.iterdir()] == [tmp_path / "cpu"]


def test_a_parent_stays_while_somebody_else_is_below_it(tmp_path: Path) -> None:
    first = cgroups.make([str(tmp_path / "docker/one")])
    second = cgroups.make([str(tmp_path / "docker/two")])
    assert second.above == []
    cgroups.remove(first.places, reversed(first.above))
    assert [*tmp_path.iterdir()] == [tmp_path / "docker"]
    assert [*(tmp_path / "docker").iterdir()] == [tmp_path / "docker/two"]


def test_what_the_machine_does_not_let_us_have_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cgroups.make([str(tmp_path / "file/one"), str(tmp_path / "two")]).places == [str(tmp_path / "two")]


@pytest.mark.parametrize("path", ["../up", "/a/../../b", "system.slice:docker:one"])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(InvalidBundleError, match="cgroupsPath"):
        cgroups.directories(path, "one")
