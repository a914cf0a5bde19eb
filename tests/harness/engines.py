"""Real container engines, away from the machine: in namespaces of their own, ended by one signal.

Everything an engine keeps is on a tmpfs in there; what it runs, it runs by the runtime it is told.  Daemons are
started by the first test that needs them.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.harness import daemons, machine, nurseries
from tests.harness.boxes import add_program, make_rootfs
from tests.harness.cli import Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
#: seconds one command of an engine may take on a busy machine
TIMEOUT = 180.0
#: held by who has engines: those of two runs would take each other's control groups for something left behind
LOCK = Path("/run/lock/vmsandbox-tests-engines")
#: seconds for the namespaces, and for a daemon, to be there
START_TIMEOUT = 60.0
NAMESPACES = ("--pid", "--mount", "--net", "--uts", "--ipc")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PREPARE = """set -e
mount -t proc proc /proc
umount /sys/fs/cgroup/unified 2>/dev/null || true
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib/cni
mkdir -p /run/engines/etc /run/engines/etc.work
mount -t overlay -o lowerdir=/etc,upperdir=/run/engines/etc,workdir=/run/engines/etc.work etc /etc
ip link set lo up
exec catatonit -P
"""

CONTAINERS_CONF = """[containers]
log_driver = "k8s-file"
apparmor_profile = ""
default_ulimits = ["nofile=1024:4096","nproc=4096:4096"]
default_capabilities = [
  "CHOWN","DAC_OVERRIDE","FOWNER","FSETID","KILL","NET_BIND_SERVICE","NET_RAW","SETFCAP","SETGID","SETPCAP","SETUID",
  "SYS_CHROOT"
]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
runtime_supports_json = ["crun","runc"]
runtime_supports_nocgroups = ["crun"]
tmp_dir = "/run/engines/libpod"
volume_path = "/run/engines/volumes"
image_copy_tmp_dir = "/run/engines"
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
#: where programs of CNI keep what they know, whatever they are told
CNI = Path("/var/lib/cni")
#: state directories of our runtime, as engines name them; of everything below `{0}`
ROOTS = "/run/vmsandbox/{0} /run/*/*/{0} /run/engines/docker/*/*/{0}"
BOX = "localhost/box:1"
#: the same with a program of its own, as the first container of a pod needs one
PAUSE = "localhost/pause:1"

#: prints limits of memory, processor time and processes; a guest has cgroup v2, and the control perhaps v1
LIMITS = (
    "cd /sys/fs/cgroup; cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes; "
    "cut -d' ' -f1 cpu.max 2>/dev/null || cat cpu/cpu.cfs_quota_us; "
    "cat pids.max 2>/dev/null || cat pids/pids.max"
)


