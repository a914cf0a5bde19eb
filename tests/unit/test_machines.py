"""Machines that no document tells of are found by their command lines, and end with the last trace of their pod."""

from __future__ import annotations

import fcntl
import os
import resource
from typing import TYPE_CHECKING

import pytest

from tests.harness.impostors import running
from vmsandbox import machines, remains
from vmsandbox.paths import Roots, SandboxPaths

if TYPE_CHECKING:
    from pathlib import Path

ID = "0123456789ab"


@pytest.fixture
def sandbox(tmp_path: Path) -> SandboxPaths:
    found = Roots(str(tmp_path / "run"), str(tmp_path / "data")).sandbox(ID)
    found.vm.mkdir(parents=True)
    return found


def test_a_machine_is_known_by_its_name_and_its_helpers_by_their_directory(sandbox: SandboxPaths) -> None:
    with (
        running("qemu-system-x86_64", "-name", f"guest=vmsandbox-{ID},debug-threads=on") as machine,
        running("/usr/libexec/virtiofsd", "-o", f"source={sandbox.dir}/shared") as helper,
        running("qemu-system-x86_64", "-name", f"guest=vmsandbox-{ID}0,debug-threads=on"),
        running("sh", "-name", f"guest=vmsandbox-{ID},debug-threads=on"),
    ):
        assert sorted(machines.processes(sandbox.dir)) == sorted([machine.pid, helper.pid])


@pytest.mark.parametrize("on_purpose", [False, True])
def test_the_machine_ends_with_its_pods_directory(sandbox: SandboxPaths, on_purpose: bool) -> None:
    roots = Roots(str(sandbox.vm.parents[2]), "")
    with running("qemu-system-x86_64", "-name", f"guest=vmsandbox-{ID},debug-threads=on") as machine:
        if on_purpose:
            remains.forget_pod(roots, sandbox)
        else:
            assert remains.forget_sandbox_if_empty(sandbox)
        assert machine.wait(10) == -9
    assert not sandbox.vm.exists()


def test_what_has_ended_is_no_error(sandbox: SandboxPaths) -> None:
    with running("qemu-system-x86_64") as machine:
        machine.kill()
        machine.wait(10)
    machines.end(machine.pid)
    assert machines.end_all(sandbox.dir) == []


def test_a_process_is_ended_by_one_that_has_many_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    opened = os.pidfd_open

    def high(pid: int) -> int:
        low = opened(pid)
        try:
            return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 2000)
        finally:
            os.close(low)

    monkeypatch.setattr(os, "pidfd_open", high)
    try:
        with running("qemu-system-x86_64") as machine:
            machines.end(machine.pid)
            assert machine.wait(10) == -9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
