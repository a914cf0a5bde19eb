from __future__ import annotations

from typing import Any

import pytest

from vmsandbox.config.model import SandboxSettings
from vmsandbox.errors import InvalidArgumentError
from vmsandbox.supervisor.regulation import changes, resources, wider
from vmsandbox.supervisor.sandbox import Demand


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"cpus": 1.5}, {"cpu": {"quota": 150_000, "period": 100_000}}),
        ({"memory": "64m"}, {"memory": {"limit": 64 << 20}}),
        ({"pids_limit": 0}, {"pids": {"limit": -1}}),
        ({"pids_limit": 9, "cpu_shares": 20}, {"cpu": {"shares": 20}, "pids": {"limit": 9}}),
        ({"cpuset_cpus": "0-1"}, {"cpu": {"cpus": "0-1"}}),
        ({"cpus": 0}, {"cpu": {"quota": -1, "period": 100_000}}),
        ({"cpu_shares": 0}, {"unified": {"cpu.weight": "100"}}),
    ],
)
def test_only_what_changes_is_sent(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert resources(changes({"options": given})) == expected


@pytest.mark.parametrize("given", [None, {}, {"privileged": True}, {"memory": "1k"}, {"cpus": -1}, {"cpuset_cpus": ""}])
def test_an_update_that_makes_no_sense_is_refused(given: object) -> None:
    with pytest.raises(InvalidArgumentError):
        changes({"options": given})


def test_the_machine_covers_both_limits_while_they_change() -> None:
    settings = SandboxSettings()
    small, large = Demand(cpus=1, memory_mib=64), Demand(cpus=4, memory_mib=4096)
    assert wider(small, large, settings) == wider(large, small, settings) == large
    assert wider(Demand(cpus=8, memory_mib=64), large, settings) == Demand(cpus=8, memory_mib=4096)


def test_a_container_without_a_limit_counts_as_what_it_is_given() -> None:
    settings = SandboxSettings()
    little = Demand(cpus=0.5, memory_mib=16)
    assert wider(Demand(), little, settings) == Demand()
