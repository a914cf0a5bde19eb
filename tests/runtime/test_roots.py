"""Where a container's root file system can be: a disk of the host, or a directory shared by 9p."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.boxes import make_rootfs
from vmsandbox import lent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.bundles import Runtime

MIB = 1 << 20


def mounted(path: Path) -> list[str]:
    """Options and type of what is mounted at a place."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [f"{fields[8]} {fields[5]}" for fields in lines if fields[4] == str(path)]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system in a file, mounted through a loop device that goes with its last user."""
    image, place = tmp_path / "root.img", tmp_path / "rootfs"
    image.write_bytes(b"")
    os.truncate(image, 32 * MIB)
    tree = make_rootfs(tmp_path / "tree")
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, image], check=True)
    place.mkdir()
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


def test_a_root_on_a_disk_is_plugged_and_given_back(runtime: Runtime, mount: Path) -> None:
    before = mounted(mount)
    script = "grep ' / ' /proc/mounts; echo written > /made; cat /etc/passwd | head -n1; sleep 1000"
    bundle = runtime.bundle("one", mount, "sh", "-c", script)
    document = json.loads((bundle / "config.json").read_text())
    found = lent.find(str(mount))
    assert found is not None
    document["linux"]["resources"]["blockIO"] = {
        "throttleReadIOPSDevice": [{"major": found["numbers"][0], "minor": found["numbers"][1], "rate": 100000}]
    }
    (bundle / "config.json").write_text(json.dumps(document))
    with (runtime.scratch / "out").open("wb") as stdout:
        pid = runtime.create("one", bundle, stdout=stdout)
    # Two kernels never have it at once, and the stand-in does not hold it either.
    assert mounted(mount) == []
    assert os.listdir(f"/proc/{pid}/root") == ["proc"]
    runtime.ok("start", "one")
    assert "riops=100000" in runtime.ok("exec", "one", "cat", "/sys/fs/cgroup/io.max")
    runtime.ok("delete", "--force", "one")
    assert mounted(mount) == before
    device, kind = (runtime.scratch / "out").read_text().split()[0:3:2]
    assert (device.startswith("/dev/vd"), kind) == (True, "ext4")
    assert (mount / "made").read_text() == "written\n"

    # Read-only: the machine cannot write it whatever the container does; and in use, it is shared.
    (runtime.scratch / "two").mkdir()
    document["root"]["readonly"] = True
    del document["linux"]["resources"]["blockIO"]
    script = "touch /x 2>/dev/null || echo refused; cat /sys/block/vdb/ro /sys/block/vdb/size | head -n1"
    document["process"]["args"] = ["sh", "-c", script]
    (runtime.scratch / "two/config.json").write_text(json.dumps(document))
    assert runtime.ok("run", "--bundle", str(runtime.scratch / "two"), "two") == "refused\n1\n"
    with (mount / "made").open():
        said = runtime.ok("run", "--bundle", str(runtime.scratch / "two"), "three")
    assert said.startswith("refused\n"), said
    assert mounted(mount) == before


def test_roots_and_mounts_over_9p(runtime: Runtime, box_rootfs: Path) -> None:
    settings = runtime.scratch / "config.toml"
    settings.write_text('[sandbox]\nshared_fs = "9p"\n')
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
