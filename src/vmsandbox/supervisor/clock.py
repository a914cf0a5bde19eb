"""A guest's clock: it shows the host's time before any container runs, and goes on doing so.

A time that is sent is old when it arrives, by up to as much as the exchange took.  An emulated guest is told one that
is a little ahead, because it is never as quick.  Where that leaves much doubt the guest's clock is read, and read again
until the readings together leave little, and then shifted by what it is off: for a shift it is all the same how long it
is on its way.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox.errors import SandboxError, UnavailableError
from vmsandbox_hypervisor.aio import readable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vmsandbox.guest.client import AgentClient

log = logging.getLogger(__name__)

#: nanoseconds that a guest's clock may be off after it was set
PRECISION_NS = 30_000_000
#: nanoseconds that a message is on its way to an emulated guest, at least
LEAD_NS = 15_000_000
#: more readings are not made to be surer
READINGS = 6
#: what part of the time a guest's clock may gain or lose
TOLERANCE = 0.05
#: seconds between two looks at a guest's clock: it follows the host's but does not know how that is slewed
INTERVAL = 60

#: flags of timerfd_settime(2)
_ABSTIME = 1
_CANCEL_ON_SET = 2


class Ahead(NamedTuple):
    """Between how many nanoseconds the guest's clock is ahead of the host's."""

    low: int
    high: int

    @classmethod
    def of(cls, guest: int, *, sent: int, came: int) -> Ahead:
        """From what the guest's clock showed at some moment between two of the host's."""
        return cls(guest - came, guest - sent)

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2

    @property
    def doubt(self) -> int:
        return (self.high - self.low) // 2

    @property
    def most(self) -> int:
        return max(abs(self.low), abs(self.high))

    def narrowed(self, other: Ahead) -> Ahead:
        """What both say; only the later one if a clock was set between them."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return Ahead(low, high) if low <= high else other


def after_setting(guest: int, *, lead: int) -> Ahead:
    """What is known of a clock that was set to a time on its way, and showed `guest` in the answer that just came.

    The time was as many nanoseconds ahead of when it was sent as `lead` says.
    """
    return Ahead(min(lead, guest - time.time_ns()), lead)


async def settle(agent: AgentClient, known: Ahead) -> None:
    """Have a guest's clock that was set just now, of which so much is `known`, show the host's time."""
    ahead = known if known.most <= PRECISION_NS else await _narrowed(agent, known)
    log.debug("the guest's clock may be %.1f ms off, known before to %.1f ms", ahead.most / 1e6, known.doubt / 1e6)
    if ahead.most > PRECISION_NS:
        await _shift(agent, -ahead.middle)


async def correct(agent: AgentClient) -> None:
    """Shift a clock that may be right if it is certainly wrong: a doubt alone is no reason."""
    ahead = await _narrowed(agent, await _reading(agent))
    if not ahead.low <= 0 <= ahead.high:
        await _shift(agent, -ahead.middle)


async def _narrowed(agent: AgentClient, ahead: Ahead) -> Ahead:
    for _ in range(READINGS):
        if ahead.doubt <= PRECISION_NS // 2:
            break
        ahead = ahead.narrowed(await _reading(agent))
    return ahead


@asynccontextmanager
async def checked(agent: AgentClient) -> AsyncIterator[None]:
    """A block of some seconds in which a guest's clock has to go as fast as the host's.

    Raises UnavailableError behind it if it certainly did not: a kernel that measured its processor's frequency while a
    busy host let it wait is wrong for good, in all it does by the clock.
    """
    began, first = time.monotonic_ns(), await _reading(agent)
    yield
    last = await _reading(agent)
    took = time.monotonic_ns() - began
    gained = Ahead(last.low - first.high, last.high - first.low)
    if gained.low > took * TOLERANCE or gained.high < -took * TOLERANCE:
        raise UnavailableError(
            f"the guest's clock goes {(took + gained.middle) / took:.2f} times as fast as the host's: "
            "its kernel measured the processor while the host was busy; try again"
        )


async def _shift(agent: AgentClient, shift_ns: int) -> None:
    await agent.shift_time(shift_ns)
    log.debug("the guest's clock was shifted by %.1f ms", shift_ns / 1e6)


async def _reading(agent: AgentClient) -> Ahead:
    sent, began = time.time_ns(), time.monotonic_ns()
    guest = await agent.read_time()
    return Ahead.of(guest, sent=sent, came=sent + time.monotonic_ns() - began)


async def keep(agent: AgentClient, *, at_once: bool) -> None:
    """Look at the guest's clock now and then, and as soon as somebody sets the host's."""
    due = at_once
    while True:
        # Made before the look, so that no setting of the clock falls between two of them.
        with _timer(INTERVAL) as fd:
            if due:
                try:
                    await correct(agent)
                except SandboxError as error:
                    log.info("the guest was not told the time: %s", error)
            due = True
            await readable(fd)


@contextmanager
def _timer(seconds: float) -> Iterator[int]:
    """A descriptor that becomes readable after so many seconds, or when the clock is set.

    It ends at a time of day: that is what the kernel lets the setting of the clock cancel.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise _failed(ctypes.get_errno())
    try:
        whole, rest = divmod(time.time_ns() + int(seconds * 1e9), 10**9)
        end = struct.pack("4q", 0, 0, whole, rest)
        # Cancelled while it is set: it is set all the same.
        if libc.timerfd_settime(fd, _ABSTIME | _CANCEL_ON_SET, end, None) and ctypes.get_errno() != errno.ECANCELED:
            raise _failed(ctypes.get_errno())
        yield fd
    finally:
        os.close(fd)


def _failed(code: int) -> UnavailableError:
    return UnavailableError(f"cannot make a timer: {os.strerror(code)}")
