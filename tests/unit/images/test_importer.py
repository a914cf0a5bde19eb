"""Imports: whole or not at all, once for all who ask, and quick when there is nothing to do."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.unit.images.making import Member, archived, compressed, directory, docker_archive, layout, tar
from vmsandbox.errors import ExhaustedError, InvalidArgumentError, NotFoundError, SandboxError, UnsupportedError
from vmsandbox.paths import Roots
from vmsandbox.resources.images.importer import Importer, Limits, RootfsOptions
from vmsandbox.resources.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmsandbox.resources.images.document import Image

BASE = tar(directory("bin"), Member("bin/sh", data=b"#!\n" * 5000, mode=0o755), Member("gone"))
TOP = tar(Member(".wh.gone"), Member("etc/new", data=b"new", xattrs={"user.a": b"1"}))


def everything(store: ImageStore) -> set[str]:
    """Every file of the store but its lock."""
    found = {
        str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    return found - {"lock"}


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_an_image_is_in_the_store_with_all_its_data(store: ImageStore, tmp_path: Path, compression: str) -> None:
    made = layout(
        tmp_path / "lay",
        BASE,
        TOP,
        name="v1",
        compression=compression,
        created="2020-02-02T02:02:02Z",
        config={"Cmd": ["x"]},
    )
    image = Importer(store).run(f"oci:{tmp_path}/lay")
    assert store.resolve("lay:v1") == image
    assert image.config == {"Cmd": ["x"]}
    assert (image.architecture, image.created) == ("amd64", "2020-02-02T02:02:02Z")
    assert image.source == f"oci:{tmp_path}/lay"
    assert image.digest == made.manifests[0]["digest"]
    assert image.size == image.erofs.stat().st_size
    assert image.erofs.stem == hashlib.sha256(image.erofs.read_bytes()).hexdigest()
    assert everything(store) == {f"blobs/{image.erofs.name}", f"images/{image.id}.json", "names/lay:v1"}
    assert os.listdir(store.work) == []


def test_every_way_of_packing_an_image_gives_the_same_image(store: ImageStore, tmp_path: Path) -> None:
    made = layout(tmp_path / "lay", BASE, TOP)
    archived(made.path, tmp_path / "lay.tar")
    (tmp_path / "lay.tgz").write_bytes(compressed((tmp_path / "lay.tar").read_bytes(), "gzip"))
    docker_archive(tmp_path / "docker.tar", BASE, TOP)
    (tmp_path / "docker.tar.zst").write_bytes(compressed((tmp_path / "docker.tar").read_bytes(), "zstd"))
    sources = [
        "oci:lay",
        "oci-archive:lay.tar",
        "oci-archive:lay.tgz",
        "docker-archive:docker.tar",
        "docker-archive:docker.tar.zst",
    ]
    found = set()
    for source in sources:
        kind, _, name = source.partition(":")
        image = Importer(store).run(f"{kind}:{tmp_path}/{name}", names=["x"])
        found.add((image.id, image.erofs.name, image.erofs.read_bytes()))
        store.remove(image.id)
        assert everything(store) == set()
    assert len(found) == 1


def test_an_image_that_is_there_is_not_read_again(store: ImageStore, tmp_path: Path) -> None:
    made = layout(tmp_path / "lay", BASE, TOP)
    first = Importer(store).run(f"oci:{made.path}", names=["one"])
    for layer in json.loads(made.blob(made.manifests[0]["digest"]).read_bytes())["layers"]:
        made.blob(layer["digest"]).unlink()
    lines: list[str] = []
    again = Importer(store, progress=lines.append).run(f"oci:{made.path}", names=["two"])
    assert (again.id, again.names) == (first.id, ("one:latest", "two:latest"))
    assert lines == [f"image {first.id[:12]} is already there"]


@pytest.mark.parametrize("damage", ["blob gone", "blob cut", "document cut"])
def test_a_damaged_image_is_made_anew(store: ImageStore, tmp_path: Path, damage: str) -> None:
    layout(tmp_path / "lay", BASE, TOP, created="2020-02-02T02:02:02Z")
    image = Importer(store).run(f"oci:{tmp_path}/lay")
    if damage == "blob gone":
        image.erofs.unlink()
    elif damage == "blob cut":
        os.truncate(image.erofs, 4096)
    else:
        os.truncate(store.documents / f"{image.id}.json", 10)
    assert Importer(store).run(f"oci:{tmp_path}/lay") == image


def test_names_given_replace_those_of_the_source(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE)
    image = Importer(store).run(f"oci:{tmp_path}/lay", names=["docker.io/library/a", "b:1"])
    assert image.names == ("a:latest", "b:1")
    with pytest.raises(InvalidArgumentError, match="'Bad Name'"):
        Importer(store).run(f"oci:{tmp_path}/lay", names=["Bad Name"])


def test_progress_tells_each_step(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE, TOP, compression="")
    lines: list[str] = []
    Importer(store, progress=lines.append).run(f"oci:{tmp_path}/lay")
    assert lines == ["unpacking layer 1 of 2 (0.0 MB)", "unpacking layer 2 of 2 (0.0 MB)", "writing the file system"]


# a directory as an image


def test_a_directory_becomes_an_image_with_the_configuration_given(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "sh").write_bytes(b"x")
    options = RootfsOptions(entrypoint=["/e"], cmd=["a", "b"], env=["K=a=b"], workdir="/w", user="1:2")
    image = Importer(store).run(f"rootfs:{root}", rootfs=options)
    assert image.names == ("root:latest",)
    assert image.config == {
        "Entrypoint": ["/e"],
        "Cmd": ["a", "b"],
        "Env": ["K=a=b"],
        "WorkingDir": "/w",
        "User": "1:2",
    }
    again = Importer(store).run(f"rootfs:{root}", names=["other"], rootfs=options)
    assert (again.id, again.names) == (image.id, ("other:latest", "root:latest"))
    plain = Importer(store).run(f"rootfs:{root}", names=["plain"])
    assert plain.id != image.id
    assert plain.erofs == image.erofs
    assert plain.config == {}
    store.remove(image.id)
    assert plain.erofs.exists()


@pytest.mark.parametrize(
    "options",
    [RootfsOptions(env=["NOVALUE"]), RootfsOptions(env=["=x"]), RootfsOptions(workdir="relative")],
)
def test_a_bad_configuration_is_refused(store: ImageStore, tmp_path: Path, options: RootfsOptions) -> None:
    with pytest.raises(InvalidArgumentError):
        Importer(store).run(f"rootfs:{tmp_path}", rootfs=options)


def test_a_configuration_is_for_directories_only(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE)
    with pytest.raises(InvalidArgumentError, match="brings its own"):
        Importer(store).run(f"oci:{tmp_path}/lay", rootfs=RootfsOptions(cmd=["x"]))


def test_a_directory_that_holds_the_store_is_refused(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="contains the image store"):
        Importer(store).run(f"rootfs:{tmp_path}")


# failures


def change_layer(made_path: Path, which: int, change: Callable[[bytes], bytes]) -> str:
    """Change a layer's blob in place; its digest."""
    index = json.loads((made_path / "index.json").read_bytes())
    blobs = made_path / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    digest = str(manifest["layers"][which]["digest"])
    blob = blobs / digest[7:]
    blob.write_bytes(change(blob.read_bytes()))
    return digest


