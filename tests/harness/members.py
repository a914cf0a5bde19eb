"""A pod whose members are what is tested: starting a machine is what costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

from tests.harness.bundles import SANDBOX, edited
from tests.harness.cli import awaited

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.harness.bundles import Runtime

CGROUP = "/sys/fs/cgroup"


class Members:
    """The pod of one runtime; its first container does nothing."""

    def __init__(self, runtime: Runtime, rootfs: Path, **changes: Any) -> None:
        """`changes` are of the first container's config.json."""
        self.runtime, self.rootfs = runtime, rootfs
        annotations = {**SANDBOX, "io.kubernetes.cri.sandbox-id": "pause"}
        bundle = runtime.bundle("pause", rootfs, "sleep", "1000000", annotations=annotations, **changes)
        self.pid = runtime.create("pause", bundle)
        runtime.ok("start", "pause")
        self._before = self._there()

    def bundle(self, name: str, change: Callable[[dict[str, Any]], object], *args: str) -> Path:
        return edited(self.runtime.member(name, self.rootfs, *args, pod="pause", pid=self.pid), change)

    def start(self, name: str, change: Callable[[dict[str, Any]], object], *args: str) -> int:
        """Start a member, which does nothing unless told; its pid."""
        pid = self.runtime.create(name, self.bundle(name, change, *(args or ("sleep", "1000000"))))
        self.runtime.ok("start", name)
        return pid

    def read(self, name: str, *files: str) -> dict[str, str]:
        """Files of a member's control group."""
        script = f"cd {CGROUP}; for file; do echo $file=$(cat $file); done"
        lines = self.runtime.ok("exec", name, "sh", "-c", script, "sh", *files).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _there(self) -> set[str]:
        """Files of pods and containers, and processes of ours below this one; what is shared is not looked into."""
        files = (path for directory in "sc" for path in (self.runtime.root / directory).rglob("*"))
        found = {str(path) for path in files if "/shared/" not in str(path.parent)}
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline()).strip()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if title.startswith("vmsandbox ") and not title.startswith("vmsandbox nursery"):
                found.add(f"{process.pid} {title}")
        return found

    def remains_alone(self) -> bool:
        """Wait until all is there that was with the first container alone, and nothing else."""
        assert self.runtime.ok("list", "-q").split() == ["pause"]
        return awaited(lambda: self._there() == self._before)
