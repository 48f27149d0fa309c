"""The commands about orphans without a daemon: the same engine, in this process and with the caller's own rights.

Nothing is remembered from one call to the next: since when somebody has been an orphan is known from this look on alone.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from typing import Any

from agent import wire
from reaperd import kinship, report
from reaperd.claims import Marks
from reaperd.config import ConfigError
from reaperd.config_files import read_config
from reaperd.ctl import USAGE, CommandError
from reaperd.hunt import Hunt
from reaperd.leftovers import leftovers_work
from reaperd.linux.procfs import ProcessGone, ProcFS
from reaperd.marks import MarkReader
from reaperd.model import ProcessId
from reaperd.orphans import Orphans
from reaperd.paths import default_paths
from reaperd.poller import Poller
from reaperd.reaper import Reaper
from reaperd.scan import Scan
from reaperd.settings import kill_policy, scan_rules
from reaperd.surroundings import why_unusable
from reaperd.verdicts import LEAST_SAMPLES, Record, Suspect

_WINDOW_S = 1.0  # over which CPU use is measured, for somebody waits


class _Forgetful:
    """Keeps no record: each call begins anew."""

    def orphans(self) -> dict[ProcessId, Record]:
        return {}

    def save_orphan(self, id_: ProcessId, record: Record) -> None:
        del id_, record

    def forget_orphan(self, id_: ProcessId) -> None:
        del id_

    def spared(self) -> frozenset[ProcessId]:
        return frozenset()

    def spare(self, id_: ProcessId) -> None:
        del id_

    def spare_no_longer(self, id_: ProcessId) -> None:
        del id_


class _Engine:
    """What a daemon has, for one question."""

    def __init__(self) -> None:
        try:
            config = read_config(os.environ.get("REAPER_CONFIG") or default_paths().config, required=False)
        except ConfigError as error:
            raise CommandError("; ".join(error.faults), USAGE) from None
        proc = ProcFS()
        if (why := why_unusable(proc)) is not None:
            raise CommandError(f"cannot look at processes from here: {why}")
        self.poller = Poller()
        self.marks = MarkReader(proc)
        self.marks.memory.keeps_helper = True
        ours = frozenset((proc.stat(os.getpid()).id, *kinship.ancestors(proc, os.getpid())))
        self.orphans = Orphans(
            proc,
            Scan(proc, self.marks),
            Reaper(proc, ours),
            self.poller,
            _Forgetful(),
            Marks(proc),
            lambda _: None,
        )
        rules = scan_rules(config)._replace(cpu_window_s=_WINDOW_S)
        self.orphans.heed(rules, kill_policy(config, ours, frozenset()))

    def measure(self) -> None:
        """Look several times, so that CPU use is known."""
        self.orphans.see()
        for _ in range(LEAST_SAMPLES):
            select.select([], [], [], _WINDOW_S / LEAST_SAMPLES)
            self.orphans.see()

    def close(self) -> None:
        """End the helper that reads others' memory."""
        self.marks.memory.close()


def ask(op: str, **fields: Any) -> dict[str, Any]:
    """Return what a daemon would reply to ``op``; WireError as it would refuse."""
    with contextlib.closing(_Engine()) as engine:
        return _OPERATIONS[op](engine, fields)


@contextlib.contextmanager
def watching() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Give what looks at the orphans again and again, and returns their records; since when they are is known from the first on."""
    with contextlib.closing(_Engine()) as engine:

        def look() -> list[dict[str, Any]]:
            engine.orphans.see()
            return _records(engine)

        engine.measure()
        yield look


def _records(engine: _Engine) -> list[dict[str, Any]]:
    return [engine.orphans.describe(one) for one in engine.orphans.listing() if _may(one.suspect)]


def leftovers(remove: list[str] | None) -> dict[str, Any]:
    """Return what the dead left in /dev/shm and in temporary folders, as ``leftovers_work()`` has it.

    With ``remove``, those that are to go, and whether they did.
    """
    uid = None if os.geteuid() == 0 else os.geteuid()
    return leftovers_work("/proc", uid=uid, remove=remove)()


def _may(one: Suspect) -> bool:
    return os.geteuid() in (0, one.process.uid)


def _list(engine: _Engine, fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("score"):
        raise wire.WireError("bad-request", "only a daemon keeps the score: leave --local out")
    engine.measure()
    return {"orphans": _records(engine), "leftovers": []}


def _explain(engine: _Engine, fields: dict[str, Any]) -> dict[str, Any]:
    pid = fields["pid"]
    engine.measure()
    try:
        told = engine.orphans.explain(pid)
    except ProcessGone:
        raise wire.WireError(
            "unknown-process",
            f"there is no process {pid}; a daemon would know the history of those that are gone",
        ) from None
    if not _may(told.suspect):
        raise wire.WireError("not-allowed", "that process is another user's")
    return {"explain": report.explanation(told.suspect, told.verdict, [])}


def _clean_up(engine: _Engine, fields: dict[str, Any]) -> dict[str, Any]:
    orphans = engine.orphans
    if fields.get("dry_run"):
        found = [one for one in orphans.cleanable() if _may(one.suspect)]
        return {"orphans": [orphans.describe(one) for one in found], "leftovers": []}
    outcomes: dict[ProcessId, str] = {}

    def note(hunt: Hunt) -> None:
        outcomes.update({id_: report.result_of(target) for id_, target in hunt.targets.items()})

    orphans.on_end = note
    wanted = [ProcessId(*pair) for pair in fields.get("processes", [])]
    found = orphans.clean_up(wanted, _may, by_uid=os.geteuid())
    while orphans.is_hunting():
        engine.poller.wait(orphans.wait_s())
        orphans.hunts.step()
    orphans.hunts.step()  # tells of those that ended last
    records = [{**orphans.describe(one), "result": outcomes.get(one.suspect.id, "kept")} for one in found]
    return {"orphans": records, "leftovers": [], "after": 0}


_OPERATIONS: dict[str, Callable[[_Engine, dict[str, Any]], dict[str, Any]]] = {
    "orphans": _list,
    "explain": _explain,
    "cleanup": _clean_up,
}
