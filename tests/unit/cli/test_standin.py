"""The stand-in against a supervisor played by the test, byte by byte."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox import wire
from vmsandbox.cli import carrying, launch, standin
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTAINER = "c0ffee" * 10


class Supervisor:
    """The other end: accepts the stand-in, says and hears frames."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        listener.settimeout(10)
        self.sock: socket.socket | None = None
        self.heard: list[dict[str, Any]] = []

    def accept(self) -> dict[str, Any]:
        if self.sock is not None:
            self.sock.close()
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(10)
        return self.message()

    def frame(self) -> wire.Frame:
        assert self.sock is not None
        frame = wire.receive(self.sock)
        assert frame is not None
        return frame

    def next_or_nothing(self) -> wire.Frame | None:
        """The next frame, or None if none comes for a while."""
        try:
            return self.frame()
        except TimeoutError:
            return None

    def message(self) -> dict[str, Any]:
        return self.frame().message()

    def until(self, key: str) -> dict[str, Any]:
        while key not in (message := self.message()):
            continue
        return message

    def say(self, **message: Any) -> None:
        assert self.sock is not None
        self.sock.sendall(wire.encode_message(message))

    def output(self, offset: int, data: bytes, kind: int = wire.STDOUT) -> None:
        assert self.sock is not None
        self.sock.sendall(wire.encode_data(kind, offset, data))

    def close(self) -> None:
        self.listener.close()
        if self.sock is not None:
            self.sock.close()


class Started:
    """A stand-in with the test's ends of its stdio."""

    def __init__(self, pid: int, stdin: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr

    def read(self) -> bytes:
        with open(self.stdout, "rb") as file:
            return file.read()

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path / "r", tmp_path / "d")


@pytest.fixture
def supervisor(roots: Roots) -> Iterator[Supervisor]:
    bound = launch.listen(launch.make_run_directory(roots, CONTAINER))
    made = Supervisor(socket.socket(fileno=bound.detach()))
    yield made
    made.close()


def start(roots: Roots, *, stdin: bool = True, client: int | None = None, ends_with_client: bool = False) -> Started:
    ends = [os.pipe() for _ in range(3)]
    saved = [os.dup(fd) for fd in range(3)]
    inside = (ends[0][0], ends[1][1], ends[2][1])
    for fd, end in enumerate(inside):
        os.dup2(end, fd)
    try:
        plan = standin.Plan(
            CONTAINER, stdin=stdin, stdout=True, terminal=False, client=client, ends_with_client=ends_with_client
        )
        pid = standin.fork(roots, roots.sandbox(CONTAINER), plan)
    finally:
        for fd, old in enumerate(saved):
            os.dup2(old, fd)
            os.close(old)
        for end in inside:
            os.close(end)
    return Started(pid, ends[0][1], ends[1][0], ends[2][0])


def test_it_ends_as_the_process_ended_and_loses_no_output(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots, stdin=False)
    hello = supervisor.accept()
    assert (hello["verb"], hello["container"], hello["stdout"]) == ("attach", CONTAINER, 0)
    data = os.urandom(300_000)
    supervisor.output(0, data[:100_000])
    supervisor.output(100_000, data[100_000:])
    supervisor.say(exit={"code": 7})
    assert process.read() == data
    assert supervisor.until("done") == {"done": True}
    assert process.exit_code() == 7


def test_it_resumes_from_its_offsets_after_the_connection_broke(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots)
    supervisor.accept()
    supervisor.output(0, b"first ")
    os.write(process.stdin, b"input")
    # Its input and its acknowledgement come in either order.
    missing = {wire.STDIN, wire.MESSAGE}
    while missing:
        missing.discard(supervisor.frame().kind)
    hello = supervisor.accept()
    assert hello["stdout"] == len(b"first ")
    again = supervisor.frame()
    assert (again.kind, again.offset, again.payload) == (wire.STDIN, 0, b"input")
    supervisor.output(0, b"first second")
    supervisor.say(accepted=5)
    supervisor.say(exit={"code": 0})
    supervisor.until("done")
    assert process.read() == b"first second"
    assert process.exit_code() == 0
    os.close(process.stdin)


def test_it_says_again_what_it_said_of_its_output_before_the_connection_broke(
    roots: Roots, supervisor: Supervisor
) -> None:
    """The supervisor may have died with it; an agent that is owed an acknowledgement takes no more output."""
    process = start(roots, stdin=False)
    supervisor.accept()
    supervisor.output(0, b"read")
    assert supervisor.until("ack") == {"ack": "stdout", "offset": 4}
    os.close(process.stderr)
    supervisor.output(0, b"unread", wire.STDERR)
    assert supervisor.until("closed") == {"closed": "stderr"}
    supervisor.accept()
    said = [supervisor.message() for _ in range(2)]
    assert {"ack": "stdout", "offset": 4} in said
    assert {"closed": "stderr"} in said
    supervisor.say(exit={"code": 0})
    assert process.read() == b"read"
    assert process.exit_code() == 0


