"""What a build shows and how it runs other programs: one line per step with its time, the noise in a log file."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from vmsandbox.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

#: seconds between signs of life on a terminal and elsewhere
_TICK_TERMINAL = 1.0
_TICK_ELSEWHERE = 10.0


class BuildError(SandboxError):
    """A step of a build failed; `detail` is the end of what the program printed."""


class Steps:
    """Reports steps on `stream` and runs programs with their output in `log`."""

    def __init__(self, stream: TextIO, log: Path, *, tick: float | None = None) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._log = log
        self._tick = tick or (_TICK_TERMINAL if self._terminal else _TICK_ELSEWHERE)
        self._text = ""
        self._start = 0.0
        log.unlink(missing_ok=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Announce a step and, when the block is left, how long it took.  Steps do not nest."""
        self._text = text
        self._start = time.monotonic()
        self._print(f"{text} ...")
        try:
            yield
        except BaseException:
            self._print(f"{self._again()} failed\n")
            raise
        self._print(f"{self._again()} {time.monotonic() - self._start:.1f} s\n")

    def say(self, text: str) -> None:
        """One line that is not a step."""
        self._print(text + "\n")

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a program to its end, output to the log; raises BuildError if it fails or does not exist."""
        with open(self._log, "ab") as log:
            words = [os.fspath(word) for word in argv]
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            before = log.tell()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env=_environment(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,
                )
            except FileNotFoundError as error:
                raise BuildError(f"program '{words[0]}' does not exist: run 'scripts/setup'") from error
            try:
                status = self._wait(process)
            except BaseException:
                os.killpg(process.pid, 9)
                process.wait()
                raise
        if status != 0:
            with open(self._log, "rb") as log:
                log.seek(before)
                output = log.read().decode(errors="replace")
            last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
            raise BuildError(
                f"'{os.path.basename(words[0])}' ended with status {status}: {last} (all of it is in '{self._log}')",
                detail=output[-4000:],
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(self._tick)
            except subprocess.TimeoutExpired:
                if self._terminal:
                    self._print(f"{self._again()} {time.monotonic() - self._start:.0f} s ")
                else:
                    self._print(".")

    def _again(self) -> str:
        """What comes before the time: on a terminal the line is written anew."""
        return f"\r{self._text} ..." if self._terminal else ""

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def output(argv: Sequence[str | os.PathLike[str]], *, environment: Mapping[str, str] | None = None) -> str:
    """What a short program prints; raises BuildError with its last words if it fails."""
    words = [os.fspath(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildError(f"program '{words[0]}' does not exist: run 'scripts/setup'") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BuildError(f"'{words[0]}' ended with status {done.returncode}: {last}", detail=done.stderr[-4000:])
    return done.stdout


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, without what changes what a build yields."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return {**kept, "LC_ALL": "C.UTF-8", "TZ": "UTC", **(extra or {})}
