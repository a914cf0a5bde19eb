"""The store hands out complete guests only, whatever happened to a build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import AmbiguousError, InvalidArgumentError, NotFoundError
from vmsandbox.guestbuild import store
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

KEY = "0123456789abcdef" * 2
OTHER = "01230000" * 4


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path / "run", tmp_path / "data")


def publish(
    roots: Roots, key: str = KEY, *, kernel: bytes = b"kernel", initrd: bool = True, parts: Sequence[str] = ()
) -> None:
    with store.staging(roots.guests / key) as directory:
        (directory / "vmlinux").write_bytes(kernel)
        (directory / "root.erofs").write_bytes(b"image")
        files = {"kernel": "vmlinux", "image": "root.erofs"}
        if initrd:
            (directory / "initrd.cpio").write_bytes(b"initrd")
            files["initrd"] = "initrd.cpio"
        store.write_manifest(directory, flavour="packaged", files=files, cmdline=["quiet", "panic=-1"], parts=parts)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_current_guest_is_the_selected_one(roots: Roots) -> None:
    with store.locked(roots):
        publish(roots)
        publish(roots, OTHER, initrd=False)
        store.select(roots, "packaged", KEY)
        store.select(roots, "tuned", OTHER)
    guest = store.current(roots)
    assert guest.key == KEY
    assert guest.kernel.read_bytes() == b"kernel"
    assert guest.image.read_bytes() == b"image"
    assert guest.initrd is not None
    assert guest.initrd.read_bytes() == b"initrd"
    assert guest.cmdline == ("quiet", "panic=-1")
    assert store.current(roots, "tuned") == store.load(roots, OTHER)
    assert store.current(roots, "tuned").initrd is None


@pytest.mark.parametrize(
    ("flavour", "command"), [("packaged", "guest build'"), ("tuned", "guest build --kernel tuned'")]
)
def test_a_missing_guest_says_what_to_run(roots: Roots, flavour: str, command: str) -> None:
    with pytest.raises(NotFoundError, match=command):
        store.current(roots, flavour)


def test_an_unknown_flavour_is_refused(roots: Roots) -> None:
    with pytest.raises(InvalidArgumentError, match="'zen'"):
        store.current(roots, "zen")


def remove_image(directory: Path) -> None:
    (directory / "root.erofs").unlink()


def truncate_kernel(directory: Path) -> None:
    os.truncate(directory / "vmlinux", 3)


def garble_manifest(directory: Path) -> None:
    (directory / store.MANIFEST).write_text('{"format": 1, "files"')


def empty_manifest(directory: Path) -> None:
    (directory / store.MANIFEST).write_text('{"format": 1, "files": {}}')


def list_manifest(directory: Path) -> None:
    (directory / store.MANIFEST).write_text("[]")


def newer_manifest(directory: Path) -> None:
    manifest = json.loads((directory / store.MANIFEST).read_text())
    (directory / store.MANIFEST).write_text(json.dumps({**manifest, "format": store.FORMAT + 1}))


def remove_everything(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.mark.parametrize(
    "damage",
    [remove_image, truncate_kernel, garble_manifest, empty_manifest, list_manifest, newer_manifest, remove_everything],
)
def test_a_damaged_guest_is_not_handed_out(roots: Roots, damage: Callable[[Path], None]) -> None:
    with store.locked(roots):
        publish(roots)
        store.select(roots, "packaged", KEY)
    damage(roots.guests / KEY)
    assert not store.is_complete(roots, KEY)
    with pytest.raises(NotFoundError, match="guest build"):
        store.current(roots)


def test_a_build_that_fails_leaves_nothing(roots: Roots) -> None:
    def build_and_fail() -> None:
        with store.staging(roots.guests / KEY) as directory:
            (directory / "vmlinux").write_bytes(b"half")
            raise RuntimeError

    with store.locked(roots), pytest.raises(RuntimeError):
        build_and_fail()
    assert names(roots.guests) == ["lock"]


KILLED_BUILDER = """
    import os, signal, sys
    from pathlib import Path
    from vmsandbox.guestbuild import store
    from vmsandbox.paths import Roots

    roots = Roots(Path("/nonexistent"), Path(sys.argv[1]))
    part, guest = store.parts(roots) / "image-x", roots.guests / sys.argv[2]
    with store.locked(roots), store.staging(part), store.staging(guest) as directory:
        (directory / "vmlinux").write_bytes(b"half")
        (directory / "manifest.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_build_is_never_trusted_and_is_cleaned_up_by_the_next(roots: Roots) -> None:
    code = textwrap.dedent(KILLED_BUILDER)
    killed = subprocess.run([sys.executable, "-c", code, str(roots.data), KEY], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in names(roots.guests) if name.startswith(".staging-")]
    assert not store.is_complete(roots, KEY)
    assert store.entries(roots) == []
    with store.locked(roots):
        assert names(roots.guests) == ["lock", "parts"]
        assert names(store.parts(roots)) == []
        publish(roots)
    assert store.is_complete(roots, KEY)


def test_replacing_a_guest_leaves_the_new_one_only(roots: Roots) -> None:
    with store.locked(roots):
        publish(roots, kernel=b"old")
        publish(roots, kernel=b"new kernel")
    assert store.load(roots, KEY).kernel.read_bytes() == b"new kernel"
    assert names(roots.guests) == [KEY, "lock"]


def test_files_are_readable_for_an_unprivileged_qemu_whatever_the_umask(roots: Roots) -> None:
    before = os.umask(0o077)
    try:
        with store.locked(roots):
            publish(roots)
    finally:
        os.umask(before)
    assert roots.data.stat().st_mode & 0o777 == 0o755
    assert roots.guests.stat().st_mode & 0o777 == 0o755
    assert (roots.guests / KEY).stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (roots.guests / KEY).iterdir()} == {0o644}


