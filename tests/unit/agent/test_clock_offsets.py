"""Time namespaces, made for real on this machine."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from vmsandbox_agent import clock_offsets
from vmsandbox_agent.errors import InvalidArgumentError

DAY = 86400


@pytest.fixture(autouse=True)
def _needs_time_namespaces() -> None:
    if os.getuid() != 0 or not os.path.exists("/proc/self/timens_offsets"):
        pytest.fail("root and Linux 5.6 are needed")


def test_a_container_joins_a_namespace_with_its_clocks() -> None:
    linux = {
        "namespaces": [{"type": "mount"}, {"type": "time"}],
        "timeOffsets": {"boottime": {"secs": DAY, "nanosecs": 5}},
    }
    before = os.readlink("/proc/self/ns/time")
    namespace = clock_offsets.take(linux)
    try:
        assert linux == {"namespaces": [{"type": "mount"}]}
        argv = clock_offsets.inside(f"/proc/{os.getpid()}/fd/{namespace}", ["/usr/bin/cat", "/proc/uptime"])
        said = subprocess.check_output(argv, text=True)
        assert float(said.split()[0]) >= time.clock_gettime(time.CLOCK_BOOTTIME) - 60 + DAY
    finally:
        os.close(namespace)
    # The agent's own clocks are what they were.
    assert os.readlink("/proc/self/ns/time") == before == os.readlink("/proc/self/ns/time_for_children")


def test_nothing_is_made_that_is_not_asked_for() -> None:
    assert clock_offsets.take({"namespaces": [{"type": "mount"}]}) == -1
    assert clock_offsets.inside("", ["/x", "y"]) == ["/x", "y"]


def test_offsets_that_the_kernel_does_not_take_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"linux\.timeOffsets"):
        clock_offsets.made({"boottime": {"secs": -(2**62), "nanosecs": 0}})
