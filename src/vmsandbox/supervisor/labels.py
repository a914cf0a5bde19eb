"""Labels of the host's security modules, which a container's programs cannot bear: its virtual machine does for them.

A profile of AppArmor or a context of SELinux confines programs on the kernel that they run on.  Of a container, what
runs on the host's is its machine, so the label of the container that a pod is made for is QEMU's, and a context also
virtiofsd's, which touches the files.  They are given when the programs are executed and stay; the labels of containers
that join the pod are checked and complained of if they are others.  A module that the host does not have, or a
label that it does not know, is an error, as with runc.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidBundleError, UnavailableError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmsandbox.oci.spec import Process
    from vmsandbox.supervisor.sandbox import SandboxSpec
    from vmsandbox_hypervisor.api import SecurityLabels

#: says "Y" where AppArmor is in force; its profiles, as "NAME (MODE)"
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
#: is there where SELinux is; takes contexts that the policy knows
SELINUX = Path("/sys/fs/selinux/enforce")
CONTEXT = Path("/sys/fs/selinux/context")
#: the profile that is none
UNCONFINED = "unconfined"
#: how messages show a label
_SHOWN = 64


def profile(name: str) -> str:
    """The profile to be executed under, "" for none."""
    return "" if name == UNCONFINED else name


def require_known(process: Process | None, mount_label: str = "", *, name: str = "process.") -> None:
    """Raise a `SandboxError` for a label that the host cannot apply; `name` is put before members."""
    asked = profile(process.apparmor_profile) if process else ""
    if asked:
        _require_profile(asked, said=f"'{name}apparmorProfile' is '{asked[:_SHOWN]}'")
    label = process.selinux_label if process else ""
    for member, value in ((f"{name}selinuxLabel", label), ("linux.mountLabel", mount_label)):
        if value:
            _require_context(value, said=f"'{member}' is '{value[:_SHOWN]}'")


def _require_profile(asked: str, *, said: str) -> None:
    try:
        there = APPARMOR.read_text().startswith("Y")
    except OSError:
        there = False
    if not there:
        raise UnsupportedError(f"{said}: AppArmor is not enabled on the host")
    try:
        loaded = {line.rpartition(" (")[0] for line in PROFILES.read_text(errors="replace").splitlines()}
    except OSError as error:
        raise UnsupportedError(f"{said}: cannot read '{PROFILES}': {error.strerror}: mount securityfs") from error
    # Of a stack, or of another namespace's profiles, the kernel alone can tell.
    if asked not in loaded and "//&" not in asked and not asked.startswith(":"):
        raise InvalidBundleError(f"{said}: no such profile is loaded: load it with apparmor_parser, or name another")


def _require_context(label: str, *, said: str) -> None:
    if not SELINUX.exists():
        raise UnsupportedError(f"{said}: SELinux is not enabled on the host")
    try:
        with CONTEXT.open("wb", buffering=0) as file:
            file.write(label.encode())
    except OSError as error:
        raise InvalidBundleError(f"{said}: the host's policy does not know it: {error.strerror}") from error


def complaints(process: object, spec: SandboxSpec) -> list[str]:
    """What is not applied of a process in this pod, since the machine runs under other labels."""
    if not isinstance(process, dict):
        return []
    return [
        f"'process.{member}' is '{asked[:_SHOWN]}', which is not applied: the pod's virtual machine runs under "
        f"{_shown(actual)}"
        for member, asked, actual in _compared(process, spec)
        if asked and asked != actual
    ]


def _compared(process: Mapping[str, object], spec: SandboxSpec) -> list[tuple[str, str, str]]:
    asked = profile(str(process.get("apparmorProfile") or "")), str(process.get("selinuxLabel") or "")
    return [("apparmorProfile", asked[0], spec.apparmor), ("selinuxLabel", asked[1], spec.selinux)]


def _shown(label: str) -> str:
    return f"'{label[:_SHOWN]}'" if label else "none"


@contextmanager
def blamed(labels: SecurityLabels) -> Iterator[None]:
    """Name the labels in the error of a machine that was to be executed under some and did not come up."""
    try:
        yield
    except UnavailableError as error:
        named = {"process.apparmorProfile": labels.apparmor, "process.selinuxLabel": labels.selinux}
        said = " and ".join(f"'{member}' '{label[:_SHOWN]}'" for member, label in named.items() if label)
        if not said:
            raise
        message = f"{error}: QEMU was to run under {said}: if that does not let it, name another"
        raise UnavailableError(message, detail=error.detail) from error
