"""Labels of the host's security modules: engines name them, and nothing of a container on the host could bear them.

A profile or label says what a container's programs may do to the kernel that they run on, which is the guest's.  On
the host there is only the stand-in, whose needs no profile for that container foresees: it would be kept from its own
work and nobody from anything.  Where the host has the module, a label is therefore taken and not applied.  Where it has
not, the label means nothing to anybody, and naming it is an error, as with runc.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import UnsupportedError

if TYPE_CHECKING:
    from vmsandbox.oci.spec import Process

#: says "Y" where AppArmor is in force; is there where SELinux is
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
SELINUX = Path("/sys/fs/selinux/enforce")
#: the profile that is none
UNCONFINED = "unconfined"


def require_known(process: Process | None, mount_label: str = "", *, name: str = "process.") -> None:
    """Raise `UnsupportedError` for a label of a module that the host does not have; `name` is put before members."""
    profile = process.apparmor_profile if process else ""
    if profile not in ("", UNCONFINED) and not _has_apparmor():
        raise UnsupportedError(f"'{name}apparmorProfile' is '{profile[:64]}': AppArmor is not enabled on the host")
    label = process.selinux_label if process else ""
    for member, value in ((f"{name}selinuxLabel", label), ("linux.mountLabel", mount_label)):
        if value and not SELINUX.exists():
            raise UnsupportedError(f"'{member}' is '{value[:64]}': SELinux is not enabled on the host")


def _has_apparmor() -> bool:
    try:
        return APPARMOR.read_text().startswith("Y")
    except OSError:
        return False
