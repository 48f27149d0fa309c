"""``reaperctl cleanup``: shows the orphans, asks, has exactly those ended that it showed, and tells what became of each.

A process is named by pid and start time from the first answer on: who has taken over the pid of one meanwhile is safe.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from agent import wire
from reaperd.ctl import DONE, FAILED, USAGE, CommandError, render_orphans
from reaperd.ctl.commands import user_of
from reaperd.ctl.link import Link, follow
from reaperd.ctl.orphans import Ask, ask_here, complete, document, identity
from reaperd.ctl.terminal import look_of_stdout, put, put_json, tell
from reaperd.ctl.units import list_of, number_of, plural, text_of

_ROOM_BYTES = wire.MAX_REQUEST_BYTES - 512  # beside the other fields of a request
_EXCEPT = "except"  # the rule that spares whom the caller named
_TELL = ("killed", "stuck")  # the kinds of event that say what became of an orphan

Id = tuple[int, int]
Follow = Callable[[int], Iterable[dict[str, Any]]]  # the events after a number


class Target(NamedTuple):
    """What is to be ended and removed, as it was shown."""

    processes: dict[Id, dict[str, Any]]
    leftovers: dict[str, dict[str, Any]]

    def __bool__(self) -> bool:
        return bool(self.processes or self.leftovers)

    def in_words(self) -> str:
        """Return what is asked: "End these 4 processes and remove 2 leftovers"."""
        parts = []
        if self.processes:
            these = "this process" if len(self.processes) == 1 else f"these {len(self.processes)} processes"
            parts.append(f"end {these}")
        if self.leftovers:
            parts.append(f"remove {plural(len(self.leftovers), 'leftover')}")
        text = " and ".join(parts)
        return text[:1].upper() + text[1:]


def cleanup(options: Namespace) -> int:
    """End the orphans, after a look at them."""
    if not (options.dry_run or options.yes or (_can_ask() and not options.json)):
        why = "prints nothing that could be asked about" if options.json else "cannot ask without a terminal"
        raise CommandError(f"cleanup {why}: say --yes to end the orphans, or --dry-run to see them", USAGE)
    link = None if options.local else Link.of(options)
    ask = complete(link.ask if link else ask_here, options.owner)
    reply = ask("cleanup", dry_run=True, leftovers=options.leftovers)
    reply["orphans"] = [_left_out(one, options.leave) for one in list_of(reply, "orphans")]
    target = target_of(reply)
    if not options.json:
        _show(reply, target, options)
    if options.dry_run or not target:
        if options.json:
            put_json(_document(list_of(reply, "orphans"), list_of(reply, "leftovers"), reply, options))
        return DONE
    if not options.yes and not _agreed(target):
        put("nothing was ended")
        return FAILED
    until_s = time.monotonic() + options.wait

    def news(after: int) -> Iterable[dict[str, Any]]:
        return follow(link, after=after, on_lost=tell, until=until_s) if link else ()

    done = carry_out(target, ask, news)
    if options.json:
        spared = [record for record in list_of(reply, "orphans") if identity(record) not in target.processes]
        put_json(
            _document([*done.processes.values(), *spared], list(done.leftovers.values()), reply, options)
        )
    else:
        _tell_outcome(done, options.wait)
    return FAILED if _remains(done) else DONE


def _document(processes: list[Any], leftovers: list[Any], reply: Any, options: Namespace) -> Any:
    return document(processes, leftovers, list_of(reply, "withheld"), with_leftovers=options.leftovers)


def _left_out(record: Any, leave: list[int]) -> Any:
    """Return a record as it is, or as that of one that is to be left alone."""
    if text_of(record, "verdict") != "kill" or number_of(record, "pid") not in leave:
        return record
    evidence = [*list_of(record, "evidence")[:-1], "you said to leave it alone"]
    return {**record, "verdict": "spare", "rule": _EXCEPT, "evidence": evidence}


def target_of(reply: Any) -> Target:
    """Return whom a dry run would have ended."""
    processes = {
        id_: record
        for record in list_of(reply, "orphans")
        if text_of(record, "verdict") == "kill" and (id_ := identity(record)) is not None
    }
    leftovers = {
        path: one
        for one in list_of(reply, "leftovers")
        if (path := text_of(one, "path")) and text_of(one, "result") != "kept"
    }
    return Target(processes, leftovers)


# -- asking the person ----------------------------------------------------------------------------


def _can_ask() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _show(reply: Any, target: Target, options: Namespace) -> None:
    look = look_of_stdout()
    lines: list[str] = []
    if target.processes:
        lines += render_orphans.table(list(target.processes.values()), look, user_of=user_of)
    spared = [record for record in list_of(reply, "orphans") if identity(record) not in target.processes]
    spared = [
        record for record in spared if render_orphans.is_orphan(record) or text_of(record, "rule") == _EXCEPT
    ]
    if spared:
        lines += [
            *([""] if lines else []),
            "left alone:",
            *render_orphans.table(spared, look, user_of=user_of),
        ]
    if target.leftovers:
        lines += [
            *([""] if lines else []),
            *render_orphans.leftovers(list(target.leftovers.values()), look, user_of=user_of),
        ]
    if withheld := render_orphans.withheld(list_of(reply, "withheld"), look):
        lines += [*([""] if lines else []), *withheld]
    if not target:
        none = "nothing to clean up"
        if not spared:
            none += ": no orphan" + (", and no leftover" if options.leftovers else "")
        lines += [*([""] if lines else []), none]
    elif options.dry_run:
        asked = target.in_words()
        lines += ["", f"dry run: would {asked[:1].lower()}{asked[1:]}"]
    else:
        lines.append("")
    put(lines)


def _agreed(target: Target) -> bool:
    sys.stdout.flush()  # what is asked about may be on its way through a pipe
    print(f"{target.in_words()}? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # Ctrl-D: the cursor still stands behind the question
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


# -- having it done -------------------------------------------------------------------------------


def carry_out(target: Target, ask: Ask, news: Follow) -> Target:
    """Have ``target`` ended, and return it with what became of each as its ``result``; None for what was not told."""
    done = Target(
        {**target.processes}, {path: {**one, "result": "kept"} for path, one in target.leftovers.items()}
    )
    waiting: set[Id] = set()
    after = None
    for processes, paths in _requests(target):
        reply = ask("cleanup", processes=[list(id_) for id_ in processes], leftovers=paths)
        waiting |= _taken(reply, processes, done)
        last = number_of(reply, "after")
        if after is None and last is not None:
            after = int(last)
    if waiting:
        for one in news(after or 0):
            waiting -= _told(one, waiting, done)
            if not waiting:
                break
    return done


def _requests(target: Target) -> Iterator[tuple[list[Id], list[str]]]:
    """Yield what to ask for, so that each request is no longer than the daemon allows."""
    processes: list[Id] = []
    paths: list[str] = []
    used_bytes = 0
    items: list[Id | str] = [*target.processes, *target.leftovers]
    for item in items:
        needed_bytes = len(json.dumps(item)) + 2  # in ASCII: never shorter than what is sent
        if needed_bytes > _ROOM_BYTES:
            continue
        if used_bytes + needed_bytes > _ROOM_BYTES:
            yield processes, paths
            processes, paths, used_bytes = [], [], 0
        used_bytes += needed_bytes
        if isinstance(item, str):
            paths.append(item)
        else:
            processes.append(item)
    if processes or paths:
        yield processes, paths


def _taken(reply: Any, asked: list[Id], done: Target) -> set[Id]:
    """Note what a reply says already, and return those of which an event will tell."""
    for one in list_of(reply, "leftovers"):
        path = text_of(one, "path")
        if path in done.leftovers:
            done.leftovers[path] = one
    records = {identity(record): record for record in list_of(reply, "orphans")}
    waiting = set()
    for id_ in asked:
        record = records.get(id_)
        if record is None:  # nothing is known of it any more
            done.processes[id_] = {**done.processes[id_], "result": "exited"}
        elif text_of(record, "result"):
            done.processes[id_] = record
        elif text_of(record, "verdict") == "kill":
            waiting.add(id_)
        else:  # judged otherwise since it was shown
            done.processes[id_] = {**record, "result": "kept"}
    return waiting


def _told(one: Any, waiting: set[Id], done: Target) -> set[Id]:
    """Note what an event tells of those who are waited for, and return of whom it did."""
    if text_of(one, "kind") not in _TELL:
        return set()
    told = set()
    for process in list_of(one, "processes"):
        id_ = identity(process)
        if id_ in waiting and text_of(process, "result"):
            told.add(id_)
            ended = {key: process.get(key) for key in ("result", "signals")}
            done.processes[id_] = {**done.processes[id_], **ended}
    return told


def _tell_outcome(done: Target, wait_s: float) -> None:
    look = look_of_stdout()
    for record in done.processes.values():
        put(render_orphans.outcome(record, look))
    for one in done.leftovers.values():
        put(render_orphans.leftover_outcome(one, look))
    unknown = [record for record in done.processes.values() if not text_of(record, "result")]
    if unknown:
        tell(
            f"{plural(len(unknown), 'process')} had not ended after {wait_s:g} s; "
            "`reaperctl orphans` shows what is left"
        )


def _remains(done: Target) -> bool:
    return any(map(render_orphans.remains, done.processes.values())) or any(
        text_of(one, "result") != "removed" for one in done.leftovers.values()
    )
