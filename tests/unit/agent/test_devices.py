"""Devices by their place, in a made-up /sys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent import devices
from vmsandbox_agent.devices import BlockDevice
from vmsandbox_agent.errors import InvalidArgumentError, TimedOutError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class FakeUevents:
    def __init__(self, happenings: list[Callable[[], None]]) -> None:
        self.happenings = happenings
        self.closed = 0

    def wait(self, seconds: float) -> bool:
        if not self.happenings:
            return False
        self.happenings.pop(0)()
        return True

    def close(self) -> None:
        self.closed += 1


class Tree:
    """Root ports 02.0 to 02.3 on bus 0, and what is plugged into them."""

    def __init__(self, base: Path) -> None:
        self.sys, self.dev = base / "sys", base / "dev"
        self.real = self.sys / "devices/pci0000:00"
        self.bus = self.sys / "bus/pci/devices"
        self.disks = self.sys / "block"
        for directory in (self.bus, self.disks, self.real, self.dev):
            directory.mkdir(parents=True)
        for function in range(4):
            self.add(f"0000:00:02.{function}", self.real)
        self.add("0000:00:1f.0", self.real)

    def add(self, name: str, parent: Path) -> Path:
        (parent / name).mkdir()
        (self.bus / name).symlink_to(parent / name)
        return parent / name

    def plug_disk(self, port: int, bus: int, name: str = "vda", below: str = "virtio3", parts: int = 0) -> None:
        device = self.add(f"0000:{bus:02x}:00.0", self.real / f"0000:00:02.{port}")
        disk = device / below / "block" / name
        disk.mkdir(parents=True)
        (self.disks / name).symlink_to(f"../{disk.relative_to(self.sys)}")
        (disk / "dev").write_text("254:16\n")
        (disk / "size").write_text("2048\n")
        (self.dev / name).touch()
        for number in range(1, parts + 1):
            part = disk / f"{name}{number}"
            part.mkdir()
            (part / "dev").write_text(f"254:{16 + number}\n")
            (part / "size").write_text("1024\n")
            (part / "partition").write_text(f"{number}\n")
            (self.dev / f"{name}{number}").touch()

    def find(self, place: str, partition: int = 0) -> BlockDevice | None:
        return devices.block_device(place, partition, sys=self.sys, dev=self.dev)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_disk_is_found_behind_its_port_whatever_its_bus(tree: Tree) -> None:
    tree.plug_disk(1, bus=9)
    assert tree.find("02.1/00.0") == BlockDevice(str(tree.dev / "vda"), 254, 16)
    assert tree.find("02.2/00.0") is None
    assert tree.find("03.0/00.0") is None


def test_a_partition_is_found_by_its_number(tree: Tree) -> None:
    tree.plug_disk(1, bus=9, parts=2)
    assert tree.find("02.1/00.0", 2) == BlockDevice(str(tree.dev / "vda2"), 254, 18)
    assert tree.find("02.1/00.0", 3) is None


def test_a_scsi_disk_is_found_further_down(tree: Tree) -> None:
    tree.plug_disk(0, bus=1, name="sda", below="virtio0/host2/target2:0:0/2:0:0:0")
    found = tree.find("02.0/00.0")
    assert found is not None
    assert found.node == str(tree.dev / "sda")


def test_disks_that_are_behind_no_device_are_passed_over(tree: Tree) -> None:
    loop = tree.sys / "devices/virtual/block/loop0"
    loop.mkdir(parents=True)
    (tree.disks / "loop0").symlink_to("../devices/virtual/block/loop0")
    (tree.disks / "gone").symlink_to("../devices/pci0000:00/0000:00:02.3/0000:01:00.0/virtio9/block/gone")
    assert tree.find("02.1/00.0") is None
    tree.plug_disk(1, bus=9)
    assert tree.find("02.1/00.0") == BlockDevice(str(tree.dev / "vda"), 254, 16)
    assert tree.find("02.3/00.0") is None


def test_a_disk_without_node_or_size_is_not_there_yet(tree: Tree) -> None:
    tree.plug_disk(1, bus=9)
    (tree.dev / "vda").unlink()
    assert tree.find("02.1/00.0") is None
    (tree.dev / "vda").touch()
    size = tree.real / "0000:00:02.1/0000:09:00.0/virtio3/block/vda/size"
    size.write_text("0\n")
    assert tree.find("02.1/00.0") is None


@pytest.mark.parametrize("place", ["", "2.0", "../02.0", "02.0/00.0/", "02.8", "0000:00:02.0"])
def test_nonsense_is_no_place(tree: Tree, place: str) -> None:
    with pytest.raises(InvalidArgumentError):
        tree.find(place)


def test_what_is_not_there_is_waited_for_by_uevents(tree: Tree) -> None:
    uevents = FakeUevents([lambda: None, lambda: tree.plug_disk(1, bus=3), lambda: pytest.fail("waited too long")])
    found = devices.wait_for(lambda: tree.find("02.1/00.0"), "disk", timeout=5, subscribe=lambda: uevents)  # type: ignore[arg-type, return-value]
    assert found.minor == 16
    assert uevents.closed == 1


def test_what_comes_between_the_look_and_the_subscription_is_not_missed(tree: Tree) -> None:
    def subscribe() -> FakeUevents:
        tree.plug_disk(1, bus=3)
        return FakeUevents([])

    assert devices.wait_for(lambda: tree.find("02.1/00.0"), "disk", subscribe=subscribe)  # type: ignore[arg-type]


def test_what_does_not_come_is_named(tree: Tree) -> None:
    uevents = FakeUevents([])
    with pytest.raises(TimedOutError, match="disk at x has not appeared after 3 s"):
        devices.wait_for(lambda: None, "disk at x", timeout=3, subscribe=lambda: uevents)  # type: ignore[arg-type, return-value]
    assert uevents.closed == 1


def test_real_uevents_can_be_waited_for() -> None:
    uevents = devices.Uevents()
    try:
        assert uevents.wait(0) is False
    finally:
        uevents.close()


def test_a_port_is_found_by_its_name(tree: Tree) -> None:
    for port, name in (("vport1p1", "other"), ("vport1p2", "vmsandbox.agent")):
        directory = tree.sys / "class/virtio-ports" / port
        directory.mkdir(parents=True)
        (directory / "name").write_text(name + "\n")
    assert devices.port_named("vmsandbox.agent", sys=tree.sys, dev=tree.dev) is None
    (tree.dev / "vport1p2").touch()
    assert devices.port_named("vmsandbox.agent", sys=tree.sys, dev=tree.dev) == tree.dev / "vport1p2"
