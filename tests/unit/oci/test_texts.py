"""The little languages of options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsandbox.errors import InvalidArgumentError, SandboxError, UnsupportedError
from vmsandbox.oci import signals, texts
from vmsandbox.oci.texts import UNLIMITED, Tmpfs, Ulimit, Volume

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("64m", 64 * 2**20),
        ("64M", 64 * 2**20),
        ("2g", 2 * 2**30),
        ("1.5g", 3 * 2**29),
        ("512KiB", 512 * 2**10),
        ("1kb", 1024),
        ("7b", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert texts.size(text, "memory") == expected


@pytest.mark.parametrize("text", ["", "m", "-1m", "1x", "1e3", "99999999999999p", "1 2", "0x10", "\u0661m"])
def test_what_is_no_size_is_quoted(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        texts.size(text, "memory")
    assert f"memory '{text}' is not a size" in str(caught.value)


def test_ulimits() -> None:
    assert texts.ulimit("nofile=1024:2048") == Ulimit(type="RLIMIT_NOFILE", soft=1024, hard=2048)
    assert texts.ulimit("nproc=7") == Ulimit(type="RLIMIT_NPROC", soft=7, hard=7)
    assert texts.ulimit("core=0:-1") == Ulimit(type="RLIMIT_CORE", soft=0, hard=UNLIMITED)


@pytest.mark.parametrize("text", ["nofile", "nofile=", "files=3", "nofile=2:1", "nofile=-1:5", "nofile=1:2:3"])
def test_bad_ulimits_are_quoted(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"ulimit '{text}'"):
        texts.ulimit(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/src:/dst", Volume(source="/src", destination="/dst", create=True)),
        ("/src/:/dst/:ro", Volume(source="/src", destination="/dst", read_only=True, create=True)),
        ("./src:/dst:rw,rprivate", Volume(source="/here/src", destination="/dst", create=True)),
        ("..:/d", Volume(source="/", destination="/d", create=True)),
        ("/a:/b/../c", Volume(source="/a", destination="/c", create=True)),
    ],
)
def test_volumes(text: str, expected: Volume) -> None:
    assert texts.volume(text, cwd="/here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/src", "write SOURCE:DESTINATION"),
        (":/dst", "write SOURCE:DESTINATION"),
        ("/a:/b:ro:x", "write SOURCE:DESTINATION"),
        ("data:/dst", "named volumes do not exist here, write './data' for a directory"),
        ("/src:dst", "destination 'dst' of volume '/src:dst' has to be an absolute path"),
        ("/src:/", "cannot be the root directory"),
        ("/src:/x/..", "cannot be the root directory"),
        ("/src:/dst:ro,rw", "volume '/src:/dst:ro,rw' is both 'ro' and 'rw': give one of them"),
        ("/src:/dst:z", "volume '/src:/dst:z' has unknown option 'z'"),
    ],
)
def test_bad_volumes_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        texts.volume(text)
    assert message in str(caught.value)


def test_propagation_out_of_the_machine_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'rshared' mounts cannot cross into a virtual machine"):
        texts.volume("/a:/b:rshared")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("type=bind,source=/a,target=/b", Volume(source="/a", destination="/b")),
        ("type=bind,src=a,dst=/b,ro", Volume(source="/here/a", destination="/b", read_only=True)),
        ("src=/a,destination=/b,readonly=true", Volume(source="/a", destination="/b", read_only=True)),
        ("src=/a,dst=/b,readonly=false,bind-propagation=private", Volume(source="/a", destination="/b")),
        ("type=tmpfs,target=/b", Tmpfs(destination="/b")),
        (
            "type=tmpfs,dst=/b,tmpfs-size=1m,tmpfs-mode=700",
            Tmpfs(destination="/b", options=("size=1048576", "mode=700")),
        ),
        ("type=tmpfs,dst=/b,ro", Tmpfs(destination="/b", options=("ro",))),
    ],
)
def test_mounts(text: str, expected: object) -> None:
    assert texts.mount(text, cwd="/here") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type=volume,src=a,dst=/b", "is of type 'volume'"),
        ("type=bind,dst=/b", "has no source"),
        ("type=bind,src=/a", "has to be an absolute path"),
        ("src=/a,dst=/b,colour=red", "has unknown 'colour'"),
        ("src=/a,dst=/b,consistency", "has 'consistency' where KEY=VALUE is expected"),
        ("src=/a,source=/c,dst=/b", "gives 'source' twice"),
        ("src=/a,dst=/b,ro=maybe", "'readonly' is 'maybe'"),
        ("type=tmpfs,dst=/b,src=/a", "has unknown 'source'"),
        ("type=tmpfs,dst=/b,tmpfs-mode=9", "unknown option 'mode=9'"),
        ("", "has '' where KEY=VALUE is expected"),
    ],
)
def test_bad_mounts_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        texts.mount(text)
    assert message in str(caught.value)


def test_tmpfs_options_are_checked() -> None:
    assert texts.tmpfs("/run:size=10m,exec") == Tmpfs(destination="/run", options=("size=10m", "exec"))
    with pytest.raises(InvalidArgumentError, match="unknown option 'sise=10m'"):
        texts.tmpfs("/run:sise=10m")


@pytest.mark.parametrize("text", ["", "root", "1000", "app:staff", "1000:1000", "0:0", "user.name", "a:0"])
def test_users_that_are_understood(text: str) -> None:
    assert texts.user(text) == text


@pytest.mark.parametrize("text", [":", "a:", ":b", "a:b:c", "a b", "2147483648", "1:4294967295", "a\x00"])
def test_users_that_are_not(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="user '"):
        texts.user(text)


def test_d3_environment_of_the_image_is_overridden_by_key_and_values_may_hold_equals_signs() -> None:
    merged = texts.environment(
        ["PATH=/image", "A=1", "B=2"],
        ["A=x=y=z", "C=", "FROM", "B", "GONE"],
        client={"FROM": "client", "GONE2": "x"},
        base=["PATH=/base", "HOSTNAME=h"],
    )
    assert merged == ["PATH=/image", "HOSTNAME=h", "A=x=y=z", "C=", "FROM=client"]


@pytest.mark.parametrize("entry", ["", "=x", "A=\x00"])
def test_d3_a_bad_variable_is_named(entry: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        texts.environment((), [entry], client={})
    assert str(caught.value) == f"environment variable '{entry}' is not of the form KEY=VALUE"
    with pytest.raises(InvalidArgumentError, match="of the image is not of the form KEY=VALUE"):
        texts.environment([entry], (), client={})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("TERM", 15),
        ("SIGTERM", 15),
        ("sigkill", 9),
        ("15", 15),
        ("RTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("64", 64),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert signals.parse(text) == number


@pytest.mark.parametrize(
    "text", ["", "0", "65", "-1", "SIGNOPE", "SIG_DFL", "RTMIN+31", "RTMAX+1", "RTMIN-1", "1.5", "\u0661"]
)
def test_what_is_no_signal_is_quoted(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        signals.parse(text)
    assert str(caught.value).startswith(f"'{text}' is no signal")


WORDS = st.text(alphabet=st.sampled_from("/abz:=,.-+0129 \x00mgkrow"), max_size=30) | st.text(max_size=12)


@pytest.mark.parametrize(
    "parse",
    [
        texts.ulimit,
        texts.volume,
        texts.mount,
        texts.tmpfs,
        texts.user,
        signals.parse,
        lambda text: texts.size(text, "memory"),
        lambda text: texts.destination(text, "path"),
    ],
)
@given(text=WORDS)
def test_no_text_raises_anything_but_our_errors(parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except SandboxError:
        return


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/dev/loop1", texts.Disk(source="/dev/loop1", path="/dev/loop1")),
        ("/dev/loop1:/dev/data", texts.Disk(source="/dev/loop1", path="/dev/data")),
        ("/dev/loop1:r", texts.Disk(source="/dev/loop1", path="/dev/loop1", access="r")),
        ("./d.img:/dev//x/:rw", texts.Disk(source="/here/d.img", path="/dev/x", access="rw")),
    ],
)
def test_a9_disks(text: str, expected: texts.Disk) -> None:
    assert texts.disk(text, cwd="/here") == expected
    assert expected.read_only == ("w" not in expected.access)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood: write SOURCE"),
        (":/dev/x", "not understood"),
        ("/a:/b:/c", "not understood"),
        ("/a:/b:rww", "each of 'r', 'w' and 'm' once"),
        ("/a:b", "has to be an absolute path"),
        ("/a:/", "cannot be the root directory"),
    ],
)
def test_bad_disks_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        texts.disk(text)
