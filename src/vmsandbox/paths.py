"""Where things are on disk.  Stdlib only.

The run root (``--root``, default ``/run/vmsandbox``) holds what does not survive a reboot: one directory per pod
with its sockets and documents.  The data root (``--data-root``, default ``/var/lib/vmsandbox``) holds what
does: images, the guest kernel and image, writable layers, logs.

A unix socket's path must fit into 108 bytes, so pod directories have short names, and a long root is
refused with a clear message instead of a failed bind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmsandbox.errors import InvalidArgumentError

DEFAULT_RUN_ROOT = "/run/vmsandbox"
DEFAULT_DATA_ROOT = "/var/lib/vmsandbox"
#: bytes of sun_path, less its terminating zero
SOCKET_PATH_MAX = 107
#: the longest name below a sandbox directory that is bound as a socket
LONGEST_SOCKET_NAME = len("/virtiofs-0123456789abcdef.sock")


@dataclass(frozen=True)
class SandboxPaths:
    """The run directory of one pod."""

    directory: Path

    @property
    def control(self) -> Path:
        return self.directory / "control.sock"

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    @property
    def document(self) -> Path:
        return self.directory / "sandbox.json"

    @property
    def containers(self) -> Path:
        return self.directory / "containers"

    @property
    def vm(self) -> Path:
        """Private to the VM: its sockets."""
        return self.directory / "vm"

    @property
    def log(self) -> Path:
        return self.directory / "supervisor.log"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def container(self, container_id: str) -> Path:
        return self.containers / f"{container_id}.json"


@dataclass(frozen=True)
class Roots:
    """The two roots everything else is below."""

    run: Path
    data: Path

    @classmethod
    def chosen(cls, run: str | None = None, data: str | None = None) -> Roots:
        """Options win over ``VMSANDBOX_ROOT`` and ``VMSANDBOX_DATA_ROOT``, those over the defaults."""
        run_root = os.path.abspath(run or os.environ.get("VMSANDBOX_ROOT") or DEFAULT_RUN_ROOT)
        data_root = os.path.abspath(data or os.environ.get("VMSANDBOX_DATA_ROOT") or DEFAULT_DATA_ROOT)
        roots = cls(Path(run_root), Path(data_root))
        longest = len(os.fsencode(roots.sandboxes)) + 1 + 12 + len("/vm") + LONGEST_SOCKET_NAME
        if longest > SOCKET_PATH_MAX:
            raise InvalidArgumentError(
                f"root '{run_root}' is {longest - SOCKET_PATH_MAX} bytes too long for unix sockets below it: "
                "choose a shorter --root"
            )
        return roots

    @property
    def sandboxes(self) -> Path:
        return self.run / "s"

    @property
    def by_container(self) -> Path:
        """``<container id>`` -> symlink to the sandbox directory."""
        return self.run / "c"

    @property
    def names(self) -> Path:
        """``<name>`` -> symlink whose target is the container or pod id that reserved it."""
        return self.run / "n"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def guests(self) -> Path:
        return self.data / "guest"

    @property
    def templates(self) -> Path:
        return self.data / "templates"

    @property
    def container_data(self) -> Path:
        """``<container id>/`` -> writable layer and log."""
        return self.data / "containers"

    def sandbox(self, sandbox_id: str) -> SandboxPaths:
        return SandboxPaths(self.sandboxes / sandbox_id[:12])
