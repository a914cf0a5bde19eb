"""Exits that the agent reports, beside the stand-ins that hear of them with the last of the output."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox import records
from vmsandbox.errors import InvalidStateError
from vmsandbox.supervisor import ending, execution
from vmsandbox.supervisor.process import Process
from vmsandbox.supervisor.service import Service
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

ID = "aa"
EXITED = pb.Event(container_id=ID, exited=pb.ExitStatus(code=7, time_ns=1))


@pytest.fixture
def standin() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, as a stand-in that has not come to attach itself."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        yield child
        child.kill()


class Container:
    def __init__(self, standin: subprocess.Popen[bytes]) -> None:
        self.id = ID
        self.status = "created"
        self.starting = False
        self.document: dict[str, Any] = {}
        self.lock = asyncio.Lock()
        self.released = asyncio.Event()
        known = {"pid": standin.pid, "start_time": records.start_time(standin.pid)}
        self.init = Process(ID, "", terminal=False, standin=known)
        self.init.settled.set()
        self.execs: dict[str, Process] = {}

    def process(self, _exec_id: str) -> Process:
        return self.init

    def ended(self, _status: object) -> None:
        self.status = "stopped"

    async def release(self) -> None:
        pass

    def forget(self) -> None:
        pass


class Sandbox:
    """One whose agent has seen the container end, and says so to whoever wants to end it."""

    class Spec:
        implicit = False

    def __init__(self) -> None:
        self.spec = self.Spec
        self.agent = self
        self.vm = self
        self.pid = 1
        self.ended = asyncio.Event()

    async def signal(self, *_: object, **__: object) -> None:
        raise InvalidStateError("container 'aa'", state="stopped", wanted="signal")


async def test_what_was_reported_before_its_stand_in_died_has_ended_and_can_be_deleted(
    standin: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "KILL_TIMEOUT", 5.0)
    async with asyncio.TaskGroup() as tasks:
        service = Service(cast("Any", None), tasks)
        container = Container(standin)
        service.containers[ID] = cast("Any", container)
        service.wanted.set_result(cast("Any", None))
        service.ready(cast("Any", Sandbox()))
        execution._event(service, EXITED)
        assert not container.init.exited.is_set()  # a stand-in that lives may still have output to take
        standin.kill()
        execution.watch(service, container.init)
        await ending.delete(service, {"container": ID, "force": True})
    assert container.init.exit is not None
    assert container.init.exit.code == 7
    assert service.containers == {}


async def test_what_is_reported_after_its_stand_in_died_has_ended(standin: subprocess.Popen[bytes]) -> None:
    async with asyncio.TaskGroup() as tasks:
        service = Service(cast("Any", None), tasks)
        container = Container(standin)
        service.containers[ID] = cast("Any", container)
        service.ready(cast("Any", Sandbox()))
        standin.kill()
        execution.watch(service, container.init)
        await container.init.delivered.wait()
        execution._event(service, EXITED)
        assert container.init.exited.is_set()
