"""What a supervisor does where nothing else catches an error."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from vmsandbox.errors import EndingError, SandboxError, UnavailableError, UnsupportedError
from vmsandbox.supervisor import main, template
from vmsandbox_hypervisor.errors import AccelError

FOUNDING = main.Start()


class Service:
    """Whom the supervisor tells."""

    def __init__(self) -> None:
        self.told: list[SandboxError] = []
        self.sandbox: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def lost(self, error: SandboxError) -> None:
        self.told.append(error)


async def held(monkeypatch: pytest.MonkeyPatch, error: BaseException, start: main.Start = FOUNDING) -> SandboxError:
    async def fails(*_: object, **__: object) -> None:
        raise error

    service = Service()
    monkeypatch.setattr(main, "_pod", fails)
    await main._hold_pod(cast("Any", None), cast("Any", service), cast("Any", None), start=start)
    (told,) = service.told
    return told


async def test_an_error_that_nobody_foresaw_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    told = await held(monkeypatch, ExceptionGroup("in a group", [KeyError("x")]))
    assert str(told) == "internal error: KeyError: 'x'"
    assert "Traceback" in told.detail


async def test_an_error_of_ours_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UnavailableError("the machine is gone")
    assert await held(monkeypatch, ExceptionGroup("in a group", [error])) is error


async def test_who_asks_a_supervisor_that_finds_nothing_to_take_over_may_ask_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = UnavailableError("the machine is gone", detail="its last words")
    told = await held(monkeypatch, ExceptionGroup("in a group", [error]), main.Start(known=True))
    assert isinstance(told, EndingError)
    assert (str(told), told.detail) == (str(error), error.detail)


async def test_kvm_that_does_not_work_is_an_error_of_ours_before_templates_are_looked_at() -> None:
    class Hypervisor:
        async def probe_accel(self, accel: str) -> None:
            raise AccelError(f"{accel} does not work")

    class Config:
        accel = "kvm"

    with pytest.raises(UnsupportedError, match="kvm does not work"):
        await template.key_of(cast("Any", Hypervisor()), cast("Any", Config()), layer_mib=1)
