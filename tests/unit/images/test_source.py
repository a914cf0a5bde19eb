"""Sources: which image of a layout or an archive is meant, and what is said when it cannot be told."""

from __future__ import annotations

import json
import os
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.images.making import (
    CONFIG,
    INDEX,
    MANIFEST,
    Layout,
    Member,
    archived,
    configuration,
    docker_archive,
    hard_link,
    layout,
    link,
    sha256,
    tar,
)
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError, UnsupportedError
from vmsandbox.resources.images.archive import Archive, Directory
from vmsandbox.resources.images.source import Chosen, architecture, choose, parse

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = tar(Member("one")), tar(Member("two"))


def chosen(text: str) -> Chosen:
    source = parse(text)
    if source.kind == "oci":
        return choose(source, Directory(source.path))
    with open(source.path, "rb") as file:
        return choose(source, Archive(file.fileno(), source.path))


def test_the_path_is_the_longest_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a:b").mkdir()
    (tmp_path / "f.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def parts(text: str) -> tuple[str, str, str]:
        source = parse(text)
        return source.kind, str(source.path.relative_to(tmp_path)), source.reference

    assert parts("oci:a") == ("oci", "a", "")
    assert parts("oci:a:tag") == ("oci", "a", "tag")
    assert parts("oci:a:b") == ("oci", "a:b", "")
    assert parts("oci:a:b:tag") == ("oci", "a:b", "tag")
    assert parts("docker-archive:f.tar:host:5000/x/y:tag") == ("docker-archive", "f.tar", "host:5000/x/y:tag")
    assert parts("oci-archive:f.tar") == ("oci-archive", "f.tar", "")
    assert parts("rootfs:a:b") == ("rootfs", "a:b", "")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("demo", InvalidArgumentError, "oci:DIR"),
        ("docker://alpine", InvalidArgumentError, "oci:DIR"),
        ("oci:", InvalidArgumentError, "names no path"),
        ("oci:/nowhere", NotFoundError, "'/nowhere'"),
        ("oci:/nowhere:tag", NotFoundError, "'/nowhere'"),
        ("rootfs:/nowhere:x", NotFoundError, "'/nowhere:x'"),
        ("oci:/etc/passwd", InvalidArgumentError, "is not a directory"),
        ("oci-archive:/etc", InvalidArgumentError, "is not a file"),
        ("rootfs:/etc/passwd", InvalidArgumentError, "is not a directory"),
    ],
)
def test_a_source_that_is_none_is_explained(text: str, kind: type[SandboxError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        parse(text)
    assert type(caught.value) is kind


def test_a_layout_with_one_image_needs_no_tag(tmp_path: Path) -> None:
    made = layout(tmp_path / "lay", ONE, TWO, name="v1", config={"Cmd": ["x"], "Entrypoint": None})
    for text in ("", ":v1", f":{made.manifests[0]['digest']}"):
        found = chosen(f"oci:{tmp_path}/lay{text}")
        assert found.configuration.layers == (sha256(ONE), sha256(TWO))
        assert found.configuration.config == {"Cmd": ["x"]}
        assert found.digest == made.manifests[0]["digest"]
        assert found.names == ("lay:v1",)
    archived(tmp_path / "lay", tmp_path / "lay.oci.tar")
    again = chosen(f"oci-archive:{tmp_path}/lay.oci.tar:v1")
    assert (again.configuration, again.digest) == (found.configuration, found.digest)


@pytest.mark.parametrize(
    ("tag", "directory", "names"),
    [
        ("", "alpine", ("alpine:latest",)),
        ("3.18", "alpine", ("alpine:3.18",)),
        ("docker.io/library/alpine:3.18", "x", ("alpine:3.18",)),
        ("a/b", "x", ("a/b:latest",)),
        ("v1", "No Name", ()),
    ],
)
def test_a_layout_names_its_image(tmp_path: Path, tag: str, directory: str, names: tuple[str, ...]) -> None:
    layout(tmp_path / directory, ONE, name=tag)
    assert chosen(f"oci:{tmp_path / directory}").names == names


def test_a_tag_chooses_among_images(tmp_path: Path) -> None:
    made = Layout(tmp_path / "lay")
    made.tag(made.manifest([ONE]), "one")
    made.tag(made.manifest([TWO]), "repo/two:2")
    assert chosen(f"oci:{tmp_path}/lay:one").configuration.layers == (sha256(ONE),)
    assert chosen(f"oci:{tmp_path}/lay:repo/two:2").configuration.layers == (sha256(TWO),)
    assert chosen(f"oci:{tmp_path}/lay:2").configuration.layers == (sha256(TWO),)
    with pytest.raises(InvalidArgumentError, match="'one', 'repo/two:2'"):
        chosen(f"oci:{tmp_path}/lay")
    with pytest.raises(NotFoundError, match="no image 'three': it has 'one', 'repo/two:2'"):
        chosen(f"oci:{tmp_path}/lay:three")


def platform(name: str) -> dict[str, Any]:
    return {"platform": {"os": "linux", "architecture": name}}


def test_an_index_gives_the_image_of_this_machine(tmp_path: Path) -> None:
    made = Layout(tmp_path / "lay")
    ours = {**made.manifest([ONE], architecture=architecture()), **platform(architecture())}
    theirs = {**made.manifest([TWO], architecture="s390x"), **platform("s390x")}
    attestation = {**made.put_json({}, MANIFEST), "platform": {"os": "unknown", "architecture": "unknown"}}
    index = made.put_json({"schemaVersion": 2, "manifests": [attestation, theirs, ours]}, INDEX)
    made.tag(index, "multi")
    assert chosen(f"oci:{tmp_path}/lay").configuration.layers == (sha256(ONE),)
    made.manifests.clear()
    made.tag(theirs, "side", **platform("s390x"))
    made.tag(ours, "side", **platform(architecture()))
    assert chosen(f"oci:{tmp_path}/lay:side").configuration.layers == (sha256(ONE),)
    only = made.put_json({"schemaVersion": 2, "manifests": [theirs]}, INDEX)
    made.tag(only, "other")
    with pytest.raises(UnsupportedError, match="'linux/s390x'"):
        chosen(f"oci:{tmp_path}/lay:other")


def test_an_image_of_another_machine_is_refused(tmp_path: Path) -> None:
    layout(tmp_path / "lay", ONE, architecture="s390x")
    with pytest.raises(UnsupportedError, match="'linux/s390x', this machine"):
        chosen(f"oci:{tmp_path}/lay")


def test_indexes_that_contain_themselves_end(tmp_path: Path) -> None:
    made = Layout(tmp_path / "lay")
    inner = made.put_json({"manifests": []}, INDEX)
    for _ in range(6):
        inner = made.put_json({"manifests": [{**inner, **platform(architecture())}]}, INDEX)
    made.tag(inner, "deep")
    with pytest.raises(InvalidArgumentError, match="indexes within indexes"):
        chosen(f"oci:{tmp_path}/lay")


CONFIGURATIONS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"x", "is not JSON"),
    "deeply nested": (b"[" * 100_000, "is not JSON"),
    "no object": (b"[]", "is not an object"),
    "no rootfs": (b"{}", "lists no layers"),
    "rootfs of another kind": (b'{"rootfs": 1}', "'rootfs' of"),
    "a layer that is no string": (b'{"rootfs": {"diff_ids": [1]}}', "only sha256"),
    "a layer of another digest": (b'{"rootfs": {"diff_ids": ["md5:00"]}}', "only sha256"),
    "a command that is no list": (configuration([ONE], {"Cmd": {"a": 1}}), "'Cmd' of"),
    "a command of numbers": (configuration([ONE], {"Cmd": [1]}), "'Cmd' of"),
    "an environment with a zero byte": (configuration([ONE], {"Env": ["A=\0"]}), "'Env' of"),
    "a directory that is no string": (configuration([ONE], {"WorkingDir": 7}), "'WorkingDir' of"),
    "a user that is true": (configuration([ONE], {"User": True}), "'User' of"),
    "labels that are no strings": (configuration([ONE], {"Labels": {"a": 1}}), "label 'a'"),
    "too many layers": (configuration([ONE, TWO]), "1 layers, its configuration speaks of 2"),
}


