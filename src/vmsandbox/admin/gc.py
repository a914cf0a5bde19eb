"""`vmsandbox gc`: find and remove what no container owns any more.

Whatever was killed, at whatever point, the pod's directory tells what there was: a supervisor that does not answer, a
virtual machine known by pid and start time or by its name, containers whose stand-ins are gone.
A pod with a live stand-in is left alone: the stand-in takes it over itself.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from vmsandbox import documents, lent, locks, machines, records, remains
from vmsandbox.arguments import Parser
from vmsandbox.errors import SandboxError
from vmsandbox.paths import Roots, SandboxPaths
from vmsandbox.resources import identities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

#: seconds within which a directory without a lock or document may still be being made
YOUNG = 10.0


def main(argv: list[str], roots: Roots) -> int:
    """Clean up and say what was removed, a line each."""
    parser = Parser(prog="vmsandbox gc")
    parser.add_argument("-q", "--quiet", action="store_true", help="do not say what was removed")
    arguments = parser.parse_args(argv)
    say: Callable[[str], None] = (lambda _text: None) if arguments.quiet else print
    for directory in entries(roots.sandboxes_dir):
        collect_sandbox(roots, SandboxPaths(f"{roots.sandboxes_dir}/{directory}"), say)
    for pid in background_makers(roots):
        machines.end(pid)
        say(f"ended {pid}, which was making a template in the background")
    for directory in entries(roots.builders_dir):
        collect_builder(f"{roots.builders_dir}/{directory}", say)
    collect_unfinished_templates(roots, say)
    failures = collect_networks(roots, say)
    collect_parents(roots, say)
    collect_spares(roots, say)
    collect_containers(roots, say)
    if failures:
        raise failures[0]  # everything else is done
    return 0


def entries(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def collect_sandbox(roots: Roots, sandbox: SandboxPaths, say: Callable[[str], None]) -> None:
    """Remove a pod that nobody runs; one that is served, or can still take itself over, stays."""
    if not os.path.exists(sandbox.lock_file) and is_young(sandbox.dir):
        return
    try:
        lock = locks.opened(sandbox.lock_file)
    except FileNotFoundError:
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            found = list(containers_of(sandbox))
            if is_held(sandbox, found):
                return
        except documents.ForeignDocumentError as error:
            say(f"left pod '{os.path.basename(sandbox.dir)}' alone: {error}")
            return
        for pid in machine_of(sandbox):
            machines.end(pid)
            say(f"ended virtual machine {pid} of pod '{os.path.basename(sandbox.dir)}'")
        remains.remove_tree(f"{sandbox.dir}/vm")
        if remains.close_shared(sandbox):
            say(f"unmounted what pod '{os.path.basename(sandbox.dir)}' had shared")
        for complaint in lent.give_back_all(sandbox):
            say(complaint)
        for container in found:
            settle_container(roots, container, say)
        if records.pod_id_of(sandbox):
            settle_pod(roots, sandbox, say)
        elif remains.forget_sandbox_if_empty(sandbox):
            say(f"removed pod '{os.path.basename(sandbox.dir)}'")


def is_held(sandbox: SandboxPaths, found: list[records.Container]) -> bool:
    """Whether a supervisor serves the pod, or what could not do without its machine lives.

    A pod that was made on purpose keeps its machine without a container and without a supervisor: the next verb
    takes it over.
    """
    if remains.is_served(sandbox) or any(container.status() in ("created", "running", "paused") for container in found):
        return True
    if not records.pod_id_of(sandbox):
        return False
    try:
        vm = documents.read_shaped(sandbox.document_file, records.POD_SHAPE).get("vm") or {}
    except documents.ForeignDocumentError:
        raise
    except SandboxError:
        return False
    return records.is_alive(vm.get("pid"), vm.get("start_time"))


def settle_pod(roots: Roots, sandbox: SandboxPaths, say: Callable[[str], None]) -> None:
    """Mark a pod stopped whose machine is gone, or forget one that was never finished or is damaged."""
    name = os.path.basename(sandbox.dir)
    try:
        document = documents.read_shaped(sandbox.document_file, records.POD_SHAPE)
    except SandboxError:
        remains.forget_pod(roots, sandbox)
        say(f"removed pod '{name}'")
        return
    if not document.get("established"):
        remains.forget_pod(roots, sandbox)
        say(f"removed pod '{name}', which was not finished")
    elif document.pop("vm", None) is not None or document.get("status") != "stopped":
        document.update(status="stopped", reason="its virtual machine is gone")
        documents.write(sandbox.document_file, document)
        say(f"pod '{document.get('name') or name}' has stopped")


def collect_networks(roots: Roots, say: Callable[[str], None]) -> list[SandboxError]:
    """Take apart the networks of pods whose machine has ended and that nobody serves; what stays, and why."""
    failures: list[SandboxError] = []
    if not os.path.isdir(f"{roots.run_dir}/net"):
        return failures
    import asyncio

    from vmsandbox.resources.network import pod

    for place in pod.remembered(roots):
        sandbox = roots.sandbox(place.sandbox_id)
        lock = lock_of_network(sandbox, place.file)
        if lock is None:
            pod.forget(place)  # nobody can be writing it: its pod is gone
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if is_held(sandbox, list(containers_of(sandbox))):
                    continue
            except documents.ForeignDocumentError:
                continue
            try:
                if asyncio.run(pod.release(place)):
                    say(f"removed the network of pod '{os.path.basename(sandbox.dir)}'")
            except SandboxError as error:
                failures.append(error)
    return failures


def lock_of_network(sandbox: SandboxPaths, record: str) -> BinaryIO | None:
    """What to lock while a pod's network is taken apart: its record, where the pod's directory is gone."""
    try:
        return locks.opened(sandbox.lock_file)
    except FileNotFoundError:
        try:
            return open(record, "rb")
        except FileNotFoundError:
            return None  # somebody else has just done it


def collect_builder(directory: str, say: Callable[[str], None]) -> None:
    """Remove what a template's maker left that was killed; one that lives has its pid in the name."""
    maker = os.path.basename(directory)
    if maker.isdigit() and records.start_time(int(maker)) is not None and is_maker(int(maker)):
        return
    for pid in machines.end_all(directory):
        say(f"ended virtual machine {pid} of a template that was not finished")
    remains.remove_tree(directory)


