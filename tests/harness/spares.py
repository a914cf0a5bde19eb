"""Machines that a command keeps ready: which there are, and their end."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from tests.harness.cli import awaited, wait_until_gone
from tests.harness.nurseries import end_nursery, with_title

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.harness.cli import Cli


SETTINGS = """
[network]
default = "none"

[sandbox]
spares = 1
forks = false
"""
#: seconds it may take until a machine that is to be made ready has a supervisor
YOUNG = 10.0


@contextmanager
def keeping_ready(cli: Cli, directory: Path) -> Iterator[None]:
    """Have the command keep a machine ready for the block; its configuration is put into the directory."""
    before = cli.config, cli.network
    cli.config, cli.network = directory / "spares.toml", ""
    cli.config.write_text(SETTINGS)
    try:
        yield
    finally:
        end_all(cli)
        cli.config, cli.network = before


def offers(cli: Cli) -> list[str]:
    """Ids of the machines that are ready."""
    return [path.name for path in (cli.run_root / "r").glob("*") if not path.suffix]


def machines(cli: Cli) -> list[psutil.Process]:
    """Supervisors of machines that are ready."""
    return [process for offer in offers(cli) for process in with_title(f"vmsandbox supervisor {offer[:12]}")]


def makers(cli: Cli) -> list[psutil.Process]:
    """What the nursery has just started to have a machine made ready."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(cli.run_root) in words and any("vmsandbox.cli.spares" in word for word in words):
            found.append(process)
    return found


def is_coming(note: Path) -> bool:
    """Whether a machine may still be made ready, or whoever did it was killed."""
    try:
        young = time.time() - note.stat().st_mtime < YOUNG
    except FileNotFoundError:
        return False
    return young or bool(with_title(f"vmsandbox supervisor {note.name[:12]}"))


def end_all(cli: Cli) -> None:
    """End what is ready, or becomes so."""
    end_nursery(cli.run_root)
    awaited(lambda: not makers(cli))
    awaited(lambda: not any(is_coming(path) for path in (cli.run_root / "r").glob("*.new")))
    for machine in machines(cli):
        machine.terminate()
        wait_until_gone(machine.pid)
