"""Where things are on disk.  Stdlib only, and nothing but `os` at import: the thin client starts with this module.

The run root (``--root``, default ``/run/vmsandbox``) holds what does not survive a reboot: one directory per
pod with its sockets and documents.  The data root (``--data-root``, default ``/var/lib/vmsandbox``) holds
what does: images, the guest kernel and image, writable layers, logs.

A unix socket's path must fit into 108 bytes, so pod directories have short names, and a long root is
refused with a clear message instead of a failed bind.
"""

from __future__ import annotations

import os

from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_RUN_ROOT = "/run/vmsandbox"
DEFAULT_DATA_ROOT = "/var/lib/vmsandbox"
#: bytes of sun_path, less its terminating zero
SOCKET_PATH_MAX = 107
#: the longest name below a sandbox directory that is bound as a socket
LONGEST_SOCKET_NAME = len("/vm/virtiofs-0123456789abcdef.sock")
#: hex digits of a sandbox id that name its directory
SHORT_ID = 12


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)


class SandboxPaths:
    """The run directory of one pod.  `dir` and the ``*_file`` attributes are text, the properties are paths."""

    __slots__ = ("dir",)

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.dir = os.fspath(directory)

    @property
    def directory(self) -> Path:
        return _path(self.dir)

    @property
    def control_file(self) -> str:
        return self.dir + "/control.sock"

    @property
    def lock_file(self) -> str:
        return self.dir + "/lock"

    @property
    def document_file(self) -> str:
        return self.dir + "/sandbox.json"

    @property
    def containers_dir(self) -> str:
        return self.dir + "/containers"

    @property
    def log_file(self) -> str:
        """The supervisor's log."""
        return self.dir + "/supervisor.log"

    @property
    def offer_file(self) -> str:
        """Of a machine that pods are forked from: what they need to know of it."""
        return self.dir + "/offer.json"

    @property
    def vm(self) -> Path:
        """Private to the VM: its sockets, console and stderr."""
        return _path(self.dir + "/vm")

    @property
    def shared_dir(self) -> str:
        """What the pod shares with its machine; below it are mounts of other people's files."""
        return self.dir + "/shared"

    def container_file(self, container_id: str) -> str:
        return f"{self.dir}/containers/{container_id}.json"


class Roots:
    """The two roots everything else is below.  Attributes ending in ``_dir`` are text, properties are paths."""

    __slots__ = ("data_dir", "run_dir")

    def __init__(self, run: str | os.PathLike[str], data: str | os.PathLike[str]) -> None:
        self.run_dir = os.fspath(run)
        self.data_dir = os.fspath(data)

    def __repr__(self) -> str:
        return f"Roots({self.run_dir!r}, {self.data_dir!r})"

    @classmethod
    def chosen(cls, run: str | None = None, data: str | None = None) -> Roots:
        """Options win over ``VMSANDBOX_ROOT`` and ``VMSANDBOX_DATA_ROOT``, those over the defaults."""
        run_root = os.path.abspath(run or os.environ.get("VMSANDBOX_ROOT") or DEFAULT_RUN_ROOT)
        data_root = os.path.abspath(data or os.environ.get("VMSANDBOX_DATA_ROOT") or DEFAULT_DATA_ROOT)
        roots = cls(run_root, data_root)
        longest = len(os.fsencode(roots.sandboxes_dir)) + 1 + SHORT_ID + LONGEST_SOCKET_NAME
        if longest > SOCKET_PATH_MAX:
            raise InvalidArgumentError(
                f"root '{run_root}' is {longest - SOCKET_PATH_MAX} bytes too long for unix sockets below it: "
                "choose a shorter --root"
            )
        return roots

    @property
    def run(self) -> Path:
        return _path(self.run_dir)

    @property
    def data(self) -> Path:
        return _path(self.data_dir)

    @property
    def sandboxes_dir(self) -> str:
        return self.run_dir + "/s"

    @property
    def builders_dir(self) -> str:
        """``<pid>/``: machines that will become templates."""
        return self.run_dir + "/t"

    @property
    def by_container_dir(self) -> str:
        """``<container id>`` -> symlink to the sandbox directory."""
        return self.run_dir + "/c"

    @property
    def by_pod_dir(self) -> str:
        """``<pod id>`` -> symlink to the sandbox directory of a pod that was made on purpose."""
        return self.run_dir + "/p"

    @property
    def parents_dir(self) -> str:
        """``<id>/``: a machine that pods are forked from, laid out as a pod's."""
        return self.run_dir + "/o"

    @property
    def spares_dir(self) -> str:
        """``<pod id>``: what a client has to know of a machine that is kept ready, and takes with it."""
        return self.run_dir + "/r"

    @property
    def spare_data(self) -> Path:
        """``<pod id>/``: the writable layer of a machine that is kept ready."""
        return _path(self.data_dir + "/spares")

    @property
    def identities_dir(self) -> str:
        """``<uid>`` -> symlink whose target is the id of the pod that QEMU uses this uid for."""
        return self.run_dir + "/u"

    @property
    def nursery_file(self) -> str:
        """The socket of the process that forks supervisors."""
        return self.run_dir + "/nursery.sock"

    @property
    def names_dir(self) -> str:
        """``<name>`` -> symlink whose target is the id of the container or pod that reserved it."""
        return self.run_dir + "/n"

    @property
    def container_data_dir(self) -> str:
        """``<container id>/`` -> writable layer and log."""
        return self.data_dir + "/containers"

    @property
    def images(self) -> Path:
        return _path(self.data_dir + "/images")

    @property
    def guests(self) -> Path:
        return _path(self.data_dir + "/guest")

    @property
    def templates(self) -> Path:
        return _path(self.data_dir + "/templates")

    def sandbox(self, sandbox_id: str) -> SandboxPaths:
        return SandboxPaths(f"{self.sandboxes_dir}/{sandbox_id[:SHORT_ID]}")
