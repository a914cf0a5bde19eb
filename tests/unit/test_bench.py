"""The benchmark's arithmetic: from samples to rows, from what was seen of a pod to phases, from /proc to numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from scripts.benchmarks import main, memory, phases, processes, report
from scripts.benchmarks.processes import CommandError, Reaped
from scripts.benchmarks.rows import Figure, Measurement, MissingError, Row, chosen, figures, shown
from scripts.benchmarks.watch import Seen, Watch
from scripts.benchmarks.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FLOOR = Row("cold_boot_floor", "s", "the floor")
CRUN = Row("crun_run", "s", "crun")
RUN = Row("run_cold", "s", "a run", against="cold_boot_floor", compared=True)
CLIENT = Row("run_cold.client", "s", "its client", against="run_cold")
OTHER = Row("pss_pod", "MiB", "memory")


def nothing(_place: Workplace) -> Mapping[str, float]:
    return {}


def measuring(*rows: Row, most_runs: int | None = None, warm_up: bool = True) -> Measurement:
    return Measurement(rows, nothing, most_runs, warm_up)


ALL = [measuring(FLOOR), measuring(CRUN), measuring(RUN, CLIENT), measuring(OTHER)]


def by_name(found: list[Figure]) -> dict[str, Figure]:
    assert len({figure.name for figure in found}) == len(found), "a name stands for one row"
    return {figure.name: figure for figure in found}


def test_a_figure_is_the_median_and_its_ratio_that_of_medians() -> None:
    found = by_name(figures([FLOOR, RUN], {"cold_boot_floor": [1.0, 2.0, 9.0], "run_cold": [4.0, 5.0, 3.0]}))
    assert found["run_cold"].value == 4.0
    assert found["run_cold"].against == "cold_boot_floor"
    assert found["run_cold"].ratio == 2.0
    assert (found["run_cold"].low, found["run_cold"].high) == (3.0, 5.0)


def test_a_compared_row_has_a_row_for_each_yardstick_that_was_measured() -> None:
    samples = {"cold_boot_floor": [2.0], "crun_run": [0.01], "run_cold": [4.0]}
    found = by_name(figures([FLOOR, CRUN, RUN], samples))
    assert found["run_cold.vs_crun_run"].ratio == 400.0
    assert "run_cold.vs_podman_run" not in found
    assert "run_cold.vs_cold_boot_floor" not in found


def test_a_row_without_samples_is_there_and_empty() -> None:
    found = by_name(figures([FLOOR, RUN], {"cold_boot_floor": [2.0]}))
    assert found["run_cold"].document() == {
        "name": "run_cold",
        "value": None,
        "unit": "s",
        "against": "cold_boot_floor",
        "ratio": None,
    }


def test_the_json_report_is_one_object_of_rows() -> None:
    document = json.loads(report.as_json(figures([FLOOR, RUN], {"cold_boot_floor": [3.0], "run_cold": [1.0]})))
    assert list(document) == ["rows"]
    assert [set(row) for row in document["rows"]] == [{"name", "value", "unit", "against", "ratio"}] * 2
    assert document["rows"][1] == {
        "name": "run_cold",
        "value": 1.0,
        "unit": "s",
        "against": "cold_boot_floor",
        "ratio": 0.33333,
    }


def test_the_text_report_names_what_is_missing() -> None:
    text = report.as_text(figures([FLOOR, RUN], {"cold_boot_floor": [2.0]}), runs=1)
    line = next(line for line in text.splitlines() if line.startswith("run_cold"))
    assert "missing" in line


def test_asking_for_a_row_brings_what_it_is_compared_with() -> None:
    wanted = chosen(["run_cold.client"], ALL)
    assert [found.names for found in wanted] == [("cold_boot_floor",), ("crun_run",), ("run_cold", "run_cold.client")]


def test_asking_for_a_row_shows_its_parts_and_references_only() -> None:
    measurements = chosen(["run_cold"], ALL)
    assert [row.name for row in shown(["run_cold"], measurements)] == [
        "cold_boot_floor",
        "crun_run",
        "run_cold",
        "run_cold.client",
    ]


def test_parts_that_another_measurement_yields_come_along() -> None:
    part = Measurement((Row("run_cold.engine", "s", "elsewhere"),), lambda _: {}, None, True)
    measurements = chosen(["run_cold"], [*ALL, part])
    assert part in measurements
    assert shown(["run_cold"], measurements)[-1].name == "run_cold.engine"


def test_parts_of_what_a_row_is_compared_with_are_left_out() -> None:
    part = Measurement((Row("crun_run.engine", "s", "elsewhere"),), lambda _: {}, None, True)
    assert part not in chosen(["run_cold"], [*ALL, part])


def test_asking_for_nothing_measures_everything() -> None:
    assert chosen([], ALL) == ALL


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(KeyError, match="run_hot"):
        chosen(["run_hot"], ALL)


def test_rounds_take_turns_and_the_first_does_not_count() -> None:
    order: list[str] = []

    def sampling(row: Row) -> Measurement:
        def sample(_place: Workplace) -> Mapping[str, float]:
            order.append(row.name)
            return {row.name: float(len(order))}

        return Measurement((row,), sample, None, True)

    samples, reasons = main.measure(Workplace(), [sampling(FLOOR), sampling(CRUN)], runs=2)
    assert order == ["cold_boot_floor", "crun_run"] * 3
    assert samples == {"cold_boot_floor": [3.0, 5.0], "crun_run": [4.0, 6.0]}
    assert reasons == {}


@pytest.mark.parametrize("error", [MissingError("no crun"), CommandError("it broke")], ids=["missing", "failing"])
def test_a_row_that_cannot_be_measured_says_why_and_stops_nothing(error: Exception) -> None:
    calls = 0

    def failing(_place: Workplace) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        raise error

    def working(_place: Workplace) -> Mapping[str, float]:
        return {"cold_boot_floor": 1.0}

    broken = Measurement((CRUN,), failing, None, True)
    sound = Measurement((FLOOR,), working, None, True)
    samples, reasons = main.measure(Workplace(), [broken, sound], runs=3)
    assert samples == {"cold_boot_floor": [1.0] * 3}
    assert reasons == {"crun_run": str(error)}
    assert calls == 1


def test_a_long_measurement_takes_part_in_as_many_rounds_as_it_may() -> None:
    capped = measuring(OTHER, most_runs=2, warm_up=False)
    assert [main.is_due(capped, turn) for turn in range(4)] == [False, True, True, False]


# ---------------------------------------------------------------- phases

POD = "abc123"


def pod_seen(*, answered: float | None = 1.5) -> list[Seen]:
    guest = {"guest_kernel": 1.0, **({"guest_answered": answered} if answered is not None else {})}
    return [
        Seen(10.01, POD),
        Seen(10.05, f"{POD}/supervisor.log"),
        Seen(10.35, f"{POD}/vm"),
        Seen(10.36, f"{POD}/vm/qmp.sock"),
        Seen(10.5, f"{POD}/sandbox.json", {"status": "creating"}),
        Seen(12.0, f"{POD}/sandbox.json", {"status": "ready", "phases": guest}),
        Seen(12.4, f"{POD}/containers/x.json", {"status": "running"}),
        Seen(12.5, f"{POD}/containers/x.json", {"status": "stopped"}),
    ]


def test_phases_follow_each_other_without_gap() -> None:
    found = phases.of_boot(pod_seen(), phases.Span(10.0, 2.75), qemu=0.04)
    assert found == pytest.approx(
        {
            "client": 0.05,
            "supervisor": 0.31,
            "qemu": 0.04,
            "firmware": 0.1,
            "kernel": 1.0,
            "agent": 0.5,
            "container": 0.5,
            "teardown": 0.25,
        }
    )
    assert sum(found.values()) == pytest.approx(2.75)


def test_phases_that_cannot_be_told_are_left_out() -> None:
    found = phases.of_boot(pod_seen(answered=None), phases.Span(10.0, 2.75), qemu=0.04)
    assert set(found) == {"client", "supervisor", "qemu", "container", "teardown"}


def test_a_run_of_which_nothing_was_seen_has_no_phases() -> None:
    assert phases.of_boot([], phases.Span(1.0, 1.0)) == {}


def test_a_clone_has_one_phase_in_place_of_a_boot() -> None:
    found = phases.of_clone(pod_seen(answered=None), phases.Span(10.0, 2.75))
    assert found == pytest.approx(
        {"client": 0.05, "supervisor": 0.31, "clone": 1.64, "container": 0.5, "teardown": 0.25}
    )


def test_a_watch_sees_files_and_documents_below_new_directories(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    with Watch(tmp_path) as watch:
        script = (
            "import os, sys; os.chdir(sys.argv[1]); os.makedirs('pod/vm'); open('pod/log', 'w').close();"
            "open('pod/t', 'w').write('{\"status\": \"ready\"}'); os.rename('pod/t', 'pod/sandbox.json')"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    paths = [seen.path for seen in watch.seen]
    assert {"pod", "pod/vm", "pod/log", "pod/sandbox.json"} <= set(paths)
    assert "before" not in paths
    assert any(seen.document == {"status": "ready"} for seen in watch.seen)
    assert [seen.time for seen in watch.seen] == sorted(seen.time for seen in watch.seen)


# ---------------------------------------------------------------- processes and memory


def test_a_failed_command_is_reported_with_its_last_words() -> None:
    with pytest.raises(CommandError, match="ended with status 3: second"):
        processes.run([sys.executable, "-c", "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(3)"])


def test_a_command_is_charged_for_what_it_left_running() -> None:
    leaving = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    end = time.process_time() + 0.1\n"
        "    while time.process_time() < end: pass\n"
    )
    ended = processes.run([sys.executable, "-c", leaving], settle=True)
    assert len(ended.reaped) == 2
    assert ended.reaped[1].total >= 0.1


def test_what_is_left_running_can_be_dismissed_and_counts() -> None:
    def dismiss(pids: set[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    lasting = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
    ended = processes.run([sys.executable, "-c", lasting], settle=True, dismiss=dismiss)
    assert len(ended.reaped) == 2


def test_what_a_supervisor_waited_for_is_not_charged_to_us() -> None:
    from scripts.benchmarks.pods import shares

    client = Reaped(1, "vmsandbox", total=0.05, children=0.02)
    supervisor = Reaped(2, "vmsandbox-super", total=2.5, children=2.2)
    found = shares([client, supervisor])
    assert found["host_cpu_per_run"] == pytest.approx(0.35)
    assert found["run_cold.vm_cpu"] == pytest.approx(2.2)


def test_a_process_with_blanks_and_parentheses_in_its_name_is_read() -> None:
    tail = "S 7 1 1 0 -1 4194560 1 0 0 0 100 50 30 20 20 0 1 0 5 0 0"
    stat = processes.parse_stat(f"42 (a (b) c) {tail}")
    assert (stat.name, stat.state, stat.parent) == ("a (b) c", "S", 7)
    assert stat.seconds == 150 / processes.TICKS
    assert stat.children_seconds == 50 / processes.TICKS


SMAPS = """\
7f00-7f10 rw-s 00000000 00:01 1234                       /memfd:memory-backend-memfd (deleted)
Size:             131072 kB
Rss:               40000 kB
Pss:               40000 kB
7f20-7f30 rw-s 00000000 00:01 1234                       /memfd:memory-backend-memfd (deleted)
Rss:                 100 kB
Pss:                  50 kB
Anonymous:            30 kB
7f40-7f50 r--p 00000000 fe:00 99                         /usr/lib/libc.so.6
Rss:                1000 kB
"""


def test_resident_pages_of_memory_files_are_counted_by_file() -> None:
    assert memory.parse_memfds(SMAPS) == {1234: (40070, 40050)}


def test_blocks_of_a_memory_file_that_nobody_maps_are_counted() -> None:
    fd = os.memfd_create("bench-test")
    try:
        os.write(fd, bytes(8 * 1024 * 1024))
        before = memory.footprint([os.getpid()]).unmapped
    finally:
        os.close(fd)
    assert before - memory.footprint([os.getpid()]).unmapped == 8 * 1024


def test_pss_is_that_of_the_whole_process() -> None:
    assert memory.parse_pss("Rss:  200 kB\nPss:                123 kB\nPss_Anon:  50 kB\n") == 123
    assert memory.footprint([os.getpid()]).total_mib > 1


def test_the_shells_times_become_seconds() -> None:
    from scripts.benchmarks.sharing import seconds

    printed = "128+0 records in\n128+0 records out\nreal\t0m 0.50s\nuser\t0m 0.00s\nreal\t1m 2.25s\nuser\t0m 0.1s\n"
    assert seconds(printed) == (0.5, 62.25)
    with pytest.raises(CommandError, match="two times"):
        seconds("real\t0m 0.50s\n")
