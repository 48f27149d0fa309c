"""Trees of files that a scan reads as it would read /proc, of more processes than a host is to be given. Nothing in them runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Of so many processes; the rest are programs of which a scan learns no more than their names.
_OF = 1000
POOLED = 10  # workers of pools: the first is an orphan, the others' leader lives
_SCRIPTS = 90  # further interpreters, the first of which is that leader
_SERVICES = 2  # of those are init's children
_SHELLS = 100
# Only of workers the kernel is asked, by a pidfd: the others need no pid that anybody has.
_FIRST_PID = 1_000_000

_PYTHON = "/usr/bin/python3.11"
# As proc_pid_stat(5) has it. Init is a tick older than the others, and all are older than what a scan takes for new.
_STAT = (
    "{pid} ({comm}) S {ppid} {sid} {sid} 0 -1 4194304 2096 0 0 0 11 7 0 0 20 0 1 0 {start} 452046848 31334"
    " 18446744073709551615 94259681083392 94259681103273 140724823824320 0 0 0 0 16781312 134234626 0 0 0 17 0 0 0"
    " 0 0 0 94259681119280 94259681120896 94259791159296 140724823829206 140724823829226 140724823829226"
    " 140724823830507 0\n"
)
_TEXTS = {
    "worker": f"{_PYTHON}\0-m\0joblib.externals.loky.backend.popen_loky_posix\0--process-name\0LokyProcess-1\0",
    "script": f"{_PYTHON}\0/home/somebody/project/train.py\0--epochs\090\0",
    "environ": f"PATH=/usr/local/bin:/usr/bin:/bin\0LS_COLORS={'rs=0:di=01;34:ln=01;36:mh=00:pi=40;33:' * 32}\0",
    "cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n",
}


class _One(NamedTuple):
    """A process that is made up."""

    pid: int
    comm: str
    kind: str
    ppid: int
    sid: int


def build(path: str, sizes: Sequence[int], workers: Sequence[int]) -> dict[int, str]:
    """Make a tree below ``path`` for each of ``sizes``, and return where it is; ``workers`` are pids of real processes.

    They share their files, by hard links: on tmpfs(5) each takes a page.
    """
    processes = list(_processes(max(sizes), workers))
    texts = os.path.join(path, "texts")
    os.mkdir(texts)
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        for name, text in {**_TEXTS, "status": status.read()}.items():
            _write(f"{texts}/{name}", text)
    for one in processes:
        start = int(one.pid != 1)
        _write(f"{texts}/{one.pid}", _STAT.format(**one._asdict(), start=start))
    trees = {size: os.path.join(path, f"proc{size}") for size in sizes}
    for size, tree in trees.items():
        os.mkdir(tree)
        for one in processes[:size]:
            _make(f"{tree}/{one.pid}", texts, one)
        children = (str(one.pid) for one in processes[:size] if one.ppid == 1)
        _write(f"{tree}/1/task/1/children", " ".join(children))
    return trees


def _make(folder: str, texts: str, one: _One) -> None:
    task = f"{folder}/task/{one.pid}"
    os.mkdir(folder)
    os.link(f"{texts}/{one.pid}", f"{folder}/stat")
    if one.kind in ("worker", "script"):
        os.makedirs(task)
        os.link(f"{texts}/{one.kind}", f"{task}/cmdline")
        os.link(f"{texts}/environ", f"{task}/environ")
        os.symlink(_PYTHON, f"{folder}/exe")
    if one.kind in ("worker", "shell"):
        os.link(f"{texts}/status", f"{folder}/status")
    if one.kind == "worker":
        os.link(f"{texts}/cgroup", f"{folder}/cgroup")
    if one.kind == "init":
        os.makedirs(task)
        os.symlink("/usr/lib/systemd/systemd", f"{folder}/exe")


def _processes(total: int, workers: Sequence[int]) -> Iterator[_One]:
    """Yield init, and then thousands that are alike."""
    yield _One(1, "systemd", "init", 0, 1)
    for at in range(0, total, _OF):
        first = _FIRST_PID + at
        shell = first + _SCRIPTS
        orphan, *pool = workers[at // _OF * POOLED :][:POOLED]
        yield _One(orphan, "python3", "worker", 1, first)
        yield from (_One(worker, "python3", "worker", first, first) for worker in pool)
        for number in range(_OF - POOLED):
            pid = first + number
            if number < _SCRIPTS:
                yield _One(pid, "python3", "script", 1 if 1 <= number <= _SERVICES else shell, first)
            elif number < _SCRIPTS + _SHELLS:
                yield _One(pid, "bash", "shell", 1, first)
            else:
                yield _One(pid, "program", "other", shell, first)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