def test_a_changed_layer_is_refused_by_name(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE, TOP)
    digest = change_layer(tmp_path / "lay", 1, lambda data: data + b"\0")
    with pytest.raises(InvalidArgumentError, match=f"layer '{digest}' is damaged"):
        Importer(store).run(f"oci:{tmp_path}/lay")
    assert everything(store) == set()


def test_a_missing_layer_is_refused_by_name(store: ImageStore, tmp_path: Path) -> None:
    made = layout(tmp_path / "lay", BASE, TOP)
    digest = change_layer(tmp_path / "lay", 1, lambda data: data)
    made.blob(digest).unlink()
    with pytest.raises(NotFoundError, match=f"layer '{digest}' is missing"):
        Importer(store).run(f"oci:{tmp_path}/lay")
    assert everything(store) == set()


def test_a_layer_whose_content_is_another_is_refused(store: ImageStore, tmp_path: Path) -> None:
    docker_archive(tmp_path / "good.tar", BASE)
    good = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(good.replace(b"#!\n#!", b"#!\n!!", 1))
    with pytest.raises(InvalidArgumentError, match=f"sha256:{hashlib.sha256(BASE).hexdigest()}.*damaged"):
        Importer(store).run(f"docker-archive:{tmp_path}/bad.tar")
    assert everything(store) == set()


