"""What a user can cause is said in one line: what failed, why, and what to do next.

Every message that needs no virtual machine is here, caused through the command itself; the others are caused in
tests/e2e, where they arise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmsandbox import documents, records
from vmsandbox.cli import main as cli
from vmsandbox.cli import output
from vmsandbox.errors import SandboxError
from vmsandbox.paths import Roots

if TYPE_CHECKING:
    from collections.abc import Iterator

STOPPED, POD, BROKEN, NEWER = "aa" * 32, "bb" * 32, "cc" * 32, "dd" * 32


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roots]:
    """One stopped container `done`, one stopped pod `shop`, one damaged document and one of a newer version."""
    with tempfile.TemporaryDirectory(prefix="vs-") as directory:  # short enough for sockets
        yield filled(Roots(f"{directory}/run", f"{directory}/data"), monkeypatch)


def filled(made: Roots, monkeypatch: pytest.MonkeyPatch) -> Roots:
    for directory in (made.sandboxes_dir, made.by_container_dir, made.by_pod_dir, made.names_dir):
        os.makedirs(directory)
    for container_id in (STOPPED, BROKEN, NEWER, "aa11" * 16):
        sandbox = made.sandbox(container_id)
        os.makedirs(sandbox.containers_dir, exist_ok=True)
        document = {"id": container_id, "name": "done" if container_id == STOPPED else "", "status": "stopped"}
        documents.write(sandbox.container_file(container_id), document)
        os.symlink(f"../s/{container_id[:12]}", f"{made.by_container_dir}/{container_id}")
    Path(made.sandbox(BROKEN).container_file(BROKEN)).write_text("{")
    Path(made.sandbox(NEWER).container_file(NEWER)).write_text('{"version": 9}')
    records.reserve_name(made, "done", STOPPED)
    pod = made.sandbox(POD)
    os.makedirs(pod.containers_dir)
    documents.write(pod.document_file, {"id": POD, "name": "shop", "implicit": False, "status": "stopped"})
    os.symlink(f"../s/{POD[:12]}", f"{made.by_pod_dir}/{POD}")
    records.reserve_name(made, "shop", POD)
    monkeypatch.setenv("VMSANDBOX_ROOT", made.run_dir)
    monkeypatch.setenv("VMSANDBOX_DATA_ROOT", made.data_dir)
    return made


def said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["vmsandbox", *words])
    code = cli.main()
    return code, capsys.readouterr().err


def test_a_name_that_would_steer_the_terminal_is_escaped(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = said(["stop", "\x1b[2J\u009b31m\udcff"], monkeypatch, capsys)
    assert code == 1
    assert r"no such container: '\x1b[2J\x9b31m\udcff'" in message


def test_evidence_of_several_lines_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.report(SandboxError("it failed", detail="one\ttwo\n\x1b[2Jthree\n"), debug=True)
    assert capsys.readouterr().err == "vmsandbox: it failed\none     two\n\\x1b[2Jthree\n"


#: words -> exit code, and what has to be in the message, in this order
TABLE: list[tuple[list[str], int, list[str]]] = [
    # the command line
    (["rnu"], 1, ["unknown verb 'rnu'", "'vmsandbox --help'", "did you mean 'run'?"]),
    (["--rot", "/x", "ps"], 1, ["unknown option '--rot'", "'vmsandbox --help'"]),
    (["--root"], 1, ["option '--root' needs a value"]),
    (["ps", "--al"], 1, ["unknown argument '--al'", "'vmsandbox ps --help'"]),
    (["ps", "--format", "xml"], 1, ["unknown format 'xml'", "'table' or 'json'"]),
    (["run", "--nmae", "x", "box"], 125, ["'--nmae'", "did you mean '--name'?", "'vmsandbox run --help'"]),
    (["--root", "/" + "x" * 90, "ps"], 1, ["bytes too long for unix sockets", "choose a shorter --root"]),
    # names and ids
    (["run", "--name", "a b", "box"], 125, ["invalid name 'a b'", "letters, digits", "at most 128"]),
    (["run", "--name", "done", "box"], 125, ["the name 'done' is in use by 'aaaaaaaaaaaa'", "choose another name"]),
    (["pod", "create", "--name", "done"], 1, ["the name 'done' is in use by 'aaaaaaaaaaaa'", "choose another"]),
    (["run", "--name", "shop", "box"], 125, ["the name 'shop' is in use by 'bbbbbbbbbbbb'"]),
    (["stop", "nothing"], 1, ["no such container: 'nothing'", "'vmsandbox ps -a' lists them"]),
    (["start", "nothing"], 1, ["no such container: 'nothing'", "'vmsandbox ps -a' lists them"]),
    (["restart", "nothing"], 1, ["no such container: 'nothing'", "'vmsandbox ps -a' lists them"]),
    (["rm", "../x"], 1, ["no such container: '../x'"]),
    (["stop", "shop"], 1, ["no such container: 'shop'"]),
    (["stop", "aa"], 1, ["'aa' is ambiguous: it fits aa11aa11aa11aa11, aaaaaaaaaaaaaaaa", "give more of the id"]),
    (["pod", "stop", "nothing"], 1, ["no such pod: 'nothing'", "'vmsandbox pod ls' lists them"]),
    (["run", "--pod", "nothing", "box"], 125, ["no such pod: 'nothing'", "'vmsandbox pod ls' lists them"]),
    (["pod", "rm", "done"], 1, ["no such pod: 'done'"]),
    # states
    (["kill", "done"], 1, ["cannot kill container 'done'", "it is stopped"]),
    (
        ["exec", "done", "true"],
        125,
        ["cannot exec in container 'done'", "it is stopped: 'vmsandbox start' starts it again"],
    ),
    (["pause", "done"], 1, ["cannot pause container 'done'", "it is stopped: 'vmsandbox start' starts it again"]),
    (["unpause", "done"], 1, ["cannot unpause container 'done'", "it is stopped"]),
    (
        ["top", "done"],
        1,
        ["cannot list the processes of container 'done'", "it is stopped: 'vmsandbox start' starts it again"],
    ),
    (["stats", "--no-stream", "done"], 1, ["container 'done'", "it is stopped: 'vmsandbox start' starts it again"]),
    (["update", "--cpus", "1", "done"], 1, ["cannot update container 'done'", "it is stopped"]),
    # values that a client judges itself
    (["update", "done"], 1, ["nothing to update", "give a limit, as '--memory 512m'"]),
    (["run", "--scratch-size", "10", "box"], 125, ["invalid size '10'", "as 10g"]),
    (["run", "--cpus", "many", "box"], 125, ["'many'", "'vmsandbox run --help'"]),
    (["run", "--env-file", "/no/such", "box"], 125, ["cannot read environment file '/no/such': No such file"]),
    (["run"], 125, ["the following arguments are required: IMAGE: see"]),
    (["run", "--pod", "shop", "-p", "80:80", "box"], 125, ["option '-p' belongs to the pod", "'vmsandbox pod create'"]),
    (["run", "--pod", "shop", "--ip", "10.0.0.9", "box"], 125, ["option '--ip' belongs to the pod"]),
    # options of verbs
    (["logs", "--tail", "x", "done"], 1, ["'x' is neither a number of lines nor 'all'", "'vmsandbox logs --help'"]),
    (["logs", "--since", "yesterday", "done"], 1, ["invalid time 'yesterday'", "write for example '10m'"]),
    (["top", "done", "-q"], 1, ["'-q' of ps(1) is not supported", "'-ef', 'aux' and '-o COLUMNS' are"]),
    (["top", "done", "-o", "pid,x"], 1, ["column 'x' of ps(1) is not known", "choose of user"]),
    (["top", "done"], 1, ["container 'done'", "it is stopped"]),
    (["stats", "done"], 1, ["container 'done'", "it is stopped"]),
    (
        ["cp", "done:/x", "."],
        1,
        ["cannot copy files of container 'done'", "it is stopped: 'vmsandbox start' starts it again"],
    ),
    (["cp", "x", "y"], 1, ["exactly one of source and destination has to be CONTAINER:PATH"]),
    # documents
    (["inspect", BROKEN], 1, [f"{BROKEN}.json' is damaged", "'vmsandbox gc' removes it"]),
    (["stop", BROKEN], 1, [f"{BROKEN}.json' is damaged", "'vmsandbox gc' removes it"]),
    (["rm", NEWER], 1, ["was written by a newer vmsandbox", "version 9, known 1", "use that one"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), TABLE, ids=[" ".join(words)[:60] for words, _, _ in TABLE])
def test_a_message_says_what_why_and_what_next_in_one_line(
    roots: Roots,
    words: list[str],
    code: int,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    got, text = said(words, monkeypatch, capsys)
    assert got == code, text
    assert re.fullmatch(r"vmsandbox: [^\n]+[^.\n]\n", text), text
    place = 0
    for part in parts:
        assert part in text[place:], text
        place = text.index(part, place)
    assert "Traceback" not in text


def test_b8_ps_names_damaged_documents_and_lists_the_others(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unreadable, foreign = Path(roots.sandbox(NEWER).container_file("ab" * 32)), "cd" * 32
    unreadable.mkdir()  # not even root can read it
    Path(roots.sandbox(NEWER).container_file(foreign)).write_text('{"version": 1, "created": "soon", "args": 7}')
    for container_id in ("ab" * 32, foreign):
        os.symlink(f"../s/{NEWER[:12]}", f"{roots.by_container_dir}/{container_id}")
    monkeypatch.setattr("sys.argv", ["vmsandbox", "ps", "-a"])
    assert cli.main() == 0
    out, err = capsys.readouterr()
    assert "done" in out
    assert f"cannot read '{unreadable}'" in err
    assert f"{foreign}.json' is damaged: 'created' is of the wrong type" in err
    assert f"{BROKEN}.json' is damaged" in err
    assert f"{NEWER}.json' was written by a newer vmsandbox" in err


def test_what_a_failed_verb_reserved_is_free_again(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(["run", "--pod", "nothing", "--name", "mine", "box"], monkeypatch, capsys)[0] == 125
    records.reserve_name(roots, "mine", STOPPED)


def test_a_stopped_pod_is_removed_without_a_machine_with_its_containers(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = roots.sandbox(POD)
    for container_id, text in (("ee" * 32, '{"version": 1, "status": "stopped"}'), ("ff" * 32, "{")):
        Path(pod.container_file(container_id)).write_text(text)
        os.symlink(f"../s/{POD[:12]}", f"{roots.by_container_dir}/{container_id}")
        os.makedirs(f"{roots.container_data_dir}/{container_id}")
    assert said(["pod", "rm", "shop"], monkeypatch, capsys) == (0, "")
    assert (records.pod_ids(roots), os.listdir(roots.container_data_dir)) == ([], [])
    assert {"ee" * 32, "ff" * 32}.isdisjoint(records.container_ids(roots))
    assert sorted(os.listdir(roots.names_dir)) == ["done"]


@pytest.mark.parametrize("words", [["ps", "-a"], ["--help"], ["inspect", "done"]])
def test_what_cannot_be_written_is_one_line(roots: Roots, words: list[str]) -> None:
    code = "import sys; from vmsandbox.cli.main import main; sys.exit(main())"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *_, line, hint = done.stderr.splitlines()
    assert line == f"vmsandbox: cannot {words[0].lstrip('-')}: no space left on device"
    assert hint.startswith("vmsandbox: '--debug'")
    assert "Traceback" not in done.stderr


def test_closed_streams_stay_without_anything_of_ours(roots: Roots) -> None:
    code = (
        "import os; os.close(0); os.close(1); os.close(2); import sys; sys.stdin = sys.stdout = sys.stderr = None;"
        "from vmsandbox.cli.main import main; code = main();"
        "sys.exit(code or [os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)] != 3 * ['/dev/null'])"
    )
    assert subprocess.run([sys.executable, "-c", code, "ps", "-a"], close_fds=True).returncode == 0
