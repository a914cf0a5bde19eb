"""The real runc on this machine, as what our command is compared with."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.harness.cli import TIMEOUT

if TYPE_CHECKING:
    from pathlib import Path


class Runc:
    """Runs runc with a root of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        (scratch / "root").mkdir()

    def argv(self, *words: str) -> list[str]:
        return ["runc", "--root", str(self.scratch / "root"), *words]

    def __call__(self, *words: str) -> str:
        code, said = self._run(*words)
        assert code == 0, (words, said)
        return said

    def refused(self, *words: str) -> str:
        """What it says about a command that fails."""
        log = self.scratch / "log"
        code, said = self._run("--log", str(log), "--log-format", "json", *words)
        assert code != 0, (words, said)
        return str(json.loads(log.read_text().splitlines()[-1])["msg"])

    def _run(self, *words: str) -> tuple[int, str]:
        argv = self.argv(*words)
        with (self.scratch / "out").open("w+b") as out:
            # Not a pipe: what it starts keeps it.
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=TIMEOUT, check=False)
            out.seek(0)
            return done.returncode, out.read().decode()

    def create(self, container_id: str, document: dict[str, Any]) -> None:
        """Create a container of what is in our bundle, but for what is in runc's way."""
        # A version that it is too old for, and a cgroup with somebody else in it.
        document["ociVersion"] = "1.0.2"
        document["linux"]["cgroupsPath"] = f"/vmsandbox-test-{os.getpid()}"
        bundle = self.scratch / "bundle"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(document))
        self("create", "--bundle", str(bundle), container_id)
