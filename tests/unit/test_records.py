from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vmsandbox import documents, records, remains
from vmsandbox.cli import launch
from vmsandbox.errors import AlreadyExistsError, AmbiguousError, InvalidArgumentError, NotFoundError, SandboxError
from vmsandbox.paths import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    made = Roots(tmp_path / "run", tmp_path / "data")
    for directory in (made.by_container_dir, made.by_pod_dir, made.names_dir):
        os.makedirs(directory)
    return made


def add(roots: Roots, container_id: str, **document: object) -> str:
    sandbox = roots.sandbox(container_id)
    os.makedirs(sandbox.containers_dir)
    path = sandbox.container_file(container_id)
    documents.write(path, {"id": container_id, "status": "stopped", **document})
    os.symlink(os.path.relpath(sandbox.dir, roots.by_container_dir), f"{roots.by_container_dir}/{container_id}")
    return path


def test_b6_one_process_at_a_time_has_a_pods_lock(tmp_path: Path) -> None:
    sandbox = Roots(tmp_path, tmp_path).sandbox("ab" * 32)
    os.makedirs(sandbox.dir)
    other = ["flock", "--nonblock", sandbox.lock_file, "true"]
    with launch.locked(sandbox):
        assert subprocess.run(other, check=False).returncode == 1
    assert subprocess.run(other, check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("created", "today"),
        ("started", []),
        ("status", 5),
        ("name", ["x"]),
        ("pod_name", {}),
        ("standin", "x"),
        ("standin.pid", "1"),
        ("args", "true"),
        ("args", [1]),
        ("image", "box"),
        ("image.name", 3),
        ("exit", 0),
        ("exit.code", "0"),
    ],
)
def test_a_value_of_a_foreign_type_is_damage_that_is_named(roots: Roots, key: str, value: object) -> None:
    outer, _, inner = key.partition(".")
    path = add(roots, "aa" * 32, **{outer: {inner: value} if inner else value})
    with pytest.raises(documents.DamagedDocumentError, match=f"'{path}' is damaged: '{key}' is of the wrong type"):
        records.load(roots, "aa" * 32)


def test_a_pods_value_of_a_foreign_type_is_damage_that_is_named(roots: Roots) -> None:
    for key, value in (("vm", [1]), ("created", "x"), ("name", 1), ("supervisor", 5)):
        path = add_pod(roots, os.urandom(32).hex(), **{key: value})
        with pytest.raises(documents.DamagedDocumentError, match=f"'{path}' is damaged: '{key}'"):
            records.load_pod(roots, documents.read(path)["id"])


def test_b8_a_damaged_container_does_not_spoil_the_others(roots: Roots) -> None:
    add(roots, "aa" * 32)
    Path(add(roots, "bb" * 32)).write_text("{")
    found = list(records.containers(roots))
    assert [type(item) for item in found] == [records.Container, documents.DamagedDocumentError]


def test_a3_a_pid_is_trusted_only_with_its_start_time(roots: Roots) -> None:
    me = {"pid": os.getpid(), "start_time": records.start_time(os.getpid())}
    add(roots, "aa" * 32, status="running", standin=me)
    add(roots, "bb" * 32, status="running", standin={**me, "start_time": 1})
    assert records.load(roots, "aa" * 32).status() == "running"
    assert records.load(roots, "bb" * 32).status() == "stopped"


def test_c8_ids_are_found_by_name_by_id_and_by_unique_prefix(roots: Roots) -> None:
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


def test_c7_a_taken_name_names_its_holder(roots: Roots) -> None:
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


def test_b7_forgetting_a_container_leaves_nothing_of_it(roots: Roots) -> None:
    container_id = "ab" * 32
    add(roots, container_id)
    records.reserve_name(roots, "web", container_id)
    data = Path(roots.container_data_dir, container_id)
    data.mkdir(parents=True)
    (data / "scratch.img").write_text("x")
    remains.forget_container(roots, container_id, name="web", image_id="")
    remains.forget_container(roots, container_id, name="web", image_id="")
    assert remains.forget_sandbox_if_empty(roots.sandbox(container_id))
    assert [path for path in [*roots.run.rglob("*"), *roots.data.rglob("*")] if not path.is_dir()] == []
    assert records.container_ids(roots) == []


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    remains.remove_tree(str(tree))
    assert (outside / "kept").exists()
    assert not tree.exists()


