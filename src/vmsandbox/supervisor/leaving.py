"""Devices that the guest was to let go of and has not: whoever needs their place has them gone first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsandbox.errors import UnavailableError
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vmsandbox_hypervisor.api import Vm


async def gone(vm: Vm, name: str, detach: Callable[[], Awaitable[None]]) -> None:
    """Return once there is no device `name`, of which the caller knows no user.

    One that is there all the same had its users before.  An unplug that they asked for stands, so it is waited for; a
    guest that refused is asked again.  `UnavailableError` if it still does not let go.
    """
    if name not in vm.devices():
        return
    try:
        with translating():
            await detach()
    except UnavailableError as error:
        if not isinstance(error.__cause__, DeviceError) or name not in vm.devices():
            raise
        raise UnavailableError(
            f"the machine still has '{name}' of an earlier container: {error}; try again, or stop and start the pod",
            detail=error.detail,
        ) from error
