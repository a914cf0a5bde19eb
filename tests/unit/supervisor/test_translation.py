from __future__ import annotations

import pytest

from vmsandbox.errors import ExhaustedError, UnavailableError, UnsupportedError
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.errors import AccelError, BootError, DeviceError, NoSlotError


def test_no_slot_left_is_told_from_a_broken_machine_and_says_what_to_do() -> None:
    with (
        pytest.raises(ExhaustedError, match=r"all 48 .*: remove a container .* .hypervisor\.pod_root_ports"),
        translating(),
    ):
        raise NoSlotError("cannot attach 'disk-x': all 48 root ports are in use")
    with pytest.raises(UnavailableError, match=r"^cannot attach 'disk-x': broken$"), translating():
        raise DeviceError("cannot attach 'disk-x': broken")


def test_a_boot_that_failed_names_the_phase_it_reached() -> None:
    with pytest.raises(UnavailableError, match=r"^no \(reached: monitor after 1\.5 s\)$") as caught, translating():
        raise BootError("no", phase="monitor", seconds=1.5, evidence="words")
    assert caught.value.detail == "words"
    with pytest.raises(UnavailableError, match=r"^no \(reached: prepared\)$"), translating():
        raise BootError("no", phase="prepared")


def test_an_acceleration_that_does_not_work_says_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match=r"^no KVM: use '--accel auto' \('hypervisor\.accel'\)$"), translating():
        raise AccelError("no KVM")
