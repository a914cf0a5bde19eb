"""Every message that a user can cause is listed in messages.txt, is of one form, and says why and what next.

The listing is there to be read: a message that is new or changed shows in the change that makes it, and whoever reads
the change reads it as a user would.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import messages

if TYPE_CHECKING:
    from tests.harness.messages import Message

LISTING = Path(__file__).with_name("messages.txt")
REWRITE = ".venv/bin/python -m tests.harness.messages >tests/architecture/messages.txt"

#: runc's own words, which engines know
RUNC = "vmsandbox.cli.runtime."
#: a way out: something to do, or where to look
WAY_OUT = re.compile(
    r"'vmsandbox |'--|'scripts/|'apt-get |\b(add|allow|ask|choose|copy|correct|decrypt|end|free|give|import|install|"
    r"leave|load|lower|mend|move|name|publish|raise|reinstall|remove|restart|run|send|set|start|stop|try|use|wait|"
    r"write)\b"
)
#: whoever is told these has nothing but the message to go on from: it has to say how
DEMANDING = {"ExhaustedError", "AmbiguousError"}


@pytest.fixture(scope="module")
def found() -> list[Message]:
    return messages.Reader().read()


def test_every_message_is_listed() -> None:
    listed, there = LISTING.read_text().splitlines(), messages.listing().splitlines()
    difference = "\n".join(difflib.unified_diff(listed, there, "listed", "in the source", lineterm="", n=0))
    assert not difference, f"read them as a user would; then: {REWRITE}\n{difference}"


def test_messages_are_one_line_without_a_full_stop_and_begin_small(found: list[Message]) -> None:
    assert len(found) > 500  # the reader reads
    wrong = [each for each in found if not _formed(each.text)]
    assert not wrong


def _formed(text: str) -> bool:
    return (
        text == " ".join(text.split())
        and not text.endswith((".", "!", ":", ";", ","))
        and not re.match(r"[A-Z][a-z]", text)
        and text.count("(") == text.count(")")
    )


def test_what_cannot_be_done_says_why(found: list[Message]) -> None:
    refused = [each for each in found if each.text.startswith("cannot ") and not each.module.startswith(RUNC)]
    assert refused
    assert not [each for each in refused if not re.search(r": |, which |, but ", each.text)]


def test_what_has_run_out_or_fits_several_says_what_to_do(found: list[Message]) -> None:
    demanding = [each for each in found if each.error in DEMANDING]
    assert demanding
    assert not [each for each in demanding if not WAY_OUT.search(each.text)]
