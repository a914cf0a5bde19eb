"""A wrong command line is one clear line, with docker's exit code where docker has one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vmsandbox.arguments import Parser
from vmsandbox.errors import InvalidArgumentError


def test_an_unknown_option_is_named_with_the_nearest_one() -> None:
    parser = Parser(prog="vmsandbox logs")
    parser.add_argument("--tail")
    with pytest.raises(
        InvalidArgumentError, match=r"^logs: unknown option or argument '--tial' \(did you mean '--tail'\?\): see"
    ):
        parser.parse_args(["--tial"])


@pytest.mark.parametrize("word", ["--bogus", "--x", "-q"])
def test_an_option_that_is_like_none_is_not_guessed_at(word: str) -> None:
    parser = Parser(prog="vmsandbox run", allow_abbrev=False)
    for option in ("--user", "-u", "--rm", "--volume", "--sysctl"):
        parser.add_argument(option)
    with pytest.raises(InvalidArgumentError, match=rf"^run: unknown option or argument '{word}': see"):
        parser.parse_args([word])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run", "--no-such-option", "demo"], 125),
        (["exec"], 125),
        (["rm", "--no-such-option", "run"], 1),
        (["guest", "bogus"], 1),
        (["runn"], 1),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr(words: list[str], code: int) -> None:
    command = [sys.executable, "-c", "import sys; from vmsandbox.cli.main import main; sys.exit(main())", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("vmsandbox: ")
    assert done.stderr.count("\n") == 1
