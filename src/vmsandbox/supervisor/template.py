"""Templates of pods: which one a pod can be cloned from, and how one is made.

A template is found by a key over everything that a clone must have in common with it: the complete command line, QEMU,
kernel, image, and this version.  It is made before any user data exists, by booting a machine exactly as a pod's,
running one container in it on the same kinds of disk that pods get, mounting a share, taking everything away again and
saving what is left: code is loaded, modules are in, nothing has an identity yet.

    <templates>/<key>/state, memory, layer, template.json  one template, complete
    <templates>/<key>/holders/<pid>                    supervisors that have its memory at hand
    <templates>/.<key>.lock                            held by whoever makes it
    <templates>/.staging-*                             being made, or left by a maker that was killed
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox import __version__, documents, locks, records, remains
from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox.guest.client import AgentClient
from vmsandbox.resources import scratch
from vmsandbox.supervisor import cards, clock, slots, warming
from vmsandbox.supervisor.aio import unless
from vmsandbox.supervisor.answering import death, first_answer
from vmsandbox.supervisor.translation import translating
from vmsandbox_hypervisor.api import PrivateMemory, SecurityLabels, SharedMemory
from vmsandbox_hypervisor.qemu.template import (
    MEMORY,
    SEALS,
    STATE,
    Template,
    empty_memory,
    fill_memory,
    save_template,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsandbox.supervisor.sandbox import Surroundings
    from vmsandbox_hypervisor.api import Hypervisor, Vm, VmConfig

log = logging.getLogger(__name__)

NAME = "vmsandbox-template"
LAYER = "layer"
DOCUMENT = "template.json"
STAGING = ".staging-"


async def key_of(hypervisor: Hypervisor, config: VmConfig, *, layer_mib: int) -> str:
    """What a clone and its template must agree on, as a hash; `layer_mib` is the size of the layer in its slot."""
    with translating():
        choice = await hypervisor.probe_accel(config.accel)
    shared = replace(config.memory, backing=SharedMemory())
    kernel = config.kernel
    canonical = replace(
        config,
        kernel=replace(kernel, path=kernel.path.resolve(), initrd=kernel.initrd and kernel.initrd.resolve()),
        disks=tuple(replace(disk, path=disk.path.resolve()) for disk in config.disks),
        name=NAME,
        directory=Path("/template"),
        accel=choice.accel,
        confinement=None,
        labels=SecurityLabels(),
        memory=shared,
        restore=None,
    )
    own = [disk.path for disk in canonical.disks if disk.id not in slots.IDS]
    files = [config.binary, canonical.kernel.path, canonical.kernel.initrd, *own]
    facts = {
        "version": __version__,
        "layer_mib": layer_mib,
        "argv": list(hypervisor.argv(canonical)),
        "files": [_identity(path) for path in files if path is not None],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


async def key_for(around: Surroundings, config: VmConfig) -> str:
    """The key of the template that a pod with this machine is cloned from."""
    return await key_of(around.hypervisor, config, layer_mib=around.settings.container.scratch_size_mib)


def _identity(path: Path) -> list[object]:
    try:
        found = path.stat()
    except OSError as error:
        raise UnavailableError(
            f"cannot use '{path}': {error.strerror}; 'vmsandbox check' says what this machine lacks"
        ) from error
    return [str(path), found.st_size, found.st_mtime_ns, found.st_ino]


# ---------------------------------------------------------------- using one


@contextmanager
def clone_of(
    around: Surroundings, config: VmConfig, key: str, *, shareable: bool, mode: str
) -> Iterator[VmConfig | None]:
    """The clone's configuration for the block; None: boot cold.

    `mode` is that of the setting: with `require` a missing or damaged template is an error, with `auto` a cold boot.
    """
    if mode == "off":
        yield None
        return
    with ExitStack() as stack:
        try:
            clone = stack.enter_context(cloned(around, config, key, shareable=shareable))
        except SandboxError as error:
            if mode == "require":
                raise
            log.warning("the template cannot be used, the pod boots cold: %s", error)
            clone = None
        if clone is None and mode == "require":
            raise UnavailableError("there is no template for this pod: 'vmsandbox template build' makes it")
        yield clone


@contextmanager
def cloned(around: Surroundings, config: VmConfig, key: str, *, shareable: bool) -> Iterator[VmConfig | None]:
    """The configuration of a clone for the block, or None where there is no whole template with this key.

    A private clone maps the template's memory copy-on-write; a shareable one gets a copy of its own.
    """
    directory = around.roots.templates / key
    with translating():
        if not (directory / DOCUMENT).exists():
            yield None
            return
        if not is_whole(directory):
            raise UnavailableError(f"template '{key}' is damaged: 'vmsandbox template build' makes it again")
        template = Template.found(directory, size_mib=config.memory.size_mib)
    with _own_memory(directory, template) if shareable else _shared_memory(directory, template) as backing:
        yield replace(config, memory=replace(config.memory, backing=backing), restore=template.state)


@contextmanager
def _own_memory(directory: Path, template: Template) -> Iterator[SharedMemory]:
    """A copy of the template's memory for the block: of its file where no supervisor has the memory at hand."""
    source = _offered(directory, template)
    if source is None:
        source = os.open(template.memory, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with copied(source, size_mib=template.size_mib) as memory:
            yield memory
    finally:
        os.close(source)


@contextmanager
def copied(source: int, *, size_mib: int, common: Sequence[tuple[int, int]] = ()) -> Iterator[SharedMemory]:
    """A machine's memory, copied into another's own for the block while QEMU starts.

    A fork has pieces in `common` with what it is of.
    """
    with ExitStack() as stack:
        own = empty_memory(size_mib)
        stack.callback(os.close, own)
        copier = stack.enter_context(ThreadPoolExecutor(1, "memory"))
        filled = asyncio.wrap_future(copier.submit(fill_memory, own, source, common))
        yield SharedMemory(fd=own, filled=filled, common=tuple(common))


@contextmanager
def _shared_memory(directory: Path, template: Template) -> Iterator[PrivateMemory]:
    with shared_memory(directory, template) as fd:
        yield PrivateMemory(fd=fd)


def is_whole(directory: Path) -> bool:
    """Whether this template is as its maker left it."""
    try:
        found: object = documents.read(str(directory / DOCUMENT)).get("files")
        return found == _facts(directory)
    except (SandboxError, OSError):
        return False


def found(around: Surroundings, key: str, *, size_mib: int) -> Template | None:
    """The template with this key, if it is whole."""
    directory = around.roots.templates / key
    return Template.found(directory, size_mib=size_mib) if is_whole(directory) else None


def _facts(directory: Path) -> dict[str, list[int]]:
    """What tells that somebody changed a file; hashes of so much memory would cost more than the clone."""
    found = {name: (directory / name).stat() for name in (STATE, MEMORY, LAYER) if (directory / name).exists()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def _offered(directory: Path, template: Template) -> int | None:
    """The template's memory from a supervisor that has it at hand."""
    for holder in _entries(directory / "holders"):
        try:
            pid, started, number = (int(word) for word in holder.read_text().split())
            if not records.is_alive(pid, started):
                holder.unlink(missing_ok=True)
                continue
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError):
            continue
        if _is_sealed(fd) and os.fstat(fd).st_size == template.size_mib << 20:
            return fd
        os.close(fd)
    return None


def _is_sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False


@contextmanager
def shared_memory(directory: Path, template: Template) -> Iterator[int]:
    """The template's memory for the block, where later supervisors find it instead of loading it again.

    One at a time looks for it: of several that come at once each would load, and keep, its own.
    """
    with _alone(directory / "holders"):
        offered = _offered(directory, template)
        fd = template.loaded() if offered is None else offered
        note = _noted(directory / "holders", fd)
    try:
        yield fd
    finally:
        note.unlink(missing_ok=True)
        os.close(fd)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # the template has just been removed: nobody else can find it either
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _noted(holders: Path, fd: int) -> Path:
    """Tell of our descriptor, which a note in the directory does as long as it is there."""
    note = holders / str(os.getpid())
    try:
        note.write_text(f"{os.getpid()} {records.start_time(os.getpid())} {fd}")
    except OSError as error:
        log.info("the template's memory is not offered to others: %s", error)
    return note


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


# ---------------------------------------------------------------- making one


def build_in_background(
    around: Surroundings, config_file: str | None, accel: str | None, *, explicit: bool = False
) -> None:
    """Have a process of its own make the template that a pod lacked; the next pods use it."""
    roots = around.roots
    argv = [sys.executable, "-m", "vmsandbox.admin", "--root", roots.run_dir, "--data-root", roots.data_dir]
    if config_file:
        argv += ["--config", config_file]
    argv += ["template", "build", "--quiet", *(("--accel", accel) if accel else ()), *(("--pod",) if explicit else ())]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in range(3)]
        os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)


