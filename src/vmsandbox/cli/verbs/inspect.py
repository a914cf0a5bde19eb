"""`vmsandbox inspect`: everything known about containers, as JSON."""

from __future__ import annotations

import json

from vmsandbox import documents, records
from vmsandbox.arguments import Parser
from vmsandbox.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    made = Parser(prog="vmsandbox inspect")
    made.add_argument("containers", nargs="+", metavar="CONTAINER")
    arguments = made.parse_args(argv)
    roots = options.roots()
    found = [describe(records.load(roots, records.resolve(roots, name))) for name in arguments.containers]
    print(json.dumps(found, indent=2))
    return 0


def describe(container: records.Container) -> dict[str, Any]:
    """The container's document with its status judged now, and its pod's beside it."""
    document = dict(container.document)
    document.pop("version", None)
    document["status"] = container.status()
    if document["status"] == "stopped" and "exit" not in document:
        document["reason"] = "its stand-in is gone"
    try:
        sandbox = documents.read(container.sandbox.document_file)
        sandbox.pop("version", None)
    except SandboxError as error:
        sandbox = {"error": str(error)}
    return {**document, "pod": sandbox, "run_directory": container.sandbox.dir}
