"""Users as docker resolves them, in files that may be hostile."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent import users
from vmsandbox_agent.errors import InvalidArgumentError
from vmsandbox_agent.users import User

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWD = """\
# a comment
root:x:0:0:root:/root:/bin/sh
broken line
web:x:1000:1001:web:/home/web:/bin/sh
bad:x:abc:0::/:
huge:x:99999999999:0::/:
1234:x:55:56:a name of digits:/digits:
"""
GROUP = """\
root:x:0:
web:x:1001:
extra:x:2000:other,web
more:x:2001:web
wrong:x:y:web
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("web", User(1000, 1001, (1001, 2000, 2001), "/home/web")),
        ("1000", User(1000, 1001, (1001, 2000, 2001), "/home/web")),
        ("web:extra", User(1000, 2000, (2000,), "/home/web")),
        ("web:77", User(1000, 77, (77,), "/home/web")),
        ("4711", User(4711, 0, (0,), "")),
        ("4711:4712", User(4711, 4712, (4712,), "")),
        ("1234", User(1234, 0, (0,), "")),
        ("0", User(0, 0, (0,), "/root")),
        (":extra", User(0, 2000, (2000,), "/root")),
    ],
)
def test_a_user_is_found(root: int, text: str, user: User) -> None:
    assert users.resolve(root, text) == user


@pytest.mark.parametrize("text", ["nobody", "web:nobody", "99999999999", "web:99999999999", "bad", "huge"])
def test_an_unknown_one_is_refused(root: int, text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        users.resolve(root, text)


def test_homes_and_names(root: int) -> None:
    assert [users.home_of(root, uid) for uid in (1000, 4711)] == ["/home/web", "/"]
    assert [users.name_of(root, uid) for uid in (1000, 4711)] == ["web", "4711"]


def test_links_are_followed_inside_and_never_outside(root: int, tmp_path: Path) -> None:
    passwd = tmp_path / "etc/passwd"
    passwd.rename(tmp_path / "real")
    passwd.symlink_to("/../../real")
    assert users.resolve(root, "web").uid == 1000
    passwd.unlink()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("web:x:4:4::/:\n")
    passwd.symlink_to(outside)
    with pytest.raises(InvalidArgumentError):
        users.resolve(root, "web")


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing", "large"])
def test_what_is_no_file_of_sense_has_no_users(root: int, tmp_path: Path, kind: str) -> None:
    passwd = tmp_path / "etc/passwd"
    passwd.unlink()
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "directory":
        passwd.mkdir()
    elif kind == "large":
        with passwd.open("wb") as file:
            file.truncate(1 << 40)
    assert users.resolve(root, "12").uid == 12
