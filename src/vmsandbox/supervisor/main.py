"""The supervisor's process: one per pod, the only owner of its VM, its agent and its documents.

Started by `cli.launch` with the pod's control socket as descriptor 3.  It ends when the pod ends, and on SIGTERM or
SIGINT it ends the pod in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from vmsandbox import log as logs
from vmsandbox import records
from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.paths import Roots, SandboxPaths
from vmsandbox.title import set_title

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from vmsandbox.supervisor.sandbox import Sandbox, Surroundings
    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)

LISTEN_FD = 3
#: seconds a supervisor without a pod waits for its first request
IDLE_TIMEOUT = 10.0


def main() -> None:
    """Entry point: ``DIRECTORY RUN_ROOT DATA_ROOT [--adopt] [--debug] [--config FILE]``."""
    directory, run_root, data_root, *rest = sys.argv[1:]
    os.closerange(LISTEN_FD + 1, os.sysconf("SC_OPEN_MAX"))
    os.umask(0o022)
    os.chdir("/")
    paths = SandboxPaths(directory)
    set_title(f"vmsandbox supervisor {os.path.basename(directory)}")
    logs.configure(sys.stderr, debug="--debug" in rest)
    logs.sandbox_id.set(os.path.basename(directory))
    listener = socket.socket(fileno=LISTEN_FD)
    listener.setblocking(False)
    config_file = rest[rest.index("--config") + 1] if "--config" in rest else None
    try:
        asyncio.run(
            supervise(
                Roots(run_root, data_root),
                paths,
                listener,
                adopt="--adopt" in rest,
                config_file=config_file,
                debug="--debug" in rest,
            )
        )
    except Exception:
        log.exception("the supervisor failed")
        sys.exit(1)
    # Everything is released; what libraries would still do at exit only makes callers wait.
    logging.shutdown()
    os._exit(0)


async def supervise(
    roots: Roots, paths: SandboxPaths, listener: socket.socket, *, adopt: bool, config_file: str | None, debug: bool
) -> None:
    """Serve the control socket, hold the pod, and leave nothing when it ends."""
    from vmsandbox.config.load import load
    from vmsandbox.supervisor.control import Control
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox.supervisor.service import Service
    from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

    settings = load(roots, config_file=config_file)
    if not debug:
        logging.getLogger().setLevel(settings.log.level.upper())
    around = Surroundings(
        roots=roots,
        paths=paths,
        settings=settings,
        hypervisor=QemuHypervisor(accel_cache=roots.run / "accel"),
        config_file=config_file,
    )
    async with asyncio.TaskGroup() as tasks:
        service = Service(around, tasks)
        control = Control(service, tasks)
        server = await control.listen(listener)
        try:
            await _hold_pod(around, service, adopt=adopt)
            await control.quiet()
            await service.settle()
        finally:
            server.close()
            _unlink(paths.control_file)
            service.clean_up()
            control.released.set()


async def _hold_pod(around: Surroundings, service: Service, *, adopt: bool) -> None:
    """Bring the pod up (or take it over) and hold it until it is told to end or its VM dies."""
    try:
        holding = await _pod(around, service, adopt=adopt)
        await _until_ended(holding, service, adopt=adopt)
    except* SandboxError as errors:
        first = _first(errors)
        log.warning("the pod ended: %s", first)
        service.lost(first)


async def _pod(around: Surroundings, service: Service, *, adopt: bool) -> AbstractAsyncContextManager[Sandbox]:
    from vmsandbox.supervisor.sandbox import SandboxSpec, adopted, opened

    if adopt:
        document = records.read_document(around.paths.document_file)
        service.restore(SandboxSpec.of(document))
        if not document.get("vm"):
            raise UnavailableError("the pod's virtual machine has ended")
        return adopted(around, document)
    try:
        async with asyncio.timeout(IDLE_TIMEOUT):
            return opened(around, await asyncio.shield(service.wanted))
    except TimeoutError:
        raise UnavailableError("the supervisor was asked for nothing") from None


def _first(errors: BaseExceptionGroup[BaseException]) -> SandboxError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, SandboxError) else UnavailableError(str(error))


async def _until_ended(holding: AbstractAsyncContextManager[Sandbox], service: Service, *, adopt: bool) -> None:
    loop = asyncio.get_running_loop()
    async with holding as sandbox, asyncio.TaskGroup() as watchers:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, sandbox.ended.set)
        watching = [
            watchers.create_task(sandbox.watch_vm(), name="watch-vm"),
            watchers.create_task(service.watch_events(sandbox), name="watch-events"),
            watchers.create_task(sandbox.network.follow(sandbox.agent), name="follow-names"),
        ]
        if adopt:
            await service.take_over(sandbox)
        service.ready(sandbox)
        await sandbox.ended.wait()
        await service.wind_down(sandbox)
        for task in watching:
            task.cancel()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
