"""Real images by umoci and skopeo, imported by the command, compared file by file with what umoci unpacks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.unit.images.making import (
    CHARACTER,
    FIFO,
    Layout,
    Member,
    archived,
    compressed,
    directory,
    hard_link,
    layout,
    link,
    tar,
)
from vmsandbox.paths import Roots
from vmsandbox.resources.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmsandbox.resources.images.document import Image

pytestmark = pytest.mark.cloned

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def run(*argv: str | os.PathLike[str], **rest: object) -> str:
    result = subprocess.run(argv, capture_output=True, text=True, check=False, **rest)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{argv}: {result.stderr}"
    return str(result.stdout)


def vmsandbox_image(data: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "vmsandbox.admin", "--data-root", str(data), "image", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def imported(tmp_path: Path, source: str) -> Image:
    result = vmsandbox_image(tmp_path / "data", "import", source)
    assert result.returncode == 0, result.stderr
    return ImageStore(Roots(tmp_path / "run", tmp_path / "data")).resolve(result.stdout.strip())


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,ro", image, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about every file below `root`, but inode numbers."""
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[tuple[int, int], list[str]] = {}
    for directory_name, directories, files in os.walk(root):
        for name in ["", *directories, *files] if directory_name == str(root) else [*directories, *files]:
            path = os.path.normpath(os.path.join(directory_name, name))
            status = os.lstat(path)
            relative = os.path.relpath(path, root)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                groups.setdefault((status.st_dev, status.st_ino), []).append(relative)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif not stat.S_ISDIR(status.st_mode):
                content = status.st_rdev
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            found[relative] = (
                stat.filemode(status.st_mode),
                status.st_uid,
                status.st_gid,
                size,
                status.st_mtime_ns,
                content,
                tuple(sorted(attributes.items())),
            )
    for names in groups.values():
        for name in names:
            found[name] += (tuple(sorted(names)),)
    return found


def differences(
    ours: dict[str, tuple[object, ...]], theirs: dict[str, tuple[object, ...]]
) -> dict[str, tuple[object, object]]:
    return {
        name: (ours.get(name), theirs.get(name))
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    }


def distribution_tree(root: Path) -> None:
    """A tree with a real distribution's files: owners, links, set-uid programs."""
    for name in ("bin", "sbin", "lib64"):
        link_target = os.readlink(f"/{name}") if os.path.islink(f"/{name}") else f"usr/{name}"
        root.joinpath(name).symlink_to(link_target)
    for directory_name in ("usr/bin", "etc"):
        (root / directory_name).mkdir(parents=True)
    for name in ("bash", "cat", "passwd", "su", "gunzip", "zstd"):
        if os.path.lexists(f"/usr/bin/{name}"):
            run("cp", "-a", f"/usr/bin/{name}", root / "usr/bin")
    for name in ("passwd", "group", "alternatives", "ssl", "terminfo"):
        if os.path.lexists(f"/etc/{name}"):
            run("cp", "-a", f"/etc/{name}", root / "etc")


def random_layers(seed: int) -> list[bytes]:
    """Layers in which everything happens to everything."""
    choose = random.Random(seed)
    names = [f"{a}{b}" for a in "abcd" for b in "12"]
    layers = []
    for _ in range(4):
        members: dict[str, Member] = {}
        directories = [""]
        for name in choose.sample(names, 5):
            members[name] = directory(name, mode=choose.choice([0o755, 0o1777, 0o2700]), mtime=choose.randrange(10**9))
            directories.append(f"{name}/")
        files: list[str] = []
        for number in range(30):
            parent = choose.choice(directories)
            path = parent + choose.choice([*names, f"f{number % 7}"])
            if path in members:
                continue
            owner = {"uid": choose.choice([0, 1000, 70_000, 4_000_000_000]), "mtime": choose.randrange(10**9)}
            kind = choose.randrange(8)
            if kind <= 2:
                members[path] = Member(
                    path, data=b"x" * choose.randrange(5000), mode=choose.choice([0o644, 0o4755, 0]), **owner
                )
                files.append(path)
            elif kind == 3:
                members[path] = link(path, choose.choice(["a1", "../b2", "/c1/f1", "nowhere"]), **owner)
            elif kind == 4 and files:
                members[path] = hard_link(path, choose.choice(files))
            elif kind == 5:
                members[path] = choose.choice(
                    [Member(path, FIFO, **owner), Member(path, CHARACTER, device=(1, 3), **owner)]
                )
            elif kind == 6 and "/" in path:
                members[path] = directory(path, **owner)
            elif kind == 7 and layers and parent + ".wh." + path.rpartition("/")[2] not in members:
                whiteout = f"{parent}.wh.{path.rpartition('/')[2]}"
                members[whiteout] = Member(whiteout)
        if layers and choose.random() < 0.7 and len(directories) > 1:
            opaque = choose.choice(directories[1:]) + ".wh..wh..opq"
            members[opaque] = Member(opaque)
        layers.append(tar(directory("./", mtime=5), *members.values()))
    return layers


