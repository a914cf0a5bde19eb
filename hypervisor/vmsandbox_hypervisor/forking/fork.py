"""A second process out of a running one: its memory, its threads, and descriptors of its own.

`fork(2)` copies one thread.  Here a process that knows nothing of it is held still by ptrace and made to fork; in the
child the other threads are made again, on the stacks they had, to go on from where they stood.  So a QEMU that has
loaded everything, and has translated its guest's code, becomes many, which share what none of them changes.

What the two must not share is replaced: the descriptors that the caller names, all eventfds, and memory that is mapped
shared.  The child gets the identity that the caller wants before it has a second thread.  It is killed, and the parent
too, if we die in the middle.

What does not come along: timers (timer_create(2) and the like), pending signals, and where each thread may run; all are
where the parent's first thread is.  Its C library has to be GNU's, which knows a thread by what the kernel writes where
set_tid_address(2) has said.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import signal
import socket
import struct
import types
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox_hypervisor import sparse
from vmsandbox_hypervisor.children import read_start_time
from vmsandbox_hypervisor.errors import ForkError
from vmsandbox_hypervisor.forking import holdings
from vmsandbox_hypervisor.forking.descriptors import descriptor_of
from vmsandbox_hypervisor.forking.tracing import Thread, end, is_alive, threads_of, trap_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from vmsandbox_hypervisor.api import Confinement

_CLOSE, _MMAP, _MUNMAP, _RT_SIGACTION, _MADVISE, _RECVMSG, _SOCKETPAIR = 3, 9, 11, 13, 28, 47, 53
_SETSID, _SETGROUPS, _SETRESUID, _SETRESGID, _CAPSET, _SIGALTSTACK = 112, 116, 117, 119, 126, 131
_FCNTL, _PRCTL, _SET_TID_ADDRESS = 72, 157, 218
_SET_ROBUST_LIST, _GET_ROBUST_LIST, _DUP3, _RSEQ = 273, 274, 292, 334
_CLONE_THREAD = 0x00000100 | 0x00000200 | 0x00000400 | 0x00000800 | 0x00010000 | 0x00040000 | 0x00080000
_MADV_DOFORK = 11
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_DROP, _PR_GET_TID_ADDRESS = 1, 4, 15, 24, 40
#: what SCM_RIGHTS takes at most
_AT_ONCE = 250
_SCRATCH = 64 * 1024

#: in /proc/PID/stat, counted from the state
_ARG_START, _ARG_END = 45, 46
_MAP_FIXED = 0x10
_CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True)
class _Kept:
    """What a thread has that its registers do not tell."""

    thread: Thread
    name: bytes
    tid_address: int
    robust: tuple[int, int]
    rseq: tuple[int, int, int] | None
    #: `stack_t` of where its signal handlers run
    signal_stack: bytes


def allow(pid: int) -> None:
    """Prepare a child of this process for being forked: its memory comes along.

    QEMU asks the kernel to leave the guest's memory out of forks, of which it knows helpers only.
    """
    main = Thread.held(pid, pid, trap_of(pid))
    try:
        for range_ in list(holdings.mappings(pid)):  # before any of them changes
            if range_.left_out and not range_.shared_inode:
                main.call(_MADVISE, range_.start, range_.length, _MADV_DOFORK)
        # The kernel buries its children at once: it would never do so itself.
        action = struct.pack("QQQQ", 1, 0, 0, 0)
        scratch = main.below_stack(len(action))
        main.write(scratch, action)
        main.call(_RT_SIGACTION, signal.SIGCHLD, scratch, 0, 8)
    finally:
        main.let_go()


def bind(pid: int) -> None:
    """Have a child of this thread, be it born as one or adopted, be killed when that ends."""
    main = Thread.held(pid, pid, trap_of(pid))
    try:
        main.call(_PRCTL, _PR_SET_PDEATHSIG, signal.SIGKILL)
    finally:
        main.let_go()


def fork(
    pid: int,
    *,
    start_time: int,
    replaced: Mapping[int, int],
    identity: Confinement | None,
    words: Mapping[bytes, bytes],
    settle: Callable[[int], None],
    common: Mapping[int, Sequence[tuple[int, int]]] = types.MappingProxyType({}),
) -> int:
    """Fork a process that `allow` was called for; the pid of the child, which runs.

    `replaced` maps numbers of descriptors there to our descriptors, `words` parts of the command line to others of the
    same length.  `settle` is called with the child's pid while it has one thread and does nothing.  Of a memfd that is
    mapped shared the child has its own, but for the pieces that both have in `common`, by its number: these are the
    parent's until the child writes to them.  Raises `ForkError` or `OSError` when that cannot be done; then there is no
    child.  Synchronous, and to be called from one thread.
    """
    with ExitStack() as stack:
        threads = _held(pid, stack)
        # Now that it is held the number cannot become another one's.
        if read_start_time(pid) != start_time:
            raise ForkError(f"process {pid} is another one by now")
        given = dict(replaced)
        mapped = _memories(pid, given, stack)
        given.update(_counters(pid, given, stack))
        kept = [_noted(thread) for thread in threads]
        child = threads[0].born(signal.SIGCHLD)
        try:
            settle(child.pid)
            _renew(child, given, mapped, common)
            if identity is not None:
                _identify(child, identity)
            others = [_again(child, one) for one in kept[1:]]
            _complete(child, kept[0])
            _rename(child, words)
        except BaseException:
            end(child.pid)
            raise
        for thread in (*others, child):
            thread.let_go()
        return child.pid


def _held(pid: int, stack: ExitStack) -> list[Thread]:
    """All threads of a process, its first one first, until the stack is closed."""
    trap = trap_of(pid)
    held: dict[int, Thread] = {}
    while new := [tid for tid in threads_of(pid) if tid not in held]:
        for tid in new:
            try:
                held[tid] = Thread.held(tid, pid, trap)
            except OSError:
                # One that ends may be gone, or going.  The process ends with its first one.
                if tid == pid or is_alive(pid, tid):
                    raise
                continue
            stack.callback(held[tid].let_go)
    return [held.pop(pid), *held.values()]


def _counters(pid: int, replaced: Collection[int], stack: ExitStack) -> dict[int, int]:
    """New eventfds for those of a process, by their number there."""
    found = {}
    for number, counter in holdings.counters(pid, replaced).items():
        found[number] = counter.again()
        stack.callback(os.close, found[number])
    return found


def _memories(pid: int, given: dict[int, int], stack: ExitStack) -> list[tuple[holdings.Range, int]]:
    """The ranges that are mapped shared, each with the number of the descriptor it is to be mapped from.

    What is not among the `given` descriptors gets a copy of its own there.
    """
    found = []
    for range_ in [range_ for range_ in holdings.mappings(pid) if range_.shared_inode]:
        numbers = holdings.descriptors_of(pid, range_.shared_inode)
        if not numbers:
            raise ForkError(f"process {pid} has mapped memory that it has no descriptor of")
        own = next((given[number] for number in numbers if number in given), None)
        if own is None:
            own = _alike(pid, numbers[0])
            stack.callback(os.close, own)
        given.update(dict.fromkeys(numbers, own))
        found.append((range_, numbers[0]))
    return found


def _alike(pid: int, number: int) -> int:
    """A memfd that holds what one of a process does."""
    made = os.memfd_create("forked memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        source = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            sparse.copy(source, made)
        finally:
            os.close(source)
    except BaseException:
        os.close(made)
        raise
    return made


def _noted(thread: Thread) -> _Kept:
    scratch = thread.below_stack(24)
    thread.call(_PRCTL, _PR_GET_TID_ADDRESS, scratch)
    (tid_address,) = struct.unpack("Q", thread.read(scratch, 8))
    thread.call(_GET_ROBUST_LIST, 0, scratch, scratch + 8)
    robust = struct.unpack("QQ", thread.read(scratch, 16))
    thread.call(_SIGALTSTACK, 0, scratch)
    signal_stack = thread.read(scratch, 24)
    with open(f"/proc/{thread.pid}/task/{thread.tid}/comm", "rb") as file:
        name = file.read()[:-1]
    return _Kept(thread, name, tid_address, robust, thread.restartable_sequence(), signal_stack)


def _renew(
    child: Thread,
    given: Mapping[int, int],
    mapped: Iterable[tuple[holdings.Range, int]],
    common: Mapping[int, Sequence[tuple[int, int]]],
) -> None:
    """Give the child descriptors and memory of its own."""
    child.call(_SETSID)
    old = {number: child.call(_FCNTL, number, fcntl.F_DUPFD_CLOEXEC, 0) for number in common}
    inodes = {os.stat(f"/proc/{child.pid}/fd/{number}").st_ino: number for number in common}
    place = child.call(_MMAP, 0, _SCRATCH, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ours, near, theirs = _connected(child, place)
    with ours:
        child.call(_CLOSE, near)
        todo = sorted(given.items())
        for begin in range(0, len(todo), _AT_ONCE):
            part = todo[begin : begin + _AT_ONCE]
            socket.send_fds(ours, [b"."], [fd for _, fd in part])
            for (number, _), received in zip(part, _received(child, theirs, place), strict=True):
                child.call(_DUP3, received, number, os.O_CLOEXEC)
                child.call(_CLOSE, received)
    child.call(_CLOSE, theirs)
    child.call(_MUNMAP, place, _SCRATCH)
    for range_, number in mapped:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        child.call(_MMAP, range_.start, range_.length, range_.rights, flags, number, range_.offset)
        source = inodes.get(range_.shared_inode, -1)
        for first, last in common.get(source, ()):
            begin, stop = max(first, range_.offset), min(last, range_.offset + range_.length)
            if begin < stop:
                target, flags = range_.start + begin - range_.offset, mmap.MAP_PRIVATE | _MAP_FIXED
                child.call(_MMAP, target, stop - begin, range_.rights, flags, old[source], begin)
    for number in old.values():
        child.call(_CLOSE, number)


def _connected(child: Thread, place: int) -> tuple[socket.socket, int, int]:
    """A socket that is here too, and the numbers of both ends in the child."""
    child.call(_SOCKETPAIR, socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0, place)
    near, far = struct.unpack("ii", child.read(place, 8))
    return socket.socket(fileno=descriptor_of(child.pid, near)), near, far


def _received(child: Thread, number: int, place: int) -> array.array[int]:
    """The numbers of the descriptors that are waiting for the child in its socket."""
    # struct msghdr, one vector of one byte, and room for the control message.
    vector, byte, control, room = place + 64, place + 96, place + 128, _SCRATCH - 128
    child.write(vector, struct.pack("QQ", byte, 1))
    child.write(place, struct.pack("QIxxxxQQQQi", 0, 0, vector, 1, control, room, 0))
    child.call(_RECVMSG, number, place, socket.MSG_CMSG_CLOEXEC)
    (flags,) = struct.unpack("i", child.read(place + 48, 4))
    if flags & socket.MSG_CTRUNC:
        raise ForkError(f"process {child.pid} cannot have more descriptors")
    (length,) = struct.unpack("Q", child.read(control, 8))
    numbers = array.array("i")
    numbers.frombytes(child.read(control + 16, length - 16))
    return numbers


def _identify(child: Thread, identity: Confinement) -> None:
    """Put the child, which has one thread, under its own identity, without any privilege."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        child.call(_PRCTL, _PR_CAPBSET_DROP, capability)
    groups = struct.pack(f"{len(identity.groups)}I", *identity.groups)
    place = child.below_stack(len(groups))
    child.write(place, groups)
    child.call(_SETGROUPS, len(identity.groups), place)
    child.call(_SETRESGID, identity.gid, identity.gid, identity.gid)
    child.call(_SETRESUID, identity.uid, identity.uid, identity.uid)
    # Those that it could inherit are left, and all of them to root.
    place = child.below_stack(32)
    child.write(place, struct.pack("Ii6I", _CAPABILITY_VERSION_3, 0, *6 * [0]))
    child.call(_CAPSET, place, place + 8)
    # As it would be after execve: else it could not open its own /proc.
    child.call(_PRCTL, _PR_SET_DUMPABLE, 1)


