from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import pytest

from vmsandbox.errors import ExhaustedError
from vmsandbox.paths import Roots
from vmsandbox.resources import identities

if TYPE_CHECKING:
    from pathlib import Path

BASE, COUNT = 5000, 3


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path / "run", tmp_path / "data")


def live(roots: Roots, pod_id: str) -> str:
    os.makedirs(roots.sandbox(pod_id).dir)
    return pod_id


def pods_with_one_hash(roots: Roots, number: int) -> list[str]:
    """Ids that would all get the same uid if only their hash chose it."""
    wanted = zlib.crc32(b"first") % COUNT
    found = (f"{index:012x}" for index in range(10_000) if zlib.crc32(f"{index:012x}".encode()) % COUNT == wanted)
    return [live(roots, next(found)) for _ in range(number)]


def reserve(roots: Roots, pod_id: str) -> int:
    return identities.reserve(roots, pod_id, base=BASE, count=COUNT)


def test_live_pods_never_share_a_uid(roots: Roots) -> None:
    uids = [reserve(roots, pod_id) for pod_id in pods_with_one_hash(roots, COUNT)]
    assert sorted(uids) == [BASE, BASE + 1, BASE + 2]


def test_a_pod_keeps_its_uid_when_it_asks_again(roots: Roots) -> None:
    first, second = pods_with_one_hash(roots, 2)
    uids = reserve(roots, first), reserve(roots, second)
    assert (reserve(roots, first), reserve(roots, second)) == uids


def test_the_last_pod_that_finds_none_is_told_what_to_do(roots: Roots) -> None:
    *served, refused = pods_with_one_hash(roots, COUNT + 1)
    for pod_id in served:
        reserve(roots, pod_id)
    with pytest.raises(ExhaustedError, match=r"all 3 uids .* raise 'hypervisor.uid_count'"):
        reserve(roots, refused)
    identities.release(roots, served[1])
    assert reserve(roots, refused) in range(BASE, BASE + COUNT)


def test_a_pod_that_left_no_directory_left_no_uid(roots: Roots) -> None:
    killed, other = pods_with_one_hash(roots, 2)
    uid = reserve(roots, killed)
    os.rmdir(roots.sandbox(killed).dir)
    assert reserve(roots, other) == uid


def test_gc_frees_the_uids_of_pods_that_are_gone_alone(roots: Roots) -> None:
    killed, other = pods_with_one_hash(roots, 2)
    uids = [reserve(roots, killed), reserve(roots, other)]
    os.rmdir(roots.sandbox(killed).dir)
    assert identities.collect(roots) == [uids[0]]
    assert identities.collect(roots) == []
    assert reserve(roots, other) == uids[1]


def test_nothing_reserved_is_nothing_to_release(roots: Roots) -> None:
    identities.release(roots, "never")
    assert identities.collect(roots) == []
