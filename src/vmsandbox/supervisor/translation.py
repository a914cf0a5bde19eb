"""The one place where the hypervisor library's errors become the product's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmsandbox.errors import ExhaustedError, SandboxError, UnavailableError, UnsupportedError
from vmsandbox_hypervisor.errors import AccelError, BootError, HypervisorError, NoSlotError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def translated(error: HypervisorError) -> SandboxError:
    """The product's error for one of the library's, with the evidence it carries."""
    message, detail = str(error), error.evidence
    if isinstance(error, NoSlotError):
        more = "remove a container of the pod, or raise 'hypervisor.pod_root_ports' ('root_ports' without a pod)"
        return ExhaustedError(f"{message}: {more}", detail=detail)
    if isinstance(error, AccelError):
        return UnsupportedError(f"{message}: use '--accel auto' ('hypervisor.accel')", detail=detail)
    if isinstance(error, BootError):
        return UnavailableError(f"{message} ({reached({error.phase: error.seconds})})", detail=detail)
    return UnavailableError(message, detail=detail)


def reached(phases: Mapping[str, float]) -> str:
    """The last of the phases of a machine's start, and when it was reached, for a message."""
    phase, seconds = list(phases.items())[-1]
    return f"reached: {phase} after {seconds:.1f} s" if seconds else f"reached: {phase}"


@contextmanager
def translating() -> Iterator[None]:
    """Raise the library's errors as the product's, `from` the original."""
    try:
        yield
    except HypervisorError as error:
        raise translated(error) from error
