"""Finding, merging and validating the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.config.load import files, line_of, load, shipped_file
from vmsandbox.config.model import SECTIONS, SandboxSettings, Settings
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError
from vmsandbox.paths import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    (tmp_path / "run").mkdir()
    return Roots(tmp_path / "run", tmp_path / "data")


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    (directory / "conf.d").mkdir(parents=True)
    return directory


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_shipped_file_has_every_setting_with_the_models_default() -> None:
    shipped = tomllib.loads(shipped_file().read_text())
    assert shipped == asdict(Settings())
    for section, cls in SECTIONS.items():
        assert list(shipped[section]) == [field.name for field in fields(cls)], "same order as the model"


def test_every_setting_in_the_shipped_file_is_preceded_by_a_comment() -> None:
    lines = shipped_file().read_text().splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            before = lines[number - 1]
            assert before.startswith("#") or line.startswith("uid_count"), f"line {number + 1} has no comment"


def test_the_model_lists_its_own_sections() -> None:
    assert list(SECTIONS) == [field.name for field in fields(Settings)]


def test_without_any_file_the_defaults_hold(roots: Roots, etc: Path) -> None:
    assert load(roots, etc=etc) == Settings()


def test_settings_cannot_be_changed_afterwards(roots: Roots, etc: Path) -> None:
    with pytest.raises(FrozenInstanceError):
        load(roots, etc=etc).sandbox.base_cpus = 5  # type: ignore[misc]


def test_later_sources_replace_single_settings(roots: Roots, etc: Path) -> None:
    written(etc / "config.toml", "[sandbox]\nbase_cpus = 2\ngrace_seconds = 3\n[log]\nlevel = 'debug'\n")
    written(etc / "conf.d" / "20-b.toml", "[sandbox]\nbase_cpus = 4\n")
    written(etc / "conf.d" / "10-a.toml", "[sandbox]\nbase_cpus = 3\nmax_cpus = 8\n")
    settings = load(roots, etc=etc, overrides={"sandbox.max_cpus": "9"})
    assert settings.sandbox == SandboxSettings(base_cpus=4, max_cpus=9, grace_seconds=3.0)
    assert settings.log.level == "debug"


def test_a_given_file_takes_the_place_of_the_ones_in_etc(roots: Roots, etc: Path, tmp_path: Path) -> None:
    written(etc / "config.toml", "[sandbox]\nbase_cpus = 2\n")
    mine = written(tmp_path / "mine.toml", "[log]\nlevel = 'error'\n")
    settings = load(roots, config_file=str(mine), etc=etc)
    assert (settings.sandbox.base_cpus, settings.log.level) == (1, "error")
    assert files(str(mine), etc=etc) == [shipped_file(), mine]


def test_a_given_file_has_to_exist(roots: Roots, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"configuration file '.*/none.toml' does not exist"):
        load(roots, config_file=str(tmp_path / "none.toml"))


def test_a_directory_is_no_configuration_file(roots: Roots, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"cannot read configuration file '.*': is a directory"):
        load(roots, config_file=str(tmp_path))


def test_hidden_files_in_conf_d_are_left_alone(roots: Roots, etc: Path) -> None:
    written(etc / "conf.d" / ".half-written.toml", "not toml")
    assert load(roots, etc=etc) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# x\n[sandbox]\nbase_cpus = 2\nmax_cpuz = 3\n",
            "'FILE' line 4: unknown setting 'sandbox.max_cpuz': did you mean 'sandbox.max_cpus'?",
        ),
        (
            "[sandbox]\naccel = 'kvm'\n",
            "'FILE' line 2: unknown setting 'sandbox.accel': did you mean 'hypervisor.accel'?",
        ),
        ("\n[sandbx]\nx = 1\n", "'FILE' line 2: unknown section 'sandbx': did you mean 'sandbox'?"),
        (
            "accel = 'kvm'\n",
            "'FILE' line 1: unknown setting 'accel' outside of any section: did you mean 'hypervisor.accel'?",
        ),
        ("sandbox = 3\n", "'FILE' line 1: 'sandbox' is a section, not a setting"),
        (
            "[sandbox]\nmax_cpus = 33\n",
            "'FILE' line 2: 'sandbox.max_cpus' is '33' but has to be less than or equal to 32",
        ),
        (
            "sandbox.max_cpus = '3'\n",
            "'FILE' line 1: 'sandbox.max_cpus' is '3' but has to be a valid integer",
        ),
        (
            "[sandbox]\ngrace_seconds = true\n",
            "'FILE' line 2: 'sandbox.grace_seconds' is 'true' but has to be a valid number",
        ),
        (
            "[sandbox]\ngrace_seconds = nan\n",
            "'FILE' line 2: 'sandbox.grace_seconds' is 'nan' but has to be less than or equal to 86400",
        ),
        (
            "[hypervisor]\naccel = 'xen'\n",
            "'FILE' line 2: 'hypervisor.accel' is 'xen' but has to be 'auto', 'kvm' or 'tcg'",
        ),
        (
            "[hypervisor]\nbinary = 'qemu'\n",
            "'FILE' line 2: 'hypervisor.binary' is 'qemu' but has to be an absolute path",
        ),
        (
            "[guest]\nkernel = 'vmlinux'\n",
            "'FILE' line 2: 'guest.kernel' is 'vmlinux' but has to be 'packaged', 'tuned' or an absolute path",
        ),
        (
            "[container]\nseccomp = 1979-05-27\n",
            (
                "'FILE' line 2: 'container.seccomp' is '1979-05-27' but "
                "has to be 'default', 'unconfined' or an absolute path"
            ),
        ),
        (
            "[sandbox]\nbase_cpus = 3\nmax_cpus = 2\n",
            "section 'sandbox': base_cpus '3' is more than max_cpus '2'",
        ),
        (
            "[sandbox]\nmax_memory_mib = 100\n",
            "section 'sandbox': base_memory_mib '256' is more than max_memory_mib '100'",
        ),
        (
            "[log]\nlevel = 'debug'\n[log]\n",
            "configuration file 'FILE' is not TOML: cannot declare ('log',) twice (at line 3, column 5)",
        ),
        (
            "[log]\nlvl = 1\n[images]\n",
            (
                "'FILE' line 2: unknown setting 'log.lvl': did you mean 'log.level'?; "
                "'FILE' line 3: unknown section 'images': did you mean 'image'?"
            ),
        ),
    ],
)
def test_a_bad_setting_is_named_with_its_file_and_line(roots: Roots, etc: Path, text: str, message: str) -> None:
    path = written(etc / "config.toml", text)
    with pytest.raises(InvalidArgumentError) as caught:
        load(roots, etc=etc)
    assert str(caught.value) == message.replace("FILE", str(path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sandbox.max_cpus", "many", "'sandbox.max_cpus' is 'many' but has to be a valid integer"),
        ("sandbox.max_cpus", "[3]", "'sandbox.max_cpus' is '[3]' but has to be a valid integer"),
        ("hypervisor.confine", "1", "'hypervisor.confine' is '1' but has to be a valid boolean"),
        ("sandbox.maxcpus", "3", "unknown setting 'sandbox.maxcpus': did you mean 'sandbox.max_cpus'?"),
        ("accel", "kvm", "unknown setting 'accel' outside of any section: did you mean 'hypervisor.accel'?"),
        ("log", "debug", "'log' is a section, not a setting"),
    ],
)
def test_a_bad_override_is_named(roots: Roots, etc: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load(roots, etc=etc, overrides={name: text})
    assert str(caught.value) == f"override '{name}={text}': {message}"


def test_overrides_get_the_type_of_their_setting(roots: Roots, etc: Path) -> None:
    overrides = {
        "hypervisor.confine": "false",
        "hypervisor.boot_timeout": "7",
        "sandbox.grace_seconds": "0.5",
        "container.pids_limit": "0",
        "guest.image": "/1",
    }
    settings = load(roots, etc=etc, overrides=overrides)
    assert settings.hypervisor.confine is False
    assert settings.hypervisor.boot_timeout == 7.0
    assert settings.sandbox.grace_seconds == 0.5
    assert settings.container.pids_limit == 0
    assert settings.guest.image == "/1"


def test_a_file_that_is_not_utf_8_is_named(roots: Roots, etc: Path) -> None:
    (etc / "config.toml").write_bytes(b"# \xff\n")
    with pytest.raises(InvalidArgumentError, match=r"'.*config.toml' is not UTF-8 at byte 2"):
        load(roots, etc=etc)


def test_a_huge_file_is_refused(roots: Roots, etc: Path) -> None:
    (etc / "config.toml").write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(InvalidArgumentError, match="is larger than 1048576 bytes"):
        load(roots, etc=etc)


@pytest.mark.parametrize(
    ("text", "section", "key", "line"),
    [
        ("[a]\nb = 1", "a", "b", 2),
        ("a.b = 1", "a", "b", 1),
        ("[a]\nc = 1\n[d]\nb = 1", "a", "b", None),
        ("[ 'a' ]\n'b' = 1", "a", "b", 2),
        ("# b\n[a]\n#b = 2\nb=3", "a", "b", 4),
        ("x = 1\n[a]", "a", "", 2),
        ("a = {b = 1}", "a", "b", None),
    ],
)
def test_lines_of_settings_are_found(text: str, section: str, key: str, line: int | None) -> None:
    assert line_of(text, section, key) == line


def test_ceilings_follow_the_host_and_never_fall_below_the_base() -> None:
    host = len(os.sched_getaffinity(0))
    assert SandboxSettings().cpu_ceiling() == min(host, 32)
    assert SandboxSettings(max_cpus=1).cpu_ceiling() == 1
    assert SandboxSettings(base_cpus=32).cpu_ceiling() == 32
    assert SandboxSettings(max_memory_mib=256).memory_ceiling_mib() == 256
    assert SandboxSettings().memory_ceiling_mib() > 256


def test_the_second_load_of_the_same_sources_does_not_import_pydantic(roots: Roots, etc: Path) -> None:
    written(etc / "config.toml", "[log]\nlevel = 'debug'\n")
    program = (
        "import sys; from pathlib import Path\n"
        "from vmsandbox.config.load import load; from vmsandbox.paths import Roots\n"
        f"settings = load(Roots(Path({str(roots.run)!r}), Path('/none')), etc=Path({str(etc)!r}))\n"
        "print(settings.log.level, 'pydantic' in sys.modules)"
    )
    outputs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
    assert [output.stdout for output in outputs] == ["debug True\n", "debug False\n"], outputs[0].stderr


@given(
    st.dictionaries(st.text(), st.text(), max_size=3)
    | st.dictionaries(
        st.sampled_from([f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in fields(cls)]), st.text()
    )
)
def test_no_override_raises_anything_but_our_errors(overrides: dict[str, str]) -> None:
    try:
        load(Roots(Path("/nonexistent"), Path("/nonexistent")), etc=Path("/nonexistent"), overrides=overrides)
    except SandboxError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@given(st.text(alphabet="[]sandbox.=_max0123456789'\" \n#{}", max_size=60) | st.binary(max_size=60))
def test_no_file_raises_anything_but_our_errors(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        load(Roots(Path("/nonexistent"), Path("/nonexistent")), config_file=str(path))
    except SandboxError:
        return
