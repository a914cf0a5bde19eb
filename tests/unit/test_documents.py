"""Documents on disk come back whole, or are named."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import pytest

from vmsandbox import documents

if TYPE_CHECKING:
    from pathlib import Path


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "x.json")
    documents.write(path, {"id": "a", "n": [1, 2]})
    assert documents.read(path) == {"version": documents.VERSION, "id": "a", "n": [1, 2]}
    assert os.listdir(tmp_path) == ["x.json"]
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_b5_a_document_that_cannot_be_written_leaves_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = str(tmp_path / "x.json")
    documents.write(path, {"id": "old"})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            documents.write(path, {"id": "new"})
    assert documents.read(path)["id"] == "old"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"version": "1"}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "truncated", "no-object", "no-version", "foreign-version", "binary", "deep"],
)
def test_a_damaged_document_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(documents.DamagedDocumentError, match=str(path)):
        documents.read(str(path))


def test_a_document_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": documents.VERSION + 1}))
    with pytest.raises(documents.DamagedDocumentError, match="newer"):
        documents.read(str(path))