def background_makers(roots: Roots) -> Iterator[int]:
    """Processes that make templates unasked, for pods of this run root; whoever asked for one keeps his."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            words = machines.command_line(int(entry))
            if {b"vmsandbox.admin", b"template", b"--quiet", os.fsencode(roots.run_dir)} <= set(words):
                yield int(entry)


def collect_unfinished_templates(roots: Roots, say: Callable[[str], None]) -> None:
    """Remove what makers left that were killed; the lock tells whether somebody still makes it."""
    for name in entries(str(roots.templates)):
        prefix, _, key = name.partition("staging-")
        if prefix != ".":
            continue
        with locks.opened(roots.templates / f".{key.partition('-')[0]}.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            remains.remove_tree(str(roots.templates / name))
            say("removed a template that was not finished")


def is_maker(pid: int) -> bool:
    """Whether the process that has this pid now makes templates."""
    return b"template" in machines.command_line(pid)


def is_young(path: str, *, follow: bool = True) -> bool:
    """Whether it may still be being made.  What a clock that has been put back since calls new for years is old."""
    try:
        return abs(time.time() - os.stat(path, follow_symlinks=follow).st_mtime) < YOUNG
    except FileNotFoundError:
        return True


def containers_of(sandbox: SandboxPaths) -> Iterator[records.Container]:
    """The pod's containers; a damaged document is one whose container has stopped and is forgotten.

    Raises `ForeignDocumentError` for one that nobody here may judge.
    """
    for name in entries(sandbox.containers_dir):
        container_id, dot, ending = name.rpartition(".")
        path = f"{sandbox.containers_dir}/{name}"
        if not dot or ending != "json":
            os.unlink(path)
            continue
        try:
            document = documents.read_shaped(path, records.CONTAINER_SHAPE)
        except documents.ForeignDocumentError:
            raise
        except SandboxError:
            document = {"id": container_id, "status": "stopped", "autoremove": True}
        yield records.Container(container_id, sandbox, document)


def settle_container(roots: Roots, container: records.Container, say: Callable[[str], None]) -> None:
    """Mark a container stopped that nobody could mark any more, or forget it."""
    document = container.document
    if document.get("autoremove") or document.get("status") == "creating":
        image = str((document.get("image") or {}).get("id") or "")
        remains.forget_container(roots, container.id, name=container.name, image_id=image)
        remains.remove_tree(container.sandbox.container_file(container.id))
        say(f"removed container '{container.name or container.id[: records.SHOWN_ID]}'")
    elif document.get("status") != "stopped":
        exit_status = {"code": 137, "signal": 9, "time_ns": time.time_ns(), "reason": "its virtual machine is gone"}
        document.update(status="stopped", finished=time.time())
        document.setdefault("exit", exit_status)
        documents.write(container.sandbox.container_file(container.id), document)
        say(f"container '{container.name or container.id[: records.SHOWN_ID]}' has stopped")


def machine_of(sandbox: SandboxPaths) -> list[int]:
    """Processes of a pod's machine: the one that its document tells of, and what command lines name."""
    found = {*machines.processes(sandbox.dir)}
    try:
        vm = documents.read_shaped(sandbox.document_file, records.POD_SHAPE).get("vm") or {}
        if records.is_alive(vm.get("pid"), vm.get("start_time")):
            found.add(int(vm["pid"]))
    except SandboxError:
        pass
    return sorted(found)


