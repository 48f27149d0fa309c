"""NVIDIA's management library, through nvidia-ml-py: which process holds how much memory of a GPU.

For a helper alone: a call can hang in state D, the library can crash whoever loaded it, and as long as it is open, no GPU
can be reset and none falls asleep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_KINDS = ("Compute", "Graphics", "MPSCompute")
# Version 2 first: it has had one layout in every driver since R460, while version 3 had another one in the first of R535.
_VERSIONS = ("v2", "v3")
_MAX_PID = 4 * 1024 * 1024  # PID_MAX_LIMIT, include/linux/threads.h
_MAX_GPU_BYTES = 1 << 44  # where a GPU does not tell how much it has
_MAX_INSTANCES = 64


class NvmlFailed(Exception):
    """The library is not here, or an answer of it is an error; the text says which."""


def count_gpus() -> int:
    """Load the library, if that was not done yet, and return how many GPUs it knows."""
    with _library() as nvml:
        return int(nvml.nvmlDeviceGetCount())


def read_held(index: int) -> dict[int, int]:
    """Return the bytes of GPU memory that each process holds on one GPU, by pid; who holds an unknown amount is left out."""
    held: dict[int, int] = {}
    with _library() as nvml:
        for part in _parts(nvml, nvml.nvmlDeviceGetHandleByIndex(index)):
            for pid, held_bytes in _held_in(nvml, part).items():
                held[pid] = held.get(pid, 0) + held_bytes
    return held


_opened: Any = None


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    global _opened
    try:
        import pynvml
    except ImportError:
        raise NvmlFailed("the Python module pynvml is not installed (nvidia-ml-py)") from None
    try:
        if _opened is None:
            pynvml.nvmlInit()
            _opened = pynvml
        yield pynvml
    except pynvml.NVMLError as error:
        raise NvmlFailed(str(error)) from None
    # A count or a size that no array can have, or another module of that name.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise NvmlFailed(f"its answer makes no sense: {error!r}") from None


def _parts(nvml: Any, gpu: Any) -> list[Any]:
    """Return what is to be asked about one GPU: itself, or where it is divided (MIG), its instances.

    Of a divided GPU as a whole only the privileged are told.
    """
    try:
        divided = nvml.nvmlDeviceGetMigMode(gpu)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # most cannot be divided, and old drivers know nothing of it
        divided = False
    if not divided:
        return [gpu]
    parts = []
    for place in range(min(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu), _MAX_INSTANCES)):
        with contextlib.suppress(nvml.NVMLError_NotFound):
            parts.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place))
    return parts


def _held_in(nvml: Any, part: Any) -> dict[int, int]:
    held: dict[int, int] = {}
    errors = []
    total_bytes = _total_bytes(nvml, part)
    for kind in _KINDS:
        try:
            processes = _running(nvml, kind, part)
        except nvml.NVMLError as error:
            errors.append(error)
            continue
        for process in processes:
            if 0 < process.pid <= _MAX_PID and 0 < (process.usedGpuMemory or 0) <= total_bytes:
                # Each list tells all that a process holds here: whoever computes and draws is in two of them.
                held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory)
    if len(errors) == len(_KINDS):
        raise errors[0]
    return held


def _total_bytes(nvml: Any, part: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(part).total)
    except nvml.NVMLError_NotSupported:  # it shares the memory of the machine
        return _MAX_GPU_BYTES


def _running(nvml: Any, kind: str, part: Any) -> list[Any]:
    for version in _VERSIONS:
        with contextlib.suppress(nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NotSupported):
            found: list[Any] = getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")(part)
            return found
    return []
