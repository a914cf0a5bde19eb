"""The documents a supervisor writes, before it answers: one per pod and one per container.

`records` reads them; here is what is in them and how a running object becomes one.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox import documents
from vmsandbox_hypervisor.api import (
    Confinement,
    Cpus,
    Disk,
    Kernel,
    Memory,
    Nic,
    NinePShare,
    Port,
    PrivateMemory,
    SecurityLabels,
    VmConfig,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmsandbox.paths import Roots, SandboxPaths


def save_sandbox(paths: SandboxPaths, document: dict[str, Any]) -> None:
    documents.write(paths.document_file, document)


def save_container(paths: SandboxPaths, container_id: str, document: dict[str, Any]) -> None:
    documents.write(paths.container_file(container_id), document)


def link_container(roots: Roots, paths: SandboxPaths, container_id: str) -> None:
    """Make the container findable by its id."""
    os.symlink(os.path.relpath(paths.dir, roots.by_container_dir), f"{roots.by_container_dir}/{container_id}")


def link_pod(roots: Roots, paths: SandboxPaths, pod_id: str) -> None:
    """Make a pod findable by its id."""
    os.symlink(os.path.relpath(paths.dir, roots.by_pod_dir), f"{roots.by_pod_dir}/{pod_id}")


def vm_document(config: VmConfig, *, pid: int, start_time: int) -> dict[str, Any]:
    """What another supervisor needs to adopt the VM."""

    def plain(value: object) -> object:
        if isinstance(value, Path):
            return str(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    described = plain(config)
    assert isinstance(described, dict)
    # Descriptors mean nothing to another process; an adopted VM's memory is mapped already.
    for nic in described["nics"]:
        nic.update(tap_fd=-1, vhost_fd=None)
    # What it was forked from may be gone.
    del described["parent"]
    described["memory"]["backing"] = "private" if isinstance(config.memory.backing, PrivateMemory) else "shared"
    return {"pid": pid, "start_time": start_time, "config": described}


def vm_config(document: Mapping[str, Any]) -> VmConfig:
    """Rebuild the description of a VM that runs; the inverse of `vm_document` but for descriptors."""
    described = dict(document["config"])
    kernel = described.pop("kernel")
    memory = described.pop("memory")
    confinement = described.pop("confinement")
    labels = described.pop("labels", None) or {}
    private = memory.pop("backing") == "private"
    rebuilt: dict[str, Any] = {
        key: Path(value) if key in PATHS and value is not None else value
        for key, value in described.items()
        if key not in REBUILT
    }
    return VmConfig(
        kernel=Kernel(
            path=Path(kernel["path"]),
            initrd=Path(kernel["initrd"]) if kernel["initrd"] else None,
            cmdline=tuple(kernel["cmdline"]),
            emulated_cmdline=tuple(kernel.get("emulated_cmdline", ())),
        ),
        memory=Memory(**memory, backing=PrivateMemory(fd=-1)) if private else Memory(**memory),
        cpus=Cpus(**described["cpus"]),
        disks=tuple(
            Disk(id=disk["id"], path=Path(disk["path"]), read_only=disk["read_only"]) for disk in described["disks"]
        ),
        nics=tuple(Nic(**nic) for nic in described.get("nics", ())),
        ports=tuple(Port(**port) for port in described["ports"]),
        shares=tuple(NinePShare(**{**share, "path": Path(share["path"])}) for share in described["shares"]),
        confinement=Confinement(**{**confinement, "groups": tuple(confinement["groups"])}) if confinement else None,
        labels=SecurityLabels(**labels),
        **rebuilt,
    )


PATHS = {"directory", "binary", "virtiofsd", "restore"}
REBUILT = {"cpus", "disks", "nics", "ports", "shares"}