def collect_parents(roots: Roots, say: Callable[[str], None]) -> None:
    """Remove what a killed keeper has left of a machine that pods are forked from; its forks go on."""
    for name in entries(roots.parents_dir):
        parent = SandboxPaths(f"{roots.parents_dir}/{name}")
        if not os.path.isdir(parent.dir) or is_young(parent.dir):
            continue
        try:
            lock = locks.opened(parent.lock_file)
        except FileNotFoundError:
            continue  # its keeper has just removed it
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            for pid in machines.end_all(parent.dir):
                say(f"ended virtual machine {pid}, which pods were forked from")
            remains.remove_tree(parent.dir)
            say(f"removed machine '{name}', which pods were forked from")


def collect_spares(roots: Roots, say: Callable[[str], None]) -> None:
    """Remove what is left of machines that were kept ready and that nobody serves any more."""
    for name in entries(roots.spares_dir):
        path = f"{roots.spares_dir}/{name}"
        if not remains.is_served(roots.sandbox(name.partition(".")[0])) and not is_young(path):
            os.unlink(path)
    for pod_id in entries(str(roots.spare_data)):
        directory = f"{roots.spare_data}/{pod_id}"
        if (
            owner(directory) == roots.run_dir
            and not remains.is_served(roots.sandbox(pod_id))
            and not is_young(directory)
        ):
            remains.remove_tree(directory)
            say(f"removed data of machine '{pod_id[: records.SHOWN_ID]}', which was kept ready")


def collect_containers(roots: Roots, say: Callable[[str], None]) -> None:
    """Remove ids, names and data that belong to no pod of this run root."""
    for container_id in entries(roots.by_container_dir):
        link = f"{roots.by_container_dir}/{container_id}"
        if not os.path.exists(f"{link}/containers/{container_id}.json") and not is_young(link, follow=False):
            os.unlink(link)
    for pod_id in entries(roots.by_pod_dir):
        link = f"{roots.by_pod_dir}/{pod_id}"
        if not os.path.exists(link) and not is_young(link, follow=False):
            os.unlink(link)
    for uid in identities.collect(roots):
        say(f"released uid {uid}")
    known = {*entries(roots.by_container_dir), *entries(roots.by_pod_dir)}
    for name in entries(roots.names_dir):
        path = f"{roots.names_dir}/{name}"
        if os.readlink(path) not in known and not is_young(path, follow=False):
            os.unlink(path)
            say(f"released the name '{name}'")
    for container_id in entries(roots.container_data_dir):
        directory = f"{roots.container_data_dir}/{container_id}"
        if container_id not in known and owner(directory) == roots.run_dir and not is_young(directory):
            remains.forget_container(roots, container_id, name="", image_id="")
            say(f"removed data of container '{container_id[: records.SHOWN_ID]}'")
    from vmsandbox.resources.images.store import ImageStore

    store = ImageStore(roots)
    data = set(entries(roots.container_data_dir))
    for holders in store.references().values():
        for holder in holders:
            if holder not in data:
                store.release(holder)


def owner(directory: str) -> str:
    """The run root that a container's data belongs to."""
    try:
        with open(f"{directory}/owner", encoding="utf-8") as file:
            return file.read(4096)
    except (OSError, UnicodeDecodeError):
        return ""
