"""Connections that break, and supervisors that die, between a deed and the news of it: no verb says a wrong thing."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.harness.bundles import SANDBOX
from tests.harness.losing import losing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.harness.bundles import Runtime
    from tests.harness.losing import Lost

#: says that it runs, what signals it gets, and how it ends
TALKING = 'trap "echo usr1" USR1; trap "echo term; exit 7" TERM; echo up; while :; do sleep 100000 & wait; done'


class Told:
    """A container's output, and the control socket of its pod."""

    def __init__(self, runtime: Runtime, name: str, bundle: Path) -> None:
        self.output = bundle / "out"
        with self.output.open("wb") as stdout:
            self.pid = runtime.create(name, bundle, stdout=stdout)
        (self.control,) = runtime.root.glob("s/*/control.sock")
        self.runtime = runtime
        self.name = name

    def lines(self) -> list[str]:
        return self.output.read_text().split()

    @property
    def document(self) -> Path:
        return self.control.parent / "containers" / f"{self.name}.json"

    @contextmanager
    def losing(
        self, verb: str, lost: Lost, *, killing: bool = False, forgetting: tuple[str, ...] = ()
    ) -> Iterator[None]:
        """Lose a request or an answer; with `killing` the supervisor dies as well.

        What it is `forgetting` it has not come to write down: members of the container's document, and that it is
        anything but created.
        """
        supervisor = self.runtime.supervisor()
        before = json.loads(self.document.read_text())["status"]

        def kill() -> None:
            if not killing:
                return
            if forgetting:
                os.kill(self.pid, signal.SIGSTOP)  # the stand-in would have another supervisor at once
            supervisor.kill()
            psutil.wait_procs([supervisor])
            if forgetting:
                document = json.loads(self.document.read_text())
                document["status"] = before
                for member in forgetting:
                    document.pop(member, None)
                self.document.write_text(json.dumps(document))

        try:
            with losing(self.control, verb, lost, then=kill):
                yield
        finally:
            if forgetting:
                os.kill(self.pid, signal.SIGCONT)


FAULTS: dict[str, dict[str, Any]] = {
    "the request is lost": {"lost": "request"},
    "the answer is lost": {"lost": "answer"},
    "the supervisor dies before it is asked": {"lost": "request", "killing": True},
    "the supervisor dies when all is done": {"lost": "answer", "killing": True},
    "the supervisor dies before it has written it down": {
        "lost": "answer",
        "killing": True,
        "forgetting": ("started",),
    },
}


@pytest.fixture
def told(runtime: Runtime, box_rootfs: Path) -> Callable[..., Told]:
    def made(*args: str) -> Told:
        return Told(runtime, "one", runtime.bundle("one", box_rootfs, *args))

    return made


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_life_in_which_every_answer_is_lost(runtime: Runtime, told: Callable[..., Told], fault: str) -> None:
    one, what = told("sh", "-c", TALKING), FAULTS[fault]
    with one.losing("start", **what):
        runtime.ok("start", "one")
    assert runtime.state("one")["status"] == "running"
    assert runtime.refused("start", "one") == "cannot start an already running container"
    with one.losing("pause", **what):
        runtime.ok("pause", "one")
    assert runtime.state("one")["status"] == "paused"
    assert runtime.refused("pause", "one") == "container not running"
    with one.losing("resume", **what):
        runtime.ok("resume", "one")
    assert runtime.state("one")["status"] == "running"
    assert runtime.ok("exec", "one", "echo", "there") == "there\n"
    with one.losing("kill", **{**what, "forgetting": ()}):
        runtime.ok("kill", "one", "TERM")
    runtime.await_status("one", "stopped")
    # Sent again if nobody said that it was: it may come twice, but not never.
    assert one.lines() in (["up", "term"], ["up", "term", "term"])
    assert runtime.refused("kill", "one", "TERM") == "container not running"
    assert os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1]) == 7
    runtime.ok("delete", "one")
    assert runtime.refused("state", "one") == "container does not exist"


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_start_is_answered_when_its_program_has_ended_already(
    runtime: Runtime, told: Callable[..., Told], fault: str
) -> None:
    one = told("sh", "-c", "echo up; exit 5")
    with one.losing("start", **FAULTS[fault]):
        runtime.ok("start", "one")
    runtime.await_status("one", "stopped")
    assert os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1]) == 5
    assert one.lines() == ["up"]
    assert runtime.refused("start", "one") == "cannot start a container that has stopped"
    runtime.ok("delete", "one")


@pytest.mark.parametrize(("fault", "force"), list(zip(list(FAULTS)[:-1], [(), ("--force",)] * 2, strict=True)))
def test_a_delete_is_done_once_and_leaves_nothing(
    runtime: Runtime, told: Callable[..., Told], fault: str, force: tuple[str, ...]
) -> None:
    one = told("sh", "-c", TALKING)
    if force:
        runtime.ok("start", "one")
    with one.losing("delete", **FAULTS[fault]):
        runtime.ok("delete", *force, "one")
    assert runtime.refused("state", "one") == "container does not exist"
    assert runtime.leftovers() == []


@pytest.mark.parametrize("fault", ["the answer is lost", "the supervisor dies before it is asked"])
def test_a_delete_in_a_pod_that_goes_on(
    runtime: Runtime, told: Callable[..., Told], box_rootfs: Path, fault: str
) -> None:
    first = Told(runtime, "one", runtime.bundle("one", box_rootfs, "sleep", "100000", annotations=SANDBOX))
    runtime.ok("start", "one")
    runtime.create("two", runtime.member("two", box_rootfs, "true", pod="one", pid=first.pid))
    runtime.ok("start", "two")
    runtime.await_status("two", "stopped")
    with first.losing("delete", **FAULTS[fault]):
        runtime.ok("delete", "two")
    assert runtime.refused("state", "two") == "container does not exist"
    assert runtime.ok("exec", "one", "echo", "there") == "there\n"
    # What the one before had in the machine is no longer in the way.
    runtime.create("two", runtime.member("again", box_rootfs, "true", pod="one", pid=first.pid))
    runtime.ok("delete", "two")


def test_what_was_killed_before_it_was_started_has_stopped(runtime: Runtime, told: Callable[..., Told]) -> None:
    told("sh", "-c", TALKING)
    runtime.ok("kill", "one", "KILL")
    runtime.await_status("one", "stopped")
    assert runtime.refused("start", "one") == "cannot start a container that has stopped"
    runtime.ok("delete", "one")
