"""A supervisor's log is in memory of the host, and a guest can be the reason for any number of lines."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from vmsandbox import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, as it was before when the test has ended."""
    made = logging.getLogger()
    handlers, level = [*made.handlers], made.level
    yield made
    made.handlers[:] = handlers
    made.setLevel(level)


def test_a_log_keeps_its_newest_lines_and_stays_small(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MOST", 10_000)
    path = tmp_path / "supervisor.log"
    with path.open("a") as stream:
        log.configure(stream)
        for number in range(1000):
            root.info("line %d", number)
            assert path.stat().st_size < 10_200
    numbers = [int(line.rsplit(" ", 1)[1]) for line in path.read_text().splitlines()]
    assert numbers == [*range(numbers[0], 1000)]
    assert len(numbers) > 50


def test_what_cannot_be_shortened_is_written_all_the_same(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MOST", 10)
    reading, writing = os.pipe()
    with open(reading) as heard, open(writing, "w") as stream:
        log.configure(stream)
        root.warning("one")
        root.warning("two")
        stream.close()
        assert [line.rsplit(" ", 1)[1] for line in heard.read().splitlines()] == ["one", "two"]


def test_a_threshold_that_is_set_already_is_not_set_again(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.set_level("WARNING")
    assert root.level == logging.WARNING
    with monkeypatch.context() as patched:
        patched.setattr(logging.Manager, "_clear_cache", lambda _manager: pytest.fail("all loggers are written to"))
        log.set_level(logging.WARNING)
