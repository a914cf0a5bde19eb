"""Logging set-up: one line per record, with the pod and container it is about, in a file of bounded size."""

from __future__ import annotations

import logging
import os
import stat
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import TextIO

#: bytes of a log beyond which its older half goes
MOST = 4 * 1024 * 1024

sandbox_id: ContextVar[str] = ContextVar("sandbox_id", default="-")
container_id: ContextVar[str] = ContextVar("container_id", default="-")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        where = f"[{sandbox_id.get()[:12]}/{container_id.get()[:12]}]"
        head = f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} {where}"
        text = f"{head} {record.name}: {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _Handler(logging.StreamHandler[TextIO]):
    """Some lines are a guest's doing, who can have as many of them as it likes: a file does not grow for ever."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        # A full disk costs lines, never the supervisor.
        with suppress(OSError):
            fd = self.stream.fileno()
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_size > MOST:
                _shorten(fd)


def _shorten(fd: int) -> None:
    """Keep the newer half of a file that is open for appending."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        file.seek(-MOST // 2, os.SEEK_END)
        file.readline()
        kept = file.read()
    os.ftruncate(fd, 0)
    os.write(fd, kept)


def configure(stream: TextIO, *, debug: bool = False) -> None:
    """Send everything to `stream`, the supervisor's log; `debug` lowers the threshold."""
    handler = _Handler(stream)
    handler.setFormatter(_Formatter())
    logging.getLogger().handlers[:] = [handler]
    set_level(logging.DEBUG if debug else logging.INFO)


def set_level(level: int | str) -> None:
    """Set the threshold.  Where that is no change nothing is: a change writes to every logger there is."""
    # They say what they do with their event loop, for every channel.
    for name, wanted in (("", level), ("grpc", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        number = logging.getLevelName(wanted) if isinstance(wanted, str) else wanted
        if logger.level != number:
            logger.setLevel(number)
