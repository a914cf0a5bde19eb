"""Processes of ours are killed at moments that a seeded generator picks; nothing may be lost or left behind.

A round starts one operation, kills one or two processes a random while later and then asks: did output and exit code
survive where they had to, is every container that lost its machine stopped with a reason, does another pod go on, and
is nothing left once the container is removed?  A failing round is repeated with its seed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 12
LONG_ROUNDS = 1000
#: lines that a counting container prints, and the code it ends with
LINES, CODE = 60, 7
COUNT = f"i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); sleep 0.02; done; exit {CODE}"
EXPECTED = "".join(f"{number}\n" for number in range(LINES))
#: seconds after its start within which something is killed during an operation
WITHIN = {"run": 3.0, "create": 2.0, "exec": 2.0, "stop": 1.0, "rm": 1.0}
VICTIMS = ("supervisor", "stand-in", "machine", "client")


@dataclass(frozen=True)
class Round:
    """What one seed means."""

    operation: str
    victims: tuple[str, ...]
    delay: float

    @classmethod
    def of(cls, seed: int) -> Round:
        random = Random(seed)
        operation = random.choice(sorted(WITHIN))
        victims = tuple(random.sample(VICTIMS, random.choice((1, 1, 1, 2))))
        return cls(operation, victims, random.uniform(0, WITHIN[operation]))


@pytest.fixture(scope="module")
def bystander(data_root: Path, box: str) -> Iterator[Cli]:
    """A command with a container `other` that must not notice anything."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = Cli(Path(scratch), data_root)
        cli.ok("run", "-d", "--name", "other", box, "sleep", "100000")
        yield cli
        assert cli.ok("exec", "other", "echo", "still here") == "still here\n"
        cli.remove_all()
        cli("gc", "-q")
        assert cli.leftovers() == []


def play(cli: Cli, box: str, seed: int) -> None:
    plan = Round.of(seed)
    name = f"k{seed}"
    others = {process.pid for process in cli.processes()}
    before = {"exec": ("sh", "-c", "sleep 100000"), "stop": ("sleep", "100000"), "rm": ("sleep", "100000")}
    if plan.operation in before:
        cli.ok("run", "-d", "--name", name, box, *before[plan.operation])
    words = {
        "run": ("run", "--name", name, box, "sh", "-c", COUNT),
        "create": ("create", "--name", name, box, "sh", "-c", COUNT),
        "exec": ("exec", name, "sh", "-c", COUNT),
        "stop": ("stop", "-t", "1", name),
        "rm": ("rm", "-f", name),
    }[plan.operation]
    client = cli.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed: list[bytes] = []
    reader = threading.Thread(target=lambda: printed.append(client.communicate()[0]))
    reader.start()
    reader.join(plan.delay)
    killed = {victim for victim in plan.victims if killed_one(cli, victim, client, others)}
    reader.join(120)
    assert not reader.is_alive(), f"{plan} hangs"
    check(cli, plan, name, killed, client.returncode, printed[0].decode())
    cli("rm", "-f", name)
    cli.ok("gc", "-q")
    assert {process.pid for process in cli.processes()} == others, plan
    assert [row["name"] for row in cli.ps()] == ["other"], plan


def killed_one(cli: Cli, victim: str, client: subprocess.Popen[bytes], others: set[int]) -> bool:
    """Kill a process of this round; False if there is none at this moment."""
    if victim == "client":
        if client.poll() is None:
            client.kill()
            return True
        return False
    title = {"supervisor": "vmsandbox supervisor", "stand-in": "vmsandbox stand-in", "machine": "qemu-system"}[victim]
    for process in cli.processes():
        try:
            if process.pid not in others and title in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                return True
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return False


def check(cli: Cli, plan: Round, name: str, killed: set[str], code: int, printed: str) -> None:
    """What must hold after a round, before anything is tidied up."""
    found = {row["name"]: row for row in cli.ps()}
    status = found.get(name, {}).get("status")
    if plan.operation == "run" and killed <= {"supervisor"} and status is not None and code != 125:
        # It was running, so nothing may show that its supervisor died.
        assert (code, printed) == (CODE, EXPECTED), plan
        assert cli.ok("logs", name) == EXPECTED, plan
    if plan.operation == "exec" and killed <= {"supervisor"} and code not in (125, 255):
        assert (code, printed) == (CODE, EXPECTED), plan
    if plan.operation == "run" and killed == {"client"} and status is not None:
        assert cli.ok("wait", name) == f"{CODE}\n", plan
        assert cli.ok("logs", name) == EXPECTED, plan
    if "machine" in killed and status is not None:
        assert cli.ok("wait", name, timeout=120), plan
        assert cli.inspect(name)["status"] == "stopped", plan
    if not killed and plan.operation == "run":
        assert (code, printed) == (CODE, EXPECTED), plan


@pytest.mark.cloned
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_whatever_is_killed_nothing_is_lost_or_left(bystander: Cli, box: str, seed: int) -> None:
    play(bystander, box, seed)


@pytest.mark.cloned
@pytest.mark.long
def test_a_thousand_rounds_without_a_leak_or_a_loss(bystander: Cli, box: str) -> None:
    for seed in range(LONG_ROUNDS):
        play(bystander, box, seed)
