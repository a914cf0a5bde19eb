"""Mounts for the host: order, references, and undoing."""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

import pytest

from tests.unit.agent.recorder import BUSY, INVALID, Recorder
from vmsandbox_agent.devices import BlockDevice
from vmsandbox_agent.errors import AgentError, InvalidArgumentError, NotFoundError, TimedOutError
from vmsandbox_agent.storage import Storages, parse_options
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def calls() -> Recorder:
    return Recorder()


def disk(pci_path: str, partition: int) -> BlockDevice:
    if pci_path == "02.7/00.0":
        raise TimedOutError("disk has not appeared")
    return BlockDevice(f"/dev/vda{partition or ''}", 254, partition)


@pytest.fixture
def storages(tmp_path: Path, calls: Recorder) -> Storages:
    return Storages(tmp_path, calls, find_block=disk)


def block(base: Path, name: str, pci_path: str = "02.0/00.0", **fields: object) -> pb.Storage:
    return pb.Storage(
        driver=pb.Storage.DRIVER_BLOCK,
        pci_path=pci_path,
        mount_point=str(base / name),
        **fields,  # type: ignore[arg-type]
    )


def test_an_overlay_on_two_disks_is_mounted_in_order(storages: Storages, calls: Recorder, tmp_path: Path) -> None:
    addresses = storages.add(
        [
            block(tmp_path, "image", fstype="erofs", options=["ro"]),
            block(tmp_path, "layer", fstype="ext4", partition=1, options=["noatime"]),
            pb.Storage(
                driver=pb.Storage.DRIVER_OVERLAY,
                mount_point=str(tmp_path / "root"),
                lower=[str(tmp_path / "image")],
                upper=str(tmp_path / "layer/upper,1"),
                work=str(tmp_path / "layer/work:1"),
            ),
        ]
    )
    base = str(tmp_path)
    layers = f"lowerdir={base}/image,upperdir={base}/layer/upper\\,1,workdir={base}/layer/work\\:1"
    assert calls.journal == [
        "mount /dev/vda image erofs 0x1",
        "mount /dev/vda1 layer ext4 0x400",
        f"mount overlay root overlay 0x0 {layers}",
    ]
    assert (tmp_path / "layer/upper,1").is_dir()
    assert (tmp_path / "layer/work:1").is_dir()
    assert addresses[f"{base}/layer"] == BlockDevice("/dev/vda1", 254, 1)


@pytest.mark.parametrize(
    ("storage", "mounted"),
    [
        (pb.Storage(driver=pb.Storage.DRIVER_VIRTIOFS, source="tag"), "mount tag point virtiofs 0x0"),
        (
            pb.Storage(driver=pb.Storage.DRIVER_9P, source="tag", options=["version=9p2000.L", "ro"]),
            "mount tag point 9p 0x1 trans=virtio,version=9p2000.L",
        ),
        (
            pb.Storage(driver=pb.Storage.DRIVER_TMPFS, options=["size=1m", "nosuid", "nodev"]),
            "mount tmpfs point tmpfs 0x6 size=1m",
        ),
    ],
)
def test_each_kind_is_mounted_its_way(
    storages: Storages, calls: Recorder, tmp_path: Path, storage: pb.Storage, mounted: str
) -> None:
    storage.mount_point = str(tmp_path / "point")
    storages.add([storage])
    assert calls.journal == [mounted]


def test_a_bind_gets_its_attributes_by_a_second_mount(storages: Storages, calls: Recorder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    storage = pb.Storage(
        driver=pb.Storage.DRIVER_BIND,
        source=str(tmp_path / "file"),
        mount_point=str(tmp_path / "point"),
        options=["rbind", "ro", "rslave"],
    )
    storages.add([storage])
    assert calls.journal == [
        f"mount {tmp_path}/file point  0x5000",
        "mount  point  0x1021",
        "mount  point  0x84000",
    ]
    assert (tmp_path / "point").is_file()
    storages.remove([str(tmp_path / "point")])
    assert not (tmp_path / "point").exists()


def test_a_storage_is_unmounted_with_its_last_reference(storages: Storages, calls: Recorder, tmp_path: Path) -> None:
    storages.add([block(tmp_path, "image")])
    storages.add([block(tmp_path, "image")])
    storages.remove([str(tmp_path / "image")])
    assert calls.journal == ["mount /dev/vda image ext4 0x0"]
    storages.remove([str(tmp_path / "image") + "/"])
    assert calls.journal[1:] == ["umount image"]
    with pytest.raises(NotFoundError):
        storages.remove([str(tmp_path / "image")])


def test_what_fails_is_undone_and_what_was_there_stays(storages: Storages, calls: Recorder, tmp_path: Path) -> None:
    storages.add([block(tmp_path, "shared")])
    calls.refused[str(tmp_path / "bad")] = INVALID
    with pytest.raises(AgentError, match="cannot mount '/dev/vda' as ext4"):
        storages.add([block(tmp_path, "one"), block(tmp_path, "shared"), block(tmp_path, "bad")])
    assert calls.journal[-2:] == ["mount /dev/vda bad ext4 0x0", "umount one"]
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "bad").exists()
    storages.remove([str(tmp_path / "shared")])
    assert calls.journal[-1] == "umount shared"


