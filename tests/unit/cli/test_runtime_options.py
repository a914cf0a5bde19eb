"""Every option in runc's help, for every verb: taken in each spelling and place, honoured or refused by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vmsandbox.cli.runtime import limits, looking
from vmsandbox.cli.runtime import main as command
from vmsandbox.cli.runtime.options import FLAG, VALUE, HelpAsked, parse
from vmsandbox.errors import InvalidArgumentError, SandboxError

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-c", "import sys; from vmsandbox.cli.runtime.main import main; sys.exit(main())"]
#: what needs more than the word `1`
VALUES = {"format": "json", "interval": "1m30s", "cpuset-cpus": "0-1", "user": "1:2", "resources": "/nosuch"}
#: (verb, option) -> what is said of one that a virtual machine cannot honour
REFUSED = {
    ("create", "preserve-fds"): "open files cannot be passed",
    ("run", "preserve-fds"): "open files cannot be passed",
    ("exec", "preserve-fds"): "open files cannot be passed",
    ("exec", "apparmor"): "a profile of the host's kernel",
    ("exec", "process-label"): "a label of the host's kernel",
    ("exec", "cgroup"): "the container's cgroup is the guest's",
    ("update", "cpu-rt-period"): "the guest's kernel cannot apply it",
    ("update", "cpu-rt-runtime"): "the guest's kernel cannot apply it",
    ("update", "l3-cache-schema"): "the guest's kernel cannot apply it",
    ("update", "mem-bw-schema"): "the guest's kernel cannot apply it",
}
#: verbs of runc 1.1 about one container, and what they want behind its id
ABOUT = {
    "create": [],
    "start": [],
    "state": [],
    "kill": ["TERM"],
    "delete": [],
    "exec": ["true"],
    "run": [],
    "ps": [],
    "pause": [],
    "resume": [],
    "update": [],
    "events": [],
}
OPTION = re.compile(r"^   --([a-z0-9-]+)( value)?(?:, -([a-z]))?( value)?  ", re.MULTILINE)


def options_of(verb: str) -> list[tuple[str, str, bool]]:
    """What runc's own help says: names, letters, and whether a value follows; no options for verbs that have none."""
    said = subprocess.run(["runc", verb, "--help"], capture_output=True, text=True, check=True).stdout
    assert verb in said
    return [(name, letter, bool(first or second)) for name, first, letter, second in OPTION.findall(said)]


CASES = [(verb, *option) for verb in ABOUT for option in options_of(verb)]


def test_runcs_help_is_understood() -> None:
    assert ("create", "bundle", "b", True) in CASES
    assert ("kill", "all", "a", False) in CASES
    assert ("update", "cpuset-mems", "", True) in CASES
    assert len(CASES) > 50


def said_of(*words: str) -> str:
    """What is said of a command about a container that does not exist."""
    options, rest = command.parse(["--root", "/nosuch", *words])
    module = __import__(f"vmsandbox.cli.runtime.{command.VERBS[rest[0]][0]}", fromlist=[""])
    try:
        return f"exit {getattr(module, f'{rest[0]}_verb')(options, rest[1:])}"
    except SandboxError as error:
        return str(error)


def spellings(name: str, letter: str, value: str | None) -> list[list[str]]:
    names = [f"--{name}", f"-{name}", *([f"-{letter}", f"--{letter}"] if letter else [])]
    if value is None:
        return [[form] for form in (*names, *(f"{each}=true" for each in names), f"--{name}=T")]
    return [form for each in names for form in ([each, value], [f"{each}={value}"])]


@pytest.mark.parametrize(("verb", "name", "letter", "has_value"), CASES, ids=lambda each: str(each))
def test_an_option_of_runcs_is_honoured_or_refused_by_name(
    verb: str, name: str, letter: str, has_value: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no bundle
    known = "exit 0" if (verb, name) == ("delete", "force") else "container does not exist"
    if verb in ("create", "run"):
        known = "config.json' does not exist"
    expected = REFUSED.get((verb, name), known)
    for given in spellings(name, letter, VALUES.get(name, "1") if has_value else None):
        said = said_of(verb, *given, "nosuch", *ABOUT[verb])
        assert expected in said, given
        if (verb, name) in REFUSED:
            assert f"'--{name}" in said
        behind = [verb, "nosuch", *given] if verb == "exec" else [verb, "nosuch", *ABOUT[verb], *given]
        if verb == "ps" and not given[0].startswith("--format"):
            continue  # what follows the id is for ps(1)
        assert expected in said_of(*behind, *(ABOUT[verb] if verb == "exec" else [])), behind


@pytest.mark.parametrize("verb", [*ABOUT, "list", "spec", "features"])
def test_a_verb_explains_itself(verb: str) -> None:
    for words in ((verb, "--help"), (verb, "-h"), ("help", verb)):
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, env={})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: vmsandbox-runtime {verb} ")
        missing = [name for name, _, _ in options_of(verb) if name != "help" and f"   --{name}" not in done.stdout]
        assert missing == []


