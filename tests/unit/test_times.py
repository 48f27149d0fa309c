"""Times as they are told and read back: RFC 3339, in every spelling that somebody may send."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.times import moment, now_utc, rfc3339

NOON = datetime(2030, 1, 2, 12, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("text", "after_noon"),
    [
        ("2030-01-02T12:00:00Z", 0.0),
        ("2030-01-02T12:00:00z", 0.0),
        ("2030-01-02 12:00:00Z", 0.0),
        ("2030-01-02T12:00:00", 0.0),
        ("2030-01-02T12:00:00+00:00", 0.0),
        ("2030-01-02T14:30:00+02:30", 0.0),
        ("2030-01-02T04:00:00-08:00", 0.0),
        ("2030-01-02T12:00:00.5Z", 0.5),
        ("2030-01-02T12:00:00.25Z", 0.25),
        ("2030-01-02T12:00:00.125Z", 0.125),
        ("2030-01-02T12:00:00.1250Z", 0.125),
        ("2030-01-02T12:00:00.000001Z", 0.000001),
        ("2030-01-02T12:00:00.000001999Z", 0.000001),
        ("2030-01-02T12:00:00.123456789012345678901234567890Z", 0.123456),
        ("2030-01-02T13:00:00.5+01:00", 0.5),
        ("2030-01-02T11:00:00.123456789-01:00", 0.123456),
        ("2030-01-02T12:00:00.75", 0.75),
        ("2030-01-02", -12 * 3600.0),
    ],
)
def test_a_time_is_read_in_every_spelling_and_is_utc_where_it_names_no_zone(
    text: str, after_noon: float
) -> None:
    found = moment(text)
    assert found == NOON + timedelta(seconds=after_noon)
    assert found.tzinfo is not None


NO_TIMES = [
    *("", "Z", "z", ".", ".5Z", "now", "0", "12:00:00Z", "2030-01-02T", "2030-13-02T12:00:00Z"),
    *("2030-02-30T12:00:00Z", "2030-01-02T12:00:60Z", "2030-01-02T25:00:00Z", "2030-01-02T12:00:00ZZ"),
    *("2030-01-02T12:00:00+01:00Z", "2030-01-02T12:00:00.-5Z", "2030-01-02T12:00:00+99:00", "\ud800"),
    *("2030-01-02T12:00:00.\u0665Z", "\u0662030-01-02T12:00:00Z", "20300-01-02T12:00:00Z", "x" * 10_000),
    *("-2030-01-02T12:00:00Z", "2030-01-02T12:00:00Z\n"),
    *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"),  # in UTC these are of no year
]


def test_what_is_no_time_is_none() -> None:
    assert [(text, moment(text)) for text in NO_TIMES if moment(text) is not None] == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text("0123456789-+:.TZ \0\u0661", max_size=35))
def test_any_text_is_a_time_with_a_zone_or_none(text: str) -> None:
    found = moment(text)
    assert found is None or found.utcoffset() is not None


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.datetimes(datetime(1970, 1, 2), datetime(2500, 1, 1), timezones=st.timezones()))
def test_a_time_is_told_in_utc_with_milliseconds_and_is_read_back_as_it_was(when: datetime) -> None:
    text = rfc3339(when)
    assert len(text) == len("2030-01-02T12:00:00.000Z")
    assert text.endswith("Z")
    back = moment(text)
    assert back is not None
    assert timedelta(0) <= when - back < timedelta(milliseconds=1)


def test_now_is_now() -> None:
    before = datetime.now(timezone.utc) - timedelta(milliseconds=1)
    told = moment(now_utc())
    assert told is not None
    assert before <= told <= datetime.now(timezone.utc)