def test_a_disk_that_does_not_come_leaves_nothing(storages: Storages, calls: Recorder, tmp_path: Path) -> None:
    with pytest.raises(TimedOutError):
        storages.add([block(tmp_path, "one"), block(tmp_path, "two", pci_path="02.7/00.0")])
    assert calls.journal == []


def test_what_is_busy_stays_known_and_the_others_are_removed(
    storages: Storages, calls: Recorder, tmp_path: Path
) -> None:
    storages.add([block(tmp_path, "one"), block(tmp_path, "two")])
    calls.refused[f"umount {tmp_path}/two"] = BUSY
    with pytest.raises(OSError, match="busy"):
        storages.remove([str(tmp_path / "one"), str(tmp_path / "two")])
    assert calls.journal[-2:] == ["umount two", "umount one"]
    del calls.refused[f"umount {tmp_path}/two"]
    storages.remove([str(tmp_path / "two")])


@pytest.mark.parametrize("point", ["/etc", "../x", "", "/run/vmsandboxes/x"])
def test_nothing_is_mounted_elsewhere(storages: Storages, calls: Recorder, point: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not below"):
        storages.add([pb.Storage(driver=pb.Storage.DRIVER_TMPFS, mount_point=point)])
    assert calls.journal == []


def test_everything_goes_in_reverse_order_even_what_is_busy(
    storages: Storages, calls: Recorder, tmp_path: Path
) -> None:
    storages.add([block(tmp_path, "one"), block(tmp_path, "two")])
    storages.add([block(tmp_path, "one")])
    calls.refused[f"umount {tmp_path}/two"] = BUSY
    storages.remove_all()
    assert calls.journal[-3:] == ["umount two", "umount two", "umount one"]


def test_a_device_node_gets_its_name_owner_and_mode(tmp_path: Path, calls: Recorder) -> None:
    storages = Storages(tmp_path, calls, find_block=lambda path, part: BlockDevice("/dev/null", 1, 3))
    storage = pb.Storage(
        driver=pb.Storage.DRIVER_BLOCK_DEVICE,
        pci_path="02.0/00.0",
        mount_point=str(tmp_path / "dev/data"),
        mode=0o640,
        uid=7,
        gid=8,
    )
    storages.add([storage])
    status = (tmp_path / "dev/data").stat()
    assert stat.S_ISBLK(status.st_mode)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_rdev) == (0o640, 7, 8, 0x103)
    storages.remove([str(tmp_path / "dev/data")])
    assert not (tmp_path / "dev/data").exists()


def test_options_are_flags_propagation_or_the_file_systems(tmp_path: Path) -> None:
    options = parse_options(["rw", "nosuid", "noexec", "rshared", "uid=5", "defaults", ""])
    assert (options.flags, options.propagation, options.data) == (0x2 | 0x8, (1 << 20) | 16384, ["uid=5"])


class Late(Recorder):
    """Knows a share only after it was asked a few times."""

    def __init__(self, tries: int) -> None:
        super().__init__()
        self.tries = tries

    def mount(self, source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        if fstype == "virtiofs" and self.tries:
            self.tries -= 1
            raise OSError(errno.EINVAL, "Invalid argument")
        super().mount(source, target, fstype, flags, data)


def test_a_share_whose_device_comes_late_is_waited_for(tmp_path: Path) -> None:
    calls = Late(3)

    def wait_for(look: Callable[[], bool | None], what: str) -> None:
        assert what == "share 'shared'"
        while look() is None:
            pass

    storages = Storages(tmp_path, calls, wait_for=wait_for)
    storages.add([pb.Storage(driver=pb.Storage.DRIVER_VIRTIOFS, source="shared", mount_point=str(tmp_path / "s"))])
    assert calls.tries == 0
    assert len(calls.journal) == 1


def test_a_share_whose_device_does_not_come_is_an_error(tmp_path: Path) -> None:
    def wait_for(look: Callable[[], bool | None], what: str) -> None:
        raise TimedOutError(f"{what} has not appeared after 20 s")

    storages = Storages(tmp_path, Late(100), wait_for=wait_for)
    with pytest.raises(TimedOutError, match="share 'shared'"):
        storages.add([pb.Storage(driver=pb.Storage.DRIVER_VIRTIOFS, source="shared", mount_point=str(tmp_path / "s"))])
    assert not (tmp_path / "s").exists()
