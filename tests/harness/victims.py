"""A small process to be forked: its threads wait in different calls, and it does what it is told through a socket.

What a fork of it is told comes through another socket, which takes the place of the first one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from subprocess import DEVNULL
from typing import TYPE_CHECKING

from vmsandbox_hypervisor.children import read_start_time
from vmsandbox_hypervisor.forking import fork as forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vmsandbox_hypervisor.api import Confinement

#: seconds an answer may take
PATIENCE = 10.0
NAME = "guest=one,"

SCRIPT = r"""
import ctypes, fcntl, hashlib, json, mmap, os, queue, resource, select, signal, socket, struct, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)
answers, requests = queue.Queue(), queue.Queue()
read_event, polled_event = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
memory_fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
os.ftruncate(memory_fd, 8 * mmap.PAGESIZE)
memory = mmap.mmap(memory_fd, 8 * mmap.PAGESIZE)
second_half = mmap.mmap(memory_fd, 4 * mmap.PAGESIZE, offset=4 * mmap.PAGESIZE, prot=mmap.PROT_READ)
apart = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
apart.madvise(mmap.MADV_DONTFORK)
apart[:5] = b"apart"
handled, kept, state = [], [], {}
signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))

def told(name):
    class Stack(ctypes.Structure):
        _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
    stack, head, length, number = Stack(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_void_p()
    libc.sigaltstack(None, ctypes.byref(stack))
    libc.syscall(274, 0, ctypes.byref(head), ctypes.byref(length))
    libc.prctl(40, ctypes.byref(number))
    with open("/proc/thread-self/comm") as file:
        comm = file.read().strip()
    return {
        "name": name, "tid": threading.get_native_id(), "comm": comm, "stack": stack.at, "robust": head.value,
        "number_at": number.value,
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }

def named(name):
    libc.prctl(15, name.encode())

def in_read():
    named("in read")
    while True:
        os.read(read_event, 8)  # which goes on after a signal
        answers.put(told("read"))

def in_poll():
    named("in poll")
    poll = select.poll()
    poll.register(polled_event, select.POLLIN)
    while True:
        poll.poll()
        os.eventfd_read(polled_event)
        answers.put(told("poll"))

def in_futex():
    named("in futex")
    while True:
        requests.get()
        answers.put(told("futex"))

def in_sigwait():
    named("in sigwait")
    area = ctypes.create_string_buffer(65536)
    libc.sigaltstack(struct.pack("QiQ", ctypes.addressof(area), 0, 65536), None)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        signal.sigwait({signal.SIGUSR2})
        answers.put(told("sigwait"))

threads = {f.__name__[3:]: threading.Thread(target=f, daemon=True) for f in (in_read, in_poll, in_futex, in_sigwait)}
for thread in threads.values():
    thread.start()

wake = {
    "read": lambda: os.eventfd_write(read_event, 1),
    "poll": lambda: os.eventfd_write(polled_event, 1),
    "futex": lambda: requests.put(1),
    # Which the C library does with what it knows of the thread.
    "sigwait": lambda: signal.pthread_kill(threads["sigwait"].ident, signal.SIGUSR2),
}

def woken(name):
    wake[name]()
    return answers.get(timeout=20)

def in_hash():
    state["hash"] = hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000).hex()

def hashing():
    threads["hash"] = threading.Thread(target=in_hash)
    threads["hash"].start()

def churning():
    def churn():
        while not state.get("still"):
            short = threading.Thread(target=int)
            short.start()
            short.join()
    state["still"] = False
    threads["churn"] = threading.Thread(target=churn, daemon=True)
    threads["churn"].start()

def capabilities(inheritable):
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    words[2] = inheritable
    assert libc.capset(header, struct.pack("6I", *words)) == 0

