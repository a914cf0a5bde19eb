"""Control groups, as files in both versions."""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

import pytest

from vmsandbox_agent.cgroup import ControllerCgroups, OomWatcher, Stats, UnifiedCgroups, detect


def place(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".", 1)).write_text(content)


@pytest.fixture
def unified(tmp_path: Path) -> UnifiedCgroups:
    place(tmp_path, cgroup__controllers="cpu memory pids\n", cgroup__subtree_control="")
    place(
        tmp_path / "containers/web",
        cpu__stat="usage_usec 100\nuser_usec 60\nsystem_usec 40\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\n",
        memory__current="1000\n",
        memory__max="max\n",
        memory__peak="2000\n",
        memory__events="low 0\noom 3\noom_kill 2\n",
        memory__stat="anon 10\nfile 20\n",
        pids__current="3\n",
        pids__max="50\n",
        io__stat="8:0 rbytes=100 wbytes=10 rios=1\n8:16 rbytes=5 wbytes=6\n",
        cgroup__procs="11\n12\n",
        cgroup__kill="",
    )
    place(tmp_path / "containers/web/below", cgroup__procs="13\n")
    return UnifiedCgroups(tmp_path)


def test_the_version_is_seen(tmp_path: Path, unified: UnifiedCgroups) -> None:
    assert isinstance(detect(tmp_path), UnifiedCgroups)
    assert isinstance(detect(tmp_path / "containers"), ControllerCgroups)


@pytest.mark.parametrize(("file", "known"), [("io.weight", True), ("io.bfq.weight", True), ("io.max", False)])
def test_weights_are_known_by_their_files(unified: UnifiedCgroups, tmp_path: Path, file: str, known: bool) -> None:
    (tmp_path / "containers" / file).touch()
    assert unified.has_io_weights("/containers") is known


def test_unified_statistics(unified: UnifiedCgroups) -> None:
    assert unified.stats("/containers/web") == Stats(
        cpu_usage_us=100,
        cpu_user_us=60,
        cpu_system_us=40,
        cpu_periods=7,
        cpu_throttled_periods=2,
        cpu_throttled_us=9,
        memory_bytes=1000,
        memory_limit_bytes=0,
        memory_max_bytes=2000,
        pids=3,
        pids_limit=50,
        io_read_bytes=105,
        io_write_bytes=16,
        oom_kills=2,
        memory_stat={"anon": 10, "file": 20},
    )


def test_unified_limits_become_what_they_were(unified: UnifiedCgroups, tmp_path: Path) -> None:
    group = tmp_path / "containers/web"
    place(group, io__max="8:0 rbps=5\n", memory__pressure="some", cgroup__freeze="0")
    before = unified.limits("/containers/web")
    assert before.items() >= {"memory.max": "max\n", "pids.max": "50\n", "io.max": "8:0 rbps=5\n"}.items()
    assert not {"memory.pressure", "cgroup.procs", "cgroup.freeze"} & before.keys()
    place(group, pids__max="7\n", memory__max="1000\n")
    unified.restore("/containers/web", before)
    assert unified.limits("/containers/web") == before


def test_a_device_that_had_no_limit_has_none_again(unified: UnifiedCgroups, tmp_path: Path) -> None:
    place(tmp_path / "containers/web", io__max="")
    before = unified.limits("/containers/web")
    place(tmp_path / "containers/web", io__max="8:16 rbps=5 wbps=max riops=max wiops=max\n")
    unified.restore("/containers/web", before)
    assert (tmp_path / "containers/web/io.max").read_text() == "8:16 rbps=max wbps=max riops=max wiops=max"


def test_a_group_that_is_gone_has_nothing(unified: UnifiedCgroups, tmp_path: Path) -> None:
    for groups in (unified, ControllerCgroups(tmp_path)):
        assert groups.stats("/containers/gone") == Stats()
        assert groups.processes("/containers/gone") == []
        assert groups.oom_kills("/containers/gone") == 0
        assert groups.limits("/containers/gone") == {}
        groups.kill("/containers/gone")


