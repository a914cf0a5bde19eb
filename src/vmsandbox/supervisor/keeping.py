"""The process that makes a parent and keeps it: for as long as pods are forked from it, and a minute more.

The nursery forks it when a pod has wished for one and nobody has asked for anything since.  With it the parent ends;
what was forked goes on.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import signal
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmsandbox import documents, locks, machines, records, remains, surroundings
from vmsandbox import log as logs
from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.paths import Roots
from vmsandbox.supervisor import bringup, cards, parents, slots, template, warming
from vmsandbox.supervisor.aio import told_to_end
from vmsandbox.supervisor.answering import first_answer
from vmsandbox.supervisor.sandbox import RPC_TIMEOUT, Demand, SandboxSpec, memory_of
from vmsandbox.supervisor.translation import translating
from vmsandbox.supervisor.watch import DELETED, MOVED_FROM, MOVED_ITSELF, Watch
from vmsandbox.title import set_title
from vmsandbox_hypervisor.aio import readable
from vmsandbox_hypervisor.api import Disk, SharedMemory
from vmsandbox_hypervisor.children import Child
from vmsandbox_hypervisor.qemu.template import STATE, release_zeros

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vmsandbox.paths import SandboxPaths
    from vmsandbox.supervisor.sandbox import Surroundings as Around
    from vmsandbox_hypervisor.api import Parent, Vm

log = logging.getLogger(__name__)

#: seconds without a fork after which it ends
LINGER = 60.0
#: how much it leaves the processors to others
NICENESS = 5
LOG = "keeper.log"
#: after the second a third finds next to nothing left to translate
REHEARSALS = 2


def keep(run_root: str, wanted: parents.Wish) -> bool:
    """Be the keeper of the parent that is wanted, unless somebody else is; whether there was one."""
    roots = Roots(run_root, wanted.data_root)
    paths = parents.place(roots, wanted.key, shareable=wanted.shareable)
    os.makedirs(roots.parents_dir, mode=0o700, exist_ok=True)
    os.makedirs(paths.dir, mode=0o700, exist_ok=True)
    with locks.opened(paths.lock_file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        # Until somebody waits for it: what is here has to go in any case.
        signal.signal(signal.SIGTERM, _end)
        set_title(f"vmsandbox parent {paths.directory.name}")
        try:
            _clear(paths)
            return _run(roots, paths, wanted)
        finally:
            remains.remove_tree(paths.dir)


def _end(_number: int, _frame: object) -> None:
    raise SystemExit


def _clear(paths: SandboxPaths) -> None:
    """Remove what is left of a keeper that was killed."""
    machines.end_all(paths.dir)
    for entry in os.scandir(paths.dir):
        if entry.path != paths.lock_file:
            remains.remove_tree(entry.path)


def _run(roots: Roots, paths: SandboxPaths, wanted: parents.Wish) -> bool:
    with open(f"{roots.parents_dir}/{LOG}", "a") as file:
        logs.configure(file)
        logs.sandbox_id.set(paths.directory.name)
        where = surroundings.of(os.getpid(), grouped=False)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        try:
            asyncio.run(_kept(roots, paths, wanted, where))
            return True
        except (SandboxError, OSError) as error:
            log.warning("no machine is kept to be forked: %s", error)
        except Exception:
            log.exception("the keeper failed")
        return False


async def _kept(roots: Roots, paths: SandboxPaths, wanted: parents.Wish, where: list[object]) -> None:
    from vmsandbox.config.load import load
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

    around = Surroundings(
        roots=roots,
        paths=paths,
        settings=load(roots, config_file=wanted.config_file),
        hypervisor=QemuHypervisor(accel_cache=roots.run / "accel"),
        config_file=wanted.config_file,
    )
    with told_to_end() as told, Watch() as watch:
        watch.add(roots.run_dir, MOVED_FROM | DELETED | MOVED_ITSELF)
        watch.add(str(roots.templates), MOVED_FROM | DELETED)
        making = asyncio.create_task(_hold(around, wanted, where, watch), name="hold a parent")
        await asyncio.wait({making, told}, return_when=asyncio.FIRST_COMPLETED)
        making.cancel()
        with suppress(asyncio.CancelledError):
            await making


async def _hold(around: Around, wanted: parents.Wish, where: list[object], watch: Watch) -> None:
    # Another one in its place has the same key.
    state = str(around.roots.templates / wanted.key / STATE)
    saved = surroundings.change_of(state)
    async with _standing(around, wanted) as (parent, child):
        me = os.getpid()
        offer: dict[str, Any] = {
            "keeper": {"pid": me, "start_time": records.start_time(me)},
            "machine": {
                "pid": parent.pid,
                "start_time": parent.start_time,
                "name": parent.name,
                "memory": str(parent.memory),
                "disks": [{"id": name, "path": str(path)} for name, path in parent.disks.items()],
            },
            "shareable": wanted.shareable,
            "surroundings": where,
        }
        documents.write(around.paths.offer_file, offer)
        while (left := _unused_until(around.paths) - time.time()) > 0:
            gone = asyncio.create_task(_gone(watch), name="watch what it depends on")
            either: set[asyncio.Future[Any]] = {gone, child.exited}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if child.exited.done() or surroundings.change_of(state) != saved:
                return


def _unused_until(paths: SandboxPaths) -> float:
    try:
        return os.stat(paths.offer_file).st_mtime + LINGER
    except FileNotFoundError:  # somebody has removed the run root
        return 0.0


async def _gone(watch: Watch) -> None:
    await readable(watch.fd)
    watch.gone()


@asynccontextmanager
async def _standing(around: Around, wanted: parents.Wish) -> AsyncIterator[tuple[Parent, Child]]:
    """The parent for the block, and its process."""
    spec = SandboxSpec(
        id=around.paths.directory.name,
        implicit=wanted.implicit,
        shareable=wanted.shareable,
        shared_fs=wanted.shared_fs,
        accel=wanted.accel,
    )
    # It has the rights to become whoever a fork is to be.  Nobody's code runs in it.
    config = replace(bringup.vm_config_for(around, spec), confinement=None)
    around.paths.vm.mkdir(mode=0o700)
    async with AsyncExitStack() as stack:
        if await template.key_for(around, config) != wanted.key:
            raise UnavailableError("the configuration has changed since the pod was made that wished for it")
        origin = template.clone_of(around, config, wanted.key, shareable=spec.shareable, mode="require")
        clone = stack.enter_context(origin)
        assert clone is not None
        if slots.has(clone):
            assert clone.restore is not None
            clone = await asyncio.to_thread(slots.for_clone, clone, spec, clone.restore.with_name(template.LAYER))
        clone = await stack.enter_async_context(cards.idle(clone))
        with translating():
            async with around.hypervisor.running(clone) as vm:
                parent = await _made(around, vm)
                vm.release()
            stack.push_async_callback(around.hypervisor.destroy, clone, pid=parent.pid, start_time=parent.start_time)
            child = Child.adopted(f"parent {parent.name}", parent.pid, parent.start_time)
            stack.callback(child.forget)
            yield parent, child


async def _made(around: Around, vm: Vm) -> Parent:
    """Have a machine go through what pods do, and stop it where nothing is left of that."""
    config = vm.config
    async with bringup.agent_of(vm, config.directory) as agent:
        await first_answer(vm, agent.details(timeout=config.boot_timeout))
        async with asyncio.timeout(warming.TIMEOUT):
            for _ in range(REHEARSALS):
                await warming.rehearse(around, vm, agent)
            if slots.has(config):
                await warming.warm(around, agent, slots.address(config, slots.IMAGE), None)
            if isinstance(config.memory.backing, SharedMemory):
                await warming.clear(agent)
    if slots.has(config):
        await vm.replace_disk(Disk(id=slots.IMAGE, path=slots.empty_image(config.directory), read_only=True))
    if config.memory.hotplug_mib:
        # What most pods get; the kernel's description of it is a part of what forks share then.
        await vm.set_memory(memory_of(around.settings.sandbox, [Demand()]), timeout=RPC_TIMEOUT)
    parent = await vm.stand()
    backing = config.memory.backing
    if isinstance(backing, SharedMemory) and backing.fd is not None:
        await asyncio.to_thread(release_zeros, backing.fd)
    return parent
