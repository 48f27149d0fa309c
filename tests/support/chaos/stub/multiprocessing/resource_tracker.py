"""What a tracker look-alike runs: deaf to every signal, it ends when the last holder of its pipe has."""

from __future__ import annotations

import _signal
import json
import os
import select
import time


def main(report: int, pipe: int, token: str, linger_s: float, stubborn: bool) -> None:
    """Tell on ``report`` that the look-alike is one now, and each signal that reaches it; ``stubborn``: never end."""

    def tell(what: str, **facts: object) -> None:
        line = {"what": what, "token": token, "pid": os.getpid(), "at": time.monotonic(), **facts}
        os.write(report, json.dumps(line).encode())

    tell("tracking")
    signals = _signal.valid_signals()
    while True:
        readable = select.select([] if stubborn else [pipe], [], [], 0.2)[0]
        while (info := _signal.sigtimedwait(signals, 0)) is not None:
            tell("signal", number=info.si_signo, sender=info.si_pid, code=info.si_code)
        if readable and not os.read(pipe, 1):
            time.sleep(linger_s)
            os._exit(0)
