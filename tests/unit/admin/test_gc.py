"""What `gc` may remove, and what it must not touch whatever is beside it."""

from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.cli import awaited
from tests.harness.impostors import running
from vmsandbox import documents, locks, records
from vmsandbox.admin import gc
from vmsandbox.cli import launch, removal
from vmsandbox.paths import Roots

OLD = 1_000_000_000


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    made = Roots(tmp_path / "run", tmp_path / "data")
    for directory in (made.sandboxes_dir, made.by_container_dir, made.by_pod_dir, made.names_dir):
        os.makedirs(directory)
    return made


def add(roots: Roots, pod_id: str, *containers: str, explicit: bool = False, **document: object) -> str:
    """A pod that nobody serves, with stopped containers; answers its directory."""
    sandbox = roots.sandbox(pod_id)
    os.makedirs(sandbox.containers_dir)
    Path(sandbox.lock_file).touch()
    documents.write(sandbox.document_file, {"id": pod_id, "status": "stopped", "implicit": not explicit, **document})
    for container_id in containers:
        documents.write(sandbox.container_file(container_id), {"id": container_id, "status": "stopped"})
        os.symlink(os.path.relpath(sandbox.dir, roots.by_container_dir), f"{roots.by_container_dir}/{container_id}")
        data = Path(roots.container_data_dir, container_id)
        data.mkdir(parents=True)
        (data / "scratch.img").write_text("precious")
    if explicit:
        os.symlink(os.path.relpath(sandbox.dir, roots.by_pod_dir), f"{roots.by_pod_dir}/{pod_id}")
    return sandbox.dir


def collected(roots: Roots, capsys: pytest.CaptureFixture[str]) -> str:
    for directory in (roots.by_pod_dir, roots.by_container_dir, roots.names_dir):
        for name in os.listdir(directory):
            os.utime(f"{directory}/{name}", (OLD, OLD), follow_symlinks=False)
    assert gc.main([], roots) == 0
    return capsys.readouterr().out


