"""Small parts: cleanup, console, sockets, evidence, vsock, kernel parameters, virtiofsd's command line."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vmsandbox_hypervisor import frequency, kernel, virtiofsd, vsock
from vmsandbox_hypervisor.aio import background, finish
from vmsandbox_hypervisor.api import Event, VirtiofsShare
from vmsandbox_hypervisor.console import FILE_MAX, RING, Console
from vmsandbox_hypervisor.evidence import CONSOLE_LINES, CONSOLE_LOG, LINES_BEFORE, Evidence, reason_in
from vmsandbox_hypervisor.sockets import listening
from vmsandbox_hypervisor.subscription import BACKLOG, Subscription

# ---------------------------------------------------------------- cleanup


async def test_cleanup_goes_on_although_its_caller_is_cancelled_again_and_again() -> None:
    gate = asyncio.Event()
    steps = []

    async def cleanup() -> None:
        steps.append("begun")
        await gate.wait()
        steps.append("done")

    task = asyncio.create_task(finish(cleanup()))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["begun", "done"]


async def test_cleanup_that_hangs_is_given_up() -> None:
    with pytest.raises(TimeoutError, match=r"longer than 0\.01 s"):
        await finish(_forever(), seconds=0.01)


async def _forever() -> None:
    await asyncio.Event().wait()


async def test_an_error_of_cleanup_is_raised() -> None:
    async def cleanup() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await finish(cleanup())


async def test_background_work_ends_with_its_block() -> None:
    async with background(_forever(), "work") as task:
        await asyncio.sleep(0)
        assert not task.done()
    assert task.cancelled()


# ---------------------------------------------------------------- console


async def fed(console: Console, peer: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    peer.setblocking(False)
    await loop.sock_sendall(peer, data)
    for _ in range(1000):
        if console.text().endswith(data[-16:].decode()):
            return
        await asyncio.sleep(0)
    pytest.fail("the console does not read")


async def test_the_console_keeps_the_last_64_kib_and_its_file_stays_small(tmp_path: Path) -> None:
    listener = listening(tmp_path / "c.sock")
    console = Console(tmp_path / "console.log")
    console.open(tmp_path / "c.sock")
    peer, _ = listener.accept()
    with listener, peer:
        for number in range(20):
            await fed(console, peer, b"x" * 50_000 + b"round %09d\n" % number)
            assert (tmp_path / "console.log").stat().st_size <= FILE_MAX
        assert len(console.text()) == RING
        assert console.lines(1)[0].endswith("round 000000019")
    console.close()
    later = Console(tmp_path / "console.log")
    assert later.text() == console.text()
    assert (tmp_path / "console.log").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".sock"] == ["console.log"]


async def test_what_came_just_before_the_end_is_not_lost(tmp_path: Path) -> None:
    listener = listening(tmp_path / "c.sock")
    console = Console(tmp_path / "console.log")
    console.open(tmp_path / "c.sock")
    peer, _ = listener.accept()
    with listener, peer:
        peer.sendall(b"last\xff words\r\n")
    console.drain()
    assert console.text() == "last\ufffd words\n"
    console.close()


async def test_what_a_guest_prints_does_not_steer_a_terminal(tmp_path: Path) -> None:
    (tmp_path / CONSOLE_LOG).write_bytes(b"\x1b[2Jone\ttwo\r\r\nthree\rfour \xc2\x9b31m \xe2\x80\xae\r\n")
    assert Console(tmp_path / CONSOLE_LOG).text() == "?[2Jone\ttwo\nthree?four ?31m ?\n"
    (tmp_path / CONSOLE_LOG).write_bytes(b"Kernel panic - not syncing: \x1b]0;title\x07\n")
    assert Evidence(tmp_path).panic() == "Kernel panic - not syncing: ?]0;title?"


async def test_a_log_that_was_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "victim")
    listener = listening(tmp_path / "c.sock")
    with listener, pytest.raises(OSError, match="symbolic links"):
        Console(tmp_path / "console.log").open(tmp_path / "c.sock")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("", ""),
        ("qemu-system-x86_64: -m 1T: cannot set up guest memory\n", "-m 1T: cannot set up guest memory"),
        ("qemu-system-x86_64: the cause\nqemu-system-x86_64: warning: by the way\n", "the cause"),
        ("qemu-system-x86_64: warning: only this\n", "warning: only this"),
        ("setpriv: failed to execute qemu: Permission denied\n", "failed to execute qemu: Permission denied"),
    ],
)
def test_the_telling_line_of_stderr_is_found(stderr: str, reason: str) -> None:
    assert reason_in(stderr) == reason


# ---------------------------------------------------------------- sockets and events


def test_a_stale_socket_is_replaced_and_nobody_else_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listening(path).close()
    with listening(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_path_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="longer than 107 bytes"):
        listening(tmp_path / ("s" * 108))


async def test_a_slow_reader_of_events_loses_the_oldest() -> None:
    subscription = Subscription()
    for number in range(BACKLOG + 5):
        subscription.put(Event(name=str(number), data={}, time=0))
    subscription.end()
    names = [event.name async for event in subscription]
    assert names == [str(number) for number in range(5, BACKLOG + 5)]


# ---------------------------------------------------------------- vsock


class Vhost:
    """Stands in for the kernel's ioctl."""

    def __init__(self, *taken: int, error: int = errno.EADDRINUSE) -> None:
        self.taken = taken
        self.error = error
        self.asked: list[int] = []

    def __call__(self, fd: int, request: int, argument: bytes) -> None:
        assert request == 0x4008AF60
        (cid,) = struct.unpack("@Q", argument)
        self.asked.append(cid)
        if cid in self.taken:
            raise OSError(self.error, os.strerror(self.error))


