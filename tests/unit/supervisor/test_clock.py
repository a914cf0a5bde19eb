"""Guests are told the time over a connection that delays what it carries."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import time
from pathlib import Path
from typing import Any, cast

import pytest

from vmsandbox.errors import UnavailableError
from vmsandbox.supervisor import clock

MS = 1_000_000
#: flags of timerfd_settime(2)
ABSTIME, CANCEL_ON_SET = 1, 2


class Guest:
    """A clock that is `ahead` of the host's, and a connection that takes its time in both directions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ahead: int = 0, delays: Any = lambda: MS) -> None:
        self.now = 1_700_000_000_000 * MS
        self.ahead = ahead
        self.delays = delays
        self.shifts: list[int] = []
        self.readings = 0
        self.read = asyncio.Event()
        self.shifted = asyncio.Event()
        monkeypatch.setattr(clock.time, "time_ns", lambda: self.now)
        monkeypatch.setattr(clock.time, "monotonic_ns", lambda: self.now)

    async def shift_time(self, shift_ns: int) -> int:
        self.now += self.delays()
        self.ahead += shift_ns
        if shift_ns:
            self.shifts.append(shift_ns)
            self.shifted.set()
        shown = self.now + self.ahead
        self.now += self.delays()
        return shown

    async def read_time(self) -> int:
        self.readings += 1
        self.read.set()
        return await self.shift_time(0)

    async def set(self, lead: int) -> clock.Ahead:
        """As the message that makes the sandbox does it."""
        sent = self.now
        self.now += self.delays()
        self.ahead = sent + lead - self.now
        shown = self.now + self.ahead
        self.now += self.delays()
        return clock.after_setting(shown, lead=lead)


async def settled(guest: Guest, lead: int) -> None:
    await clock.settle(cast("Any", guest), await guest.set(lead))


@pytest.mark.parametrize(("lead", "delay"), [(0, 1), (0, 14), (clock.LEAD_NS, 1), (clock.LEAD_NS, 22)])
async def test_a_clock_that_was_told_soon_is_left_alone(monkeypatch: pytest.MonkeyPatch, lead: int, delay: int) -> None:
    guest = Guest(monkeypatch, delays=lambda: delay * MS)
    await settled(guest, lead)
    assert (guest.readings, guest.shifts) == (0, [])
    assert abs(guest.ahead) <= clock.PRECISION_NS


@pytest.mark.parametrize("lead", [0, clock.LEAD_NS])
@pytest.mark.parametrize("seed", range(50))
async def test_a_clock_is_right_however_late_it_was_told(monkeypatch: pytest.MonkeyPatch, seed: int, lead: int) -> None:
    source = random.Random(seed)
    guest = Guest(monkeypatch, delays=lambda: int(source.choice((2, 2, 10, 300, 2000)) * MS * source.random()))
    await settled(guest, lead)
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


def test_the_kernel_is_asked_to_tell_when_the_clock_is_set() -> None:
    with clock._timer(60) as fd:
        told = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        assert (int(told["clockid"]), int(told["settime flags"], 8)) == (time.CLOCK_REALTIME, ABSTIME | CANCEL_ON_SET)
        assert not select.select([fd], [], [], 0)[0]


def test_the_timer_ends_by_itself_without_a_clock_being_set() -> None:
    with clock._timer(0.05) as fd:
        assert select.select([fd], [], [], 60)[0] == [fd]


@pytest.mark.parametrize("jump", [-86400 * 365, -1, 1, 3600, 86400 * 365 * 10])
async def test_a_jump_of_the_host_s_clock_is_followed_at_once(monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    guest = Guest(monkeypatch)
    kernel = os.eventfd(0, os.EFD_NONBLOCK)
    monkeypatch.setattr(clock, "_timer", lambda _seconds: contextlib.nullcontext(kernel))
    keeping = asyncio.create_task(clock.keep(cast("Any", guest), at_once=True))
    await guest.read.wait()
    assert guest.shifts == []
    # The guest's clock goes on as it did: the same jump seen from the host is one of the guest the other way.
    guest.now += jump * 1000 * MS
    guest.ahead -= jump * 1000 * MS
    os.eventfd_write(kernel, 1)
    await guest.shifted.wait()
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    os.close(kernel)
    assert abs(guest.ahead) <= clock.PRECISION_NS
    assert guest.shifts == [pytest.approx(jump * 1000 * MS, abs=2 * MS)]


async def test_a_jump_between_two_readings_is_no_reason_to_believe_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, delays=lambda: 20 * MS)
    jump = 3600 * 1000 * MS

    async def read_and_jump() -> int:
        if guest.readings == 1:
            guest.now += jump
            guest.ahead -= jump
        return await read()

    read = guest.read_time
    monkeypatch.setattr(guest, "read_time", read_and_jump)
    await clock.correct(cast("Any", guest))
    assert abs(guest.ahead) <= 50 * MS


# ---------------------------------------------------------------- how fast it goes


async def passed(guest: Guest, *, seconds: float, pace: float) -> None:
    async with clock.checked(cast("Any", guest)):
        took = int(seconds * 1000 * MS)
        guest.now += took
        guest.ahead += int(took * (pace - 1))


@pytest.mark.parametrize("pace", [8.08, 1.5, 1.1, 0.9, 0.3])
async def test_a_clock_of_another_speed_is_found(monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    guest = Guest(monkeypatch, ahead=-3600_000 * MS, delays=lambda: 20 * MS)
    with pytest.raises(UnavailableError, match=r"goes \d\.\d\d times as fast as the host's"):
        await passed(guest, seconds=4, pace=pace)


@pytest.mark.parametrize(("pace", "delay"), [(1.0, 1), (1.01, 20), (0.99, 20), (1.1, 400)])
async def test_a_clock_that_may_be_right_is_taken(monkeypatch: pytest.MonkeyPatch, pace: float, delay: int) -> None:
    await passed(Guest(monkeypatch, delays=lambda: delay * MS), seconds=4, pace=pace)
