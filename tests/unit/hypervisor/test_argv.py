"""The command line is part of every template's key: a change shows here, as a changed file.

Rewrite the files with ``python -m tests.unit.hypervisor.test_argv`` and read the difference.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmsandbox_hypervisor.api import (
    Confinement,
    Cpus,
    Disk,
    Kernel,
    Memory,
    Nic,
    NinePShare,
    Port,
    PrivateMemory,
    SecurityLabels,
    SharedMemory,
    VmConfig,
)
from vmsandbox_hypervisor.children import confined
from vmsandbox_hypervisor.qemu.argv import (
    NODE_NAME_MAX,
    argv,
    blockdev,
    descriptors,
    disk_device,
    hotplug_address,
    nic_address,
    node_name,
    tap_netdev,
)
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

GOLDEN = Path(__file__).parent / "golden"

SMALL = VmConfig(
    name="small",
    directory=Path("/run/vm"),
    kernel=Kernel(path=Path("/guest/vmlinux")),
    memory=Memory(size_mib=128),
    root_ports=2,
)
FULL = VmConfig(
    name="full, with a comma",
    directory=Path("/run/vm"),
    kernel=Kernel(path=Path("/guest/vmlinux"), initrd=Path("/guest/initrd"), cmdline=("console=ttyS0", "quiet")),
    memory=Memory(size_mib=128, hotplug_mib=1024, dimm_slots=2, dimm_mib=512),
    cpus=Cpus(boot=2, maximum=16),
    disks=(Disk(id="root", path=Path("/guest/image"), read_only=True), Disk(id="loop", path=Path("/dev/loop0"))),
    ports=(Port(name="agent"), Port(name="second")),
    shares=(
        NinePShare(tag="later", path=Path("/srv/a,b"), read_only=True),
        NinePShare(tag="there", path=Path("/srv/there"), plugged=True),
    ),
    confinement=Confinement(uid=900, gid=901, groups=(36,)),
    vsock_cid=7,
)
FIRST = Nic(id="first", tap_fd=99, mac="02:00:00:00:00:01", mtu=0)
CASES = {
    "small": (SMALL, "tcg"),
    "network-cards": (
        replace(SMALL, nics=(FIRST, Nic(id="second", tap_fd=98, vhost_fd=97, mac="02:00:00:00:00:02"))),
        "tcg",
    ),
    "full": (FULL, "kvm"),
    "private-clone": (
        replace(
            SMALL,
            memory=Memory(size_mib=128, backing=PrivateMemory(fd=99)),
            restore=Path("/template/state"),
        ),
        "tcg",
    ),
    "shareable-clone": (
        replace(SMALL, memory=Memory(size_mib=128, backing=SharedMemory(fd=99)), restore=Path("/template/state")),
        "tcg",
    ),
}


def rendered(name: str) -> str:
    config, accel = CASES[name]
    assert accel in ("kvm", "tcg")
    line = confined(argv(config, accel, block_devices=["loop"]), config.confinement)  # type: ignore[arg-type]
    text = ""
    for word in line:
        text += ("\n" if word.startswith("-") and text else " " if text else "") + word
    return text + "\n"


def test_parameters_for_emulation_are_for_emulation_alone() -> None:
    config = replace(FULL, kernel=replace(FULL.kernel, emulated_cmdline=("tsc=reliable",)))
    emulated, real = argv(config, "tcg", vsock_cid=7), argv(config, "kvm", vsock_cid=7)
    assert emulated[emulated.index("-append") + 1] == "console=ttyS0 quiet tsc=reliable"
    assert real[real.index("-append") + 1] == "console=ttyS0 quiet"


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_command_line_is_the_reviewed_one(name: str) -> None:
    assert rendered(name) == (GOLDEN / f"{name}.txt").read_text()


def test_equal_configurations_have_equal_command_lines_whatever_their_descriptors() -> None:
    one = replace(SMALL, memory=Memory(size_mib=128, backing=PrivateMemory(fd=17)))
    other = replace(SMALL, memory=Memory(size_mib=128, backing=PrivateMemory(fd=40)), directory=Path("/run/other"))
    one, other = replace(one, nics=(FIRST,)), replace(other, nics=(replace(FIRST, tap_fd=7),))
    assert argv(one, "tcg") == argv(other, "tcg")


def test_every_descriptor_has_one_number() -> None:
    numbers = descriptors(FULL)
    assert sorted(numbers.values()) == list(range(3, 3 + len(numbers)))
    assert list(numbers) == [
        "monitor",
        "console",
        "kernel",
        "initrd",
        "vsock",
        "port-agent",
        "port-second",
        "disk-root",
        "disk-loop",
    ]


def test_no_two_devices_share_an_address() -> None:
    line = argv(FULL, "tcg")
    addresses = []
    for option, value in itertools.pairwise(line):
        if option == "-device" and value.startswith("{"):
            addresses.append(str(json.loads(value)["addr"]))
        elif option == "-device" and "addr=" in value:
            addresses.append(value.partition("addr=")[2].partition(",")[0])
    assert len(addresses) == len(set(addresses))
    assert len(addresses) > 20


@pytest.mark.parametrize(("index", "path"), [(0, "01.0/00.0"), (7, "01.7/00.0"), (8, "02.0/00.0"), (63, "08.7/00.0")])
def test_root_ports_are_counted_eight_to_a_slot(index: int, path: str) -> None:
    assert hotplug_address(index).pci_path == path


def test_network_cards_of_the_start_are_in_the_first_root_ports() -> None:
    config = replace(SMALL, nics=(FIRST, replace(FIRST, id="second")))
    assert [nic_address(config, name).pci_path for name in ("first", "second")] == ["01.0/00.0", "01.1/00.0"]


def test_node_names_fit_and_stay_unique() -> None:
    long = "c" * 128
    names = {node_name("disk", long), node_name("disk", long[:-1]), node_name("file", long), node_name("disk", "c")}
    assert len(names) == 4
    assert all(len(name) <= NODE_NAME_MAX for name in names)


def test_a_read_only_disk_discards_nothing_and_a_writable_one_does() -> None:
    read_only = blockdev("d", fdset=1, read_only=True, block_device=False)
    writable = blockdev("d", fdset=1, read_only=False, block_device=True)
    assert (read_only["discard"], writable["discard"]) == ("ignore", "unmap")
    assert isinstance(writable["file"], dict)
    assert writable["file"]["driver"] == "host_device"


def test_frames_go_past_qemu_where_the_host_lends_a_hand() -> None:
    assert tap_netdev("eth", fd="tap") == {"type": "tap", "id": "net-eth", "fd": "tap"}
    assert tap_netdev("eth", fd="tap", vhost_fd="v").items() >= {"vhost": True, "vhostfd": "v"}.items()


def test_errors_of_the_host_s_disk_are_reported_to_the_guest() -> None:
    device = disk_device("d", bus="rp0", addr="0")
    assert (device["werror"], device["rerror"]) == ("report", "report")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(SMALL, memory=Memory(size_mib=8)), "too small"),
        (replace(SMALL, memory=Memory(size_mib=128, hotplug_mib=5)), "multiple of 2"),
        (replace(SMALL, memory=Memory(size_mib=128, dimm_slots=1)), "go together"),
        (replace(SMALL, cpus=Cpus(boot=2, maximum=1)), "at most 1"),
        (replace(SMALL, root_ports=65), "0 to 64"),
        (replace(SMALL, nics=(FIRST,), root_ports=0), "1 network cards, but 0 root ports"),
        (replace(SMALL, nics=(FIRST, FIRST)), "two nics have the same name"),
        (replace(SMALL, vsock_cid=2), "reserved"),
        (replace(SMALL, ports=(Port(name="a"), Port(name="a"))), "two ports have the same name"),
        (replace(SMALL, ports=(Port(name="a/b"),)), "bad port id"),
        (replace(SMALL, disks=tuple(Disk(id=f"d{n}", path=Path("/d")) for n in range(40))), "slots"),
    ],
)
def test_an_impossible_configuration_is_refused(config: VmConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        argv(config, "tcg")


def test_labels_are_asked_for_right_before_the_program_is_executed() -> None:
    labels = SecurityLabels(apparmor="profile", selinux="u:r:t:s0:c1,c2")
    assert confined(["qemu"], None, labels) == [
        "setpriv",
        "--no-new-privs",
        "--selinux-label=u:r:t:s0:c1,c2",
        "--apparmor-profile=profile",
        "--",
        "qemu",
    ]
    assert QemuHypervisor().argv(replace(SMALL, labels=labels))[2] == "--selinux-label=u:r:t:s0:c1,c2"


def test_what_is_not_confined_still_gains_no_privileges() -> None:
    assert confined(["qemu"], None) == ["setpriv", "--no-new-privs", "--", "qemu"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        (GOLDEN / f"{case}.txt").write_text(rendered(case))
