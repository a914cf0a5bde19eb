"""Real container engines, away from the machine: in namespaces of their own, ended by one signal.

Everything an engine keeps is on a tmpfs in there; what it runs, it runs by the runtime it is told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.harness.boxes import make_rootfs
from tests.harness.cli import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
#: seconds one command of an engine may take on a busy machine
TIMEOUT = 180.0
#: seconds for the namespaces, and for a daemon, to be there
START_TIMEOUT = 60.0
NAMESPACES = ("--pid", "--mount", "--net", "--uts", "--ipc")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PREPARE = """set -e
mount -t proc proc /proc
umount /sys/fs/cgroup/unified 2>/dev/null || true
mount -t tmpfs tmpfs /run
mkdir /run/engines
ip link set lo up
exec catatonit -P
"""

CONTAINERS_CONF = """[containers]
log_driver = "k8s-file"
apparmor_profile = ""
default_ulimits = ["nofile=1024:4096","nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
runtime_supports_json = ["crun","runc","vmsandbox"]
runtime_supports_nocgroups = ["crun"]
tmp_dir = "/run/engines/libpod"
volume_path = "/run/engines/volumes"
image_copy_tmp_dir = "/run/engines"
[engine.runtimes]
vmsandbox = ["{runtime}"]
[network]
network_backend = "netavark"
network_config_dir = "/run/engines/networks"
default_subnet = "10.88.8.0/24"
"""
STORAGE_CONF = """[storage]
driver = "overlay"
graphroot = "/run/engines/storage"
runroot = "/run/engines/runroot"
"""
CONTAINERD_CONF = """version = 2
root = "/run/engines/containerd-root"
state = "/run/engines/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "/run/engines/containerd.sock"
"""


class Engines:
    """Namespaces in which podman and containerd run, with our runtime beside crun and runc."""

    def __init__(self, scratch: Path, data_root: Path) -> None:
        self.scratch = scratch
        self.data_root = data_root
        self.runtime = scratch / "vmsandbox-runtime"
        self.rootfs = scratch / "rootfs"
        self._unshare: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._daemon: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------ the namespaces

    def start(self) -> None:
        code = f"import sys; sys.argv[1:1] = ['--data-root', {str(self.data_root)!r}]\n"
        self.runtime.write_text(
            f"#!{sys.executable} -sE\n{code}from vmsandbox.cli.runtime.main import main\nsys.exit(main())\n"
        )
        self.runtime.chmod(0o755)
        (self.scratch / "containers.conf").write_text(CONTAINERS_CONF.format(runtime=self.runtime))
        (self.scratch / "storage.conf").write_text(STORAGE_CONF)
        (self.scratch / "containerd.toml").write_text(CONTAINERD_CONF)
        make_rootfs(self.rootfs)
        self._unshare = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child=SIGKILL", "--propagation", "private", "sh", "-c", PREPARE]
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._init:
            assert time.monotonic() < deadline, "no namespaces for engines"
            found = psutil.Process(self._unshare.pid).children()
            if found and found[0].name() == "catatonit":
                self._init = found[0].pid
            time.sleep(0.02)

    def stop(self) -> None:
        """One signal to its init ends everything in there; QEMU and the rest have no place to hide."""
        if self._unshare is not None:
            if self._init:
                os.kill(self._init, signal.SIGKILL)
            self._unshare.wait()
        if self._daemon is not None:
            self._daemon.wait()

    def __call__(self, *words: str, stdin: bytes | None = None, timeout: float = TIMEOUT, **more: Any) -> Result:
        given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run(
            self.argv(*words), capture_output=True, timeout=timeout, check=False, env=self.environment, **given, **more
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def argv(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self._init), *NAMESPACES, *words]

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "PATH": PATH,
            "HOME": "/run/engines",
            "CONTAINERS_CONF": str(self.scratch / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.scratch / "storage.conf"),
            "CONTAINERD_ADDRESS": "/run/engines/containerd.sock",
        }

    def ok(self, *words: str, **more: Any) -> str:
        result = self(*words, **more)
        assert result.code == 0, (words, result)
        return result.stdout

    # ------------------------------------------------------------ podman

    def podman(self, *words: str, **more: Any) -> Result:
        return self("podman", *words, **more)

    def import_image(self) -> None:
        """Make the image 'localhost/box' known to podman."""
        tar = subprocess.run(["tar", "-C", self.rootfs, "-c", "."], capture_output=True, check=True).stdout
        self.ok("podman", "import", "-q", "-", "localhost/box:1", stdin=tar)

    # ------------------------------------------------------------ containerd

    def start_containerd(self) -> None:
        """Start containerd and give it podman's image."""
        log = (self.scratch / "containerd.log").open("wb")
        with log:
            self._daemon = subprocess.Popen(
                self.argv("containerd", "--config", str(self.scratch / "containerd.toml")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self("ctr", "version").code:
            assert time.monotonic() < deadline, "containerd does not start"
            time.sleep(0.2)
        archive = self.scratch / "box.tar"
        self.ok("podman", "save", "-q", "--format", "oci-archive", "-o", str(archive), "localhost/box:1")
        self.ok("ctr", "image", "import", str(archive))

    # ------------------------------------------------------------ what is left

    def leftovers(self) -> list[str]:
        """What our runtime should have given back once no container is left."""
        left = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                inside = os.readlink(f"/proc/{process.pid}/ns/mnt") == os.readlink(f"/proc/{self._init}/ns/mnt")
            except (psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                continue
            program = line.partition(" ")[0].rpartition("/")[2]
            if inside and program.startswith(("qemu-system", "virtiofsd", "vmsandbox")):
                left.append(f"process {process.pid} {line[:200]}")
        kept = self("sh", "-c", "ls -d /run/vmsandbox/[scn]/* /run/*/*/[sc]/* 2>/dev/null").stdout.split()
        left += [f"file {path}" for path in kept]
        mounts = self("cat", "/proc/self/mounts").stdout.splitlines()
        left += [line for line in mounts if "/shared/" in line]
        return left

    def logs(self) -> str:
        """What supervisors said, for the evidence of a failed test."""
        return self("sh", "-c", "tail -n 30 /run/vmsandbox/s/*/supervisor.log /run/*/*/s/*/supervisor.log").stdout

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.ok("podman", "inspect", name))
        return found[0]
