"""Guests are told the time over a connection that delays what it carries."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import struct
import time
from typing import Any, cast

import pytest

from vmsandbox.supervisor import clock

MS = 1_000_000


class Guest:
    """A clock that is `ahead` of the host's, and a connection that takes its time in both directions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ahead: int = 0, delays: Any = lambda: MS) -> None:
        self.now = 1_700_000_000_000 * MS
        self.ahead = ahead
        self.delays = delays
        self.shifts: list[int] = []
        self.readings = 0
        self.read = asyncio.Event()
        monkeypatch.setattr(clock.time, "time_ns", lambda: self.now)
        monkeypatch.setattr(clock.time, "monotonic_ns", lambda: self.now)

    async def shift_time(self, shift_ns: int) -> int:
        self.now += self.delays()
        self.ahead += shift_ns
        self.shifts += [shift_ns] if shift_ns else []
        shown = self.now + self.ahead
        self.now += self.delays()
        return shown

    async def read_time(self) -> int:
        self.readings += 1
        self.read.set()
        return await self.shift_time(0)

    async def set(self) -> clock.Ahead:
        """As the message that makes the sandbox does it."""
        sent = self.now
        self.now += self.delays()
        self.ahead = sent - self.now
        shown = self.now + self.ahead
        self.now += self.delays()
        return clock.after_setting(shown)


async def settled(guest: Guest) -> None:
    await clock.settle(cast("Any", guest), await guest.set())


async def test_a_clock_that_was_told_soon_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, delays=lambda: 5 * MS)
    await settled(guest)
    assert (guest.readings, guest.shifts) == (0, [])
    assert abs(guest.ahead) <= clock.PRECISION_NS


@pytest.mark.parametrize("seed", range(50))
async def test_a_clock_is_right_however_late_it_was_told(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    source = random.Random(seed)
    guest = Guest(monkeypatch, delays=lambda: int(source.choice((2, 2, 10, 300, 2000)) * MS * source.random()))
    await settled(guest)
    assert abs(guest.ahead) <= 50 * MS, guest.shifts


async def test_a_clock_that_may_be_right_is_not_made_worse_by_a_slow_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = iter([0, 400 * MS] * 20)
    guest = Guest(monkeypatch, delays=lambda: next(slow))
    await clock.correct(cast("Any", guest))
    assert (guest.readings, guest.shifts) == (1 + clock.READINGS, [])


@pytest.mark.parametrize("ahead", [-3_600_000 * MS, -200 * MS, 200 * MS, 3_600_000 * MS])
async def test_a_clock_that_is_wrong_is_corrected(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    guest = Guest(monkeypatch, ahead=ahead)
    await clock.correct(cast("Any", guest))
    assert len(guest.shifts) == 1
    assert abs(guest.ahead) <= MS


async def test_readings_from_before_and_after_a_step_are_not_mixed() -> None:
    assert clock.Ahead(-5, 5).narrowed(clock.Ahead(95, 120)) == clock.Ahead(95, 120)


async def test_a_step_of_the_host_s_clock_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch)
    monkeypatch.undo()
    keeping = asyncio.create_task(clock.keep(cast("Any", guest), at_once=True))
    await guest.read.wait()
    guest.read.clear()
    step_the_clock_by_a_nanosecond()
    await guest.read.wait()
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


def step_the_clock_by_a_nanosecond() -> None:
    adj_setoffset, adj_nano = 0x0100, 0x2000
    timex = bytearray(208)
    struct.pack_into("I", timex, 0, adj_setoffset | adj_nano)
    struct.pack_into("2q", timex, 72, 0, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.clock_adjtime(time.CLOCK_REALTIME, (ctypes.c_char * 208).from_buffer(timex)) >= 0
