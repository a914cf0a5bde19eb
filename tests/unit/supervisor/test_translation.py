from __future__ import annotations

import pytest

from vmsandbox.errors import ExhaustedError, UnavailableError
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.errors import DeviceError, NoSlotError


def test_no_slot_left_is_told_from_a_broken_machine_and_says_what_to_do() -> None:
    with (
        pytest.raises(ExhaustedError, match=r"all 48 .*: remove a container .* .hypervisor\.pod_root_ports"),
        translating(),
    ):
        raise NoSlotError("cannot attach 'disk-x': all 48 root ports are in use")
    with pytest.raises(UnavailableError, match=r"^cannot attach 'disk-x': broken$"), translating():
        raise DeviceError("cannot attach 'disk-x': broken")
