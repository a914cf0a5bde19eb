"""Layers: what they say is what the tree becomes, and nothing they say reaches beyond it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.unit.images.making import (
    BLOCK,
    CHARACTER,
    FIFO,
    Member,
    compressed,
    directory,
    hard_link,
    header,
    link,
    padded,
    pax,
    tar,
)
from vmsandbox.errors import InvalidArgumentError
from vmsandbox.resources.images.layer import Layers
from vmsandbox.resources.images.streams import Section

if TYPE_CHECKING:
    from pathlib import Path

END = bytes(1024)
#: a version 2 capability: cap_net_bind_service, effective and permitted
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def unpacked(
    tmp_path: Path, *layers: bytes, max_bytes: int = 1 << 30, max_entries: int = 10_000, compression: str = ""
) -> Path:
    """The tree that the layers make."""
    root = tmp_path / "tree"
    root.mkdir(mode=0o755)
    with Layers(root, max_bytes=max_bytes, max_entries=max_entries) as writer:
        for number, layer in enumerate(layers):
            blob = tmp_path / f"layer{number}"
            blob.write_bytes(compressed(layer, compression))
            with open(blob, "rb") as file:
                writer.add(Section(file.fileno(), 0, blob.stat().st_size), title=f"'layer {number}'")
        writer.finish()
    return root


def paths(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_every_kind_of_entry_becomes_what_it_is(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        tar(
            directory("dir", mode=0o2750, uid=7, gid=8, mtime=1111),
            Member("dir/setuid", data=b"program", mode=0o6755, uid=70_000, gid=4_000_000_000, mtime=2222.5),
            Member("dir/empty", mode=0),
            hard_link("hard", "dir/setuid"),
            link("soft", "/etc/../nowhere", uid=9, gid=10, mtime=3333),
            hard_link("soft2", "soft"),
            Member("char", CHARACTER, device=(1, 3), mode=0o666),
            Member("block", BLOCK, device=(259, 70_000), mode=0o660, gid=6, mtime=4444),
            Member("fifo", FIFO, mode=0o1622),
            Member("implied/by/name", data=b"x"),
        ),
    )
    status = {name: os.lstat(root / name) for name in paths(root)}
    one = status["dir"]
    assert (stat.filemode(one.st_mode), one.st_uid, one.st_gid, one.st_mtime) == ("drwxr-s---", 7, 8, 1111)
    one = status["dir/setuid"]
    assert (stat.filemode(one.st_mode), one.st_uid, one.st_gid) == ("-rwsr-sr-x", 70_000, 4_000_000_000)
    assert (one.st_mtime_ns, one.st_nlink) == (2222_500_000_000, 2)
    assert status["hard"].st_ino == one.st_ino
    assert (root / "hard").read_bytes() == b"program"
    assert stat.S_IMODE(status["dir/empty"].st_mode) == 0
    one = status["soft"]
    assert (os.readlink(root / "soft"), one.st_uid, one.st_gid, one.st_mtime) == ("/etc/../nowhere", 9, 10, 3333)
    assert status["soft2"].st_ino == one.st_ino
    one = status["char"]
    assert (stat.filemode(one.st_mode), one.st_rdev) == ("crw-rw-rw-", os.makedev(1, 3))
    one = status["block"]
    assert (stat.filemode(one.st_mode), one.st_rdev, one.st_gid) == ("brw-rw----", os.makedev(259, 70_000), 6)
    assert one.st_mtime == 4444
    assert stat.filemode(status["fifo"].st_mode) == "prw--w--wT"
    one = status["implied"]
    assert (stat.filemode(one.st_mode), one.st_uid, one.st_mtime) == ("drwxr-xr-x", 0, 0)


def test_the_masks_of_this_process_do_not_matter(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        root = unpacked(
            tmp_path,
            tar(directory("d", mode=0o1777), Member("d/f", mode=0o666), Member("p", FIFO, mode=0o666), Member("i/j")),
        )
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(os.lstat(root / name).st_mode) for name in ("d", "d/f", "p", "i", ".")}
    assert modes == {"d": 0o1777, "d/f": 0o666, "p": 0o666, "i": 0o755, ".": 0o755}


def test_extended_attributes_are_kept_on_everything_that_can_have_them(tmp_path: Path) -> None:
    attributes = {"user.text": b"\x00\xff", "security.capability": CAPABILITY, "trusted.empty": b""}
    root = unpacked(
        tmp_path,
        tar(
            directory("d", xattrs={"user.d": b"1", "trusted.overlay.opaque": b"y"}),
            Member("f", mode=0o4755, uid=5, xattrs=attributes | {"security.selinux": b"x", "user.overlay.a": b"x"}),
            link("l", "f", xattrs={"trusted.l": b"2", "user.l": b"never"}),
            Member("c", CHARACTER, device=(1, 3), xattrs={"trusted.c": b"3"}),
        ),
    )

    def read(name: str) -> dict[str, bytes]:
        path = root / name
        names = os.listxattr(path, follow_symlinks=False)
        return {key: os.getxattr(path, key, follow_symlinks=False) for key in names}

    assert read("d") == {"user.d": b"1"}
    assert read("f") == attributes
    assert read("l") == {"trusted.l": b"2"}
    assert read("c") == {"trusted.c": b"3"}


def test_a_later_directory_entry_replaces_owner_mode_attributes_and_time(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        tar(directory("d", uid=1, mtime=1, xattrs={"user.old": b"1"}), Member("d/kept")),
        tar(directory("d", mode=0o700, uid=2, mtime=2, xattrs={"user.new": b"1"})),
    )
    status = (root / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o700, 2, 2)
    assert os.listxattr(root / "d") == ["user.new"]
    assert (root / "d/kept").exists()


def test_a_directory_keeps_its_time_while_layers_change_what_is_in_it(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        tar(directory("./", mode=0o700, mtime=9), directory("d", mtime=1), directory("d/e", mtime=2)),
        tar(Member("d/e/f"), Member("g")),
    )
    assert [(root / name).stat().st_mtime for name in ("d", "d/e", ".")] == [1, 2, 9]
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Member("x", data=b"old"), Member("x", data=b"new")),
        (Member("x", data=b"old"), directory("x")),
        (Member("x", data=b"old"), link("x", "y")),
        (link("x", "y"), Member("x", data=b"new")),
        (link("x", "d"), directory("x")),
        (directory("x"), Member("x", data=b"new")),
        (directory("x"), link("x", "y")),
        (Member("x", FIFO), Member("x", data=b"new")),
        (Member("x", CHARACTER, device=(1, 3)), Member("x", FIFO)),
        (Member("x", data=b"old"), hard_link("x", "other")),
        (directory("x"), hard_link("x", "other")),
    ],
)
@pytest.mark.parametrize("same_layer", [False, True])
def test_a_later_entry_takes_the_place_of_an_earlier_one(
    tmp_path: Path, before: Member, after: Member, same_layer: bool
) -> None:
    below = [directory("d"), Member("d/kept"), Member("other", data=b"other"), before]
    if before.kind == tarfile.DIRTYPE:
        below += [Member("x/below"), directory("x/deep"), Member("x/deep/er")]
    layers = [tar(*below, after)] if same_layer else [tar(*below), tar(after)]
    root = unpacked(tmp_path, *layers)
    status = os.lstat(root / "x")
    if after.kind == tarfile.LNKTYPE:
        assert status.st_ino == os.lstat(root / "other").st_ino
    else:
        assert (
            stat.S_IFMT(status.st_mode)
            == {
                tarfile.REGTYPE: stat.S_IFREG,
                tarfile.DIRTYPE: stat.S_IFDIR,
                tarfile.SYMTYPE: stat.S_IFLNK,
                tarfile.FIFOTYPE: stat.S_IFIFO,
            }[after.kind]
        )
    assert paths(root) == {"d", "d/kept", "other", "x"}


def test_overwriting_one_name_of_a_file_leaves_its_other_name(tmp_path: Path) -> None:
    root = unpacked(tmp_path, tar(Member("a", data=b"old"), hard_link("b", "a")), tar(Member("a", data=b"new")))
    assert (root / "b").read_bytes() == b"old"


def test_a_hard_link_may_point_into_a_lower_layer_and_through_its_links(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        tar(directory("usr"), Member("usr/f", data=b"x"), link("abs", "/usr")),
        tar(hard_link("g", "abs/f"), hard_link("h", "/usr/f"), hard_link("usr/f", "usr/f")),
    )
    assert os.lstat(root / "g").st_ino == os.lstat(root / "h").st_ino == os.lstat(root / "usr/f").st_ino


BASE = tar(
    directory("d"),
    Member("d/one"),
    Member("d/two"),
    directory("d/sub"),
    Member("d/sub/deep"),
    Member("top"),
)
ALL = {"d", "d/one", "d/two", "d/sub", "d/sub/deep", "top"}
WHITEOUTS: dict[str, tuple[list[Member], set[str]]] = {
    "a file": ([Member("d/.wh.one")], ALL - {"d/one"}),
    "a directory": ([Member(".wh.d")], {"top"}),
    "what does not exist": ([Member(".wh.nothing"), Member("d/.wh.nothing")], ALL),
    "everything in a directory": ([Member("d/.wh..wh..opq")], {"d", "top"}),
    "everything": ([Member(".wh..wh..opq")], set()),
    "before what the same layer adds": ([Member("d/.wh.one"), Member("d/one")], ALL),
    "after what the same layer adds": ([Member("d/one"), Member("d/.wh.one")], ALL),
    "opaque before what is added": (
        [directory("d"), Member("d/.wh..wh..opq"), Member("d/new")],
        {"d", "d/new", "top"},
    ),
    "opaque after what is added": (
        [directory("d"), Member("d/new"), Member("d/sub/new"), Member("d/.wh..wh..opq")],
        {"d", "d/new", "d/sub", "d/sub/new", "top"},
    ),
    "a directory whose successor came first": (
        [directory("d"), Member("d/new"), Member(".wh.d")],
        {"d", "d/new", "top"},
    ),
    "of another kind of entry": ([directory("d/.wh.one"), link("d/.wh.two", "x")], ALL - {"d/one", "d/two"}),
    "what aufs keeps for itself": (
        [directory(".wh..wh.plnk"), Member(".wh..wh.plnk/1.2"), Member(".wh..wh.aufs"), Member("d/.wh..wh.orph")],
        ALL,
    ),
    "a name that begins like a mark": ([Member(".wh..hidden")], ALL),
}


@pytest.mark.parametrize(("members", "left"), WHITEOUTS.values(), ids=WHITEOUTS.keys())
def test_a_whiteout_hides(tmp_path: Path, members: list[Member], left: set[str]) -> None:
    assert paths(unpacked(tmp_path, BASE, tar(*members))) == left


def test_a_whiteout_in_the_lowest_layer_hides_nothing(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path, tar(Member("a"), Member(".wh.a"), directory("d"), Member("d/b"), Member("d/.wh..wh..opq"))
    )
    assert paths(root) == {"a", "d", "d/b"}


def test_a_whiteout_hides_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    root = unpacked(tmp_path, tar(directory("d"), Member("d/f"), link("l", "d")), tar(Member(".wh.l")))
    assert paths(root) == {"d", "d/f"}


def test_a_whiteout_reaches_through_a_lower_link_above_it(tmp_path: Path) -> None:
    root = unpacked(tmp_path, tar(directory("d"), Member("d/f"), link("l", "/d")), tar(Member("l/.wh.f")))
    assert paths(root) == {"d", "l"}


def test_what_was_hidden_can_come_back_as_something_else(tmp_path: Path) -> None:
    root = unpacked(tmp_path, BASE, tar(Member(".wh.d")), tar(Member("d", data=b"file")))
    assert (root / "d").read_bytes() == b"file"


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "./usr/../usr/lib", "../../usr/lib", "via"])
def test_an_upper_layer_writes_through_a_lower_link_within_the_tree(tmp_path: Path, target: str) -> None:
    root = unpacked(
        tmp_path,
        tar(directory("usr"), directory("usr/lib"), link("via", "usr/lib"), link("lib", target)),
        tar(Member("lib/deep/er/f", data=b"x"), Member("lib/g"), Member("usr/lib/h")),
        tar(Member("lib/deep/.wh.er")),
    )
    assert (root / "lib").is_symlink()
    assert {"usr/lib/deep", "usr/lib/g", "usr/lib/h"} < paths(root)
    assert not (root / "usr/lib/deep/er").exists()


def test_a_link_and_its_missing_target_are_made_within_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    root = unpacked(tmp_path, tar(link("evil", str(outside))), tar(Member("evil/file")))
    assert not outside.exists()
    assert (root / str(outside)[1:] / "file").exists()


def test_a_name_that_begins_with_a_slash_means_the_root_of_the_image(tmp_path: Path) -> None:
    assert paths(unpacked(tmp_path, tar(Member("/ko-app/run"), Member(".//./a")))) == {"ko-app", "ko-app/run", "a"}


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_the_digest_is_that_of_the_uncompressed_layer(tmp_path: Path, compression: str) -> None:
    layer = tar(Member("a", data=b"x" * 100_000)) + bytes(10_000)
    blob = tmp_path / "blob"
    blob.write_bytes(compressed(layer, compression))
    (tmp_path / "tree").mkdir()
    with open(blob, "rb") as file, Layers(tmp_path / "tree", max_bytes=1 << 20, max_entries=10) as writer:
        digest = writer.add(Section(file.fileno(), 0, blob.stat().st_size), title="'x'")
    assert digest == f"sha256:{hashlib.sha256(layer).hexdigest()}"


def test_a_sparse_file_stays_sparse(tmp_path: Path) -> None:
    data = (
        pax((b"GNU.sparse.size", b"100000000"), (b"GNU.sparse.map", b"50000000,3"))
        + header(b"s", b"0", 3)
        + padded(b"abc")
    )
    root = unpacked(tmp_path, data + END)
    assert (root / "s").stat().st_size == 100_000_000
    assert (root / "s").stat().st_blocks < 1000
    with open(root / "s", "rb") as file:
        file.seek(49_999_999)
        assert file.read(5) == b"\0abc\0"


def test_times_that_no_file_system_has_are_cut(tmp_path: Path) -> None:
    data = pax((b"mtime", b"-100")) + header(b"old", b"0") + pax((b"mtime", b"9" * 18)) + header(b"new", b"0")
    root = unpacked(tmp_path, data + END)
    assert (root / "old").stat().st_mtime == 0
    assert (root / "new").exists()


def test_many_directories_are_not_kept_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    members = [Member(f"{number}/" + "/".join("abcdefghij") + "/f") for number in range(300)]
    root = unpacked(tmp_path, tar(*members), tar(Member(".wh.7"), *members[8:28]))
    assert len(paths(root)) == 299 * 12
    assert not set(os.listdir("/proc/self/fd")) - before


DEEP = "/".join("d" * 300)
HOSTILE: dict[str, tuple[str, list[bytes]]] = {
    "a path up": ("../evil", [tar(Member("../evil"))]),
    "a path up within": ("a/../../evil", [tar(Member("a/../../evil"))]),
    "a directory up": ("..", [tar(directory(".."))]),
    "a whiteout up": ("../.wh.outside", [tar(Member("../.wh.outside"))]),
    "a whiteout of dots": (".wh...", [tar(Member(".wh..."))]),
    "a whiteout of a dot": (".wh..", [tar(Member(".wh.."))]),
    "a whiteout of nothing": (".wh.", [tar(Member(".wh."))]),
    "a file through its own absolute link": ("l/evil", [tar(link("l", "OUTSIDE"), Member("l/evil"))]),
    "a file through its own relative link": ("l/evil", [tar(link("l", "../outside"), Member("l/evil"))]),
    "a file through its own harmless link": ("l/evil", [tar(directory("d"), link("l", "d"), Member("l/evil"))]),
    "a file through a link to a link": ("m/evil", [tar(link("l", "OUTSIDE"), link("m", "l"), Member("m/evil"))]),
    "a link through its own link": ("l/evil", [tar(link("l", "OUTSIDE"), link("l/evil", "x"))]),
    "a directory through its own link": ("l/evil", [tar(link("l", "OUTSIDE"), directory("l/evil"))]),
    "a whiteout through its own link": ("l/.wh.secret", [tar(link("l", "OUTSIDE"), Member("l/.wh.secret"))]),
    "an opaque mark through its own link": ("l/.wh..wh..opq", [tar(link("l", "OUTSIDE"), Member("l/.wh..wh..opq"))]),
    "a link moved under a lower directory": (
        "d/evil",
        [tar(directory("d")), tar(link("d", "OUTSIDE"), Member("d/evil"))],
    ),
    "links in a circle": ("a/evil", [tar(link("a", "b"), link("b", "a")), tar(Member("a/evil"))]),
    "a hard link up": ("evil", [tar(hard_link("evil", "../outside/secret"))]),
    "a hard link to an absolute path": ("evil", [tar(hard_link("evil", "OUTSIDE/secret"))]),
    "a hard link through its own link": ("evil", [tar(link("l", "OUTSIDE"), hard_link("evil", "l/secret"))]),
    "a hard link through a lower link": ("evil", [tar(link("l", "OUTSIDE")), tar(hard_link("evil", "l/secret"))]),
    "a hard link to a directory": ("evil", [tar(directory("d"), hard_link("evil", "d"))]),
    "a hard link to the root": ("evil", [tar(hard_link("evil", "/"))]),
    "a hard link to what it replaces": ("d", [tar(directory("d"), Member("d/f"), hard_link("d", "d/f"))]),
    "a device as a parent": ("dev/x", [tar(Member("dev", BLOCK, device=(8, 0)), Member("dev/x"))]),
    "a fifo as a parent": ("p/x", [tar(Member("p", FIFO), Member("p/x"))]),
    "a file as a parent": ("f/x", [tar(Member("f"), Member("f/x"))]),
    "a lower file as a parent": ("f/x", [tar(Member("f")), tar(Member("f/x"))]),
    "a device with impossible numbers": ("c", [tar(Member("c", CHARACTER, device=(4096, 0)))]),
    "an impossible owner": ("f", [tar(Member("f", uid=1 << 40))]),
    "an owner that means nobody": ("f", [tar(Member("f", gid=0xFFFFFFFF))]),
    "a negative owner": ("f", [pax((b"uid", b"-1")) + header(b"f", b"0") + END]),
    "no name": ("", [header(b"", b"0") + END]),
    "the root as a file": ("./", [header(b"./", b"2", link=b"/etc") + END]),
    "a name that is too long": ("a" * 256, [tar(Member("a" * 256))]),
    "a parent whose name is too long": ("a" * 256 + "/b", [tar(Member("a" * 256 + "/b"))]),
    "a path that is too deep": (DEEP, [tar(Member(DEEP))]),
    "a path that is too long": ("/".join(["a" * 250] * 20), [tar(Member("/".join(["a" * 250] * 20)))]),
    "a link that is too long": ("l", [tar(link("l", "a" * 5000))]),
    "a path made deep by links": (
        "l2/" + "/".join("e" * 150),
        [
            tar(Member("/".join("d" * 150) + "/f"), link("l2", "/".join("d" * 150))),
            tar(Member("l2/" + "/".join("e" * 150))),
        ],
    ),
    "an unknown type": ("m", [header(b"m", b"M") + END]),
    "an attribute of no name": ("f", [tar(Member("f", xattrs={"nonsense": b"x"}))]),
    "an attribute that is too large": ("f", [tar(Member("f", xattrs={"user.x": b"x" * 100_000}))]),
    "attributes that are too large together": (
        "f",
        [tar(Member("f", xattrs={f"user.{number}": b"x" * 3000 for number in range(60)}))],
    ),
    "too many bytes": ("bomb", [tar(Member("a"), Member("bomb", data=bytes(3_000_000)))]),
    "too many bytes over layers": (
        "b",
        [tar(Member("a", data=bytes(1_500_000))), tar(Member("b", data=bytes(1_500_000)))],
    ),
    "too large a hole": (
        "hole",
        [pax((b"GNU.sparse.size", b"9" * 17), (b"GNU.sparse.map", b"0,0")) + header(b"hole", b"0") + END],
    ),
    "too many entries": ("e100", [tar(*(Member(f"e{number}") for number in range(200)))]),
    "too many entries over layers": (
        "f40",
        [tar(*(Member(f"{layer}{number}") for number in range(60))) for layer in "ef"],
    ),
    "cut data": ("f", [tar(Member("f", data=bytes(5000)))[:3000]]),
}


@pytest.mark.parametrize(("entry", "layers"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_layer_is_an_error_that_names_layer_and_entry_and_reaches_nothing(
    tmp_path: Path, entry: str, layers: list[bytes]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    work = tmp_path / "work"
    work.mkdir()
    placed = [retargeted(layer, outside) for layer in layers]
    last = len(layers) - 1
    with pytest.raises(InvalidArgumentError) as caught:
        unpacked(work, *placed, max_bytes=2_000_000, max_entries=100)
    message = str(caught.value)
    assert f"'layer {last}'" in message
    assert f"'{entry}'" in message
    assert "\n" not in message
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "work"]
    assert set(os.listdir(work)) <= {"tree", "layer0", "layer1"}


def retargeted(layer: bytes, outside: Path) -> bytes:
    """The archive with links to 'OUTSIDE' pointing to that directory."""
    if b"OUTSIDE" not in layer:
        return layer
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(layer)) as source, tarfile.open(fileobj=buffer, mode="w") as target:
        for info in source:
            info.linkname = info.linkname.replace("OUTSIDE", str(outside))
            target.addfile(info, source.extractfile(info) if info.isreg() else None)
    return buffer.getvalue()