@contextmanager
def _turn() -> Iterator[None]:
    """Wait until nobody else on this machine has engines, and be the one who has, for the block."""
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Engines:
    """Namespaces in which engines run, with our runtime beside crun and runc."""

    def __init__(self, scratch: Path, data_root: Path, *, forks: bool = False) -> None:
        """With `forks` pods are forks as soon as they can: what they are forked from would outlive a test."""
        self.scratch = scratch
        self.data_root = data_root
        self._forks = forks
        self.runtime = scratch / "vmsandbox-runtime"
        self.rootfs = scratch / "rootfs"
        self._unshare: subprocess.Popen[bytes] | None = None
        self.init = 0
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._made_cni = False
        self._turn = ExitStack()
        #: of the machine, copied into the engines' namespace
        self._mounts: set[str] = set()
        #: what was there before any container was
        self._before: machine.Found = {}

    # ------------------------------------------------------------ the namespaces

    def start(self) -> None:
        self._turn.enter_context(_turn())
        code = f"import sys; sys.argv[1:1] = ['--data-root', {str(self.data_root)!r}]\n"
        self.runtime.write_text(
            f"#!{sys.executable} -sE\n{code}from vmsandbox.cli.runtime.main import main\nsys.exit(main())\n"
        )
        self.runtime.chmod(0o755)
        (self.scratch / "storage.conf").write_text(STORAGE_CONF)
        add_program(make_rootfs(self.rootfs), Path("/usr/bin/socat"))
        if not CNI.exists():
            CNI.mkdir()
            self._made_cni = True
        self._unshare = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child=SIGKILL", "--propagation", "private", "sh", "-c", PREPARE]
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self.init:
            assert time.monotonic() < deadline, "no namespaces for engines"
            found = psutil.Process(self._unshare.pid).children()
            if found and found[0].name() == "catatonit":
                self.init = found[0].pid
            time.sleep(0.02)
        self._mounts = set(self._read_mounts())
        # What the runtime needs in there, it writes itself.
        self.inside("/etc/containers/containers.conf").write_text(CONTAINERS_CONF)
        self.inside("/etc/vmsandbox").mkdir(exist_ok=True)
        self.inside("/etc/vmsandbox/config.toml").write_text(f"[sandbox]\nforks = {str(self._forks).lower()}\n")
        daemons.configure(self)
        for engine in ("podman", "containerd", "docker"):
            self.ok(str(self.runtime), "install", engine)

    def stop(self) -> None:
        """One signal to its init ends everything in there; QEMU and the rest have no place to hide."""
        if self._unshare is not None:
            if self.init:
                os.kill(self.init, signal.SIGKILL)
            self._unshare.wait()
        for daemon in self._daemons.values():
            daemon.wait()
        if self._made_cni:
            CNI.rmdir()
        if self._before:
            machine.remove_cgroups(self._before["cgroup"])
        self._turn.close()

    def __call__(self, *words: str, stdin: bytes | None = None, timeout: float = TIMEOUT, **more: Any) -> Result:
        given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run(
            self.argv(*words), capture_output=True, timeout=timeout, check=False, env=self.environment, **given, **more
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def argv(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.init), *NAMESPACES, *words]

    def inside(self, path: str) -> Path:
        """Where a file of the engines is found from outside."""
        return Path(f"/proc/{self.init}/root{path}")

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "PATH": PATH,
            "HOME": "/run/engines",
            "CONTAINERS_STORAGE_CONF": str(self.scratch / "storage.conf"),
            "CONTAINERD_ADDRESS": daemons.CONTAINERD,
            "DOCKER_HOST": f"unix://{daemons.DOCKER}",
        }

    def ok(self, *words: str, **more: Any) -> str:
        result = self(*words, **more)
        assert result.code == 0, (words, result, self.logs())
        return result.stdout

    # ------------------------------------------------------------ podman

    def podman(self, *words: str, **more: Any) -> Result:
        return self("podman", *words, **more)

    def import_images(self) -> None:
        """Make the images known to podman."""
        tar = subprocess.run(["tar", "-C", self.rootfs, "-c", "."], capture_output=True, check=True).stdout
        self.ok("podman", "import", "-q", "-", BOX, stdin=tar)
        self.ok("podman", "import", "-q", "--change", 'CMD ["/bin/sleep","100000"]', "-", PAUSE, stdin=tar)
        # What podman makes for its first container, it keeps.
        self.ok("podman", "run", "--rm", BOX, "true")
        self._before = self._found()

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.ok("podman", "inspect", name))
        return found[0]

    # ------------------------------------------------------------ daemons

    def daemon(self, name: str, argv: Sequence[str], ready: Sequence[str]) -> None:
        """Start a daemon, unless it runs, and wait until the command `ready` succeeds."""
        if name in self._daemons:
            return
        left = self.added()
        with (self.scratch / f"{name}.log").open("wb") as log:
            self._daemons[name] = subprocess.Popen(
                self.argv(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )
        deadline = time.monotonic() + START_TIMEOUT
        while self(*ready).code:
            said = (self.scratch / f"{name}.log").read_text(errors="replace")[-2000:]
            assert self._daemons[name].poll() is None, f"{name} has ended: {said}"
            assert time.monotonic() < deadline, f"{name} does not start: {said}"
            time.sleep(0.2)
        # What it is itself stays; what had been left before does not become part of it.
        self._before = {
            kind: {each for each in found if f"{kind} {each}" not in left} for kind, found in self._found().items()
        }

    def reload(self, name: str, *, until: Sequence[str], shows: str) -> None:
        """Have a daemon read its configuration again, until a command shows what is new."""
        (daemon,) = psutil.Process(self._daemons[name].pid).children()  # below nsenter
        daemon.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + START_TIMEOUT
        while shows not in (said := self.ok(*until)):
            assert time.monotonic() < deadline, f"{name} does not take its configuration: {said}"
            time.sleep(0.1)

    # ------------------------------------------------------------ what is left

    def leftovers(self) -> list[str]:
        """What our runtime should have given back once no container is left."""
        left = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
                inside = os.readlink(f"/proc/{process.pid}/ns/mnt") == os.readlink(f"/proc/{self.init}/ns/mnt")
            except (psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                continue
            program = line.partition(" ")[0].rpartition("/")[2]
            inside = inside and not nurseries.is_nursery(process)
            if inside and program.startswith(("qemu-system", "virtiofsd", "vmsandbox")):
                left.append(f"process {process.pid} {line[:200]}")
        kept = self("sh", "-c", f"ls -d {ROOTS.format('[scn]/*')} 2>/dev/null").stdout.split()
        left += [f"file {path}" for path in kept]
        left += [line for line in self._read_mounts() if "/shared/" in line and line not in self._mounts]
        return left

    def _read_mounts(self) -> list[str]:
        return Path(f"/proc/{self.init}/mounts").read_text().splitlines()

    def end_nurseries(self) -> None:
        """End what would end by itself, but only after a minute without another pod."""
        found = [each for each in machine.inside(self.init) if nurseries.is_nursery(each)]
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=START_TIMEOUT)

    def supervisors(self) -> list[psutil.Process]:
        """Those of the engines' pods."""
        return [each for each in machine.inside(self.init) if each.name().startswith("vmsandbox-super")]

    def _found(self) -> machine.Found:
        places = f"{ROOTS.format('[scnput]/*')} /run/netns/* /run/docker/netns/*"
        files = self("sh", "-c", f"ls -d {places} 2>/dev/null").stdout.split()
        return machine.found(self.init, files, (self.scratch, self.data_root))

    def added(self) -> list[str]:
        """What there is that was not there before the first container, daemons apart."""
        return machine.added(self._before, self._found())

    def logs(self) -> str:
        """What supervisors said, for the evidence of a failed test."""
        return self("sh", "-c", f"tail -n 30 {ROOTS.format('s/*/supervisor.log')} 2>/dev/null").stdout
