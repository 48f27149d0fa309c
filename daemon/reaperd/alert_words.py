"""Alerts in words: an event as a line, a message with its title, and why one was not sent.

Chat services read mentions, links and markup in what they are sent, and what is told of an event holds names that any user
has chosen: nothing of such a name may ring a channel, or hide where a link goes. And why a message was not sent is told in
words of ours alone: what a service or a library says may quote the URL, with the password in it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from reaperd.alert_groups import Message
from reaperd.ctl.render import what_happened
from reaperd.times import moment
from reaperd.words import plain

_MAX_LINE_CHARS, _MAX_NAME_CHARS = 300, 60
# Look alike, and mean nothing to a chat service.
_HARMLESS = str.maketrans(
    {
        "<": "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}",
        ">": "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}",
        "@": "\N{FULLWIDTH COMMERCIAL AT}",
        "&": "\N{FULLWIDTH AMPERSAND}",  # as "&commat;"
        "#": "\N{FULLWIDTH NUMBER SIGN}",
        "*": "\N{ASTERISK OPERATOR}",
        "|": "\N{BROKEN BAR}",
        "`": "'",
        "[": "(",
        "]": ")",
    }
)
_GRAVE = frozenset({"stuck", "breach"})
_ORDINARY = frozenset({"registered", "ended", "released", "reload", "started", "stopped"})


def harmless(text: str) -> str:
    """Return ``text`` on one line, without what a chat service or a terminal would act on."""
    return plain(text).translate(_HARMLESS).replace("://", ":/ /")


def line_of(event: Mapping[str, Any]) -> str:
    """Return one event as a line: when, who, and what has happened."""
    who = event.get("name") or event.get("session") or ""
    uid = event.get("uid")
    of_whom = f"uid {uid}" if event.get("session") and isinstance(uid, int) else ""
    left_out = event.get("processes_left_out")
    more = f"and {left_out} more processes" if left_out else ""
    facts = [str(who)[:_MAX_NAME_CHARS], of_whom, what_happened(event), more]
    text = harmless(", ".join(fact for fact in facts if fact) or str(event.get("kind")))
    return f"{_clock(str(event.get('at')))} {_cut(text)}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LINE_CHARS else f"{text[: _MAX_LINE_CHARS - 3]}..."


def _clock(at: str) -> str:
    when = moment(at)
    return when.strftime("%H:%M:%S") if when else "-"


def title_of(message: Message, host: str) -> str:
    """Return "Reaper on node7: 12 reaped, 1 stuck"."""
    return f"Reaper on {harmless(host)}: {_counts(message)}"


def _counts(message: Message) -> str:
    return ", ".join(f"{group.events} {group.kind}" for group in message)


def body_of(message: Message) -> str:
    """Return how many of what there were and since when, and the first few in detail."""
    blocks = []
    for group in message:
        more = group.events - len(group.lines)
        lines = [f"{group.events} {group.kind}:", *(f"- {line}" for line in group.lines)]
        if more:
            lines.append(
                f"- and {more} more, the last at {_clock(group.last_at)}"
                if group.lines
                else f"- {more}, without details"
            )
        blocks.append("\n".join(lines))
    since = min((group.first_at for group in message), default="")
    return "\n\n".join([*blocks, f"Times are UTC. More: reaperctl events --since {harmless(since)}"])


def gravity_of(kinds: Iterable[str]) -> str:
    """Return the gravest of some kinds of event, as Apprise has it: failure, warning or info."""
    found = set(kinds)
    return "failure" if found & _GRAVE else "info" if found <= _ORDINARY else "warning"


# -- why a message was not sent --------------------------------------------------------------------------

_ERRNO = re.compile(r"\[Errno (-?[0-9]{1,4})\]")
_HTTP = re.compile(r"(?:\berror=|\bcode[ =:]+|\bHTTP[ /=:]+)([0-9]{3})\b")
_SMTP = re.compile(r"\(([0-9]{3}), b?['\"]")
_SAID = (
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"),
        "the server's TLS certificate is not to be trusted",
    ),
    (re.compile(r"\bSSL|\bTLS"), "TLS failed"),
    (
        re.compile(r"Name or service not known|name resolution|getaddrinfo|NameResolutionError"),
        "the host's name cannot be resolved",
    ),
    (re.compile(r"[Tt]imed? ?out|TIMEOUT"), "it did not answer in time"),
    (re.compile(r"[Cc]onnection error|Connection refused|ConnectionError"), "the connection failed"),
    (re.compile(r"[Aa]uthentication|[Uu]nauthorized"), "the credentials were refused"),
)
NO_REASON = "the service did not take it"
NO_NETWORK = "no network may be used here (docs/alerts.md: what to add to the unit)"


def reason_in(said: str) -> str:
    """Return why a message was not sent, by what a library logged meanwhile; nothing of that is quoted but numbers."""
    numbers = [int(found) for found in _ERRNO.findall(said)]
    known = [number for number in numbers if number in errno.errorcode]
    if errno.EAFNOSUPPORT in known or errno.EPERM in known:
        return NO_NETWORK
    if known:
        return os.strerror(known[-1]).lower()
    for pattern, what in ((_HTTP, "the service answered HTTP {}"), (_SMTP, "the mail server answered {}")):
        if match := pattern.search(said):
            return what.format(match[1])
    return next((reason for pattern, reason in _SAID if pattern.search(said)), NO_REASON)
