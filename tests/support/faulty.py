"""Runs ``reaperd`` on a machine that runs out of memory or files at any moment: while it is told to, its functions fail.

``faulty.py KIND SEED GAP COMMAND...``: SIGUSR1 begins and SIGUSR2 ends a bad time, in which one call of ours in at most GAP raises
what the kernel or Python would: ``memory`` MemoryError, ``files`` ENFILE. COMMAND is how the daemon is started elsewhere.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import random
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

FAULTS: dict[str, Callable[[], Exception]] = {
    "memory": MemoryError,
    "files": lambda: OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
}


class Faults:
    """When the next call fails."""

    def __init__(self, fault: Callable[[], Exception], seed: int, most: int) -> None:
        self._fault = fault
        self._random = random.Random(seed)
        self._most = most
        self._is_bad = False
        self._left = 0  # calls to the next that fails

    def begin(self, *_: object) -> None:
        self._draw()
        self._is_bad = True

    def end(self, *_: object) -> None:
        self._is_bad = False

    def _draw(self) -> None:
        self._left = self._random.randint(20, self._most)

    def in_all_of(self, module: ModuleType, wrapped: dict[Any, Any]) -> None:
        """Have every function and method of ``module`` fail now and then."""
        for owner in (module, *(one for one in vars(module).values() if inspect.isclass(one))):
            if owner is not module and owner.__module__ != module.__name__:
                continue
            for name, value in list(vars(owner).items()):
                function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                if not inspect.isfunction(function) or name.startswith("__") or function is not value:
                    continue
                if function.__module__.startswith("reaperd."):
                    if function not in wrapped:
                        wrapped[function] = self._failing(function)
                    setattr(owner, name, wrapped[function])

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if self._is_bad:
                self._left -= 1
                if self._left <= 0:
                    self._draw()
                    raise self._fault()
            return function(*arguments, **named)

        return call


def main() -> None:
    kind, seed, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = sys.argv[sys.argv.index("reaperd") + 1 :]
    from reaperd import __main__ as daemon

    faults = Faults(FAULTS[kind], seed, most)
    wrapped: dict[Any, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("reaperd"):
            faults.in_all_of(module, wrapped)
    signal.signal(signal.SIGUSR1, faults.begin)
    signal.signal(signal.SIGUSR2, faults.end)
    daemon.main(options)


if __name__ == "__main__":
    main()
