"""Scheduling policy and I/O priority of a process: what a process object asks for and crun may not know.

A container's init is given them between its creation and its start.  A process that is added has begun when its pid is
known; it inherits them from the thread that starts crun, so that it never runs without.  Two things cannot be
inherited (SCHED_DEADLINE, and what is reset by a fork) and come a moment later.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from vmsandbox_agent.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_SYS_SCHED_SETATTR = 314
_SYS_IOPRIO_SET = 251
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_SHIFT = 13

POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def asked(process: dict[str, Any]) -> bool:
    """Whether a process object asks for anything of this."""
    return bool(process.get("scheduler") or process.get("ioPriority"))


def apply(process: dict[str, Any], pid: int = 0) -> None:
    """Give a process (0: the calling thread) what its object asks for.  Raises InvalidArgumentError."""
    scheduler, priority = process.get("scheduler"), process.get("ioPriority")
    try:
        if scheduler:
            what = "scheduler"
            _call(_SYS_SCHED_SETATTR, pid, ctypes.c_char_p(attributes(scheduler)), 0)
        if priority:
            what = "ioPriority"
            _call(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, pid, io_priority(priority))
    except ProcessLookupError:
        return  # it has ended
    except OSError as error:
        raise InvalidArgumentError(f"the kernel refuses 'process.{what}': {error.strerror}") from error
    except (KeyError, ValueError, TypeError, struct.error) as error:
        raise InvalidArgumentError(f"'process.{what}' is not understood: {error}") from error


def started(process: dict[str, Any], start: Callable[[], T]) -> T:
    """Call `start`, which starts a program that inherits what `process` asks for."""
    if not asked(process):
        return start()
    scheduler = process.get("scheduler") or {}
    if not _is_inherited(scheduler):
        process = {**process, "scheduler": None}
    made: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            apply(process)
            made.append(start())
        except BaseException as error:
            failed.append(error)

    # A thread of its own: it ends with what it was given, and the others keep theirs.
    thread = threading.Thread(target=body, name="starting")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def complete(process: dict[str, Any], pid: int) -> None:
    """Give a process that was `started` what it could not inherit."""
    scheduler = process.get("scheduler")
    if scheduler and not _is_inherited(scheduler):
        apply({"scheduler": scheduler}, pid)


def _is_inherited(scheduler: dict[str, Any]) -> bool:
    return scheduler.get("policy") != "SCHED_DEADLINE" and "SCHED_FLAG_RESET_ON_FORK" not in (
        scheduler.get("flags") or []
    )


def attributes(scheduler: dict[str, Any]) -> bytes:
    """struct sched_attr"""
    flags = 0
    for name in scheduler.get("flags") or []:
        flags |= FLAGS[name]
    return struct.pack(
        "IIQiIQQQ",
        48,
        POLICIES[scheduler["policy"]],
        flags,
        int(scheduler.get("nice") or 0),
        int(scheduler.get("priority") or 0),
        int(scheduler.get("runtime") or 0),
        int(scheduler.get("deadline") or 0),
        int(scheduler.get("period") or 0),
    )


def io_priority(given: dict[str, Any]) -> int:
    """The number that ioprio_set(2) takes."""
    return CLASSES[given["class"]] << _IOPRIO_CLASS_SHIFT | int(given.get("priority") or 0)


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
