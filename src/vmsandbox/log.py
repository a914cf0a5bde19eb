"""Logging set-up: one line per record, with the pod and container it is about."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import TextIO

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


def configure(stream: TextIO, *, debug: bool = False) -> None:
    """Send everything to `stream`; `debug` lowers the threshold."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    # They say what they do with their event loop, for every channel.
    for library in ("grpc", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)
