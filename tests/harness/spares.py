"""Machines that a command keeps ready: which there are, and their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from tests.harness.cli import awaited, kill, wait_until_gone

if TYPE_CHECKING:
    from tests.harness.cli import Cli


def with_title(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).rstrip() == title:
            found.append(process)
    return found


def offers(cli: Cli) -> list[str]:
    """Ids of the machines that are ready."""
    return [path.name for path in (cli.run_root / "r").glob("*") if not path.suffix]


def machines(cli: Cli) -> list[psutil.Process]:
    """Supervisors of machines that are ready."""
    return [process for offer in offers(cli) for process in with_title(f"vmsandbox supervisor {offer[:12]}")]


def end_nursery(cli: Cli) -> None:
    """Have no more machines made ready."""
    for process in with_title(f"vmsandbox nursery {cli.run_root}"):
        kill(process.pid)


def end_all(cli: Cli) -> None:
    """End what is ready, or becomes so."""
    end_nursery(cli)
    awaited(lambda: not list((cli.run_root / "r").glob("*.new")))
    for machine in machines(cli):
        machine.terminate()
        wait_until_gone(machine.pid)
