"""The user's terminal while a container has it: raw, and given back on every way out."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from contextlib import contextmanager

from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: local modes that no shell turns off together: without both of them the terminal is as `make_raw` leaves it
COOKED = termios.ICANON | termios.ISIG


def require_terminal() -> None:
    """`-t` with `-i` needs a terminal to read from, as docker says."""
    if not os.isatty(0):
        raise InvalidArgumentError("the input device is not a terminal: leave '-t' out, or run it in a terminal")


def current_mode(*, wanted: bool) -> list[Any] | None:
    """The mode of the terminal on stdin, if a container is to have it."""
    return termios.tcgetattr(0) if wanted and os.isatty(0) else None


def window_size() -> list[int] | None:
    """Columns and rows of the terminal that we write to, or else read from; None without one, or if it does not say."""
    for fd in (1, 0):
        try:
            rows, columns = struct.unpack("hhhh", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))[:2]
        except OSError:
            continue
        if rows and columns:
            return [columns, rows]
    return None


def is_ours() -> bool:
    """Whether we may read stdin: no terminal, or one in whose foreground we are, or that is not our session's."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True


def make_raw(outside: list[Any] | None) -> None:
    """Put the terminal on stdin, whose mode is `outside`, into raw mode; with None, leave it alone."""
    if outside is None:
        return
    mode = [*outside[:6], [*outside[6]]]
    mode[0] &= ~(
        termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.INPCK | termios.ISTRIP | termios.IXON
    )
    mode[1] &= ~termios.OPOST
    mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    mode[6][termios.VMIN] = 1
    mode[6][termios.VTIME] = 0
    _set(mode)


def give_back(outside: list[Any] | None) -> None:
    """Give the terminal on stdin the mode that it has outside, unless somebody has given it another since."""
    if outside is None:
        return
    try:
        raw = not termios.tcgetattr(0)[3] & COOKED
    except termios.error:
        return  # hung up
    if raw:
        _set(outside)


def _set(mode: list[Any]) -> None:
    try:
        termios.tcsetattr(0, termios.TCSANOW, mode)
    except termios.error:
        return  # hung up


@contextmanager
def raw(*, wanted: bool) -> Iterator[None]:
    """Put the terminal on stdin into raw mode for the block."""
    mode = current_mode(wanted=wanted)
    make_raw(mode)
    try:
        yield
    finally:
        sys.stdout.flush()
        give_back(mode)