def test_a_hostile_layer_is_refused_by_layer_and_entry(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE, tar(Member("../../evil", data=b"x")))
    digest = change_layer(tmp_path / "lay", 1, lambda data: data)
    with pytest.raises(InvalidArgumentError, match=rf"layer '{digest}', entry '../../evil'"):
        Importer(store).run(f"oci:{tmp_path}/lay")
    assert everything(store) == set()
    assert not list(tmp_path.rglob("evil"))


def test_limits_are_obeyed_and_the_message_says_how_to_raise_them(store: ImageStore, tmp_path: Path) -> None:
    layout(tmp_path / "lay", BASE, TOP)
    with pytest.raises(InvalidArgumentError, match="--max-size"):
        Importer(store, Limits(max_bytes=10_000)).run(f"oci:{tmp_path}/lay")
    with pytest.raises(InvalidArgumentError, match="--max-entries"):
        Importer(store, Limits(max_entries=4)).run(f"oci:{tmp_path}/lay")
    docker_archive(tmp_path / "d.tar", tar(Member("bomb", data=bytes(5_000_000))))
    (tmp_path / "d.tgz").write_bytes(compressed((tmp_path / "d.tar").read_bytes(), "gzip"))
    with pytest.raises(InvalidArgumentError, match="--max-size"):
        Importer(store, Limits(max_bytes=1_000_000)).run(f"docker-archive:{tmp_path}/d.tgz")
    assert everything(store) == set()


@pytest.mark.parametrize("size_kib", [4, 64, 512, 1100, 1900])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, size_kib: int) -> None:
    layers = [tar(Member("data", data=os.urandom(1_000_000)))]
    layout(tmp_path / "lay", *layers)
    docker_archive(tmp_path / "d.tar", *layers)
    (tmp_path / "d.tgz").write_bytes(compressed((tmp_path / "d.tar").read_bytes(), "gzip"))
    with small_disk(tmp_path / "data", f"{size_kib}k") as disk:
        store = ImageStore(Roots(tmp_path / "run", disk))
        for source in (f"oci:{tmp_path}/lay", f"docker-archive:{tmp_path}/d.tgz"):
            with pytest.raises(ExhaustedError, match="no space left") as caught:
                Importer(store).run(source)
            assert "\n" not in str(caught.value)
            assert everything(store) == set()
            assert list(store.list()) == []


