"""Forks that come to nothing: at every step nothing is left of them, and the parent has noticed nothing."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.harness.victims import Victim, ended, victim
from vmsandbox_hypervisor.api import Confinement
from vmsandbox_hypervisor.errors import ForkError
from vmsandbox_hypervisor.forking.fork import allow
from vmsandbox_hypervisor.forking.tracing import Thread, trap_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAUSE = 34
THREADS = ("read", "poll", "futex", "sigwait")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another identity")


@contextmanager
def unharmed(parent: Victim) -> Iterator[None]:
    """Nothing is left of what is tried in the block, here or there, and it can be tried again."""
    before = set(os.listdir("/proc/self/fd"))
    there = parent.ask("sorted(os.listdir('/proc/self/fd'))")
    yield
    assert set(os.listdir("/proc/self/fd")) == before
    assert parent.is_childless()
    assert not parent.is_held()
    assert parent.ask("sorted(os.listdir('/proc/self/fd'))") == there
    assert [parent.woken(name)["name"] for name in THREADS] == list(THREADS)
    with parent.forked() as fork:
        assert [fork.woken(name)["name"] for name in THREADS] == list(THREADS)


@pytest.fixture(scope="module")
def shared_parent() -> Iterator[Victim]:
    with victim() as (found, _):
        yield found


@pytest.fixture
def parent(shared_parent: Victim) -> Iterator[Victim]:
    with unharmed(shared_parent):
        yield shared_parent


def refused(parent: Victim, error: type[Exception], message: str | None = None, **options: object) -> None:
    with pytest.raises(error, match=message), parent.forked(**options):  # type: ignore[arg-type]
        pytest.fail("it was forked")


# ---------------------------------------------------------------- what is asked for


def test_another_process_of_the_same_number_is_not_forked(parent: Victim) -> None:
    refused(parent, ForkError, "another one by now", start_time=parent.start_time + 1)


def test_a_descriptor_that_the_parent_has_not_cannot_be_replaced(parent: Victim) -> None:
    # 3 would be the number under which it is received.
    free = next(n for n in range(3, 1000) if not os.path.lexists(f"/proc/{parent.pid}/fd/{n}"))
    refused(parent, ForkError, f"has no descriptor {free}", replaced={free: 0})


@pytest.mark.parametrize("words", [{b"guest=two,": b"guest=six,"}, {b"guest=one,": b"guest=three,"}])
def test_a_name_that_the_parent_has_not_cannot_be_replaced(parent: Victim, words: dict[bytes, bytes]) -> None:
    refused(parent, ForkError, "the parent is not called", words=words)


def test_a_fork_that_cannot_be_settled_is_none(parent: Victim) -> None:
    def settle(_pid: int) -> None:
        raise OSError("no such control group")

    refused(parent, OSError, "no such control group", settle=settle)


def test_a_parent_that_may_open_too_little_more_cannot_be_forked(parent: Victim) -> None:
    free = [n for n in range(1000) if not os.path.lexists(f"/proc/{parent.pid}/fd/{n}")]
    before = resource.prlimit(parent.pid, resource.RLIMIT_NOFILE)
    # Two are free: enough for the socket through which the others come, one of whose ends is closed.
    resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, (free[2], before[1]))
    try:
        refused(parent, ForkError, "cannot have more descriptors")
    finally:
        resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, before)


def test_a_parent_that_is_gone_cannot_be_forked() -> None:
    with victim() as (parent, process):
        process.kill()
        process.wait()
        refused(parent, OSError)


def test_a_parent_whose_first_thread_has_ended_cannot_be_forked() -> None:
    with victim() as (parent, _):
        # Nobody answers any more.
        with suppress(TimeoutError):
            parent.patience = 0.1
            parent.ask("libc.syscall(60, 0)")
        refused(parent, OSError)
        assert not parent.is_held()


# ---------------------------------------------------------------- who may


@root_only
def test_a_parent_without_privileges_cannot_give_another_identity() -> None:
    with victim(prefix=NOBODY) as (parent, _), unharmed(parent):
        refused(parent, PermissionError, identity=Confinement(uid=65533, gid=65533))


TRIED = """
import os, sys
from vmsandbox_hypervisor.forking import fork as forking
pid, start_time = int(sys.argv[1]), int(sys.argv[2])
for attempt in (
    lambda: forking.allow(pid),
    lambda: forking.fork(pid, start_time=start_time, replaced={}, identity=None, words={}, settle=print),
):
    try:
        attempt()
    except PermissionError:
        print("refused")
