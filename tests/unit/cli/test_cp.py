from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox.cli.main import Options
from vmsandbox.cli.verbs import cp
from vmsandbox.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web:/etc/passwd", ("web", "/etc/passwd")),
        ("web:tmp", ("web", "/tmp")),
        ("web:/a:b", ("web", "/a:b")),
        ("./a:b", ("", "./a:b")),
        ("/x", ("", "/x")),
        ("-", ("", "-")),
        (":x", ("", ":x")),
    ],
)
def test_a_place_is_in_a_container_or_on_the_host(text: str, expected: tuple[str, str]) -> None:
    assert cp.place(text) == expected


@pytest.mark.parametrize("words", [["a:/x", "b:/x"], ["x", "y"], ["", "a:/x"]])
def test_exactly_one_end_is_in_a_container(words: list[str]) -> None:
    with pytest.raises(InvalidArgumentError):
        cp.main(Options(), words)


def test_a_copy_goes_into_a_directory_or_gets_a_new_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cp.target_on_host(str(tmp_path), "etc") == (str(tmp_path), "etc")
    assert cp.target_on_host(f"{tmp_path}/new", "etc") == (str(tmp_path), "new")
    assert cp.target_on_host(f"{tmp_path}/file", "etc") == (str(tmp_path), "file")
    with pytest.raises(InvalidArgumentError):
        cp.target_on_host(f"{tmp_path}/file", "")
    with pytest.raises(NotFoundError):
        cp.target_on_host(f"{tmp_path}/missing/new", "etc")
