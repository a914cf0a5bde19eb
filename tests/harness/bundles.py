"""The `vmsandbox-runtime` command as an engine calls it, and bundles for it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.harness import parents
from tests.harness.cli import SETTINGS, TIMEOUT, Result
from vmsandbox.cli.runtime.static import default_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CODE = "import sys; from vmsandbox.cli.runtime.main import main; sys.exit(main())"
SANDBOX = {"io.kubernetes.cri.container-type": "sandbox"}


def edited(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The bundle, after `change` has had its document."""
    document = json.loads((bundle / "config.json").read_text())
    change(document)
    (bundle / "config.json").write_text(json.dumps(document))
    return bundle


class Runtime:
    """Runs `vmsandbox-runtime` with its own root and a data root that tests share."""

    def __init__(self, scratch: Path, data_root: Path, *, inside: Sequence[str] = ()) -> None:
        """`inside` is what goes before every command, for one that runs in other namespaces."""
        self._inside = inside
        self.scratch = scratch
        self.root = scratch / "r"
        self.data_root = data_root
        self.log = scratch / "log.json"
        #: without one, pods are forks as soon as they can; what they are forked from would outlive a test
        self.config: Path | None = SETTINGS / "clone.toml"

    def argv(self, *words: str) -> list[str]:
        roots = ("--root", str(self.root), "--data-root", str(self.data_root))
        config = ("--config", str(self.config)) if self.config else ()
        return [
            *self._inside,
            sys.executable,
            "-c",
            CODE,
            *roots,
            *config,
            "--log",
            str(self.log),
            "--log-format",
            "json",
            *words,
        ]

    def __call__(self, *words: str, stdin: bytes | None = None, timeout: float = TIMEOUT, **more: Any) -> Result:
        given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
        # An engine may give no environment at all.
        more.setdefault("env", {})
        done = subprocess.run(self.argv(*words), capture_output=True, timeout=timeout, check=False, **given, **more)
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, **more: Any) -> str:
        result = self(*words, **more)
        assert result.code == 0, (words, result, self.said())
        return result.stdout

    def refused(self, *words: str, **more: Any) -> str:
        """Run a command that has to fail as runc fails; its last message in the log."""
        result = self(*words, **more)
        assert result.code == (255 if words[0] == "exec" else 1), (words, result)
        message = str(json.loads(self.log.read_text().splitlines()[-1])["msg"])
        assert message in result.stderr
        return message

    def said(self) -> str:
        """What supervisors said, for the evidence of a failed test."""
        return "".join(path.read_text(errors="replace")[-4000:] for path in self.root.glob("s/*/supervisor.log"))

    # ------------------------------------------------------------ bundles

    def bundle(self, name: str, rootfs: Path, *args: str, **changes: Any) -> Path:
        """A bundle whose process is `args`; `changes` replace members of config.json."""
        directory = self.scratch / name
        directory.mkdir()
        spec = copy.deepcopy(default_spec())
        spec["process"].update(terminal=False, args=list(args))
        spec["root"] = {"path": str(rootfs)}
        spec.update(changes)
        (directory / "config.json").write_text(json.dumps(spec))
        return directory

    def member(self, name: str, rootfs: Path, *args: str, pod: str, pid: int) -> Path:
        """A bundle of another container for a pod, by the id and the pid of its first one."""
        linux = copy.deepcopy(default_spec()["linux"])
        for namespace in linux["namespaces"]:
            if namespace["type"] in ("network", "ipc", "uts"):
                kind = {"network": "net"}.get(namespace["type"], namespace["type"])
                namespace["path"] = f"/proc/{pid}/ns/{kind}"
        annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": pod}
        bundle = self.bundle(name, rootfs, *args, annotations=annotations, linux=linux)
        document = json.loads((bundle / "config.json").read_text())
        del document["hostname"]
        (bundle / "config.json").write_text(json.dumps(document))
        return bundle

    def create(
        self,
        container_id: str,
        bundle: Path,
        *words: str,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.DEVNULL,
    ) -> int:
        """Create a container as an engine does, with this stdio; answers the pid of the pid file."""
        pid_file = bundle / "pid"
        argv = self.argv("create", "--bundle", str(bundle), "--pid-file", str(pid_file), *words, container_id)
        with (self.scratch / "create.err").open("w+b") as errors:
            done = subprocess.run(argv, stdin=stdin, stdout=stdout, stderr=errors, timeout=TIMEOUT, check=False, env={})
            errors.seek(0)
            assert done.returncode == 0, (errors.read(), self.said())
        return int(pid_file.read_text())

    def state(self, container_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("state", container_id))
        return found

    def await_status(self, container_id: str, status: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while self.state(container_id)["status"] != status:
            assert time.monotonic() < deadline, f"container '{container_id}' does not become {status}"

    def supervisor(self, *, other_than: int = 0) -> psutil.Process:
        """The supervisor of the only pod, once it says that it is."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            (document,) = self.root.glob("s/*/sandbox.json")
            pid = json.loads(document.read_text())["supervisor"]["pid"]
            if pid != other_than and psutil.pid_exists(pid):
                return psutil.Process(pid)
            assert time.monotonic() < deadline, "no supervisor takes the pod over"
            time.sleep(0.02)

    def supervisor_of(self, container_id: str) -> int:
        """The pid of the supervisor of a container's pod."""
        pid: int = json.loads((self.root / "c" / container_id / "sandbox.json").read_text())["supervisor"]["pid"]
        return pid

    # ------------------------------------------------------------ what is left

    def remove_all(self) -> None:
        for container_id in self("list", "-q").stdout.split():
            self("delete", "--force", container_id)
        parents.end_all(self.root)

    def leftovers(self) -> list[str]:
        left = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if str(self.root) in line and ("qemu-system" in line or "virtiofsd" in line):
                left.append(line[:200])
        left += [f"file {path}" for directory in "scn" for path in (self.root / directory).glob("*")]
        left += [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.root) in line]
        return left
