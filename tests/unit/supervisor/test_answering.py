"""A machine whose agent does not answer says what is known of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from vmsandbox.errors import SandboxError, TimedOutError, UnavailableError
from vmsandbox.supervisor.answering import first_answer
from vmsandbox_hypervisor.api import Kernel, Memory, VmConfig
from vmsandbox_hypervisor.testing import FakeHypervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from vmsandbox_hypervisor.testing import FakeVm


async def test_what_the_agent_answers_is_answered(tmp_path: Path) -> None:
    async def at_once() -> str:
        return "here"

    config = VmConfig(name="p", directory=tmp_path, kernel=Kernel(path=tmp_path), memory=Memory(size_mib=128))
    async with FakeHypervisor().running(config) as vm:
        assert await first_answer(vm, at_once()) == "here"


async def failing(tmp_path: Path, call: Awaitable[Any], *, happening: Callable[[FakeVm], None]) -> SandboxError:
    config = VmConfig(name="p", directory=tmp_path, kernel=Kernel(path=tmp_path), memory=Memory(size_mib=128))
    async with FakeHypervisor().running(config) as vm:
        happening(vm)
        with pytest.raises(SandboxError) as caught:
            await first_answer(vm, call)
    return caught.value


async def late() -> NoReturn:
    raise TimedOutError("the agent did not answer")


REACHED = "reached: running after 0.0 s"


async def test_an_agent_that_does_not_answer_is_told_with_what_was_reached_and_what_the_console_shows(
    tmp_path: Path,
) -> None:
    error = await failing(tmp_path, late(), happening=lambda vm: None)
    assert f"within 60 s ({REACHED}; the console is empty): 'hypervisor.boot_timeout'" in str(error)
    assert isinstance(error, TimedOutError)
    assert error.detail
    error = await failing(tmp_path, late(), happening=lambda vm: vm.print("one\nno root\n\n"))
    assert f"({REACHED}; last on the console: no root)" in str(error)


async def test_a_machine_that_ends_before_its_agent_answers_is_told_with_what_was_reached(tmp_path: Path) -> None:
    error = await failing(tmp_path, asyncio.Event().wait(), happening=lambda vm: vm.die(1, "its guest reset itself"))
    assert str(error).endswith(f"ended with status 1: its guest reset itself ({REACHED})")
    assert isinstance(error, UnavailableError)


async def test_a_guest_that_switches_itself_off_is_told_with_its_last_words(tmp_path: Path) -> None:
    def happening(vm: FakeVm) -> None:
        vm.print("cannot serve\n")
        vm.guest_powers_off()

    error = await failing(tmp_path, asyncio.Event().wait(), happening=happening)
    assert str(error).endswith(f"exit status 0) ({REACHED}; last on the console: cannot serve)")
    assert "cannot serve" in error.detail
