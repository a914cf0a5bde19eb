"""A client that stays with its container: its signals before and after there is one, and its end."""

from __future__ import annotations

import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import awaited, kill, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.cli import Cli

#: one of each kind that does not end a program natively, or that few think of
UNUSUAL = (
    signal.SIGIO,
    signal.SIGXCPU,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGURG,
    signal.SIGRTMIN + 1,
    signal.SIGRTMAX,
)


@contextmanager
def running(cli: Cli, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command; a test that fails does not wait for its end."""
    with cli.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            yield client
        except BaseException:
            client.kill()
            raise


def machines_of(cli: Cli) -> list[psutil.Process]:
    return [process for process in cli.processes() if "qemu-system" in name_of(process)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", [("run",), ("run", "--rm"), ("run", "-d"), ("create",)], ids=" ".join)
def test_a_signal_while_the_machine_boots_gives_the_container_up(
    cli: Cli, box: str, verb: tuple[str, ...], number: signal.Signals
) -> None:
    words = (*verb, "--template", "off", "--name", "web", box, "sh", "-c", "sleep 1000")
    with running(cli, *words) as client:
        awaited(lambda: machines_of(cli))
        client.send_signal(number)
        assert client.communicate(timeout=60) == (b"", b"")
        assert client.returncode == 128 + number
    assert cli.leftovers() == []


def test_a_signal_before_the_container_is_there_leaves_the_pod_as_it_was(
    cli: Cli, box: str, pod_template: None
) -> None:
    cli.ok("pod", "create", "--name", "shop")
    (supervisor,) = (process for process in cli.processes() if name_of(process).startswith("vmsandbox-super"))
    supervisor.suspend()
    try:
        with running(cli, "run", "--pod", "shop", box, "sleep", "1000") as client:
            awaited(psutil.Process(client.pid).children)
            client.send_signal(signal.SIGTERM)
            supervisor.resume()
            assert client.wait(60) == 143
    finally:
        supervisor.resume()
    assert cli.ps() == []
    assert [row["status"] for row in cli.pods()] == ["running"]


@pytest.mark.parametrize("options", [(), ("--rm",)], ids=["stays", "rm"])
def test_the_death_of_the_machine_is_told_to_whoever_waits(cli: Cli, box: str, options: tuple[str, ...]) -> None:
    script = ("sh", "-c", "echo ready; sleep 1000")
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with cli.popen("run", *options, "--name", "web", box, *script, **both) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        with cli.popen("exec", "web", *script, **both) as further:
            assert further.stdout is not None
            assert further.stdout.readline() == b"ready\n"
            kill(machines_of(cli)[0].pid)
            ends = [(*each.communicate(timeout=60), each.returncode) for each in (client, further)]
    for output, said, code in ends:
        assert (output, code) == (b"", 137)
        assert said.startswith(b"vmsandbox: ")
        assert b"virtual machine" in said
        assert said.count(b"\n") == 1


@pytest.mark.parametrize("number", UNUSUAL)
def test_every_signal_that_can_be_forwarded_is(pod: tuple[Cli, str], number: int) -> None:
    cli, container = pod
    script = f"trap 'echo got; exit 9' {int(number)}; echo ready; while :; do sleep 0.1; done"
    with cli.popen("exec", container, "sh", "-c", script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(number)
        assert client.stdout.read() == b"got\n"
        assert client.wait(60) == 9
