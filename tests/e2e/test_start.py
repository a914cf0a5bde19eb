"""A stopped container starts again: the same writable layer, the same log, another life."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.harness.cli import kill, wait_until_gone

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.cli import Cli

SCRIPT = "trap 'exit 3' TERM; echo life >> /lives; wc -l < /lives; while :; do sleep 0.1; done"


def test_c6_a_stopped_container_starts_again_on_its_writable_layer_and_log(cli: Cli, box: str) -> None:
    container = cli.ok("run", "-d", "--name", "web", "-e", "X=1", box, "sh", "-c", SCRIPT).strip()
    cli.await_line("web", "1")  # from then on it obeys
    first = cli.inspect("web")
    cli.ok("stop", "web")
    assert cli.inspect("web")["exit"]["code"] == 3
    assert cli.processes() == []
    assert cli.ok("start", "web") == "web\n"
    again = cli.inspect("web")
    assert (again["id"], again["status"], "exit" in again, "finished" in again) == (container, "running", False, False)
    assert again["created"] == first["created"]
    assert again["started"] > first["started"]
    assert cli.ok("exec", "web", "sh", "-c", "wc -l < /lives; tr '\\0' '\\n' < /proc/1/environ | grep X=") == "2\nX=1\n"
    assert "it is running" in cli("start", "web").stderr
    cli.await_line("web", "2")
    cli.ok("stop", "web")
    assert cli.inspect("web")["exit"]["code"] == 3
    assert cli.ok("logs", "web") == "1\n2\n"
    cli.ok("rm", "web")
    assert cli.leftovers() == []


def test_a_short_container_runs_once_for_each_start(cli: Cli, box: str) -> None:
    assert cli("run", "--name", "job", box, "sh", "-c", "echo x >> /n; wc -l < /n; exit 5").code == 5
    for _ in range(2):
        cli.ok("start", "job")
        assert cli.ok("wait", "job") == "5\n"
    assert cli.ok("logs", "job") == "1\n2\n3\n"


def test_restart_stops_in_order_and_starts_again(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sh", "-c", SCRIPT)
    machine = cli.inspect("web")["pod"]["vm"]["pid"]
    assert cli.ok("restart", "web") == "web\n"
    after = cli.inspect("web")
    assert (after["status"], after["pod"]["vm"]["pid"] != machine) == ("running", True)
    assert cli.ok("exec", "web", "sh", "-c", "wc -l < /lives") == "2\n"


def test_of_two_who_start_it_at_once_one_is_told_so(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sh", "-c", SCRIPT)
    cli.await_line("web", "1")
    cli.ok("stop", "web")
    starting = [cli.popen("start", "web", stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [client.communicate(timeout=120)[1].decode() for client in starting]
    assert sorted(client.returncode for client in starting) == [0, 1], said
    assert any(
        f"cannot start container 'web': it is {state}" in "".join(said) for state in ("being started", "running")
    )
    assert cli.ok("exec", "web", "sh", "-c", "wc -l < /lives") == "2\n"


def test_what_the_death_of_everything_left_starts_again(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sh", "-c", SCRIPT)
    before = cli.inspect("web")
    for pid in (before["standin"]["pid"], before["pod"]["supervisor"]["pid"], before["pod"]["vm"]["pid"]):
        kill(pid)
        wait_until_gone(pid)
    assert cli.ps()[0]["status"] == "stopped"
    cli.ok("start", "web")
    assert cli.ok("exec", "web", "sh", "-c", "wc -l < /lives") in ("1\n", "2\n")  # what was not synced may be lost
    assert cli.inspect("web")["status"] == "running"


def test_what_shares_files_starts_again_each_time_its_machine_has_died(cli: Cli, box: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("the host's")
    cli.ok("run", "-d", "--name", "again", "-v", f"{tmp_path}:/data", box, "sleep", "100000")
    for _ in range(4):
        kill(cli.inspect("again")["pod"]["vm"]["pid"])
        cli.ok("wait", "again")
        cli.ok("start", "again")
        assert cli.ok("exec", "again", "cat", "/data/file") == "the host's"


def test_a10_a_start_that_fails_leaves_the_container_stopped_as_it_was(cli: Cli, box: str) -> None:
    cli("run", "--name", "web", box, "sh", "-c", "exit 4")
    config = cli.run_root / "broken.toml"
    config.write_text('[hypervisor]\nbinary = "/no/such/qemu"\n')
    cli.config = config
    failed = cli("start", "web")
    cli.config = None
    assert (failed.code, "/no/such/qemu" in failed.stderr) == (1, True), failed
    after = cli.inspect("web")
    assert (after["status"], after["exit"]["code"]) == ("stopped", 4)
    assert cli.processes() == []
    cli.ok("start", "web")
    assert cli.ok("wait", "web") == "4\n"


def test_removing_right_after_the_machines_death_succeeds(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    kill(cli.inspect("web")["pod"]["vm"]["pid"])
    cli.ok("rm", "-f", "web")
    assert cli.leftovers() == []