def test_what_is_behind_an_execs_program_is_the_programs() -> None:
    """Also where it is spelt like an option of ours."""
    for words in (["-p", "/x"], ["--process", "/x"], ["--help"], ["--", "-t"]):
        assert said_of("exec", "nosuch", "mkdir", *words) == "container does not exist"
    words = ["-t", "id", "-e", "A=1", "mkdir", "-p", "--", "x"]
    given = parse(words, {"tty": FLAG, "env": VALUE}, short={"t": "tty", "e": "env"}, stop_after=2)
    assert given.positional == ["id", "mkdir", "-p", "--", "x"]


@pytest.mark.parametrize("value", ["1", "t", "T", "true", "TRUE", "True"])
def test_flags_are_set_as_go_reads_them(value: str) -> None:
    assert parse([f"--all={value}"], {"all": FLAG}).flag("all")


@pytest.mark.parametrize("value", ["0", "f", "F", "false", "FALSE", "False"])
def test_flags_are_unset_as_go_reads_them(value: str) -> None:
    assert not parse([f"--all={value}"], {"all": FLAG}).flag("all")


@pytest.mark.parametrize(
    "words", [["kill", "--all=maybe", "x"], ["--debug=maybe", "list"], ["delete", "--force=", "x"]]
)
def test_a_flag_that_is_neither_is_refused(words: list[str]) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, env={})
    assert done.returncode == 1
    assert "invalid boolean value" in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5.0), ("1m30s", 90.0), (".5h", 1800.0), ("100ms", 0.1), ("+1s", 1.0), ("2us", 2e-6)]
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    assert looking._seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "0s", "-1s", "s", "1x", "1s1", "5 s", "1e3s", "\u0663s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="duration"):
        looking._seconds(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-1", -1),
        ("0", 0),
        ("1024", 1024),
        ("64m", 64 << 20),
        ("1.5g", 3 << 29),
        ("64MiB", 64 << 20),
        ("8 kB", 8192),
        ("7b", 7),
    ],
)
def test_memory_is_read_as_runc_reads_it(text: str, number: int) -> None:
    assert limits._number("memory", text) == number


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("memory", "x"),
        ("memory", "1.g"),
        ("memory", "-2"),
        ("memory", "1mm"),
        ("cpu-share", "1k"),
        ("pids-limit", "--1"),
    ],
)
def test_what_is_no_number_is_refused(option: str, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"invalid value for {option}"):
        limits._number(option, text)


def test_global_options_are_runcs() -> None:
    said = subprocess.run(["runc", "--help"], capture_output=True, text=True, check=True).stdout
    globals_ = OPTION.findall(said.partition("GLOBAL OPTIONS")[2])
    assert {"root", "criu", "systemd-cgroup", "rootless"} <= {name for name, *_ in globals_}
    for name, first, _, second in globals_:
        if name in ("help", "version"):
            continue
        value = {"log-format": "json", "rootless": "auto", "log": os.devnull}.get(name, "x")
        for given in [[f"--{name}", value], [f"-{name}={value}"]] if first or second else [[f"--{name}=false"]]:
            _, rest = command.parse([*given, "list"])
            assert rest == ["list"]


def test_a_verb_that_is_none_ends_as_with_runc() -> None:
    runc, ours = (
        subprocess.run([*argv, "nosuch"], capture_output=True, check=False).returncode for argv in (["runc"], COMMAND)
    )
    assert ours == runc


def test_help_names_letters_and_values() -> None:
    with pytest.raises(HelpAsked) as asked:
        parse(["x", "-h"], {"bundle": VALUE, "force": FLAG}, short={"b": "bundle"})
    assert asked.value.text.splitlines() == ["   --bundle, -b VALUE", "   --force"]
