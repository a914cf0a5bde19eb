"""Programs that an engine wants run on the host at points of a container's life."""

from __future__ import annotations

import os

from vmsandbox import plainjson
from vmsandbox.errors import InvalidBundleError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmsandbox.cli.runtime.main import Options


def checked(hooks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Hooks that are run before anybody else has looked at them; InvalidBundleError names what is wrong."""
    for index, hook in enumerate(hooks):
        path, timeout = hook.get("path"), hook.get("timeout")
        if not isinstance(path, str) or not path.startswith("/"):
            raise InvalidBundleError(f"'hooks.{name}[{index}].path' is not an absolute path")
        for member in ("args", "env"):
            texts = hook.get(member)
            if texts is not None and not (isinstance(texts, list) and all(isinstance(each, str) for each in texts)):
                raise InvalidBundleError(f"'hooks.{name}[{index}].{member}' is not a list of texts")
        if timeout is not None and (not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 1):
            raise InvalidBundleError(f"'hooks.{name}[{index}].timeout' is not a number of seconds above 0")
    return hooks


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

    text = plainjson.dumps(state).encode()
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


def run_quietly(options: Options, hooks: list[dict[str, Any]], name: str, state: dict[str, Any]) -> None:
    """Run hooks whose failure changes nothing any more; it is only reported."""
    from vmsandbox.cli.runtime.main import report

    for failed in run_all(hooks, name, state):
        report(options, str(failed), level="warning")
