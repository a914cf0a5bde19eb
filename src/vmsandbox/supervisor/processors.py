"""Whether the vCPUs that options ask for can be had: what would be given in part only is refused instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci import cpusets

if TYPE_CHECKING:
    from vmsandbox.config.model import SandboxSettings


def require_quota(cpus: float | None, settings: SandboxSettings) -> None:
    """Refuse more processor time than all vCPUs of a pod have; `InvalidArgumentError` says how many those are."""
    most = settings.cpu_ceiling()
    if cpus is not None and cpus > most:
        raise InvalidArgumentError(
            f"cpus '{cpus:g}' is more than a pod can have here, which is {most}{_raise(settings)}"
        )


def require_set(text: str, *, online: int, settings: SandboxSettings) -> None:
    """Refuse a list of vCPUs with one that a pod with `online` of them does not have."""
    highest = max(cpusets.parse(text, name="cpuset_cpus"), default=0)
    if highest < online:
        return
    most = settings.cpu_ceiling()
    has = f"the pod has {online} of them, counted from 0"
    more = f"give '--cpus {highest + 1}' as well" if highest < most else f"a pod can have {most} here{_raise(settings)}"
    raise InvalidArgumentError(f"cpuset_cpus '{text}' names vCPU {highest}, but {has}: {more}")


def _raise(settings: SandboxSettings) -> str:
    return ": 'sandbox.max_cpus' allows no more" if settings.max_cpus == settings.cpu_ceiling() else ""
