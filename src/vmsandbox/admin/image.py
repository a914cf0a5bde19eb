"""``vmsandbox image import|ls|rm|inspect``: results on stdout, one line for each step of an import on stderr."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from vmsandbox.arguments import Parser
from vmsandbox.config.load import load
from vmsandbox.errors import InvalidArgumentError, SandboxError, one_line, printable
from vmsandbox.resources.images.importer import Importer, Limits, RootfsOptions, megabytes
from vmsandbox.resources.images.store import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmsandbox.paths import Roots
    from vmsandbox.resources.images.document import Image

FAILED = 1
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def main(argv: list[str], roots: Roots) -> int:
    """Run one verb (``argv`` begins with it) and return the exit code; raises `SandboxError`."""
    arguments = _parser().parse_args(argv)
    try:
        with _terminable():
            code: int = arguments.run(roots, arguments)
            return code
    except _TerminatedError:
        return 128 + signal.SIGTERM
    except PermissionError as error:
        raise SandboxError(f"cannot use the images below '{roots.images}': {error.strerror}: run it as root") from error


def _import(roots: Roots, arguments: argparse.Namespace) -> int:
    store = ImageStore(roots)

    def progress(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    importer = Importer(store, _limits(roots, arguments), progress)
    image = importer.run(arguments.source, names=arguments.name, rootfs=_rootfs_options(arguments))
    progress(f"image {image.title} has {megabytes(image.size)}")
    print(json.dumps(_described(store, image)) if arguments.format == "json" else image.id)
    return 0


def _limits(roots: Roots, arguments: argparse.Namespace) -> Limits:
    configured = load(roots, config_file=os.environ.get("VMSANDBOX_CONFIG")).image
    return Limits(
        max_bytes=configured.max_size_mib << 20 if arguments.max_size is None else arguments.max_size,
        max_entries=configured.max_entries if arguments.max_entries is None else arguments.max_entries,
    )


def _rootfs_options(arguments: argparse.Namespace) -> RootfsOptions | None:
    given = (arguments.entrypoint, arguments.cmd, arguments.env, arguments.workdir, arguments.user)
    if not any(given):
        return None
    return RootfsOptions(
        entrypoint=_words(arguments.entrypoint, "--entrypoint"),
        cmd=_words(arguments.cmd, "--cmd"),
        env=arguments.env,
        workdir=arguments.workdir,
        user=arguments.user,
    )


def _words(text: str, option: str) -> list[str]:
    """A command as a JSON list or as words quoted for a shell."""
    try:
        words = json.loads(text) if text.startswith("[") else shlex.split(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{option} '{text}' is no list of words: {error}") from error
    if not all(isinstance(word, str) for word in words):
        raise InvalidArgumentError(f"{option} '{text}' is no list of strings")
    return list(words)


def _ls(roots: Roots, arguments: argparse.Namespace) -> int:
    store = ImageStore(roots)
    images, damaged = store.scan()
    for message in damaged:
        print(f"vmsandbox: {printable(message)}", file=sys.stderr)
    if arguments.format == "json":
        print(json.dumps([_described(store, image) for image in images], indent=1))
    elif arguments.quiet:
        for image in images:
            print(image.id)
    else:
        rows = [("NAME", "ID", "CREATED", "SIZE")]
        for image in images:
            for name in image.names or ("<none>",):
                rows.append((name, image.id[:12], image.created[:10], megabytes(image.size)))
        _print_table(rows)
    return 0


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rm(roots: Roots, arguments: argparse.Namespace) -> int:
    store = ImageStore(roots)
    code = 0
    for reference in arguments.image:
        try:
            names, image_id = store.remove(reference, force=arguments.force)
        except SandboxError as error:
            print(f"vmsandbox: {one_line(error)}", file=sys.stderr)
            code = FAILED
            continue
        for name in names:
            print(f"untagged: {name}")
        if image_id:
            print(f"deleted: {image_id}")
    return code


def _inspect(roots: Roots, arguments: argparse.Namespace) -> int:
    store = ImageStore(roots)
    print(json.dumps([_described(store, store.resolve(reference)) for reference in arguments.image], indent=1))
    return 0


def _described(store: ImageStore, image: Image) -> dict[str, Any]:
    return {
        "id": image.id,
        "names": list(image.names),
        "digest": image.digest,
        "architecture": image.architecture,
        "created": image.created,
        "size": image.size,
        "source": image.source,
        "erofs": str(image.erofs),
        "layers": list(image.layers),
        "config": image.config,
        "used_by": list(store.users(image.id)),
    }


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an interrupt does, so that an import cleans up."""

    def interrupt(*_: object) -> NoReturn:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _size(text: str) -> int:
    """``512m``, ``32g``: a number of bytes with a binary unit."""
    number = text.lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    digits = number.removesuffix(unit)
    if not digits.isdigit() or not digits.isascii():
        raise argparse.ArgumentTypeError(f"'{text}' is no size: write for example '512m' or '32g'")
    return int(digits) * _UNITS[unit]


def _count(text: str) -> int:
    if not text.isdigit() or not text.isascii():
        raise argparse.ArgumentTypeError(f"'{text}' is no number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vmsandbox image", description="manage the images containers are made of")
    verbs = parser.add_subparsers(required=True, metavar="import|ls|rm|inspect")

    add = verbs.add_parser(
        "import",
        help="make an image of an archive or a directory",
        description="Make an image of SOURCE and print its id. SOURCE is oci:DIR[:TAG], oci-archive:FILE[:TAG], "
        "docker-archive:FILE[:REF] or rootfs:DIR.",
    )
    add.add_argument("source", metavar="SOURCE")
    add.add_argument("--name", "-t", action="append", default=[], help="call it NAME[:TAG]; may be repeated")
    add.add_argument("--quiet", "-q", action="store_true", help="do not tell the steps")
    add.add_argument("--format", choices=("json",), help="print the whole image instead of its id")
    add.add_argument("--max-size", type=_size, metavar="SIZE", help="most it may unpack to, instead of the configured")
    add.add_argument("--max-entries", type=_count, metavar="N", help="most files, directories and links, likewise")
    config = add.add_argument_group("configuration of a rootfs:DIR")
    config.add_argument("--entrypoint", default="", metavar="WORDS", help="JSON list, or words quoted for a shell")
    config.add_argument("--cmd", default="", metavar="WORDS", help="likewise; the default arguments")
    config.add_argument("--env", "-e", action="append", default=[], metavar="NAME=VALUE")
    config.add_argument("--workdir", "-w", default="", metavar="DIR")
    config.add_argument("--user", "-u", default="", metavar="USER[:GROUP]")
    add.set_defaults(run=_import)

    ls = verbs.add_parser("ls", aliases=["list"], help="list images", description="List images, the youngest first.")
    ls.add_argument("--quiet", "-q", action="store_true", help="print ids only")
    ls.add_argument("--format", choices=("table", "json"), default="table")
    ls.set_defaults(run=_ls)

    rm = verbs.add_parser(
        "rm",
        help="remove images",
        description="Remove a name; an image goes with its last name, or by its id. Images that containers use stay.",
    )
    rm.add_argument("image", nargs="+", metavar="IMAGE")
    rm.add_argument("--force", "-f", action="store_true", help="take the name from an image that containers use")
    rm.set_defaults(run=_rm)

    inspect = verbs.add_parser("inspect", help="print everything about images, as JSON")
    inspect.add_argument("image", nargs="+", metavar="IMAGE")
    inspect.add_argument("--format", choices=("json",), default="json")
    inspect.set_defaults(run=_inspect)
    return parser
