"""`-t`: a real terminal, resized, and given back."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.harness.cli import Cli


class Terminal:
    """A pseudo-terminal with a client on it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(100, 30)
        self.seen = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("hhhh", rows, columns, 0, 0))

    def until(self, text: bytes, seconds: float = 60) -> bytes:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            self.seen += os.read(self.master, 4096)
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def mode(self) -> list[object]:
        return termios.tcgetattr(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    os.close(made.master)
    os.close(made.slave)


def on(terminal: Terminal, cli: Cli, *words: str) -> subprocess.Popen[bytes]:
    fd = terminal.slave

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)

    return cli.popen(*words, stdin=fd, stdout=fd, stderr=fd, preexec_fn=take_terminal)


def test_a_shell_has_a_terminal_of_the_right_size_that_follows(pod: tuple[Cli, str], terminal: Terminal) -> None:
    cli, container = pod
    before = terminal.mode()
    with on(terminal, cli, "exec", "-it", container, "sh") as client:
        terminal.until(b"# ")
        terminal.type(b"tty; stty size\n")
        assert b"/dev/pts/" in terminal.until(b"30 100")
        terminal.resize(77, 22)
        client.send_signal(signal.SIGWINCH)
        terminal.type(b"sleep 1; stty size\n")
        terminal.until(b"22 77")
        terminal.type(b"exit 6\n")
        assert client.wait(60) == 6
    assert terminal.mode() == before


def test_ctrl_c_is_for_the_program_and_not_for_the_client(pod: tuple[Cli, str], terminal: Terminal) -> None:
    cli, container = pod
    with on(
        terminal,
        cli,
        "exec",
        "-it",
        container,
        "sh",
        "-c",
        "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done",
    ) as client:
        terminal.until(b"ready")
        terminal.type(b"\x03")
        terminal.until(b"caught")
        assert client.wait(60) == 3


def test_the_terminal_is_given_back_when_the_container_is_killed(pod: tuple[Cli, str], terminal: Terminal) -> None:
    cli, container = pod
    before = terminal.mode()
    with on(terminal, cli, "exec", "-it", container, "sh", "-c", "echo ready; sleep 1000") as client:
        terminal.until(b"ready")
        client.send_signal(signal.SIGTERM)
        assert client.wait(60) == 143
    assert terminal.mode() == before


def test_the_terminal_is_given_back_when_the_client_is_killed(pod: tuple[Cli, str], terminal: Terminal) -> None:
    cli, container = pod
    before = terminal.mode()
    with on(terminal, cli, "exec", "-it", container, "sh") as client:
        terminal.until(b"# ")
        assert terminal.mode() != before
        client.kill()
    deadline = time.monotonic() + 30
    while terminal.mode() != before:
        assert time.monotonic() < deadline
        cli.ok("exec", container, "true")


def test_t_without_a_terminal_is_refused(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    result = cli("exec", "-it", container, "sh", stdin=b"")
    assert result.code == 125
    assert "not a terminal" in result.stderr