"""


@root_only
def test_who_may_not_is_refused(parent: Victim) -> None:
    argv = [*NOBODY, sys.executable, "-c", TRIED, str(parent.pid), str(parent.start_time)]
    assert subprocess.check_output(argv, text=True) == "refused\nrefused\n"


@root_only
def test_a_filter_of_system_calls_that_cannot_be_lifted_is_a_reason_not_to_fork() -> None:
    """It could kill the parent for what it is made to do."""
    with victim(prefix=NOBODY) as (parent, _), unharmed(parent):
        # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP: what is named in the first instruction is the end, fork that is.
        parent.ask("libc.prctl(38, 1, 0, 0, 0)")
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, 56), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
        parent.ask(f"kept.append(b''.join(struct.pack('HBBI', *one) for one in {code}))")
        parent.ask("kept.append(ctypes.create_string_buffer(kept[0]))")
        parent.ask("libc.prctl(22, 2, struct.pack('HxxxxxxQ', 4, ctypes.addressof(kept[1])), 0, 0)")
        assert parent.status("Seccomp") == "2"
        argv = [*NOBODY, sys.executable, "-c", TRIED, str(parent.pid), str(parent.start_time)]
        assert subprocess.check_output(argv, text=True) == "refused\nrefused\n"


def test_a_parent_that_somebody_else_holds_cannot_be_forked(parent: Victim) -> None:
    held = [Thread.held(tid, parent.pid, trap_of(parent.pid)) for tid in parent.threads()]
    try:
        refused(parent, PermissionError)
    finally:
        for thread in held:
            thread.let_go()


def test_a_process_that_holds_what_no_fork_may_share_is_not_allowed() -> None:
    with victim(allowed=False) as (parent, _):
        parent.ask("kept.append(mmap.mmap(-1, 4096))")
        with pytest.raises(ForkError, match="cannot be shared"):
            allow(parent.pid)
        assert not parent.is_held()
        assert parent.woken("futex")["name"] == "futex"


# ---------------------------------------------------------------- at every step


def counted(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[Thread], None]) -> list[int]:
    """Have something happen before one of the system calls that threads are made to make; the number of all of them."""
    made: list[int] = []
    original = Thread._enter

    def enter(thread: Thread, number: int, arguments: tuple[int, ...]) -> None:
        made.append(number)
        if len(made) == at:
            act(thread)
        original(thread, number, arguments)

    monkeypatch.setattr(Thread, "_enter", enter)
    return made


def steps(parent: Victim, *, fine: bool) -> list[int]:
    """At which of its system calls a fork is disturbed: at all of them, or at some of each kind."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = counted(monkeypatch, 0, lambda _thread: None)
        with parent.forked(words={b"guest=one,": b"guest=two,"}):
            pass
    if fine:
        return list(range(1, len(made) + 1))
    return sorted({made.index(kind) + 1 for kind in set(made)} | {len(made) - made[::-1].index(k) for k in set(made)})


