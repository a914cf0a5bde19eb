"""What a user asks of a pod's network, understood and checked.  Pure.

Clients send what was typed; every function raises InvalidArgumentError or UnsupportedError that quotes it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: a word in place of an address: the host, as the pod sees it
HOST_GATEWAY = "host-gateway"
_MOST = 1024
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(
    r"(?:(?P<ip>\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(?P<host>[0-9]{1,5})(?:-(?P<host_last>[0-9]{1,5}))?"
    r":(?P<inner>[0-9]{1,5})(?:-(?P<inner_last>[0-9]{1,5}))?(?:/(?P<protocol>[a-z]+))?"
)


@dataclass(frozen=True, kw_only=True)
class Port:
    """A port of the host (of one of its addresses, if `ip` is given) that leads to one of the pod."""

    host: int
    inner: int
    protocol: str = "tcp"
    ip: str = ""

    def __str__(self) -> str:
        address = f"[{self.ip}]:" if ":" in self.ip else f"{self.ip}:" if self.ip else ""
        return f"{address}{self.host}->{self.inner}/{self.protocol}"


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network of one pod."""

    #: "none", "default", or "namespace" with `path`
    kind: str = "none"
    path: str = ""
    ports: tuple[Port, ...] = ()
    #: an address of the default network; empty: any
    ip: str = ""
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    #: name and address, or `HOST_GATEWAY`
    hosts: tuple[tuple[str, str], ...] = ()

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> NetworkOptions:
        """The inverse of `document`, for documents of our own."""
        values = dict(document)
        values["ports"] = tuple(Port(**each) for each in values.get("ports", ()))
        values["hosts"] = tuple((name, address) for name, address in values.get("hosts", ()))
        for key in ("dns", "dns_search", "dns_options"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


def requested(document: Mapping[str, object], *, default: str = "default") -> NetworkOptions:
    """What a client sent: ``network``, ``publish``, ``ip``, ``dns``, ``dns_search``, ``dns_option``, ``add_host``.

    `default` is the network of a pod for which none is named.
    """
    known = {"network", "publish", "ip", "dns", "dns_search", "dns_option", "add_host"}
    for key in document:
        if key not in known:
            raise InvalidArgumentError(f"unknown option '{key}' of the network")
    kind, path = _network(_text(document.get("network") or default, "network"))
    ports = tuple(port for text in _texts(document, "publish") for port in published(text))
    options = NetworkOptions(
        kind=kind,
        path=path,
        ports=ports,
        ip=_address(_text(document.get("ip") or "", "ip"), "--ip") if document.get("ip") else "",
        dns=tuple(_address(text, "--dns") for text in _texts(document, "dns")),
        dns_search=tuple(_domain(text) for text in _texts(document, "dns_search")),
        dns_options=tuple(_word(text) for text in _texts(document, "dns_option")),
        hosts=tuple(_host(text) for text in _texts(document, "add_host")),
    )
    if options.kind != "default":
        for what, given in (("-p", options.ports), ("--ip", options.ip)):
            if given:
                raise InvalidArgumentError(f"'{what}' needs the default network: leave out '--network' or choose it")
    _check_ports(ports)
    return options


def _network(text: str) -> tuple[str, str]:
    if text in ("none", "default"):
        return text, ""
    if text == "bridge":
        return "default", ""
    if text == "host":
        raise UnsupportedError(
            "network 'host' is refused: a pod's containers run in a virtual machine and cannot be on the host's "
            "network; publish ports with '-p'"
        )
    kind, colon, path = text.partition(":")
    if kind == "ns" and colon:
        if not path.startswith("/") or "\0" in path:
            raise InvalidArgumentError(f"network '{text}' needs an absolute path: write ns:/run/netns/NAME")
        return "namespace", path
    raise InvalidArgumentError(f"unknown network '{text[:256]}': known are 'none', 'default' and 'ns:PATH'")


def published(text: str) -> list[Port]:
    """``[IP:]HOST:CONTAINER[/PROTOCOL]``; both may be ranges of one length."""
    match = _PORT.fullmatch(text)
    if not match:
        raise InvalidArgumentError(f"port '{text[:256]}' is not understood: write [IP:]HOST:CONTAINER[/udp]")
    protocol = match["protocol"] or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise InvalidArgumentError(f"port '{text}' has unknown protocol '{protocol}'")
    ip = _address(match["ip"].strip("[]"), f"port '{text}'") if match["ip"] else ""
    first, inner = int(match["host"]), int(match["inner"])
    last, inner_last = int(match["host_last"] or first), int(match["inner_last"] or inner)
    if not 0 < first <= last <= 65535 or not 0 < inner <= inner_last <= 65535:
        raise InvalidArgumentError(f"port '{text}' is out of range: ports are 1 to 65535")
    if last - first != inner_last - inner:
        raise InvalidArgumentError(f"port '{text}' has ranges of different lengths")
    if last - first >= _MOST:
        raise InvalidArgumentError(f"port '{text}' is a range of more than {_MOST}")
    if ip and ipaddress.ip_address(ip).is_unspecified:
        ip = ""
    return [Port(host=first + step, inner=inner + step, protocol=protocol, ip=ip) for step in range(last - first + 1)]


def _check_ports(ports: tuple[Port, ...]) -> None:
    if len(ports) > _MOST:
        raise InvalidArgumentError(f"more than {_MOST} ports are published")
    seen: dict[tuple[int, str], set[str]] = {}
    for port in ports:
        others = seen.setdefault((port.host, port.protocol), set())
        if port.ip in others or (others and ("" in others or not port.ip)):
            raise InvalidArgumentError(f"port '{port.host}/{port.protocol}' of the host is published twice")
        others.add(port.ip)


def _host(text: str) -> tuple[str, str]:
    """``NAME:ADDRESS``."""
    name, colon, address = text.partition(":")
    if not colon or not name or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise InvalidArgumentError(f"host '{text[:256]}' is not understood: write NAME:ADDRESS")
    if address != HOST_GATEWAY:
        address = _address(address.strip("[]"), f"host '{text[:256]}'")
    return name, address


def _address(text: str, what: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise InvalidArgumentError(f"'{text[:256]}' ({what}) is not an IP address") from None


def _domain(text: str) -> str:
    if text != "." and (len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.rstrip(".").split("."))):
        raise InvalidArgumentError(f"'{text[:256]}' (--dns-search) is not a domain")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_:-]{1,64}", text):
        raise InvalidArgumentError(f"'{text[:256]}' (--dns-option) is not an option of the resolver")
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"option '{name}' has to be a text")
    return value


def _texts(document: Mapping[str, object], name: str) -> list[str]:
    value = document.get(name) or []
    if not isinstance(value, list | tuple) or len(value) > _MOST:
        raise InvalidArgumentError(f"option '{name}' has to be a list of at most {_MOST} texts")
    return [_text(each, name) for each in value]
