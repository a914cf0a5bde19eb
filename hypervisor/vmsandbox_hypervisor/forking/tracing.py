"""Threads of another process, held still: their registers, and system calls made in their name.

A thin layer over ptrace(2) of Linux on x86-64.  A thread that is held belongs to the thread of ours that took it, and
nobody but that one may use it.  Should this process die in between, the kernel kills what it holds: a process that was
changed halfway must not go on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_CONT, _GETREGS, _SETREGS, _DETACH = 7, 12, 13, 17
_GETEVENTMSG = 0x4201
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_RSEQ = 0x420F
_SINGLESTEP = 9
_TRACEFORK, _TRACECLONE, _EXITKILL, _SUSPEND_SECCOMP = 0x2, 0x8, 1 << 20, 1 << 21
_OPTIONS = _TRACEFORK | _TRACECLONE | _EXITKILL
_EVENT_FORK, _EVENT_CLONE, _EVENT_STOP = 1, 3, 128
_WALL = 0x40000000
_NT_X86_XSTATE = 0x202
#: larger than what any processor saves
_XSTATE_MAX = 16384
_WORD = 0xFFFF_FFFF_FFFF_FFFF
#: what the kernel answers, invisible to programs, for a call that is to be made again
_RESTARTS = frozenset({-512, -513, -514, -516})
#: what is no message to a thread, but its own doing
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
_SYSCALL = b"\x0f\x05"

SYS_CLONE, _TGKILL = 56, 234


def gate_of(pid: int) -> int:
    """Where a process has an instruction that is a system call: in what the kernel has mapped into each of them."""
    with open(f"/proc/{pid}/maps") as file:
        line = next((line for line in file if line.rstrip().endswith("[vdso]")), "")
    start, _, end = line.partition(" ")[0].partition("-")
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        code = os.pread(memory.fileno(), int(end or "0", 16) - int(start or "0", 16), int(start or "0", 16))
    offset = code.find(_SYSCALL)
    if offset < 0:
        raise OSError(errno.ENOEXEC, f"process {pid} has no gate to the kernel")
    return int(start, 16) + offset


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
    """A thread that is held still.  Obtain one from `held`, `forked` or `cloned`; `let_go` ends that."""

    def __init__(self, tid: int, pid: int, gate: int) -> None:
        self.tid = tid
        self.pid = pid
        self._gate = gate
        #: signals that came meanwhile, and are for later
        self._signals: list[int] = []
        self._regs = Registers()

    @classmethod
    def held(cls, tid: int, pid: int, gate: int) -> Thread:
        """Hold a thread of process `pid`, whose `gate` is that; `OSError` if that is not allowed, or it has ended."""
        thread = cls(tid, pid, gate)
        # Without its filter of system calls, if we may lift that; if not, calls that it refuses will fail.
        try:
            _ptrace(_SEIZE, tid, 0, _OPTIONS | _SUSPEND_SECCOMP)
        except PermissionError:
            _ptrace(_SEIZE, tid, 0, _OPTIONS)
        try:
            _ptrace(_INTERRUPT, tid, 0, 0)
            while thread._stopped() != _EVENT_STOP:
                _ptrace(_CONT, tid, 0, 0)
            thread._look()
        except BaseException:
            thread.let_go()
            raise
        return thread

    def _stopped(self) -> int:
        """Wait until it stands; answers at which event, 0 for a trap, -1 for another signal."""
        _, status = os.waitpid(self.tid, _WALL)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, f"thread {self.tid} has ended")
        event, number = status >> 16, os.WSTOPSIG(status)
        if event or number == signal.SIGTRAP:
            return event
        if number in _FAULTS:
            raise OSError(errno.EFAULT, f"thread {self.tid} has failed with {signal.Signals(number).name}")
        self._signals.append(number)
        return -1

    def _look(self) -> None:
        """Learn where it stands.  A call that it waits in will be made again."""
        regs = self._regs
        _ptrace(_GETREGS, self.tid, 0, ctypes.addressof(regs))
        if _signed(regs.orig_rax) >= 0 and _signed(regs.rax) in _RESTARTS:
            regs.rax = regs.orig_rax
            regs.rip -= len(_SYSCALL)
        regs.orig_rax = _WORD

    @property
    def registers(self) -> Registers:
        """Those it will go on with."""
        return self._regs

    @property
    def below_stack(self) -> int:
        """Memory of its stack that it does not use."""
        return int(self._regs.rsp) - 1024 & ~15

    def call(self, number: int, *arguments: int) -> int:
        """Have it make a system call; its result, or `OSError`."""
        self._enter(number, arguments)
        self._leave()
        result = _signed(self._now().rax)
        if -4096 < result < 0:
            raise OSError(-result, f"system call {number}: {os.strerror(-result)}")
        return result

    def _enter(self, number: int, arguments: tuple[int, ...]) -> None:
        regs = self._regs.copy()
        regs.rip = self._gate
        regs.rax, regs.orig_rax = number, _WORD
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(regs, name, value & _WORD)
        _ptrace(_SETREGS, self.tid, 0, ctypes.addressof(regs))

    def _leave(self) -> int:
        """Let it take the one step that is a system call; answers at which event it stands within it, 0 behind it.

        It may stand before the step as well, because a signal has come, which it gets later.
        """
        while True:
            _ptrace(_SINGLESTEP, self.tid, 0, 0)
            event = self._stopped()
            if event in (_EVENT_FORK, _EVENT_CLONE):
                return event
            if event == 0 and self._now().rip != self._gate:
                return 0

    def _now(self) -> Registers:
        regs = Registers()
        _ptrace(_GETREGS, self.tid, 0, ctypes.addressof(regs))
        return regs

    def born(self, flags: int, *arguments: int) -> Thread:
        """Have it make a child or another thread by clone(2), which is held from its beginning."""
        self._enter(SYS_CLONE, (flags, *arguments))
        event = self._leave()
        if not event:
            result = _signed(self._now().rax)
            raise OSError(-result, f"clone: {os.strerror(-result)}")
        number = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, self.tid, 0, ctypes.addressof(number))
        child = Thread(number.value, number.value if event == _EVENT_FORK else self.pid, self._gate)
        child._stopped()
        self._leave()
        child._regs = self._regs.copy()
        return child

    def become(self, other: Thread) -> None:
        """Take on what another thread is: registers, floating point, blocked signals."""
        self._regs = other._regs.copy()
        buffer = ctypes.create_string_buffer(_XSTATE_MAX)
        vector = _Vector(ctypes.addressof(buffer), len(buffer))
        _ptrace(_GETREGSET, other.tid, _NT_X86_XSTATE, ctypes.addressof(vector))
        _ptrace(_SETREGSET, self.tid, _NT_X86_XSTATE, ctypes.addressof(vector))
        mask = ctypes.c_ulonglong()
        _ptrace(_GETSIGMASK, other.tid, ctypes.sizeof(mask), ctypes.addressof(mask))
        _ptrace(_SETSIGMASK, self.tid, ctypes.sizeof(mask), ctypes.addressof(mask))

    def restartable_sequence(self) -> tuple[int, int, int] | None:
        """Address, length and signature of what rseq(2) was told; None where nothing was."""
        buffer = ctypes.create_string_buffer(24)
        try:
            _ptrace(_GET_RSEQ, self.tid, len(buffer), ctypes.addressof(buffer))
        except OSError:
            return None
        address, length, signature, _flags, _ = struct.unpack("QIIII", buffer.raw)
        return (address, length, signature) if address else None

    def read(self, address: int, length: int) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), length, address)

    def write(self, address: int, content: bytes) -> None:
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), content, address)

    def let_go(self) -> None:
        """Let it go on from where it stood, or where `become` has put it; safe if it has ended."""
        with suppress(OSError):
            if self._regs.rip:
                _ptrace(_SETREGS, self.tid, 0, ctypes.addressof(self._regs))
            for number in self._signals:
                _libc.syscall(_TGKILL, self.pid, self.tid, number)
            _ptrace(_DETACH, self.tid, 0, 0)

    def kill(self) -> None:
        """End its process; returns when that is gone as far as we hold it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(self.tid, _WALL)


def _ptrace(request: int, tid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x} of {tid}: {os.strerror(number)}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
