"""A kubelet's side of a streaming exec, by WebSocket: URL as argument, the process' input on stdin.

A program of its own, because it runs in the engines' network.  Prints what came on each channel, as JSON: 1 is
stdout, 2 stderr, 3 the status.  Stdlib only.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from typing import BinaryIO

BINARY, CLOSE = 2, 8
FINAL = 0x80


def connect(url: str) -> tuple[socket.socket, BinaryIO]:
    """Open the stream and say which protocol is spoken in it."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    sock = socket.create_connection((name, int(port)))
    headers = {
        "Host": host,
        "Origin": f"http://{host}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": "v4.channel.k8s.io",
    }
    lines = [f"GET /{path} HTTP/1.1", *(f"{header}: {value}" for header, value in headers.items()), "", ""]
    sock.sendall("\r\n".join(lines).encode())
    stream = sock.makefile("rb")
    status = stream.readline()
    if b" 101 " not in status:
        sys.exit(f"no stream: {status.decode(errors='replace')}")
    while stream.readline().strip():
        pass
    return sock, stream


def send(sock: socket.socket, payload: bytes) -> None:
    """Send one short frame; what clients send is masked."""
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    sock.sendall(bytes([FINAL | BINARY, 0x80 | len(payload)]) + mask + masked)


def received(stream: BinaryIO) -> dict[int, bytes]:
    """Everything until the other side closes, by channel."""
    said: dict[int, bytes] = {}
    while True:
        head = stream.read(2)
        if len(head) < 2 or head[0] & 0xF == CLOSE:
            return said
        length = head[1] & 0x7F
        if length > 125:
            length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
        data = stream.read(length)
        if data:
            said[data[0]] = said.get(data[0], b"") + data[1:]


def main() -> None:
    sock, stream = connect(sys.argv[1])
    given = sys.stdin.buffer.read(100)
    if given:
        send(sock, b"\0" + given)
    print(json.dumps({channel: text.decode() for channel, text in received(stream).items()}))


if __name__ == "__main__":
    main()
