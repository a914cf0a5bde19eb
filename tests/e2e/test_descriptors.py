"""A supervisor, a client or gc without descriptors: it works, or says in one line why not, and nothing is lost."""

from __future__ import annotations

import pytest

from tests.harness.cli import Cli, wait_until_gone
from tests.harness.descriptors import limited_to, used_up

pytestmark = pytest.mark.cloned


def running(cli: Cli, box: str) -> int:
    """Start a container `web`; its supervisor."""
    cli.ok("run", "-d", "--name", "web", box, "sh", "-c", "echo up; exec sleep 1000")
    return int(cli.inspect("web")["pod"]["supervisor"]["pid"])


def test_whoever_asks_a_supervisor_without_descriptors_is_answered(cli: Cli, box: str) -> None:
    with used_up(running(cli, box)):
        for number in range(3):  # each comes and goes, and with it what it was taken in by
            done = cli("exec", "web", "sh", "-c", f"echo {number}; exit {number}")
            if done.code == 125:
                assert "raise the limit of open files" in done.stderr.splitlines()[0], done
            else:
                assert (done.code, done.stdout) == (number, f"{number}\n"), done
        assert [row["status"] for row in cli.ps()] == ["running"]
    assert cli.ok("exec", "web", "echo", "fine") == "fine\n"


@pytest.mark.parametrize("words", [("stop", "-t", "0", "web"), ("rm", "-f", "web"), ("kill", "web")])
def test_a_supervisor_without_descriptors_can_end_its_pod(cli: Cli, box: str, words: tuple[str, ...]) -> None:
    supervisor = running(cli, box)
    with used_up(supervisor):
        assert cli.ok(*words) == "web\n"
        wait_until_gone(supervisor)
    assert [row["status"] for row in cli.ps()] == ([] if words[0] == "rm" else ["stopped"])
    assert cli.processes() == []


@pytest.mark.parametrize("limit", [5, 6, 7, 8])
def test_a_client_without_descriptors_says_so_and_harms_nothing(cli: Cli, box: str, limit: int) -> None:
    running(cli, box)
    done = cli("exec", "web", "echo", "hi", preexec_fn=limited_to(limit))
    assert done.code == 125, done
    line = done.stderr.splitlines()[0]
    assert line.startswith("vmsandbox: cannot "), done
    assert line.endswith("too many open files: raise the limit of open files (ulimit -n)")
    gone = cli("gc", preexec_fn=limited_to(limit))
    assert (gone.stdout, gone.code == 0 or "too many open files" in gone.stderr) == ("", True), gone
    assert [row["status"] for row in cli.ps()] == ["running"]
    assert cli.ok("exec", "web", "echo", "fine") == "fine\n"
    stopped = cli("stop", "-t", "0", "web", preexec_fn=limited_to(limit))
    assert stopped.code == 0 or "too many open files" in stopped.stderr, stopped
