"""Devices: the guest's own, disks of the host under the guest's numbers, and what cannot be had."""

from __future__ import annotations

from typing import Any

import pytest

from vmsandbox.errors import UnsupportedError
from vmsandbox.oci import nodes
from vmsandbox.oci.bindings import Source
from vmsandbox.oci.linux import Device, DeviceRule
from vmsandbox.oci.translate import Translated

DISK = Device.model_validate({"type": "b", "path": "/dev/data", "major": 8, "minor": 16, "fileMode": 0o60600, "uid": 3})
FUSE = Device(type="c", path="/dev/fuse", major=10, minor=229)
NOTHING = {"allow": False, "access": "rwm"}
ALL = DeviceRule(allow=True, access="rwm")
READ = DeviceRule(allow=True, type="b", major=8, minor=16, access="rm")


def rules(*given: dict[str, Any]) -> list[DeviceRule]:
    return [DeviceRule(**each) for each in given]


def test_common_devices_are_the_guests_and_disks_are_plugged() -> None:
    found = nodes.sort([FUSE, DISK], [*rules(NOTHING), READ])
    assert found.guest == [0]
    (disk,) = found.disks
    assert (disk.path, disk.numbers, disk.read_only, disk.mode, disk.uid) == ("/dev/data", (8, 16), True, 0o600, 3)


@pytest.mark.parametrize(
    ("given", "read_only"),
    [
        ([READ], True),
        ([READ, DeviceRule(allow=True, type="b", major=8, access="rw")], False),
        ([ALL, DeviceRule(allow=False, access="rwm")], True),
        ([DeviceRule(allow=True, type="c", access="rwm")], True),
        ([], True),
    ],
)
def test_a_disk_that_no_rule_lets_write_is_plugged_read_only(given: list[DeviceRule], read_only: bool) -> None:
    assert nodes.may_write(given, (8, 16)) is not read_only


def test_a_privileged_container_gets_what_the_machine_has_and_no_disk_of_the_host() -> None:
    gpu = Device(type="c", path="/dev/dri/card0", major=226, minor=0)
    found = nodes.sort([FUSE, DISK, gpu], [ALL])
    assert (found.guest, found.disks, found.left_out) == ([0], [], ["/dev/data", "/dev/dri/card0"])


@pytest.mark.parametrize(("path", "word"), [("/dev/vfio/12", "hardware"), ("/dev/kvm", "driver")])
def test_devices_of_the_host_are_refused_by_name(path: str, word: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        nodes.sort([Device(type="c", path=path, major=10, minor=232)], rules(NOTHING))
    assert path in str(raised.value)
    assert word in str(raised.value)
    assert "linux.devices[0]" in str(raised.value)


def test_rules_and_limits_name_disks_as_the_guest_knows_them() -> None:
    disk = nodes.sort([DISK], [READ]).disks[0]
    bound = nodes.HostDisk(member="mounts[0]", path="/m", numbers=(8, 32), read_only=False, mount=0)
    other = {"allow": True, "type": "b", "major": 254, "minor": 0, "access": "rwm"}
    parts = Translated(
        document={
            "root": {},
            "mounts": [{"source": "/dev/sdc"}],
            "linux": {
                "resources": {
                    "devices": [NOTHING, READ.model_dump(exclude_none=True), other],
                    "blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 5}], "weight": 7},
                }
            },
        },
        sources=[Source(path="/r", destination="/", read_only=False)],
        sysctls={},
        disks=[disk, bound],
    )
    made = parts.completed(str, plugged={(8, 16): (254, 48), (8, 32): (254, 64)}, node=lambda n: f"/node/{n}")
    assert made["mounts"][0]["source"] == "/node/1"
    # A rule about a disk that is not plugged is left out: in the guest the numbers are another's.
    kept = [
        (rule.get("type", ""), rule.get("major"), rule.get("minor")) for rule in made["linux"]["resources"]["devices"]
    ]
    assert kept == [("", None, None), ("b", 254, 48)]
    assert made["linux"]["resources"]["blockIO"] == {
        "throttleReadBpsDevice": [{"major": 254, "minor": 48, "rate": 5}],
        "weight": 7,
    }
    (node,) = made["linux"]["devices"]
    assert node == {"path": "/dev/data", "type": "b", "major": 254, "minor": 48, "fileMode": 0o600, "uid": 3, "gid": 0}


def test_limits_of_disks_that_are_not_given_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="throttleWriteIOPSDevice"):
        nodes.check_block_io({"throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 1}]}, [(8, 16)])
