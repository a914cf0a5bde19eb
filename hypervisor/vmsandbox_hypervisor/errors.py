"""What can go wrong with a virtual machine.

    HypervisorError
     +-- BootError       the VM did not come up; `phase` says how far it got
     +-- ExitedError     QEMU or a helper ended although nobody asked for it
     +-- DeviceError     a device could not be attached or detached
     |    +-- NoSlotError    no root port or slot is free; nothing was attached
     +-- MonitorError    QMP refused a command or the link broke
     +-- AccelError      the acceleration asked for does not work on this machine
     +-- ForkError       a machine that stands still cannot be forked

Messages are one line; `evidence` holds the phases, QEMU's stderr and the last console lines.
"""

from __future__ import annotations


class HypervisorError(Exception):
    """Root of the library's errors."""

    def __init__(self, message: str, *, evidence: str = "") -> None:
        super().__init__(message)
        self.evidence = evidence


class BootError(HypervisorError):
    """The VM did not come up.  `phase` is the last one that was reached, `seconds` after QEMU was executed."""

    def __init__(self, message: str, *, phase: str, seconds: float = 0.0, evidence: str = "") -> None:
        super().__init__(message, evidence=evidence)
        self.phase = phase
        self.seconds = seconds


class ExitedError(HypervisorError):
    """QEMU (or virtiofsd) ended although nobody asked for it.  `status` is as in `subprocess`."""

    def __init__(self, message: str, *, status: int | None, evidence: str = "") -> None:
        super().__init__(message, evidence=evidence)
        self.status = status


class DeviceError(HypervisorError):
    """A device could not be attached, detached or resized; `reason` carries QMP's own words."""

    def __init__(self, message: str, *, reason: str = "", evidence: str = "") -> None:
        super().__init__(message, evidence=evidence)
        self.reason = reason


class NoSlotError(DeviceError):
    """Every root port (or CPU or memory slot) is in use; nothing was attached."""


class MonitorError(HypervisorError):
    """QMP refused a command, or the link to the monitor broke."""


class AccelError(HypervisorError):
    """The acceleration asked for does not work on this machine; the message says why."""


class ForkError(HypervisorError):
    """A machine that stands still cannot be forked; a clone or a boot can do without."""
