"""Of a failed test is kept what its machines left, whatever it used them by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.harness import evidence

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("how", ["cli", "runtime", "pair", "inner"])
def test_logs_below_a_run_root_are_kept(tmp_path: Path, how: str) -> None:
    (tmp_path / "s/pod/vm").mkdir(parents=True)
    (tmp_path / "s/pod/vm/console.log").write_text("x" * evidence.MOST + "the end")
    (tmp_path / "s/pod/other").write_text("nothing")
    cli = SimpleNamespace(run_root=tmp_path)
    used: dict[str, object] = {
        "cli": cli,
        "runtime": SimpleNamespace(root=tmp_path),
        "pair": (cli, "an id"),
        "inner": SimpleNamespace(cli=cli),
    }
    ((path, text),) = evidence.kept([used[how], "something", 5])
    assert path.endswith("s/pod/vm/console.log")
    assert text.endswith("the end")
    assert len(text) == evidence.MOST
