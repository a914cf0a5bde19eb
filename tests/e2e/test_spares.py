"""Machines that are kept ready: taken by whom they suit, ended when nobody wants them, and never missed."""

from __future__ import annotations

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import Cli, awaited, kill, wait_until_gone
from tests.harness.nurseries import end_nursery
from tests.harness.spares import SETTINGS, keeping_ready, machines, offers
from vmsandbox.supervisor import spares

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cloned


@pytest.fixture
def ready(data_root: Path, tmp_path: Path) -> Iterator[Cli]:
    """A command that keeps one machine ready, and has been used once."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = Cli(Path(scratch), data_root)
        with keeping_ready(cli, tmp_path):
            yield cli
        cli.remove_all()
        cli("gc", "-q")
        assert cli.leftovers() == []


def first(cli: Cli, box: str) -> str:
    """Have a machine made ready; its id."""
    cli.ok("run", "--rm", box, "true")
    return awaited_offer(cli)


def awaited_offer(cli: Cli) -> str:
    (offer,) = awaited(lambda: offers(cli))
    return str(offer)


def test_a_machine_that_is_ready_becomes_the_pod_of_whoever_asks_next(ready: Cli, box: str) -> None:
    seen = set()
    for _ in range(2):
        expected = first(ready, box) if not seen else awaited_offer(ready)
        made = ready.ok("run", "-d", "--name", "taken", "-e", "WHAT=mine", box, "sleep", "1000").strip()
        assert made == expected
        assert ready.ok("exec", "taken", "sh", "-c", "hostname; echo $WHAT") == f"{made[:12]}\nmine\n"
        assert ready.ok("exec", "taken", "sh", "-c", "echo kept > /new; cat /new; ls /run/vmsandbox 2>&1 | wc -l")
        seen.add(ready.ok("exec", "taken", "cat", "/proc/sys/kernel/random/boot_id"))
        assert (ready.data_root / "containers" / made / "scratch.img").exists()
        ready.ok("rm", "-f", "taken")
    assert len(seen) == 2


def test_output_status_and_limits_are_those_of_any_run(ready: Cli, box: str) -> None:
    first(ready, box)
    done = ready(
        "run", "--rm", "-i", "--memory", "128m", "--cpus", "2", box, "sh", "-c", "nproc; cat; exit 3", stdin=b"in"
    )
    assert (done.code, done.stdout) == (3, "2\nin")


def test_of_two_at_once_one_takes_it_and_the_other_does_without(ready: Cli, box: str) -> None:
    offer = first(ready, box)
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda _: ready.ok("run", "--rm", box, "hostname").strip(), range(2)))
    assert len(set(names)) == 2
    assert offer[:12] in names


@pytest.mark.parametrize(
    "option", ["--template=off", "--read-only", "--accel=tcg", "--scratch-size=64m", "--network=none"]
)
def test_what_needs_another_machine_gets_one(ready: Cli, box: str, option: str) -> None:
    offer = first(ready, box)
    assert ready.ok("run", "--rm", option, box, "hostname").strip() != offer[:12]
    assert offers(ready) == [offer]


def test_as_many_are_kept_ready_as_are_asked_for(ready: Cli, box: str) -> None:
    assert ready.config is not None
    ready.config.write_text(SETTINGS.replace("spares = 1", "spares = 2"))
    ready.ok("run", "--rm", box, "true")
    awaited(lambda: len(offers(ready)) == 2)
    both = {offer[:12] for offer in offers(ready)}
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: ready.ok("run", "--rm", box, "hostname").strip(), range(2))) == both


def test_a_machine_of_other_settings_is_not_taken(ready: Cli, box: str) -> None:
    offer = first(ready, box)
    assert ready.config is not None
    ready.config.write_text(SETTINGS + "base_memory_mib = 300\n")
    assert ready.ok("run", "--rm", "--template", "off", box, "hostname").strip() != offer[:12]
    assert ready.ok("run", "--rm", box, "hostname").strip() != offer[:12]
    assert offer in offers(ready)


def test_a_machine_of_another_data_root_is_not_taken(ready: Cli, box: str) -> None:
    offer = first(ready, box)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-data-") as data:
        for name in ("guest", "images", "templates"):
            Path(data, name).symlink_to(ready.data_root / name)
        other = Cli(ready.run_root, Path(data))
        other.config, other.network = ready.config, ready.network
        assert other.ok("run", "--rm", box, "hostname").strip() != offer[:12]
    assert offers(ready) == [offer]


@pytest.mark.parametrize("victim", ["supervisor", "machine"])
def test_one_that_was_killed_is_not_missed(ready: Cli, box: str, victim: str) -> None:
    offer = first(ready, box)
    (supervisor,) = machines(ready)
    (machine,) = [child for child in supervisor.children() if "qemu" in child.name()]
    kill((supervisor if victim == "supervisor" else machine).pid)
    wait_until_gone(supervisor.pid)
    assert ready.ok("run", "--rm", box, "hostname").strip() != offer[:12]
    if victim == "supervisor":
        for path in [ready.run_root / "s" / offer[:12], *(ready.data_root / "spares").glob("*")]:
            age(path)
        assert offer[:12] in ready.ok("gc")
        wait_until_gone(machine.pid)


def age(path: Path) -> None:
    """Make a directory older than what gc takes for unfinished."""
    if path.exists():
        os.utime(path, (1, 1))


def test_one_whose_taker_dies_before_it_asks_for_a_pod_ends_soon(ready: Cli, box: str) -> None:
    offer = first(ready, box)
    (supervisor,) = machines(ready)
    end_nursery(ready.run_root)
    (ready.run_root / "r" / offer).unlink()
    # Well before it would have ended if nobody had taken it.
    supervisor.wait(timeout=spares.LINGER / 2)
    assert ready.leftovers() == []


def test_one_that_is_told_to_end_leaves_nothing(ready: Cli, box: str) -> None:
    first(ready, box)
    (supervisor,) = machines(ready)
    end_nursery(ready.run_root)
    supervisor.send_signal(signal.SIGTERM)
    wait_until_gone(supervisor.pid)
    assert ready.leftovers() == []


def test_without_the_setting_nothing_is_kept_ready(cli: Cli, box: str) -> None:
    cli.ok("run", "--rm", box, "true")
    assert not (cli.run_root / "r").exists()
