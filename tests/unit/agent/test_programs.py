"""Whether a program can be executed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox_agent import programs
from vmsandbox_agent.errors import CommandNotExecutableError, CommandNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ELF = b"\x7fELF and so on"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    for name in ("bin", "usr/bin", "home"):
        (tmp_path / name).mkdir(parents=True)
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


def place(path: Path, content: bytes = ELF, mode: int = 0o755) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def process(*args: str, uid: int = 0, gid: int = 0, **fields: Any) -> dict[str, Any]:
    return {"args": [*args], "user": {"uid": uid, "gid": gid}, "env": ["PATH=/bin:/usr/bin"], "cwd": "/", **fields}


def test_a_program_is_found_in_the_path_by_its_path_and_from_the_directory(root: int, tmp_path: Path) -> None:
    place(tmp_path / "usr/bin/tool")
    for name in ("tool", "/usr/bin/tool", "usr/bin/tool", "./usr/bin/../bin/tool"):
        programs.check(root, process(name))
    programs.check(root, process("bin/tool", cwd="/usr"))


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (["PATH=/bin"], True),
        (["PATH=/nowhere", "PATH=/bin"], True),
        (["PATH=/nowhere:/bin"], True),
        (["PATH=bin"], True),
        (["PATH=/bin", "PATH=/nowhere"], False),
        (["PATH=/bin", "PATH="], False),
        (["PATHS=/bin"], False),
        (["PATH"], False),
        ([], False),
    ],
)
def test_the_last_path_is_searched_and_without_one_nothing(
    root: int, tmp_path: Path, environment: list[str], found: bool
) -> None:
    place(tmp_path / "bin/tool")
    with nullcontext() if found else pytest.raises(CommandNotFoundError):
        programs.check(root, process("tool", env=environment))


def test_an_empty_place_in_the_path_is_the_root(root: int, tmp_path: Path) -> None:
    place(tmp_path / "tool")
    programs.check(root, process("tool", env=["PATH=/bin:"], cwd="/home"))


@pytest.mark.parametrize("name", ["missing", "/bin/missing", "./missing", "", "/bin/file/below"])
def test_a_missing_one_is_not_found(root: int, tmp_path: Path, name: str) -> None:
    place(tmp_path / "bin/file")
    with pytest.raises(CommandNotFoundError):
        programs.check(root, process(name))


@pytest.mark.parametrize(
    ("content", "mode", "uid"),
    [
        (ELF, 0o644, 0),
        (ELF, 0o700, 1000),
        (ELF, 0o750, 1000),
        (b"text", 0o755, 0),
        (b"", 0o755, 0),
        (b"#!/no/interpreter\n", 0o755, 0),
        (b"#!\n", 0o755, 0),
    ],
)
def test_one_that_cannot_be_executed_is_told_apart(
    root: int, tmp_path: Path, content: bytes, mode: int, uid: int
) -> None:
    place(tmp_path / "bin/tool", content, mode)
    for name in ("tool", "/bin/tool"):
        with pytest.raises(CommandNotExecutableError):
            programs.check(root, process(name, uid=uid, gid=uid))


def test_groups_count(root: int, tmp_path: Path) -> None:
    place(tmp_path / "bin/tool", mode=0o750)
    os.chown(tmp_path / "bin/tool", 1, 50)
    user = {"uid": 1000, "gid": 1000, "additionalGids": [50]}
    programs.check(root, {**process("tool"), "user": user})


def test_a_later_directory_of_the_path_is_tried(root: int, tmp_path: Path) -> None:
    place(tmp_path / "bin/tool", mode=0o644)
    with pytest.raises(CommandNotExecutableError):
        programs.check(root, process("tool"))
    place(tmp_path / "usr/bin/tool")
    programs.check(root, process("tool"))


def test_scripts_need_their_interpreter(root: int, tmp_path: Path) -> None:
    place(tmp_path / "bin/script", b"#! /bin/sh -e\necho\n")
    with pytest.raises(CommandNotExecutableError, match="needs '/bin/sh'"):
        programs.check(root, process("script"))
    place(tmp_path / "bin/sh")
    programs.check(root, process("script"))


def test_directories_and_other_things_are_no_programs(root: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bin/pipe", 0o755)
    for name in ("/bin", "/bin/pipe"):
        with pytest.raises(CommandNotExecutableError):
            programs.check(root, process(name))


def test_links_lead_nowhere_but_into_the_root(root: int, tmp_path: Path) -> None:
    place(tmp_path / "usr/bin/real")
    (tmp_path / "bin/link").symlink_to("/../../usr/bin/real")
    programs.check(root, process("link"))
    (tmp_path / "bin/out").symlink_to("/proc/self/exe")
    with pytest.raises(CommandNotFoundError):
        programs.check(root, process("out"))
    (tmp_path / "bin/loop").symlink_to("loop")
    programs.check(root, process("/bin/loop"))  # for crun to say
