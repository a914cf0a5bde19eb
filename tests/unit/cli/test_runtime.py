"""The runtime's command line, without a container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from vmsandbox import cgroups
from vmsandbox.cli.runtime import execution, known, lifecycle
from vmsandbox.cli.runtime.lifecycle import signal_number
from vmsandbox.cli.runtime.main import Options, report
from vmsandbox.cli.runtime.main import parse as parse_global
from vmsandbox.cli.runtime.options import FLAG, VALUE, VALUES, parse
from vmsandbox.errors import EndingError, InvalidArgumentError, InvalidBundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

CODE = "import sys; from vmsandbox.cli.runtime.main import main; sys.exit(main())"
KNOWN = {"force": FLAG, "bundle": VALUE, "env": VALUES}


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", CODE, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, env={}, cwd=cwd)


@pytest.mark.parametrize(
    "argv",
    [
        ["--force", "--bundle", "/b", "id"],
        ["id", "--bundle=/b", "--force"],
        ["-force", "id", "-b", "/b"],
        ["--bundle=/b", "id", "--force=true"],
    ],
)
def test_options_may_be_written_as_engines_write_them(argv: list[str]) -> None:
    given = parse(argv, KNOWN, short={"b": "bundle"})
    assert given.positional == ["id"]
    assert given.text("bundle") == "/b"
    assert given.flag("force")


def test_what_follows_the_command_is_its_own() -> None:
    given = parse(["-e", "A=1", "--env", "B=2", "id", "--", "sh", "--force"], KNOWN, short={"e": "env"}, stop_after=2)
    assert given.texts("env") == ["A=1", "B=2"]
    assert given.positional == ["id", "sh", "--force"]
    assert not given.flag("force")


@pytest.mark.parametrize("argv", [["--nosuch"], ["--bundle"], ["--force=perhaps"]])
def test_wrong_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(argv, KNOWN)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("--preserve-fds=3", "open files cannot be passed into a virtual machine"),
        ("--apparmor=x", "a profile of the host's kernel does not confine what runs on the guest's"),
        ("--process-label=x", "a label of the host's kernel does not confine what runs on the guest's"),
        ("--cgroup=/x", "the container's cgroup is the guest's"),
    ],
)
def test_an_exec_says_why_it_cannot_do_what_only_a_host_can(option: str, why: str) -> None:
    done = run("exec", option, "c1", "true")
    assert done.returncode == 255
    assert f"'{option.partition('=')[0]}' is not supported: {why}" in done.stderr


def test_capabilities_of_an_exec_are_not_inherited_by_what_others_execute() -> None:
    given = parse(["--cap", "CAP_BPF", "c1", "true"], execution.KNOWN, stop_after=2)
    sets = execution._process(given, {"capabilities": {"bounding": ["CAP_KILL"], "inheritable": []}})["capabilities"]
    assert {kind: names for kind, names in sets.items() if names} == {
        "bounding": ["CAP_KILL", "CAP_BPF"],
        "effective": ["CAP_BPF"],
        "permitted": ["CAP_BPF"],
    }


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a b", "a\n", "x" * 129, "-x"])
def test_ids_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        known.check_id(name)


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("sigkill", 9), ("9", 9), ("0", 0), ("RTMIN+3", 37), ("SIGRTMAX-1", 63), ("64", 64)],
)
def test_signals_are_known_by_name_and_number(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "65", "NOSUCH", "RTMIN+", "RTMIN+99", "-1", "1e1", "RTMAX+1"])
def test_a12_unknown_signals_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        signal_number(text)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_documents_that_are_none_give_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidBundleError, match=r"config\.json"):
        known.read_document(str(tmp_path / "config.json"), what="spec")


def test_a_fifo_is_no_document(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InvalidBundleError, match="regular file"):
        known.read_document(str(tmp_path / "config.json"), what="spec")


def test_the_version_has_the_lines_of_runc() -> None:
    lines = run("--version").stdout.splitlines()
    assert lines[0].startswith("vmsandbox-runtime version ")
    assert [line.split(":")[0] for line in lines[1:]] == ["commit", "spec"]


def test_errors_go_to_the_log_as_engines_read_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    root = f"/tmp/vs-{os.urandom(8).hex()}"
    done = run("--root", root, "--log", str(log), "--log-format", "json", "state", "nosuch")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "container does not exist\n")
    record = json.loads(log.read_text())
    assert (record["level"], record["msg"]) == ("error", "container does not exist")
    assert run("--root", root, "delete", "--force", "nosuch").returncode == 0
    assert run("--root", root, "exec", "nosuch", "true").returncode == 255
    assert run("--root", root, "list", "--format=json").stdout == "null\n"
    assert not os.path.exists(root)


@pytest.mark.parametrize("level", ["error", "warning"])
def test_what_is_not_in_a_log_is_on_stderr(level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options()
    report(options, "said", level=level)
    assert f"level={level} msg=" in capsys.readouterr().err
    options.log = str(tmp_path / "log")
    report(options, "said", level=level)
    assert capsys.readouterr().err == ("said\n" if level == "error" else "")
    assert f"level={level}" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("words", [("--systemd-cgroup", "state", "x"), ("checkpoint", "x"), ("restore", "x")])
def test_what_is_not_supported_is_refused(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 1
    assert "not supported" in done.stderr


def test_a_systemd_that_runs_is_no_reason_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "SYSTEMD", str(tmp_path))
    for words, asked in (("--systemd-cgroup", True), ("--systemd-cgroup=false", False)):
        options, rest = parse_global([words, "state", "x"])
        assert (options.systemd_cgroup, rest) == (asked, ["state", "x"])


def test_a_spec_is_written_once(tmp_path: Path) -> None:
    assert run("spec", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "config.json").read_text())["process"]["args"] == ["sh"]
    assert "exists" in run("spec", "--bundle", str(tmp_path)).stderr


def test_a_broken_bundle_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": 1')
    root = f"/tmp/vs-{os.urandom(8).hex()}"
    done = run("--root", root, "create", "--bundle", str(tmp_path), "x")
    assert done.returncode == 1
    assert "not valid JSON" in done.stderr
    assert os.listdir(tmp_path) == ["config.json"]
    assert not os.path.exists(root)


def test_the_client_imports_nothing_heavy() -> None:
    heavy = ("asyncio", "pydantic", "grpc", "subprocess", "argparse", "pathlib", "dataclasses", "ctypes")
    code = (
        "import sys; import vmsandbox.cli.runtime.creation, vmsandbox.cli.runtime.lifecycle, "
        "vmsandbox.cli.runtime.looking, vmsandbox.cli.runtime.main; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    argv = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "option", "answer"),
    [("vmsandbox-runtime", "--version", "vmsandbox-runtime version "), ("vmsandbox", "version", "vmsandbox ")],
)
def test_the_command_that_is_installed_is_ours(command: str, option: str, answer: str) -> None:
    script = Path(__file__).resolve().parents[3] / "bin" / command
    assert script.read_text().startswith("#!python\n")
    argv = [sys.executable, str(script), option]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, env={}, cwd="/").stdout
    assert said.startswith(answer)


def placed(root: Path, container_id: str, content: bytes) -> None:
    """A container whose document says this."""
    directory = root / "s/pod/containers"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{container_id}.json").write_bytes(content)
    (root / "c").mkdir(exist_ok=True)
    (root / "c" / container_id).symlink_to("../s/pod")


@pytest.fixture
def short_root() -> Iterator[Path]:
    """A root whose sockets would have short enough paths."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        yield Path(scratch)


