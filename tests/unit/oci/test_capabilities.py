"""Capabilities of a container: behaviour D8."""

from __future__ import annotations

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.oci.capabilities import DEFAULT, KNOWN, adjusted, complaints


def test_the_numbers_are_the_kernels() -> None:
    assert (KNOWN[0], KNOWN[21], KNOWN[39], len(KNOWN)) == ("CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_BPF", 41)


def test_the_default_is_what_docker_gives() -> None:
    assert set(adjusted()) == DEFAULT
    assert len(DEFAULT) == 14
    assert "CAP_SYS_ADMIN" not in DEFAULT


def test_d8_names_may_be_short_and_in_any_case() -> None:
    assert set(adjusted(["net_admin"], ["Cap_Chown"])) == DEFAULT - {"CAP_CHOWN"} | {"CAP_NET_ADMIN"}


def test_d8_add_all() -> None:
    assert adjusted(["ALL"]) == KNOWN
    assert set(adjusted(["all"], ["sys_admin"])) == set(KNOWN) - {"CAP_SYS_ADMIN"}


def test_d8_drop_all_leaves_what_is_added() -> None:
    assert adjusted([], ["ALL"]) == ()
    assert adjusted(["CHOWN", "NET_RAW"], ["ALL"]) == ("CAP_CHOWN", "CAP_NET_RAW")


def test_d8_all_on_both_sides_drops_all() -> None:
    assert adjusted(["ALL"], ["ALL"]) == ()


def test_d8_what_is_added_and_dropped_is_dropped() -> None:
    assert "CAP_NET_ADMIN" not in adjusted(["NET_ADMIN"], ["NET_ADMIN"])


def test_d6_privileged_has_all_but_what_is_dropped() -> None:
    assert adjusted(privileged=True) == KNOWN
    assert "CAP_SYS_BOOT" not in adjusted(drop=["SYS_BOOT"], privileged=True)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        adjusted(["SYS_ADMN"])
    assert str(caught.value) == (
        "cannot add capability 'SYS_ADMN': there is none of that name: did you mean 'CAP_SYS_ADMIN'?"
    )


def test_unknown_ones_of_a_process_are_told_of_once() -> None:
    process = {"capabilities": {"bounding": ["CAP_NOSUCH", "CAP_KILL"], "permitted": ["CAP_NOSUCH"], "ambient": None}}
    assert complaints(process) == ["'process.capabilities' has 'CAP_NOSUCH', which is unknown and not given"]
    for nothing in (None, {}, {"capabilities": None}, {"capabilities": {"bounding": ["CAP_KILL"]}}):
        assert complaints(nothing) == []
