"""Run inside containers by the rows of the network: answers bytes, and measures how long that takes who asks.

``serve PORT`` echoes what each connection sends.  ``ask ADDRESS PORT`` prints the medians of the time that a small
message takes there and back, and of the time that a new connection takes, as one JSON object.
"""

import json
import socket
import statistics
import sys
import threading
import time

ROUNDS = 300
CONNECTIONS = 100
TIMEOUT = 30.0


def serve(port: int) -> None:
    with socket.create_server(("0.0.0.0", port), backlog=256) as server:
        while True:
            threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()


def echo(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := connection.recv(4096):
            connection.sendall(data)


def ask(address: str, port: int) -> dict[str, float]:
    with connected(address, port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there_and_back = [timed(lambda: exchange(connection)) for _ in range(ROUNDS)]
    new = [timed(lambda: connected(address, port).close()) for _ in range(CONNECTIONS)]
    return {"latency": statistics.median(there_and_back), "connect": statistics.median(new)}


def connected(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=TIMEOUT)


def exchange(connection: socket.socket) -> None:
    connection.sendall(b"x")
    if connection.recv(1) != b"x":
        raise ConnectionError("the echo is another")


def timed(work) -> float:  # type: ignore[no-untyped-def]  # noqa: ANN001
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]))))
