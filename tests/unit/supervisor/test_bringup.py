"""A machine kept ready is a pod's, or it is ended; one whose agent does not answer says what is known of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn, cast

import pytest

from vmsandbox.errors import NotFoundError, SandboxError, TimedOutError, UnavailableError
from vmsandbox.supervisor import bringup
from vmsandbox.supervisor.sandbox import Sandbox, SandboxSpec, Surroundings
from vmsandbox_hypervisor.api import Kernel, Memory, VmConfig
from vmsandbox_hypervisor.testing import FakeHypervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from vmsandbox_hypervisor.testing import FakeVm

SPEC = SandboxSpec(id="ab" * 32)


class Spare:
    def __init__(self, *, fits: bool = True) -> None:
        self.fits = fits
        self.closed = False

    def suits(self, _spec: object, _config: object) -> bool:
        return self.fits

    async def close(self) -> None:
        self.closed = True


async def suiting(spare: Spare) -> object:
    return await bringup._suiting(cast("Surroundings", None), SPEC, cast("Any", spare))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bringup, "vm_config_for", lambda _around, _spec: None)


@pytest.mark.usefixtures("described")
async def test_one_that_suits_is_taken() -> None:
    spare = Spare()
    assert await suiting(spare) is spare
    assert not spare.closed


@pytest.mark.usefixtures("described")
async def test_one_that_does_not_suit_is_ended() -> None:
    spare = Spare(fits=False)
    assert await suiting(spare) is None
    assert spare.closed


async def test_one_is_ended_where_nobody_can_tell_what_machine_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def removed_meanwhile(_around: object, _spec: object) -> None:
        raise NotFoundError("no guest")

    monkeypatch.setattr(bringup, "vm_config_for", removed_meanwhile)
    spare = Spare()
    with pytest.raises(NotFoundError):
        await suiting(spare)
    assert spare.closed


class Pod:
    """As much of a pod as waiting for its agent asks for."""

    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    async def watch_vm(self) -> None:
        await Sandbox.watch_vm(cast("Sandbox", self))


async def failing(tmp_path: Path, call: Awaitable[Any], *, happening: Callable[[FakeVm], None]) -> SandboxError:
    config = VmConfig(name="p", directory=tmp_path, kernel=Kernel(path=tmp_path), memory=Memory(size_mib=128))
    async with FakeHypervisor().running(config) as vm:
        happening(vm)
        with pytest.raises(SandboxError) as caught:
            await bringup._unless_vm_ends(cast("Any", Pod(vm)), call)
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
