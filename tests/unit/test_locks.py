from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from vmsandbox import locks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def lavish() -> Iterator[None]:
    """What is made may be used by everybody, as far as its maker allows."""
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.usefixtures("lavish")
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_b3_nobody_else_can_open_what_is_there_to_be_locked(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "lock"
    if there:
        path.touch(mode=0o666)
    with locks.opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lock_without_its_directory_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        locks.opened(tmp_path / "gone" / "lock")
