"""The process that forks supervisors: used where it suits, never needed, gone by itself."""

from __future__ import annotations

import os
import resource
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.harness.cli import awaited, title, wait_until_gone
from tests.harness.nurseries import await_nursery, end_nursery, nursery, origin

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.cli import Cli

pytestmark = pytest.mark.cloned


def origin_of_supervisor(cli: Cli, name: str) -> str:
    return origin(cli.inspect(name)["pod"]["supervisor"]["pid"])


def test_supervisors_come_out_of_a_nursery_that_suits_them(cli: Cli, box: str) -> None:
    cli.ok("run", "--rm", box, "true")
    first = nursery(cli.run_root)
    cli.ok("run", "-d", "--name", "forked", box, "sleep", "1000")
    forked = origin(first)
    assert origin_of_supervisor(cli, "forked") == forked
    here = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (here[0] - 1, here[1]))
    try:
        cli.ok("run", "-d", "--name", "elsewhere", box, "sleep", "1000")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, here)
    assert origin_of_supervisor(cli, "elsewhere") != forked
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first)
    assert cli.ok("exec", "forked", "echo", "goes on") == "goes on\n"
    cli.ok("run", "-d", "--name", "later", box, "sleep", "1000")
    second = nursery(cli.run_root)
    assert origin_of_supervisor(cli, "later") == origin(second)


def test_stand_ins_that_have_nothing_of_their_clients_come_out_of_it_too(cli: Cli, box: str) -> None:
    cli.ok("run", "--rm", box, "true")
    await_nursery(cli.run_root)
    out_of_it = origin(nursery(cli.run_root))

    def stand_ins() -> int:
        found = [each for each in psutil.process_iter() if title(each).startswith("vmsandbox stand-in")]
        return sum(origin(each.pid) == out_of_it for each in found)

    cli.ok("run", "-d", "--name", "web", box, "sleep", "1000")
    cli.ok("exec", "-d", "web", "sleep", "1000")
    assert stand_ins() == 2
    cli.ok("stop", "-t", "0", "web")
    cli.ok("start", "web")
    assert stand_ins() == 1
    failed = cli("run", "-d", "--name", "never", box, "no-such-program")
    assert failed.code == 127
    awaited(lambda: stand_ins() == 1)
    end_nursery(cli.run_root)
    cli.ok("exec", "-d", "web", "touch", "/without")
    awaited(lambda: cli("exec", "web", "test", "-e", "/without").code == 0)
    assert stand_ins() == 1


def test_a_nursery_that_hangs_holds_nobody_up_and_goes_with_its_directory(cli: Cli, box: str, tmp_path: Path) -> None:
    cli.ok("run", "--rm", box, "true")
    pid = nursery(cli.run_root)
    os.kill(pid, signal.SIGSTOP)
    assert cli.ok("run", "--rm", box, "echo", "without it") == "without it\n"
    os.kill(pid, signal.SIGCONT)
    aside = tmp_path / "aside"
    cli.run_root.rename(aside)
    try:
        wait_until_gone(pid)
    finally:
        aside.rename(cli.run_root)
