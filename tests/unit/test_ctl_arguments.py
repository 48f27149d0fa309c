"""The command line of reaperctl: what is accepted where, and what is refused with exit code 2."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone

import pytest

from reaperd.ctl import USAGE, CommandError, arguments, orphans
from reaperd.ctl.tally import GROUPINGS
from reaperd.kinds import EVENT_KINDS

COMMANDS = [
    ["status"],
    ["ps"],
    ["events"],
    ["report"],
    ["stop", "risk"],
    ["orphans"],
    ["explain", "4711"],
    ["cleanup"],
    ["protect", "4711"],
    ["release", "4711"],
    ["monitor"],
    ["top"],
    ["ui"],
    ["ping"],
    ["doctor"],
    ["alerts", "test"],
    ["config", "check"],
    ["config", "show"],
    ["config", "default"],
]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what is said on stderr of a command line that must be refused."""
    with pytest.raises(SystemExit) as left:
        arguments.parse(words)
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("before", [True, False])
def test_global_options_go_before_and_after_the_command(words: list[str], before: bool) -> None:
    options = ["--socket", "/x", "--timeout", "2.5"]
    parsed = arguments.parse([*options, *words] if before else [*words, *options])
    assert (parsed.socket, parsed.timeout) == ("/x", 2.5)


def test_an_option_before_the_command_is_not_undone_by_its_absence_after() -> None:
    parsed = arguments.parse(["--user", "config", "show"])
    assert (parsed.user, parsed.system, parsed.socket, parsed.timeout) == (True, False, None, 5.0)


def test_the_last_of_two_values_wins() -> None:
    assert arguments.parse(["--timeout", "1", "ping", "--timeout", "2"]).timeout == 2.0


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_known_by_its_whole_name(words: list[str]) -> None:
    assert arguments.parse(words).command == " ".join(word for word in words if word not in ("risk", "4711"))


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] not in ("stop", "top", "ui")])
def test_every_reading_command_takes_json(words: list[str]) -> None:
    assert arguments.parse([*words, "--json"]).json is True
    assert arguments.parse(words).json is False


