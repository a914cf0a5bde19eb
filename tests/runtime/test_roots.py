"""Where a container's root file system can be: a disk of the host, or a directory shared by 9p."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.boxes import make_rootfs
from tests.harness.bundles import Runtime
from vmsandbox import lent

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


def mounted(path: Path, pid: int | str = "self") -> list[str]:
    """Options and type of what is mounted at a place, as the process `pid` sees it."""
    lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    return [f"{fields[8]} {fields[5]}" for fields in lines if fields[4] == str(path)]


def make_image(directory: Path) -> Path:
    """An ext4 file system in a file."""
    image = directory / "root.img"
    image.write_bytes(b"")
    os.truncate(image, 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", make_rootfs(directory / "tree"), image], check=True)
    (directory / "rootfs").mkdir()
    return image


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system in a file, mounted through a loop device that goes with its last user."""
    image, place = make_image(tmp_path), tmp_path / "rootfs"
    subprocess.run(["mount", "-o", "loop,nosuid,noatime", image, place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_mounted_disk_is_found_and_nothing_else(mount: Path, tmp_path: Path) -> None:
    found = lent.find(str(mount))
    assert found is not None
    assert (found["fstype"], found["read_only"]) == ("ext4", False)
    assert lent.node_of((found["numbers"][0], found["numbers"][1])) == found["device"]
    assert not lent.is_alone(found["device"])
    assert lent.find(str(mount / "bin")) is None
    assert lent.find(str(tmp_path)) is None
    # A part of a file system is a directory like any other.
    part = tmp_path / "part"
    part.mkdir()
    subprocess.run(["mount", "--bind", mount / "bin", part], check=True)
    try:
        assert lent.find(str(part)) is None
    finally:
        subprocess.run(["umount", part], check=True)


def test_what_is_taken_is_given_back_as_it_was(mount: Path, tmp_path: Path) -> None:
    before = mounted(mount)
    found = lent.find(str(mount))
    assert found is not None
    record = tmp_path / "pod/roots/one.json"
    lent.take(found, str(record))
    assert mounted(mount) == []
    # Nobody has it open, and yet it is there: its users may all be killed.
    assert lent.is_alone(found["device"])
    lent.give_back(str(record))
    lent.give_back(str(record))  # again is fine
    listed = subprocess.run(
        ["losetup", "-nO", "AUTOCLEAR", found["device"]], capture_output=True, text=True, check=True
    )
    assert listed.stdout.strip() == "1"
    assert mounted(mount) == before
    assert not record.exists()


def test_several_may_give_back_at_once(mount: Path, tmp_path: Path) -> None:
    before = mounted(mount)
    found = lent.find(str(mount))
    assert found is not None
    record = tmp_path / "roots/one.json"
    lent.take(found, str(record))
    code = f"import sys; sys.path[:0] = {sys.path!r}; from vmsandbox import lent; lent.give_back({str(record)!r})"
    several = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in several] == [0, 0, 0, 0]
    assert mounted(mount) == before


def test_what_somebody_uses_is_left_where_it_is(mount: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "ALONE_TIMEOUT", 0.1)
    before = mounted(mount)
    found = lent.find(str(mount))
    assert found is not None
    record = tmp_path / "roots/one.json"
    with (mount / "open").open("w"), pytest.raises(lent.NotAloneError, match="cannot be unmounted"):
        lent.take(found, str(record))
    # The same file system at another place.
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", found["device"], other], check=True)
    try:
        with pytest.raises(lent.NotAloneError, match="in use elsewhere"):
            lent.take(found, str(record))
    finally:
        subprocess.run(["umount", other], check=True)
    assert mounted(mount) == before
    assert not record.exists()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """A process in a mount namespace of its own, where such a file system is mounted.

    Nobody who makes a namespace meanwhile takes a copy of that mount along.
    """
    image, place = make_image(tmp_path), tmp_path / "rootfs"
    command = 'mount -o loop,nosuid,noatime "$1" "$2" && exec sleep 100000'
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", command, "sh", image, place]
    with subprocess.Popen(argv) as process:
        while psutil.Process(process.pid).name() != "sleep":
            assert process.poll() is None
            time.sleep(0.01)
        yield process.pid
        process.kill()


@pytest.fixture
def apart(holder: int, data_root: Path) -> Iterator[Runtime]:
    """The command in that namespace."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        inside = ("/usr/bin/nsenter", "-t", str(holder), "--mount")
        made = Runtime(Path(scratch), data_root, inside=inside)
        yield made
        made.remove_all()
        assert made.leftovers() == []


def test_a7_a_root_on_a_disk_is_plugged_as_writable_as_it_is_and_given_back(
    apart: Runtime, holder: int, tmp_path: Path
) -> None:
    place, seen = tmp_path / "rootfs", Path(f"/proc/{holder}/root{tmp_path}/rootfs")
    before = mounted(place, holder)
    assert len(before) == 1
    script = "grep ' / ' /proc/mounts; echo written > /made; sleep 1000"
    bundle = apart.bundle("one", place, "sh", "-c", script)
    document = json.loads((bundle / "config.json").read_text())
    device = os.stat(seen).st_dev
    document["linux"]["resources"]["blockIO"] = {
        "throttleReadIOPSDevice": [{"major": os.major(device), "minor": os.minor(device), "rate": 100000}]
    }
    (bundle / "config.json").write_text(json.dumps(document))
    with (apart.scratch / "out").open("wb") as stdout:
        pid = apart.create("one", bundle, stdout=stdout)
    # Two kernels never have it at once, and the stand-in does not hold it either.
    assert mounted(place, holder) == []
    assert os.listdir(f"/proc/{pid}/root") == ["proc"]
    apart.ok("start", "one")
    assert "riops=100000" in apart.ok("exec", "one", "cat", "/sys/fs/cgroup/io.max")
    apart.ok("delete", "--force", "one")
    assert mounted(place, holder) == before
    source, kind = (apart.scratch / "out").read_text().split()[0:3:2]
    assert (source.startswith("/dev/vd"), kind) == (True, "ext4")
    assert (seen / "made").read_text() == "written\n"

    # Read-only: the machine cannot write it whatever the container does; and in use, it is shared.
    (apart.scratch / "two").mkdir()
    document["root"]["readonly"] = True
    del document["linux"]["resources"]["blockIO"]
    script = (
        "touch /x 2>/dev/null || echo refused; cut -d' ' -f3,4 /proc/mounts | head -n1;"
        "disk=$(cut -d' ' -f1 /proc/mounts | head -n1); cat /sys/class/block/${disk#/dev/}/ro 2>/dev/null; true"
    )
    document["process"]["args"] = ["sh", "-c", script]
    (apart.scratch / "two/config.json").write_text(json.dumps(document))
    said = apart.ok("run", "--bundle", str(apart.scratch / "two"), "two")
    assert said.startswith("refused\next4 ro,"), said
    assert said.splitlines()[2:] == ["1"], said
    with (seen / "made").open():
        said = apart.ok("run", "--bundle", str(apart.scratch / "two"), "three")
    assert said.startswith("refused\nvirtiofs "), said
    assert mounted(place, holder) == before

    # Whoever cleans up after all of it was killed gives it back as well.
    document["process"]["args"] = ["sleep", "1000"]
    (apart.scratch / "two/config.json").write_text(json.dumps(document))
    pid = apart.create("four", apart.scratch / "two")
    assert mounted(place, holder) == []
    (pod,) = apart.root.glob("s/*/sandbox.json")
    known = json.loads(pod.read_text())
    victims = [psutil.Process(each) for each in (pid, known["supervisor"]["pid"], known["vm"]["pid"])]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=30)
    apart.ok("delete", "--force", "four")
    assert mounted(place, holder) == before


def test_a7_a_root_on_a_disk_is_shared_where_disks_are_not_to_be_used(
    apart: Runtime, holder: int, tmp_path: Path
) -> None:
    place = tmp_path / "rootfs"
    before = mounted(place, holder)
    settings = apart.scratch / "config.toml"
    settings.write_text("[sandbox]\nforks = false\ndisable_block_device_use = true\n")
    bundle = apart.bundle("one", place, "sh", "-c", "cut -d' ' -f3 /proc/mounts | head -n1; echo written > /made")
    said = apart.ok("--config", str(settings), "run", "--bundle", str(bundle), "one")
    assert said == "virtiofs\n"
    # The host has it all the while.
    assert mounted(place, holder) == before
    assert Path(f"/proc/{holder}/root{place}/made").read_text() == "written\n"


def test_a8_a_root_that_is_a_directory_is_shared_over_virtio_fs(runtime: Runtime, box_rootfs: Path) -> None:
    root = runtime.scratch / "root"
    shutil.copytree(box_rootfs, root, symlinks=True)
    script = "cut -d' ' -f3 /proc/mounts | head -n1; cat /mark; echo made > /made"
    (root / "mark").write_text("the host's\n")
    bundle = runtime.bundle("shared", root, "sh", "-c", script)
    assert runtime.ok("run", "--bundle", str(bundle), "shared") == "virtiofs\nthe host's\n"
    assert (root / "made").read_text() == "made\n"


def test_a8_roots_and_mounts_over_9p(runtime: Runtime, box_rootfs: Path) -> None:
    settings = runtime.scratch / "config.toml"
    settings.write_text('[sandbox]\nforks = false\nshared_fs = "9p"\n')
    shared = runtime.scratch / "shared"
    shared.mkdir()
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/w", "type": "bind", "source": str(shared), "options": ["rbind", "rw"]},
        {"destination": "/r", "type": "bind", "source": str(shared), "options": ["rbind", "ro"]},
    ]
    script = "grep -c ' 9p ' /proc/mounts; echo made > /w/made; cat /r/made; echo x 2>/dev/null > /r/x || echo refused"
    bundle = runtime.bundle("nine", box_rootfs, "sh", "-c", script, mounts=mounts)
    done = runtime("--config", str(settings), "run", "--bundle", str(bundle), "nine")
    assert (done.code, done.stdout) == (0, "3\nmade\nrefused\n"), (done, runtime.said())
