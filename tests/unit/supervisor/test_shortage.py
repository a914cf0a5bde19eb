"""A supervisor without descriptors takes nothing for gone that it cannot look at, and takes clients in all the same."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from tests.harness.descriptors import exhausted
from vmsandbox import machines, records
from vmsandbox.errors import refused
from vmsandbox.supervisor import process
from vmsandbox.supervisor.process import Process
from vmsandbox.supervisor.reserve import Reserve

if TYPE_CHECKING:
    from pathlib import Path


def test_what_cannot_be_looked_at_is_not_gone() -> None:
    pid = os.getpid()
    with exhausted():
        for looked in (records.start_time, machines.command_line):
            with pytest.raises(OSError, match="Too many open files"):
                looked(pid)
    assert records.start_time(pid)
    assert machines.command_line(pid)


def test_a_stand_in_that_cannot_be_looked_at_counts_as_there() -> None:
    started = records.start_time(os.getpid())
    one = Process("c", "", terminal=False, standin={"pid": os.getpid(), "start_time": started})
    with exhausted():
        assert one.has_standin()


async def test_a_stand_in_that_there_is_no_descriptor_for_is_watched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SHORTAGE_PAUSE", 0.01)
    standin = await asyncio.create_subprocess_exec("sleep", "1000")
    identity = {"pid": standin.pid, "start_time": records.start_time(standin.pid)}
    one = Process("c", "", terminal=False, standin=identity)
    alive = []

    async def died(_process: Process) -> None:
        alive.append(records.is_alive(identity["pid"], identity["start_time"]))

    with exhausted():
        watching = asyncio.create_task(one.watch_standin(died))
        await asyncio.sleep(0)  # as far as it comes
        assert not one.delivered.is_set()
    standin.kill()
    await watching
    assert alive == [False]
    await standin.wait()


def test_what_is_kept_back_is_there_for_one_after_the_other(tmp_path: Path) -> None:
    reserve = Reserve(2)
    with exhausted():
        reserve.yield_one()
        first = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(OSError, match="Too many open files"):
            os.open(tmp_path, os.O_RDONLY)
        reserve.yield_one()
        os.close(os.open(tmp_path, os.O_RDONLY))
        os.close(first)
        reserve.refill()
        with pytest.raises(OSError, match="Too many open files"):
            os.open(tmp_path, os.O_RDONLY)
    reserve.close()


def test_what_is_refused_for_want_of_room_says_what_makes_some() -> None:
    with exhausted(), pytest.raises(OSError, match="Too many") as caught:
        os.open("/", os.O_RDONLY)
    said = refused(caught.value, wanted="look")
    assert str(said) == "cannot look: '/': too many open files: raise the limit of open files (ulimit -n)"