@pytest.mark.parametrize(
    "options", [["--user", "--system"], ["--user", "--socket", "/x"], ["--system", "--socket", "/x"]]
)
def test_a_daemon_is_chosen_in_one_way_only(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    first, *rest = options
    assert "exclude each other" in refused(capsys, first, "ping", *rest)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e9"])
def test_a_timeout_is_a_positive_number(capsys: pytest.CaptureFixture[str], value: str) -> None:
    said = refused(capsys, "ping", f"--timeout={value}")
    assert "must be a number of seconds, more than 0 and at most 1000000" in said


@pytest.mark.parametrize("command", ["orphans", "cleanup"])
def test_an_owner_is_a_user_of_this_machine_or_a_uid(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert arguments.parse([command]).owner is None
    assert arguments.parse([command, "--owner", "root"]).owner == 0
    assert arguments.parse([command, "--owner", "4711"]).owner == 4711
    for value in ("no such user", "-1", "", "a\0b", "²"):
        assert "must be a user's name or uid" in refused(capsys, command, f"--owner={value}")


def test_a_score_is_nobody_s_alone() -> None:
    with pytest.raises(CommandError, match="leave --owner out") as refusal:
        orphans.orphans(arguments.parse(["orphans", "--score", "--owner", "0"]))
    assert refusal.value.code == USAGE


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_socket_is_a_path(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert "must be a path" in refused(capsys, "ping", f"--socket={value}")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["config"],
        ["stop"],
        ["stop", ""],
        ["stop", "a", "b"],
        ["frobnicate"],
        ["ping", "--jso"],
        ["explain"],
        ["protect", "4711", "--local"],
        ["release", "1", "2"],
    ],
)
def test_a_wrong_command_line_says_where_to_read_on(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert "--help" in refused(capsys, *words)


def test_a_usage_error_never_echoes_an_escape_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["\x1b[2J"], ["ping", "--\x1b]0;x\x07"], ["events", "--since", "\x1b[2J\u202e"]):
        said = refused(capsys, *words)
        assert "\x1b" not in said
        assert "\u202e" not in said


def test_since_becomes_a_moment() -> None:
    parsed = arguments.parse(["events", "--since", "2026-01-31T12:00:00Z"])
    assert parsed.since == datetime(2026, 1, 31, 12, tzinfo=timezone.utc)


def test_since_of_nonsense_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a time" in refused(capsys, "events", "--since", "whenever")


def test_events_follow_from_now_and_want_no_session_unless_told() -> None:
    parsed = arguments.parse(["events", "-f"])
    assert (parsed.follow, parsed.since, parsed.session) == (True, None, None)


@pytest.mark.parametrize("command", ["events", "report"])
@pytest.mark.parametrize("option", ["--user", "--owner"])
def test_whose_events_are_meant_is_said_by_name_or_uid(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([option, "root"], [option, "0"], [f"{option}=root"]):
        parsed = arguments.parse([command, *words])
        assert (parsed.owner, parsed.user) == (0, False)
    assert arguments.parse([command, option, "54321", "--json"]).owner == 54321
    said = refused(capsys, command, option, "no such user")
    assert "must be a user's name or uid, and there is no 'no such user'" in said
    assert arguments.parse([command]).owner is None


@pytest.mark.parametrize(
    "words", [["--user", "events"], ["events", "--user"], ["events", "--user", "--json"]]
)
def test_without_a_name_user_means_which_daemon_as_everywhere(words: list[str]) -> None:
    parsed = arguments.parse(words)
    assert (parsed.user, parsed.owner) == (True, None)


def test_both_may_be_said_and_the_daemon_is_chosen_in_one_way_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parsed = arguments.parse(["--user", "events", "--user", "root"])
    assert (parsed.user, parsed.owner) == (True, 0)
    parsed = arguments.parse(["--system", "report", "--user", "root"])
    assert (parsed.system, parsed.user, parsed.owner) == (True, False, 0)
    assert "exclude each other" in refused(capsys, "--user", "--system", "events", "--user", "root")


def test_kinds_of_events_may_be_said_together_or_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments.parse(["events"]).kind == []
    assert arguments.parse(["events", "--kind", "reaped,killed"]).kind == ["reaped", "killed"]
    assert arguments.parse(["events", "--kind", "reaped", "--kind=killed"]).kind == ["reaped", "killed"]
    assert arguments.parse(["events"]).kind == [], "nothing is kept from one command line to the next"
    for wrong in ("reap", "reaped,", "", "reaped,reap", "Reaped"):
        said = refused(capsys, "events", "--kind", wrong)
        assert (
            f"there is no kind of event {wrong.rpartition(',')[2]!r}; there are {', '.join(EVENT_KINDS)}"
            in said
        )


def test_a_report_is_by_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments.parse(["report"]).by is None
    for grouping in GROUPINGS:
        assert arguments.parse(["report", "--by", grouping]).by == grouping
    assert "must be framework, user or cause, got 'host'" in refused(capsys, "report", "--by", "host")


def test_stop_waits_a_minute_unless_told() -> None:
    assert arguments.parse(["stop", "risk"]).wait == 60.0
    assert arguments.parse(["stop", "risk", "--wait", "5"]).wait == 5.0


@pytest.mark.parametrize("command", ["explain", "protect", "release"])
@pytest.mark.parametrize(
    "value", ["0", "-1", "+1", "1.5", "1e3", "0x10", "", " 1", "\u0661", "2147483648", "9" * 99, "self"]
)
def test_a_pid_is_a_positive_whole_number(
    capsys: pytest.CaptureFixture[str], command: str, value: str
) -> None:
    assert "--help" in refused(capsys, command, "--", value)
    assert arguments.parse([command, "2147483647"]).pid == 2147483647


def test_monitor_looks_every_two_seconds_until_interrupted_unless_told() -> None:
    parsed = arguments.parse(["monitor"])
    assert (parsed.duration, parsed.interval) == (0.0, 2.0)
    parsed = arguments.parse(["monitor", "--duration", "10", "--interval", "0.5"])
    assert (parsed.duration, parsed.interval) == (10.0, 0.5)
    assert arguments.parse(["monitor", "--duration", "0"]).duration == 0.0


@pytest.mark.parametrize(
    "option",
    [
        "--duration=-1",
        "--duration=nan",
        "--duration=long",
        "--interval=0",
        "--interval=0.01",
        "--interval=inf",
    ],
)
def test_monitor_takes_no_time_that_is_none(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert "must be" in refused(capsys, "monitor", option)


def test_a_duration_that_is_none_is_told_that_0_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be 0, for no end, or a number of seconds" in refused(capsys, "monitor", "--duration=-1")


def test_the_screen_looks_every_second_unless_told() -> None:
    assert arguments.parse(["top"]).interval == 1.0
    assert arguments.parse(["top", "--interval", "0.5"]).interval == 0.5


@pytest.mark.parametrize("port", ["-1", "65536", "x", ""])
def test_a_page_takes_no_port_that_is_none(capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert "must be a port" in refused(capsys, "ui", f"--port={port}")


@pytest.mark.parametrize("words", [["orphans"], ["explain", "1"], ["cleanup"], ["monitor"]])
def test_what_works_without_a_daemon_takes_local(words: list[str]) -> None:
    assert arguments.parse([*words, "--local"]).local is True
    assert arguments.parse(words).local is False


def test_cleanup_asks_unless_told() -> None:
    parsed = arguments.parse(["cleanup"])
    assert (parsed.dry_run, parsed.yes, parsed.leftovers, parsed.wait) == (False, False, False, 60.0)
    assert arguments.parse(["cleanup", "-y"]).yes is True


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        arguments.parse(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for line in (
        "0  done",
        "1  failed, or something remains",
        "2  wrong usage",
        "3  no daemon",
        "4  not allowed",
    ):
        assert line in said


def test_parsing_leaves_no_option_unset() -> None:
    wanted = {"user", "system", "socket", "timeout", "json", "command"}
    for words in COMMANDS:
        parsed = arguments.parse(words)
        assert isinstance(parsed, argparse.Namespace)
        assert wanted <= set(vars(parsed))
