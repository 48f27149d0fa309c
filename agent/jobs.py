"""Work that takes longer than a page may take to be drawn: it goes on in a thread, whatever becomes of the page meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One piece of work, begun when it is made; every drawing of the page looks at how far it is.

    A page is drawn again and again, and may be interrupted at any of its lines: what must be done to its end cannot be done there.
    """

    def __init__(self, what: str, work: Callable[[], T]) -> None:
        """Begin ``work``; ``what`` is it in words, as in "Cleaning up"."""
        self.what = what
        self._began_s = time.monotonic()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._work = work
        # One that waits must not keep the server from ending.
        threading.Thread(target=self._run, name=f"reaper-{what}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again where somebody asks for the result
            self._error = error
        finally:
            self._over.set()

    @property
    def over(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self._over.is_set()

    @property
    def lasted_s(self) -> float:
        """For how long it has been going on."""
        return time.monotonic() - self._began_s

    def wait(self, within_s: float) -> bool:
        """Wait for its end, and say whether it came."""
        return self._over.wait(within_s)

    def failed_in_words(self, *expected: type[BaseException]) -> str:
        """Return why it has failed, once it is over; "" where it has not. What is not ``expected`` is told with its type."""
        self._over.wait()
        if self._error is None:
            return ""
        said = str(self._error) if isinstance(self._error, expected) else ""
        return said[:1].upper() + said[1:] or f"{self.what} has failed: {self._error!r}"

    def result(self) -> T:
        """Return what came of it once it is over, or raise what it raised."""
        self._over.wait()
        if self._error is not None:
            raise self._error
        return self._result[0]