async def build(
    around: Surroundings, config: VmConfig, *, force: bool = False, waiting: bool = True
) -> tuple[str, bool]:
    """Make the template for `config` unless it exists; its key, and whether this call made it.

    Two that want the same one make it once: the second waits, or without `waiting` leaves it to the first.  Raises
    a `SandboxError` when it cannot be made; nothing is left then.
    """
    key = await key_for(around, config)
    root = around.roots.templates
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(root, key, waiting=waiting) as ours:
        if not ours:
            return key, False
        if not force and is_whole(root / key):
            return key, False
        _sweep(root, key)
        with tempfile.TemporaryDirectory(prefix=f"{STAGING}{key}-", dir=root) as staging:
            saved = Path(staging, "template")
            saved.mkdir(mode=0o700)
            (saved / "holders").mkdir(mode=0o700)
            run = Path(around.roots.builders_dir, str(os.getpid()))
            around.roots.run.parent.mkdir(parents=True, exist_ok=True)
            for directory in (around.roots.run, run.parent, run):
                # QEMU, under its own uid, must be able to pass through, and only that.
                directory.mkdir(mode=0o711, exist_ok=directory is not run)
            try:
                await _make(around, config, run, saved)
            finally:
                remains.remove_tree(str(run))
            document = {
                "key": key,
                "size_mib": config.memory.size_mib,
                "kernel": str(config.kernel.path),
                "files": _facts(saved),
            }
            documents.write(str(saved / DOCUMENT), document)
            old = root / key
            remains.remove_tree(str(old))
            os.rename(saved, old)
    return key, True


