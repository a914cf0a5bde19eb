"""Sources are mounted so that nothing of the host can suffer: not from writes, not from undoing, not from removal."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmsandbox import documents, remains
from vmsandbox.admin import gc
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError, UnsupportedError
from vmsandbox.oci.texts import Volume
from vmsandbox.paths import SHORT_ID, Roots
from vmsandbox.resources import share
from vmsandbox.supervisor import shares
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a blank in its name; whatever a test leaves mounted below it is detached."""
    with tempfile.TemporaryDirectory(prefix="vs share-") as scratch:
        try:
            yield Path(scratch)
        finally:
            remains.unmount_below(scratch)


@pytest.fixture
def directory(place: Path) -> str:
    path = str(place / "shared")
    share.open_directory(path)
    return path


@pytest.fixture
def source(place: Path) -> Path:
    """A tree with a tmpfs mounted in it that is shared with whoever copies it."""
    path = place / "source"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text("text")
    subprocess.run(["mount", "-t", "tmpfs", "none", path / "sub"], check=True)
    subprocess.run(["mount", "--make-shared", path / "sub"], check=True)
    (path / "sub" / "deep").write_text("deep")
    return path


def test_a_directory_is_seen_with_what_is_mounted_in_it(directory: str, source: Path) -> None:
    share.bind(directory, "one", str(source), read_only=False)
    assert Path(directory, "one", "file").read_text() == "text"
    assert Path(directory, "one", "sub", "deep").read_text() == "deep"
    Path(directory, "one", "sub", "back").write_text("back")
    assert (source / "sub" / "back").read_text() == "back"


def test_a_single_file_is_seen_and_its_neighbours_are_not(directory: str, source: Path) -> None:
    share.bind(directory, "one", str(source / "file"), read_only=False)
    assert Path(directory, "one").read_text() == "text"
    assert os.listdir(directory) == ["one"]


