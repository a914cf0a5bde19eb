"""OCI bundles and the other documents that engines hand over: found, bounded, checked.

A bundle comes from another program and may be anything: every defect is an InvalidBundleError that names the member or
the file, and nothing has been changed when it is raised.  The document is kept as it was read as well: what goes to
the guest is made from that, so that members nobody here knows survive.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidBundleError
from vmsandbox.oci.document import checked
from vmsandbox.oci.linux import Resources
from vmsandbox.oci.spec import Process, Spec, User

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = "config.json"
#: no honest document is larger
MOST_BYTES = 16 * 1024 * 1024
#: of a machine, or its domain
LONGEST_NAME = 64


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A directory with a checked config.json."""

    directory: Path
    spec: Spec
    #: config.json as it was read
    document: Mapping[str, Any]

    @property
    def rootfs(self) -> Path:
        """The root file system's absolute path."""
        return Path(os.path.normpath(self.directory / self.spec.root.path))


def prepare() -> None:
    """Build now what checks documents; else the first one of each kind waits for it, some 50 ms."""
    for model in (Spec, Process, Resources):
        model.model_rebuild()


def load(directory: str | os.PathLike[str]) -> Bundle:
    """Read and check the bundle in `directory`.

    Raises InvalidBundleError for a missing or malformed config.json, and for what the specification forbids and the
    document alone shows: no arguments, a host name without a namespace of its own.
    """
    path = Path(os.path.abspath(directory))
    if not path.is_dir():
        raise InvalidBundleError(f"bundle '{path}' is not a directory")
    text = read(path / CONFIG)
    spec = checked(Spec, text, name=f"'{path / CONFIG}'")
    check(spec, name=f"'{path / CONFIG}'")
    bundle = Bundle(directory=path, spec=spec, document=json.loads(text))
    if not bundle.rootfs.is_dir():
        raise InvalidBundleError(f"'{path / CONFIG}' is not valid: root.path '{bundle.rootfs}' is not a directory")
    return bundle


def check(spec: Spec, *, name: str = CONFIG) -> None:
    """What a document must fulfil beyond the types of its members.  Raises InvalidBundleError."""
    complaints = []
    if spec.process is not None and not spec.process.args:
        complaints.append("'process.args' is empty: there is no program to run")
    if spec.linux.namespace("mount") is None:
        complaints.append("'linux.namespaces' has no mount namespace: a container cannot share the machine's")
    for member, value in (("hostname", spec.hostname), ("domainname", spec.domainname)):
        if value and spec.linux.namespace("uts") is None:
            complaints.append(f"'{member}' is set but 'linux.namespaces' has no uts namespace")
        if len(value.encode(errors="surrogateescape")) > LONGEST_NAME:
            complaints.append(f"'{member}' is longer than {LONGEST_NAME} bytes, which is the most that a kernel takes")
    complaints += _namespace_complaints(spec)
    complaints += _id_complaints(spec)
    if complaints:
        raise InvalidBundleError(f"{name} is not valid: {'; '.join(complaints[:3])}")


def _namespace_complaints(spec: Spec) -> list[str]:
    """Settings of namespaces that the container does not get, and namespaces without what they need."""
    linux = spec.linux
    user, complaints = linux.namespace("user"), []
    for name, mappings in (("uidMappings", linux.uid_mappings), ("gidMappings", linux.gid_mappings)):
        if mappings and user is None:
            complaints.append(f"'linux.{name}' is set but 'linux.namespaces' has no user namespace")
        if user is not None and not user.path and not mappings:
            complaints.append(f"'linux.namespaces' has a user namespace but 'linux.{name}' is empty")
    if linux.time_offsets and linux.namespace("time") is None:
        complaints.append("'linux.timeOffsets' is set but 'linux.namespaces' has no time namespace")
    return complaints


def _id_complaints(spec: Spec) -> list[str]:
    """Ids of the process that its user namespace does not have, and mappings that the kernel does not take."""
    user = spec.process.user if spec.process is not None else User()
    complaints = []
    for name, mappings, ids in (
        ("uidMappings", spec.linux.uid_mappings, {"uid": (user.uid,)}),
        ("gidMappings", spec.linux.gid_mappings, {"gid": (user.gid,), "additionalGids": user.additional_gids}),
    ):
        if not mappings:
            continue
        for side in ("container_id", "host_id"):
            starts = sorted((getattr(each, side), each.size) for each in mappings)
            if any(start + size > following for (start, size), (following, _) in itertools.pairwise(starts)):
                complaints.append(f"'linux.{name}' has ranges that overlap")
        inside = [range(each.container_id, each.container_id + each.size) for each in mappings]
        if not any(0 in each for each in inside):
            complaints.append(f"'linux.{name}' has no id 0 of the container, which it is made by")
        for member, wanted in ids.items():
            missing = [one for one in wanted if not any(one in each for each in inside)]
            complaints += [
                f"'process.user.{member}' is {one}, which 'linux.{name}' does not have" for one in missing[:1]
            ]
    return complaints


def load_process(path: str | os.PathLike[str]) -> tuple[Process, dict[str, Any]]:
    """The document of an exec, checked and as read.  Raises InvalidBundleError."""
    text = read(Path(path))
    process = checked(Process, text, name=f"'{path}'")
    if not process.args:
        raise InvalidBundleError(f"'{path}' is not valid: 'args' is empty: there is no program to run")
    return process, json.loads(text)


def parse_resources(text: bytes, *, name: str = "resources") -> tuple[Resources, dict[str, Any]]:
    """The document of an update, checked and as read.  Raises InvalidBundleError."""
    bounded(text, name=name)
    return checked(Resources, text, name=name), json.loads(text)


def read(path: Path) -> bytes:
    """A regular file's content, up to `MOST_BYTES`.  Raises InvalidBundleError naming it."""
    try:
        # A FIFO must not make the caller wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InvalidBundleError(f"'{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidBundleError(f"cannot read '{path}': {reason.lower()}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidBundleError(f"'{path}' is not a regular file")
    with open(descriptor, "rb") as file:
        return bounded(file.read(MOST_BYTES + 1), name=f"'{path}'")


def bounded(text: bytes, *, name: str) -> bytes:
    """`text` itself, unless it is too long to be honest or not UTF-8."""
    if len(text) > MOST_BYTES:
        raise InvalidBundleError(f"{name} is larger than {MOST_BYTES} bytes")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise InvalidBundleError(f"{name} is not UTF-8 at byte {error.start}") from error
    return text
