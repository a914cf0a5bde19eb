"""Verbs that need no pod: ``python -m vmsandbox.admin [--root DIR] [--data-root DIR] [--config FILE] VERB ...``."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from vmsandbox.errors import InvalidArgumentError, SandboxError, evidence, one_line, refused
from vmsandbox.paths import Roots

#: verb -> module with ``main(argv, roots) -> int``
VERBS = {
    "check": "vmsandbox.admin.check",
    "gc": "vmsandbox.admin.gc",
    "guest": "vmsandbox.admin.guest",
    "image": "vmsandbox.admin.image",
    "plan": "vmsandbox.admin.plan",
    "template": "vmsandbox.admin.template",
}


#: the code of `run` for an error of ours, which `run --dry-run` is
PLAN_FAILED = 125


def main() -> int:
    """Take the global options off, run the verb, report its error in one line."""
    words = sys.argv[1:]
    taken: dict[str, str] = {}
    debug = False
    while words and words[0].startswith("--"):
        word = words.pop(0)
        if word == "--debug":
            debug = True
        elif word in ("--root", "--data-root", "--config") and words:
            taken[word] = words.pop(0)
        else:
            print(f"vmsandbox: unknown option '{word}'", file=sys.stderr)
            return 1
    try:
        if not words or words[0] not in VERBS:
            raise InvalidArgumentError(f"unknown verb: one of {', '.join(VERBS)}")
        if "--config" in taken:
            os.environ["VMSANDBOX_CONFIG"] = os.path.abspath(taken["--config"])
        roots = Roots.chosen(taken.get("--root"), taken.get("--data-root"))
        status: int = import_module(VERBS[words[0]]).main(words[1:], roots)
        sys.stdout.flush()
        return status
    except SandboxError as error:
        report(error, debug=debug)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Nothing more is written where it cannot be: also what is in a buffer, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            report(refused(error, wanted=words[0]), debug=debug)
    return PLAN_FAILED if words[:1] == ["plan"] else 1


def report(error: SandboxError, *, debug: bool) -> None:
    print(f"vmsandbox: {one_line(error)}", file=sys.stderr)
    if debug and error.detail:
        print(evidence(error), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
