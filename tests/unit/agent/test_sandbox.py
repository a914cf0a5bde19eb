"""The guest's identity: what is renewed, in which order, and what is refused."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.unit.agent.recorder import INVALID, Recorder
from vmsandbox_agent.errors import AlreadyExistsError, InvalidArgumentError, InvalidStateError, NotFoundError
from vmsandbox_agent.events import Events, Exited, OomKilled
from vmsandbox_agent.layout import Layout, checked_id
from vmsandbox_agent.process import Ending
from vmsandbox_agent.reaper import Exit
from vmsandbox_agent.sandbox import Sandbox
from vmsandbox_agent.storage import Storages
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path


class NoGroups:
    """Control groups of a machine without any."""

    def oom_kills(self, group: str) -> int:
        return 0


@pytest.fixture
def calls() -> Recorder:
    return Recorder()


@pytest.fixture
def sandbox(tmp_path: Path, calls: Recorder) -> Sandbox:
    layout = Layout(tmp_path / "base")
    layout.make()
    proc_sys = tmp_path / "proc-sys"
    (proc_sys / "net/ipv4").mkdir(parents=True)
    (proc_sys / "net/ipv4/ip_forward").write_text("0")
    return Sandbox(
        layout,
        calls,
        reaper=None,  # type: ignore[arg-type]
        crun=None,  # type: ignore[arg-type]
        cgroups=NoGroups(),  # type: ignore[arg-type]
        storages=Storages(layout.base, calls),
        shm=tmp_path / "shm",
        proc_sys=proc_sys,
    )


def test_entropy_and_clock_come_before_everything_else(sandbox: Sandbox, calls: Recorder) -> None:
    sandbox.create(
        pb.CreateSandboxRequest(
            hostname="pod",
            entropy=b"e" * 32,
            time_ns=123,
            shm_bytes=4096,
            storages=[
                pb.Storage(driver=pb.Storage.DRIVER_TMPFS, mount_point=str(sandbox.layout.base / "scratch")),
            ],
        )
    )
    assert [entry.split()[0] for entry in calls.journal] == ["time", "entropy", "hostname", "mount", "mount"]
    assert (calls.entropy, calls.time_ns, calls.hostname) == (b"e" * 32, 123, "pod")
    assert "size=4096" in calls.journal[3]
    assert sandbox.identified


def test_files_of_the_identity_are_written(sandbox: Sandbox) -> None:
    sandbox.create(
        pb.CreateSandboxRequest(
            hostname="pod",
            machine_id="0123456789abcdef" * 2,
            dns=pb.Dns(servers=["10.0.0.1", "::1"], searches=["a.b", "c"], options=["ndots:2"]),
            files={"secrets/key": b"\x00\x01"},
            sysctls={"net.ipv4.ip_forward": "1"},
        )
    )
    etc = sandbox.layout.etc
    assert (etc / "hostname").read_text() == "pod\n"
    assert "127.0.1.1\tpod\n" in (etc / "hosts").read_text()
    assert (etc / "machine-id").read_text() == "0123456789abcdef" * 2 + "\n"
    assert (etc / "resolv.conf").read_text() == ("nameserver 10.0.0.1\nnameserver ::1\nsearch a.b c\noptions ndots:2\n")
    assert (sandbox.layout.files / "secrets/key").read_bytes() == b"\x00\x01"


def test_an_identity_is_given_once(sandbox: Sandbox) -> None:
    sandbox.create(pb.CreateSandboxRequest(hostname="pod"))
    with pytest.raises(AlreadyExistsError):
        sandbox.create(pb.CreateSandboxRequest(hostname="other"))


class Card:
    """A network that notes what is done to it."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    def configure(self, interfaces: object, routes: object, neighbours: object) -> None:
        self.journal.append("configure")

    def start_again(self) -> None:
        self.journal.append("start again")