def _again(child: Thread, kept: _Kept) -> Thread:
    """Another thread of the child, as the parent had it."""
    regs = kept.thread.registers
    thread = child.born(_CLONE_THREAD, regs.rsp, kept.tid_address, kept.tid_address, regs.fs_base)
    thread.become(kept.thread)
    place = thread.below_stack(len(kept.signal_stack))
    thread.write(place, kept.signal_stack)
    thread.call(_SIGALTSTACK, place, 0)
    _complete(thread, kept)
    return thread


def _complete(thread: Thread, kept: _Kept) -> None:
    """Tell the kernel of a new thread what the old one had told it; and the C library which thread it is."""
    if kept.tid_address:
        thread.write(kept.tid_address, struct.pack("I", thread.tid))
    thread.call(_SET_TID_ADDRESS, kept.tid_address)
    thread.call(_SET_ROBUST_LIST, *kept.robust)
    if kept.rseq is not None and thread.restartable_sequence() is None:
        address, length, signature = kept.rseq
        thread.call(_RSEQ, address, length, 0, signature)
    place = thread.below_stack(len(kept.name) + 1)
    thread.write(place, kept.name + b"\0")
    thread.call(_PRCTL, _PR_SET_NAME, place)


def _rename(child: Thread, words: Mapping[bytes, bytes]) -> None:
    """Change what `ps` shows of the child."""
    with open(f"/proc/{child.pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    line = child.read(start, end - start)
    for old, new in words.items():
        if len(old) != len(new) or old not in line:
            raise ForkError(f"the parent is not called '{old.decode(errors='replace')}'")
        line = line.replace(old, new)
    child.write(start, line)
