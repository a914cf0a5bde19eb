"""Threads of another process, held still: their registers, and system calls made in their name.

A thin layer over ptrace(2) of Linux on x86-64.  A thread that is held belongs to the thread of ours that took it, and
nobody but that one may use it.  Should this process die in between, the kernel kills what it holds: a process that was
changed halfway must not go on.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import signal
import struct
import time
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_CONT, _SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 7, 9, 12, 13, 17
_SETOPTIONS, _GETEVENTMSG = 0x4200, 0x4201
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_RSEQ = 0x420F
_TRACEFORK, _TRACECLONE, _EXITKILL, _SUSPEND_SECCOMP = 0x2, 0x8, 1 << 20, 1 << 21
_EVENT_FORK, _EVENT_CLONE, _EVENT_STOP = 1, 3, 128
_WALL = 0x40000000
_NT_X86_XSTATE = 0x202
#: larger than what any processor saves
_XSTATE_MAX = 16384
_WORD = 0xFFFF_FFFF_FFFF_FFFF
#: what the kernel answers, invisible to programs, for a call that is to be made again
_RESTARTS = frozenset({-512, -513, -514, -516})
_SYSCALL = b"\x0f\x05"
_CLONE = 56
#: all signals but the one that tells of a step: the kernel would forget the handler of that
_BLOCKED = _WORD & ~(1 << signal.SIGTRAP - 1)
#: how often to look at once whether a thread stands, which takes it some microseconds, and then at what interval
_YIELDS, _INTERVAL = 200, 0.0001
#: what functions may use below their stack
_RED_ZONE = 128


class Registers(ctypes.Structure):
    """`struct user_regs_struct`."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class Thread:
    """A thread that is held still.  Obtain one from `held` or `born`; `let_go` ends that.

    It is stopped between two instructions, with all signals blocked: whatever comes meanwhile waits until it goes on.
    """

    def __init__(self, tid: int, pid: int, trap: int) -> None:
        self.tid = tid
        self.pid = pid
        #: where there is an instruction that makes a system call
        self._trap = trap
        self._regs = Registers()
        self._mask = 0
        self._gone = False

    @classmethod
    def held(cls, tid: int, pid: int, trap: int) -> Thread:
        """Hold a thread of process `pid`; `OSError` if that is not allowed, or it has ended.

        `trap` is what `trap_of` found in the process.
        """
        thread = cls(tid, pid, trap)
        options = thread._seize()
        try:
            _ptrace(_INTERRUPT, tid, 0, 0)
            signal_, event = thread._stopped()
            while event != _EVENT_STOP:
                # A signal was about to be delivered: it is, as if nobody were here.
                _ptrace(_CONT, tid, 0, signal_)
                _ptrace(_INTERRUPT, tid, 0, 0)
                signal_, event = thread._stopped()
            # Not from the beginning: until it stands it may make threads, which would be held without our knowing.
            _ptrace(_SETOPTIONS, tid, 0, options | _TRACEFORK | _TRACECLONE)
            thread._look()
        except BaseException:
            thread.let_go()
            raise
        return thread

    def _seize(self) -> int:
        """Become its tracer, and have its filter of system calls lifted; the options it is held with."""
        options = _EXITKILL | _SUSPEND_SECCOMP
        try:
            _ptrace(_SEIZE, self.tid, 0, options)
        except OSError as error:
            # It is not for everybody, nor does every kernel know it.  Filters kill: nothing is tried with one in place.
            if error.errno not in (errno.EPERM, errno.EINVAL) or _is_filtered(self.tid):
                raise
            options = _EXITKILL
            _ptrace(_SEIZE, self.tid, 0, options)
        return options

    def _stopped(self) -> tuple[int, int]:
        """Wait until it stands; the signal and the event that it stands for.  `ProcessLookupError` if it has ended."""
        status = self._waited()
        if not os.WIFSTOPPED(status):
            self._gone = True
            raise ProcessLookupError(errno.ESRCH, f"thread {self.tid} has ended")
        return os.WSTOPSIG(status), status >> 16

    def _waited(self) -> int:
        if self.tid != self.pid:
            return os.waitpid(self.tid, _WALL)[1]
        # That a process' first thread has ended is told when all others are gone: in vain one would wait holding them.
        for attempt in itertools.count():
            tid, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
            if tid:
                return status
            if attempt < _YIELDS:
                os.sched_yield()
            elif is_alive(self.pid, self.tid):
                time.sleep(_INTERVAL)
            else:
                break
        raise ProcessLookupError(errno.ESRCH, f"thread {self.tid} has ended")

    def _look(self) -> None:
        """Learn where it stands.  A call that it waits in will be made again."""
        mask = ctypes.c_ulonglong()
        _ptrace(_GETSIGMASK, self.tid, ctypes.sizeof(mask), ctypes.addressof(mask))
        regs = Registers()
        _ptrace(_GETREGS, self.tid, 0, ctypes.addressof(regs))
        if _signed(regs.orig_rax) >= 0 and _signed(regs.rax) in _RESTARTS:
            regs.rax = regs.orig_rax
            regs.rip -= len(_SYSCALL)
        regs.orig_rax = _WORD
        self._mask, self._regs = mask.value, regs
        self._block(_BLOCKED)

    def _block(self, mask: int) -> None:
        word = ctypes.c_ulonglong(mask)
        _ptrace(_SETSIGMASK, self.tid, ctypes.sizeof(word), ctypes.addressof(word))

    @property
    def registers(self) -> Registers:
        """Those it will go on with."""
        return self._regs

    def below_stack(self, length: int) -> int:
        """So much memory below its stack, which it does not use."""
        return int(self._regs.rsp) - _RED_ZONE - length & ~15

    def call(self, number: int, *arguments: int) -> int:
        """Have it make a system call; its result, or `OSError`."""
        self._enter(number, arguments)
        self._stepped()
        return self._result(number)

    def _enter(self, number: int, arguments: tuple[int, ...]) -> None:
        regs = self._regs.copy()
        regs.rip = self._trap
        regs.rax, regs.orig_rax = number, _WORD
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(regs, name, value & _WORD)
        _ptrace(_SETREGS, self.tid, 0, ctypes.addressof(regs))

    def _stepped(self) -> int:
        """Have it go one instruction further; the event that this was, 0 for none."""
        number = 0
        while True:
            _ptrace(_SINGLESTEP, self.tid, 0, number)
            number, event = self._stopped()
            if event in (_EVENT_FORK, _EVENT_CLONE) or (event == 0 and number == signal.SIGTRAP):
                return event
            if event == 0 and number != signal.SIGSTOP:
                raise OSError(errno.EFAULT, f"thread {self.tid} got signal {number}")
            # Somebody stops or continues the process, which takes effect when it is let go.
            if event:
                number = 0

    def _result(self, number: int) -> int:
        regs = Registers()
        _ptrace(_GETREGS, self.tid, 0, ctypes.addressof(regs))
        result = _signed(regs.rax)
        if -4096 < result < 0:
            raise OSError(-result, f"system call {number}: {os.strerror(-result)}")
        return result

    def born(self, flags: int, *arguments: int) -> Thread:
        """Have it make a child or another thread by clone(2), which is held from its beginning."""
        self._enter(_CLONE, (flags, *arguments))
        event = self._stepped()
        if event == 0:
            raise OSError(errno.ECHILD, f"no child: {self._result(_CLONE)}")
        number = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, self.tid, 0, ctypes.addressof(number))
        child = Thread(number.value, number.value if event == _EVENT_FORK else self.pid, self._trap)
        try:
            child._stopped()
            self._stepped()
        except BaseException:
            if event == _EVENT_FORK:
                end(child.pid)
            raise
        child._regs, child._mask = self._regs.copy(), self._mask
        return child

    def become(self, other: Thread) -> None:
        """Take on what another thread is: registers, floating point, blocked signals."""
        self._regs, self._mask = other._regs.copy(), other._mask
        buffer = ctypes.create_string_buffer(_XSTATE_MAX)
        vector = _Vector(ctypes.addressof(buffer), len(buffer))
        _ptrace(_GETREGSET, other.tid, _NT_X86_XSTATE, ctypes.addressof(vector))
        _ptrace(_SETREGSET, self.tid, _NT_X86_XSTATE, ctypes.addressof(vector))

    def restartable_sequence(self) -> tuple[int, int, int] | None:
        """Address, length and signature of what rseq(2) was told; None where nothing was, or the kernel cannot say."""
        buffer = ctypes.create_string_buffer(24)
        try:
            _ptrace(_GET_RSEQ, self.tid, len(buffer), ctypes.addressof(buffer))
        except OSError:
            return None
        address, length, signature, _flags, _ = struct.unpack("QIIII", buffer.raw)
        return (address, length, signature) if address else None

    def read(self, address: int, length: int) -> bytes:
        return read_memory(self.pid, address, length)

    def write(self, address: int, content: bytes) -> None:
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            if os.pwrite(memory.fileno(), content, address) != len(content):
                raise OSError(errno.EFAULT, f"process {self.pid} has not so much memory at {address:#x}")

    def let_go(self) -> None:
        """Let it go on from where it stood, or where `become` has put it; safe if it has ended.

        Of a process' threads the first one is to be let go last.
        """
        try:
            self._leave()
        except OSError:
            # It has been killed, most likely, which others are told when we know of it; or it is on its way to a stop.
            with suppress(OSError):
                if not self._gone and os.WIFSTOPPED(os.waitpid(self.tid, _WALL)[1]):
                    self._leave()
        self._gone = True

    def _leave(self) -> None:
        if self._regs.rip:
            _ptrace(_SETREGS, self.tid, 0, ctypes.addressof(self._regs))
            self._block(self._mask)
        _ptrace(_DETACH, self.tid, 0, 0)


