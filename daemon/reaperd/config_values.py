"""The kinds of values that ``reaper.toml`` knows: how each is read from TOML, and written so that it reads back the same.

Pure, and without a word about which settings there are: those are in ``config``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_args


class Fault(NamedTuple):
    """One thing to put right: ``what`` is the rule that was broken, as "must be ..."."""

    where: str  # the place inside the value, "" for the value itself
    what: str
    got: tuple[object] | tuple[()] = ()  # the value, where showing it helps


class RefusedError(Exception):
    """A value that breaks its rule; ``faults`` are all the places where it does."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def inside(self, place: str) -> list[Fault]:
        """Return the faults as they read from outside: ``place`` is a key or "entry 2"."""
        return [f._replace(where=f"{place}: {f.where}" if f.where else place) for f in self.faults]


class Kind(NamedTuple):
    """How values of one kind are read from what TOML gives, and written."""

    parse: Callable[[object], Any]  # raises RefusedError
    render: Callable[[Any], str]  # TOML that ``parse`` reads back as the same value


def must_be(rule: str, value: object) -> RefusedError:
    """Return, to be raised, the refusal of ``value``, which will be shown to people; ``rule`` follows "must be"."""
    return RefusedError(Fault("", f"must be {rule}", (value,)))


class _Range(NamedTuple):
    more_than: float | None = None
    at_least: float | None = None
    at_most: float = 1_000_000
    show: Callable[[Any], str] = str

    def check(self, number: float, value: object) -> None:
        """Raise RefusedError, showing ``value``, unless ``number`` is in range.

        Written as "not inside" so that NaN, which compares false with everything, falls out, and with
        no conversion, for ``float()`` of an integer of a thousand digits overflows.
        """
        if self.more_than is not None and not number > self.more_than:
            raise must_be(f"more than {self.show(self.more_than)}", value)
        if self.at_least is not None and not number >= self.at_least:
            raise must_be(f"at least {self.show(self.at_least)}", value)
        if not number <= self.at_most:
            raise must_be(f"at most {self.show(self.at_most)}", value)


def _number(value: object, read: Callable[[str], float | None], rule: str) -> int | float:
    """Return a number as it is and text as ``read`` has it; isinstance would let booleans in."""
    number = read(value) if isinstance(value, str) else value
    if type(number) is int or type(number) is float:
        return number
    raise must_be(rule, value)


_AMOUNT = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"  # bounded, so that no text takes long


# -- durations: seconds as a number, or text in units from weeks to milliseconds, larger ones first ----

_UNITS_MS = {
    "w|weeks?": 604_800_000,
    "d|days?": 86_400_000,
    "h|hours?": 3_600_000,
    "m|mins?|minutes?": 60_000,
    "s|secs?|seconds?": 1_000,
    "ms|milliseconds?": 1,
}
_DURATION = re.compile("".join(f"(?:{_AMOUNT} ?(?:{unit}) ?)?" for unit in _UNITS_MS))
_RENDERED_MS = {"d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1_000, "ms": 1}
_TEN_YEARS_S = 3650 * 86_400


def duration(*, more_than: float | None = None, at_least: float | None = None) -> Kind:
    """Seconds as a number or text with units, parsed to a float of seconds; the bounds are seconds, ten years the most."""
    allowed = _Range(more_than, at_least, _TEN_YEARS_S, lambda s: _duration_text(s) if s else "0 s")

    def parse(value: object) -> float:
        number = _number(value, _seconds_in, 'seconds, or text such as "30s", "5min" or "1h30min"')
        allowed.check(number, value)
        return float(number)

    return Kind(parse, _render_duration)


def _seconds_in(text: str) -> float | None:
    match = _DURATION.fullmatch(text)
    if match is None or not any(match.groups()):
        return None
    amounts = [float(amount or 0) for amount in match.groups()]
    return sum(amount * ms for amount, ms in zip(amounts, _UNITS_MS.values(), strict=True)) / 1000


def _render_duration(seconds: float) -> str:
    text = _duration_text(seconds)
    return f'"{text}"' if _seconds_in(text) == seconds else repr(seconds)


def _duration_text(seconds: float) -> str:
    """Return ``seconds`` in whole units, rounded to a millisecond: "1h30min"."""
    left, text = round(seconds * 1000), ""
    for unit, ms in _RENDERED_MS.items():
        count, left = divmod(left, ms)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


# -- sizes: bytes as a number, or text; KB is 1000, KiB, and K alone as systemd has it, is 1024 --------

_SIZE = re.compile(rf"{_AMOUNT} ?(?:([kmgt])(i?b?)|b)", re.IGNORECASE)
_MAX_BYTES = 2**60


def _bytes_in(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    amount, prefix, rest = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    unit: int = (1000 if (rest or "").lower() == "b" else 1024) ** power
    return round(float(amount) * unit) if "." in amount else int(amount) * unit


def _size_text(count: int) -> str:
    for unit, one in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count and count % one == 0:
            return f"{count // one}{unit}"
    return f"{count}B"


def _parse_size(value: object, allowed: _Range, rule: str) -> int:
    number = _number(value, _bytes_in, rule)
    if type(number) is not int:
        raise must_be(rule, value)
    allowed.check(number, value)
    return number


def _size() -> Kind:
    allowed = _Range(at_least=0, at_most=_MAX_BYTES, show=_size_text)
    return Kind(
        lambda value: _parse_size(value, allowed, 'whole bytes, or text such as "512MiB"'),
        lambda count: f'"{_size_text(count)}"',
    )


def _memory_limit() -> Kind:
    # Less than 1 MiB is somebody who meant megabytes, and would kill every worker at once.
    allowed = _Range(at_least=1024**2, at_most=_MAX_BYTES, show=_size_text)
    rule = '"" for no limit, whole bytes, or text such as "512MiB"'
    return Kind(
        lambda value: None if value == "" else _parse_size(value, allowed, rule),
        lambda count: '""' if count is None else f'"{_size_text(count)}"',
    )


# -- shares of a core ------------------------------------------------------------------------------------

_CPU = re.compile(rf"{_AMOUNT} ?(%|cores?)")


def _percent_in(text: str) -> float | None:
    match = _CPU.fullmatch(text)
    return float(match[1]) * (1 if match[2] == "%" else 100) if match else None


def _percent_text(percent: float) -> str:
    return repr(percent).removesuffix(".0")


def _parse_percent(value: object) -> float:
    number = _number(value, _percent_in, 'percent of a core, such as 50 or "50%"')
    _Range(more_than=0, show="{} %".format).check(number, value)
    return float(number)


def _parse_cpu_limit(value: object) -> float | None:
    """Text with its unit, "200%" or "2 cores": in a bare 2 nobody can tell percent from cores."""
    if value == "":
        return None
    percent = _percent_in(value) if isinstance(value, str) else None
    if percent is None:
        raise must_be('"" for no limit, or text such as "200%" or "2 cores"', value)
    _Range(at_least=1, show="{} %".format).check(percent, value)
    return percent


def _render_cpu_limit(percent: float | None) -> str:
    return '""' if percent is None else f'"{_percent_text(percent)}%"'


# -- counts, switches, words -----------------------------------------------------------------------------


def _parse_count(value: object) -> int:
    if type(value) is not int:
        raise must_be("a whole number", value)
    _Range(at_least=1).check(value, value)
    return value


def _parse_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise must_be("true or false", value)
    return value


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise must_be("text that is not empty", value)
    return value


def one_of(literal: Any) -> Kind:
    """One of the words of a ``typing.Literal``."""
    words: tuple[str, ...] = get_args(literal)

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise must_be(f"one of {', '.join(words)}", value)
        return value

    return Kind(parse, lambda word: f'"{word}"')


def list_of(item: Kind, what: str, *, may_be_empty: bool = True, at_most: int | None = None) -> Kind:
    """A TOML array of ``item``, parsed to a tuple; refused with the faults of all its entries. ``what`` is a plural."""
    rule = f"a list of {what}" if may_be_empty else f"a list of {what}, one at least"
    if at_most is not None:
        rule += f", {at_most} at most"

    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or may_be_empty):
            raise must_be(rule, value)
        if at_most is not None and len(value) > at_most:
            raise must_be(rule, value)
        items, faults = [], []
        for number, each in enumerate(value, 1):
            try:
                items.append(item.parse(each))
            except RefusedError as refused:
                faults += refused.inside(f"entry {number}")
        if faults:
            raise RefusedError(*faults)
        return tuple(items)

    return Kind(parse, lambda items: f"[{', '.join(map(item.render, items))}]")


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,39})://\S+")


