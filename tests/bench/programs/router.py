"""A bare ZeroMQ ROUTER on the socket it is given: sends every frame back to whoever sent it."""

from __future__ import annotations

import sys

import zmq


def main() -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(f"ipc://{sys.argv[1]}")
    print("up", flush=True)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(sys.stdin, zmq.POLLIN)
    while sys.stdin.fileno() not in dict(poller.poll()):
        router.send_multipart(router.recv_multipart())


if __name__ == "__main__":
    main()