A, B, C = "aa" * 32, "bb" * 32, "cc" * 32


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"version": 99, "id": "x"}', "newer vmsandbox"), (None, "cannot read")],
    ids=["newer-version", "unreadable"],
)
def test_what_cannot_be_judged_is_left_alone_and_named(
    roots: Roots, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    directory = add(roots, A, B)
    other = add(roots, C)
    path = Path(directory, "containers", f"{B}.json")
    path.unlink()
    if content is None:
        path.mkdir()  # cannot be read by anybody, root included
    else:
        path.write_bytes(content)
    text = collected(roots, capsys)
    assert f"left pod '{A[:12]}' alone" in text
    assert said in text
    assert str(path) in text
    assert Path(roots.container_data_dir, B, "scratch.img").read_text() == "precious"
    assert not os.path.exists(other)


def test_a_truncated_container_goes_and_its_neighbours_stay(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    directory = add(roots, A, B, C)
    Path(directory, "containers", f"{B}.json").write_text("{")
    collected(roots, capsys)
    assert records.container_ids(roots) == [C]
    assert os.listdir(roots.container_data_dir) == [C]


def test_a_stopped_pod_stays_with_its_name_and_without_containers(
    roots: Roots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(roots, A, explicit=True, established=True, name="shop")
    records.reserve_name(roots, "shop", A)
    assert collected(roots, capsys) == ""
    assert records.resolve_pod(roots, "shop") == A


def test_a_pod_whose_machine_was_killed_is_marked_stopped(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    gone = {"pid": 2**22 - 1, "start_time": 1}
    add(roots, A, B, explicit=True, established=True, name="shop", status="ready", vm=gone)
    assert "pod 'shop' has stopped" in collected(roots, capsys)
    pod = records.load_pod(roots, A)
    assert (pod.document["status"], "vm" in pod.document) == ("stopped", False)
    assert records.container_ids(roots) == [B]


def test_a_pod_whose_machine_lives_is_left_to_the_next_verb(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    me = {"pid": os.getpid(), "start_time": records.start_time(os.getpid())}
    add(roots, A, explicit=True, established=True, status="ready", vm=me)
    assert collected(roots, capsys) == ""
    assert records.load_pod(roots, A).status() == "running"


@pytest.mark.parametrize("damage", ["unfinished", "truncated", "missing"])
def test_a_pod_that_never_was_or_cannot_be_read_goes_with_its_name(
    roots: Roots, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    directory = add(roots, A, explicit=True, established=damage != "unfinished", name="shop")
    records.reserve_name(roots, "shop", A)
    document = Path(directory, "sandbox.json")
    if damage == "truncated":
        document.write_text('{"version": 1')
    elif damage == "missing":
        document.unlink()
    assert "removed pod" in collected(roots, capsys)
    assert (os.listdir(roots.by_pod_dir), os.listdir(roots.names_dir), os.listdir(roots.sandboxes_dir)) == ([], [], [])


def test_a_pod_of_a_newer_version_is_left_alone(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    directory = add(roots, A, B, explicit=True)
    Path(directory, "sandbox.json").write_text('{"version": 99}')
    assert "left pod" in collected(roots, capsys)
    assert records.pod_ids(roots) == [A]
    assert records.container_ids(roots) == [B]


@pytest.mark.parametrize(
    ("age", "stays"), [(0, True), (-3, True), (3, True), (60, False), (-60, False), (-10 * 365 * 86400, False)]
)
def test_what_is_new_may_be_in_the_making_whatever_the_clock_was_put_to(
    roots: Roots, capsys: pytest.CaptureFixture[str], age: int, stays: bool
) -> None:
    name = f"{roots.names_dir}/web"
    os.symlink(A, name)
    made = time.time() - age
    os.utime(name, (made, made), follow_symlinks=False)
    assert gc.main([], roots) == 0
    assert os.path.lexists(name) is stays


def is_awaited(path: str) -> bool:
    """Whether somebody waits for the lock of a file."""
    inode = os.stat(path).st_ino
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    return any(f":{inode} " in line for line in waiting)


def test_b6_gc_waits_for_whoever_is_at_a_pod(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    directory = add(roots, A)
    os.unlink(f"{directory}/sandbox.json")
    with ThreadPoolExecutor(1) as beside:
        with launch.locked(roots.sandbox(A)):
            collecting = beside.submit(collected, roots, capsys)
            awaited(lambda: is_awaited(f"{directory}/lock") or collecting.done())
            assert not collecting.done()
            assert os.path.isdir(directory)
        assert f"removed pod '{A[:12]}'" in collecting.result(60)
    assert not os.path.exists(directory)


def test_b6_a_removal_waits_for_whoever_is_at_the_pod(roots: Roots) -> None:
    directory = add(roots, A, B)
    container = records.load(roots, B)
    with ThreadPoolExecutor(1) as beside:
        with launch.locked(roots.sandbox(A)):
            removing = beside.submit(removal.remove_from_disk, roots, container)
            awaited(lambda: is_awaited(f"{directory}/lock") or removing.done())
            assert not removing.done()
            assert os.path.exists(container.sandbox.container_file(B))
        removing.result(60)
    assert not os.path.exists(directory)


def test_b5_what_a_killed_writer_left_of_a_network_goes(roots: Roots) -> None:
    networks = Path(roots.run_dir, "net")
    networks.mkdir()
    for pod_id in (A, B):
        (networks / f"{pod_id[:12]}.json.4711.tmp").write_text("{")
    me = {"pid": os.getpid(), "start_time": records.start_time(os.getpid())}
    add(roots, B, explicit=True, established=True, status="ready", vm=me)
    gc.main([], roots)
    assert os.listdir(networks) == [f"{B[:12]}.json.4711.tmp"]


def parent(roots: Roots, *, age: float) -> Path:
    """What there is of a machine that pods are forked from."""
    directory = Path(roots.parents_dir, "0123456789ab")
    (directory / "vm").mkdir(parents=True)
    Path(roots.parents_dir, "keeper.log").touch()
    for name in ("lock", "offer.json", "vm/qmp.sock"):
        (directory / name).touch()
    made = time.time() - age
    os.utime(directory, (made, made))
    return directory


def test_what_a_killed_keeper_left_goes_and_its_forks_stay(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    directory = parent(roots, age=60)
    with (
        running("qemu-system-x86_64", "-name", f"guest=vmsandbox-{directory.name},debug-threads=on") as machine,
        running("qemu-system-x86_64", "-name", f"guest=vmsandbox-{A[:12]},debug-threads=on") as fork,
    ):
        said = collected(roots, capsys)
        assert machine.wait(10) == -9
        assert fork.poll() is None
    assert said.splitlines() == [
        f"ended virtual machine {machine.pid}, which pods were forked from",
        f"removed machine '{directory.name}', which pods were forked from",
    ]
    assert os.listdir(roots.parents_dir) == ["keeper.log"]
    assert collected(roots, capsys) == ""


@pytest.mark.parametrize(("age", "held"), [(60, True), (0, False)], ids=["kept", "new"])
def test_a_parent_that_is_kept_or_may_be_in_the_making_stays(
    roots: Roots, capsys: pytest.CaptureFixture[str], age: float, held: bool
) -> None:
    directory = parent(roots, age=age)
    name = f"guest=vmsandbox-{directory.name},debug-threads=on"
    with locks.opened(directory / "lock") as lock, running("qemu-system-x86_64", "-name", name) as machine:
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert collected(roots, capsys) == ""
        assert machine.poll() is None
    assert (directory / "offer.json").exists()


def test_a_keeper_that_was_killed_while_it_removed_is_helped(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    directory = parent(roots, age=60)
    (directory / "lock").unlink()
    os.utime(directory, (OLD, OLD))
    assert "removed machine" in collected(roots, capsys)
    assert not directory.exists()
