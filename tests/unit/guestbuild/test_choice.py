"""What pods boot is what the configuration's section `guest` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import cmdline, store
from vmsandbox.guestbuild.choice import chosen
from vmsandbox.paths import Roots

PACKAGED = "0" * 32
TUNED = "1" * 32
OWN = "/boot/vmlinux of my own"


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


def test_an_image_of_ones_own_replaces_the_built_one_only(roots: Roots) -> None:
    guest = chosen(roots, "packaged", "/my.erofs")
    assert guest.image == Path("/my.erofs")
    assert (guest.kernel, guest.initrd) == (store.current(roots).kernel, store.current(roots).initrd)


def test_a_kernel_of_ones_own_mounts_the_image_itself(roots: Roots) -> None:
    guest = chosen(roots, OWN, "")
    assert guest.kernel == Path(OWN)
    assert guest.image == store.current(roots).image
    assert guest.initrd is None, "it has the modules of another kernel"
    assert guest.cmdline == cmdline.MONOLITHIC


def test_nothing_built_is_needed_for_files_of_ones_own(tmp_path: Path) -> None:
    empty = Roots(tmp_path / "run", tmp_path / "data")
    guest = chosen(empty, OWN, "/my.erofs")
    assert (guest.kernel, guest.image, guest.initrd) == (Path(OWN), Path("/my.erofs"), None)
    with pytest.raises(NotFoundError, match="'vmsandbox guest build'"):
        chosen(empty, OWN, "")


def test_a_flavour_that_was_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="'vmsandbox guest build --kernel tuned'"):
        chosen(Roots(tmp_path / "run", tmp_path / "data"), "tuned", "/my.erofs")
