"""`vmsandbox run` in real virtual machines."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import awaited

if TYPE_CHECKING:
    from tests.harness.cli import Cli

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.mark.all_ways
def test_a_command_runs_on_a_kernel_of_its_own_and_prints(cli: Cli, box: str) -> None:
    result = cli("run", "--rm", box, "sh", "-c", f"cat {BOOT_ID}; echo to stderr >&2; exit 7")
    assert (result.code, result.stderr) == (7, "to stderr\n"), result
    # Not its version: the distribution's kernel may be on both sides.
    assert uuid.UUID(result.stdout.strip()) != uuid.UUID(Path(BOOT_ID).read_text().strip())
    assert cli.ps() == []


@pytest.mark.all_ways
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
    script = ("sh", "-c", "echo ready; exec sleep 1000")
    with cli.popen("run", "--rm", "--name", "web", box, *script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        with cli.popen("exec", "web", *script, stdout=subprocess.PIPE) as further:
            assert further.stdout is not None
            assert further.stdout.readline() == b"ready\n"
            further.send_signal(signal.SIGUSR1)
            assert further.wait(60) == 128 + signal.SIGUSR1
        cli.ok("kill", "web")
        assert client.wait(60) == 128 + signal.SIGKILL


@pytest.mark.all_ways
def test_a_program_that_prints_and_exits_at_once_loses_nothing(pod: tuple[Cli, str]) -> None:
    cli, container = pod
    for number in range(20):
        assert cli.ok("exec", container, "echo", f"line {number}") == f"line {number}\n"


@pytest.mark.all_ways
def test_a_container_that_prints_and_ends_at_once_loses_nothing(cli: Cli, box: str) -> None:
    for number in range(3):
        assert cli.ok("run", "--rm", box, "echo", f"line {number}") == f"line {number}\n"


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


def test_a_full_writable_layer_hurts_nobody_else(cli: Cli, box: str, pod_template: None) -> None:
    cli.ok("pod", "create", "--name", "shop")
    counting = "i=0; while echo $i >> /written; do i=$((i+1)); sleep 0.05; done; exit 9"
    cli.ok("run", "-d", "--pod", "shop", "--name", "neighbour", box, "sh", "-c", counting)

    def written() -> list[int]:
        return [int(line) for line in cli.ok("exec", "neighbour", "cat", "/written").split()]

    filling = "dd if=/dev/zero of=/big bs=1M count=100 2>&1; echo full; read line; rm /big; echo fine > /x && cat /x"
    words = ("run", "--rm", "-i", "--pod", "shop", "--scratch-size", "32m", box, "sh", "-c", filling)
    with cli.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        said = b""
        while not said.endswith(b"full\n"):
            said += client.stdout.readline()
        assert b"No space left" in said
        before = len(written())
        awaited(lambda: len(written()) > before + 20)
        assert client.communicate(b"\n", timeout=60)[0] == b"fine\n"
    assert (found := written()) == list(range(len(found)))
    assert cli.inspect("neighbour")["status"] == "running"


#: MiB that a stand-in and a supervisor may have held at most, however much they carried
STANDIN_MIB, SUPERVISOR_MIB = 48, 144
#: at the end of a script: until it was looked at
UNTIL_SEEN = "until [ -e /seen ]; do sleep 0.1; done"


def carried_within_bounds(cli: Cli, name: str) -> None:
    """What carries the container's streams kept little of them; lets it go on."""
    described = cli.inspect(name)
    for pid, most in (
        (described["standin"]["pid"], STANDIN_MIB),
        (described["pod"]["supervisor"]["pid"], SUPERVISOR_MIB),
    ):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["VmHWM"].split()[0]) >> 10 < most, (status["Name"], status["VmHWM"])
    # The container may end, and take this along, before its own end is told.
    assert cli("exec", name, "touch", "/seen").code in (0, 137)


def test_200_mb_come_out_complete_and_in_order(cli: Cli, box: str) -> None:
    # A block without a pattern, which the first copy tells us, and then each copy with its number.
    count, size = 200, 1 << 20
    script = (
        f"dd if=/dev/urandom of=/block bs={size} count=1 2>/dev/null; cat /block; i=100; "
        f"while [ $i -lt {100 + count} ]; do echo $i; cat /block; i=$((i+1)); done; {UNTIL_SEEN}; echo end"
    )
    with cli.popen("run", "--rm", "--name", "web", box, "sh", "-c", script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        block = client.stdout.read(size)
        for number in range(100, 100 + count):
            assert client.stdout.read(size + 4) == b"%d\n" % number + block
        carried_within_bounds(cli, "web")
        assert client.stdout.read() == b"end\n"
        assert client.wait(60) == 0


def test_200_mb_go_in_complete_and_in_order(cli: Cli, box: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("input") / "data"
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(200):
            file.write(block)
    wanted = subprocess.run(["sha256sum", path], capture_output=True, check=True).stdout.split()[0]
    with path.open("rb") as file:
        script = ("sh", "-c", f"sha256sum; {UNTIL_SEEN}")
        words = ("run", "--rm", "-i", "--name", "web", box, *script)
        with cli.popen(*words, stdin=file, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline().split()[0] == wanted
            carried_within_bounds(cli, "web")
            assert client.wait(60) == 0
    path.unlink()
