from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.resources import disks

if TYPE_CHECKING:
    from pathlib import Path


def test_a_raw_file_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    disks.check(str(path), read_only=False)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a directory; '-v' shares one"),
        (lambda path: path.write_bytes(b"x"), "less than a sector"),
        (lambda path: os.mkfifo(path), "only block devices and raw files"),
        (lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)), "only block devices and raw files"),
    ],
    ids=["missing", "directory", "tiny", "fifo", "character-device"],
)
def test_what_is_no_disk_is_refused_by_name(tmp_path: Path, make: object, why: str) -> None:
    path = tmp_path / "thing"
    assert callable(make)
    make(path)
    with pytest.raises(InvalidArgumentError, match=why) as refused:
        disks.check(str(path), read_only=False)
    assert f"'{path}'" in str(refused.value)


def test_what_the_host_has_mounted_is_found_by_its_numbers() -> None:
    status = os.stat("/proc/self")
    assert disks.mounted_at(os.major(status.st_dev), os.minor(status.st_dev)) == "/proc"
    assert disks.mounted_at(4095, 1048575) == ""