def test_every_failing_system_call_of_publishing_leaves_the_store_as_it_was(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(tmp_path / "lay", BASE)
    taken = Importer(store).run(f"oci:{tmp_path}/lay", names=["taken"])
    layout(tmp_path / "new", TOP)
    before = everything(store)
    genuine = os.fsync
    calls = 0
    failing = 1

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(5, "Input/output error")
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    messages = []
    image = None
    while image is None:
        calls = 0
        try:
            image = Importer(store).run(f"oci:{tmp_path}/new", names=["new", "taken"])
        except SandboxError as error:
            messages.append(str(error))
            assert everything(store) == before
            assert store.resolve("taken") == taken
            failing += 1
    assert len(messages) > 3
    assert all("Input/output error" in message for message in messages)
    assert store.resolve("new") == store.resolve("taken") == image


# several at once, and killed


def import_in_child(source: str, store: ImageStore, before: str = "") -> subprocess.Popen[bytes]:
    """Import in another process; it prints the image's id.  `before` is run there first."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from vmsandbox.paths import Roots\n"
        "from vmsandbox.resources.images import erofs, importer, layer, store\n"
        "from vmsandbox.resources.images.importer import Importer\n"
        f"{before}\n"
        "images = store.ImageStore(Roots(Path(sys.argv[2]).parent / 'run', Path(sys.argv[2])))\n"
        "def tell(line): print(line, file=sys.stderr, flush=True)\n"
        "print(Importer(images, progress=tell).run(sys.argv[1], names=['demo']).id)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, source, str(store.root.parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("count", [2, 5])
def test_several_at_once_do_the_work_once(store: ImageStore, tmp_path: Path, count: int) -> None:
    layout(tmp_path / "lay", tar(*(Member(f"f{number}", data=b"x" * 1000) for number in range(300))))
    children = [import_in_child(f"oci:{tmp_path}/lay", store) for _ in range(count)]
    told = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * count, told
    assert len({out for out, _ in told}) == 1
    assert sum(b"writing the file system" in err for _, err in told) == 1
    image = store.resolve("demo")
    assert everything(store) == {f"blobs/{image.erofs.name}", f"images/{image.id}.json", "names/demo:latest"}


def test_one_that_fails_lets_the_waiting_one_do_it(store: ImageStore, tmp_path: Path) -> None:
    """The first is killed in the midst of unpacking, while the second waits for it."""
    layout(tmp_path / "lay", BASE, TOP)
    stop = "layer.Layers.finish = lambda self: (tell('stopped'), sys.stdin.read())"
    code_in = import_in_child(f"oci:{tmp_path}/lay", store, stop.replace("sys.stdin.read()", "signal.pause()"))
    assert code_in.stderr is not None
    while b"stopped" not in code_in.stderr.readline():
        assert code_in.poll() is None
    waiting = threading.Event()
    result: list[Image] = []

    def progress(line: str) -> None:
        if "waiting" in line:
            waiting.set()

    thread = threading.Thread(
        target=lambda: result.append(Importer(store, progress=progress).run(f"oci:{tmp_path}/lay", names=["demo"]))
    )
    thread.start()
    assert waiting.wait(20)
    code_in.send_signal(signal.SIGKILL)
    code_in.communicate()
    thread.join(20)
    assert store.resolve("demo") == result[0]
    assert os.listdir(store.work) == []


KILLS = {
    "while it unpacks": "layer.Layers._file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "before it writes the file system": "erofs.build = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)",
    "before it publishes": "store.ImageStore.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "between blob and document": "store._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "within the document": "store.os.fsync = lambda fd, g=os.fsync: (os.kill(os.getpid(), signal.SIGKILL)"
    " if os.readlink(f'/proc/self/fd/{fd}').endswith('.json') else g(fd))",
    "between document and name": "store.ImageStore._point = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "within the name": "store.os.symlink = lambda *a, g=os.symlink: (g(*a), os.kill(os.getpid(), signal.SIGKILL))",
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_an_import_killed_anywhere_leaves_nothing_that_is_trusted_and_the_next_cleans_up(
    store: ImageStore, tmp_path: Path, kill: str
) -> None:
    layout(tmp_path / "lay", BASE)
    child = import_in_child(f"oci:{tmp_path}/lay", store, kill)
    told = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, told
    for image in store.list():
        assert image.erofs.stem == hashlib.sha256(image.erofs.read_bytes()).hexdigest()
    layout(tmp_path / "other", TOP)
    other = Importer(store).run(f"oci:{tmp_path}/other", names=["other"])
    assert os.listdir(store.work) == []
    image = Importer(store).run(f"oci:{tmp_path}/lay", names=["demo"])
    assert everything(store) == {
        *(f"blobs/{one.erofs.name}" for one in (image, other)),
        *(f"images/{one.id}.json" for one in (image, other)),
        "names/demo:latest",
        "names/other:latest",
    }


def test_without_setpriv_the_error_says_what_to_install(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(tmp_path / "lay", BASE)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="setpriv is missing: 'apt-get install util-linux'"):
        Importer(store).run(f"oci:{tmp_path}/lay", names=["demo"])


def test_the_builder_dies_with_a_killed_import_and_holds_its_lock_until_then(store: ImageStore, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "mkfs.erofs"
    fake.write_text("#!/bin/sh\necho building >&2\nexec sleep 1000\n")
    fake.chmod(0o755)
    layout(tmp_path / "lay", BASE)
    change = (
        f"os.environ['PATH'] = {str(programs)!r} + ':' + os.environ['PATH']\n"
        "import subprocess as s; genuine = s.run\n"
        "erofs.subprocess.run = lambda a, **k: genuine(a, **{**k, 'capture_output': False, 'stderr': None})"
    )
    child = import_in_child(f"oci:{tmp_path}/lay", store, change)
    assert child.stderr is not None
    while b"building" not in child.stderr.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    # stderr ends when the builder, which inherited it, is gone too
    ready, _, _ = select.select([child.stderr], [], [], 20)
    assert ready
    child.communicate(timeout=20)
    assert Importer(store).run(f"oci:{tmp_path}/lay", names=["demo"]) == store.resolve("demo")


def test_the_same_tree_makes_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    members = [Member(f"f{number}", data=b"%d" % number, xattrs={"user.a": b"same"}) for number in range(50)]
    blobs = []
    for number, order in enumerate((members, members[::-1])):
        layout(tmp_path / f"lay{number}", tar(*order))
        store = ImageStore(Roots(tmp_path / "run", tmp_path / f"data{number}"))
        blobs.append(Importer(store).run(f"oci:{tmp_path}/lay{number}").erofs)
    assert blobs[0].name == blobs[1].name
    assert blobs[0].read_bytes() == blobs[1].read_bytes()