HOLDER = """
    import sys
    from pathlib import Path
    from vmsandbox.guestbuild import store
    from vmsandbox.paths import Roots

    with store.locked(Roots(Path("/nonexistent"), Path(sys.argv[1]))):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_second_builder_waits_for_the_first(roots: Roots) -> None:
    told = []
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(roots.data)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"

        def let_go() -> None:
            told.append(holder.poll())
            assert holder.stdin is not None
            holder.stdin.close()

        with store.locked(roots, waiting=let_go):
            pass
    assert told == [None]
    assert holder.returncode == 0


def test_an_abbreviated_key_must_be_unique(roots: Roots) -> None:
    with store.locked(roots):
        publish(roots)
        publish(roots, OTHER)
    assert store.load(roots, "01234").key == KEY
    with pytest.raises(AmbiguousError):
        store.find(roots, "0123")
    for unknown in ("ff", "", "..", "../data"):
        with pytest.raises(NotFoundError):
            store.find(roots, unknown)


def test_removing_a_guest_removes_the_pointers_at_it(roots: Roots) -> None:
    with store.locked(roots):
        publish(roots)
        publish(roots, OTHER)
        store.select(roots, "packaged", KEY)
        store.select(roots, "tuned", OTHER)
        store.remove(roots, KEY)
    assert names(roots.guests) == [OTHER, "current-tuned", "lock"]
    assert [(entry.key, entry.current_for) for entry in store.entries(roots)] == [(OTHER, ("tuned",))]


def test_removing_what_is_unused_keeps_what_current_guests_are_made_of(roots: Roots) -> None:
    with store.locked(roots):
        for kind in ("kernel", "base"):
            with store.staging(store.part(roots, kind, "used")) as directory:
                (directory / "file").touch()
            with store.staging(store.part(roots, kind, "unused")):
                pass
        publish(roots, parts=["kernel-used", "base-used"])
        publish(roots, OTHER, parts=["kernel-unused", "base-used"])
        (store.cache(roots) / "download").touch()
        store.select(roots, "packaged", KEY)
        assert store.remove_unused(roots) == [OTHER]
    assert names(roots.guests) == [KEY, "current-packaged", "lock", "parts"]
    assert names(store.parts(roots)) == ["base-used", "kernel-used"]
    assert store.current(roots).key == KEY


def test_the_key_changes_with_every_input_and_not_with_their_order() -> None:
    one = store.key_of({"packages": {"a": "1"}, "sources": "x"})
    assert one == store.key_of({"sources": "x", "packages": {"a": "1"}})
    assert one != store.key_of({"packages": {"a": "2"}, "sources": "x"})
    assert one != store.key_of({"packages": {"a": "1"}, "sources": "y"})
    assert len(one) == store.KEY_DIGITS


def test_importing_the_store_is_cheap() -> None:
    code = "import sys, vmsandbox.guestbuild.store; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncio", "ctypes", "pydantic", "subprocess"} & set(done.stdout.split())
