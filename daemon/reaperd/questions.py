"""What somebody asks of the history: read from a request, and as SQL that no length of the history makes slow. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agent import wire

_MOST_KINDS, _LONGEST_KIND = 32, 64
_HIGHEST_UID = 2**32 - 1


class Question(NamedTuple):
    """Which events somebody asks for; an event must meet all of it."""

    after: int = 0  # the number of the last one that it has seen
    since_epoch_s: float = 0.0
    session: str | None = None  # None: of any
    uid: int | None = None  # whose it may see, beside the daemon's own; None: everybody's
    container: str = ""  # of whose ``uid``, for that is another's in each; "": of any
    owner: int | None = None  # whose alone; None: of all whom it may see, and the daemon's own
    kinds: tuple[str, ...] = ()  # (): of any

    def covers(self, seq: int, at_epoch_s: float, event: Mapping[str, Any]) -> bool:
        """Say whether an event is one of those asked for."""
        return (
            seq > self.after
            and at_epoch_s >= self.since_epoch_s
            and self.session in (None, event["session"])
            and (self.uid is None or event["uid"] in (None, self.uid))
            and (self.owner is None or event["uid"] == self.owner)
            and (not self.kinds or event["kind"] in self.kinds)
            and is_of(self.container, event)
        )


def is_of(container: str, event: Mapping[str, Any]) -> bool:
    """Say whether an event may be told to one of ``uid`` in a container: it is of the same one, or the daemon's own."""
    return not container or event.get("uid") is None or event.get("container") == container


def parse_question(
    message: dict[str, Any], *, since_epoch_s: float, uid: int | None, container: str
) -> Question:
    """Return what a request asks, of somebody who may see what is ``uid``'s in ``container``; WireError ``bad-request``."""
    session = wire.text_field(message, "session", limit=64) if message.get("session") is not None else None
    owner = message.get("owner")
    if owner is not None and (type(owner) is not int or not 0 <= owner <= _HIGHEST_UID):
        raise wire.WireError("bad-request", f"owner: must be a uid, got {owner!r:.60}")
    return Question(
        wire.integer_field(message, "after", default=0),
        since_epoch_s,
        session,
        uid,
        container,
        owner,
        _kinds(message.get("kinds")),
    )


def _kinds(value: Any) -> tuple[str, ...]:
    """Return the kinds asked for; one that is not known here may be a later version's, and there are none of it."""
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= _MOST_KINDS
        or not all(isinstance(kind, str) and 0 < len(kind) <= _LONGEST_KIND for kind in value)
    ):
        raise wire.WireError(
            "bad-request", f"kinds: must be a list of 1 to {_MOST_KINDS} kinds of event, got {value!r:.60}"
        )
    return tuple(dict.fromkeys(value))


def select_events(asked: Question, first_seq: int, limit: int) -> tuple[str, list[Any]]:
    """Return a statement and its values for the first ``limit`` events asked for, number and record, oldest first.

    ``first_seq`` is the number of the first event that is young enough.
    """
    where = ["seq > ?", "at_epoch_s >= ?"]
    values: list[Any] = [max(asked.after, first_seq - 1), asked.since_epoch_s]
    if asked.session is not None:
        where.append("session = ?")
        values.append(asked.session)
    parts = [
        (
            " AND ".join([*where, *(words for words, _ in (whose, which) if words)]),
            [*values, *whose[1], *which[1]],
        )
        for whose in _whose(asked)
        for which in _which(asked)
    ]
    # Each by its index, in order and no further than the limit, and its number alone: OR and IN would read all there is.
    one = "SELECT * FROM (SELECT seq FROM events WHERE {} ORDER BY seq LIMIT ?)"
    numbers = " UNION ALL ".join(one.format(words) for words, _ in parts)
    return (
        f"SELECT seq, record FROM events WHERE seq IN ({numbers}) ORDER BY seq LIMIT ?",  # noqa: S608 - literals
        [*(value for _, found in parts for value in (*found, limit)), limit],
    )


_Condition = tuple[str, Sequence[Any]]


def _whose(asked: Question) -> list[_Condition]:
    """Return the conditions of which an event meets one; with a session, none of them may choose the index."""
    column = "uid" if asked.session is None else "+uid"
    theirs: _Condition = (f"{column} = ?", [asked.uid])
    if asked.container:
        theirs = (
            f"{column} = ? AND record LIKE ?",
            [asked.uid, f'%"container": {json.dumps(asked.container)}%'],
        )
    if asked.owner is not None:
        if asked.uid is None:
            return [(f"{column} = ?", [asked.owner])]
        return [theirs] if asked.uid == asked.owner else [("FALSE", [])]
    return [("", [])] if asked.uid is None else [(f"{column} IS NULL", []), theirs]


def _which(asked: Question) -> list[_Condition]:
    if asked.session is not None and asked.kinds:  # a session has few events, of whatever kind
        return [(f"+kind IN ({', '.join('?' * len(asked.kinds))})", asked.kinds)]
    return [("kind = ?", [kind]) for kind in asked.kinds] or [("", [])]
