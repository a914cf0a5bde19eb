"""The gRPC server on a unix socket, and the relays that bring the host's bytes to it."""

from __future__ import annotations

import os
import threading
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import grpc

#: Each attachment, wait and watcher holds a thread; threads are made as they are needed.
_THREADS = 512
_STACK = 512 * 1024
#: Larger than any honest message of the host.
_MESSAGE_LIMIT = 64 * 1024 * 1024
#: seconds for answers to leave before the server closes
GRACE = 2.0
#: nanoseconds by which gRPC's own threads may look late for what to do, and what everything else has
_RELAXED_SLACK = 200_000_000
_USUAL_SLACK = 50_000


class Relay(Protocol):
    """Something that brings the host to the server's socket."""

    def start(self) -> None: ...

    def drain(self, timeout: float) -> None:
        """Wait until the last answers are on their way."""


def made() -> grpc.Server:
    """A server without services."""
    threading.stack_size(_STACK)
    return grpc.server(
        futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="rpc", initializer=_be_punctual),
        options=[
            ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
            ("grpc.max_send_message_length", _MESSAGE_LIMIT),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.lookahead_bytes", 1 << 20),
            ("grpc.http2.max_frame_size", 256 * 1024),
            ("grpc.http2.bdp_probe", 0),
        ],
    )


def serve(server: grpc.Server, path: Path) -> None:
    """Begin to serve at a unix socket; raises OSError."""
    path.unlink(missing_ok=True)
    if not server.add_insecure_port(f"unix:{path}"):
        raise OSError(f"cannot listen at '{path}'")
    server.start()
    _relax_others()


def _be_punctual() -> None:
    """What a thread starts has its timers' precision, and containers are to have the usual one."""
    _set_slack(threading.get_native_id(), _USUAL_SLACK)


def _relax_others() -> None:
    """Let the kernel put the timeouts of gRPC's threads together, which come round many times a second for nothing.

    An idle machine pays for each time; what arrives wakes them as before.
    """
    for thread in {int(name) for name in os.listdir("/proc/self/task")} - {threading.get_native_id()}:
        _set_slack(thread, _RELAXED_SLACK)


def _set_slack(thread: int, nanoseconds: int) -> None:
    with suppress(OSError):  # it has ended, or we may not
        Path(f"/proc/{thread}/timerslack_ns").write_text(str(nanoseconds))


def stop(server: grpc.Server, relays: list[Relay]) -> None:
    """Let the answers under way leave, then close everything."""
    server.stop(GRACE).wait()
    for relay in relays:
        relay.drain(GRACE)
