"""What every test gets: an async runner with a deadline, and proof that no process survives it."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import time
from typing import TYPE_CHECKING, Any

import hypothesis
import psutil
import pytest

from tests.harness import evidence, groups
from tests.harness.nurseries import is_nursery
from tests.harness.parents import LASTING
from tests.harness.roots import prepared_data_root

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xdist.scheduler import LoadScopeScheduling

#: seconds an async test may take unless it is marked otherwise with ``@pytest.mark.deadline(seconds)``
DEADLINE = 10.0
PR_SET_CHILD_SUBREAPER = 36


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): how long an async test may take")
    # How long an example takes says something about the machine only.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    # Double-forked processes are reparented to us, so that `no_orphans` sees them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep the evidence of a failed test."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" and report.failed:
        report.sections += evidence.kept(getattr(item, "funcargs", {}).values())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return groups.scheduler(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    mark = pyfuncitem.get_closest_marker("deadline")
    seconds = float(mark.args[0]) if mark else DEADLINE
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await pyfuncitem.obj(**arguments)

    asyncio.run(bounded())
    return True


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


def _may_stay(process: psutil.Process) -> bool:
    """Whether it has ended, does so by itself, or is there for other tests too."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or process.pid in LASTING or is_nursery(process)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """Fail a test that leaves a process behind, and end that process."""
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    yield
    deadline = time.monotonic() + 5
    while True:
        left = [child for child in me.children(recursive=True) if child.pid not in before]
        alive = [child for child in left if child.is_running() and not _may_stay(child)]
        if not alive or time.monotonic() > deadline:
            break
        psutil.wait_procs(alive, timeout=0.2)
    described = []
    for child in alive:
        try:
            described.append(f"{child.pid} {' '.join(child.cmdline())}")
            child.kill()
        except psutil.NoSuchProcess:
            continue
    _reap()
    assert not described, f"left behind: {described}"


@pytest.fixture(scope="session")
def data_root() -> Iterator[Path]:
    """Images and containers of the tests alone, with the guest that the machine has, and a template."""
    with prepared_data_root() as directory:
        yield directory