def hidden_url(url: str) -> str:
    """Return an alert's URL as it may be shown: its service, and nothing of what follows, which holds passwords and tokens."""
    match = _URL.fullmatch(url)
    return f"{match[1].lower()}://***" if match else "***"


def _parse_url(value: object) -> str:
    if not isinstance(value, str) or _URL.fullmatch(value) is None or not value.isprintable():
        # Without the value, wherever it would be told: it may be a password in the wrong place.
        raise RefusedError(Fault("", 'must be a URL as Apprise has them, such as "ntfy://host/topic"'))
    return value


def _parse_command(value: object) -> tuple[str, ...]:
    words: tuple[str, ...] = TEXTS.parse(value)
    if words and (not words[0].startswith("/") or any("\0" in word for word in words)):
        raise must_be(
            'a program by its whole path and its arguments, such as ["/usr/local/bin/page-me", "-v"]',
            words[0],
        )
    return words


class Address(NamedTuple):
    """Where to listen; ``host`` is without the brackets that an IPv6 address wears in the text."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


def _parse_address(value: object) -> Address:
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise must_be('host:port, such as "127.0.0.1:9478" or "[::1]:9478"', value)
    port = int(match[3])
    _Range(at_least=1, at_most=65535, show="port {}".format).check(port, value)
    return Address(match[1] or match[2], port)


SIZE = _size()
MEMORY_LIMIT = _memory_limit()
PERCENT = Kind(_parse_percent, _percent_text)
CPU_LIMIT = Kind(_parse_cpu_limit, _render_cpu_limit)
COUNT = Kind(_parse_count, str)
SWITCH = Kind(_parse_switch, lambda on: "true" if on else "false")
TEXT = Kind(_parse_text, lambda text: f'"{escaped(text)}"')
TEXTS = list_of(TEXT, "texts")
ALERT_URLS = list_of(Kind(_parse_url, lambda url: f'"{escaped(url)}"'), "URLs", at_most=64)
COMMAND = Kind(_parse_command, TEXTS.render)
ADDRESS = Kind(_parse_address, lambda address: f'"{address}"')


# -- values in words -------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """Return ``value`` as TOML has it, in few printable characters; a list or a table only by its type.

    Nothing of a URL but its scheme, for it may be an alert's, with a password, that stands in the wrong place.
    """
    if isinstance(value, str) and "://" in value:
        return f'"{hidden_url(value)}"'
    if isinstance(value, str):
        return f'"{escaped(value[:60])}"' + ("..." if len(value) > 60 else "")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:  # str() of a long one raises
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return str(value)  # a number, a date


def escaped(text: str) -> str:
    """Return ``text`` as it stands between the quotes of a TOML string, all of it printable."""
    return "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in text)


def _escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
