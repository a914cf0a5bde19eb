from __future__ import annotations

import pytest

from vmsandbox.config.model import SandboxSettings
from vmsandbox.errors import InvalidArgumentError
from vmsandbox.supervisor import processors


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> SandboxSettings:
    """Of a host with four processors."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    return SandboxSettings(base_cpus=1)


@pytest.mark.parametrize("cpus", [None, 0.5, 4, 4.0])
def test_what_a_pod_can_have_may_be_asked_for(settings: SandboxSettings, cpus: float | None) -> None:
    processors.require_quota(cpus, settings)


def test_more_than_a_pod_can_have_is_refused_and_not_given_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3})
    with pytest.raises(InvalidArgumentError, match=r"^cpus '4.5' is more than a pod can have here, which is 4$"):
        processors.require_quota(4.5, SandboxSettings(base_cpus=1))
    with pytest.raises(InvalidArgumentError, match=r"which is 2: 'sandbox.max_cpus' allows no more$"):
        processors.require_quota(3, SandboxSettings(base_cpus=1, max_cpus=2))


@pytest.mark.parametrize(("text", "online"), [("", 1), ("0", 1), ("0-1", 2), ("1,3", 4)])
def test_processors_that_are_there_may_be_named(settings: SandboxSettings, text: str, online: int) -> None:
    processors.require_set(text, online=online, settings=settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "names vCPU 1, but the pod has 1 of them, counted from 0: give '--cpus 2' as well"),
        ("0-3", "names vCPU 3, but the pod has 1 of them, counted from 0: give '--cpus 4' as well"),
        ("9", "names vCPU 9, but the pod has 1 of them, counted from 0: a pod can have 4 here"),
    ],
)
def test_a_processor_that_is_not_there_is_refused_with_what_would_help(
    settings: SandboxSettings, text: str, said: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^cpuset_cpus '{text}' {said}$"):
        processors.require_set(text, online=1, settings=settings)
