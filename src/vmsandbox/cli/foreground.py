"""A client in front of a process: what becomes of the signals it gets, and when the stand-in may read the terminal.

Before the process is there a signal gives it up; afterwards the stand-in gets them all.  The stand-in reads a terminal
only while its client has it: it is in a session of its own, where no kernel would hold it back as it holds back a
client that is stopped or in the background.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

from vmsandbox.cli import client, terminal
from vmsandbox.errors import UnheardError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from vmsandbox.plainsocket import Socket

#: what asks the client itself to end while there is nothing that it could be passed on to
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Not forwarded: what nobody can catch, what the kernel raises for our own doings or mistakes, and job control.
KEPT = frozenset(
    {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGCHLD,
        signal.SIGPIPE,
        signal.SIGTSTP,
        signal.SIGCONT,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)


class Asking:
    """A request that makes something, and may be given up until it is answered."""

    def __init__(self, sock: Socket) -> None:
        #: the signal that gave it up; 0: none did
        self.given_up = 0
        self._sock = sock
        self._sent = False

    def give_up(self, number: int) -> None:
        """Have the supervisor make no more of it than it has; its answer comes all the same."""
        self.given_up = number
        if self._sent:
            try:
                client.send(self._sock, {"give_up": True})
            except UnheardError:
                return

    def request(self, message: dict[str, Any]) -> None:
        """Send the request and wait for its answer."""
        client.send(self._sock, message)
        self._sent = True
        if self.given_up:
            self.give_up(self.given_up)
        client.answer(self._sock)


@contextmanager
def until_answered(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with a signal that asks us to end; a second one of its kind ends us at once.

    What is ignored stays ignored.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        act(number)

    with _handling(end, [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]):
        yield


@contextmanager
def forwarding(pid: int) -> Iterator[None]:
    """Pass the signals we get on to the stand-in for the duration of the block."""

    def forward(number: int, _frame: object) -> None:
        _tell(pid, number)

    with _handling(forward, signal.valid_signals() - KEPT):
        yield


@contextmanager
def attending(pid: int, mode: list[Any] | None, *, reads: bool) -> Iterator[None]:
    """Be in front of a process for the block: its stand-in gets our signals and, if it `reads`, the terminal we have.

    With a `mode`, which the terminal on stdin has outside, it is raw meanwhile.
    """

    def suspend(_number: int, _frame: object) -> None:
        _tell(pid, signal.SIGTSTP)
        terminal.give_back(mode)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, suspend)
        resume()

    def resume(*_: object) -> None:
        if reads and not terminal.is_ours():
            # What the kernel does to whoever reads in the background; who brings us to the foreground lets us go on.
            os.kill(0, signal.SIGTTIN)
        if not reads or terminal.is_ours():
            terminal.make_raw(mode)
            _tell(pid, signal.SIGCONT)

    with forwarding(pid), _handling(suspend, [signal.SIGTSTP]), _handling(resume, [signal.SIGCONT]):
        try:
            resume()
            yield
        finally:
            terminal.give_back(mode)


@contextmanager
def held_back() -> Iterator[None]:
    """Have signals wait; for ever in what is forked meanwhile, until it can take them and says so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: Callable[[int, object], None], numbers: Iterable[int]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _tell(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