@pytest.mark.parametrize(("data", "words"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_malformed_configuration_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    layout(tmp_path / "lay", ONE, config_bytes=data)
    with pytest.raises(InvalidArgumentError, match=words):
        chosen(f"oci:{tmp_path}/lay")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("2020-02-02T02:02:02Z", "2020-02-02T02:02:02Z"),
        ("2020-02-02T02:02:02.123456789+02:00", "2020-02-02T02:02:02.123456789+02:00"),
        ("\x1b[2J", ""),
        ("yesterday", ""),
    ],
)
def test_the_time_of_creation_is_kept_if_it_is_one(tmp_path: Path, written: str, kept: str) -> None:
    layout(tmp_path / "lay", ONE, created=written)
    assert chosen(f"oci:{tmp_path}/lay").configuration.created == kept


def test_a_command_of_one_string_is_a_list(tmp_path: Path) -> None:
    layout(tmp_path / "lay", ONE, config={"Entrypoint": "/run", "Env": ["A=b=c"], "Unknown": {"x": 1}})
    config = chosen(f"oci:{tmp_path}/lay").configuration.config
    assert config == {"Entrypoint": ["/run"], "Env": ["A=b=c"], "Unknown": {"x": 1}}


MANIFESTS: dict[str, tuple[Any, str]] = {
    "no object": ([], "is not an object"),
    "no configuration": ({"layers": []}, "no configuration"),
    "no layers": ({"config": {"digest": sha256(b"")}}, "no layers"),
    "something else": (
        {"config": {"mediaType": "application/vnd.cncf.helm.config.v1+json"}, "layers": []},
        "not a container image's",
    ),
    "another digest": ({"config": {"mediaType": CONFIG, "digest": "sha512:00"}, "layers": []}, "only sha256"),
    "a path for a digest": (
        {"config": {"mediaType": CONFIG, "digest": "sha256:../../../etc/passwd"}, "layers": []},
        "only sha256",
    ),
}


