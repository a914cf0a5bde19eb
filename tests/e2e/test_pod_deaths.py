"""Whoever asks something of a pod whose machine ends meanwhile is told that it ended, why, and what to do."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import Cli, awaited, kill

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.cloned


def known(cli: Cli, text: str) -> bool:
    """Whether a request has come so far that its supervisor has noted it."""
    return any(text in path.read_text() for path in (cli.run_root / "s").glob("*/containers/*.json"))


def killed_during(cli: Cli, machine: int, *words: str, noted: str) -> tuple[int | None, str]:
    """Stop the machine, have something asked, and kill the machine when that waits for it."""
    psutil.Process(machine).suspend()
    with cli.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as client:
        try:
            awaited(lambda: known(cli, noted))
        finally:
            kill(machine)
        _, said = client.communicate(timeout=60)
    return client.returncode, said.decode()


def ask_exec(cli: Cli, box: str) -> tuple[tuple[str, ...], str]:
    return ("exec", "web", "sh", "-c", "true"), '"execs":{"'


def ask_run(cli: Cli, box: str) -> tuple[tuple[str, ...], str]:
    return ("run", "--pod", "p", "--name", "other", box, "true"), '"other"'


def ask_detached(cli: Cli, box: str) -> tuple[tuple[str, ...], str]:
    return ("run", "-d", "--pod", "p", "--name", "other", box, "true"), '"other"'


@pytest.mark.parametrize(
    ("asking", "next_step"),
    [
        (ask_exec, "'vmsandbox pod start' starts another"),
        (ask_run, "try again, which starts another"),
        (ask_detached, "try again, which starts another"),
    ],
)
def test_a_request_whose_pod_s_machine_is_killed_says_so_and_why(
    cli: Cli, box: str, asking: Callable[[Cli, str], tuple[tuple[str, ...], str]], next_step: str
) -> None:
    cli.ok("pod", "create", "--name", "p")
    cli.ok("run", "-d", "--pod", "p", "--name", "web", box, "sleep", "1000")
    machine = int(cli.inspect("web")["pod"]["vm"]["pid"])
    words, noted = asking(cli, box)
    code, said = killed_during(cli, machine, *words, noted=noted)
    assert code == 125, said
    line = said.splitlines()[0]
    assert line.startswith("vmsandbox: the pod has ended meanwhile: "), said
    assert "was killed by SIGKILL" in line
    assert line.endswith(next_step)
    assert [row["name"] for row in cli.ps()] == ["web"]
    # What it says to do helps.
    cli.ok("pod", "start", "p")
    assert cli.ok("exec", "web", "echo", "again") == "again\n"


def test_an_exec_whose_own_pod_s_machine_is_killed_names_its_container_s_start(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    machine = int(cli.inspect("web")["pod"]["vm"]["pid"])
    code, said = killed_during(cli, machine, "exec", "web", "true", noted='"execs":{"')
    assert code == 125, said
    assert "the pod has ended meanwhile: " in said
    assert said.splitlines()[0].endswith("'vmsandbox start' starts the container again in another")
    assert "Stream removed" not in said.splitlines()[0]
    cli.ok("start", "web")
    assert cli.ok("exec", "web", "echo", "again") == "again\n"
