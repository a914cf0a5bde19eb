from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmsandbox import records
from vmsandbox.errors import AlreadyExistsError, AmbiguousError, InvalidArgumentError, NotFoundError
from vmsandbox.paths import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    made = Roots(tmp_path / "run", tmp_path / "data")
    for directory in (made.by_container_dir, made.names_dir):
        os.makedirs(directory)
    return made


def add(roots: Roots, container_id: str, **document: object) -> str:
    sandbox = roots.sandbox(container_id)
    os.makedirs(sandbox.containers_dir)
    path = sandbox.container_file(container_id)
    records.write_document(path, {"id": container_id, "status": "stopped", **document})
    os.symlink(os.path.relpath(sandbox.dir, roots.by_container_dir), f"{roots.by_container_dir}/{container_id}")
    return path


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "x.json")
    records.write_document(path, {"id": "a", "n": [1, 2]})
    assert records.read_document(path) == {"version": records.VERSION, "id": "a", "n": [1, 2]}
    assert os.listdir(tmp_path) == ["x.json"]
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"version": "1"}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "truncated", "no-object", "no-version", "foreign-version", "binary", "deep"],
)
def test_a_damaged_document_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(records.DamagedDocumentError, match=str(path)):
        records.read_document(str(path))


def test_a_document_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": records.VERSION + 1}))
    with pytest.raises(records.DamagedDocumentError, match="newer"):
        records.read_document(str(path))


def test_a_damaged_container_does_not_spoil_the_others(roots: Roots) -> None:
    add(roots, "aa" * 32)
    Path(add(roots, "bb" * 32)).write_text("{")
    found = list(records.containers(roots))
    assert [type(item) for item in found] == [records.Container, records.DamagedDocumentError]


def test_a_running_container_whose_stand_in_is_gone_counts_as_stopped(roots: Roots) -> None:
    me = {"pid": os.getpid(), "start_time": records.start_time(os.getpid())}
    add(roots, "aa" * 32, status="running", standin=me)
    add(roots, "bb" * 32, status="running", standin={**me, "start_time": 1})
    assert records.load(roots, "aa" * 32).status() == "running"
    assert records.load(roots, "bb" * 32).status() == "stopped"


def test_ids_are_found_by_name_by_id_and_by_unique_prefix(roots: Roots) -> None:
    first, second = "abc1" * 16, "abd1" * 16
    add(roots, first)
    add(roots, second)
    records.reserve_name(roots, "web", first)
    assert records.resolve(roots, "web") == first
    assert records.resolve(roots, second) == second
    assert records.resolve(roots, "abd") == second
    with pytest.raises(AmbiguousError, match=r"abc1abc1abc1abc1, abd1abd1abd1abd1"):
        records.resolve(roots, "ab")


@pytest.mark.parametrize("reference", ["nothing", "", ".", "..", "../x", "a/b"])
def test_what_does_not_exist_is_not_found(roots: Roots, reference: str) -> None:
    with pytest.raises(NotFoundError):
        records.resolve(roots, reference)


def test_a_taken_name_names_its_holder(roots: Roots) -> None:
    records.reserve_name(roots, "web", "f00d" * 16)
    with pytest.raises(AlreadyExistsError, match="f00df00df00d"):
        records.reserve_name(roots, "web", "beef" * 16)
    records.release_name(roots, "web", "beef" * 16)
    with pytest.raises(AlreadyExistsError):
        records.reserve_name(roots, "web", "beef" * 16)
    records.release_name(roots, "web", "f00d" * 16)
    records.reserve_name(roots, "web", "beef" * 16)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "ü", "x" * 129])
def test_a_name_that_is_no_safe_file_name_is_refused(roots: Roots, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        records.reserve_name(roots, name, "f00d" * 16)


def test_forgetting_a_container_leaves_nothing_of_it(roots: Roots) -> None:
    container_id = "ab" * 32
    add(roots, container_id)
    records.reserve_name(roots, "web", container_id)
    data = Path(roots.container_data_dir, container_id)
    data.mkdir(parents=True)
    (data / "scratch.img").write_text("x")
    records.forget_container(roots, container_id, name="web", image_id="")
    records.forget_container(roots, container_id, name="web", image_id="")
    assert records.forget_sandbox_if_empty(roots.sandbox(container_id))
    assert [path for path in [*roots.run.rglob("*"), *roots.data.rglob("*")] if not path.is_dir()] == []
    assert records.container_ids(roots) == []


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    records.remove_tree(str(tree))
    assert (outside / "kept").exists()
    assert not tree.exists()