def test_the_end_of_input_is_said_with_its_offset(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots)
    supervisor.accept()
    os.write(process.stdin, b"abc")
    os.close(process.stdin)
    assert supervisor.frame().payload == b"abc"
    assert supervisor.message() == {"eof": "stdin", "offset": 3}
    supervisor.say(exit={"code": 0})
    supervisor.until("done")
    assert process.exit_code() == 0


def test_it_reads_ahead_only_as_far_as_input_was_accepted(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots)
    supervisor.accept()
    os.set_blocking(process.stdin, False)
    sent = 0
    received = 0
    while received < carrying.INPUT_WINDOW:
        try:
            sent += os.write(process.stdin, bytes(65536))
        except BlockingIOError:
            received += len(supervisor.frame().payload)
    assert supervisor.sock is not None
    supervisor.sock.settimeout(0.3)
    while (more := supervisor.next_or_nothing()) is not None:
        received += len(more.payload)
    assert received <= carrying.INPUT_WINDOW + wire.CHUNK
    supervisor.sock.settimeout(10)
    supervisor.say(accepted=received)
    supervisor.say(exit={"code": 0})
    assert process.exit_code() == 0
    os.close(process.stdin)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(roots: Roots, supervisor: Supervisor, number: signal.Signals) -> None:
    process = start(roots, stdin=False)
    supervisor.accept()
    os.kill(process.pid, number)
    assert supervisor.until("signal") == {"signal": int(number)}
    supervisor.say(exit={"code": 128 + number})
    assert process.exit_code() == 128 + number


def test_it_tells_when_nobody_reads_the_output_any_more(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots, stdin=False)
    supervisor.accept()
    os.close(process.stdout)
    supervisor.output(0, b"unread")
    assert supervisor.until("closed") == {"closed": "stdout"}
    supervisor.say(exit={"code": 141})
    assert process.exit_code() == 141


def test_output_goes_to_the_log_as_well(roots: Roots, supervisor: Supervisor, tmp_path: Path) -> None:
    process = start(roots, stdin=False)
    supervisor.accept()
    supervisor.say(log={"path": str(tmp_path / "log"), "max_bytes": 10_000, "files": 2})
    supervisor.output(0, b"hello\n")
    supervisor.say(exit={"code": 0})
    assert process.read() == b"hello\n"
    assert process.exit_code() == 0
    assert b"stdout F hello" in (tmp_path / "log").read_bytes()


def test_it_gives_up_when_the_pod_is_gone(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots, stdin=False)
    supervisor.accept()
    supervisor.close()
    assert process.exit_code() == standin.LOST


def test_it_gives_up_when_the_supervisor_does_not_know_its_process(roots: Roots, supervisor: Supervisor) -> None:
    process = start(roots, stdin=False)
    supervisor.accept()
    supervisor.say(unknown=True)
    assert process.exit_code() == standin.LOST


def test_after_the_death_of_its_client_the_process_goes_on_without_its_stdio(
    roots: Roots, supervisor: Supervisor, tmp_path: Path
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as client:
        process = start(roots, client=client.pid)
        supervisor.accept()
        log = tmp_path / "log"
        supervisor.say(log={"path": str(log), "max_bytes": 1 << 20, "files": 1})
        client.kill()
        assert supervisor.until("eof") == {"eof": "stdin", "offset": 0}
    assert process.read() == b""  # its reader sees the end
    supervisor.output(0, b"late\n")
    assert supervisor.until("ack") == {"ack": "stdout", "offset": 5}
    supervisor.say(exit={"code": 4})
    assert supervisor.until("done") == {"done": True}
    assert process.exit_code() == 4
    assert "late" in log.read_text()


def test_the_death_of_its_client_kills_the_process_once(roots: Roots, supervisor: Supervisor) -> None:
    with subprocess.Popen(["sleep", "1000"]) as client:
        process = start(roots, stdin=False, client=client.pid, ends_with_client=True)
        supervisor.accept()
        client.kill()
        assert supervisor.until("signal") == {"signal": int(signal.SIGKILL)}
    assert supervisor.sock is not None
    supervisor.sock.settimeout(0.3)
    assert supervisor.next_or_nothing() is None
    supervisor.sock.settimeout(10)
    supervisor.say(exit={"code": 137})
    assert process.exit_code() == 137
