"""What a supervisor writes down of a machine is what the next one needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vmsandbox.supervisor import store
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
    VmConfig,
)

CONFIG = VmConfig(
    name="vmsandbox-abc",
    directory=Path("/run/x/vm"),
    kernel=Kernel(path=Path("/k"), initrd=Path("/i"), cmdline=("quiet", "a=b"), emulated_cmdline=("tsc=reliable",)),
    memory=Memory(size_mib=256, hotplug_mib=512),
    cpus=Cpus(boot=1, maximum=4),
    disks=(Disk(id="root", path=Path("/d"), read_only=True), Disk(id="layer", path=Path("/l"))),
    nics=(Nic(id="first", tap_fd=-1, mac="02:00:00:00:00:01", mtu=0),),
    ports=(Port(name="agent"),),
    shares=(NinePShare(tag="shared", path=Path("/s")),),
    confinement=Confinement(uid=1900001, gid=1900001, groups=(7, 8)),
    labels=SecurityLabels(apparmor="profile", selinux="u:r:t:s0"),
    restore=Path("/t/state"),
)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, kernel=Kernel(path=Path("/k")), confinement=None, shares=(), restore=None, disks=()),
    ],
    ids=["full", "small"],
)
def test_b4_a_machine_and_its_devices_come_back_from_their_document(config: VmConfig) -> None:
    document = json.loads(json.dumps(store.vm_document(config, pid=7, start_time=8)))
    assert (document["pid"], document["start_time"]) == (7, 8)
    assert store.vm_config(document) == config


def test_b4_memory_that_was_a_clone_s_is_known_as_such_without_its_descriptor() -> None:
    config = replace(CONFIG, memory=replace(CONFIG.memory, backing=PrivateMemory(fd=5)))
    document = json.loads(json.dumps(store.vm_document(config, pid=7, start_time=8)))
    assert store.vm_config(document).memory.backing == PrivateMemory(fd=-1)


def test_descriptors_of_a_network_card_are_nobody_else_s() -> None:
    config = replace(CONFIG, nics=(replace(CONFIG.nics[0], tap_fd=5, vhost_fd=6),))
    document = json.loads(json.dumps(store.vm_document(config, pid=7, start_time=8)))
    assert store.vm_config(document).nics == CONFIG.nics


def test_a_machine_of_an_earlier_version_has_no_network_cards_from_its_start() -> None:
    document = json.loads(json.dumps(store.vm_document(CONFIG, pid=7, start_time=8)))
    del document["config"]["nics"]
    assert store.vm_config(document) == replace(CONFIG, nics=())