def add_pod(roots: Roots, pod_id: str, **document: object) -> str:
    sandbox = roots.sandbox(pod_id)
    os.makedirs(sandbox.containers_dir)
    documents.write(sandbox.document_file, {"id": pod_id, "implicit": False, **document})
    os.symlink(os.path.relpath(sandbox.dir, roots.by_pod_dir), f"{roots.by_pod_dir}/{pod_id}")
    return sandbox.document_file


def test_pods_are_found_by_name_by_id_and_by_unique_prefix_and_are_no_containers(roots: Roots) -> None:
    first, second = "abc1" * 16, "abd1" * 16
    add_pod(roots, first, name="shop")
    add_pod(roots, second)
    records.reserve_name(roots, "shop", first)
    assert records.resolve_pod(roots, "shop") == first
    assert records.resolve_pod(roots, "abd") == second
    with pytest.raises(AmbiguousError, match=r"abc1abc1abc1abc1, abd1abd1abd1abd1"):
        records.resolve_pod(roots, "ab")
    with pytest.raises(NotFoundError, match="'vmsandbox pod ls' lists them"):
        records.resolve_pod(roots, "nothing")
    with pytest.raises(NotFoundError, match="no such container: 'shop'"):
        records.resolve(roots, "shop")
    with pytest.raises(AlreadyExistsError, match="abc1abc1abc1"):
        records.reserve_name(roots, "shop", second)


def test_b7_a_pod_stays_without_containers_until_it_is_forgotten(roots: Roots) -> None:
    pod_id = "ab" * 32
    add_pod(roots, pod_id, name="shop")
    records.reserve_name(roots, "shop", pod_id)
    records.reserve_name(roots, "other", "cd" * 32)
    assert not remains.forget_sandbox_if_empty(roots.sandbox(pod_id))
    remains.forget_pod(roots, roots.sandbox(pod_id))
    remains.forget_pod(roots, roots.sandbox(pod_id))
    assert list(records.pods(roots)) == []
    assert os.listdir(roots.names_dir) == ["other"]
    assert not os.path.exists(roots.sandbox(pod_id).dir)


def test_a_pods_status_is_judged_by_its_machine(roots: Roots) -> None:
    me = {"pid": os.getpid(), "start_time": records.start_time(os.getpid())}
    add_pod(roots, "aa" * 32, status="ready", vm=me)
    add_pod(roots, "bb" * 32, status="ready", vm={**me, "start_time": 1})
    add_pod(roots, "cc" * 32, status="creating", vm=me)
    found = [pod.status() for pod in records.pods(roots) if not isinstance(pod, SandboxError)]
    assert found == ["running", "stopped", "creating"]


def test_a_damaged_pod_does_not_spoil_the_others(roots: Roots) -> None:
    add_pod(roots, "aa" * 32)
    Path(add_pod(roots, "bb" * 32)).write_text("{")
    found = list(records.pods(roots))
    assert [type(item) for item in found] == [records.Pod, documents.DamagedDocumentError]
    assert "bbbbbbbbbbbb" in str(found[1])


def test_a_damaged_container_is_named_beside_the_others_of_its_pod(roots: Roots) -> None:
    pod_id, whole, broken = "aa" * 32, "bb" * 32, "cc" * 32
    add_pod(roots, pod_id)
    sandbox = roots.sandbox(pod_id)
    for container_id in (whole, broken):
        documents.write(sandbox.container_file(container_id), {"id": container_id, "status": "stopped"})
        os.symlink(os.path.relpath(sandbox.dir, roots.by_container_dir), f"{roots.by_container_dir}/{container_id}")
    Path(sandbox.container_file(broken)).write_text("[]")
    found = records.load_pod(roots, pod_id).containers(roots)
    assert [type(item) for item in found] == [records.Container, documents.DamagedDocumentError]
