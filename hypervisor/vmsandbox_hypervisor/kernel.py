"""Parameters on a guest kernel's command line that suit the machine the driver builds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal

CPUINFO = Path("/proc/cpuinfo")


def host_khz(cpuinfo: Path = CPUINFO) -> int | None:
    """The host's clock in kHz, which is also the guest's under emulation; None if it is not known."""
    match = re.search(r"^cpu MHz\s*:\s*([0-9.]+)$", cpuinfo.read_text(), re.MULTILINE)
    return int(float(match[1]) * 1000) if match else None


def parameters(
    accel: Literal["kvm", "tcg"], *, hz: int = 250, khz: int | None = None, quiet: bool = True
) -> tuple[str, ...]:
    """Console on the serial port, a panic that ends the VM, memory that is online when it arrives, no slow calibration.

    `hz` is the guest kernel's CONFIG_HZ; with `khz`, the clock, it saves the delay calibration of hot-plugged
    vCPUs under emulation.
    """
    # Memory that could be hot-plugged above 4 GiB makes a kernel set 64 MiB aside for devices that reach no further;
    # there are none.
    found = ["console=ttyS0", "panic=-1", "noreplace-smp", "swiotlb=noforce"]
    # Hot-plugged memory is usable at once, and virtio-mem goes on to plug more: it stops while much is offline.
    found.append("memhp_default_state=online")
    if accel == "tcg":
        found.append("no_timer_check")
        if khz is not None:
            found.append(f"lpj={khz * 1000 // hz}")
    if quiet:
        found.append("quiet")
    return tuple(found)
