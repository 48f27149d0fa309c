"""How much GPU memory processes hold.

The driver can hang for ever and its library can crash, so a forked helper asks them, never the core; one that stalls is
ended, and what it stalled at is left alone for a while. It is ended after every reading, too: what it has open keeps GPUs
awake and from being reset, and its memory is worth more than the time that the next one takes to start.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from reaperd.linux import helper, nvml
from reaperd.linux.alarm import Alarm
from reaperd.linux.procfs import MACHINES_PID_NAMESPACE, ProcFS
from reaperd.pauses import Pauses

log = logging.getLogger(__name__)

CONTROL_DEVICE = "/dev/nvidiactl"
_DRIVER = -1  # who is asked: all that they have in common, or one GPU by its number
_STALL_S = 0.25
_MAX_S = 0.5  # in one reading: then what is left is left
_MAX_GPUS = 64


class GpuMeter:
    """Reads the GPUs of this machine; those of NVIDIA, the others tell nothing of processes."""

    def __init__(self, proc: ProcFS | None = None, control_device: str = CONTROL_DEVICE) -> None:
        self._proc = proc or ProcFS()
        self._control_device = control_device
        self._failed = Pauses()
        self._told: dict[int, str] = {}  # the last reason that was logged
        self._answerer = helper.Answerer(_answer)

    @property
    def available(self) -> bool:
        """Say whether GPUs are looked at: there is a driver, and it was not found without its library or hanging."""
        return self._is_here() and _DRIVER not in self._failed

    def read(self, alarm: Alarm | None = None) -> dict[int, int]:
        """Return the bytes of GPU memory that processes hold, by pid, as far as it could be read before ``alarm`` rang.

        Who is missing holds none, or nobody knows how much.
        """
        if not self._is_here() or self._failed.until_s(_DRIVER) is not None:
            return {}
        try:
            return self._read(time.monotonic() + _MAX_S, alarm)
        finally:
            self._answerer.close()

    def _is_here(self) -> bool:
        # In another pid namespace many drivers tell pids of the machine's all the same: somebody else's here.
        ours = self._proc.pid_namespace(os.getpid())
        return os.path.exists(self._control_device) and ours == MACHINES_PID_NAMESPACE

    def _read(self, until_s: float, alarm: Alarm | None) -> dict[int, int]:
        held: dict[int, int] = {}
        count = self._ask(_DRIVER, until_s, alarm) or 0
        willing = [gpu for gpu in range(min(count, _MAX_GPUS)) if self._failed.until_s(gpu) is None]
        # The likeliest to stall last.
        for gpu in sorted(willing, key=self._failed.__contains__):
            if time.monotonic() >= until_s or (alarm is not None and alarm.rings()):
                break
            for pid, held_bytes in self._ask(gpu, until_s, alarm) or ():
                held[pid] = held.get(pid, 0) + held_bytes
        return held

    def _ask(self, who: int, until_s: float, alarm: Alarm | None) -> Any:
        """Return what the helper tells, None where it cannot; who keeps it waiting is left alone from now on."""
        left_s = until_s - time.monotonic()
        answers = self._answerer.ask([who], stall_s=_STALL_S, most_s=left_s, alarm=alarm)
        if answers is None or (not answers and alarm is not None and alarm.rings()):
            return None
        answer, reason = answers[0] if answers else (None, "no answer in time, or its library crashed")
        if reason is None:
            self._failed.forget(who)
            return answer
        # A GPU that tells why it fails costs no time; to start a helper in vain does.
        if who == _DRIVER or not answers:
            self._failed.begin(who)
        if reason != self._told.get(who):
            self._told[who] = reason
            log.debug(
                "cannot read GPU memory of %s: %s", "any GPU" if who == _DRIVER else f"GPU {who}", reason
            )
        return None


def _answer(who: int) -> tuple[Any, str | None]:
    """Return an answer, or why there is none; in the helper."""
    try:
        return nvml.count_gpus() if who == _DRIVER else list(nvml.read_held(who).items()), None
    except nvml.NvmlFailed as error:
        return None, str(error)
