"""The agent on this machine, without a VM: real crun, real mounts, in namespaces of its own.

Everything happens in private mount, PID, UTS and IPC namespaces, so one kill removes processes and mounts.  crun
refuses a mix of both cgroup versions; where the machine has v1, its controllers are mounted afresh.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.agent.served import Served
from vmsandbox import cgroups
from vmsandbox.guest.client import AgentClient
from vmsandbox.guest.transport import Dial, Link, StreamLink
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.agent.fake_port import FakePort

_ENTER = """
set -e
mount -t proc proc /proc
if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t tmpfs cgroup /sys/fs/cgroup
  for controller in cpu cpuacct cpuset memory devices freezer blkio pids; do
    mkdir /sys/fs/cgroup/$controller
    mount -t cgroup -o $controller cgroup /sys/fs/cgroup/$controller
  done
  mkdir /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
exec "$@"
"""
APPLETS = (
    *("sh", "echo", "cat", "true", "sleep", "id", "env", "ls", "dd", "kill", "stty", "mount", "df", "head", "pwd"),
    *("grep", "ps", "rm", "seq", "tail", "wc", "yes"),
)
BUSYBOX = Path("/usr/bin/busybox")
CROWD = "/vmsandbox-agent-test"


class HostAgent(Served):
    """A running agent and a client of it."""

    def __init__(self, base: Path, socket: Path, client: AgentClient, process: asyncio.subprocess.Process) -> None:
        super().__init__(client)
        self.base = base
        self.socket = socket
        self.process = process

    def rootfs(self, name: str = "root") -> Path:
        """A directory with busybox, below the agent's directory."""
        root = self.base / name
        make_rootfs(root)
        return root

    async def create(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        stdio: pb.Stdio | None = None,
        resources: dict[str, Any] | None = None,
        start: bool = True,
        root: Path | None = None,
        **fields: Any,
    ) -> pb.CreateContainerResponse:
        """Create a container of busybox; `spec` among the fields is merged over the usual one."""
        document = spec(argv, root or self.rootfs(f"root-{container_id}"))
        document["linux"]["resources"] = resources or {}
        for key, value in fields.pop("process", {}).items():
            document["process"][key] = value
        document.update(fields.pop("spec", {}))
        request = pb.CreateContainerRequest(
            container_id=container_id,
            spec_json=json.dumps(document).encode(),
            stdio=stdio or pb.Stdio(stdin=True, stdout=True, stderr=True),
            start=start,
            **fields,
        )
        return await self.client.create_container(request, timeout=20)


def make_rootfs(root: Path) -> None:
    for directory in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    if not (root / "bin/busybox").exists():
        try:
            os.link(BUSYBOX, root / "bin/busybox")
        except OSError:
            shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in APPLETS:
        with suppress(FileExistsError):
            os.symlink("busybox", root / "bin" / applet)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nweb:x:1001:\nextra:x:2000:web\n")


def spec(argv: Sequence[str], root: Path) -> dict[str, Any]:
    """An OCI config.json for a busybox command."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [*argv],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                kind: ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"] for kind in ("bounding", "effective", "permitted")
            },
        },
        "root": {"path": str(root), "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "resources": {},
        },
    }


def through_socket(path: Path) -> Dial:
    """Dial the agent's own socket, without a port in between."""

    @asynccontextmanager
    async def dial() -> AsyncIterator[Link]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(path))
            yield StreamLink(sock)

    return dial


@asynccontextmanager
async def running(
    directory: Path,
    *arguments: str,
    dial: Dial | None = None,
    port_fd: int | None = None,
    bulk: FakePort | None = None,
) -> AsyncIterator[HostAgent]:
    """Run the agent in its own namespaces; `directory` holds its state and its log.

    It serves a unix socket, and the port behind `port_fd` if that is given; `dial` is the client's way.  `bulk` is
    the port for bulk stdio.
    """
    base = directory / "guest"
    base.mkdir(parents=True)
    sock = directory / "guest.sock"
    argv = [
        *("unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--uts", "--ipc"),
        *("--propagation", "private", "sh", "-c", _ENTER, "sh"),
        *(sys.executable, "-X", "faulthandler", "-m", "vmsandbox_agent", "service"),
        *("--state", str(base), "--socket", str(sock)),
        *arguments,
    ]
    log = directory / "agent.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            *("--group", f"{CROWD}-{os.getpid()}"),
            *(("--port-fd", str(port_fd)) if port_fd is not None else ()),
            *(("--bulk-fd", str(bulk.guest_fd)) if bulk is not None else ()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[fd for fd in (port_fd, bulk and bulk.guest_fd) if fd is not None],
        )
    try:
        bulk_path = bulk.path if bulk is not None else None
        async with AgentClient.dialled(
            dial or through_socket(sock), directory=directory, bulk_path=bulk_path
        ) as client:
            yield HostAgent(base, sock, client, process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        remove_groups(f"{CROWD}-{os.getpid()}")
        print(log.read_text(errors="replace"))


def remove_groups(group: str) -> None:
    """End what killed containers left in their control groups, and remove these."""
    mounted = Path("/sys/fs/cgroup")
    tops = [*mounted.glob(group.lstrip("/")), *mounted.glob(f"*{group}")]
    places = [directory for top in tops for directory, _, _ in os.walk(top, topdown=False)]
    for place in places:
        for pid in Path(place, "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    cgroups.remove(places)
