"""How the frameworks' processes are recognised: a table, one row a kind of process. Pure.

A row is matched against argv tokens after the interpreter, never against the whole command line: a script that
mentions joblib in an argument is no joblib worker.
"""

from __future__ import annotations

from typing import NamedTuple

from reaperd.model import Process, Role


class Signature(NamedTuple):
    """One kind of process."""

    framework: str
    role: Role
    flag: str  # the interpreter option that brings the token: -m or -c
    begins: str  # how the token after it begins


SIGNATURES = (
    # joblib/externals/loky/backend/popen_loky_posix.py, resource_tracker.py; standalone loky alike
    Signature("loky", Role.WORKER, "-m", "joblib.externals.loky.backend.popen_loky_posix"),
    Signature("loky", Role.WORKER, "-m", "loky.backend.popen_loky_posix"),
    Signature("loky", Role.TRACKER, "-c", "from joblib.externals.loky.backend.resource_tracker import main"),
    Signature("loky", Role.TRACKER, "-c", "from loky.backend.resource_tracker import main"),
    # multiprocessing/spawn.py get_command_line, forkserver.py ensure_running, resource_tracker.py ensure_running
    Signature("multiprocessing spawn", Role.WORKER, "-c", "from multiprocessing.spawn import spawn_main"),
    Signature("multiprocessing forkserver", Role.WORKER, "-c", "from multiprocessing.forkserver import main"),
    Signature("multiprocessing", Role.TRACKER, "-c", "from multiprocessing.resource_tracker import main"),
)

# Thread names are cut at 15 characters (TASK_COMM_LEN); torch/utils/data/_utils/worker.py.
THREAD_NAMES = {"pt_data_worker": "torch DataLoader", "pt_multiprocess": "torch DataLoader"}

_OPTIONS_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # python(1)

FORKED = "forked"
OTHER = "other"


def recognise(process: Process) -> tuple[str, Role]:
    """Return the framework and role of ``process``; what no row matches is a worker of ``forked`` or ``other``."""
    if process.comm in THREAD_NAMES:
        return THREAD_NAMES[process.comm], Role.WORKER
    words = iter(process.argv[1:])
    for option in words:
        if option in _OPTIONS_WITH_VALUE:
            next(words, "")
        elif option in ("-m", "-c"):
            token = next(words, "")
            for row in SIGNATURES:
                if option == row.flag and token.startswith(row.begins):
                    return row.framework, row.role
            break
        elif not option.startswith("-"):  # the script's name: what follows are its arguments
            break
    return (FORKED if process.forked else OTHER), Role.WORKER
