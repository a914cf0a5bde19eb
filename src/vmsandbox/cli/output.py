"""What the command line prints on its own behalf, and the exit codes that go with errors."""

from __future__ import annotations

import os
import sys

from vmsandbox.errors import CommandNotExecutableError, CommandNotFoundError, SandboxError, evidence, one_line

#: docker's and podman's code for "the engine itself failed"
ENGINE_FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
FAILED = 1


def report(error: SandboxError, *, debug: bool) -> None:
    """One line on stderr; the evidence below it only on request."""
    print(f"vmsandbox: {one_line(error)}", file=sys.stderr)
    if error.detail:
        if debug:
            print(evidence(error), file=sys.stderr)
        else:
            print("vmsandbox: '--debug' before the verb shows the evidence", file=sys.stderr)


def occupy_stdio() -> None:
    """Put /dev/null where 0, 1 or 2 is closed, so that nothing of ours ever gets those numbers."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def give_up_stdout() -> None:
    """Let nothing more be written where it cannot be: also what is in a buffer, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_exit_code(error: SandboxError) -> int:
    """The exit code of `run` and `exec` for an error of ours (docker's convention)."""
    if isinstance(error, CommandNotFoundError):
        return NOT_FOUND
    if isinstance(error, CommandNotExecutableError):
        return NOT_EXECUTABLE
    return ENGINE_FAILED
