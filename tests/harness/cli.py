"""The `vmsandbox` command as a test uses it, and proof that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
#: seconds a command may take under emulation on a busy machine
TIMEOUT = 120.0
#: of pods whose test has none of its own, by how they come up
SETTINGS = Path(__file__).with_name("settings")
COMMAND = (sys.executable, "-c", "import sys; from vmsandbox.cli.main import main; sys.exit(main())")


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, stdout: bytes, stderr: bytes) -> None:
        self.code = code
        self.raw = stdout
        self.stdout = stdout.decode(errors="replace")
        self.stderr = stderr.decode(errors="replace")

    def __repr__(self) -> str:
        return f"exit {self.code}\nstdout: {self.stdout[-2000:]}\nstderr: {self.stderr[-4000:]}"


class Cli:
    """Runs `vmsandbox` with its own run root and a data root that tests share."""

    def __init__(self, run_root: Path, data_root: Path, *, boot: str = "clone") -> None:
        self.run_root = run_root
        self.data_root = data_root
        self.config: Path | None = None
        #: in front of every command: the tests of the network run it in a namespace
        self.prefix: tuple[str, ...] = ()
        #: of pods that name none: what is tested elsewhere needs none, and the machine keeps its own untouched; with ""
        #: they get what vmsandbox gives by default
        self.network = "none"
        #: whether nobody else uses the data root, so that the default network's leases and names are ours as well
        self.owns_data = False
        #: "cold": containers that do not say otherwise boot without a template; "clone": of one, and are not forked;
        #: "fork": see `parents.Standing`
        self.boot = boot
        #: whether it was ever used with a configuration with which pods may be forked
        self.may_have_parents = False

    def argv(self, *words: str) -> list[str]:
        template = ("--template", "off") if self.boot == "cold" else ()
        network = ("--network", self.network) if self.network else ()
        if words[0] in ("run", "create") and "--pod" not in words:
            words = (words[0], *network, *template, *words[1:])
        elif words[:2] == ("pod", "create"):
            words = (*words[:2], *network, *template, *words[2:])
        self.may_have_parents |= self.boot == "fork" or self.config is not None
        config = ("--config", str(self.config or SETTINGS / f"{self.boot}.toml"))
        roots = ("--root", str(self.run_root), "--data-root", str(self.data_root))
        return [*self.prefix, *COMMAND, "--debug", *roots, *config, *words]

    def __call__(self, *words: str, stdin: bytes | None = None, timeout: float = TIMEOUT, **more: Any) -> Result:
        given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run(self.argv(*words), capture_output=True, timeout=timeout, check=False, **given, **more)
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, stdin: bytes | None = None, **more: Any) -> str:
        """Run a command that has to succeed, and return what it printed."""
        result = self(*words, stdin=stdin, **more)
        assert result.code == 0, result
        return result.stdout

    def popen(self, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.argv(*words), **more)

    def await_line(self, name: str, text: str) -> None:
        """Follow a container's log until a line has `text` in it."""
        with self.popen("logs", "-f", name, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            found = any(text.encode() in line for line in follower.stdout)
            follower.kill()
        assert found, f"the log of '{name}' ended without '{text}'"

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.ok("inspect", name))
        return found[0]

    def ps(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.ok("ps", "-a", "--format", "json"))
        return rows

    def pods(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.ok("pod", "ls", "--format", "json"))
        return rows

    # ------------------------------------------------------------ what is left

    def remove_all(self) -> None:
        pods = self.pods()
        if pods:
            self("pod", "rm", "-f", *[row["id"] for row in pods])
        ids = [row["id"] for row in self.ps()]
        if ids:
            self("rm", "-f", *ids)
        if self.may_have_parents:
            from tests.harness import parents  # which knows of us

            parents.end_all(self.run_root)

    def processes(self) -> list[psutil.Process]:
        """Every process of ours that belongs to this run root, but the nursery, which ends by itself."""
        names = {path.name for path in (self.run_root / "s").glob("*")} | {str(self.run_root)}
        names |= {path.name for path in self._parents()}
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            ours = "qemu-system" in line or "virtiofsd" in line or line.startswith("vmsandbox ")
            ours = ours and not line.startswith("vmsandbox nursery ")
            if ours and (any(name in line for name in names) or self._is_open_in(process)):
                found.append(process)
        return found

    def _parents(self) -> list[Path]:
        """Directories of machines that pods are forked from, and their log, unless these are shared by many tests."""
        place = self.run_root / "o"
        return [] if place.is_symlink() else [path for path in place.glob("*") if path.name != "keeper.log"]

    def _is_open_in(self, process: psutil.Process) -> bool:
        """Whether it has files of this run root open, be they removed or not."""
        try:
            held = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            return False
        return any(path.startswith(f"{self.run_root}/") for path in held)

    def _is_ours(self, data: Path) -> bool:
        """Whether a container's data belongs to this run root; other tests share the data root."""
        try:
            return (data / "owner").read_text() == str(self.run_root)
        except FileNotFoundError:
            return data.exists()

    def leftovers(self) -> list[str]:
        """Everything that should be gone when no container is left."""
        # What has no title any more is on its way out.
        left = [f"process {process.pid} {name[:200]}" for process in self.processes() if (name := title(process))]
        left += [
            f"file {path}"
            for directory in ("s", "c", "n", "p", "r", "net")
            for path in (self.run_root / directory).glob("*")
        ]
        left += [f"file {path}" for path in self._parents()]
        left += [f"uid {path}" for path in (self.run_root / "u").glob("[0-9]*")]
        containers = self.data_root / "containers"
        left += [f"data {path}" for path in containers.glob("*") if self._is_ours(path)]
        left += [f"layer {path}" for path in (self.data_root / "spares").glob("*") if self._is_ours(path)]
        references = (self.data_root / "images" / "refs").glob("*/*")
        left += [f"image in use {path}" for path in references if not (containers / path.name).exists()]
        if self.owns_data:
            network = self.data_root / "network"
            left += [f"name {path}" for path in (network / "names").glob("*")]
            left += [f"lease {path}" for path in (network / "leases").glob("*/*") if path.name[:1].isdigit()]
        left += [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.run_root) in line]
        return left


def wait_until_gone(pid: int, timeout: float = 30.0) -> None:
    """Wait for the end of a process that is not our child."""
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=timeout)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def name_of(process: psutil.Process) -> str:
    """Its name; nothing of one that has just ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def title(process: psutil.Process) -> str:
    """Its command line, as one; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline()).rstrip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def awaited(question: Callable[[], T], timeout: float = 60.0) -> T:
    """Ask until the answer is yes: what another process does shows in no other way."""
    end = time.monotonic() + timeout
    while not (answer := question()):
        assert time.monotonic() < end, "it did not come about"
    return answer


def kill(pid: int) -> None:
    os.kill(pid, 9)
