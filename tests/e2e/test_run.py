"""`vmsandbox run` in real virtual machines."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.cli import Cli

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.mark.both_ways
def test_a_command_runs_on_a_kernel_of_its_own_and_prints(cli: Cli, box: str) -> None:
    result = cli("run", "--rm", box, "sh", "-c", f"cat {BOOT_ID}; echo to stderr >&2; exit 7")
    assert (result.code, result.stderr) == (7, "to stderr\n"), result
    # Not its version: the distribution's kernel may be on both sides.
    assert uuid.UUID(result.stdout.strip()) != uuid.UUID(Path(BOOT_ID).read_text().strip())
    assert cli.ps() == []


@pytest.mark.both_ways
def test_stdin_and_its_end_reach_the_container(cli: Cli, box: str) -> None:
    assert cli.ok("run", "--rm", "-i", box, "sh", "-c", "cat; echo done", stdin=b"hello\n") == "hello\ndone\n"


def test_without_i_stdin_is_empty(cli: Cli, box: str) -> None:
    assert cli.ok("run", "--rm", box, "sh", "-c", "cat; echo done", stdin=b"not passed on") == "done\n"


def test_a_container_stays_listed_with_its_log_until_it_is_removed(cli: Cli, box: str) -> None:
    assert cli("run", "--name", "short", box, "sh", "-c", "echo out; echo err >&2; exit 3").code == 3
    row = cli.ps()[0]
    assert (row["name"], row["status"], row["exit_code"]) == ("short", "stopped", 3)
    result = cli("logs", "short")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    assert cli.processes() == []
    assert cli.ok("rm", "short") == "short\n"
    assert cli.ps() == []
    assert cli.leftovers() == []


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["/no/such"], 127, "/no/such"),
        (["nothing-like-it"], 127, "nothing-like-it"),
        (["/etc/not-executable"], 126, "not-executable"),
        (["/etc"], 126, "/etc"),
    ],
)
def test_what_cannot_be_run_says_so_as_docker_does(
    cli: Cli, box: str, command: list[str], code: int, said: str
) -> None:
    result = cli("run", "--rm", box, *command)
    assert (result.code, result.stdout) == (code, ""), result
    assert said in result.stderr
    assert cli.leftovers() == []


def test_an_unknown_image_is_125_and_says_how_to_get_one(cli: Cli) -> None:
    result = cli("run", "--rm", "nothing", "true")
    assert result.code == 125
    assert "nothing" in result.stderr
    assert "import" in result.stderr
    assert cli.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_client_reaches_the_container(cli: Cli, box: str, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 9' {number.name[3:]}; echo ready; while :; do sleep 1; done"
    with cli.popen("run", "--rm", box, "sh", "-c", script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(number)
        assert client.stdout.read() == b"got\n"
        assert client.wait(60) == 9


def test_a_container_that_ends_by_a_signal_is_128_and_its_number(cli: Cli, box: str) -> None:
    assert cli("run", "--rm", box, "sh", "-c", "sh -c 'kill -9 $$'; exit $?").code == 137


@pytest.mark.both_ways
def test_a_program_that_prints_and_exits_at_once_loses_nothing(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    for number in range(20):
        assert cli.ok("exec", container, "echo", f"line {number}") == f"line {number}\n"


def test_programs_have_random_addresses(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    command = (
        "exec",
        container,
        "sh",
        "-c",
        "cat /proc/1/personality /proc/self/personality; grep stack /proc/self/maps",
    )
    first, second = (cli.ok(*command).splitlines() for _ in range(2))
    assert first[:2] == second[:2] == ["00000000", "00000000"]
    assert first[2] != second[2]


def test_output_that_nobody_reads_ends_the_program_as_natively(cli: Cli, box: str) -> None:
    with cli.popen("run", "--rm", box, "yes", stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(4) == b"y\ny\n"
        client.stdout.close()
        assert client.wait(60) != 0


def test_several_at_once_do_not_disturb_each_other(cli: Cli, box: str) -> None:
    clients = [
        cli.popen("run", "--rm", box, "sh", "-c", f"echo {number}; exit {number}", stdout=subprocess.PIPE)
        for number in range(3)
    ]
    for number, client in enumerate(clients):
        output, _ = client.communicate(timeout=120)
        assert (output, client.returncode) == (f"{number}\n".encode(), number)
    assert cli.leftovers() == []


def test_a_taken_name_is_refused_and_names_the_holder(cli: Cli, box: str) -> None:
    container = cli.ok("run", "-d", "--name", "web", box, "sleep", "1000").strip()
    result = cli("run", "--name", "web", box, "true")
    assert result.code == 125
    assert container[:12] in result.stderr
    assert [row["id"] for row in cli.ps()] == [container]


def test_a_full_writable_layer_hurts_nobody_else(cli: Cli, box: str) -> None:
    script = "dd if=/dev/zero of=/big bs=1M count=100 2>&1; rm /big; echo fine > /x && cat /x"
    output = cli.ok("run", "--rm", "--scratch-size", "32m", box, "sh", "-c", script)
    assert "No space left" in output
    assert output.endswith("fine\n")


def test_200_mb_come_out_complete_and_in_order(cli: Cli, box: str) -> None:
    count = 200
    script = f"dd if=/dev/zero bs=1M count={count} 2>/dev/null | tr '\\0' 'x'; echo end"
    with cli.popen("run", "--rm", box, "sh", "-c", script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        total, last = 0, b""
        while data := client.stdout.read(1 << 20):
            total += len(data)
            last = (last + data)[-5:]
        assert last.endswith(b"xend\n")
        assert total == count * (1 << 20) + 4
        assert client.wait(60) == 0


def test_200_mb_go_in_complete_and_in_order(cli: Cli, box: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("input") / "data"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(200):
            file.write(block)
    wanted = subprocess.run(["sha256sum", path], capture_output=True, check=True).stdout.split()[0]
    with path.open("rb") as file:
        client = cli.popen("run", "--rm", "-i", box, "sha256sum", stdin=file, stdout=subprocess.PIPE)
        output, _ = client.communicate(timeout=300)
    path.unlink()
    assert output.split()[0] == wanted
