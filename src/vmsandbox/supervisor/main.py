"""The supervisor's process: one per pod, the only owner of its VM, its agent and its documents.

Started by `cli.launch` with the pod's control socket as descriptor 3.  It ends when the pod ends, and on SIGTERM or
SIGINT it ends the pod in order.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox import cgroups, documents, locks, machines, records, remains, wire
from vmsandbox import log as logs
from vmsandbox.errors import EndingError, SandboxError, UnavailableError, is_shortage, refused
from vmsandbox.paths import Roots, SandboxPaths
from vmsandbox.title import set_title

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from vmsandbox.supervisor.control import Control
    from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec, Surroundings
    from vmsandbox.supervisor.service import Service

log = logging.getLogger(__name__)

LISTEN_FD = 3
#: seconds a supervisor without a pod waits for its first request
IDLE_TIMEOUT = 10.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a supervisor comes to its pod."""

    #: it exists already
    known: bool = False
    #: and may get a new machine
    revive: bool = False
    #: id of the pod that its machine is kept ready for
    spare: str = ""
    #: what is left: those of every supervisor
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> Start:
        spare = words[words.index("--spare") + 1] if "--spare" in words else ""
        return cls(
            known="--adopt" in words or "--revive" in words,
            revive="--revive" in words,
            spare=spare,
            arguments=tuple(word for word in words if word not in ("--adopt", "--revive", "--spare", spare)),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: ``DIRECTORY RUN_ROOT DATA_ROOT [OPTION...]``, which are `Start`'s, and those of every supervisor:
    ``--debug``, ``--config FILE``, and ``--cgroup DIR`` for each that it is to be in.

    With ``--adopt`` the pod exists and its machine is taken over; with ``--revive`` it may get a new one.  With
    ``--spare`` a machine is kept ready for a pod that somebody may ask for.
    """
    directory, run_root, data_root, *rest = sys.argv[1:] if arguments is None else arguments
    cgroups.enter(cgroups_in(rest))
    os.closerange(LISTEN_FD + 1, os.sysconf("SC_OPEN_MAX"))
    os.umask(0o022)
    os.chdir("/")
    # A share takes a descriptor for each of its files that the guest knows of.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    paths = SandboxPaths(directory)
    set_title(f"vmsandbox supervisor {os.path.basename(directory)}")
    logs.configure(sys.stderr, debug="--debug" in rest)
    logs.sandbox_id.set(os.path.basename(directory))
    listener = socket.socket(fileno=LISTEN_FD)
    listener.setblocking(False)
    config_file = config_of(rest)
    try:
        asyncio.run(
            supervise(
                Roots(run_root, data_root),
                paths,
                listener,
                start=Start.of(rest),
                config_file=config_file,
                debug="--debug" in rest,
            )
        )
    except Exception as error:
        log.exception("the supervisor failed")
        cause = _innermost(error)
        if isinstance(cause, OSError) and is_shortage(cause):
            _tell_first(listener, refused(cause, wanted="start a pod's supervisor"))
            _unlink(paths.control_file)
            remains.forget_sandbox_if_empty(paths)
        sys.exit(1)
    # Everything is released; what libraries would still do at exit only makes callers wait.
    logging.shutdown()
    os._exit(0)


def _tell_first(listener: socket.socket, error: SandboxError) -> None:
    """Tell the first who asks why there is no pod, where there is not even room for a loop that serves him."""
    listener.settimeout(IDLE_TIMEOUT)
    try:
        asker, _ = listener.accept()
        with asker:
            asker.settimeout(IDLE_TIMEOUT)
            wire.receive(asker)
            told = {"code": error.code, "message": str(error), "detail": error.detail}
            asker.sendall(wire.encode_message({"error": told}))
    except (OSError, wire.WireError) as broken:
        log.info("nobody was told: %s", broken)


def config_of(words: Sequence[str]) -> str | None:
    """The file that a supervisor's arguments name."""
    return words[words.index("--config") + 1] if "--config" in words else None


def cgroups_in(arguments: Sequence[str]) -> list[str]:
    """The cgroups that a supervisor with these arguments enters; with none it stays where it was started."""
    return [value for name, value in itertools.pairwise(arguments) if name == "--cgroup"]


async def supervise(
    roots: Roots,
    paths: SandboxPaths,
    listener: socket.socket,
    *,
    start: Start,
    config_file: str | None,
    debug: bool,
) -> None:
    """Serve the control socket, hold the pod, and leave nothing when it ends."""
    from vmsandbox.config.load import load
    from vmsandbox.supervisor import parents
    from vmsandbox.supervisor.control import Control, refuse
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox.supervisor.service import Service
    from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

    try:
        settings = load(roots, config_file=config_file)
    except SandboxError as error:
        log.error("the configuration cannot be used: %s", error)
        await refuse(listener, error, timeout=IDLE_TIMEOUT)
        _unlink(paths.control_file)
        remains.forget_sandbox_if_empty(paths)
        return
    if not debug:
        logs.set_level(settings.log.level.upper())
    around = Surroundings(
        roots=roots,
        paths=paths,
        settings=settings,
        hypervisor=QemuHypervisor(accel_cache=roots.run / "accel", settle=parents.settle),
        config_file=config_file,
    )
    async with asyncio.TaskGroup() as tasks:
        service = Service(around, tasks)
        control = Control(service, tasks)
        server = await control.listen(listener)
        try:
            await _hold_pod(around, service, control, start=start)
            if service.reason is not None and not start.spare:
                await control.heard(timeout=IDLE_TIMEOUT)  # whoever had us started is to hear why
            service.close()
            await control.quiet()
            await service.settle()
        finally:
            async with _without_successor(paths):
                server.close()
                _unlink(paths.control_file)
                service.clean_up()
            control.released.set()


@asynccontextmanager
async def _without_successor(paths: SandboxPaths) -> AsyncIterator[None]:
    """Nobody starts another supervisor of the pod in the block: it would take over what is just being removed."""
    try:
        lock = locks.opened(paths.lock_file)
    except OSError:  # nobody can start one where there is no directory
        yield
        return
    with lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        yield


async def _hold_pod(around: Surroundings, service: Service, control: Control, *, start: Start) -> None:
    """Bring the pod up (or take it over) and hold it until it is told to end or its VM dies."""
    adopt = start.known and not start.revive
    try:
        holding, adopt = await _pod(around, service, control, start=start)
        await _until_ended(holding, service, adopt=adopt)
    except* SandboxError as errors:
        first = _first(errors)
        log.warning("the pod ended: %s", first)
        if adopt and not service.sandbox.done():
            # There was nothing to take over: whoever asked meanwhile may ask another, which brings up a new machine.
            first = EndingError(str(first), detail=first.detail)
        service.lost(first)
    except* Exception as errors:
        # A bug; whoever waits hears of it, because the log goes with the pod.
        text = "".join(traceback.format_exception(errors))
        log.error("the supervisor failed\n%s", text)
        cause = _innermost(errors)
        if isinstance(cause, OSError) and is_shortage(cause):
            service.lost(refused(cause, wanted="hold the pod"))
        else:
            service.lost(SandboxError(f"internal error: {type(cause).__name__}: {cause}", detail=text))


async def _pod(
    around: Surroundings, service: Service, control: Control, *, start: Start
) -> tuple[AbstractAsyncContextManager[Sandbox], bool]:
    """The pod to hold, and whether its machine runs already."""
    from vmsandbox.supervisor.bringup import adopted, opened, swept
    from vmsandbox.supervisor.sandbox import SandboxSpec

    if start.known:
        document = documents.read(around.paths.document_file)
        spec = SandboxSpec.of(document)
        # Whoever started it was somewhere else.
        cgroups.enter(spec.cgroups)
        service.restore(spec)
        vm = document.get("vm") or {}
        # A machine that was not finished is a template's twin, with its random numbers, and no container has run in it.
        finished = bool(vm) and document.get("status") != "creating"
        if finished and (not start.revive or records.is_alive(vm.get("pid"), vm.get("start_time"))):
            service.want(spec)
            return adopted(around, document), True
        if start.revive:
            # Before anything is awaited: what is started again meanwhile is not meant.
            service.end_processes("its virtual machine is gone")
            service.tidy.clear()
        # A supervisor may have been killed before it wrote down which one it had started.
        await asyncio.to_thread(machines.end_all, around.paths.dir)
        if not start.revive:
            raise UnavailableError("the pod's virtual machine has ended")
        await swept(around, spec, document)
        service.tidy.set()
    if start.spare:
        return await _spare(around, service, start), False
    return opened(around, await _wanted(service, control, revive=start.known)), False


async def _spare(around: Surroundings, service: Service, start: Start) -> AbstractAsyncContextManager[Sandbox]:
    """The pod that a client asks of a machine that is kept ready; `UnavailableError` if nobody does."""
    from vmsandbox.supervisor import spares
    from vmsandbox.supervisor.bringup import opened

    spec, spare = await spares.asked_for(around, start.spare, service.wanted)
    return opened(around, spec, spare)


async def _wanted(service: Service, control: Control, *, revive: bool) -> SandboxSpec:
    """What the first request wants brought up; a pod that is there may be asked for something else and no more."""
    idle = asyncio.create_task(control.idle(), name="idle")
    try:
        async with asyncio.timeout(IDLE_TIMEOUT):
            if revive:
                either: set[asyncio.Future[Any]] = {service.wanted, idle}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not service.wanted.done():
                    raise UnavailableError("the pod's virtual machine was not asked for")
            return await asyncio.shield(service.wanted)
    except TimeoutError:
        raise UnavailableError("the supervisor was asked for nothing") from None
    finally:
        idle.cancel()


def _first(errors: BaseExceptionGroup[BaseException]) -> SandboxError:
    error = _innermost(errors)
    return error if isinstance(error, SandboxError) else UnavailableError(str(error))


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _until_ended(holding: AbstractAsyncContextManager[Sandbox], service: Service, *, adopt: bool) -> None:
    async with asyncio.TaskGroup() as opening:
        giving_up = opening.create_task(service.given_up(), name="given-up")
        async with holding as sandbox:
            giving_up.cancel()
            await _watched(sandbox, service, adopt=adopt)


async def _watched(sandbox: Sandbox, service: Service, *, adopt: bool) -> None:
    """Let the pod be used, and look after it, until it is told to end."""
    loop = asyncio.get_running_loop()
    from vmsandbox.supervisor import clock
    from vmsandbox.supervisor.execution import watch_events

    async with asyncio.TaskGroup() as watchers:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, sandbox.ended.set)
        watching = [
            watchers.create_task(sandbox.watch_vm(), name="watch-vm"),
            watchers.create_task(watch_events(service, sandbox), name="watch-events"),
            watchers.create_task(sandbox.network.follow(sandbox.agent), name="follow-names"),
            watchers.create_task(sandbox.network.relay_names(sandbox.agent), name="relay-names"),
            watchers.create_task(sandbox.network.watch(sandbox.vm, sandbox.agent), name="watch-interfaces"),
            watchers.create_task(sandbox.return_memory(), name="return-memory"),
            watchers.create_task(clock.keep(sandbox.agent, at_once=adopt), name="keep-time"),
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