def test_an_identity_that_is_rehearsed_is_nobody_s(sandbox: Sandbox, calls: Recorder) -> None:
    sandbox._network = card = Card()  # type: ignore[assignment]
    for _ in range(2):
        sandbox.create(
            pb.CreateSandboxRequest(rehearsal=True, hostname="other", machine_id="0" * 32, entropy=b"e" * 32)
        )
        assert not sandbox.identified
        assert calls.hostname == os.uname().nodename
    assert card.journal == ["configure", "start again"] * 2
    sandbox.create(pb.CreateSandboxRequest(hostname="pod", machine_id="1" * 32, entropy=b"f" * 32))
    assert sandbox.identified
    assert (calls.hostname, calls.entropy) == ("pod", b"e" * 64 + b"f" * 32)
    etc = sandbox.layout.etc
    assert [(etc / name).read_text() for name in ("hostname", "machine-id")] == ["pod\n", "1" * 32 + "\n"]
    assert card.journal[4:] == ["configure"]
    with pytest.raises(AlreadyExistsError):
        sandbox.create(pb.CreateSandboxRequest(rehearsal=True))


@pytest.mark.parametrize(
    "request_",
    [
        pb.CreateSandboxRequest(machine_id="ABC"),
        pb.CreateSandboxRequest(files={"../escape": b""}),
        pb.CreateSandboxRequest(files={"/etc/passwd": b""}),
        pb.CreateSandboxRequest(files={"": b""}),
        pb.CreateSandboxRequest(sysctls={"../../etc/x": "1"}),
        pb.CreateSandboxRequest(sysctls={"no.such.name": "1"}),
    ],
)
def test_nonsense_is_refused_and_may_be_corrected(sandbox: Sandbox, request_: pb.CreateSandboxRequest) -> None:
    with pytest.raises(InvalidArgumentError):
        sandbox.create(request_)
    assert not sandbox.identified
    sandbox.create(pb.CreateSandboxRequest(hostname="pod"))


def test_a_storage_that_fails_fails_the_sandbox(sandbox: Sandbox, calls: Recorder) -> None:
    point = str(sandbox.layout.base / "scratch")
    calls.refused[point] = INVALID
    request = pb.CreateSandboxRequest(storages=[pb.Storage(driver=pb.Storage.DRIVER_TMPFS, mount_point=point)])
    with pytest.raises(Exception, match="cannot mount"):
        sandbox.create(request)
    assert not sandbox.identified


def test_pythons_own_random_numbers_are_renewed(sandbox: Sandbox) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    sandbox.reseed(os.urandom(32))
    assert random.random() != expected


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "-x", "a b", "x" * 129, "ä"])
def test_ids_that_are_no_file_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        checked_id(text, "container")


def test_what_is_not_there_is_not_found(sandbox: Sandbox) -> None:
    for call in (
        lambda: sandbox.container("web"),
        lambda: sandbox.remove_container("web", force=True),
        lambda: sandbox.acknowledge("web", "x"),
        lambda: sandbox.processes.get("web", ""),
    ):
        with pytest.raises(NotFoundError):
            call()


def test_an_error_of_state_carries_its_parts() -> None:
    error = InvalidStateError("container 'web'", state="stopped", wanted="pause")
    assert str(error) == "cannot pause container 'web': it is stopped"


def test_watchers_hear_what_was_and_what_is() -> None:
    events = Events()
    ending = Ending(Exit(1, 0, 5), False)
    first = events.watch(lambda: [OomKilled("web", 2)])
    second = events.watch(list)
    events.publish(Exited("web", "", ending))
    first.close()
    second.close()
    assert [*first] == [OomKilled("web", 2), Exited("web", "", ending)]
    assert [*second] == [Exited("web", "", ending)]
    events.publish(Exited("late", "", ending))


def test_a_watcher_that_falls_behind_is_ended_to_come_again() -> None:
    events = Events()
    watcher = events.watch(list)
    for number in range(5000):
        events.publish(OomKilled("web", number))
    assert len([*watcher]) == 4096
