"""Scheduling policy and I/O priority, applied for real to processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent import hugepages, scheduling
from vmsandbox_agent.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()


def test_a_process_gets_its_policy_and_priority(sleeper: int) -> None:
    scheduling.apply({"scheduler": {"policy": "SCHED_BATCH", "nice": 7}}, sleeper)
    assert os.sched_getscheduler(sleeper) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, sleeper) == 7


def test_what_is_started_inherits_it_and_the_starter_keeps_its_own() -> None:
    process = {"scheduler": {"policy": "SCHED_BATCH", "nice": 5}, "ioPriority": {"class": "IOPRIO_CLASS_IDLE"}}
    before = os.nice(0)
    code = "import os; print(os.sched_getscheduler(0), os.nice(0))"
    said = scheduling.started(process, lambda: subprocess.check_output([sys.executable, "-S", "-c", code], text=True))
    assert said == f"{os.SCHED_BATCH} 5\n"
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert os.nice(0) == before


def test_what_a_fork_would_lose_is_given_afterwards(sleeper: int) -> None:
    process = {"scheduler": {"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"]}}
    assert scheduling.started(process, lambda: os.sched_getscheduler(0)) == os.SCHED_OTHER
    scheduling.complete(process, sleeper)
    assert os.sched_getscheduler(sleeper) == os.SCHED_BATCH | os.SCHED_RESET_ON_FORK


def test_an_error_of_the_start_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        scheduling.started({"scheduler": {"policy": "SCHED_OTHER"}}, fail)


@pytest.mark.parametrize("scheduler", [{"policy": "SCHED_NONE"}, {"policy": "SCHED_FIFO", "priority": 0}, {}])
def test_what_the_kernel_does_not_take_is_named(sleeper: int, scheduler: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"process\.scheduler"):
        scheduling.apply({"scheduler": scheduler or {"policy": None}}, sleeper)


def test_classes_and_levels_make_one_number() -> None:
    assert scheduling.io_priority({"class": "IOPRIO_CLASS_BE", "priority": 3}) == 2 << 13 | 3


def test_limits_of_huge_pages_let_the_kernel_make_them(tmp_path: Path) -> None:
    file = tmp_path / "hugepages-2048kB/nr_overcommit_hugepages"
    file.parent.mkdir()
    file.write_text("1\n")
    limits = [{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "?"}]
    hugepages.allow({"hugepageLimits": limits}, sys=tmp_path)
    assert file.read_text() == "3"


def test_huge_pages_of_a_size_that_the_kernel_does_not_have_are_named(tmp_path: Path) -> None:
    for name in ("hugepages-2048kB", "hugepages-1048576kB"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nr_overcommit_hugepages").touch()
    with pytest.raises(
        UnsupportedError, match=r"hugepageLimits' names pages of '3MB': the guest's kernel has 1GB, 2MB"
    ):
        hugepages.allow({"hugepageLimits": [{"pageSize": "3MB", "limit": 1 << 30}]}, sys=tmp_path)
