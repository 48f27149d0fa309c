"""Prints the seconds that one registration, or its bare counterpart, took in a process that had imported it already.

``register.py first SOCKET`` calls ``agent.register()`` where nothing else was imported, ``register.py loaded SOCKET`` where
pyzmq was, as for its counterpart, ``register.py again SOCKET N`` N times in one process (the session is ended in between);
``register.py bare SOCKET [N]`` connects a DEALER of pyzmq, waits for one reply and closes.
"""

from __future__ import annotations

import sys
import time


def first(path: str) -> float:
    import agent

    began_s = time.perf_counter()
    session = agent.register("bench", socket=path, timeout=10.0)
    took_s = time.perf_counter() - began_s
    assert session.socket is not None, "no daemon accepted the session"
    return took_s


def loaded(path: str) -> float:
    import zmq

    assert zmq.DEALER
    return first(path)


def again(path: str) -> float:
    import agent

    agent.unregister()
    return first(path)


def bare(path: str) -> float:
    import zmq

    context = zmq.Context()
    began_s = time.perf_counter()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"ipc://{path}")
    dealer.send(b'{"v":1,"op":"ping"}')
    dealer.recv()
    dealer.close()
    took_s = time.perf_counter() - began_s
    context.term()
    return took_s


def main() -> None:
    what, path, *more = sys.argv[1:]
    repeat = int(more[0]) if more else 1
    if what == "again":
        first(path)
    take = {"first": first, "loaded": loaded, "again": again, "bare": bare}[what]
    for _ in range(repeat):
        print(take(path))


if __name__ == "__main__":
    main()
