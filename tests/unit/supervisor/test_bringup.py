"""A machine that was kept ready is a pod's, or it is ended."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vmsandbox.errors import NotFoundError
from vmsandbox.supervisor import bringup
from vmsandbox.supervisor.sandbox import SandboxSpec, Surroundings

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
