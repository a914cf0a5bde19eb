"""What a pod may leave on the host beside processes and files of its roots: memory, loop devices, control groups."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.harness.cli import title

if TYPE_CHECKING:
    from collections.abc import Collection

    from tests.harness.cli import Cli

CGROUPS = Path("/sys/fs/cgroup")


def of(cli: Cli, pods: Collection[str], *, gone: Collection[str]) -> list[str]:
    """A line each; `pods` and containers are named by the first 12 digits of their ids, and of `gone` none is left.

    Memory of processes that end goes with them, so it is that of the nursery and of what goes on.
    """
    left = [str(path) for path in (cli.data_root / "templates").glob(".staging-*")]
    roots = (f"{cli.run_root}/", f"{cli.data_root}/")
    left += [f"loop device of {path}" for path in loop_files() if path.startswith(roots)]
    groups = [place for place, _, _ in os.walk(CGROUPS) if os.path.basename(place)[:12] in gone]
    left += [f"control group {place}" for place in groups]
    titles = {f"vmsandbox nursery {cli.run_root}", *(f"vmsandbox supervisor {pod}" for pod in pods)}
    for process in psutil.process_iter():
        if title(process) in titles:
            left += [f"memory file of {title(process)}: {path}" for path in memory_files(process.pid)]
    return left


def loop_files() -> list[str]:
    """What loop devices are made of."""
    words = ["losetup", "--noheadings", "--output", "BACK-FILE"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in listed.splitlines()]


def memory_files(pid: int) -> list[str]:
    """The memory files that a process has open."""
    found = []
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(link))
    return sorted(path for path in found if path.startswith("/memfd:"))
