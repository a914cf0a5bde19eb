"""Whatever is killed, nothing is lost and nothing is left."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.harness.cli import Cli, awaited, kill, name_of, wait_until_gone


def supervisor_of(cli: Cli, name: str) -> int:
    return int(cli.inspect(name)["pod"]["supervisor"]["pid"])


@pytest.mark.all_ways
def test_output_and_exit_code_survive_the_supervisors_death_without_any_verb(cli: Cli, box: str) -> None:
    script = "i=0; while [ $i -lt 60 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 11"
    with cli.popen("run", "--name", "count", box, "sh", "-c", script, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        for number in range(10):
            assert client.stdout.readline() == f"line {number}\n".encode()
        first = supervisor_of(cli, "count")
        kill(first)
        assert client.stdout.read() == b"".join(b"line %d\n" % number for number in range(10, 60))
        assert client.wait(60) == 11
    assert supervisor_of(cli, "count") != first
    assert cli.inspect("count")["exit"]["code"] == 11
    assert cli.ok("logs", "count") == "".join(f"line {number}\n" for number in range(60))


def test_what_is_under_way_when_supervisors_die_is_neither_lost_nor_repeated(cli: Cli, box: str) -> None:
    data = random.Random(5).randbytes(12 << 20)
    with cli.popen("run", "-i", box, "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        with ThreadPoolExecutor(1) as threads:
            feeding = threads.submit(feed, client.stdin, data)
            received = b""
            for _ in range(3):
                received += client.stdout.read(3 << 20)
                (row,) = cli.ps()
                kill(supervisor_of(cli, row["id"]))
            received += client.stdout.read()
            feeding.result()
        assert client.wait(60) == 0
    assert received == data


def feed(pipe: IO[bytes], data: bytes) -> None:
    with pipe:
        pipe.write(data)


def test_what_a_dying_supervisor_has_not_read_is_asked_of_the_next(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "100000")
    supervisor = supervisor_of(cli, "web")
    os.kill(supervisor, signal.SIGSTOP)  # it still takes connections, as one that is being killed does
    with cli.popen("exec", "web", "echo", "here", stdout=subprocess.PIPE) as client:
        try:
            awaited(psutil.Process(client.pid).children)  # the stand-in: its client has asked, or is about to
        finally:
            kill(supervisor)
        assert client.communicate() == (b"here\n", None)
    assert client.returncode == 0
    assert supervisor_of(cli, "web") != supervisor


def test_nobody_follows_a_supervisor_before_it_has_given_all_back(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "100000")
    about = cli.inspect("web")
    directory = cli.run_root / "s" / about["sandbox"][:12]
    supervisor = about["pod"]["supervisor"]["pid"]
    with (directory / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as who starts another one has it
        kill(about["standin"]["pid"])
        awaited(lambda: re.search(rf"-> FLOCK .* {supervisor} ", Path("/proc/locks").read_text()))
        assert (directory / "control.sock").exists()
    wait_until_gone(supervisor)
    assert not (directory / "control.sock").exists()


def test_verbs_work_after_the_supervisors_death(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    kill(supervisor_of(cli, "web"))
    assert cli.ok("exec", "web", "echo", "still here") == "still here\n"
    assert cli.ps()[0]["status"] == "running"
    cli.ok("rm", "-f", "web")
    assert cli.leftovers() == []


def test_a_guest_s_clock_that_went_wrong_while_nobody_looked_is_set_right_by_the_next_supervisor(
    cli: Cli, box: str
) -> None:
    # What a jump of the host's clock is for the guest, without touching the host's: its own is an hour off.
    cli.ok("run", "-d", "--name", "web", "--privileged", box, "sleep", "1000")

    def ahead() -> float:
        return int(cli.ok("exec", "web", "date", "+%s")) - time.time()

    cli.ok("exec", "web", "date", "-s", f"@{int(time.time()) + 3600}")
    assert ahead() > 3000
    kill(supervisor_of(cli, "web"))
    deadline = time.monotonic() + 60
    while abs(ahead()) > 300:
        assert time.monotonic() < deadline, "the clock is still wrong"


@pytest.mark.all_ways
def test_the_virtual_machines_death_stops_the_container_and_says_why(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    described = cli.inspect("web")
    kill(described["pod"]["vm"]["pid"])
    assert cli.ok("wait", "web") == "137\n"
    wait_until_gone(described["pod"]["supervisor"]["pid"])
    after = cli.inspect("web")
    assert after["status"] == "stopped"
    assert "virtual machine" in after["exit"]["reason"]
    assert cli.processes() == []


def test_the_death_of_the_guest_s_kernel_stops_the_container_and_says_its_last_words(cli: Cli, box: str) -> None:
    # What the agent's death is as well: it is the guest's first process.
    cli.ok("run", "-d", "--privileged", "--name", "web", box, "sleep", "1000")
    # It may still be on its way to the guest when that is gone.
    assert cli("exec", "web", "sh", "-c", "echo c > /proc/sysrq-trigger").code in (125, 137)
    assert cli.ok("wait", "web") == "137\n"
    after = cli.inspect("web")
    assert after["status"] == "stopped"
    assert "its guest reset itself: Kernel panic - not syncing: sysrq triggered crash" in after["exit"]["reason"]
    cli.ok("rm", "web")
    assert cli.leftovers() == []


def test_the_death_of_both_is_noticed_by_the_stand_in(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    described = cli.inspect("web")
    standin = described["standin"]["pid"]
    kill(described["pod"]["supervisor"]["pid"])
    kill(described["pod"]["vm"]["pid"])
    wait_until_gone(standin)
    assert cli.inspect("web")["exit"]["code"] == 137
    cli.ok("rm", "web")
    assert cli.leftovers() == []


def test_killing_the_stand_in_kills_the_container(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    described = cli.inspect("web")
    kill(described["standin"]["pid"])
    wait_until_gone(described["pod"]["supervisor"]["pid"])
    assert cli.inspect("web")["status"] == "stopped"
    assert cli.processes() == []


def test_killing_the_client_of_an_exec_ends_the_exec_and_nothing_else(cli: Cli, box: str) -> None:
    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    client = cli.popen("exec", "web", "sh", "-c", "echo up; exec sleep 2000", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    (standin,) = psutil.Process(client.pid).children()
    client.kill()
    client.wait()
    client.stdout.close()
    standin.wait(60)
    assert "sleep 2000" not in cli.ok("top", "web")
    assert cli.ok("exec", "web", "echo", "still here") == "still here\n"


def test_killing_the_client_of_a_container_to_be_removed_ends_it(cli: Cli, box: str) -> None:
    client = cli.popen("run", "--rm", "--name", "web", box, "sh", "-c", "echo up; sleep 1000", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    supervisor = supervisor_of(cli, "web")
    client.kill()
    client.wait()
    client.stdout.close()
    wait_until_gone(supervisor)
    assert cli.leftovers() == []


def test_gc_removes_what_was_killed_in_the_middle_of_its_start(cli: Cli, box: str) -> None:
    client = cli.popen("run", "--rm", box, "true", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any("qemu" in name_of(process) for process in cli.processes()):
        assert time.monotonic() < deadline
    for process in [*cli.processes(), *[]]:
        if "qemu" not in name_of(process):
            process.kill()
    client.kill()
    client.wait()
    cli("gc")
    for process in cli.processes():
        wait_until_gone(process.pid)
    assert cli.ps() == []


def test_what_is_still_being_made_can_be_removed(cli: Cli, box: str, pod_template: None) -> None:
    for make, remove in (
        (("create", "--name", "new", box, "true"), ("rm", "-f", "new")),
        (("pod", "create", "--name", "new"), ("pod", "rm", "-f", "new")),
    ):
        with cli.popen(*make, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            deadline = time.monotonic() + 60
            while not any("qemu" in name_of(process) for process in cli.processes()):
                assert time.monotonic() < deadline
            cli.ok(*remove)
        assert cli.leftovers() == []


def kill_with_a_new_machine(cli: Cli, *words: str) -> None:
    """Run a verb and kill its client and the supervisor as soon as it has a machine, which nothing tells of yet."""
    with cli.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        awaited(lambda: machines_of(cli))
        for process in cli.processes():
            if name_of(process).startswith("vmsandbox-super"):
                kill(process.pid)
        client.kill()


def machines_of(cli: Cli) -> set[int]:
    return {process.pid for process in cli.processes() if "qemu-system" in name_of(process)}


def test_a_machine_whose_supervisor_died_before_it_wrote_it_down_ends_with_the_next_start(cli: Cli, box: str) -> None:
    cli.ok("run", "--name", "web", box, "true")
    kill_with_a_new_machine(cli, "start", "web")
    cli.ok("start", "web")
    cli.ok("wait", "web")
    awaited(lambda: not cli.processes())


def test_a_machine_whose_supervisor_died_before_it_wrote_it_down_ends_with_its_pod(
    cli: Cli, box: str, pod_template: None
) -> None:
    kill_with_a_new_machine(cli, "pod", "create", "--name", "p")
    cli.ok("pod", "rm", "-f", "p")
    cli.ok("gc", "-q")
    assert cli.leftovers() == []
