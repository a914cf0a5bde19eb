"""What pods and containers have on disk, and how it is taken away: never what is mounted from elsewhere.

Everything here is safe to repeat, and what finds the rest goes last, so that whoever is killed in between leaves what a
later `rm` or `gc` still finds.
"""

from __future__ import annotations

import os

from vmsandbox.errors import NotFoundError, SandboxError
from vmsandbox.records import listed, pod_id_of, release_name, sandbox_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.paths import Roots, SandboxPaths


def mounts_below(path: str) -> list[str]:
    """What is mounted at or below `path` in this process' view, in the order in which it was mounted."""
    top = os.path.realpath(path)
    with open("/proc/self/mountinfo", "rb") as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        point = line.split(b" ", 5)[4]
        if b"\\" in point:
            for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
                point = point.replace(code, byte)
        place = os.fsdecode(point)
        if place == top or place.startswith(top + "/"):
            found.append(place)
    return found


def unmount_below(path: str) -> None:
    """Detach everything that is mounted at or below `path`, whoever still uses it."""
    left = mounts_below(path)
    if not left:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    detach_nofollow = 2 | 8
    while left:
        # The one mounted first carries the others away with it, if it is the lowest.
        place = min(left, key=len)
        if libc.umount2(os.fsencode(place), detach_nofollow) != 0:
            raise SandboxError(f"cannot unmount '{place}': {os.strerror(ctypes.get_errno())}")
        left = mounts_below(path)


def close_shared(sandbox: SandboxPaths) -> bool:
    """Undo what a pod has shared with its machine, which must be gone; says whether there was anything."""
    if not os.path.lexists(sandbox.shared_dir):
        return False
    unmount_below(sandbox.shared_dir)
    remove_tree(sandbox.shared_dir)
    return True


def is_served(sandbox: SandboxPaths) -> bool:
    """Whether a supervisor accepts connections on the pod's control socket."""
    from vmsandbox.plainsocket import UnixSocket

    with UnixSocket() as sock:
        return sock.connect_ex(sandbox.control_file) == 0


def remove_tree(path: str) -> None:
    """Remove a directory of ours with all that is in it; one that is already gone is fine.

    Refuses to touch anything while something is mounted below: that would be somebody else's files.
    """
    if not os.path.lexists(path):
        return
    mounted = mounts_below(path)
    if mounted:
        raise SandboxError(f"cannot remove '{path}': '{mounted[0]}' is still mounted; 'vmsandbox gc' unmounts it")
    _remove(path)


def _remove(path: str) -> None:
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(path)
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            _remove(entry.path)
        else:
            _unlink(entry.path)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def _unlink(path: str) -> None:
    if not os.path.lexists(path):
        return  # a file system that is read-only refuses to remove even what is not there
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def forget_container(roots: Roots, container_id: str, *, name: str, image_id: str) -> None:
    """Remove everything on disk of a container that no longer runs; safe to repeat.

    The symlink goes last: until then a later `rm` or `gc` still finds what is left.
    """
    try:
        sandbox: SandboxPaths | None = sandbox_of(roots, container_id)
    except NotFoundError:
        sandbox = None
    remove_tree(f"{roots.container_data_dir}/{container_id}")
    if image_id:
        _unlink(f"{roots.data_dir}/images/refs/{image_id}/{container_id}")
    if sandbox is not None:
        _unlink(sandbox.container_file(container_id))
    if name:
        release_name(roots, name, container_id)
    _unlink(f"{roots.by_container_dir}/{container_id}")


def forget_pod(roots: Roots, sandbox: SandboxPaths) -> None:
    """Remove everything on disk of a pod that was made on purpose and whose containers are forgotten; repeatable.

    The symlink goes last, as a container's does.
    """
    pod_id = pod_id_of(sandbox)
    _remove_sandbox(sandbox)
    if not pod_id:
        return
    for name in listed(roots.names_dir):
        release_name(roots, name, pod_id)
    _unlink(f"{roots.by_pod_dir}/{pod_id}")


def forget_sandbox_if_empty(sandbox: SandboxPaths) -> bool:
    """Remove a pod directory in which no container's document is left; says whether it did.

    A pod that was made on purpose stays: only `forget_pod` removes it.
    """
    if pod_id_of(sandbox):
        return False
    try:
        if any(entry.endswith(".json") for entry in os.listdir(sandbox.containers_dir)):
            return False
    except FileNotFoundError:
        pass
    _remove_sandbox(sandbox)
    return True


def _remove_sandbox(sandbox: SandboxPaths) -> None:
    """Remove a pod's directory, and what still runs of a machine: with it the last trace would go."""
    if os.path.isdir(f"{sandbox.dir}/vm"):
        from vmsandbox import machines

        machines.end_all(sandbox.dir)
    close_shared(sandbox)
    remove_tree(sandbox.dir)
