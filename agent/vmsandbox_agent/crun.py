"""The one door to crun.

crun is called with a JSON log, whose last error line becomes the message; nobody branches on its text.  What it says
once it is in the container, of a hook there that fails, it says in the same format on the container's stderr: with such
hooks the log is of text.  The container inherits the standard streams of `create` and `exec`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from vmsandbox_agent import clock_offsets, scheduling
from vmsandbox_agent.errors import AgentError, TimedOutError

if TYPE_CHECKING:
    from pathlib import Path

    from vmsandbox_agent.reaper import Child, Reaper

#: seconds a call may take before it is killed
TIMEOUT = 60.0
_LOG_LIMIT = 64 * 1024


class CrunError(AgentError):
    """crun refused; the message is crun's own."""


class Crun:
    """Calls crun with one state directory."""

    def __init__(self, reaper: Reaper, root: Path, *, binary: str = "/usr/bin/crun") -> None:
        self._reaper = reaper
        self._root = root
        self._binary = binary
        self._env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        #: time namespaces of containers that have their own, by bundle: crun knows a process by its start, which it
        #: reads by the clocks of its own
        self.clocks: dict[Path, str] = {}

    def create(
        self,
        container_id: str,
        bundle: Path,
        *,
        stdio: tuple[int | None, int | None, int | None],
        console_socket: Path | None,
        hooked: bool = False,
    ) -> Child:
        """Create a container, `hooked` if it has hooks inside; answers its init, which waits for `start`."""
        return self._made(["create"], container_id, bundle, stdio=stdio, console_socket=console_socket, hooked=hooked)

    def run(
        self,
        container_id: str,
        bundle: Path,
        *,
        stdio: tuple[int | None, int | None, int | None],
        console_socket: Path | None,
        hooked: bool = False,
    ) -> Child:
        """Create a container and start it; what a second call of crun would cost is a tenth of a container's start."""
        verb = ["run", "--detach"]
        return self._made(verb, container_id, bundle, stdio=stdio, console_socket=console_socket, hooked=hooked)

    def _made(
        self,
        verb: list[str],
        container_id: str,
        bundle: Path,
        *,
        stdio: tuple[int | None, int | None, int | None],
        console_socket: Path | None,
        hooked: bool,
    ) -> Child:
        return self._inheriting(
            [*verb, "--bundle", str(bundle)],
            container_id,
            bundle,
            "init",
            stdio=stdio,
            console_socket=console_socket,
            log_format="text" if hooked else "json",
        )

    def exec(
        self,
        container_id: str,
        bundle: Path,
        name: str,
        process: Path,
        *,
        stdio: tuple[int | None, int | None, int | None],
        console_socket: Path | None,
        document: dict[str, Any],
    ) -> Child:
        """Start another process; `name` tells its files in the bundle apart, `document` is what `process` holds."""
        return self._inheriting(
            ["exec", "--detach", "--process", str(process)],
            container_id,
            bundle,
            name,
            stdio=stdio,
            console_socket=console_socket,
            document=document,
        )

    def start(self, container_id: str, bundle: Path) -> None:
        self._run(["start", container_id], bundle / "start.log")

    def pause(self, container_id: str, bundle: Path) -> None:
        self._run(["pause", container_id], bundle / "pause.log")

    def resume(self, container_id: str, bundle: Path) -> None:
        self._run(["resume", container_id], bundle / "pause.log")

    def update(self, container_id: str, bundle: Path, resources: Path) -> None:
        self._run(["update", "--resources", str(resources), container_id], bundle / "update.log")

    def delete(self, container_id: str, bundle: Path) -> None:
        """Remove what crun knows of a container, killing what is left of it."""
        self._run(["delete", "--force", container_id], bundle / "delete.log")

    def version(self) -> str:
        """The version's number, "" if crun cannot be called."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                child = self._reaper.spawn([self._binary, "--version"], env=self._env, stdout=writing)
            finally:
                os.close(writing)
            child.wait(TIMEOUT)
            words = os.read(reading, 4096).decode(errors="replace").split()
        except (OSError, TimedOutError):
            return ""
        finally:
            os.close(reading)
        return words[2] if len(words) > 2 else ""

    def _inheriting(
        self,
        verb: list[str],
        container_id: str,
        bundle: Path,
        name: str,
        *,
        stdio: tuple[int | None, int | None, int | None],
        console_socket: Path | None,
        document: dict[str, Any] | None = None,
        log_format: str = "json",
    ) -> Child:
        pid_file = bundle / f"{name}.pid"
        console = ["--console-socket", str(console_socket)] if console_socket else []
        with self._reaper.expecting():
            arguments = [*verb, "--pid-file", str(pid_file), *console, container_id]
            self._run(arguments, bundle / f"{name}.log", stdio, document, log_format)
            return self._reaper.claim(int(pid_file.read_text()))

    def _run(
        self,
        arguments: list[str],
        log: Path,
        stdio: tuple[int | None, int | None, int | None] = (None, None, None),
        document: dict[str, Any] | None = None,
        log_format: str = "json",
    ) -> None:
        argv = [self._binary, f"--root={self._root}", f"--log={log}", f"--log-format={log_format}"]
        argv.append("--cgroup-manager=cgroupfs")
        log.unlink(missing_ok=True)

        def start() -> Child:
            words = clock_offsets.inside(self.clocks.get(log.parent, ""), [*argv, *arguments])
            return self._reaper.spawn(words, env=self._env, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2])

        child = scheduling.started(document or {}, start)
        try:
            status = child.wait(TIMEOUT)
        except TimedOutError:
            child.kill(9)
            child.wait()
            raise CrunError(f"crun {arguments[0]} has not ended after {TIMEOUT:g} s") from None
        if status.code:
            message = _last_error(log)
            raise CrunError(message or f"crun {arguments[0]} ended with status {status.code}")


def _last_error(log: Path) -> str:
    try:
        with log.open("rb") as file:
            lines = file.read(_LOG_LIMIT).splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("level") == "error":
            return str(record.get("msg", ""))
    # Of text, which ends with the error.
    return next((line.decode(errors="replace") for line in reversed(lines) if line[:1] not in (b"", b"{")), "")
