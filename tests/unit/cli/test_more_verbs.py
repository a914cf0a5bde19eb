from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmsandbox.cli import table
from vmsandbox.cli.main import VERBS, Options
from vmsandbox.cli.verbs import run, stats, stop, top, update
from vmsandbox.errors import InvalidArgumentError


@pytest.mark.parametrize(
    "verb", ["pause", "unpause", "top", "stats", "update", "create", "start", "restart", "logs", "cp", "pod"]
)
def test_a_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import import_module

    with pytest.raises(SystemExit) as ended:
        import_module(f"vmsandbox.cli.verbs.{verb}").main(Options(), ["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vmsandbox {verb}")
    assert verb in VERBS


def test_an_update_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="nothing to update"):
        update.main(Options(), ["web"])


@pytest.mark.parametrize("verb", ["run", "create"])
def test_a_zero_is_a_choice(verb: str) -> None:
    words = ["--pids-limit", "0", "--cpus", "0", "--cpu-shares", "0", "box"]
    options = run.container_options(run.parser(verb=verb).parse_args(words))
    assert options == {"pids_limit": 0, "cpus": 0.0, "cpu_shares": 0}


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("2.5", 2.5), ("-1", -1)])
def test_a_time_to_obey(text: str, expected: float) -> None:
    assert stop.seconds(text) == expected


@pytest.mark.parametrize("text", ["nan", "-2", "-0.5", "inf", "1e9", "soon"])
@pytest.mark.parametrize("verb", ["stop", "restart", "pod"])
def test_a_time_that_is_none_is_refused(verb: str, text: str) -> None:
    from importlib import import_module

    words = ["stop"] if verb == "pod" else []
    with pytest.raises(InvalidArgumentError, match="--time"):
        import_module(f"vmsandbox.cli.verbs.{verb}").main(Options(), [*words, "-t", text, "web"])


def test_an_update_says_what_was_not_given_back() -> None:
    answer = {"memory_mib": 768, "memory_kept_mib": 128, "cpus": 2, "cpus_kept": 1}
    assert [text.partition(":")[0] for text in update.kept(answer)] == [
        "the virtual machine could not give back 128 MiB yet",
        "the virtual machine keeps 2 vCPUs, 1 of them offline",
    ]
    assert update.kept({**answer, "memory_kept_mib": 0, "cpus_kept": 0}) == []


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [
        (None, {"time_ns": 1, "cpu_usage_us": 1}, 0.0),
        ({"time_ns": 0, "cpu_usage_us": 0}, {"time_ns": 10**9, "cpu_usage_us": 250_000}, 25.0),
        ({"time_ns": 0, "cpu_usage_us": 0}, {"time_ns": 2 * 10**9, "cpu_usage_us": 4_000_000}, 200.0),
        ({"time_ns": 5, "cpu_usage_us": 0}, {"time_ns": 5, "cpu_usage_us": 9}, 0.0),
        ({"time_ns": 0, "cpu_usage_us": 9}, {"time_ns": 10**9, "cpu_usage_us": 0}, 0.0),
    ],
)
def test_processor_use_is_that_between_two_readings(
    before: dict[str, Any] | None, after: dict[str, Any], percent: float
) -> None:
    assert stats.cpu_percent(before, after) == percent


def test_memory_use_leaves_out_what_the_kernel_would_drop() -> None:
    reading = {
        "memory_bytes": 100,
        "memory_limit_bytes": 0,
        "pod_memory_bytes": 1000,
        "memory_stat": {"inactive_file": 40},
        "time_ns": 1,
        "cpu_usage_us": 1,
    }
    container: Any = SimpleNamespace(id="a" * 64, name="web")
    row = stats.row(container, None, reading)
    assert (row["memory_used_bytes"], row["memory_percent"]) == (60, 6.0)
    assert "memory_stat" not in row


def test_a_process_cannot_write_to_the_terminal_by_its_name() -> None:
    row = {
        "user": "",
        "uid": 7,
        "pid": 1,
        "parent_pid": 0,
        "state": "S",
        "rss_kib": 4,
        "tty": "",
        "cpu_ms": 3_723_000,
        "command": "a\x1b[2Jb",
    }
    assert top.line(row) == ("7", "1", "0", "S", "4KiB", "?", "01:02:03", r"a\x1b[2Jb")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (5 << 30, "5GiB"), (3 << 40, "3TiB")]
)
def test_amounts_are_short(count: int, text: str) -> None:
    assert table.amount(count) == text
