"""What may be attached, decided without asking QEMU; the real driver and the fake share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsandbox_hypervisor.api import PrivateMemory
from vmsandbox_hypervisor.errors import DeviceError, NoSlotError
from vmsandbox_hypervisor.qemu.argv import VIRTIO_MEM_BLOCK_MIB, check_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsandbox_hypervisor.api import Memory, VmConfig

#: a guest's memory block: pc-dimms come in multiples of it
DIMM_UNIT_MIB = 128
#: A page costs 64 bytes of description, 1/64: a dimm of 16 times what is there takes a quarter of it.
DIMM_MAX_TIMES_PRESENT = 16


def check_slot_id(kind: str, identifier: str) -> None:
    """`DeviceError` for an id that QEMU would not take."""
    try:
        check_id(kind, identifier)
    except ValueError as error:
        raise DeviceError(str(error)) from error


def check_balloon(config: VmConfig) -> None:
    """Refuse a balloon where what it returns would be holes in other machines' memory."""
    if isinstance(config.memory.backing, PrivateMemory):
        raise DeviceError("cannot return free memory to the host: the machine's memory is not mapped shared")


def memory_target(memory: Memory, total_mib: int, *, dimms_mib: int) -> int:
    """The size of the virtio-mem device that makes `total_mib`, in MiB; `NoSlotError` if it cannot be that large."""
    wanted = max(0, total_mib - memory.size_mib - dimms_mib)
    wanted += -wanted % VIRTIO_MEM_BLOCK_MIB
    if wanted > memory.hotplug_mib:
        most = memory.size_mib + dimms_mib + memory.hotplug_mib
        raise NoSlotError(f"cannot have {total_mib} MiB of memory: this VM can have at most {most} MiB")
    return wanted


def check_dimm(memory: Memory, dimm_id: str, size_mib: int, *, present_mib: int, dimms_mib: Mapping[str, int]) -> None:
    """Refuse a dimm that does not fit, and one that QEMU would take and the guest would suffer from.

    `dimms_mib` are the sizes of those attached, by id.
    """
    check_slot_id("dimm", dimm_id)
    if size_mib <= 0 or size_mib % DIMM_UNIT_MIB:
        raise DeviceError(
            f"cannot attach dimm '{dimm_id}' of {size_mib} MiB: the guest takes multiples of {DIMM_UNIT_MIB} MiB"
        )
    if size_mib > DIMM_MAX_TIMES_PRESENT * present_mib:
        raise DeviceError(
            f"cannot attach dimm '{dimm_id}' of {size_mib} MiB: a guest with {present_mib} MiB has no room for "
            f"describing more than {DIMM_MAX_TIMES_PRESENT * present_mib} MiB, attach a smaller one first"
        )
    if dimm_id in dimms_mib:
        raise DeviceError(f"dimm '{dimm_id}' is attached already")
    used = sum(dimms_mib.values())
    if len(dimms_mib) >= memory.dimm_slots or used + size_mib > memory.dimm_mib:
        raise NoSlotError(
            f"cannot attach dimm '{dimm_id}' of {size_mib} MiB: {len(dimms_mib)} of {memory.dimm_slots} slots and "
            f"{used} of {memory.dimm_mib} MiB are in use"
        )
