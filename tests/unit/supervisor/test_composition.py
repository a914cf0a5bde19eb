from __future__ import annotations

from typing import Any

import pytest

from vmsandbox.errors import InvalidArgumentError
from vmsandbox.supervisor import composition
from vmsandbox.supervisor.sandbox import SandboxSpec


def pod(**given: object) -> SandboxSpec:
    return composition.pod_spec({"sandbox": {"id": "abc", **given}}, network="none")


def test_a_pods_containers_share_ipc_and_hostname_unless_asked_otherwise() -> None:
    assert pod().share == ("ipc", "uts")
    assert pod(share=[]).share == ()
    assert pod(share=["uts", "pid", "net"]).share == ("pid", "uts")


def test_a_pod_is_explicit_prepared_for_shares_and_known_by_its_name() -> None:
    made = pod(name="shop", shm_size="8m", sysctls=["net.core.somaxconn=9"])
    assert (made.implicit, made.shareable, made.hostname, made.aliases) == (False, True, "shop", ("shop",))
    assert (made.shm_bytes, made.sysctls) == (8 << 20, {"net.core.somaxconn": "9"})


def test_a_name_that_is_no_hostname_leaves_the_id() -> None:
    assert pod(name="my_pod").hostname == "abc"
    assert pod(name="my_pod", hostname="h").hostname == "h"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"share": ["user"]}, "namespace 'user' cannot be shared: choose"),
        ({"share": "ipc"}, "'share' has to be a list"),
        ({"sysctls": ["kernel.shmmax=1"]}, "give it to the container"),
        ({"hostname": "a b"}, "hostname 'a b' is not valid"),
        ({"shm_size": "1"}, "shm_size '1' is too little"),
        ({"shared_fs": "nfs"}, "shared_fs 'nfs' is unknown"),
        ({"network": {"publish": ["80:80"]}}, "needs the default network"),
        ({"id": "../x"}, "not a valid id"),
    ],
)
def test_what_a_pod_cannot_be_is_refused_by_name(given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        pod(**given)


def test_what_containers_share_is_not_theirs_to_size() -> None:
    options = composition.run_options({"options": {"shm_size": "8m"}})
    with pytest.raises(InvalidArgumentError, match="give '--shm-size' to 'pod create'"):
        composition.without_pods(options, pod())
    assert composition.without_pods(options, pod(share=["uts"])).shm_bytes == 8 << 20


def test_a_pods_document_comes_back_and_an_older_ones_lacks_have_defaults() -> None:
    made = pod(name="shop", share=["pid"])
    assert SandboxSpec.of(made.document()) == made
    older = {key: value for key, value in made.document().items() if key not in ("share", "shm_bytes", "established")}
    assert SandboxSpec.of(older).share == ()
