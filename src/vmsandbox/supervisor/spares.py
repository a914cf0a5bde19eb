"""Machines that are kept ready: clones that have run a container before anybody asks for one.

Most of a clone's start is the emulator translating the guest's code, which each machine does anew.  A spare has that
behind it.  It is a pod that has its id, its supervisor and its machine, but no identity yet: the nursery starts it
when nobody asked for a while, and the next client that wants an ordinary pod takes it over by its id.

    <spares>/<id>.new        it is being made ready, by whom and where
    <spares>/<id>            by what a client knows whether it is for him; whoever removes it has the spare
    <spare data>/<id>/       the writable layer, until a container has it

It has the network that pods have by default.  The rest is only known then: the image is put behind the machine's slot,
the layer is given its place, and the guest gets its identity as every clone does.  A machine that does not suit is
thrown away, and the pod gets another as if there had been none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import documents, remains, surroundings
from vmsandbox.config.load import files
from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.resources.network.options import requested
from vmsandbox.supervisor import answering, bringup, slots, template, warming
from vmsandbox.supervisor.aio import told_to_end
from vmsandbox.supervisor.network import connected
from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec
from vmsandbox.supervisor.translation import translating
from vmsandbox.supervisor.watch import DELETED, MOVED_FROM, Watch
from vmsandbox_hypervisor.aio import readable
from vmsandbox_hypervisor.api import Disk

if TYPE_CHECKING:
    from vmsandbox.guest.client import AgentClient
    from vmsandbox.supervisor.network import Connection
    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox_hypervisor.api import Vm, VmConfig

log = logging.getLogger(__name__)

COMING = ".new"
#: seconds a spare waits to be asked for
LINGER = 60.0
#: seconds a client may take from taking a spare to asking for a container
PATIENCE = 10.0


class Spare:
    """A machine without an identity.  Obtain one from `asked_for`; `taken` or `close` it."""

    def __init__(self, around: Surroundings, spec: SandboxSpec) -> None:
        self.around = around
        self.id = spec.id
        self._spec = spec
        self._config = bringup.vm_config_for(around, spec)
        self._stack = AsyncExitStack()
        self._vm: Vm
        self._agent: AgentClient
        self._network: Connection
        self._key = ""
        self._layer = around.roots.spare_data / spec.id / "scratch.img"

    async def prepare(self) -> None:
        """Clone the machine and run a container in it; on failure nothing is left."""
        around, stack = self.around, self._stack
        try:
            around.paths.vm.mkdir(mode=0o711, exist_ok=True)
            self._layer.parent.mkdir(mode=0o700, parents=True)
            stack.callback(remains.remove_tree, str(self._layer.parent))
            (self._layer.parent / "owner").write_text(around.roots.run_dir)
            self._network = await stack.enter_async_context(connected(around, self._spec, self._config))
            config = await stack.enter_async_context(bringup.confined(around, self._spec, self._config))
            self._key = await template.key_for(around, config)
            origin = template.clone_of(around, config, self._key, shareable=False, mode="require")
            clone = stack.enter_context(origin)
            assert clone is not None
            assert clone.restore is not None
            own = replace(self._spec, layer=str(self._layer))
            saved = clone.restore.with_name(template.LAYER)
            config = await asyncio.to_thread(slots.for_clone, clone, own, saved)
            config = await self._network.card.put_into(config)
            self._vm, self._agent = await bringup.started(around, config, stack)
            await answering.first_answer(self._vm, self._agent.details(timeout=config.boot_timeout))
            with translating():
                await self._network.plug(self._vm)
            await warming.warm(around, self._agent, slots.address(config, slots.IMAGE), None)
        except BaseException:
            await stack.aclose()
            raise

    def suits(self, spec: SandboxSpec, config: VmConfig) -> bool:
        """Whether this is the machine, `config`, that a pod would get."""
        return (
            bool(spec.image and spec.layer)
            and not spec.shareable
            and (spec.template or self.around.settings.sandbox.template) != "off"
            and self._network.suits(spec)
            and self._vm.ended() is None
            and replace(config, name=self._config.name) == self._config
        )

    async def taken(self, spec: SandboxSpec, stack: AsyncExitStack) -> Sandbox:
        """The pod that `spec` asks for; from now on its machine and network are left with the `stack`."""
        began = time.monotonic()
        stack.push_async_exit(self._stack.pop_all())
        with translating():
            await self._vm.replace_disk(Disk(id=slots.IMAGE, path=Path(spec.image), read_only=True))
        os.rename(self._layer, spec.layer)
        self._network.become(spec)
        sandbox = Sandbox(self.around, spec, self._vm, self._agent, self._network)
        sandbox.template_key = self._key
        return await bringup.introduced(sandbox, began=began)

    async def close(self) -> None:
        """End the machine, and leave nothing."""
        await self._stack.aclose()

    async def ended(self) -> None:
        """Raises when the machine has ended by itself."""
        await answering.death(self._vm)


async def asked_for(
    around: Surroundings, pod_id: str, asked: asyncio.Future[SandboxSpec]
) -> tuple[SandboxSpec, Spare | None]:
    """Keep a machine ready until a client asks for a pod; the pod, and the machine unless there is none to be had.

    Raises `UnavailableError` when nobody asks in time, or the process is told to end, and then nobody can any more.
    """
    with told_to_end() as ending:
        making = asyncio.create_task(_prepared(around, pod_id), name="make a machine ready")
        await _first_of(making, ending)
        making.cancel()  # which does nothing once it is there
        try:
            spare = await making
        except asyncio.CancelledError:
            if not ending.done():
                raise
            spare = None
        try:
            if spare is not None:
                await _offered(spare, asked, ending)
            if not asked.done():
                raise UnavailableError("nobody has asked for the machine that was kept ready")
            return asked.result(), spare
        except BaseException:
            if spare is not None:
                await spare.close()
            raise
        finally:
            with suppress(FileNotFoundError):
                Path(around.roots.spares_dir, pod_id + COMING).unlink()


async def _first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


async def _prepared(around: Surroundings, pod_id: str) -> Spare | None:
    """A spare machine, or None and a line in the log."""
    network = requested({}, default=around.settings.network.default).document()
    spare = Spare(around, SandboxSpec(id=pod_id, hostname=pod_id[:12], network=network))
    try:
        await spare.prepare()
        return spare
    except (SandboxError, OSError) as error:
        log.warning("no machine is kept ready: %s", error)
        return None


async def _offered(spare: Spare, asked: asyncio.Future[SandboxSpec], ending: asyncio.Future[None]) -> None:
    """Wait until somebody asks for a spare, or it is not to be had any more."""
    claim = Path(spare.around.roots.spares_dir, spare.id)
    tasks = [asyncio.create_task(spare.ended(), name="watch-vm of what is ready")]
    try:
        await asyncio.to_thread(_offer, spare.around, claim)
        tasks.append(asyncio.create_task(_gone(claim), name="watch-offer"))
        await _first_of(asked, ending, *tasks, timeout=LINGER)
        if not _withdrawn(claim):  # somebody has just taken it, and may have died since
            await asyncio.wait({asked}, timeout=PATIENCE)
    finally:
        _withdrawn(claim)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(claim: Path) -> None:
    """Wait until an offer is not there any more."""
    with Watch() as watch:
        watch.add(str(claim.parent), DELETED | MOVED_FROM)
        while claim.exists():
            await readable(watch.fd)
            watch.gone()


def _withdrawn(claim: Path) -> bool:
    """Take an offer back, by another name first: the nursery makes another for one that is just removed."""
    try:
        old = claim.rename(claim.with_suffix(".old"))
    except FileNotFoundError:
        return False
    old.unlink()
    return True


def _offer(around: Surroundings, claim: Path) -> None:
    """Let clients see what whoever had the machine made ready has noted, and what it was configured by."""
    coming = claim.with_suffix(COMING)
    facts = documents.read(str(coming))
    facts["files"] = {str(path): surroundings.change_of(str(path)) for path in files(around.config_file)}
    documents.write(str(coming), facts)
    coming.rename(claim)