EVERYTHING = tar(
    directory("./", mode=0o751, mtime=7),
    directory("dir", mode=0o2750, uid=7, gid=8, mtime=1111, xattrs={"user.d": b"1"}),
    Member("dir/setuid", data=b"program", mode=0o6755, uid=70_000, gid=4_000_000_000, mtime=2222.5),
    Member(
        "dir/capable", data=b"p", mode=0o755, xattrs={"security.capability": CAPABILITY, "user.a": bytes(range(256))}
    ),
    hard_link("hard", "dir/setuid"),
    link("soft", "/etc/../nowhere", uid=9, gid=10, mtime=3333),
    hard_link("soft2", "soft"),
    Member("char", CHARACTER, device=(1, 3), mode=0o666),
    Member("fifo", FIFO, mode=0o622),
    Member("large", data=bytes(3_000_000) + b"end"),
    Member("n" * 200, mode=0o400),
    *(Member(f"dir/{number:04}", data=b"%d" % number) for number in range(200)),
)
CHANGES = tar(
    directory("./", mode=0o751, mtime=7),
    directory("dir", mode=0o755, mtime=4444),
    Member("dir/.wh.0007"),
    Member("dir/0008", data=b"changed"),
    Member(".wh.fifo"),
    directory("soft", mtime=5),
    Member("soft/file", data=b"x"),
)


def unpacked_by_umoci(tmp_path: Path, layers: list[bytes]) -> dict[str, tuple[object, ...]]:
    layout(tmp_path / "lay", *layers, name="it")
    run("umoci", "raw", "unpack", "--image", f"{tmp_path}/lay:it", tmp_path / "umoci")
    return described(tmp_path / "umoci")


def ours(tmp_path: Path, source: str) -> dict[str, tuple[object, ...]]:
    with mounted(imported(tmp_path, source).erofs, tmp_path / "mnt") as root:
        return described(root)


def test_every_kind_of_file_is_as_umoci_unpacks_it(tmp_path: Path) -> None:
    theirs = unpacked_by_umoci(tmp_path, [EVERYTHING, CHANGES])
    assert len(theirs) > 200
    assert differences(ours(tmp_path, f"oci:{tmp_path}/lay:it"), theirs) == {}


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_are_as_umoci_unpacks_them(tmp_path: Path, seed: int) -> None:
    theirs = unpacked_by_umoci(tmp_path, random_layers(seed))
    assert differences(ours(tmp_path, f"oci:{tmp_path}/lay:it"), theirs) == {}


def test_an_image_made_and_changed_by_umoci_survives_every_transport(tmp_path: Path) -> None:
    image = f"{tmp_path}/umoci-image:v1"
    run("umoci", "init", "--layout", tmp_path / "umoci-image")
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", "--image", image, tmp_path / "bundle")
    distribution_tree(tmp_path / "bundle" / "rootfs")
    run("umoci", "repack", "--image", image, tmp_path / "bundle")
    run("umoci", "unpack", "--image", image, tmp_path / "bundle2")
    (tmp_path / "bundle2/rootfs/etc/passwd").unlink()
    shutil.rmtree(tmp_path / "bundle2/rootfs/usr/bin")
    (tmp_path / "bundle2/rootfs/etc/added").write_text("added")
    run("umoci", "repack", "--image", image, tmp_path / "bundle2")
    run("umoci", "config", "--image", image, "--config.cmd", "/bin/bash", "--config.env", "A=b", "--config.user", "1:2")
    run("umoci", "raw", "unpack", "--image", image, tmp_path / "umoci")
    run("skopeo", "copy", "-q", f"oci:{image}", f"docker-archive:{tmp_path}/d.tar:made/by:umoci")
    run("skopeo", "copy", "-q", f"oci:{image}", f"oci-archive:{tmp_path}/o.tar:v1")
    (tmp_path / "d.tar.gz").write_bytes(compressed((tmp_path / "d.tar").read_bytes(), "gzip"))

    first = imported(tmp_path, f"oci:{image}")
    assert first.names == ("umoci-image:v1",)
    assert (first.config["Cmd"], first.config["User"]) == (["/bin/bash"], "1:2")
    with mounted(first.erofs, tmp_path / "mnt") as root:
        assert differences(described(root), described(tmp_path / "umoci")) == {}
    blobs = {first.erofs.name}
    for source in ("oci-archive:{}/o.tar:v1", "docker-archive:{}/d.tar:made/by:umoci", "docker-archive:{}/d.tar.gz"):
        shutil.rmtree(tmp_path / "data")
        blobs.add(imported(tmp_path, source.format(tmp_path)).erofs.name)
    assert blobs == {first.erofs.name}