def test_processes_below_count_and_all_are_killed_at_once(unified: UnifiedCgroups, tmp_path: Path) -> None:
    assert sorted(unified.processes("/containers/web")) == [11, 12, 13]
    unified.kill("/containers/web")
    assert (tmp_path / "containers/web/cgroup.kill").read_text() == "1"


def test_containers_leave_processes_to_the_agent(unified: UnifiedCgroups, tmp_path: Path) -> None:
    place(tmp_path / "all", pids__max="max", cgroup__subtree_control="")
    unified.prepare("/all")
    highest = min(int(Path(f"/proc/sys/kernel/{name}").read_text()) for name in ("threads-max", "pid_max"))
    assert int((tmp_path / "all/pids.max").read_text()) == highest - 256
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+pids"  # the last of three writes


def test_the_agent_is_put_aside(unified: UnifiedCgroups, tmp_path: Path) -> None:
    place(tmp_path / "agent", memory__min="0", cgroup__procs="")
    unified.protect("/agent", 12345)
    assert (tmp_path / "agent/memory.min").read_text() == "12345"
    assert (tmp_path / "agent/cgroup.procs").read_text() == str(os.getpid())


def test_controller_statistics(tmp_path: Path) -> None:
    place(tmp_path / "cpu/c/web", cpu__stat="nr_periods 7\nnr_throttled 2\nthrottled_time 9000\n")
    place(tmp_path / "cpuacct/c/web", cpuacct__usage="100000\n", cpuacct__stat="user 1\nsystem 2\n")
    place(
        tmp_path / "memory/c/web",
        memory__usage_in_bytes="1000",
        memory__limit_in_bytes="9223372036854771712",
        memory__max_usage_in_bytes="2000",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        memory__stat="rss 5\n",
    )
    place(tmp_path / "pids/c/web", pids__current="3", pids__max="max", cgroup__procs="21\n")
    groups = ControllerCgroups(tmp_path)
    stats = groups.stats("/c/web")
    assert (stats.cpu_usage_us, stats.cpu_throttled_us, stats.cpu_system_us) == (100, 9, 20000)
    assert (stats.memory_bytes, stats.memory_limit_bytes, stats.memory_max_bytes) == (1000, 0, 2000)
    assert (stats.pids, stats.pids_limit, stats.oom_kills, stats.memory_stat) == (3, 0, 4, {"rss": 5})
    assert groups.processes("/c/web") == [21]


class Kills:
    """Groups whose kills are announced through an eventfd."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.gone: set[str] = set()

    def watch_oom(self, group: str) -> tuple[list[int], int]:
        if group == "/without":
            raise FileNotFoundError(group)
        self.fds[group] = os.eventfd(0, os.EFD_NONBLOCK)
        return [os.dup(self.fds[group]), self.fds[group]], select.EPOLLIN

    def oom_kills(self, group: str) -> int:
        if group in self.gone:
            raise OSError(19, "gone")
        return self.counts[group]

    def happen(self, group: str, count: int) -> None:
        self.counts[group] = count
        os.eventfd_write(self.fds[group], 1)


def test_kills_are_told_as_they_happen() -> None:
    groups = Kills()
    told: list[tuple[str, int]] = []
    arrived = threading.Semaphore(0)

    def report(container: str, count: int) -> None:
        told.append((container, count))
        arrived.release()

    watcher = OomWatcher(groups, report)  # type: ignore[arg-type]
    for name in ("a", "b", "without"):
        watcher.add(name, f"/{name}")
    groups.happen("/a", 1)
    assert arrived.acquire(timeout=5)
    groups.happen("/b", 2)
    assert arrived.acquire(timeout=5)
    watcher.remove("a")
    groups.gone.add("/b")
    groups.happen("/b", 3)
    watcher.add("c", "/c")
    groups.happen("/c", 4)
    assert arrived.acquire(timeout=5)
    assert told == [("a", 1), ("b", 2), ("c", 4)]
    watcher.stop()
