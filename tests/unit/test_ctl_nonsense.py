"""Answers that make no sense: a daemon of another version, or whoever else listens there. A sentence at most comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fuzzing.messages import Answering, answering, framed

from agent import client, wire
from reaperd.ctl import DONE, FAILED
from reaperd.ctl.main import main


@pytest.fixture
def daemon() -> Iterator[Answering]:
    with answering() as one:
        yield one


def ask(daemon: Answering, *command: str, **told: Any) -> int:
    daemon.answer = framed(wire.encode({"ok": True, **told}))
    return main(["--socket", daemon.path, "--timeout", "5", *command])


def test_an_answer_that_makes_sense_is_one(daemon: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(daemon, "ping", version="0.1.0", pid=7) == DONE
    assert capsys.readouterr().out.startswith(f"reaperd 0.1.0, pid 7, answered on {daemon.path} in ")
    assert client.request(daemon.path, {"op": "ping"})["pid"] == 7


def test_a_version_cannot_move_the_cursor(daemon: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(daemon, "ping", version="\033[2J\u202e", pid=["\033"]) == DONE
    assert capsys.readouterr().out.removesuffix("\n").isprintable()


def test_a_reason_cannot_move_the_cursor_and_is_no_novel(daemon: Answering) -> None:
    daemon.answer = framed(
        wire.encode({"ok": False, "kind": "quota", "message": "\033[2J\n\u202e" + "x" * 50_000})
    )
    with pytest.raises(wire.WireError, match=r"^\\x1b\[2J\\n\\u202ex+$") as refusal:
        client.request(daemon.path, {"op": "ping"})
    assert refusal.value.kind == "quota"
    assert len(str(refusal.value)) < 2100


@pytest.mark.parametrize("sessions", [5, None, "x", {"a": 1}, True])
def test_sessions_that_are_no_list_are_none(
    daemon: Answering, sessions: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(daemon, "ps", sessions=sessions) == DONE
    assert capsys.readouterr().out.startswith("no sessions")


@pytest.mark.parametrize("after", ["x", None, [], -1, 1.5])
def test_a_number_of_the_last_event_that_is_none_is_done_without(daemon: Answering, after: object) -> None:
    assert ask(daemon, "stop", "x", "--wait", "0.01", after=after) == FAILED


def test_the_same_events_again_and_again_are_printed_once(
    daemon: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [{"seq": 3, "kind": "registered"}]
    assert ask(daemon, "events", "--json", events=events) == DONE
    assert (
        len(capsys.readouterr().out.splitlines()) == 2
    )  # of the second answer it is known that nothing is new in it


@pytest.mark.parametrize("toml", ["a = 1979-05-27T07:32:00Z", "a = " + "[" * 5000, "a = " + "1" * 5000, "="])
def test_settings_that_cannot_be_shown_as_json_are_told_of(
    daemon: Answering, toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(daemon, "config", "show", "--json", toml=toml) == FAILED
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("reaperctl: cannot read the daemon's settings: ")
