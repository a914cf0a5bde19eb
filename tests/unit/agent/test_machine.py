"""Processors, memory and what the machine is, on a made-up /sys and /proc."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent.errors import InvalidArgumentError
from vmsandbox_agent.machine import Machine, parse_cpus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class FakeUevents:
    """Wakes up as often as there are things that happen."""

    def __init__(self, happenings: list[Callable[[], None]]) -> None:
        self.happenings = happenings
        self.closed = False

    def wait(self, seconds: float) -> bool:
        if seconds <= 0 or not self.happenings:
            return False
        self.happenings.pop(0)()
        return True

    def close(self) -> None:
        self.closed = True


class FakeTree:
    """Behaves as the kernel's cpu directory: writing `online` changes the list."""

    def __init__(self, base: Path, present: int, online: int) -> None:
        self.sys, self.proc = base / "sys", base / "proc"
        self.cpus = self.sys / "devices/system/cpu"
        self.present = 0
        self.cpus.mkdir(parents=True)
        self.plug(present)
        for cpu in range(1, online):
            (self.cpus / f"cpu{cpu}/online").write_text("1")
        (self.cpus / "online").write_text(f"0-{online - 1}")
        self.proc.mkdir()
        self.memory(total=1000, available=500)

    def plug(self, count: int) -> None:
        for cpu in range(self.present, self.present + count):
            (self.cpus / f"cpu{cpu}").mkdir()
            if cpu:
                (self.cpus / f"cpu{cpu}/online").write_text("0")
        self.present += count
        (self.cpus / "present").write_text(f"0-{self.present - 1}\n")

    def memory(self, *, total: int, available: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: {total} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")

    def switched_on(self) -> list[int]:
        return [cpu for cpu in range(1, self.present) if (self.cpus / f"cpu{cpu}/online").read_text().strip() == "1"]


def machine(tree: FakeTree, happenings: list[Callable[[], None]] | None = None) -> Machine:
    def subscribe() -> FakeUevents:
        return FakeUevents(happenings if happenings is not None else [])

    return Machine(proc=tree.proc, sys=tree.sys, crun_version=lambda: "1.8.1", subscribe=subscribe)  # type: ignore[arg-type]


def test_lists_of_processors_are_understood() -> None:
    assert parse_cpus("0-2,5,7-7\n") == [0, 1, 2, 5, 7]
    assert parse_cpus("") == []


def test_present_processors_are_switched_on(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=4, online=1)
    assert machine(tree).online_cpus(3, 0) == (3, 4)
    assert tree.switched_on() == [1, 2]


def test_the_highest_are_switched_off(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=4, online=4)
    assert machine(tree).online_cpus(2, 0) == (2, 4)
    assert tree.switched_on() == [1]


def test_the_first_stays_on_and_none_is_refused(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=2, online=2)
    assert machine(tree).online_cpus(1, 0) == (1, 2)
    with pytest.raises(InvalidArgumentError):
        machine(tree).online_cpus(0, 0)


def test_processors_that_are_being_plugged_in_are_waited_for(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    assert machine(tree, [lambda: tree.plug(1), lambda: tree.plug(1)]).online_cpus(3, 5) == (3, 3)


def test_what_does_not_come_is_reported_as_it_is(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    assert machine(tree, [lambda: tree.plug(1)]).online_cpus(3, 5) == (2, 2)


def test_memory_is_waited_for_in_both_directions(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    grow: list[Callable[[], None]] = [
        lambda: tree.memory(total=1500, available=900),
        lambda: tree.memory(total=2000, available=1400),
    ]
    assert machine(tree, grow).online_memory(2000, 5, shrink=False) == (2000, 1400)
    shrink: list[Callable[[], None]] = [lambda: tree.memory(total=1000, available=400)]
    assert machine(tree, shrink).online_memory(1200, 5, shrink=True) == (1000, 400)


def test_memory_that_does_not_come_is_reported(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    assert machine(tree).online_memory(2000, 0, shrink=False) == (1000, 500)


@pytest.mark.parametrize(("free", "taken"), [(108_003, 100_000), (8_000, 0)])
def test_free_memory_is_cleared_but_for_what_others_may_need(tmp_path: Path, free: int, taken: int) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    (tree.proc / "meminfo").write_text(f"MemTotal: 200000 kB\nMemFree: {free + 192} kB\nMemAvailable: 150000 kB\n")
    filled: list[int] = []
    cleared = Machine(proc=tree.proc, sys=tree.sys, crun_version=str, fill=filled.append).clear_memory(caches=False)
    assert cleared == taken
    assert filled == ([taken * 1024] if taken else [])


def test_caches_are_dropped_only_when_they_are_meant(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    drop = tree.proc / "sys/vm/drop_caches"
    drop.parent.mkdir(parents=True)
    guest = Machine(proc=tree.proc, sys=tree.sys, crun_version=str, fill=lambda _: None)
    guest.clear_memory(caches=False)
    assert not drop.exists()
    guest.clear_memory(caches=True)
    assert drop.read_text() == "3"


def test_blocks_that_the_kernel_left_offline_are_put_online(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    block = tree.sys / "devices/system/memory/memory3"
    block.mkdir(parents=True)
    (block / "state").write_text("offline")
    (block.parent / "auto_online_blocks").write_text("offline\n")
    machine(tree).online_memory(1000, 0, shrink=False)
    assert (block / "state").read_text() == "online"


def test_the_boot_id_is_read_only_of_a_guest_with_an_identity(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    boot_id = tree.proc / "sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text("1234\n")
    subject = machine(tree)
    assert subject.details(identified=False)["boot_id"] == ""
    details = subject.details(identified=True)
    assert (details["boot_id"], details["crun_version"], details["cpus_online"]) == ("1234", "1.8.1", 1)


def test_crun_is_asked_once_and_not_when_in_haste(tmp_path: Path) -> None:
    tree = FakeTree(tmp_path, present=1, online=1)
    asked: list[int] = []
    subject = Machine(proc=tree.proc, sys=tree.sys, crun_version=lambda: asked.append(1) or "2.0")  # type: ignore[func-returns-value]
    assert subject.details(identified=False, quickly=True)["crun_version"] == ""
    for _ in range(3):
        assert subject.details(identified=False)["crun_version"] == "2.0"
    assert len(asked) == 1
