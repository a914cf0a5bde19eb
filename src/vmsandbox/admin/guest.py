"""`vmsandbox guest`: build the guest's kernel and image, and look at what has been built."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from vmsandbox.arguments import Parser
from vmsandbox.errors import InvalidStateError
from vmsandbox.guestbuild import store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from vmsandbox.paths import Roots

_KEY_SHOWN = 12
_VERSIONS_SHOWN = ("crun", "grpcio", "protobuf")


def main(argv: Sequence[str], roots: Roots) -> int:
    """Run one of build, ls, inspect and rm; answers the exit status, raises a `SandboxError`."""
    options = _parser().parse_args(list(argv))
    status: int = options.verb(options, roots)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vmsandbox guest", description="The kernel and image that pods boot")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    build = verbs.add_parser("build", help="build what is missing and use it from now on")
    _add_kernel(build)
    build.add_argument("--force", action="store_true", help="build everything anew")
    build.set_defaults(verb=_build)

    listing = verbs.add_parser("ls", help="list what has been built")
    listing.add_argument("--format", choices=("text", "json"), default="text")
    listing.add_argument("-q", "--quiet", action="store_true", help="print keys only")
    listing.set_defaults(verb=_list)

    inspect = verbs.add_parser("inspect", help="show the files, versions and command line of a guest")
    inspect.add_argument("key", nargs="?", metavar="KEY", help="the beginning of its key; else the one in use")
    _add_kernel(inspect)
    inspect.add_argument("--format", choices=("text", "json"), default="text")
    inspect.set_defaults(verb=_inspect)

    remove = verbs.add_parser("rm", help="remove guests")
    which = remove.add_mutually_exclusive_group(required=True)
    which.add_argument("keys", nargs="*", metavar="KEY", default=[], help="the beginning of its key")
    which.add_argument("--unused", action="store_true", help="all that are not in use, and all intermediate files")
    remove.add_argument("--force", action="store_true", help="also one that is in use")
    remove.set_defaults(verb=_remove)
    return parser


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        choices=store.FLAVOURS,
        default=store.FLAVOURS[0],
        help="'packaged': the distribution's (default); 'tuned': built from its source, boots faster",
    )


def _build(options: argparse.Namespace, roots: Roots) -> int:
    # Only this verb needs the builder.
    from vmsandbox.guestbuild.build import build

    entry = build(roots, options.kernel, force=options.force, stream=sys.stderr)
    print(f"guest {entry.key[:_KEY_SHOWN]} with kernel {entry.manifest['release']} is ready", file=sys.stderr)
    if options.kernel != store.FLAVOURS[0]:
        print(f"pods boot it where the configuration says '[guest] kernel = \"{options.kernel}\"'", file=sys.stderr)
    return 0


def _list(options: argparse.Namespace, roots: Roots) -> int:
    found = store.entries(roots)
    if options.format == "json":
        print(json.dumps([_described(entry) for entry in found], indent=2))
    elif options.quiet:
        print(*(entry.key for entry in found), sep="\n", end="\n" if found else "")
    else:
        row = "{:14}{:10}{:20}{:>9}  {:22}{}"
        print(row.format("KEY", "KERNEL", "RELEASE", "SIZE", "BUILT", "IN USE"))
        for entry in found:
            facts = _described(entry)
            size = sum(facts[role]["size"] for role in ("kernel", "initrd", "image") if facts[role]) / 2**20
            use = "yes" if entry.current_for else ""
            shown = (entry.key[:_KEY_SHOWN], facts["flavour"], facts["release"], f"{size:.0f} MiB", facts["built"], use)
            print(row.format(*shown).rstrip())
    return 0


def _inspect(options: argparse.Namespace, roots: Roots) -> int:
    if options.key:
        key = store.find(roots, options.key).name
        store.load(roots, key)
    else:
        key = store.current(roots, options.kernel).key
    entry = next(entry for entry in store.entries(roots) if entry.key == key)
    facts = _described(entry)
    if options.format == "json":
        print(json.dumps(facts, indent=2))
        return 0
    print(f"key      {facts['key']}")
    print(f"built    {facts['built']}")
    print(f"kernel   {facts['flavour']} {facts['release']}")
    for role in ("kernel", "initrd", "image"):
        if facts[role]:
            print(f"{role:8} {facts[role]['path']} ({facts[role]['size']} bytes)")
    print(f"cmdline  {' '.join(facts['cmdline'])}")
    versions = {name: version for found in facts["versions"].values() for name, version in found.items()}
    for name in _VERSIONS_SHOWN:
        if name in versions:
            print(f"{name:8} {versions[name]}")
    return 0


def _remove(options: argparse.Namespace, roots: Roots) -> int:
    with store.locked(roots):
        if options.unused:
            removed = store.remove_unused(roots)
        else:
            removed = [store.find(roots, key).name for key in options.keys]
            used = {entry.key for entry in store.entries(roots) if entry.current_for}
            for key in removed:
                if key in used and not options.force:
                    raise InvalidStateError(
                        f"guest '{key[:_KEY_SHOWN]}'",
                        state="the one that new pods boot",
                        wanted="remove",
                        remedy="use '--force', and 'vmsandbox guest build' makes it again",
                    )
            for key in dict.fromkeys(removed):
                store.remove(roots, key)
    print(*removed, sep="\n", end="\n" if removed else "")
    return 0


def _described(entry: store.Entry) -> dict[str, Any]:
    manifest = entry.manifest
    files: dict[str, Any] = {
        role: {
            "path": str(entry.directory / described["name"]),
            "size": described["size"],
            "sha256": described["sha256"],
        }
        for role, described in manifest["files"].items()
    }
    return {
        "key": entry.key,
        "flavour": manifest["flavour"],
        "release": manifest.get("release", ""),
        "current": bool(entry.current_for),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.directory.stat().st_mtime)),
        "kernel": files["kernel"],
        "initrd": files.get("initrd"),
        "image": files["image"],
        "cmdline": list(manifest["cmdline"]),
        "versions": manifest.get("versions", {}),
    }
