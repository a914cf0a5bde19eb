"""The user's terminal while a container has it: raw, and given back on every way out."""

from __future__ import annotations

import os
import signal
import sys
import termios
from contextlib import contextmanager

from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Signals after which the client ends or goes on without the container.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
)


def require_terminal() -> None:
    """`-t` with `-i` needs a terminal to read from, as docker says."""
    if not os.isatty(0):
        raise InvalidArgumentError("the input device is not a terminal: leave '-t' out, or run it in a terminal")


@contextmanager
def raw(*, wanted: bool) -> Iterator[list[Any] | None]:
    """Put the terminal on stdin into raw mode for the block; yields the mode it has outside."""
    if not wanted or not os.isatty(0):
        yield None
        return
    saved = termios.tcgetattr(0)
    mode = termios.tcgetattr(0)
    mode[0] &= ~(
        termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.INPCK | termios.ISTRIP | termios.IXON
    )
    mode[1] &= ~termios.OPOST
    mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    mode[6][termios.VMIN] = 1
    mode[6][termios.VTIME] = 0
    termios.tcsetattr(0, termios.TCSANOW, mode)
    try:
        yield saved
    finally:
        sys.stdout.flush()
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


@contextmanager
def forwarding(pid: int) -> Iterator[None]:
    """Pass the signals we get on to the stand-in for the duration of the block."""

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
