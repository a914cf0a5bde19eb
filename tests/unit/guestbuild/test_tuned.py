"""The tuned kernel is compiled only as its configuration says, and only where that is possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.guestbuild import tuned
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from pathlib import Path

WANTED = """
# CONFIG_COMMENT=y
CONFIG_ON=y
CONFIG_OFF=n
CONFIG_NAME="a b"
CONFIG_COUNT=64
"""


def test_a_configuration_that_has_everything_as_asked_is_taken() -> None:
    config = 'CONFIG_ON=y\n# CONFIG_OFF is not set\nCONFIG_NAME="a b"\nCONFIG_COUNT=64\nCONFIG_MORE=y\n'
    assert tuned.unmet(WANTED, config) == []


def test_an_option_that_does_not_exist_in_this_source_is_off() -> None:
    assert tuned.unmet("CONFIG_OFF=n", "CONFIG_OFFICE=y\n") == []


@pytest.mark.parametrize(
    ("line", "instead", "missing"),
    [
        ("CONFIG_ON=y", "# CONFIG_ON is not set", "CONFIG_ON=y"),
        ("CONFIG_ON=y", "CONFIG_ON=m", "CONFIG_ON=y"),
        ("CONFIG_ON=y", "CONFIG_ONE=y", "CONFIG_ON=y"),
        ("# CONFIG_OFF is not set", "CONFIG_OFF=y", "CONFIG_OFF=n"),
        ('CONFIG_NAME="a b"', 'CONFIG_NAME="a"', 'CONFIG_NAME="a b"'),
        ("CONFIG_COUNT=64", "CONFIG_COUNT=6", "CONFIG_COUNT=64"),
    ],
)
def test_what_the_source_made_otherwise_is_named(line: str, instead: str, missing: str) -> None:
    config = 'CONFIG_ON=y\n# CONFIG_OFF is not set\nCONFIG_NAME="a b"\nCONFIG_COUNT=64\n'
    assert line in config
    assert tuned.unmet(WANTED, config.replace(line, instead)) == [missing]


def test_our_configuration_asks_for_each_option_once() -> None:
    names = [line.partition("=")[0] for line in tuned.fragment().read_text().splitlines() if line.startswith("CONFIG_")]
    assert len(names) > 300
    assert sorted(set(names)) == sorted(names)


def test_what_compiling_needs_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("gcc", "make", "perl", "bc"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    # Headers may be there or not.
    wanted = r"run 'apt-get install --no-install-recommends flex bison( libelf-dev)?( libc6-dev)?' first"
    with pytest.raises(BuildError, match=wanted):
        tuned.inputs()
