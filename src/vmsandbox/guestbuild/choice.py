"""Which guest a pod boots: what the configuration's section `guest` means.

Cheap to import: the supervisor asks before every boot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox.guestbuild import cmdline, store

if TYPE_CHECKING:
    from pathlib import Path

    from vmsandbox.guestbuild.store import Guest
    from vmsandbox.paths import Roots


def chosen(roots: Roots, kernel: str, image: str) -> Guest:
    """The guest with this kernel (a flavour that is built, or a path) and image (a path, or empty: the built one).

    A kernel of the user's own boots without an initramfs, whose modules are another kernel's; it has to have built in
    what docs/guest.md lists.  Raises `NotFoundError`, which says what to run, for what was to be built and is not.
    """
    if kernel in store.FLAVOURS:
        guest = store.current(roots, kernel)
        return replace(guest, image=_path(image)) if image else guest
    own = _path(kernel)
    parameters = cmdline.MONOLITHIC
    if image:
        return store.Guest(key="", kernel=own, initrd=None, image=_path(image), cmdline=parameters)
    return replace(store.current(roots), kernel=own, initrd=None, cmdline=parameters)


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)