@contextmanager
def _locked(root: Path, key: str, *, waiting: bool) -> Iterator[bool]:
    with locks.opened(root / f".{key}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _sweep(root: Path, key: str) -> None:
    """Remove what a maker of this template left when it was killed; the lock says it is not being made."""
    for path in root.glob(f"{STAGING}{key}-*"):
        remains.remove_tree(str(path))


async def _make(around: Surroundings, config: VmConfig, run: Path, saved: Path) -> None:
    memory = empty_memory(config.memory.size_mib)
    cache = around.roots.data / "cache"
    try:
        booted = replace(
            config,
            name=f"vmsandbox-{run.name}",
            directory=run,
            memory=replace(config.memory, backing=SharedMemory(fd=memory)),
        )
        if slots.has(config):
            layer_mib = around.settings.container.scratch_size_mib
            booted = await asyncio.to_thread(slots.for_template, booted, run, layer_mib=layer_mib, cache=cache)
        with translating():
            async with cards.idle(booted) as booted, around.hypervisor.running(booted) as vm:
                port, bulk = (vm.port_path(port.name) for port in booted.ports)
                async with AgentClient.connected(port, directory=run, bulk_path=bulk) as agent:
                    await first_answer(vm, agent.details(timeout=booted.boot_timeout))
                    async with clock.checked(agent):
                        await unless(death(vm), _prepare(around, booted, vm, agent))
                await save_template(vm, saved)
                if slots.has(booted):
                    await asyncio.to_thread(scratch.copy, booted.disks[-1].path, saved / LAYER)
    except TimeoutError:
        raise UnavailableError(f"the template's container did not end within {warming.TIMEOUT:g} s") from None
    finally:
        os.close(memory)


async def _prepare(around: Surroundings, booted: VmConfig, vm: Vm, agent: AgentClient) -> None:
    """Have the guest do once what it does for each container, and forget it again."""
    from vmsandbox.supervisor.storages import layer_storage

    # Not at the end: what the container needs, those of the clones need too.
    await warming.clear(agent, caches=True)
    async with asyncio.timeout(warming.TIMEOUT):
        await warming.rehearse(around, vm, agent)
    if slots.has(booted):
        await agent.add_storages([layer_storage(slots.LAYER_POINT, slots.address(booted, slots.LAYER))])
    await warming.clear(agent)


def missing(around: Surroundings, key: str) -> bool:
    """Whether a template with this key is still to be made."""
    return not is_whole(around.roots.templates / key)
