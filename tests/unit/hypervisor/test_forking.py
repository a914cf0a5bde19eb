"""Forks of running processes: what they are, what they share, and what the parent notices."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.victims import comes_true, ended, victim
from vmsandbox_hypervisor.api import Confinement, Parent
from vmsandbox_hypervisor.children import Child, _told_status, adopt_orphans
from vmsandbox_hypervisor.errors import ForkError
from vmsandbox_hypervisor.forking.fork import bind
from vmsandbox_hypervisor.forking.tracing import Thread, is_alive, trap_of
from vmsandbox_hypervisor.qemu.forked import alone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.victims import Victim

pytestmark = pytest.mark.deadline(60)

THREADS = ("read", "poll", "futex", "sigwait")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another identity")


@pytest.fixture(scope="module")
def shared_parent() -> Iterator[Victim]:
    with victim() as (found, _):
        yield found


@pytest.fixture
def parent(shared_parent: Victim) -> Iterator[Victim]:
    """A process that can be forked; whatever a test did with it, it goes on afterwards, and nobody holds it."""
    before = set(os.listdir("/proc/self/fd"))
    yield shared_parent
    assert not shared_parent.is_held()
    assert shared_parent.is_childless()
    assert [shared_parent.woken(name)["name"] for name in THREADS] == list(THREADS)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def own() -> Iterator[Victim]:
    """One for a test that changes what it holds."""
    with victim() as (found, _):
        yield found


# ---------------------------------------------------------------- threads


def test_every_thread_goes_on_in_the_fork_as_in_the_parent(parent: Victim) -> None:
    with parent.forked() as fork:
        assert sorted(fork.threads().values()) == sorted(parent.threads().values())
        assert not set(fork.threads()) & set(parent.threads())
        for name in THREADS:
            here, there = fork.woken(name), parent.woken(name)
            assert here.pop("tid") in fork.threads()
            assert there.pop("tid") in parent.threads()
            # Name, blocked signals, stack of signal handlers, list of locks, where the kernel clears the number.
            assert here == there
            assert here["number_at"]
        assert fork.woken("sigwait")["stack"] is not None


def test_the_c_library_knows_each_thread_by_its_number(parent: Victim) -> None:
    with parent.forked() as fork:
        # What it knows of a thread begins with pointers to itself, and has the number at 0x2d0.
        known = "struct.unpack('I', ctypes.string_at(thread.ident + 0x2d0, 4))[0]"
        told = fork.ask(f"{{name: {known} for name, thread in threads.items()}}")
        assert told == {name: fork.woken(name)["tid"] for name in THREADS}
        # A thread that ends clears its number, for which another one waits in join.
        assert fork.ask("[hashing(), threads['hash'].join(), len(state['hash'])][-1]") == 64
        assert fork.ask("threading.get_native_id()") == fork.pid


def test_a_thread_that_computes_comes_to_the_same_result_in_both(parent: Victim) -> None:
    expected = parent.ask("hashlib.pbkdf2_hmac('sha256', b'x', b'y', 400_000).hex()")
    parent.ask("hashing()")
    with parent.forked() as fork:
        assert "hash" not in parent.ask("list(state)")  # type: ignore[operator]
        for process in (fork, parent):
            assert process.ask("[threads['hash'].join(), state.pop('hash')][-1]") == expected


def test_the_kernel_is_told_of_restartable_sequences(parent: Victim) -> None:
    with parent.forked() as fork:
        registered = []
        for process in (parent, fork):
            found = {}
            for tid, name in process.threads().items():
                thread = Thread.held(tid, process.pid, trap_of(process.pid))
                try:
                    found[name] = thread.restartable_sequence()
                finally:
                    thread.let_go()
            registered.append(found)
        assert registered[0] == registered[1]


def test_threads_may_come_and_go_meanwhile(parent: Victim) -> None:
    parent.ask("churning()")
    try:
        for _ in range(15):
            with parent.forked() as fork:
                fork.ask("[state.update(still=True), threads['churn'].join()]")
                assert [fork.woken(name)["name"] for name in THREADS] == list(THREADS)
    finally:
        parent.ask("[state.update(still=True), threads['churn'].join()]")


# ---------------------------------------------------------------- signals


def test_a_signal_that_comes_meanwhile_waits_for_the_parent_alone(parent: Victim) -> None:
    parent.ask("handled.clear()")
    with parent.forked(settle=lambda _: os.kill(parent.pid, signal.SIGUSR1)) as fork:
        assert parent.ask("len(handled)") == 1
        assert fork.ask("len(handled)") == 0


def test_a_signal_for_the_fork_is_handled_when_it_runs(parent: Victim) -> None:
    parent.ask("handled.clear()")
    with parent.forked(settle=lambda pid: os.kill(pid, signal.SIGUSR1)) as fork:
        assert fork.ask("len(handled)") == 1
        assert parent.ask("len(handled)") == 0


def test_signals_that_keep_coming_disturb_nobody(parent: Victim) -> None:
    over = threading.Event()

    def flood() -> None:
        while not over.wait(0.0002):
            os.kill(parent.pid, signal.SIGUSR1)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(30):
            with parent.forked() as fork:
                assert fork.ask("1 + 1") == 2
    finally:
        over.set()
        flooding.join()


def test_a_signal_that_is_about_to_be_delivered_is_not_lost(parent: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    parent.ask("handled.clear()")
    original = Thread._seize

    def seize(thread: Thread) -> int:
        options = original(thread)
        if thread.tid == parent.pid:
            os.kill(parent.pid, signal.SIGUSR1)
            # Of which it tells us first.
            assert comes_true(lambda: parent.status("State").startswith("t"))
        return options

    monkeypatch.setattr(Thread, "_seize", seize)
    with parent.forked() as fork:
        assert parent.ask("len(handled)") == 1
        assert fork.ask("len(handled)") == 1


def test_a_handler_of_breakpoints_is_kept(parent: Victim) -> None:
    parent.ask("signal.signal(signal.SIGTRAP, lambda *_: handled.append('trap'))")
    try:
        with parent.forked() as fork:
            for process in (fork, parent):
                process.ask("handled.clear()")
                assert process.ask("[os.kill(os.getpid(), signal.SIGTRAP), handled.copy()][-1]") == ["trap"]
    finally:
        parent.ask("signal.signal(signal.SIGTRAP, signal.SIG_DFL)")


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "meanwhile"])
def test_a_stopped_parent_can_be_forked_and_stays_stopped(parent: Victim, meanwhile: bool) -> None:
    def stop(_pid: int = 0) -> None:
        os.kill(parent.pid, signal.SIGSTOP)
        if not meanwhile:
            os.waitid(os.P_PID, parent.pid, os.WSTOPPED | os.WNOWAIT)

    try:
        if not meanwhile:
            stop()
        with parent.forked(settle=stop if meanwhile else lambda _pid: None) as fork:
            assert fork.woken("futex")["name"] == "futex"
            assert comes_true(lambda: parent.status("State").startswith("T"))
    finally:
        os.kill(parent.pid, signal.SIGCONT)


def test_a_fork_may_be_stopped_before_it_runs(parent: Victim) -> None:
    with parent.forked(settle=lambda pid: os.kill(pid, signal.SIGSTOP)) as fork:
        assert comes_true(lambda: fork.status("State").startswith("T"))
        os.kill(fork.pid, signal.SIGCONT)
        assert [fork.woken(name)["name"] for name in THREADS] == list(THREADS)


# ---------------------------------------------------------------- memory


def test_what_one_changes_the_other_does_not_see(parent: Victim) -> None:
    parent.ask("state.update(mark='parent')")
    with parent.forked() as fork:
        assert fork.ask("[state.get('mark'), state.update(mark='fork')][0]") == "parent"
        assert parent.ask("[state.get('mark'), state.update(mark='again')][0]") == "parent"
        assert fork.ask("state['mark']") == "fork"


def test_memory_that_was_left_out_of_forks_comes_along_and_is_its_own(parent: Victim) -> None:
    with parent.forked() as fork:
        assert fork.ask("apart[:5].decode()") == "apart"
        fork.ask("apart.__setitem__(slice(5), b'forks')")
        assert parent.ask("apart[:5].decode()") == "apart"


def test_memory_that_is_mapped_shared_is_replaced_wherever_it_is_mapped(own: Victim) -> None:
    copy = os.memfd_create("copy")
    try:
        size = 8 * mmap.PAGESIZE
        os.ftruncate(copy, size)
        os.pwrite(copy, b"first", 0)
        os.pwrite(copy, b"second", size // 2)
        with own.forked(replaced={own.number_of("memory_fd"): copy}) as fork:
            assert fork.ask("[memory[:5].decode(), second_half[:6].decode()]") == ["first", "second"]
            fork.ask("[memory.__setitem__(slice(5), b'forks'), os.pwrite(memory_fd, b'forks', 5)]")
            assert os.pread(copy, 10, 0) == b"forksforks"
            assert own.ask("bytes(memory).count(0)") == size
            # As it was mapped, and no better.
            ranges = Path(f"/proc/{fork.pid}/maps").read_text().splitlines()
            assert {line.split()[1] for line in ranges if "/memfd:copy" in line} == {"rw-s", "r--s"}
            assert not any("/memfd:ram" in line for line in ranges)
    finally:
        os.close(copy)


def test_pieces_of_shared_memory_may_stay_in_common_until_they_are_written_to(own: Victim) -> None:
    page = mmap.PAGESIZE
    own.ask(f"[memory.__setitem__(slice(n * {page}, n * {page} + 5), b'page%d' % n) for n in range(8)]")
    copy = os.memfd_create("copy")
    try:
        os.ftruncate(copy, 8 * page)
        number = own.number_of("memory_fd")
        # The second half is mapped twice; the pieces are in one mapping, in both, and beyond them.
        pieces = ((page, 2 * page), (3 * page, 5 * page), (7 * page, 9 * page))
        with own.forked(replaced={number: copy}, common={number: pieces}) as fork:
            seen = fork.ask(f"[memory[n * {page} : n * {page} + 5].decode() for n in range(8)]")
            nothing = "\0" * 5
            assert seen == [nothing, "page1", nothing, "page3", "page4", nothing, nothing, "page7"]
            twice = fork.ask(f"[second_half[n * {page} : n * {page} + 5].decode() for n in (0, 3)]")
            assert twice == ["page4", "page7"]
            fork.ask(f"memory.__setitem__(slice({page}, {page} + 5), b'forks')")
            assert own.ask(f"memory[{page} : {page} + 5].decode()") == "page1"
            assert fork.ask(f"memory[{page} : {page} + 5].decode()") == "forks"
            # Neither in its file nor with a descriptor of its parent's.
            assert os.pread(copy, 5, page) == bytes(5)
            assert fork.ask("os.listdir('/proc/self/fd')") == own.ask("os.listdir('/proc/self/fd')")
    finally:
        os.close(copy)


def test_shared_memory_that_nobody_has_given_is_copied(own: Victim) -> None:
    with own.forked() as fork:
        fork.ask("memory.__setitem__(slice(5), b'forks')")
        assert fork.ask("os.pread(memory_fd, 5, 0).decode()") == "forks"
        assert fork.ask("os.fstat(memory_fd).st_size") == 8 * mmap.PAGESIZE
        assert own.ask("os.fstat(memory_fd).st_blocks") == 0


def test_shared_memory_is_copied_with_its_content(own: Victim) -> None:
    own.ask("memory.__setitem__(slice(5), b'given')")
    with own.forked() as fork:
        assert fork.ask("bytes(memory[:5]).decode()") == "given"
        fork.ask("memory.__setitem__(slice(5), b'forks')")
        assert own.ask("bytes(memory[:5]).decode()") == "given"


@pytest.mark.parametrize("fd", ["-1", "os.open('@FILE@', os.O_RDWR)"], ids=["anonymous", "of a file"])
def test_other_memory_that_is_mapped_shared_is_a_reason_not_to_fork(own: Victim, tmp_path: Path, fd: str) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    own.ask(f"kept.append(mmap.mmap({fd}, 4096))".replace("@FILE@", f"{tmp_path}/file"))
    with pytest.raises(ForkError, match="has memory that cannot be shared"), own.forked():
        pytest.fail("it was forked")
    own.ask("kept.pop().close()")


def test_memory_whose_descriptor_was_closed_is_a_reason_not_to_fork(own: Victim) -> None:
    own.ask("[kept.append(os.memfd_create('lost')), os.ftruncate(kept[0], 4096)]")
    assert own.ask("libc.mmap(None, ctypes.c_size_t(4096), 3, 1, kept[0], ctypes.c_long(0))") != -1
    own.ask("os.close(kept[0])")
    with pytest.raises(ForkError, match="mapped memory that it has no descriptor of"), own.forked():
        pytest.fail("it was forked")


# ---------------------------------------------------------------- descriptors


def test_eventfds_are_its_own_and_as_they_were(own: Victim) -> None:
    large = 0xFFFF_FFFF_0000
    own.ask(f"[kept.append(os.eventfd(0, os.EFD_NONBLOCK)), os.eventfd_write(kept[0], {large})]")
    own.ask("[kept.append(os.eventfd(3, os.EFD_SEMAPHORE)), kept.append(os.eventfd(0))]")
    with own.forked() as fork:
        # Of a semaphore one reads one after another, of others all there is.
        assert fork.ask("[os.eventfd_read(kept[n]) for n in (1, 1, 0)]") == [1, 1, large]
        assert fork.ask("[os.get_blocking(fd) for fd in kept]") == [False, True, True]
        assert fork.ask("[os.get_inheritable(fd) for fd in kept]") == [False, False, False]
        fork.ask("os.eventfd_write(kept[2], 1)")
        assert own.ask("select.select([kept[2]], [], [], 0)[0]") == []
        assert own.ask("[os.eventfd_read(kept[n]) for n in (1, 1, 1, 0)]") == [1, 1, 1, large]


def test_more_descriptors_than_one_message_takes_are_replaced(own: Victim) -> None:
    own.ask("kept.extend(os.eventfd(n) for n in range(600))")
    with own.forked() as fork:
        assert fork.ask("[os.eventfd_read(fd) if n else 0 for n, fd in enumerate(kept)]") == list(range(600))
        numbers = "sorted(int(name) for name in os.listdir('/proc/self/fd'))"
        assert fork.ask(numbers) == own.ask(numbers)


@pytest.mark.parametrize(
    "made",
    [
        "os.pipe()[1]",
        "socket.socketpair()[1].detach()",
        "[kept.append(select.epoll()), kept[0].fileno()][1]",
        "libc.timerfd_create(1, 0)",
        "libc.inotify_init1(0)",
        "os.pidfd_open(os.getpid())",
        "os.open('/dev/net/tun', os.O_RDWR)",
        "os.open('/dev/ptmx', os.O_RDWR)",
        "os.open('@FILE@', os.O_RDWR)",
        "os.open('@FILE@', os.O_WRONLY | os.O_APPEND)",
        "os.memfd_create('unmapped')",
        "os.open('@FIFO@', os.O_RDWR)",
    ],
)
def test_what_cannot_be_shared_is_a_reason_not_to_fork(own: Victim, tmp_path: Path, made: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    assert own.number_of(made.replace("@FILE@", f"{tmp_path}/file").replace("@FIFO@", f"{tmp_path}/fifo")) > 2
    with pytest.raises(ForkError, match="cannot be shared"), own.forked():
        pytest.fail("it was forked")
    assert own.is_childless()


@pytest.mark.parametrize(
    "made",
    [
        "os.open('/dev/null', os.O_RDWR)",
        "os.open('/dev/urandom', os.O_RDONLY)",
        "os.open('/proc/self/exe', os.O_RDONLY)",
        "os.open('/etc', os.O_RDONLY | os.O_DIRECTORY)",
        "os.open('/etc/passwd', os.O_PATH)",
        "libc.signalfd(-1, struct.pack('Q', 0), 0)",
        # F_ADD_SEALS, F_SEAL_WRITE
        "[kept.append(os.memfd_create('sealed', 2)), fcntl.fcntl(kept[0], 1033, 8), kept[0]][2]",
    ],
)
def test_what_is_only_read_is_shared(own: Victim, made: str) -> None:
    number = own.number_of(made)
    assert number > 2
    with own.forked() as fork:
        assert fork.ask(f"os.fstat({number}).st_ino") == own.ask(f"os.fstat({number}).st_ino")


# ---------------------------------------------------------------- who it is


@root_only
def test_it_gets_its_identity_and_no_privilege(parent: Victim) -> None:
    # What a container engine's root may hand on.
    parent.ask("capabilities(1 << 12)")
    try:
        identity = Confinement(uid=65534, gid=65533, groups=tuple(range(1000, 1400)))
        with parent.forked(identity=identity) as fork:
            for tid in fork.threads():
                assert set(fork.status("Uid", tid).split()) == {"65534"}
                assert set(fork.status("Gid", tid).split()) == {"65533"}
                assert fork.status("Groups", tid) == " ".join(map(str, identity.groups))
                for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                    assert int(fork.status(name, tid), 16) == 0
            # A process that changed who it is cannot see its own /proc, unless it is told that it may.
            assert fork.ask("os.open('/proc/self/mem', os.O_RDWR) > 0")
            assert [fork.woken(name)["name"] for name in THREADS] == list(THREADS)
        assert set(parent.status("Uid").split()) == {"0"}
    finally:
        parent.ask("capabilities(0)")


@root_only
def test_root_without_privileges_is_an_identity_too(parent: Victim) -> None:
    with parent.forked(identity=Confinement(uid=0, gid=0)) as fork:
        assert int(fork.status("CapEff"), 16) == int(fork.status("CapPrm"), 16) == 0
        assert fork.status("Groups") == ""


def test_without_an_identity_it_keeps_its_parent_s(parent: Victim) -> None:
    with parent.forked() as fork:
        for name in ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"):
            assert fork.status(name) == parent.status(name)


def test_it_is_the_only_one_of_its_session(parent: Victim) -> None:
    with parent.forked() as fork:
        assert os.getsid(fork.pid) == os.getpgid(fork.pid) == fork.pid


def test_its_command_line_tells_who_it_is(parent: Victim) -> None:
    with parent.forked(words={b"guest=one,": b"guest=two,"}) as fork:
        before, after = (Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in (parent, fork))
        assert b"guest=one," in before
        assert after == before.replace(b"guest=one,", b"guest=two,")


def test_it_may_be_settled_while_it_is_one_thread(parent: Victim) -> None:
    seen = []
    with parent.forked(settle=lambda pid: seen.append((pid, len(os.listdir(f"/proc/{pid}/task"))))) as fork:
        assert seen == [(fork.pid, 1)]


# ---------------------------------------------------------------- again, and how it ends


def test_a_parent_can_be_forked_again_and_forks_live_side_by_side(parent: Victim) -> None:
    with ExitStack() as stack:
        forks = [stack.enter_context(parent.forked()) for _ in range(4)]
        for number, fork in enumerate(forks):
            fork.ask(f"state.update(mark={number})")
        assert [fork.ask("state['mark']") for fork in forks] == [0, 1, 2, 3]
        assert len({fork.pid for fork in forks}) == 4


async def test_two_at_once_fork_one_after_the_other(parent: Victim, tmp_path: Path) -> None:
    machine = Parent(
        pid=parent.pid, start_time=parent.start_time, name="one", directory=tmp_path, disks={}, memory=tmp_path
    )
    inside = []

    async def one() -> object:
        def forked() -> object:
            with parent.forked() as fork:
                return fork.woken("futex")["name"]

        async with alone(machine):
            inside.append(1)
            answer = await asyncio.to_thread(forked)
            assert len(inside) == 1
            inside.pop()
            return answer

    assert await asyncio.gather(*(one() for _ in range(5))) == ["futex"] * 5


async def test_who_waits_too_long_for_others_gives_up(
    parent: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmsandbox_hypervisor.qemu.forked.PATIENCE", 0.02)
    machine = Parent(pid=parent.pid, start_time=1, name="one", directory=tmp_path, disks={}, memory=tmp_path)
    async with alone(machine):
        with pytest.raises(ForkError, match=r"'one' is being forked for more than 0.02 s"):
            async with alone(machine):
                pytest.fail("two at once")
    async with alone(machine):
        pass
    # What goes wrong inside is not mistaken for it.
    with pytest.raises(TimeoutError):
        async with alone(machine):
            raise TimeoutError
    with pytest.raises(ForkError, match="'one' is gone"):
        async with alone(Parent(pid=1, start_time=1, name="one", directory=tmp_path / "x", disks={}, memory=tmp_path)):
            pytest.fail("it is gone")


@pytest.mark.parametrize(("expression", "status"), [("os._exit(3)", 3), ("os.kill(0, 9)", -9), ("os.abort()", -6)])
async def test_its_exit_status_is_known_although_it_is_nobody_s_child(
    parent: Victim, expression: str, status: int
) -> None:
    with parent.forked() as fork:
        child = Child.adopted("fork", fork.pid, fork.start_time)
        pidfd = os.pidfd_open(fork.pid)
        try:
            with pytest.raises((EOFError, ConnectionResetError)):
                fork.ask(expression)
            assert ended(pidfd)
            told = _told_status(pidfd)
            if told is None:
                pytest.skip("this kernel tells nobody but the parent")
            assert told == status
            assert await child.wait() == status
        finally:
            os.close(pidfd)


def test_who_adopts_a_process_may_have_it_end_with_him() -> None:
    reading, writing = os.pipe()
    adopter = os.fork()
    if adopter == 0:
        try:
            adopt_orphans()
            parent = os.fork()
            if parent == 0:
                for _ in range(2):
                    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
                    os.write(writing, b"%d " % pid)
                os._exit(0)
            os.waitpid(parent, 0)
            bind(int(os.read(reading, 64).split()[0]))
            os.write(writing, Path(f"/proc/self/task/{os.getpid()}/children").read_bytes())
        finally:
            os._exit(0)
    os.waitpid(adopter, 0)
    bound, other = (int(pid) for pid in os.read(reading, 64).split())
    for fd in (reading, writing):
        os.close(fd)
    pidfd = os.pidfd_open(other)
    try:
        assert comes_true(lambda: not is_alive(bound, bound))
        assert is_alive(other, other)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ended(pidfd)
        os.close(pidfd)


def test_a_fork_that_ends_leaves_no_zombie(parent: Victim) -> None:
    with parent.forked() as fork:
        pidfd = os.pidfd_open(fork.pid)
        try:
            os.kill(fork.pid, signal.SIGKILL)
            assert ended(pidfd)
        finally:
            os.close(pidfd)
        assert parent.is_childless()