def test_skopeo_s_zstd_layers_are_the_same_image(tmp_path: Path) -> None:
    layout(tmp_path / "lay", EVERYTHING, CHANGES, name="it")
    first = imported(tmp_path, f"oci:{tmp_path}/lay:it")
    for how in ("zstd", "gzip"):
        run(
            "skopeo", "copy", "-q", "--dest-compress-format", how, f"oci:{tmp_path}/lay:it", f"oci:{tmp_path}/{how}:it"
        )  # fmt: skip
        shutil.rmtree(tmp_path / "data")
        assert imported(tmp_path, f"oci:{tmp_path}/{how}:it").erofs.name == first.erofs.name
    found = Layout.__new__(Layout)
    found.path = tmp_path / "zstd"
    index = json.loads((found.path / "index.json").read_bytes())
    manifest = json.loads(found.blob(index["manifests"][0]["digest"]).read_bytes())
    assert found.blob(manifest["layers"][0]["digest"]).read_bytes()[:4] == b"\x28\xb5\x2f\xfd"


def test_a_directory_becomes_the_same_file_system_as_its_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    distribution_tree(root)
    theirs = described(root)
    with mounted(imported(tmp_path, f"rootfs:{root}").erofs, tmp_path / "mnt") as mount:
        assert differences(described(mount), theirs) == {}


def test_gnu_tar_s_sparse_files_are_unpacked_whole(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with open(tmp_path / "src" / "sparse", "wb") as file:
        for piece in range(50):
            file.seek(piece * 300_000)
            file.write(b"data %d" % piece)
        file.truncate(20_000_000)
    command = ["tar", "--sparse", "--format=gnu", "-C", str(tmp_path / "src"), "-cf", "-", "sparse"]
    layer = subprocess.run(command, capture_output=True, check=True).stdout
    layout(tmp_path / "lay", layer, name="it")
    with mounted(imported(tmp_path, f"oci:{tmp_path}/lay:it").erofs, tmp_path / "mnt") as root:
        assert (root / "sparse").read_bytes() == (tmp_path / "src" / "sparse").read_bytes()


HOSTILE = {
    "path up": [Member("../../../../../../../../OUTSIDE/evil", data=b"x")],
    "absolute link": [link("l", "/OUTSIDE"), Member("l/evil", data=b"x")],
    "relative link": [link("l", "../../../../../../../../../../OUTSIDE"), Member("l/evil", data=b"x")],
    "hard link": [hard_link("evil", "/OUTSIDE/secret"), Member("evil", data=b"x")],
    "whiteout": [link("l", "/OUTSIDE"), Member("l/.wh.secret")],
    "device": [Member("dev", CHARACTER, device=(1, 3)), Member("dev/evil", data=b"x")],
    "bomb": [Member("evil", data=bytes(30_000_000))],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("form", ["oci", "oci-archive"])
def test_a_hostile_image_is_refused_by_layer_and_entry(tmp_path: Path, members: list[Member], form: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    where = str(outside)[1:]
    layers = [
        tar(
            *(
                Member(
                    member.name.replace("OUTSIDE", where),
                    member.kind,
                    data=member.data,
                    link=member.link.replace("OUTSIDE", where),
                    device=member.device,
                )
                for member in members
            )
        )
    ]
    made = layout(tmp_path / "lay", tar(directory("ok")), *layers, name="it")
    manifest = json.loads(made.blob(made.manifests[0]["digest"]).read_bytes())
    source = f"oci:{made.path}"
    if form == "oci-archive":
        source = f"oci-archive:{archived(made.path, tmp_path / 'lay.tar')}"
    result = vmsandbox_image(tmp_path / "data", "import", source, "--max-size", "20m")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert manifest["layers"][1]["digest"] in message
    assert "entry '" in message
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    images = tmp_path / "data" / "images"
    left = [path for path in images.rglob("*") if not path.is_dir() and path.name != "lock"]
    assert left == []


def test_an_image_already_there_is_imported_in_an_instant(tmp_path: Path) -> None:
    layers = [tar(*(Member(f"{layer}/{number}", data=os.urandom(2000)) for number in range(3000))) for layer in "ab"]
    layout(tmp_path / "lay", *layers, name="it")
    first = imported(tmp_path, f"oci:{tmp_path}/lay:it")
    before = first.erofs.stat()
    result = vmsandbox_image(tmp_path / "data", "import", f"oci:{tmp_path}/lay:it")
    assert result.stdout.strip() == first.id
    assert "already there" in result.stderr
    assert first.erofs.stat().st_mtime_ns == before.st_mtime_ns