def test_any_free_context_id_is_claimed() -> None:
    choices = iter([5, 6, 7])
    vhost = Vhost(5, 6)
    claim = vsock.claim(device=Path("/dev/null"), ioctl=vhost, choose=lambda _low, _high: next(choices))
    os.close(claim.fd)
    assert claim.cid == 7
    assert vhost.asked == [5, 6, 7]


@pytest.mark.parametrize(("cid", "error"), [(5, errno.EADDRINUSE), (None, errno.EPERM)])
def test_a_context_id_that_cannot_be_had_is_an_error_and_leaks_nothing(cid: int | None, error: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=os.strerror(error)):
        vsock.claim(cid, device=Path("/dev/null"), ioctl=Vhost(5, error=error), choose=lambda _low, _high: 5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_host_on_which_every_id_is_taken_is_given_up() -> None:
    vhost = Vhost(5)
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        vsock.claim(device=Path("/dev/null"), ioctl=vhost, choose=lambda _low, _high: 5)
    assert len(vhost.asked) == vsock.ATTEMPTS


def test_a_host_without_vsock_is_told_from_one_with_it(tmp_path: Path) -> None:
    assert not vsock.available(tmp_path / "none")
    assert vsock.available(Path("/dev/null"))


# ---------------------------------------------------------------- kernel, virtiofsd


def test_an_emulated_guest_need_not_measure_what_is_known() -> None:
    assert {"tsc_early_khz=2445000", "lpj=9780000"} < set(kernel.parameters("tcg", khz=2445000))
    assert "lpj=24450000" in kernel.parameters("tcg", khz=2445000, hz=100)
    told = [*kernel.parameters("kvm", khz=2445000), *kernel.parameters("tcg")]
    assert not [word for word in told if word.startswith(("lpj=", "tsc_early_khz="))]


@pytest.mark.parametrize(
    ("text", "khz"),
    [
        ("processor\t: 0\ncpu MHz\t\t: 2445.430\nflags\t\t: fpu hypervisor lahf_lm\n", 2445430),
        ("processor\t: 0\ncpu MHz\t\t: 2445.430\nflags\t\t: fpu lahf_lm\n", None),
        ("processor\t: 0\nflags\t\t: fpu hypervisor\n", None),
        ("", None),
    ],
    ids=["virtual", "changes", "unknown", "empty"],
)
def test_a_processor_s_clock_is_believed_where_it_does_not_change(tmp_path: Path, text: str, khz: int | None) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert frequency.of_cpuinfo(tmp_path / "cpuinfo") == khz


def test_the_kernel_s_factor_is_a_frequency() -> None:
    """2.5 GHz are 0.4 ns for each tick."""
    factor = int(0.4 * 2**31)
    page = struct.pack("=40xQ2xHI", 1 << 3, 31, factor)
    assert frequency.of_page(page) == pytest.approx(2_500_000, abs=1)
    assert frequency.of_page(struct.pack("=40xQ2xHI", 1 << 1, 31, factor)) is None


def test_what_is_known_of_the_host_is_the_same_each_time() -> None:
    found = frequency.host_khz()
    frequency.host_khz.cache_clear()
    assert found == frequency.host_khz()
    assert found is None or found % 1000 == 0


def test_virtiofsd_gets_its_directory_whole() -> None:
    share = VirtiofsShare(tag="t", path=Path("/a,b\\c"), cache="always")
    assert virtiofsd.argv(Path("/v"), share, fd=3) == [
        "/v", "--fd=3", "-f", "-o",
        "source=/a\\,b\\\\c,cache=always,sandbox=namespace,announce_submounts,xattr,writeback,log_level=err",
    ]  # fmt: skip
    labelled = virtiofsd.argv(Path("/v"), share, fd=3, selinux="u:r:t:s0")
    assert labelled[:5] == ["setpriv", "--selinux-label=u:r:t:s0", "--", "/v", "--fd=3"]


# ---------------------------------------------------------------- what importing costs


@pytest.mark.parametrize("module", ["vmsandbox_hypervisor.qemu.machine", "vmsandbox_hypervisor.testing.fake"])
def test_qemu_can_be_executed_before_anything_heavy_is_imported(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )
    heavy = {"qemu", "qemu.qmp", "pydantic", "grpc", "pyroute2", "psutil", "vmsandbox_hypervisor.qemu.vm"}
    assert not loaded & heavy


PANIC = "Kernel panic - not syncing: "


@pytest.mark.parametrize("calls", [0, CONSOLE_LINES, 3 * CONSOLE_LINES])
def test_evidence_says_why_a_kernel_gave_up_however_much_it_prints_after_that(tmp_path: Path, calls: int) -> None:
    panic = f"{PANIC}sysrq triggered crash"
    trace = [f"[    9.1] call{number}+0x118/0x2f4" for number in range(calls)]
    before = [f"line {number}" for number in range(3 * LINES_BEFORE)]
    (tmp_path / CONSOLE_LOG).write_text("\r\n".join([*before, f"[    9.0] {panic}", *trace, ""]))
    shown = Evidence(tmp_path).text().splitlines()
    assert sum(panic in line for line in shown) == 1
    at = next(index for index, line in enumerate(shown) if panic in line)
    assert shown[at - LINES_BEFORE : at] == before[-LINES_BEFORE:]
    assert shown[-min(calls, CONSOLE_LINES) :] == trace[-CONSOLE_LINES:] or not calls


def test_evidence_says_what_there_is_nothing_of(tmp_path: Path) -> None:
    evidence = Evidence(tmp_path)
    assert evidence.text() == "stderr of QEMU: empty\nthe console is empty"
    (tmp_path / CONSOLE_LOG).write_text("booted\r\n")
    evidence = Evidence(tmp_path)
    evidence.phases = {"spawned": 0.01, "running": 0.5}
    assert evidence.text().splitlines() == [
        "reached: spawned after 0.01 s, running after 0.50 s", "stderr of QEMU: empty", "last lines of the console:",
        "booted",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("panic", "telling"),
    [
        ("Attempted to kill init! exitcode=0x1600", "erofs: no superblock; vmsandbox: cannot mount; "),
        ("VFS: Unable to mount root fs on unknown-block(254,0)", "erofs: no superblock; vmsandbox: cannot mount; "),
        ("sysrq triggered crash", ""),
    ],
)
def test_a_panic_about_the_first_program_is_told_with_what_was_printed_before(
    tmp_path: Path, panic: str, telling: str
) -> None:
    before = ["[ 1.0] erofs: no superblock", "[    1.2] erofs: no superblock", "vmsandbox: cannot mount"]
    after = ["[    1.3] Call Trace:", "[    1.4]  panic+0x118/0x2f4"]
    (tmp_path / CONSOLE_LOG).write_text("\n".join(["booting", *before, f"[    1.3] {PANIC}{panic}", *after]))
    assert Evidence(tmp_path).panic() == f"{telling}{PANIC}{panic}"
