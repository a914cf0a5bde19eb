"""The share daemon: one virtiofsd per virtio-fs device.

QEMU gets a connected socket, so nothing but QEMU can talk to the daemon and no socket file remains.  The daemon
keeps only the capabilities that serving files with their owners needs (its own default), lives in namespaces of its
own, and ends by itself when QEMU closes the connection.  A file with its pid and start time lets another process
that adopts the VM find it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.children import SETPRIV, Child, spawn
from vmsandbox_hypervisor.sockets import listening

if TYPE_CHECKING:
    from pathlib import Path

    from vmsandbox_hypervisor.api import VirtiofsShare

#: seconds it gets to end by itself once QEMU has closed the connection
GRACE = 2.0


class Daemon:
    """A running virtiofsd."""

    def __init__(self, tag: str, child: Child, record: Path) -> None:
        self.tag = tag
        self.child = child
        #: its end would be a failure
        self.wanted = False
        self._record = record

    async def stop(self) -> None:
        """Return when it is gone; QEMU's end of the connection should be closed already."""
        self.wanted = False
        if self.child.alive:
            await asyncio.wait({self.child.exited}, timeout=GRACE)
        await self.kill()
        self._record.unlink(missing_ok=True)

    async def kill(self) -> None:
        """End it at once, with the process in namespaces of its own that does the work and would outlive it a bit."""
        workers = self.child.children()
        await self.child.stop()
        for worker in workers:
            await worker.stop()

    def forget(self) -> None:
        """Leave it to whoever adopts the VM."""
        self.wanted = False
        self.child.forget()


def argv(program: Path, share: VirtiofsShare, *, fd: int, selinux: str = "") -> list[str]:
    """The command line, behind setpriv if it gets a label of SELinux; pure."""
    source = str(share.path).replace("\\", "\\\\").replace(",", "\\,")
    options = [f"source={source}", f"cache={share.cache}", "sandbox=namespace", "announce_submounts", "xattr"]
    if share.cache == "always":
        options.append("writeback")
    options.append("log_level=err")
    labelled = [SETPRIV, f"--selinux-label={selinux}", "--"] if selinux else []
    return [*labelled, str(program), f"--fd={fd}", "-f", "-o", ",".join(options)]


def _stem(tag: str) -> str:
    return f"virtiofs-{hashlib.sha256(tag.encode()).hexdigest()[:16]}"


def start(
    share: VirtiofsShare, *, program: Path, directory: Path, stderr: int, selinux: str = ""
) -> tuple[Daemon, socket.socket]:
    """Start a daemon and connect to it; the caller hands the connection to QEMU and closes its own end.

    Raises `OSError` if it cannot be started.  That it cannot serve the directory shows when QEMU talks to it.
    """
    path = directory / f"{_stem(share.tag)}.sock"
    listener = listening(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        line = argv(program, share, fd=3, selinux=selinux)
        child = spawn(f"virtiofsd {share.tag}", line, fds={3: listener.fileno()}, stderr=stderr)
    except BaseException:
        connection.close()
        raise
    finally:
        listener.close()
        path.unlink(missing_ok=True)
    record = directory / f"{_stem(share.tag)}.json"
    daemon = Daemon(share.tag, child, record)
    content = json.dumps({"tag": share.tag, "pid": child.pid, "start_time": child.start_time})
    fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w") as file:
        file.write(content)
    return daemon, connection


def adopted(directory: Path) -> list[Daemon]:
    """The daemons that an earlier owner of the VM started and that still run; records of others are removed."""
    found = []
    for record in sorted(directory.glob("virtiofs-*.json")):
        try:
            content = json.loads(record.read_bytes())
            tag = str(content["tag"])
            child = Child.adopted(f"virtiofsd {tag}", int(content["pid"]), int(content["start_time"]))
        except (OSError, ValueError, KeyError, TypeError):
            record.unlink(missing_ok=True)
            continue
        found.append(Daemon(tag, child, record))
    return found
