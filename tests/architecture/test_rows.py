"""Every behaviour of pods that the design names by a row has tests that are named for it, as `test_a4_a5_...`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = {
    "a1": "a container belongs to one pod, which is one virtual machine",
    "a2": "states and verbs: an illegal one is an error that names both",
    "a3": "a process is known by its token, and a pid of the host only together with its start time",
    "a4": "limits of processor time decide how many vCPUs the machine has, both ways",
    "a5": "limits of memory decide how much the machine has",
    "a6": "host directories and files in containers, under names of ours, read-only on both sides",
    "a7": "a root on a block device is hot-plugged under an id derived from the container, and noted",
    "a8": "otherwise it is shared, by virtio-fs or 9p",
    "a9": "block devices of the host in containers",
    "a10": "a start that fails is undone",
    "a11": "stop waits, kills, and gives everything back in reverse order, whatever fails",
    "a12": "signals: to what runs or was created, and known ones only",
    "a13": "exec: only where something runs, with stdio, user and environment of its own",
    "a14": "the processes of a container as a table and as JSON",
    "a15": "pause, resume, update, stats",
    "b1": "what survives a reboot, and what does not, are in places apart",
    "b2": "each datum of a pod and of a container is on disk",
    "b3": "directories are closed to others, and an unknown id is an error of its own",
    "b4": "documents of devices come back as what they were",
    "b5": "a document is replaced whole or not at all",
    "b6": "one at a time changes a pod",
    "b7": "what is removed takes all that it owned with it, and nothing else",
    "b8": "what is damaged is named, and spoils nothing else",
    "c5": "what is made in part is undone, also after a kill",
    "c6": "starting mounts a container's files, stopping unmounts them, removing deletes them",
    "c7": "names are reserved before work starts, released if it fails; a conflict names the holder",
    "c8": "ids may be any unique prefix",
}
NAMED = re.compile(r"^ *(?:async )?def test_((?:[a-d]\d+_)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def named() -> set[str]:
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for rows in NAMED.findall(path.read_text()):
            found.update(rows.rstrip("_").split("_"))
    return found


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test_that_is_named_for_it(named: set[str], row: str) -> None:
    assert row in named, ROWS[row]
