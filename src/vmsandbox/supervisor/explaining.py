"""Why a request has failed, where what it met is only the consequence of the machine's end.

Whoever is waiting for the agent or for QEMU when the machine ends meets a broken connection first.  That tells its
caller neither what has happened nor what to do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vmsandbox.errors import EndingError, SandboxError, TimedOutError, UnavailableError
from vmsandbox.supervisor import answering, bundled

if TYPE_CHECKING:
    from vmsandbox.supervisor.service import Service

#: seconds that a machine whose connections are broken may take to be seen to have ended
NOTICED_WITHIN = 2.0


async def explained(service: Service, verb: str, error: SandboxError) -> SandboxError:
    """The machine's end as the error, if that is what a request has failed of; else the same error."""
    met = isinstance(error, UnavailableError) and not isinstance(error, EndingError | TimedOutError)
    if not met or not service.sandbox.done() or service.sandbox.exception() is not None:
        return error
    sandbox = service.sandbox.result()
    if sandbox.ended.is_set():
        return error  # a pod that is told to end since this request has failed ends because of it
    try:
        async with asyncio.timeout(NOTICED_WITHIN):
            await answering.death(sandbox.vm)
    except TimeoutError:
        return error
    except SandboxError as death:
        return UnavailableError(f"the pod has ended meanwhile: {death}{_way_out(service, verb)}", detail=death.detail)


def _way_out(service: Service, verb: str) -> str:
    """What to do; engines have ways of their own."""
    if any(container.document.get("kind") == bundled.KIND for container in service.containers.values()):
        return ""
    if verb in ("run", "create", "start", "pod-start"):
        return "; try again, which starts another"
    if service.implicit():
        return "; 'vmsandbox start' starts the container again in another"
    return "; 'vmsandbox pod start' starts another"
