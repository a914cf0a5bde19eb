"""Programs that an engine wants run on the host at points of a container's life."""

from __future__ import annotations

import json
import os

from vmsandbox.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def run_inside(hooks: list[dict[str, Any]], name: str, state: dict[str, Any]) -> None:
    """Run hooks that want the container's namespaces: of those only the network's is on the host.

    They see the host's files, and what they mount is seen by nobody else and gone with them.
    """
    if not hooks:
        return
    from vmsandbox.cli.runtime import namespaces

    place = f"/proc/{state['pid']}/ns/net"

    def enter() -> None:
        namespaces.enter(place)
        namespaces.hide_mounts()

    run(hooks, name, state, prepare=enter)


def run(
    hooks: list[dict[str, Any]], name: str, state: dict[str, Any], *, prepare: Callable[[], None] | None = None
) -> None:
    """Run hooks in order, the container's state on their stdin; the first that fails is raised as SandboxError.

    Each calls `prepare` before it becomes its program.
    """
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
                preexec_fn=prepare,
            )
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{name} hook #{index} '{path}' did not end within {timeout} s") from None
        except subprocess.SubprocessError as error:
            raise SandboxError(f"{name} hook #{index} '{path}' cannot enter the pod's network: {error}") from None
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
