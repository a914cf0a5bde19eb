"""What users type about a pod's network."""

from __future__ import annotations

import json

import pytest

from vmsandbox.errors import InvalidArgumentError, UnsupportedError
from vmsandbox.resources.network.options import HOST_GATEWAY, NetworkOptions, Port, published, requested


def test_nothing_asked_is_the_configured_network() -> None:
    assert requested({}) == NetworkOptions(kind="default")
    assert requested({}, default="none") == NetworkOptions(kind="none")
    assert requested({"network": "default"}, default="none").kind == "default"


def test_everything_asked_is_understood() -> None:
    options = requested(
        {
            "network": "default",
            "publish": ["8080:80", "127.0.0.1:5353:53/udp", "[::1]:90-91:80-81"],
            "ip": "10.90.0.9",
            "dns": ["192.0.2.53"],
            "dns_search": ["example.org"],
            "dns_option": ["ndots:2"],
            "add_host": ["db:192.0.2.7", "six:fd00::1", f"host:{HOST_GATEWAY}"],
        }
    )
    assert options.ports == (
        Port(host=8080, inner=80),
        Port(host=5353, inner=53, protocol="udp", ip="127.0.0.1"),
        Port(host=90, inner=80, ip="::1"),
        Port(host=91, inner=81, ip="::1"),
    )
    assert options.hosts == (("db", "192.0.2.7"), ("six", "fd00::1"), ("host", HOST_GATEWAY))
    assert options.ip == "10.90.0.9"
    assert (options.dns, options.dns_search, options.dns_options) == (("192.0.2.53",), ("example.org",), ("ndots:2",))
    assert NetworkOptions.of(json.loads(json.dumps(options.document()))) == options


def test_a_namespace_is_a_path() -> None:
    options = requested({"network": "ns:/run/netns/web"})
    assert (options.kind, options.path) == ("namespace", "/run/netns/web")


def test_the_hosts_network_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"network 'host' is refused.*publish ports"):
        requested({"network": "host"})


@pytest.mark.parametrize(
    "document",
    [
        {"network": "mine"},
        {"network": "ns:relative"},
        {"network": "container:abc"},
        {"network": 5},
        {"publish": "80:80"},
        {"publish": [80]},
        {"publish": ["80:80", "80:81"]},
        {"publish": ["127.0.0.1:80:80", "80:81"]},
        {"network": "none", "publish": ["80:80"]},
        {"network": "ns:/x", "ip": "10.90.0.9"},
        {"ip": "10.90.0"},
        {"dns": ["resolver"]},
        {"dns_search": ["a b"]},
        {"dns_search": ["x" * 64 + ".org"]},
        {"dns_option": ["a\nb"]},
        {"add_host": ["db"]},
        {"add_host": ["db:nowhere"]},
        {"add_host": ["a\tb:192.0.2.7"]},
        {"mtu": 9000},
    ],
    ids=str,
)
def test_nonsense_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        requested(document)


@pytest.mark.parametrize(
    "text",
    [
        "80",
        "80:",
        ":80",
        "80:80/icmp",
        "0:80",
        "80:0",
        "65536:80",
        "80:99999",
        "81-80:80-81",
        "80-82:80-81",
        "1-2000:1-2000",
        "1.2.3:80:80",
        "::1:80:80",
        "host:80:80",
        "80:80 ",
        "",
    ],
)
def test_a_port_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"port|is not an IP address"):
        published(text)


def test_any_address_of_the_host_is_none_in_particular() -> None:
    assert published("0.0.0.0:80:80") == [Port(host=80, inner=80)]
    assert str(published("[::1]:80:8080/udp")[0]) == "[::1]:80->8080/udp"
