"""The exporter: serves the core's figures over HTTP, in a process of its own that has nothing worth having.

A scraper can be slow, hostile, or one of thousands: all of that stays in here. It asks the core for figures when somebody
wants them, one question at a time, and serves the last ones where the core is busy.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reaperd.companion_process import begin, give_up, say

if TYPE_CHECKING:
    from reaperd.exposition import Exposition

_MEMORY_BYTES = 256 * 1024 * 1024
_ANSWER_S = 1.0  # that a scrape waits for the core
_REQUEST_S, _EXCHANGE_S = 5.0, 20.0  # in which a request must have come, and its answer gone
# Then the oldest is closed: whoever asks and takes the answer at once is gone before that.
_MOST_CONNECTIONS = 128
_MAX_REQUEST_BYTES = 16 * 1024
_MAX_LINE_BYTES = 4 * 1024 * 1024  # of the core's
_AGAIN_S = 2.0
_NOT_HERE = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))
_NO_FIGURES = "the daemon has not told any figures yet: try again in a second\n"
_INDEX = "reaperd serves its figures for Prometheus at /metrics\n"


class Figures:
    """The core's figures: asked for by who needs them now."""

    def __init__(self, ask: Callable[[int], None], take: Callable[[dict[str, Any]], None]) -> None:
        self._ask = ask
        self._take = take
        self._number = 0  # of the last who needs them
        self._asking: int | None = None
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    async def refresh(self, within_s: float = _ANSWER_S) -> None:
        """Return once the core has told what it knew after this was called, or has not for so long."""
        self._number += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._number, future))
        if self._asking is None:
            self._send()
        try:
            await asyncio.wait_for(future, within_s)
        except asyncio.TimeoutError:
            self._asking = None  # it may have been lost: the next one asks again
            self._waiting = collections.deque(one for one in self._waiting if not one[1].done())

    def _send(self) -> None:
        self._asking = self._number
        self._ask(self._number)

    def answered(self, number: int, figures: dict[str, Any]) -> None:
        """Take an answer in; who came after its question was put gets the next one."""
        self._take({**figures, "answered_at_epoch_s": time.time()})
        while self._waiting and self._waiting[0][0] <= number:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
        self._asking = None
        if any(not future.done() for _, future in self._waiting):
            self._send()


class Server:
    """Answers HTTP requests: one a connection, and never for long."""

    def __init__(self, figures: Figures, exposition: Exposition) -> None:
        self._figures = figures
        self._exposition = exposition
        self._connections: dict[asyncio.Task[Any], None] = {}  # the oldest first

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task = asyncio.current_task()
        assert task is not None, "asyncio runs this as one"
        self._connections[task] = None
        if len(self._connections) > _MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        try:
            # The peer may be gone, send no HTTP, or too slowly.
            with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.CancelledError, ValueError):
                await asyncio.wait_for(self._exchange(reader, writer), _EXCHANGE_S)
        finally:
            self._connections.pop(task, None)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_S)
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            writer.write(_response("431 Request Header Fields Too Large", "the request is too long\n"))
            await writer.drain()
            return
        writer.write(await self._answer(head))
        await writer.drain()

    async def _answer(self, head: bytes) -> bytes:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response("400 Bad Request", "this is no HTTP/1 request\n")
        method, (path, _, query) = words[0], words[1].partition("?")
        if path == "/":
            return _response("200 OK", _INDEX, with_body=method != "HEAD")
        if path != "/metrics":
            return _response("404 Not Found", "the figures are at /metrics\n", with_body=method != "HEAD")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "only GET and HEAD\n", [("Allow", "GET, HEAD")])
        await self._figures.refresh()
        if self._exposition.figures is None:
            return _response("503 Service Unavailable", _NO_FIGURES)
        asked = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        headers, body = self._exposition.render(
            query, asked.get("accept", ""), asked.get("accept-encoding", "")
        )
        return _response("200 OK", body, headers, with_body=method != "HEAD")