def test_a_fork_that_fails_at_any_step_leaves_nothing(parent: Victim) -> None:
    def fail(_thread: Thread) -> None:
        raise OSError("no more")

    for step in steps(parent, fine=True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            counted(monkeypatch, step, fail)
            refused(parent, OSError, "no more")
        assert not parent.is_held()
        assert parent.is_childless()


def test_a_fork_that_is_killed_at_any_step_leaves_nothing(parent: Victim) -> None:
    def kill(thread: Thread) -> None:
        if thread.pid != parent.pid:
            os.kill(thread.pid, signal.SIGKILL)
            killed.append(thread.pid)

    for step in steps(parent, fine=True):
        killed: list[int] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            counted(monkeypatch, step, kill)
            with suppress(OSError), parent.forked():
                assert not killed
        assert not parent.is_held()
        assert parent.is_childless()


def test_a_parent_that_is_killed_at_any_step_takes_an_unfinished_fork_with_it() -> None:
    with victim() as (example, _):
        some = steps(example, fine=False)
    for step in some:
        with victim() as (parent, process):
            assert all(ends_killed_at(step, parent)), f"step {step}"
            assert process.wait(timeout=10) in (-signal.SIGKILL, 0)


def ends_killed_at(step: int, parent: Victim) -> list[bool]:
    """Whether the parent and what was made of it end when it is killed at that step."""
    pidfds = [os.pidfd_open(parent.pid)]

    def kill(_thread: Thread) -> None:
        os.kill(parent.pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as monkeypatch:
        counted(monkeypatch, step, kill)
        with suppress(OSError), parent.forked(settle=lambda pid: pidfds.append(os.pidfd_open(pid))) as fork:
            # It was whole already.
            assert fork.woken("futex")["name"] == "futex"
    found = [ended(pidfd) for pidfd in pidfds]
    for pidfd in pidfds:
        os.close(pidfd)
    return found


def test_a_thread_that_is_killed_while_it_is_let_go_is_no_failure() -> None:
    with victim() as (parent, process):
        thread = Thread.held(parent.pid, parent.pid, trap_of(parent.pid))
        process.kill()
        thread.let_go()
        # Its status is known to whom the kernel told it first.
        assert process.wait(timeout=10) in (-signal.SIGKILL, 0)


def test_a_first_thread_that_is_killed_in_a_call_is_not_waited_for_in_vain() -> None:
    """Of its end the kernel tells when the others are gone, and these are held."""
    with victim() as (parent, process), ExitStack() as stack:
        trap = trap_of(parent.pid)
        held = [Thread.held(tid, parent.pid, trap) for tid in parent.threads()]
        for thread in held:
            stack.callback(thread.let_go)
        killing = threading.Timer(0.1, process.kill)
        killing.start()
        with pytest.raises(ProcessLookupError):
            held[0].call(PAUSE)
        killing.join()


# ---------------------------------------------------------------- whoever forks, or starts, dies

FORKING = """
import os, sys, time
from vmsandbox_hypervisor.forking import fork as forking
def settle(pid):
    print(pid, flush=True)
    time.sleep(1000)
forking.fork(int(sys.argv[1]), start_time=int(sys.argv[2]), replaced={int(sys.argv[3]): int(sys.argv[4])},
             identity=None, words={}, settle=settle)
"""


def test_both_die_with_who_forks_them() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, victim() as (parent, process):
        numbers = (parent.pid, parent.start_time, parent.number, theirs.fileno())
        argv = [sys.executable, "-c", FORKING, *map(str, numbers)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]) as tracer:
            assert tracer.stdout is not None
            fork = os.pidfd_open(int(tracer.stdout.readline()))
            try:
                tracer.kill()
                assert ended(fork)
                assert process.wait(timeout=10) == -signal.SIGKILL
            finally:
                os.close(fork)


STARTING = """
import sys, time
from tests.harness.victims import Victim, started
from vmsandbox_hypervisor.forking.fork import allow, bind
import socket
process = started(int(sys.argv[1]))
sys.stdin.readline()
allow(process.pid)
bind(process.pid)
print(process.pid, flush=True)
time.sleep(1000)
"""


def test_the_parent_dies_with_who_started_it_and_its_forks_go_on() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            number = theirs.fileno()
            argv = [sys.executable, "-c", STARTING, str(number)]
            starter = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[number])
        with starter:
            assert starter.stdin is not None
            assert starter.stdout is not None
            ours.sendall(b'"1"\n')
            assert ours.recv(100) == b'{"value": 1}\n'
            starter.stdin.write(b"it answers\n")
            starter.stdin.flush()
            parent = Victim(int(starter.stdout.readline()), number, ours)
            pidfd = os.pidfd_open(parent.pid)
            with parent.forked() as fork:
                starter.kill()
                assert ended(pidfd)
                assert [fork.woken(name)["name"] for name in THREADS] == list(THREADS)
                assert fork.status("PPid") != str(parent.pid)
            os.close(pidfd)
