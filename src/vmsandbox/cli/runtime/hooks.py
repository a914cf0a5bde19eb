"""Programs that an engine wants run on the host at points of a container's life."""

from __future__ import annotations

import json
import os

from vmsandbox.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(hooks: list[dict[str, Any]], name: str, state: dict[str, Any]) -> None:
    """Run hooks in order, the container's state on their stdin; the first that fails is raised as SandboxError."""
    if not hooks:
        return
    import subprocess

    text = json.dumps(state).encode()
    for index, hook in enumerate(hooks):
        path = str(hook.get("path"))
        timeout = hook.get("timeout")
        environment = dict(str(entry).partition("=")[::2] for entry in hook.get("env") or [])
        try:
            done = subprocess.run(
                [*(hook.get("args") or [path])],
                executable=path,
                input=text,
                env=environment,
                cwd=state.get("bundle") or "/",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{name} hook #{index} '{path}' did not end within {timeout} s") from None
        except OSError as error:
            raise SandboxError(
                f"{name} hook #{index} '{path}' cannot be run: {os.strerror(error.errno or 0)}"
            ) from None
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip()[-1024:]
            raise SandboxError(f"{name} hook #{index} '{path}' failed with status {done.returncode}: {said}")


def run_all(hooks: list[dict[str, Any]], name: str, state: dict[str, Any]) -> list[SandboxError]:
    """Run every hook although others fail; answers what failed."""
    failed = []
    for hook in hooks:
        try:
            run([hook], name, state)
        except SandboxError as error:
            failed.append(error)
    return failed