@pytest.mark.parametrize(("manifest", "words"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_malformed_manifest_is_refused(tmp_path: Path, manifest: Any, words: str) -> None:
    made = Layout(tmp_path / "lay")
    made.tag(made.put_json(manifest, MANIFEST))
    with pytest.raises(InvalidArgumentError, match=words):
        chosen(f"oci:{tmp_path}/lay")


def test_an_encrypted_layer_is_refused(tmp_path: Path) -> None:
    made = Layout(tmp_path / "lay")
    layer = made.put(b"x", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
    config = made.put(configuration([ONE]), CONFIG)
    made.tag(made.put_json({"config": config, "layers": [layer]}, MANIFEST))
    with pytest.raises(UnsupportedError, match="encrypted"):
        chosen(f"oci:{tmp_path}/lay")


@pytest.mark.parametrize("which", ["manifest", "config"])
@pytest.mark.parametrize("how", ["changed", "missing", "fifo", "huge"])
def test_a_document_that_is_not_the_one_meant_is_named(tmp_path: Path, which: str, how: str) -> None:
    made = layout(tmp_path / "lay", ONE)
    digest = made.manifests[0]["digest"]
    if which == "config":
        digest = json.loads(made.blob(digest).read_bytes())["config"]["digest"]
    path = made.blob(digest)
    if how == "changed":
        path.write_bytes(path.read_bytes() + b" ")
    elif how == "huge":
        os.truncate(path, 5 * 1024 * 1024)
    else:
        path.unlink()
        if how == "fifo":
            os.mkfifo(path)
    with pytest.raises(SandboxError, match=digest.removeprefix("sha256:")) as caught:
        chosen(f"oci:{tmp_path}/lay")
    assert isinstance(caught.value, NotFoundError if how == "missing" else InvalidArgumentError)


@pytest.mark.parametrize("index", [b"", b"[]", b'{"manifests": 1}', b'{"manifests": ["x"]}', b'{"manifests": []}'])
def test_a_malformed_index_is_refused(tmp_path: Path, index: bytes) -> None:
    made = Layout(tmp_path / "lay")
    (made.path / "index.json").write_bytes(index)
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        chosen(f"oci:{tmp_path}/lay")


def test_a_directory_that_is_no_layout_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="is not an OCI image layout"):
        chosen(f"oci:{tmp_path}")


# docker archives


def test_a_docker_archive_with_one_image_needs_no_reference(tmp_path: Path) -> None:
    docker_archive(tmp_path / "d.tar", ONE, TWO, tags=["demo:1", "docker.io/library/demo:2", "NOT VALID"])
    for reference in ("", ":demo:1", ":docker.io/library/demo:1", ":@0"):
        found = chosen(f"docker-archive:{tmp_path}/d.tar{reference}")
        assert found.configuration.layers == (sha256(ONE), sha256(TWO))
        assert found.names == ("demo:1", "demo:2")
    with pytest.raises(NotFoundError, match="no image 'other': it has 'NOT VALID', 'demo:1'"):
        chosen(f"docker-archive:{tmp_path}/d.tar:other")


def docker_members(*images: dict[str, Any]) -> list[Member]:
    return [Member("manifest.json", data=json.dumps(list(images)).encode())]


def test_a_reference_chooses_among_images_of_a_docker_archive(tmp_path: Path) -> None:
    one, two = configuration([ONE]), configuration([TWO])
    members = [
        *docker_members(
            {"Config": "one.json", "RepoTags": ["one:1"], "Layers": ["one/layer.tar"]},
            {"Config": "two.json", "RepoTags": None, "Layers": ["two/layer.tar"]},
        ),
        Member("one.json", data=one),
        Member("two.json", data=two),
    ]
    (tmp_path / "d.tar").write_bytes(tar(*members))
    assert chosen(f"docker-archive:{tmp_path}/d.tar:one:1").configuration.layers == (sha256(ONE),)
    assert chosen(f"docker-archive:{tmp_path}/d.tar:@1").configuration.layers == (sha256(TWO),)
    with pytest.raises(InvalidArgumentError, match="several images: say which of 'one:1'"):
        chosen(f"docker-archive:{tmp_path}/d.tar")
    with pytest.raises(NotFoundError):
        chosen(f"docker-archive:{tmp_path}/d.tar:@2")


DOCKER: dict[str, tuple[list[Member], str]] = {
    "no manifest": ([Member("x")], "is not a docker archive"),
    "an empty manifest": (docker_members(), "lists no images"),
    "a manifest that is no list": ([Member("manifest.json", data=b"{}")], "lists no images"),
    "an image that is no object": ([Member("manifest.json", data=b"[1]")], "is not an object"),
    "layers that are no strings": (
        [*docker_members({"Config": "c", "Layers": [1]}), Member("c", data=configuration([ONE]))],
        "not a list of strings",
    ),
    "a changed configuration": (
        [
            *docker_members({"Config": "0" * 64 + ".json", "Layers": ["x"]}),
            Member("0" * 64 + ".json", data=configuration([ONE])),
        ],
        "is damaged",
    ),
    "a manifest that is a link to itself": ([link("manifest.json", "manifest.json")], "is not a docker archive"),
    "a manifest that is a link to the host": ([link("manifest.json", "/etc/passwd")], "is not a docker archive"),
}


@pytest.mark.parametrize(("members", "words"), DOCKER.values(), ids=DOCKER.keys())
def test_a_malformed_docker_archive_is_refused(tmp_path: Path, members: list[Member], words: str) -> None:
    (tmp_path / "d.tar").write_bytes(tar(*members))
    with pytest.raises(InvalidArgumentError, match=words):
        chosen(f"docker-archive:{tmp_path}/d.tar")


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.tar").write_bytes(tar(*docker_members({"Config": "../../etc/shadow", "Layers": []})))
    with pytest.raises(NotFoundError, match=r"no member '../../etc/shadow'"):
        chosen(f"docker-archive:{tmp_path}/d.tar")


def test_members_are_found_through_links_within_the_archive(tmp_path: Path) -> None:
    members = [Member("a/data", data=b"content"), link("b/data", "../a/data"), hard_link("c", "b/data")]
    (tmp_path / "t.tar").write_bytes(tar(*members, Member("twice", data=b"1"), Member("./twice", data=b"22")))
    with open(tmp_path / "t.tar", "rb") as file:
        archive = Archive(file.fileno(), tmp_path / "t.tar")
        for name in ("a/data", "./a/data", "b/data", "c"):
            with archive.opened(name) as section:
                assert section.read(100) == b"content"
        with archive.opened("twice") as section:
            assert section.read(100) == b"22"
        with pytest.raises(NotFoundError, match="no member 'd'"), archive.opened("d"):
            pass


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 5000, tar(Member("a", data=bytes(5000)))[:2000], tar(Member("a"))[:100]],
    ids=["empty", "rubbish", "cut data", "cut header"],
)
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(InvalidArgumentError):
        chosen(f"docker-archive:{tmp_path}/t.tar")


def test_an_archive_is_indexed_without_reading_its_data(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("large")
        info.size = 50 << 30
        archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))  # type: ignore[union-attr]
        archive.fileobj.seek(info.size, os.SEEK_CUR)  # type: ignore[union-attr]
        archive.fileobj.write(tar(Member("small", data=b"x")))  # type: ignore[union-attr]
    with open(path, "rb") as file, Archive(file.fileno(), path).opened("small") as section:
        assert section.read(9) == b"x"
