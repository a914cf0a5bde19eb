"""`vmsandbox run --dry-run`: what would be run, as JSON, and nothing is done."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from vmsandbox import records
from vmsandbox.config.load import load
from vmsandbox.resources.images.store import ImageStore
from vmsandbox.supervisor import composition
from vmsandbox.supervisor.bringup import vm_config_for
from vmsandbox.supervisor.sandbox import SandboxSpec, Surroundings
from vmsandbox.supervisor.storages import ROOTFS
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

if TYPE_CHECKING:
    from vmsandbox.paths import Roots


def main(argv: list[str], roots: Roots) -> int:
    """Print QEMU's command line and the container's spec for the request in `argv`."""
    request = json.loads(argv[0])
    settings = load(roots, config_file=os.environ.get("VMSANDBOX_CONFIG"))
    options = composition.run_options(request)
    named = (request.get("sandbox") or {}).get("pod")
    if named:
        spec = SandboxSpec.of(records.load_pod(roots, records.resolve_pod(roots, named)).document)
    else:
        spec = composition.sandbox_spec(request, options, network=settings.network.default)
    options = composition.without_pods(options, spec)
    around = Surroundings(roots=roots, paths=roots.sandbox(spec.id), settings=settings, hypervisor=QemuHypervisor())
    image = ImageStore(roots).resolve(request["image"])
    shared = composition.share_plan(around, spec, options, container_id=request["id"])
    result = composition.compose_spec(
        around, image, options, container_id=request["id"], rootfs=f"{ROOTFS}/{request['id']}", shared=shared, pod=spec
    )
    plan = {
        "image": {"id": image.id, "path": str(image.erofs)},
        "qemu": list(around.hypervisor.argv(vm_config_for(around, spec))),
        "network": spec.network,
        "user": result.user,
        "spec": result.spec,
    }
    print(json.dumps(plan, indent=2))
    return 0
