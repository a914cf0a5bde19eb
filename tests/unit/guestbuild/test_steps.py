"""A build shows one line per step and keeps what programs print for when they fail."""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING

import pytest

from vmsandbox.guestbuild.steps import BuildError, Steps, output

if TYPE_CHECKING:
    from pathlib import Path

PRINT_AND_FAIL = "import sys; print('much noise', flush=True); print('the reason', file=sys.stderr); sys.exit(3)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_one_line_with_its_time(tmp_path: Path) -> None:
    shown = io.StringIO()
    steps = Steps(shown, tmp_path / "log")
    with steps.step("packing"):
        steps.run([sys.executable, "-c", "print('noise')"])
    assert re.fullmatch(r"packing \.\.\. \d+\.\d s\n", shown.getvalue())
    assert "noise" in (tmp_path / "log").read_text()


def test_a_program_that_fails_is_named_with_its_last_words_and_the_log(tmp_path: Path) -> None:
    shown = io.StringIO()
    steps = Steps(shown, tmp_path / "log")
    with pytest.raises(BuildError) as caught, steps.step("packing"):
        steps.run([sys.executable, "-c", PRINT_AND_FAIL])
    assert shown.getvalue() == "packing ... failed\n"
    assert "status 3: the reason" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    assert "much noise" in caught.value.detail


@pytest.mark.parametrize("program", ["no-such-program", "/no/such/program"])
def test_a_missing_program_says_what_installs_it(tmp_path: Path, program: str) -> None:
    with pytest.raises(BuildError, match=r"scripts/setup"):
        Steps(io.StringIO(), tmp_path / "log").run([program])
    with pytest.raises(BuildError, match=r"scripts/setup"):
        output([program])


def test_programs_do_not_see_the_language_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    code = "import os; print(sorted(n for n in os.environ if n.startswith(('LANG', 'LC_', 'PYTHON'))))"
    assert output([sys.executable, "-I", "-c", code]).strip() == "['LC_ALL']"


def test_a_terminal_sees_the_time_pass_in_the_same_line(tmp_path: Path) -> None:
    shown = Terminal()
    steps = Steps(shown, tmp_path / "log", tick=0.001)
    with steps.step("packing"):
        steps.run([sys.executable, "-c", ""])
    line = r"packing \.\.\.(\rpacking \.\.\. \d+ s )+\rpacking \.\.\. \d+\.\d s\n"
    assert re.fullmatch(line, shown.getvalue())


def test_elsewhere_a_dot_tells_that_time_passes(tmp_path: Path) -> None:
    shown = io.StringIO()
    steps = Steps(shown, tmp_path / "log", tick=0.001)
    with steps.step("packing"):
        steps.run([sys.executable, "-c", ""])
    assert re.fullmatch(r"packing \.\.\.\.+ \d+\.\d s\n", shown.getvalue())
