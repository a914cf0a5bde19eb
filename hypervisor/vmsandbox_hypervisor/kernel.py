"""Parameters on a guest kernel's command line that suit the machine the driver builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal


def tsc_frequency(khz: int) -> str:
    """Tell an emulated guest how fast the host's time-stamp counter is, which is its own as well.

    Measured in a guest that a busy host lets wait, it can come out many times too slow: then the guest's clock is that
    many times too fast.  The kernel takes a value that is off by less than a hundredth for a first one.
    """
    return f"tsc_early_khz={khz}"


def parameters(
    accel: Literal["kvm", "tcg"], *, hz: int = 250, khz: int | None = None, quiet: bool = True
) -> tuple[str, ...]:
    """Console on the serial port, a panic that ends the VM, memory that is online when it arrives, no slow calibration.

    `hz` is the guest kernel's CONFIG_HZ; with `khz`, the clock, an emulated guest need not measure it, and its
    hot-plugged vCPUs no delays.
    """
    # Memory that could be hot-plugged above 4 GiB makes a kernel set 64 MiB aside for devices that reach no further;
    # there are none.
    found = ["console=ttyS0", "panic=-1", "noreplace-smp", "swiotlb=noforce"]
    # Hot-plugged memory is usable at once, and virtio-mem goes on to plug more: it stops while much is offline.
    found.append("memhp_default_state=online")
    if accel == "tcg":
        found.append("no_timer_check")
        if khz is not None:
            found += [tsc_frequency(khz), f"lpj={khz * 1000 // hz}"]
    if quiet:
        found.append("quiet")
    return tuple(found)