def end(pid: int) -> None:
    """Kill a process all of whose threads are held; returns when it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(FileNotFoundError):
        # The kernel tells of the first one's end when all others are gone.
        for tid in sorted(threads_of(pid), key=lambda tid: tid == pid):
            _bury(tid)


def _bury(tid: int) -> None:
    with suppress(ChildProcessError):
        while True:
            with suppress(ProcessLookupError):
                _ptrace(_CONT, tid, 0, 0)
            if not os.WIFSTOPPED(os.waitpid(tid, _WALL)[1]):
                return


def threads_of(pid: int) -> list[int]:
    """The threads that a process has at this moment, its first one first."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def is_alive(pid: int, tid: int) -> bool:
    """Whether a thread has not ended."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"X", b"Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


def trap_of(pid: int) -> int:
    """Where a process has an instruction that makes a system call: in the code that the kernel lends it, as a rule."""
    with open(f"/proc/{pid}/maps") as file:
        code = [line for line in file if line.split()[1].startswith("r-x") and "[vsyscall]" not in line]
    for line in sorted(code, key=lambda line: "[vdso]" not in line):
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        # What the kernel shows is not always there.
        with suppress(OSError):
            at = read_memory(pid, start, end - start).find(_SYSCALL)
            if at >= 0:
                return start + at
    raise OSError(errno.ENOEXEC, f"process {pid} has no code that makes system calls")


def read_memory(pid: int, address: int, length: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        content = os.pread(memory.fileno(), length, address)
    if len(content) != length:
        raise OSError(errno.EFAULT, f"process {pid} has not so much memory at {address:#x}")
    return content


def _is_filtered(tid: int) -> bool:
    with open(f"/proc/{tid}/status") as file:
        return any(line.startswith("Seccomp:") and line.split()[1] != "0" for line in file)


def _ptrace(request: int, tid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x} of {tid}: {os.strerror(number)}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
