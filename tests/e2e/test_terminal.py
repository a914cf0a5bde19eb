"""`-t`: a real terminal, resized, and given back."""

from __future__ import annotations

import copy
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import awaited, name_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.harness.cli import Cli


class Terminal:
    """A pseudo-terminal with a client on it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.path = os.ttyname(self.slave)
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

    def silent(self) -> None:
        """Nothing more has come."""
        ready, _, _ = select.select([self.master], [], [], 0)
        assert (self.seen.strip(), ready) == (b"", [])

    def mode(self) -> list[object]:
        return termios.tcgetattr(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    os.close(made.master)
    os.close(made.slave)


@contextmanager
def on(terminal: Terminal, cli: Cli, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command with a terminal of its own; it has ended when the block is left."""
    fd = terminal.slave

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)

    client = cli.popen(*words, stdin=fd, stdout=fd, stderr=fd, preexec_fn=take_terminal)
    try:
        yield client
    except BaseException:
        client.kill()
        raise
    finally:
        client.wait()


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


@pytest.mark.parametrize("verb", ["exec", "run"])
def test_a_program_finds_its_terminal_s_size_when_it_begins(
    pod: tuple[Cli, str], terminal: Terminal, box: str, verb: str
) -> None:
    cli, container = pod
    words = ("exec", "-it", container) if verb == "exec" else ("run", "--rm", "-it", box)
    with on(terminal, cli, *words, "stty", "size") as client:
        terminal.until(b"30 100")
        assert client.wait(60) == 0


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


def test_the_terminal_is_given_back_when_the_client_of_an_exec_is_killed(
    pod: tuple[Cli, str], terminal: Terminal
) -> None:
    cli, container = pod
    before = terminal.mode()
    with on(terminal, cli, "exec", "-it", container, "sh") as client:
        terminal.until(b"# ")
        awaited(lambda: terminal.mode() != before)
        client.kill()
    awaited(lambda: terminal.mode() == before)


@pytest.mark.parametrize("options", [(), ("--rm",)], ids=["stays", "rm"])
def test_the_terminal_is_given_back_when_the_client_of_a_container_is_killed(
    cli: Cli, box: str, terminal: Terminal, options: tuple[str, ...]
) -> None:
    before = terminal.mode()
    script = "echo ready; read line; echo got $line; while [ ! -e /go ]; do sleep 0.1; done; echo late; sleep 1000"
    with on(terminal, cli, "run", "-it", *options, "--name", "web", box, "sh", "-c", script) as client:
        terminal.until(b"ready")
        standin = psutil.Process(cli.inspect("web")["standin"]["pid"])
        terminal.type(b"once\r")
        terminal.until(b"got once")
        awaited(lambda: terminal.mode() != before)
        client.kill()
    # Neither read nor written to any more: what is typed next is the shell's.
    awaited(lambda: terminal.path not in open_in(standin))
    assert terminal.mode() == before
    if options:
        awaited(lambda: not cli.ps())
        return
    cli.ok("exec", "web", "touch", "/go")
    cli.await_line("web", "late")
    assert cli.inspect("web")["status"] == "running"
    terminal.silent()


def open_in(process: psutil.Process) -> list[str]:
    """What a process has open; nothing once it has ended."""
    try:
        return [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def in_a_shell(cli: Cli) -> Cli:
    """The command, run by a shell with job control that reads a line once it stops and then lets it go on."""
    shell = copy.copy(cli)
    shell.prefix = ("sh", "-mc", '"$@"; read line; echo "shell got $line"; fg', "sh")
    return shell


def test_a_stopped_client_leaves_the_terminal_to_the_shell_until_it_goes_on(
    pod: tuple[Cli, str], terminal: Terminal
) -> None:
    cli, container = pod
    script = "echo ready; while read line; do echo box got $line; done; exit 5"
    with on(terminal, in_a_shell(cli), "exec", "-i", container, "sh", "-c", script) as shell:
        terminal.until(b"ready")
        terminal.type(b"one\n")
        terminal.until(b"box got one")
        (client,) = psutil.Process(shell.pid).children()
        terminal.type(b"\x1a")
        awaited(lambda: client.status() == psutil.STATUS_STOPPED)
        terminal.type(b"two\n")
        terminal.until(b"shell got two")
        awaited(lambda: client.status() != psutil.STATUS_STOPPED)
        terminal.type(b"three\n")
        terminal.until(b"box got three")
        terminal.type(b"\x04")
        assert shell.wait(60) == 5


def test_a_client_that_is_stopped_gives_a_raw_terminal_back_and_takes_it_again(
    pod: tuple[Cli, str], terminal: Terminal
) -> None:
    cli, container = pod
    before = terminal.mode()
    with on(terminal, in_a_shell(cli), "exec", "-it", container, "sh") as shell:
        terminal.until(b"# ")
        (client,) = psutil.Process(shell.pid).children()
        client.send_signal(signal.SIGTSTP)
        awaited(lambda: client.status() == psutil.STATUS_STOPPED)
        assert terminal.mode() == before
        terminal.type(b"two\n")
        terminal.until(b"shell got two")
        awaited(lambda: terminal.mode() != before)
        terminal.type(b"echo $((2+3))x; exit 6\r")
        terminal.until(b"5x")
        assert shell.wait(60) == 6


def test_ctrl_c_before_the_container_is_there_gives_it_up(cli: Cli, box: str, terminal: Terminal) -> None:
    before = terminal.mode()
    with on(terminal, cli, "run", "-it", "--template", "off", box, "sh") as client:
        awaited(lambda: any("qemu-system" in name_of(process) for process in cli.processes()))
        terminal.type(b"\x03")
        assert client.wait(60) == 130
    assert terminal.mode() == before
    assert cli.leftovers() == []


def test_t_without_a_terminal_is_refused(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    result = cli("exec", "-it", container, "sh", stdin=b"")
    assert result.code == 125
    assert "not a terminal" in result.stderr
