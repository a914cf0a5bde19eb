"""What pods boot is what the configuration's section `guest` says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.harness.guests import broken_image, hanging_kernel
from vmsandbox.errors import InvalidArgumentError, NotFoundError
from vmsandbox.guestbuild import cmdline, store
from vmsandbox.guestbuild.choice import chosen
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from pathlib import Path

PACKAGED = "0" * 32
TUNED = "1" * 32


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return hanging_kernel(tmp_path / "vmlinux of my own")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return broken_image(tmp_path / "my.erofs")


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    made = Roots(tmp_path / "run", tmp_path / "data")
    with store.locked(made):
        for flavour, key in (("packaged", PACKAGED), ("tuned", TUNED)):
            with store.staging(made.guests / key) as directory:
                files = {"kernel": "vmlinux", "image": "root.erofs"}
                if flavour == "packaged":
                    files["initrd"] = "initrd.cpio"
                for name in files.values():
                    (directory / name).write_text(flavour)
                store.write_manifest(directory, flavour=flavour, files=files, cmdline=[flavour])
            store.select(made, flavour, key)
    return made


@pytest.mark.parametrize("flavour", store.FLAVOURS)
def test_a_flavour_is_the_guest_built_with_it(roots: Roots, flavour: str) -> None:
    assert chosen(roots, flavour, "") == store.current(roots, flavour)


def test_an_image_of_ones_own_replaces_the_built_one_only(roots: Roots, image: Path) -> None:
    guest = chosen(roots, "packaged", str(image))
    assert guest.image == image
    assert (guest.kernel, guest.initrd) == (store.current(roots).kernel, store.current(roots).initrd)


def test_a_kernel_of_ones_own_mounts_the_image_itself(roots: Roots, kernel: Path) -> None:
    guest = chosen(roots, str(kernel), "")
    assert guest.kernel == kernel
    assert guest.image == store.current(roots).image
    assert guest.initrd is None, "it has the modules of another kernel"
    assert guest.cmdline == cmdline.MONOLITHIC


def test_nothing_built_is_needed_for_files_of_ones_own(tmp_path: Path, kernel: Path, image: Path) -> None:
    empty = Roots(tmp_path / "run", tmp_path / "data")
    guest = chosen(empty, str(kernel), str(image))
    assert (guest.kernel, guest.image, guest.initrd) == (kernel, image, None)
    with pytest.raises(NotFoundError, match="'vmsandbox guest build'"):
        chosen(empty, str(kernel), "")


def test_a_flavour_that_was_not_built_says_how_to_build_it(tmp_path: Path, image: Path) -> None:
    with pytest.raises(NotFoundError, match="'vmsandbox guest build --kernel tuned'"):
        chosen(Roots(tmp_path / "run", tmp_path / "data"), "tuned", str(image))


def test_a_bzimage_is_a_kernel(roots: Roots, kernel: Path) -> None:
    kernel.write_bytes(bytes(0x202) + b"HdrS")
    assert chosen(roots, str(kernel), "").kernel == kernel


@pytest.mark.parametrize(
    "content",
    [b"", bytes(100_000), b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(200), b"\x7fELF\x02\x01" + b"\xff" * 200],
)
def test_what_is_no_kernel_is_refused(roots: Roots, kernel: Path, content: bytes) -> None:
    kernel.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"'guest\.kernel'\) is neither a vmlinux with the PVH note nor"):
        chosen(roots, str(kernel), "")


def test_what_is_no_image_is_refused(roots: Roots, tmp_path: Path, image: Path) -> None:
    image.write_bytes(bytes(100_000))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (image, pipe, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"'guest\.image'\) is no erofs: correct section 'guest'"):
            chosen(roots, "packaged", str(path))
    with pytest.raises(NotFoundError, match=r"cannot open '/nonexistent' \('guest\.image'\): no such file"):
        chosen(roots, "packaged", "/nonexistent")
