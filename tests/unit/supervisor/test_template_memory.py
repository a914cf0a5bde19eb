"""A template's memory is loaded once, however many want it at once."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from vmsandbox.supervisor.template import shared_memory
from vmsandbox_hypervisor.qemu.template import MEMORY, STATE, Template

if TYPE_CHECKING:
    from pathlib import Path

SIZE_MIB = 64
#: says which file it has, and keeps it until its input ends
HOLDER = """
import os, sys
from pathlib import Path
from vmsandbox.supervisor.template import shared_memory
from vmsandbox_hypervisor.qemu.template import Template
directory = Path(sys.argv[1])
template = Template.found(directory, size_mib=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
with shared_memory(directory, template) as fd:
    print(os.fstat(fd).st_ino, flush=True)
    sys.stdin.readline()
"""


def saved(directory: Path) -> Template:
    (directory / "holders").mkdir()
    (directory / STATE).write_bytes(b"state")
    (directory / MEMORY).write_bytes(b"x" * (SIZE_MIB << 20))
    return Template.found(directory, size_mib=SIZE_MIB)


def test_those_who_come_at_once_share_one_copy(tmp_path: Path) -> None:
    saved(tmp_path)
    argv = [sys.executable, "-c", HOLDER, str(tmp_path), str(SIZE_MIB)]
    holders = [
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    try:
        assert {said(holder) for holder in holders} == {"ready\n"}
        for holder in holders:
            tell(holder)
        assert len({said(holder) for holder in holders}) == 1
        for holder in holders:
            tell(holder)
        assert [holder.wait(30) for holder in holders] == [0] * 4
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    assert [*(tmp_path / "holders").iterdir()] == []


def said(holder: subprocess.Popen[str]) -> str:
    assert holder.stdout is not None
    return holder.stdout.readline()


def tell(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.write("go\n")


def test_a_template_that_is_removed_meanwhile_is_used_all_the_same(tmp_path: Path) -> None:
    template = saved(tmp_path)
    (tmp_path / "holders").rmdir()
    with shared_memory(tmp_path, template) as fd:
        assert fd >= 0