control = int(sys.argv[1])
conversation = socket.socket(fileno=os.dup(control))
os.close(conversation.detach())
while True:
    # By its number every time: in a fork there is another socket behind it.
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(control, 65536)
        if not got:
            os._exit(0)
        line += got
    try:
        answer = {"value": eval(json.loads(line))}
    except BaseException as error:
        answer = {"error": repr(error)}
    os.write(control, json.dumps(answer, default=repr).encode() + b"\n")
"""


class Victim:
    """The process, or a fork of it, as this one sees it."""

    def __init__(self, pid: int, number: int, conversation: socket.socket) -> None:
        self.pid = pid
        #: of its end of the conversation
        self.number = number
        self.patience = PATIENCE
        self._conversation = conversation
        self.start_time = read_start_time(pid)

    def ask(self, expression: str) -> object:
        """What an expression comes to in it."""
        self._conversation.settimeout(self.patience)
        self._conversation.sendall(json.dumps(expression).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            got = self._conversation.recv(65536)
            if not got:
                raise EOFError("it has ended")
            line += got
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{expression}: {answer['error']}")
        return answer["value"]

    def number_of(self, name: str) -> int:
        number = self.ask(name)
        assert isinstance(number, int)
        return number

    def woken(self, thread: str) -> dict[str, object]:
        """What one of its threads tells of itself when it is woken."""
        told = self.ask(f"woken({thread!r})")
        assert isinstance(told, dict)
        return told

    def status(self, name: str, tid: int | None = None) -> str:
        with open(f"/proc/{self.pid}/task/{tid or self.pid}/status") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(f"{name}:"))

    def threads(self) -> dict[int, str]:
        """Their names, by number."""
        found = {}
        for name in os.listdir(f"/proc/{self.pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{self.pid}/task/{name}/comm") as file:
                found[int(name)] = file.read().strip()
        return found

    def children(self) -> list[int]:
        found = []
        for tid in self.threads():
            with suppress(FileNotFoundError), open(f"/proc/{self.pid}/task/{tid}/children") as file:
                found += [int(pid) for pid in file.read().split()]
        return found

    def is_childless(self) -> bool:
        """Whether all its children are gone; those that have ended may take a moment to be buried."""
        return comes_true(lambda: not self.children())

    def is_held(self) -> bool:
        return any(self.status("TracerPid", tid) != "0" for tid in self.threads())

    @contextmanager
    def forked(
        self,
        *,
        replaced: Mapping[int, int] | None = None,
        identity: Confinement | None = None,
        words: Mapping[bytes, bytes] | None = None,
        settle: Callable[[int], None] = lambda _pid: None,
        start_time: int | None = None,
        common: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    ) -> Iterator[Victim]:
        """A fork of it for the block."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                pid = forking.fork(
                    self.pid,
                    start_time=start_time or self.start_time,
                    replaced={self.number: theirs.fileno(), **(replaced or {})},
                    identity=identity,
                    words=words or {},
                    settle=settle,
                    common=common or {},
                )
            end = os.pidfd_open(pid)
            try:
                yield Victim(pid, self.number, ours)
            finally:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(end, signal.SIGKILL)
                ended(end)
                os.close(end)


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether something is so within a time that is ample."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def ended(pidfd: int) -> bool:
    """Wait for a process to end; whether it did so in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


def started(number: int, *, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """The process, with its end of the conversation under the number that it has here."""
    argv = [*prefix, sys.executable, "-I", "-c", SCRIPT, str(number), NAME]
    return subprocess.Popen(
        argv, pass_fds=[number], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
    )


@contextmanager
def victim(*, allowed: bool = True, prefix: Sequence[str] = ()) -> Iterator[tuple[Victim, subprocess.Popen[bytes]]]:
    """The process for the block, once it answers; prepared for being forked if it is `allowed`."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = started(theirs.fileno(), prefix=prefix)
            number = theirs.fileno()
        try:
            found = Victim(process.pid, number, ours)
            found.ask("1")
            if allowed:
                forking.allow(process.pid)
            yield found, process
        finally:
            process.kill()
            process.wait()
