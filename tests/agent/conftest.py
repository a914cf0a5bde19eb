"""An agent on this machine, and one that is PID 1 of a virtual machine.

What several tests share lives in an event loop of its own, and tests that use it run in that loop.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from tests.agent import vm
from tests.agent.loops import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an async test in the loop in which the agent lives that it uses."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    loops = [loop for value in arguments.values() if isinstance(loop := getattr(value, "loop", None), Loop)]
    if not loops or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    mark = pyfuncitem.get_closest_marker("deadline")
    loops[0].run(pyfuncitem.obj(**arguments), timeout=float(mark.args[0]) if mark else 60.0)
    return True


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path, for sockets below it."""
    return tmp_path_factory.mktemp("a")


@pytest.fixture(scope="package")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vm.VmAgent]:
    """A virtual machine that tests share; they remove their containers."""
    with Loop() as loop, loop.entered(vm.VmAgent.booted(tmp_path_factory.mktemp("g"))) as agent:
        agent.loop = loop
        yield agent