@pytest.mark.parametrize("where", ["new", "sub/new"])
def test_read_only_holds_for_the_source_and_for_what_is_mounted_in_it(directory: str, source: Path, where: str) -> None:
    share.bind(directory, "one", str(source), read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        Path(directory, "one", where).write_text("x")
    (source / where).write_text("the source itself stays writable")


def test_unbinding_leaves_the_mounts_of_the_source_alone(directory: str, source: Path) -> None:
    share.bind(directory, "one", str(source), read_only=False)
    share.unbind(directory, "one")
    assert os.listdir(directory) == []
    assert remains.mounts_below(directory) == [directory]
    assert (source / "sub" / "deep").read_text() == "deep"
    share.unbind(directory, "one")


def test_unbinding_succeeds_while_a_file_is_open(directory: str, source: Path) -> None:
    share.bind(directory, "one", str(source), read_only=False)
    with open(f"{directory}/one/sub/deep") as file:
        share.unbind(directory, "one")
        assert file.read() == "deep"


def mountinfo_name(path: str) -> str:
    """How a path is written there."""
    return path.replace(" ", r"\040")


def test_a_process_in_a_namespace_of_its_own_sees_later_mounts_come_and_go(directory: str, source: Path) -> None:
    script = f"""echo ready; read x; cat '{directory}/one/sub/deep'; echo; read x; ls -A '{directory}'; echo end"""
    command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as watcher:
        assert watcher.stdin
        assert watcher.stdout
        assert watcher.stdout.readline() == "ready\n"
        share.bind(directory, "one", str(source), read_only=False)
        watcher.stdin.write("\n")
        assert watcher.stdout.readline() == "deep\n"
        with open(f"/proc/{watcher.pid}/mountinfo") as file:
            assert mountinfo_name(directory) + "/one" in file.read()
        share.unbind(directory, "one")
        with open(f"/proc/{watcher.pid}/mountinfo") as file:
            assert mountinfo_name(directory) + "/one" not in file.read()
        watcher.stdin.write("\n")
        assert watcher.stdout.read() == "end\n"


def test_opening_the_directory_twice_mounts_it_once(directory: str) -> None:
    share.open_directory(directory)
    assert remains.mounts_below(directory) == [directory]


def test_a_directory_that_two_open_at_once_is_mounted_once(
    place: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tree = str(place / "shared"), share._tree
    other = threading.Thread(target=share.bind_all, args=(path, [("one", str(source / "file"), False, False)]))

    def slow(copied: str) -> int:
        if copied == path and not other.ident:
            other.start()
            other.join(0.5)  # whoever does not wait for us is done by then
        return tree(copied)

    monkeypatch.setattr(share, "_tree", slow)
    share.open_directory(path)
    other.join()
    assert remains.mounts_below(path) == [path, f"{path}/one"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_who_shares_everything_holds_up_nobody_who_takes_back(place: Path, source: Path, kind: str) -> None:
    first, second = (str(place / f"r/s/{digit * SHORT_ID}/shared") for digit in "ab")
    for directory in (first, second):
        share.open_directory(directory)
    share.bind(first, "one", str(source if kind == "directory" else source / "file"), read_only=False)
    share.bind(second, "all", str(place), read_only=False)
    share.unbind(first, "one")
    assert os.listdir(first) == []
    assert Path(second, "all/source/sub/deep").read_text() == "deep"


def test_a_name_that_stays_busy_is_an_error(
    directory: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "BUSY_TIMEOUT", 0.0)
    share.bind(directory, "one", str(source), read_only=False)
    (place / "copy").mkdir()
    subprocess.run(["mount", "--rbind", directory, place / "copy"], check=True)
    subprocess.run(["mount", "--make-rprivate", place / "copy"], check=True)
    with pytest.raises(OSError, match="busy"):
        share.unbind(directory, "one")
    remains.unmount_below(str(place / "copy"))
    share.unbind(directory, "one")
    assert os.listdir(directory) == []


def test_a_missing_source_is_made_where_that_was_asked_for(directory: str, place: Path) -> None:
    share.bind(directory, "one", str(place / "a" / "b"), read_only=False, create=True)
    assert (place / "a" / "b").is_dir()


def test_a_missing_source_is_an_error_that_names_it_and_leaves_nothing(directory: str, place: Path) -> None:
    with pytest.raises(NotFoundError, match=r"cannot share '.*/missing': no such file or directory on the host"):
        share.bind(directory, "one", str(place / "missing"), read_only=False)
    assert os.listdir(directory) == []


def test_all_sources_are_mounted_or_none(directory: str, source: Path, place: Path) -> None:
    wanted = [("one", str(source), False, False), ("two", str(place / "missing"), False, False)]
    with pytest.raises(NotFoundError):
        share.bind_all(directory, wanted)
    assert os.listdir(directory) == []
    assert remains.mounts_below(directory) == [directory]


def test_a_socket_cannot_cross(directory: str, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "sock"))
        with pytest.raises(UnsupportedError, match="no sockets"):
            share.check_source(str(place / "sock"), create=False)


@pytest.mark.parametrize("destination", ["/proc", "/sys/fs/cgroup", "/dev/sda"])
def test_a6_the_guests_own_places_are_refused(destination: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"'{destination}'"):
        share.check_destination(destination)


@pytest.mark.parametrize("destination", ["/process", "/system", "/devel", "/data/dev"])
def test_places_with_similar_names_are_not(destination: str) -> None:
    share.check_destination(destination)


def test_a6_a_name_tells_container_and_source_and_is_never_the_same() -> None:
    first, second = (share.name_for("box", "/a/my data/ä,b") for _ in range(2))
    assert first != second
    assert first.startswith("box-")
    assert first.endswith("-__b")
    assert len(share.name_for("c" * 128, "/" + "n" * 255)) < 255


# ---------------------------------------------------------------- what is left is never removed with its content


def test_removing_a_tree_refuses_while_something_is_mounted_in_it(directory: str, source: Path, place: Path) -> None:
    share.bind(directory, "one", str(source), read_only=False)
    with pytest.raises(SandboxError, match="is still mounted"):
        remains.remove_tree(str(place / "shared"))
    assert (source / "file").read_text() == "text"


def test_forgetting_a_pod_unmounts_and_spares_the_sources(place: Path, source: Path) -> None:
    pod = Roots(place / "run", place / "data").sandbox("0" * 64)
    os.makedirs(pod.containers_dir)
    share.bind_all(pod.shared_dir, [("one", str(source), False, False), ("two", str(source / "file"), True, False)])
    assert remains.forget_sandbox_if_empty(pod)
    assert not os.path.exists(pod.dir)
    assert sorted(path.name for path in source.rglob("*")) == ["deep", "file", "sub"]


def test_gc_unmounts_what_a_dead_pod_left_though_its_container_stays_listed(place: Path, source: Path) -> None:
    roots = Roots(place / "run", place / "data")
    pod = roots.sandbox("0" * 64)
    os.makedirs(pod.containers_dir)
    Path(pod.lock_file).touch()
    container = {"id": "box", "status": "stopped", "autoremove": False}
    documents.write(pod.container_file("box"), container)
    share.bind_all(pod.shared_dir, [("one", str(source), False, False)])
    said: list[str] = []
    gc.collect_sandbox(roots, pod, said.append)
    assert said == ["unmounted what pod '000000000000' had shared"]
    assert remains.mounts_below(pod.dir) == []
    assert not os.path.exists(pod.shared_dir)
    assert (source / "sub" / "deep").read_text() == "deep"
    assert os.path.exists(pod.container_file("box"))


# ---------------------------------------------------------------- the plan


def plan(place: Path, shared_fs: str, **more: bool) -> shares.Plan:
    return shares.planned("box", [Volume(source=str(place), destination="/data", **more)], shared_fs)


def test_with_virtio_fs_a_container_has_a_mount_of_its_own(place: Path) -> None:
    made = plan(place, "virtio-fs")
    assert made.sources() == {"/data": f"/run/vmsandbox/shared/box/{made.names[0]}"}
    whole = "/run/vmsandbox/shared/.all"
    assert made.storages() == [
        pb.Storage(driver=pb.Storage.DRIVER_VIRTIOFS, source="shared", mount_point=whole),
        pb.Storage(
            driver=pb.Storage.DRIVER_BIND, source=whole, options=["bind"], mount_point="/run/vmsandbox/shared/box"
        ),
    ]


def test_with_9p_containers_share_one_mount(place: Path) -> None:
    made = plan(place, "9p")
    assert made.sources() == {"/data": f"/run/vmsandbox/shared/{made.names[0]}"}
    assert [storage.mount_point for storage in made.storages()] == ["/run/vmsandbox/shared"]


def test_nothing_is_shared_where_sharing_is_off(place: Path) -> None:
    with pytest.raises(UnsupportedError, match="shared_fs is 'none'"):
        plan(place, "none")
    assert not shares.planned("box", [], "none")
    assert shares.planned("box", [], "none").storages() == []
