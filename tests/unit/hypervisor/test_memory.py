"""Memory that a guest does not give back is not waited for; progress is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox_hypervisor.api import Memory as Config
from vmsandbox_hypervisor.qemu import hotplug_memory
from vmsandbox_hypervisor.qemu.hotplug_memory import MIB, Memory

if TYPE_CHECKING:
    from vmsandbox_hypervisor.api import VmConfig
    from vmsandbox_hypervisor.qemu.monitor import Monitor

#: seconds that no test waits
LONG = 3600.0


class Guest:
    """A monitor whose guest has 300 MiB plugged and gives 2 MiB back at a look, down to `least`."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.size = self.requested = 300

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> object:
        if command == "qom-set":
            assert arguments is not None
            self.requested = arguments["value"] // MIB
            return {}
        if self.requested < self.size:
            self.size = max(self.size - 2, self.least)
        return [{"type": "virtio-mem", "data": {"size": self.size * MIB, "requested-size": self.requested * MIB}}]


def memory(guest: Guest) -> Memory:
    config = type("VmConfig", (), {"memory": Config(size_mib=256, hotplug_mib=1024)})()
    return Memory(cast("VmConfig", config), cast("Monitor", guest))


@pytest.mark.parametrize("least", [200, 250])
async def test_what_the_guest_keeps_stays_asked_for_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(hotplug_memory, "STALLED", 0.15)
    state = await memory(Guest(least)).change(256 + 200, timeout=LONG)
    assert (state.plugged_mib, state.requested_mib) == (least, 200)
