"""A uid for each pod's QEMU, so that no two machines can touch each other's processes and files.

    <identities>/<uid>     symlink whose target is the id of the pod that has it
    <identities>/.lock     held while one is chosen

A reservation is as long-lived as the pod's directory: it survives a supervisor that dies, and what was killed leaves
nothing that has to be found.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from typing import TYPE_CHECKING

from vmsandbox import locks
from vmsandbox.errors import ExhaustedError

if TYPE_CHECKING:
    from vmsandbox.paths import Roots


def reserve(roots: Roots, pod_id: str, *, base: int, count: int) -> int:
    """The uid of a pod, out of `count` from `base` on: the one it has, or one that no pod of this run root has.

    Blocks for a moment.  Raises `ExhaustedError` if all are taken.
    """
    directory = roots.identities_dir
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with locks.opened(f"{directory}/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        holders = _holders(roots)
        for uid, holder in holders.items():
            if holder == pod_id and base <= uid < base + count:
                return uid
        first = zlib.crc32(pod_id.encode()) % count
        for step in range(count):
            uid = base + (first + step) % count
            if uid in holders and _is_live(roots, holders[uid]):
                continue
            if uid in holders:
                os.unlink(f"{directory}/{uid}")
            os.symlink(pod_id, f"{directory}/{uid}")
            return uid
    raise ExhaustedError(f"all {count} uids for virtual machines are in use: end some, or raise 'hypervisor.uid_count'")


def release(roots: Roots, pod_id: str) -> None:
    """Give a pod's uid back; its machine has ended.  Nothing reserved is fine."""
    directory = roots.identities_dir
    try:
        lock = locks.opened(f"{directory}/.lock")
    except FileNotFoundError:
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for uid, holder in _holders(roots).items():
            if holder == pod_id:
                os.unlink(f"{directory}/{uid}")


def collect(roots: Roots) -> list[int]:
    """Give back what pods had whose directories are gone; answers the uids."""
    try:
        lock = locks.opened(f"{roots.identities_dir}/.lock")
    except FileNotFoundError:
        return []
    freed = []
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for uid, holder in _holders(roots).items():
            if not _is_live(roots, holder):
                os.unlink(f"{roots.identities_dir}/{uid}")
                freed.append(uid)
    return freed


def _holders(roots: Roots) -> dict[int, str]:
    """uid -> id of the pod; what is not a reservation is ignored."""
    found = {}
    for name in os.listdir(roots.identities_dir):
        try:
            found[int(name)] = os.readlink(f"{roots.identities_dir}/{name}")
        except (ValueError, OSError):
            continue
    return found


def _is_live(roots: Roots, pod_id: str) -> bool:
    return os.path.isdir(roots.sandbox(pod_id).dir)
