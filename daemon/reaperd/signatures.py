"""How the frameworks' processes are recognised: a table, one row a kind of process. Pure.

The rules of this file:

1. A row is matched against single argv tokens: those that the interpreter itself reads, before the script's own arguments.
   A script that mentions joblib in an argument, or lies in a folder of that name, is no joblib worker.
2. A row that others than a pool can look like (a title, an inherited variable) is never ``certain``: who bears it without a
   living parent is told of, and left alone.
3. What a process does by itself when its parent is gone was measured, and is told to people; ``stays`` is for those that
   may never end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reaperd.model import Process, Role

TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # torch/distributed/elastic/agent/server/local_elastic_agent.py
COMM_CHARS = 15  # of a thread's name (TASK_COMM_LEN); titles are longer


class Signature(NamedTuple):
    """One kind of process. Each way to recognise it that a row does not use is empty."""

    framework: str
    role: Role
    alone: str  # what it does by itself once its parent is gone, in words
    option: str = ""  # the interpreter's option before the token: -m or -c
    begins: str = ""  # how that token begins
    script: str = ""  # how the path of the interpreter's script ends
    title: str = ""  # how argv[0] begins, where the process has retitled itself
    comm: str = ""  # the whole name of the main thread
    variable: str = ""  # is in its environment
    # That follow the interpreter's other options, or begin with the program itself.
    tokens: tuple[str, ...] = ()
    stays: bool = False  # may never end by itself
    certain: bool = True  # only a pool starts such a process, and nobody puts one into the background


_TRACKS = "ends once the last process that uses what it guards has ended"
_SPAWNED = "a Pool's ends after its current task; an executor's, and a Process, never does"

SIGNATURES = (
    # joblib/externals/loky/backend/popen_loky_posix.py, resource_tracker.py; standalone loky alike. 300 s idle, 30 s for a lock.
    *(
        Signature("loky", role, alone, option, begins)
        for package in ("joblib.externals.loky", "loky")
        for role, alone, option, begins in (
            (
                Role.WORKER,
                "ends about 330 s after its last queued task",
                "-m",
                f"{package}.backend.popen_loky_posix",
            ),
            (Role.TRACKER, _TRACKS, "-c", f"from {package}.backend.resource_tracker import main"),
        )
    ),
    # multiprocessing/spawn.py get_command_line, forkserver.py ensure_running, resource_tracker.py ensure_running; executors of
    # concurrent.futures, torch.multiprocessing, Dask's nannies start theirs so, too.
    Signature("multiprocessing spawn", Role.WORKER, _SPAWNED, "-c", "from multiprocessing.spawn import spawn_main", stays=True),
    Signature(
        "multiprocessing forkserver", Role.WORKER, _SPAWNED, "-c", "from multiprocessing.forkserver import main", stays=True
    ),
    Signature("multiprocessing", Role.TRACKER, _TRACKS, "-c", "from multiprocessing.resource_tracker import main"),
    # torch/utils/data/_utils/worker.py: the name of the main thread, as older and as newer releases give it.
    *(
        Signature("torch DataLoader", Role.WORKER, "ends within 5 s, unless a full pipe holds it: then never", comm=comm, stays=True)
        for comm in ("pt_data_worker", "pt_multiprocess")
    ),
    # A rank is the user's own script: the agent gives it the variable, and so has whatever the script starts.
    Signature("torchrun", Role.WORKER, "goes on until a collective operation fails", variable=TORCHRUN_VARIABLE, certain=False),
    # ray/_private/workers/default_worker.py, which retitles itself (ray/_raylet.pyx).
    Signature("Ray", Role.WORKER, "ends within seconds of its raylet, unless native code holds it", title="ray::"),
    Signature("Ray", Role.WORKER, "ends within seconds of its raylet", script="ray/_private/workers/default_worker.py"),
    # distributed/nanny.py, worker.py with setproctitle installed; a service, where somebody starts one by hand.
    Signature("Dask", Role.WORKER, "ends when the pipe to its nanny closes", title="dask worker [", certain=False),
    Signature("Dask", Role.WORKER, "looks for its scheduler until it is ended", title="dask nanny [", certain=False),
)  # fmt: skip

_OPTIONS_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")  # python(1)

FORKED = "forked"
OTHER = "other"


def recognise(process: Process) -> tuple[str, Role]:
    """Return the framework and role of ``process``; what no row matches is a worker of ``forked`` or ``other``."""
    found = find(process.comm, process.argv)
    if found is not None:
        return found.framework, found.role
    return (FORKED if process.forked else OTHER), Role.WORKER


def find(
    comm: str, argv: Sequence[str], variables: Sequence[str] = (), extra: Sequence[Signature] = ()
) -> Signature | None:
    """Return the first row that a process bears; ``variables`` are the names in its environment that were looked for."""
    option, token, script = _interpreted(argv)
    title = argv[0] if argv else ""
    for row in (*SIGNATURES, *extra):
        if (
            (row.begins and row.option == option and token.startswith(row.begins))
            or (row.comm and row.comm == comm)
            or (row.title and title.startswith(row.title))
            or (row.script and f"/{script}".endswith(f"/{row.script}"))
            or (row.variable and row.variable in variables)
            or (row.tokens and _has_tokens(argv, row.tokens))
        ):
            return row
    return None


def _interpreted(argv: Sequence[str]) -> tuple[str, str, str]:
    """Return the option that says what the interpreter runs with its token, or else the script."""
    words = iter(argv[1:])
    for word in words:
        if word in _OPTIONS_WITH_VALUE:
            next(words, "")
        elif word in ("-m", "-c"):
            return word, next(words, ""), ""
        elif not word.startswith("-"):  # the script's name: what follows are its arguments
            return "", "", word
    return "", "", ""


def _has_tokens(argv: Sequence[str], tokens: tuple[str, ...]) -> bool:
    """Say whether ``tokens`` follow one another in ``argv``, after nothing but the interpreter's own options."""
    if argv and argv[0].rpartition("/")[2] == tokens[0] and tuple(argv[1 : len(tokens)]) == tokens[1:]:
        return True
    at = 1
    while at < len(argv):
        if tuple(argv[at : at + len(tokens)]) == tokens:
            return True
        if not argv[at].startswith("-") or argv[at] in ("-m", "-c"):
            return False
        at += 2 if argv[at] in _OPTIONS_WITH_VALUE else 1
    return False
