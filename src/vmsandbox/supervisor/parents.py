"""Parents: machines that stand still, for pods to be forked from.

Most of a clone's start is the emulator translating the guest's code, which each machine does anew.  A parent has that
behind it, once for all: it is a clone of a template that has run a container and was stopped then, and a pod's machine
is a fork of its process, which shares with it what neither changes, translated code above all.  A process of its own
keeps it (`keeping`) for as long as pods come, after another has made it (`standing`).

    <parents>/<id>/offer.json   what a pod has to know of it
    <parents>/<id>/lock         is held by its keeper
    <parents>/<id>/vm/          its machine's files

It is never needed: a pod that finds none, or cannot fork it, is a clone, and has one made for those that follow.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import cgroups, documents, records, surroundings, wire
from vmsandbox.errors import SandboxError
from vmsandbox.paths import SHORT_ID, SandboxPaths
from vmsandbox.supervisor import template
from vmsandbox_hypervisor.api import Parent, PrivateMemory
from vmsandbox_hypervisor.kernel import constant_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmsandbox.paths import Roots
    from vmsandbox.supervisor.sandbox import SandboxSpec
    from vmsandbox.supervisor.sandbox import Surroundings as Around
    from vmsandbox_hypervisor.api import Accel, AccelChoice, SharedMemory, VmConfig

log = logging.getLogger(__name__)

#: seconds the nursery may take to hear of a wish
PATIENCE = 5.0
_IDENTITY: dict[str, Any] = {"pid": int, "start_time": int}
_SHAPE: dict[str, Any] = {
    "keeper": _IDENTITY,
    "machine": {**_IDENTITY, "name": str, "memory": str, "disks": [{"id": str, "path": str}]},
    "shareable": bool,
    "surroundings": list,
}


def place(roots: Roots, key: str, *, shareable: bool) -> SandboxPaths:
    """Where the parent of all pods with this template's key is, or would be.

    Its name is that of its machine, by which processes are found: those of another run root are others.
    """
    what = f"{os.path.realpath(roots.parents_dir)} {key} {'shareable' if shareable else 'private'}"
    name = hashlib.sha256(what.encode()).hexdigest()
    return SandboxPaths(f"{roots.parents_dir}/{name[:SHORT_ID]}")


def is_wanted(around: Around, config: VmConfig, accel: AccelChoice | None = None) -> bool:
    """Whether a pod may be a fork at all, as far as it is known how it runs."""
    if accel is not None and accel.accel != "tcg":
        return False
    # What a security module says of a process is decided when that is executed.
    labelled = config.labels.apparmor or config.labels.selinux
    vhost = any(nic.vhost_fd is not None for nic in config.nics)
    return around.settings.sandbox.forks and not (labelled or vhost or config.shares)


# ---------------------------------------------------------------- using one


@contextmanager
def forked(around: Around, config: VmConfig, key: str, *, shareable: bool) -> Iterator[VmConfig | None]:
    """The configuration of a fork for the block, or None where no parent is to be had."""
    with ExitStack() as stack:
        made = None
        try:
            parent = _offered(around, place(around.roots, key, shareable=shareable))
            saved = template.found(around, key, size_mib=config.memory.size_mib) if parent is not None else None
            if parent is not None and saved is not None:
                backing = stack.enter_context(_own_memory(config, parent)) if shareable else PrivateMemory(fd=-1)
                memory = replace(config.memory, backing=backing)
                made = replace(config, memory=memory, restore=saved.state, parent=parent)
        except (SandboxError, OSError, LookupError, TypeError) as error:
            log.info("there is no machine to be forked: %s", error)
        yield made


def _offered(around: Around, paths: SandboxPaths) -> Parent | None:
    if not os.path.exists(paths.offer_file):
        return None
    offer = documents.read_shaped(paths.offer_file, _SHAPE)
    keeper, machine = offer["keeper"], offer["machine"]
    if not records.is_alive(keeper["pid"], keeper["start_time"]):
        return None
    if offer["surroundings"] != surroundings.of(os.getpid(), grouped=False):
        return None
    os.utime(paths.offer_file)  # by which its keeper knows that it is used
    return Parent(
        pid=machine["pid"],
        start_time=machine["start_time"],
        name=machine["name"],
        directory=paths.vm,
        disks={disk["id"]: Path(disk["path"]) for disk in machine["disks"]},
        memory=Path(machine["memory"]),
    )


@contextmanager
def _own_memory(config: VmConfig, parent: Parent) -> Iterator[SharedMemory]:
    source = os.open(parent.memory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        common = constant_pieces(config.kernel.path)
        with template.copied(source, size_mib=config.memory.size_mib, common=common) as memory:
            yield memory
    finally:
        os.close(source)


def settle(pid: int) -> None:
    """Put the process of a fork where this one is."""
    cgroups.bring(pid)
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0))


# ---------------------------------------------------------------- having one made


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What parent a pod would have liked to have: how the machine is configured, and the key that has to come out."""

    data_root: str
    config_file: str | None
    key: str
    implicit: bool
    shareable: bool
    shared_fs: str | None
    accel: Accel | None

    @classmethod
    def of(cls, around: Around, spec: SandboxSpec, key: str) -> Wish:
        return cls(
            data_root=around.roots.data_dir,
            config_file=around.config_file,
            key=key,
            implicit=spec.implicit,
            shareable=spec.shareable,
            shared_fs=spec.shared_fs,
            accel=spec.accel,
        )


def wish(roots: Roots, wanted: Wish) -> None:
    """Tell the nursery, if there is one; it has the parent made when nobody wants anything else of it.

    Nobody waits for that, the end of a pod least of all.
    """
    threading.Thread(target=_wish, args=(roots, wanted), name="wish for a parent", daemon=True).start()


def _wish(roots: Roots, wanted: Wish) -> None:
    with suppress(OSError, wire.WireError), socket.socket(socket.AF_UNIX) as nursery:
        nursery.settimeout(PATIENCE)
        nursery.connect(roots.nursery_file)
        if wire.receive(nursery) is not None:
            nursery.sendall(wire.encode_message({"parent": asdict(wanted)}))
            wire.receive(nursery)
