"""What crun's log says of why it failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox_agent.crun import _last_error

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"msg":"first","level":"error"}\n{"msg":"last","level":"error"}\n{"msg":"x","level":"warning"}\n', "last"),
        ('{"msg":"cut', ""),
        ("unknown `x`\nfirst: No such file\n\n", "first: No such file"),
        ("", ""),
    ],
)
def test_the_last_error_is_the_message_in_either_format(tmp_path: Path, text: str, said: str) -> None:
    assert _last_error(tmp_path / "nosuch") == ""
    (tmp_path / "log").write_text(text)
    assert _last_error(tmp_path / "log") == said
