"""Where an answer of the agent's is lost, the guest is asked what became of the request."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vmsandbox.errors import InvalidStateError, TimedOutError, UnavailableError
from vmsandbox.supervisor import agreement
from vmsandbox_protocol import agent_pb2 as pb

GONE = UnavailableError("the connection to the agent is gone: reset")
LATE = TimedOutError("the agent has not answered in time")


def row(status: str, *, started: bool, name: str = "one") -> pb.ContainerRow:
    processes = [pb.ProcessState(exec_id="", started=started), pb.ProcessState(exec_id="x", started=True)]
    return pb.ContainerRow(container_id=name, status=status, processes=processes)


class Guest:
    """One with a container that `does` what it is asked; the connection fails with one of the `errors` each time."""

    def __init__(self, *errors: Exception | None, does: bool = True, tells: bool = True) -> None:
        self.errors = list(errors)
        self.does = does
        self.tells = tells
        self.state = "created"
        self.asked = 0

    async def start(self) -> None:
        self.asked += 1
        if self.state != "created":
            raise InvalidStateError("container 'one'", state=self.state, wanted="start")
        error = self.errors.pop(0) if self.errors else None
        if error is None or self.does:
            self.state = "running"
        if error is not None:
            raise error

    async def containers(self) -> list[pb.ContainerRow]:
        if not self.tells:
            raise UnavailableError("still gone")
        return [row("running", started=True, name="other"), row(self.state, started=self.state != "created")]


class Container:
    def __init__(self, status: str = "created", **document: Any) -> None:
        self.id = "one"
        self.document: dict[str, Any] = {"status": status, **document}
        self.notes = 0

    @property
    def status(self) -> str:
        return str(self.document["status"])

    def note(self) -> None:
        self.notes += 1


async def start(guest: Guest) -> None:
    await agreement.changed(cast("Any", guest), cast("Any", Container()), guest.start, into="started")


async def test_what_was_done_is_not_asked_for_again() -> None:
    for error in (GONE, LATE):
        guest = Guest(error)
        await start(guest)
        assert (guest.asked, guest.state) == (1, "running")


async def test_a_program_that_has_ended_meanwhile_was_started() -> None:
    class Short(Guest):
        async def containers(self) -> list[pb.ContainerRow]:
            return [row("stopped", started=True)]

    await start(Short(GONE))


async def test_what_was_not_done_is_asked_for_once_more() -> None:
    guest = Guest(GONE, does=False)
    await start(guest)
    assert (guest.asked, guest.state) == (2, "running")
    with pytest.raises(UnavailableError, match="reset"):
        await start(Guest(GONE, GONE, does=False))


async def test_what_takes_too_long_is_not_asked_for_while_it_may_be_under_way() -> None:
    guest = Guest(LATE, does=False)
    with pytest.raises(TimedOutError):
        await start(guest)
    assert guest.asked == 1


async def test_who_cannot_find_out_says_why_it_had_to() -> None:
    with pytest.raises(UnavailableError, match="reset"):
        await start(Guest(GONE, tells=False))


async def test_a_refusal_is_an_answer() -> None:
    guest = Guest()
    guest.state = "stopped"
    with pytest.raises(InvalidStateError):
        await start(guest)


@pytest.mark.parametrize(
    ("known", "status", "started", "after"),
    [
        ("created", "running", True, "running"),
        ("created", "created", False, "created"),
        ("running", "paused", True, "paused"),
        ("paused", "running", True, "running"),
        ("running", "stopped", True, "running"),  # until its stand-in has all that it printed
        ("stopped", "running", True, "stopped"),
        ("created", "nonsense", False, "created"),
    ],
)
def test_who_takes_over_believes_the_guest(known: str, status: str, started: bool, after: str) -> None:
    container = Container(known)
    agreement.take(cast("Any", container), row(status, started=started))
    assert container.status == after
    assert ("started" in container.document) == started
    assert container.notes == (1 if started or known != after else 0)


def test_what_is_known_already_is_not_written_again() -> None:
    container = Container("running", started=5.0)
    agreement.take(cast("Any", container), row("running", started=True))
    assert container.document["started"] == 5.0
    assert container.notes == 0
