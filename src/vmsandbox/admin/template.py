"""`vmsandbox template build|ls|inspect|rm`: the warmed machines that pods are cloned from."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from vmsandbox import documents, remains
from vmsandbox.arguments import Parser
from vmsandbox.config.load import load
from vmsandbox.errors import AmbiguousError, NotFoundError, SandboxError
from vmsandbox.supervisor import template
from vmsandbox.supervisor.bringup import vm_config_for
from vmsandbox.supervisor.sandbox import SandboxSpec, Surroundings
from vmsandbox_hypervisor.qemu.machine import QemuHypervisor

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from vmsandbox.paths import Roots


def main(argv: list[str], roots: Roots) -> int:
    """Make, list, show and remove templates."""
    parser = Parser(prog="vmsandbox template")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="make the template for the configuration in force, unless it exists")
    build.add_argument("--accel", choices=("auto", "kvm", "tcg"), default=None)
    build.add_argument("--pod", action="store_true", help="the one for pods that 'vmsandbox pod create' makes")
    build.add_argument("--force", action="store_true", help="make it again")
    build.add_argument("--quiet", action="store_true", help="in the background: low priority, nothing printed")
    listing = verbs.add_parser("ls", help="list templates")
    listing.add_argument("--format", choices=("table", "json"), default="table")
    inspecting = verbs.add_parser("inspect", help="show one as JSON")
    inspecting.add_argument("key")
    removing = verbs.add_parser("rm", help="remove templates; running clones keep what they have")
    removing.add_argument("keys", nargs="+", metavar="KEY")
    arguments = parser.parse_args(argv)
    if arguments.verb == "build":
        return make(roots, arguments)
    if arguments.verb == "rm":
        for key in arguments.keys:
            directory = find(roots, key)
            # Renamed first: what is half removed is never used.
            gone = directory.with_name(f"{template.STAGING}{directory.name}-removed")
            os.rename(directory, gone)
            remains.remove_tree(str(gone))
            print(directory.name)
        return 0
    if arguments.verb == "inspect":
        print(json.dumps(described(find(roots, arguments.key)), indent=2))
        return 0
    rows = [described(directory) for directory in directories(roots)]
    if arguments.format == "json":
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'KEY':<34}{'MEMORY':>10}{'ON DISK':>10}   MADE")
    for row in rows:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["made"]))
        print(f"{row['key']:<34}{row['size_mib']:>6} MiB{row['disk_mib']:>6} MiB   {made}")
    return 0


def make(roots: Roots, arguments: argparse.Namespace) -> int:
    """Build the template that pods of the configuration in force can use."""
    if arguments.quiet:
        os.nice(19)
    settings = load(roots, config_file=os.environ.get("VMSANDBOX_CONFIG"))
    spec = SandboxSpec(id="template", accel=arguments.accel, implicit=not arguments.pod)
    around = Surroundings(
        roots=roots,
        paths=roots.sandbox(spec.id),
        settings=settings,
        hypervisor=QemuHypervisor(accel_cache=roots.run / "accel"),
    )
    began = time.monotonic()
    key, made = asyncio.run(
        template.build(around, vm_config_for(around, spec), force=arguments.force, waiting=not arguments.quiet)
    )
    if not arguments.quiet:
        how = f"made in {time.monotonic() - began:.1f} s" if made else "is there already"
        print(f"template {key} {how}", file=sys.stderr)
    return 0


def directories(roots: Roots) -> list[Path]:
    try:
        names = sorted(os.listdir(roots.templates))
    except FileNotFoundError:
        return []
    return [roots.templates / name for name in names if not name.startswith(".")]


def find(roots: Roots, key: str) -> Path:
    """The template whose key is, or uniquely begins with, `key`."""
    fits = [directory for directory in directories(roots) if key and directory.name.startswith(key)]
    if not fits:
        raise NotFoundError(f"no template '{key}': 'vmsandbox template ls' shows what there is")
    if len(fits) > 1:
        raise AmbiguousError(
            f"template '{key}' is ambiguous: it fits {', '.join(fit.name for fit in fits)}; give more of it"
        )
    return fits[0]


def described(directory: Path) -> dict[str, Any]:
    """What is known of a template; a damaged one says so."""
    try:
        document = documents.read(str(directory / template.DOCUMENT))
    except SandboxError as error:
        return {"key": directory.name, "size_mib": 0, "disk_mib": 0, "made": 0, "error": str(error)}
    disk = sum(path.stat().st_blocks * 512 for path in directory.glob("*") if path.is_file())
    return {
        "key": directory.name,
        "size_mib": document["size_mib"],
        "disk_mib": disk >> 20,
        "made": int((directory / template.DOCUMENT).stat().st_mtime),
        "kernel": document.get("kernel", ""),
        "path": str(directory),
    }