def test_a_broken_container_is_told_of_and_spoils_no_other(short_root: Path) -> None:
    whole = {"version": 1, "kind": "bundle", "status": "stopped", "created": 1.0}
    whole |= {"oci_version": "1.2.0", "bundle": "/b", "rootfs": "/b/rootfs"}
    placed(short_root, "broken", b"{")
    placed(short_root, "partial", json.dumps({"version": 1, "kind": "bundle"}).encode())
    placed(short_root, "whole", json.dumps(whole).encode())
    done = run("--root", str(short_root), "list", "-q")
    assert (done.returncode, done.stdout) == (0, "whole\n")
    assert done.stderr.count("load container broken: ") == 2
    assert f"{short_root}/s/pod/containers/broken.json" in done.stderr
    assert "the document of 'partial' has no" in done.stderr
    done = run("--root", str(short_root), "delete", "--force", "broken")
    assert done.returncode == 1
    assert f"'vmsandbox gc' removes it, given '--root {short_root}'" in done.stderr


class Asked:
    """A container that ends while the answer to the first request about it is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, started: bool) -> None:
        self.id = "one"
        self.document: dict[str, object] = {}
        self.stopped = False
        self.requests = 0
        self._started = started
        monkeypatch.setattr(known, "find", lambda _roots, _id: self)
        monkeypatch.setattr("vmsandbox.cli.launch.connect_or_take_over", lambda _roots, _sandbox: nullcontext())
        monkeypatch.setattr("vmsandbox.cli.client.request", self._lost)
        self.sandbox = None

    def status(self) -> str:
        return "stopped" if self.stopped else "created"

    def _lost(self, _sock: object, _message: object) -> dict[str, object]:
        self.requests += 1
        self.stopped = True
        if self._started:
            self.document["started"] = 1.0
        raise EndingError("the pod's supervisor ended without an answer")

    def start(self) -> object:
        nowhere, container, reached = cast("Any", None), cast("Any", self), lifecycle._was_started
        return known.ask(nowhere, container, {"verb": "start"}, stopped="stopped", reached=reached)


def test_who_is_left_without_an_answer_looks_before_it_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, started=True)
    assert asked.start() == {}
    assert asked.requests == 1


def test_what_ended_before_it_was_started_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, started=False)
    with pytest.raises(known.StoppedError):
        asked.start()
    assert asked.requests == 1


def test_an_error_cannot_steer_the_terminal() -> None:
    done = run("\x1b[2J\u009b31m")
    assert done.returncode != 0
    assert r"unknown command '\\x1b[2J\\x9b31m'" in done.stderr  # quoted, as engines' log lines are
    assert done.stderr.rstrip("\n").isprintable()
