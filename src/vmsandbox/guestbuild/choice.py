"""Which guest a pod boots: what the configuration's section `guest` means.

Cheap to import: the supervisor asks before every boot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox.guestbuild import cmdline, store

if TYPE_CHECKING:
    from vmsandbox.guestbuild.store import Guest
    from vmsandbox.paths import Roots


def chosen(roots: Roots, kernel: str, image: str) -> Guest:
    """The guest with this kernel (a flavour that is built, or a path) and image (a path, or empty: the built one).

    A kernel of the user's own boots without an initramfs, whose modules are another kernel's; it has to have built in
    what docs/guest.md lists.  Raises `NotFoundError`, which says what to do, for what is not there, and
    `InvalidArgumentError` for a file that is no kernel or no image.
    """
    if kernel in store.FLAVOURS and not image:
        return store.current(roots, kernel)
    from vmsandbox.guestbuild import own

    if kernel in store.FLAVOURS:
        return replace(store.current(roots, kernel), image=own.image(image))
    path, parameters = own.kernel(kernel), cmdline.MONOLITHIC
    if image:
        return store.Guest(key="", kernel=path, initrd=None, image=own.image(image), cmdline=parameters)
    return replace(store.current(roots), kernel=path, initrd=None, cmdline=parameters)
