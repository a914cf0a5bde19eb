"""Disks of the host in a container: hot-plugged, under the name that was asked for, gone with the container."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.cli import Cli

MIB = 1 << 20


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device of 8 MiB."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    device = subprocess.run(
        ["losetup", "-f", "--show", image], capture_output=True, check=True, text=True
    ).stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.fixture
def partition(loop: str) -> Iterator[str]:
    """A partition of 4 MiB that begins at 2 MiB of the loop device."""
    with open(loop, "r+b") as disk:
        disk.write(partition_table(start=2 * MIB, size=4 * MIB))
    # Not left to the kernel, which may have been built without knowing partition tables.
    subprocess.run(["partx", "-u", loop], check=True)
    yield f"{loop}p1"
    subprocess.run(["partx", "-d", loop], check=True)


def partition_table(*, start: int, size: int) -> bytes:
    """A master boot record with one Linux partition."""
    entry = struct.pack("<B3xB3xII", 0, 0x83, start // 512, size // 512)
    return bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa"


def attached(cli: Cli) -> int:
    """How many disks there are inside, the guest's own included."""
    return int(cli.ok("exec", "web", "sh", "-c", "ls /sys/block | grep -c vd"))


def test_a9_a_loop_device_appears_under_its_path_and_takes_what_is_written(cli: Cli, box: str, loop: str) -> None:
    script = "stat -c '%F %a' /dev/data; echo written | dd of=/dev/data bs=512 seek=4 conv=sync 2>/dev/null; sync"
    assert cli.ok("run", "--rm", "--device", f"{loop}:/dev/data", box, "sh", "-c", script) == "block special file 660\n"
    with open(loop, "rb") as disk:
        disk.seek(4 * 512)
        assert disk.read(8) == b"written\n"
    # Free again: nobody holds it any more.
    assert subprocess.run(["losetup", "-O", "BACK-FILE", loop], capture_output=True, check=True).returncode == 0


def test_a9_a_partition_is_a_disk_of_its_own_and_nothing_beside_it_changes(
    cli: Cli, box: str, loop: str, partition: str
) -> None:
    script = (
        "blockdev --getsize64 /dev/data; stat -c '%F %a' /dev/data; echo written > /dev/data;"
        "echo last | dd of=/dev/data bs=512 seek=8191 conv=sync 2>/dev/null; sync; head -c 8 /dev/data;"
        "echo x | dd of=/dev/data bs=512 seek=8192 conv=sync 2>/dev/null || echo full"
    )
    done = cli("run", "--rm", "--device", f"{partition}:/dev/data", box, "sh", "-c", script)
    assert done.stdout == f"{4 * MIB}\nblock special file 660\nwritten\nfull\n", done
    with open(loop, "rb") as disk:
        found = disk.read()
    assert found[:512] == partition_table(start=2 * MIB, size=4 * MIB)
    assert found[2 * MIB :].startswith(b"written\n")
    assert found[6 * MIB - 512 :].startswith(b"last\n")
    assert not any(found[512 : 2 * MIB])
    assert not any(found[6 * MIB :])


def test_a9_a_partition_that_the_host_has_mounted_is_given_for_reading_only(
    cli: Cli, box: str, loop: str, partition: str, tmp_path: Path
) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", partition], check=True)
    subprocess.run(["mount", partition, place], check=True)
    try:
        refused = cli("run", "--rm", "--device", partition, box, "true")
        assert (refused.code, f"the host has it mounted at '{place}'" in refused.stderr) == (125, True), refused
        # The disk that it is a part of would be written as well.
        refused = cli("run", "--rm", "--device", loop, box, "true")
        assert (refused.code, "the host has it in use" in refused.stderr) == (125, True), refused
        magic = ("dd", "if=/dev/fs", "bs=1", "skip=1080", "count=2")
        read = cli("run", "--rm", "--device", f"{partition}:/dev/fs:r", box, *magic)
        assert (read.code, read.raw) == (0, b"\x53\xef"), read
    finally:
        subprocess.run(["umount", place], check=True)


def test_a9_a_raw_file_given_for_reading_cannot_be_written_from_inside(cli: Cli, box: str, tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    image.write_bytes(b"content\n".ljust(MIB, b"\0"))
    script = "head -c 8 /dev/ro; echo x > /dev/ro && echo WRITTEN"
    result = cli("run", "--rm", "--privileged", "--device", f"{image}:/dev/ro:r", box, "sh", "-c", script)
    assert result.stdout == "content\n", result
    assert image.read_bytes()[:8] == b"content\n"


def test_a9_disks_go_with_their_container_and_others_stay(cli: Cli, box: str, loop: str, tmp_path: Path) -> None:
    image = tmp_path / "other.img"
    image.write_bytes(bytes(MIB))
    cli.ok("pod", "create", "--name", "p")
    cli.ok("run", "-d", "--pod", "p", "--name", "web", box, "sleep", "1000")
    before = attached(cli)
    two = ("--device", f"{loop}:/dev/one", "--device", f"{image}:/dev/two:rw")
    script = "echo one > /dev/one; echo two > /dev/two; ls /dev/one /dev/two; sleep 1000"
    cli.ok("run", "-d", "--pod", "p", "--name", "db", *two, box, "sh", "-c", script)
    assert attached(cli) == before + 3
    # The others do not have it, and it is there again after another start.
    assert cli("exec", "web", "ls", "/dev/one").code == 1
    cli.ok("stop", "-t", "0", "db")
    cli.ok("start", "db")
    assert cli.ok("exec", "db", "head", "-c", "4", "/dev/two") == "two\n"
    cli.ok("rm", "-f", "db")
    assert attached(cli) == before
    assert image.read_bytes()[:4] == b"two\n"


@pytest.mark.parametrize(
    ("source", "why"),
    [("/dev/null", "only block devices and raw files"), ("/no/such", "no such file"), ("/etc", "'-v' shares one")],
)
def test_what_is_no_disk_is_refused_before_anything_is_started(cli: Cli, box: str, source: str, why: str) -> None:
    refused = cli("run", "--rm", "--device", f"{source}:/dev/x", box, "true")
    assert (refused.code, why in refused.stderr, f"'{source}'" in refused.stderr) == (125, True, True), refused
    assert cli.leftovers() == []