def _response(
    status: str, body: bytes | str, headers: list[tuple[str, str]] | None = None, *, with_body: bool = True
) -> bytes:
    if isinstance(body, str):
        body, headers = body.encode(), [("Content-Type", "text/plain; charset=utf-8"), *(headers or ())]
    all_headers = [*(headers or ()), ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {value}\r\n" for name, value in all_headers)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + (body if with_body else b"")


# -- where it listens -----------------------------------------------------------------------------


class Listeners:
    """The sockets of one address: a name may have several, and one that is taken is tried again."""

    def __init__(self, host: str, port: int, tell: Callable[[str, str], None]) -> None:
        self._host, self._port = host, port
        self._tell = tell
        self._told = ""
        self._open: dict[tuple[Any, ...], socket.socket] = {}

    def open_more(self) -> tuple[list[socket.socket], bool]:
        """Return the sockets that could be opened now and not before, and whether that is all of them."""
        new: list[socket.socket] = []
        failures: dict[str, OSError] = {}
        try:
            found = dict.fromkeys(
                (family, address)
                for family, *_, address in socket.getaddrinfo(
                    self._host.encode("ascii"),  # as text it would need a codec that is not loaded
                    self._port,
                    type=socket.SOCK_STREAM,
                    flags=socket.AI_PASSIVE,
                )
            )
        except OSError as error:  # the name is none, or nobody answers
            return [], self._failed({self._host: error})
        for family, address in found:
            if address in self._open:
                continue
            try:
                # Of IPv6, that alone: "[::]" is not 0.0.0.0, and only what was asked for is listened on.
                self._open[address] = socket.create_server(address[:2], family=family, backlog=128)
            except OSError as error:
                failures[str(address[0])] = error
            else:
                new.append(self._open[address])
        if new:
            self._tell("info", f"listening on {', '.join(sorted(map(_shown, self._open)))}")
        # Of a name, what this machine has is enough: most have "localhost" twice, and not all have IPv6.
        if self._open:
            failures = {host: error for host, error in failures.items() if error.errno not in _NOT_HERE}
        return new, self._failed(failures)

    def _failed(self, failures: dict[str, OSError]) -> bool:
        """Tell why something cannot be listened on, once for each reason; False where something is left to be tried."""
        told = "; ".join(
            f"cannot listen on {_shown((host, self._port))}: {_reason(error)}{_advice(error)}"
            for host, error in failures.items()
        )
        if told and told != self._told:
            self._tell("warning", f"{told}; trying again every {_AGAIN_S:g} s")
        self._told = told
        return not told


def _reason(error: OSError) -> str:
    """Return the kernel's words alone, or the resolver's: Python puts the address behind those of bind(2)."""
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)


def _advice(error: OSError) -> str:
    """Return what helps where that is not plain."""
    if error.errno in (errno.EAFNOSUPPORT, errno.EPERM):  # RestrictAddressFamilies=
        return " (the service's unit may forbid it: see docs/metrics.md)"
    if error.errno == errno.EACCES:
        return " (ports below 1024 are for root, which the exporter is not)"
    return ""


def _shown(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _listen(server: Server, listeners: Listeners) -> None:
    """Listen, and try again as long as something is missing."""
    serving = []  # kept: what is collected is closed
    while True:
        new, is_all = listeners.open_more()
        for one in new:
            serving.append(await asyncio.start_server(server.serve, sock=one, limit=_MAX_REQUEST_BYTES))
        if is_all:
            return
        await asyncio.sleep(_AGAIN_S)


# -- the core -------------------------------------------------------------------------------------


async def run(channel: socket.socket, exposition: Exposition) -> None:
    """Serve until the core hangs up."""
    channel.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=channel, limit=_MAX_LINE_BYTES)

    def take(figures: dict[str, Any]) -> None:
        exposition.figures = figures

    figures = Figures(lambda number: say(channel, {"ask": number}), take)
    server = Server(figures, exposition)
    listening: asyncio.Task[None] | None = None

    def check(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            reader.set_exception(error)  # a mistake of ours: the core starts another

    with contextlib.suppress(ConnectionResetError):  # it was killed
        while line := await reader.readline():
            message = json.loads(line)
            if "listen" in message:
                host, port = message["listen"]
                listeners = Listeners(
                    host, port, lambda level, text: say(channel, {"log": level, "text": text})
                )
                listening = asyncio.create_task(_listen(server, listeners))
                listening.add_done_callback(check)
            elif "answer" in message:
                figures.answered(message["answer"], message["figures"])
    if listening is not None:
        listening.cancel()
    writer.close()


def main() -> None:
    """Run the exporter: ``python -m reaperd.exporter CHANNEL_FD CORE_PID``."""
    try:
        from reaperd.exposition import Exposition
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        give_up(
            socket.socket(fileno=int(sys.argv[1])),
            "[metrics] enabled needs prometheus-client, which is not installed: pip install 'reaperd[metrics]', then reload",
        )
    exposition = Exposition(int(sys.argv[2]))
    # Has everything loaded that a scrape needs.
    exposition.render(accept="application/openmetrics-text", accept_encoding="gzip")
    channel = begin("reaperd-metrics", memory_bytes=_MEMORY_BYTES)
    asyncio.run(run(channel, exposition))


if __name__ == "__main__":
    main()
