"""containerd's `ctr` over our runtime, with runc as the control that tells whose fault a failure is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.engines import BOX

if TYPE_CHECKING:
    from tests.harness.engines import Engines

OBEDIENT = 'trap "exit 9" TERM; echo up; while :; do sleep 0.1; done'


def _ctr(containerd: Engines, name: str) -> tuple[str, ...]:
    return ("--runc-binary", str(containerd.runtime) if name == "vmsandbox" else "runc")


@pytest.mark.parametrize("name", ["runc", "vmsandbox"])
def test_containerd_runs_a_container_to_its_end(containerd: Engines, name: str) -> None:
    done = containerd("ctr", "run", "--rm", *_ctr(containerd, name), BOX, "brief", "sh", "-c", "echo said; exit 3")
    assert (done.code, done.stdout) == (3, "said\n"), done


@pytest.mark.parametrize("name", ["runc", "vmsandbox"])
def test_containerd_keeps_a_task(containerd: Engines, name: str) -> None:
    containerd.ok("ctr", "run", "-d", *_ctr(containerd, name), BOX, "task", "sh", "-c", OBEDIENT)
    try:
        done = containerd("ctr", "task", "exec", "--exec-id", "e", "task", "sh", "-c", "echo inside; exit 6")
        assert (done.code, done.stdout) == (6, "inside\n"), done
        assert "memory.usage_in_bytes" in containerd.ok("ctr", "task", "metrics", "task")
        assert len(containerd.ok("ctr", "task", "ps", "task").splitlines()) > 1
        containerd.ok("ctr", "task", "pause", "task")
        assert "PAUSED" in containerd.ok("ctr", "task", "ls")
        containerd.ok("ctr", "task", "resume", "task")
        if name == "vmsandbox":
            assert "checkpoint is not supported" in containerd("ctr", "task", "checkpoint", "task").stderr
    finally:
        containerd("ctr", "task", "kill", "-s", "SIGTERM", "task")
        containerd("ctr", "task", "rm", "-f", "task")
        containerd("ctr", "container", "rm", "task")
    assert "task" not in containerd.ok("ctr", "task", "ls", "-q").split()
