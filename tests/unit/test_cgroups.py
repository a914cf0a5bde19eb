"""The host's cgroups of containers, on ordinary directories: what is made is removed, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmsandbox import cgroups
from vmsandbox.errors import InvalidBundleError

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_made_is_removed_with_the_parents_that_were_missing(tmp_path: Path) -> None:
    places = [str(tmp_path / controller / "docker/one") for controller in ("cpu", "memory")]
    (tmp_path / "cpu").mkdir()
    made = cgroups.make(places)
    assert made.places == places
    assert made.above == [str(tmp_path / "cpu/docker"), str(tmp_path / "memory"), str(tmp_path / "memory/docker")]
    cgroups.remove(made.places, reversed(made.above))
    assert [*tmp_path.iterdir()] == [tmp_path / "cpu"]


def test_a_parent_stays_while_somebody_else_is_below_it(tmp_path: Path) -> None:
    first = cgroups.make([str(tmp_path / "docker/one")])
    second = cgroups.make([str(tmp_path / "docker/two")])
    assert second.above == []
    cgroups.remove(first.places, reversed(first.above))
    assert [*tmp_path.iterdir()] == [tmp_path / "docker"]
    assert [*(tmp_path / "docker").iterdir()] == [tmp_path / "docker/two"]


def test_what_the_machine_does_not_let_us_have_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cgroups.make([str(tmp_path / "file/one"), str(tmp_path / "two")]).places == [str(tmp_path / "two")]


@pytest.mark.parametrize("path", ["../up", "/a/../../b", "system.slice:docker:one"])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(InvalidBundleError, match="cgroupsPath"):
        cgroups.directories(path, "one")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("", "/system.slice/vmsandbox-one.scope"),
        (":libpod:abc", "/system.slice/libpod-abc.scope"),
        ("machine.slice:libpod:abc", "/machine.slice/libpod-abc.scope"),
        ("user-a-b.slice:docker:x-y", "/user.slice/user-a.slice/user-a-b.slice/docker-x-y.scope"),
        ("-.slice:p:n", "/p-n.scope"),
        ("a.slice:p:a-pod.slice", "/a.slice/a-pod.slice"),
    ],
)
def test_names_of_systemds_units_are_paths_below_their_slices(path: str, place: str) -> None:
    assert cgroups.unit_path(path, "one") == place
    found = cgroups.directories(path, "one", systemd=True)
    assert found
    assert all(each.endswith(place) for each in found)


@pytest.mark.parametrize(
    "path", ["/docker/one", "a:b", "a.slice:b:", "a:b:c", ".slice:b:c", "a--b.slice:b:c", "a.slice:b/c:d"]
)
def test_what_is_no_name_of_a_unit_is_refused(path: str) -> None:
    with pytest.raises(InvalidBundleError, match=r"^'linux\.cgroupsPath' is '"):
        cgroups.directories(path, "one", systemd=True)
