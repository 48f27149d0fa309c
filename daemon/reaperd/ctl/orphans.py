"""The commands about processes that no session claims: which they are, why each is judged so, and who is spared."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from agent import wire
from reaperd.ctl import DONE, USAGE, CommandError, render_orphans
from reaperd.ctl.commands import user_of
from reaperd.ctl.link import Link, NoDaemonError, refused
from reaperd.ctl.terminal import look_of_stdout, put, put_json
from reaperd.ctl.units import list_of, number_of

Ask = Callable[..., dict[str, Any]]


def asker(options: Namespace) -> Ask:
    """Return what answers: the daemon, or with --local the same rules in this process."""
    return complete(ask_here if options.local else Link.of(options).ask, options.owner)


def complete(ask: Ask, owner: int | None) -> Ask:
    """Return ``ask``, with what concerns leftovers done here: with the caller's rights, whoever is asked for the rest.

    Of both, only what is ``owner``'s is told, unless that is None.
    """

    def asked(op: str, *, leftovers: bool | list[str] = False, **fields: Any) -> dict[str, Any]:
        try:
            reply = ask(op, **fields)
        except NoDaemonError as error:
            raise (error if "score" in fields else error.or_here()) from None  # only a daemon keeps the score
        if leftovers:
            from reaperd.ctl import local

            reply = {**reply, **local.leftovers(None if leftovers is True else leftovers)}
        if owner is None:
            return reply
        theirs = {
            key: [one for one in list_of(reply, key) if number_of(one, "uid") == owner]
            for key in ("orphans", "leftovers")
        }
        return {**reply, **theirs}

    return asked


def ask_here(op: str, **fields: Any) -> dict[str, Any]:
    """Return what a daemon would reply; it is looked and acted with the caller's own rights."""
    from reaperd.ctl import local

    try:
        return local.ask(op, **fields)
    except wire.WireError as error:
        raise refused(error) from None


def orphans(options: Namespace) -> int:
    """Print the orphans, what would become of them, and why."""
    ask = asker(options)
    look = look_of_stdout()
    if options.score:
        if options.owner is not None:
            raise CommandError("orphans --score counts for all whom you may see: leave --owner out", USAGE)
        score = ask("orphans", score=True).get("score")
        if options.json:
            put_json(score)
        else:
            put(render_orphans.score(score, look))
        return DONE
    reply = ask("orphans", leftovers=options.leftovers)
    found, leftovers = list_of(reply, "orphans"), list_of(reply, "leftovers")
    withheld = list_of(reply, "withheld")
    if options.json:
        put_json(document(found, leftovers, withheld, with_leftovers=options.leftovers))
        return DONE
    put(render_orphans.orphans(found, look, everything=options.all, user_of=user_of))
    if options.leftovers:
        put(["", *render_orphans.leftovers(leftovers, look, user_of=user_of)])
        put(render_orphans.withheld(withheld, look))
    return DONE


def document(found: list[Any], leftovers: list[Any], withheld: list[Any], *, with_leftovers: bool) -> Any:
    """Return what --json prints: the processes alone unless the leftovers were asked for, too."""
    return {"orphans": found, "leftovers": leftovers, "withheld": withheld} if with_leftovers else found


def explain(options: Namespace) -> int:
    """Print how one process is judged, and on what evidence."""
    found = asker(options)("explain", pid=options.pid).get("explain")
    if options.json:
        put_json(found)
    else:
        put(render_orphans.explanation(found, look_of_stdout()))
    return DONE


def protect(options: Namespace) -> int:
    """Have one running process left alone."""
    undo = {"undo": True} if options.undo else {}
    reply = Link.of(options).ask("protect", pid=options.pid, **undo)
    if options.json:
        put_json(_process(reply, "name"))
    else:
        put(render_orphans.protected(reply, undo=options.undo))
    return DONE


def release(options: Namespace) -> int:
    """Let a process go on that was stopped, and leave it alone."""
    reply = Link.of(options).ask("release", pid=options.pid)
    if options.json:
        put_json(_process(reply))
    else:
        put(render_orphans.released(reply))
    return DONE


def ask_about(link: Link, op: str, pid: int | None, start_ticks: int | None, **fields: Any) -> dict[str, Any]:
    """Ask the daemon for ``protect`` or ``release`` of exactly this process; CommandError where another has its pid by now."""
    if pid is None or start_ticks is None:
        raise CommandError("the daemon has not told which process that is")
    reused = CommandError(f"process {pid} has ended, and another one has its pid")
    if op == "release":  # by a daemon that passes over the start time: it could not be undone
        by_now = map(identity, list_of(link.ask("orphans"), "orphans"))
        if any(one[0] == pid and one[1] != start_ticks for one in by_now if one is not None):
            raise reused
    reply = link.ask(op, pid=pid, start_ticks=start_ticks, **fields)
    if number_of(reply, "start_ticks") != start_ticks:  # said by a daemon that passes over the field
        if op == "protect" and not fields.get("undo"):
            link.ask("protect", pid=pid, undo=True)
        raise reused
    return reply


def _process(reply: dict[str, Any], *more: str) -> dict[str, Any]:
    return {key: reply.get(key) for key in ("pid", "start_ticks", *more)}


def identity(record: Any) -> tuple[int, int] | None:
    """Return pid and start time of a record; None where it does not name one process for good."""
    pid, ticks = number_of(record, "pid"), number_of(record, "start_ticks")
    return None if pid is None or ticks is None else (int(pid), int(ticks))
