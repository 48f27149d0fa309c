"""What ``reaper.toml`` may say, what is said about it when it may not, and that it can be written back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reaperd.config import (
    MAX_TEXT_CHARS,
    SETTINGS,
    AccessConfig,
    AlertsConfig,
    Config,
    ConfigError,
    DaemonConfig,
    ExtraSignature,
    HistoryConfig,
    KillConfig,
    LimitsConfig,
    MetricsConfig,
    ProtectConfig,
    ScanConfig,
    SessionsConfig,
    parse_config,
    render_config,
    without_effect,
)
from reaperd.config_values import Address

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_DIRECTORY = Path(__file__).parents[2] / "config"
ALL_KEYS = [(table, key) for table, keys in SETTINGS.items() for key in keys]


def parse(text: str) -> Config:
    return parse_config([("reaper.toml", text)])


def faults_of(*texts: str) -> tuple[str, ...]:
    """Return the faults of texts named a.toml, b.toml, ..., or of one named reaper.toml."""
    names = [f"{letter}.toml" for letter in "abcdef"] if len(texts) > 1 else ["reaper.toml"]
    with pytest.raises(ConfigError) as caught:
        parse_config(list(zip(names, texts, strict=False)))
    assert caught.value.faults
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def fault_of(text: str) -> str:
    (fault,) = faults_of(text)
    return fault


# -- what a good file says -------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", [[], [("reaper.toml", "")], [("reaper.toml", "# nothing\n[scan]\n")]])
def test_a_file_that_says_nothing_means_the_defaults(sources):
    assert parse_config(sources) == Config()


def test_the_defaults_are_the_documented_ones():
    assert Config() == Config(
        daemon=DaemonConfig(log_level="info", log_format="text"),
        scan=ScanConfig(
            enabled=True,
            interval_s=30,
            orphan_age_limit_s=300,
            cpu_threshold_percent=50,
            cpu_window_s=30,
            memory_threshold_bytes=67_108_864,
            action="kill",
            quarantine_for_s=600,
            extra_signatures=(),
        ),
        kill=KillConfig(grace_s=5, exit_grace_s=10, tracker_grace_s=10, reclaim_shm=True, dry_run=False),
        sessions=SessionsConfig(max_workers=4, max_per_uid=1000, isolate=False),
        limits=LimitsConfig(None, None, None, None, on_breach="kill-worker"),
        protect=ProtectConfig(users=(), names=(), units=()),
        access=AccessConfig(admins=("root",)),
        metrics=MetricsConfig(enabled=False, listen=Address("127.0.0.1", 9478)),
        alerts=AlertsConfig(
            urls=(), command=(), on=("reaped", "stuck", "quarantined", "breach"), group_within_s=60
        ),
        history=HistoryConfig(keep_s=7_776_000),
    )


def test_a_later_file_wins_key_by_key():
    config = parse_config(
        [
            ("reaper.toml", '[kill]\ngrace = 1\nexit_grace = 2\n[protect]\nusers = ["a", "b"]'),
            ("10.toml", '[kill]\ngrace = 3\n[protect]\nusers = ["c"]'),
        ]
    )
    assert (config.kill.grace_s, config.kill.exit_grace_s) == (3, 2)
    assert config.protect.users == ("c",), "a list replaces the list before it"


def test_a_later_file_can_set_a_default_again():
    assert parse_config([("a", "[kill]\ndry_run = true"), ("b", "[kill]\ndry_run = false")]) == Config()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ('"30s"', 30),
        ('"5min"', 300),
        ('"5m"', 300),
        ('"1h"', 3600),
        ('"90d"', 7_776_000),
        ('"2w"', 1_209_600),
        ('"1h30min"', 5400),
        ('"1h 30 min"', 5400),
        ('"1.5h"', 5400),
        ('"500ms"', 0.5),
        ('"1s 5ms"', 1.005),
        ('"2 hours"', 7200),
        ('"3650d"', 315_360_000),
    ],
)
def test_a_duration_is_seconds_or_text(value, seconds):
    assert parse(f"[scan]\ninterval = {value}").scan.interval_s == seconds


@pytest.mark.parametrize("value", ['""', '"30"', '"s"', '"-5s"', '"5 minutes ago"', '"30min1h"', '"1h1h"', '"1e3s"',
                                   '"٣s"', '"5M"', '"1..5s"', "true", "[30]", "{s = 30}", "07:32:00"])  # fmt: skip
def test_what_is_no_duration_is_refused(value):
    fault = fault_of(f"[scan]\ninterval = {value}")
    assert fault.startswith(
        'reaper.toml: [scan] interval: must be seconds, or text such as "30s", "5min" or "1h30min", got '
    )


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ('"512B"', 512),
        ('"64KB"', 64_000),
        ('"64KiB"', 65_536),
        ('"64K"', 65_536),
        ('"512MiB"', 536_870_912),
        ('"512mib"', 536_870_912),
        ('"2 GB"', 2_000_000_000),
        ('"1.5GiB"', 1_610_612_736),
        ('"1TiB"', 1_099_511_627_776),
        ('"9007199254740993B"', 9_007_199_254_740_993),
    ],
)
def test_a_size_is_bytes_or_text(value, count):
    assert parse(f"[scan]\nmemory_threshold = {value}").scan.memory_threshold_bytes == count


@pytest.mark.parametrize(
    "value", ['""', '"512"', '"MiB"', '"1iB"', '"1 PiB"', '"-1MiB"', "1.0", "true", "[]"]
)
def test_what_is_no_size_is_refused(value):
    fault = fault_of(f"[scan]\nmemory_threshold = {value}")
    assert 'memory_threshold: must be whole bytes, or text such as "512MiB", got' in fault


def test_no_limit_is_empty_text():
    text = '[limits]\nworker_memory = ""\nsession_memory = ""\nworker_cpu = ""\nsession_cpu = ""'
    assert parse(text) == Config()


def test_limits_have_units():
    limits = parse(
        '[limits]\nworker_memory = "4GiB"\nsession_memory = 1048576\nworker_cpu = "150%"\nsession_cpu = "2.5 cores"'
    ).limits
    assert (limits.worker_memory_bytes, limits.session_memory_bytes) == (4 * 1024**3, 1024**2)
    assert (limits.worker_cpu_percent, limits.session_cpu_percent) == (150, 250)


def test_a_cpu_limit_without_its_unit_is_refused_for_it_could_be_percent_or_cores():
    assert fault_of("[limits]\nworker_cpu = 2") == (
        'reaper.toml: [limits] worker_cpu: must be "" for no limit, or text such as "200%" or "2 cores", got 2'
    )


def test_a_memory_limit_in_forgotten_megabytes_is_refused():
    assert fault_of("[limits]\nworker_memory = 512").endswith("worker_memory: must be at least 1MiB, got 512")


@pytest.mark.parametrize("value", ["50", "50.0", '"50%"', '"50 %"', '"0.5 cores"'])
def test_a_cpu_threshold_is_percent_of_a_core(value):
    assert parse(f"[scan]\ncpu_threshold = {value}").scan.cpu_threshold_percent == 50


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1:9478", ("127.0.0.1", 9478)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_a_listening_address_is_host_and_port(value, address):
    listen = parse(f'[metrics]\nlisten = "{value}"').metrics.listen
    assert listen == address
    assert str(listen) == value


@pytest.mark.parametrize(
    "value", ["", "9478", ":9478", "host:", "::1:9478", "[1]:2", "a b:1", "h:123456", "http//h:1"]
)
def test_an_address_without_host_or_port_is_refused(value):
    assert fault_of(f'[metrics]\nlisten = "{value}"') == (
        'reaper.toml: [metrics] listen: must be host:port, such as "127.0.0.1:9478" or "[::1]:9478", '
        f'got "{value}"'
    )


def test_extra_signatures_are_tables():
    text = """
        [[scan.extra_signatures]]
        name = "our-pool"
        tokens = ["-m", "ourpool.worker"]
        [[scan.extra_signatures]]
        name = "our-tracker"
        tokens = ["ourpool.tracker"]
        role = "tracker"
    """
    assert parse(text).scan.extra_signatures == (
        ExtraSignature("our-pool", ("-m", "ourpool.worker"), "worker"),
        ExtraSignature("our-tracker", ("ourpool.tracker",), "tracker"),
    )


# -- what is said about a bad one ------------------------------------------------------------------------


def test_every_fault_is_reported_at_once():
    first = """
        colour = "red"
        [scan]
        interval = -1
        action = "shoot"
        cpu_treshold = 5
        [kill]
        grace = true
        [protect]
        users = ["ann", 7, ""]
        [histroy]
        keep = "1d"
    """
    second = """
        [sessions]
        max_workers = 0
        [scan]
        interval = "1s"
        extra_signatures = [{ token = ["x"], name = 3 }]
    """
    assert faults_of(first, "[scan", second) == (
        "a.toml: colour: must stand under a table such as [scan]",
        "a.toml: [scan] interval: must be more than 0 s, got -1",
        'a.toml: [scan] action: must be one of kill, quarantine, report, got "shoot"',
        "a.toml: [scan] cpu_treshold: unknown key, did you mean cpu_threshold?",
        'a.toml: [kill] grace: must be seconds, or text such as "30s", "5min" or "1h30min", got true',
        "a.toml: [protect] users: entry 2: must be text that is not empty, got 7",
        'a.toml: [protect] users: entry 3: must be text that is not empty, got ""',
        "a.toml: [histroy]: unknown table, did you mean [history]?",
        "b.toml: line 1, end of file: Expected ']' at the end of a table declaration",
        "c.toml: [sessions] max_workers: must be at least 1, got 0",
        "c.toml: [scan] extra_signatures: entry 1: tokens: must be given",
        "c.toml: [scan] extra_signatures: entry 1: token: unknown key, did you mean tokens?",
        "c.toml: [scan] extra_signatures: entry 1: name: must be text that is not empty, got 3",
    )


def test_a_fault_counts_even_where_a_later_file_sets_the_key():
    assert faults_of("[kill]\ngrace = -1", "[kill]\ngrace = 1") == (
        "a.toml: [kill] grace: must be at least 0 s, got -1",
    )


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("[scan]\ninterval = 0", "must be more than 0 s, got 0"),
        ('[scan]\ninterval = "0s"', 'must be more than 0 s, got "0s"'),
        ("[scan]\ninterval = nan", "must be more than 0 s, got nan"),
        ("[scan]\ninterval = inf", "must be at most 3650d, got inf"),
        ('[scan]\ninterval = "3651d"', 'must be at most 3650d, got "3651d"'),
        ("[scan]\ncpu_threshold = 0", "must be more than 0 %, got 0"),
        ("[scan]\ncpu_threshold = nan", "must be more than 0 %, got nan"),
        ("[scan]\ncpu_threshold = 1e9", "must be at most 1000000 %, got 1000000000.0"),
        ("[scan]\nmemory_threshold = -1", "must be at least 0B, got -1"),
        ('[scan]\nmemory_threshold = "9999999TiB"', 'must be at most 1048576TiB, got "9999999TiB"'),
        ("[kill]\ntracker_grace = -0.1", "must be at least 0 s, got -0.1"),
        ("[kill]\ngrace = nan", "must be at least 0 s, got nan"),
        ("[kill]\ndry_run = 1", "must be true or false, got 1"),
        ('[kill]\ndry_run = "yes"', 'must be true or false, got "yes"'),
        ("[sessions]\nmax_workers = true", "must be a whole number, got true"),
        ("[sessions]\nmax_workers = 4.0", "must be a whole number, got 4.0"),
        ("[sessions]\nmax_per_uid = 0", "must be at least 1, got 0"),
        ("[sessions]\nmax_per_uid = 1000001", "must be at most 1000000, got 1000001"),
        ('[limits]\nsession_cpu = "0.5%"', 'must be at least 1 %, got "0.5%"'),
        ('[limits]\non_breach = "kill"', 'must be one of kill-worker, kill-session, report, got "kill"'),
        ('[daemon]\nlog_level = "INFO"', 'must be one of debug, info, warning, error, got "INFO"'),
        ("[daemon]\nlog_format = []", "must be one of text, json, got an empty list"),
        ('[metrics]\nlisten = "h:0"', 'must be at least port 1, got "h:0"'),
        ('[metrics]\nlisten = "h:65536"', 'must be at most port 65535, got "h:65536"'),
        ('[access]\nadmins = "root"', 'must be a list of texts, got "root"'),
        ("[access]\nadmins = [{}]", "entry 1: must be text that is not empty, got a table"),
        ('[protect]\nnames = ["a", " "]', 'entry 2: must be text that is not empty, got " "'),
        ("[history]\nkeep = 0", "must be more than 0 s, got 0"),
        ("[history]\nkeep = 1979-05-27", 'or "1h30min", got 1979-05-27'),
    ],
)
def test_a_value_outside_its_rule_is_refused_with_the_rule_and_the_value(setting, rule):
    table, key = setting.split(" = ")[0].split("\n")
    fault = fault_of(setting)
    assert fault.startswith(f"reaper.toml: {table} {key}: ")
    assert fault.endswith(rule)


def test_an_alert_is_sent_only_for_kinds_of_events_that_exist():
    assert parse('[alerts]\non = ["started", "orphan"]').alerts.on == ("started", "orphan")
    assert 'entry 2: must be one of registered, ended, reaped, orphan, killed' in fault_of(
        '[alerts]\non = ["reaped", "died"]'
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "faults"),
    [
        ("3", ["must be a table, got 3"]),
        ('{ name = "x", tokens = [] }', ["tokens: must be a list of texts, one at least, got an empty list"]),
        ('{ name = "x", tokens = "y" }', ['tokens: must be a list of texts, one at least, got "y"']),
        ('{ name = "x", tokens = ["y", 3] }', ["tokens: entry 2: must be text that is not empty, got 3"]),
        ('{ name = " ", tokens = ["y"] }', ['name: must be text that is not empty, got " "']),
        (
            '{ name = "x", tokens = ["y"], role = "boss" }',
            ['role: must be one of worker, tracker, got "boss"'],
        ),
        ("{ }", ["name: must be given", "tokens: must be given"]),
    ],
)
def test_a_signature_that_cannot_work_is_refused(entry, faults):
    assert faults_of(f"[scan]\nextra_signatures = [{entry}]") == tuple(
        f"reaper.toml: [scan] extra_signatures: entry 1: {fault}" for fault in faults
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[kill]\ngrase = 1", "[kill] grase: unknown key, did you mean grace?"),
        ("[kill]\ngrace_s = 1", "[kill] grace_s: unknown key, did you mean grace?"),
        ("[scan]\nexit_grace = 1", "[scan] exit_grace: unknown key, it belongs under [kill]"),
        ("[kill]\nenabled = true", "[kill] enabled: unknown key, it belongs under [scan] or [metrics]"),
        ("[history]\nzzz = 1", "[history] zzz: unknown key, there are keep"),
        ("[Kill]\ngrace = 1", "[Kill]: unknown table, did you mean [kill]?"),
        ("[[scann]]", "[scann]: unknown table, did you mean [scan]?"),
        ('users = ["ann"]', "users: must stand under [protect]"),
        ("grace = 1", "grace: must stand under [kill]"),
        ("[x.y]", "[x]: unknown table, there are daemon, scan, kill, sessions, limits, protect, access, "
                  "metrics, alerts, history"),
        ("kill = 3", "[kill]: must be a table, got 3"),
        ("[[kill]]", "[kill]: must be a table, got a list"),
        ("[kill.grace]", '[kill] grace: must be seconds, or text such as "30s", "5min" or "1h30min", got a table'),
        ('"" = 1', '"": must stand under a table such as [scan]'),
        ('[kill]\n"a\\nb" = 1', '[kill] "a\\u000ab": unknown key, there are grace, exit_grace, tracker_grace, '
                                "reclaim_shm, dry_run"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_a_fault_that_tells_what_was_meant(text, fault):
    assert fault_of(text) == f"reaper.toml: {fault}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[kill]\ngrace 5", "line 2, column 7: Expected '=' after a key in a key/value pair"),
        ("[kill]\ngrace = ", "line 2, end of file: Invalid value"),
        ("[kill]\ngrace = 1\ngrace = 2\n", "line 3, column 10: Cannot overwrite a value"),
        ("[kill]\n[kill]\n", "line 2, column 6: Cannot declare ('kill',) twice"),
    ],
)
def test_a_syntax_error_names_file_and_line(text, fault):
    assert fault_of(text) == f"reaper.toml: {fault}"


SECRET = "mailto://ann:hunter2@example.org"


@pytest.mark.parametrize(
    "text",
    [
        f'[alerts]\nurls = "{SECRET}"',
        f'[alerts]\nurls = ["", "{SECRET}"]',
        f'[alerts]\nurls = [["{SECRET}"]]',
        f'[alerts]\nurls = {{ a = "{SECRET}" }}',
        f'[alerts]\nurls = ["{SECRET} {SECRET}"]',
        '[alerts]\nurls = ["hunter2"]',
        '[alerts]\nurls = ["mailto:hunter2"]',
        f'[alerts]\nurl = "{SECRET}"',
        f'[alerts]\n"{SECRET}" = 1',
        f'[alerts]\non = ["{SECRET}"]',
        f'[alerts]\ncommand = ["{SECRET}"]',
        f'[alerts]\ngroup_within = "{SECRET}"',
        f'[metrics]\nlisten = "{SECRET}"',
        f'urls = ["{SECRET}"]',
    ],
)
def test_a_password_in_an_alert_url_is_in_no_fault_wherever_it_stands(text):
    assert "hunter2" not in "".join(faults_of(text))


def test_there_may_be_only_so_many_alert_urls_for_what_came_of_each_is_told_in_one_message():
    urls = ", ".join([f'"{SECRET}"'] * 65)
    assert fault_of(f"[alerts]\nurls = [{urls}]") == (
        "reaper.toml: [alerts] urls: must be a list of URLs, 64 at most"
    )
    assert len(parse(f"[alerts]\nurls = [{urls[: urls.rindex(',')]}]").alerts.urls) == 64


def test_of_an_alert_url_only_the_service_is_shown():
    config = parse(f'[alerts]\nurls = ["{SECRET}", "Slack://hunter2/B/C"]')
    assert "hunter2" not in repr(config)
    assert "hunter2" in render_config(config)
    hidden = render_config(config, show_secrets=False)
    assert "hunter2" not in hidden
    assert 'urls = ["mailto://***", "slack://***"]' in hidden
    assert parse(hidden).alerts.urls == ("mailto://***", "slack://***")
    assert render_config(Config(), show_secrets=False) == render_config(Config())


@pytest.mark.parametrize(
    "url", ["x", "://x", "slack:/x", "slack://", "slack://a b", "1x://a", "a://b\\u0007"]
)
def test_what_is_no_url_is_refused_with_an_example_of_one(url):
    fault = fault_of(f'[alerts]\nurls = ["ntfy://host/topic", "{url}"]')
    assert (
        fault
        == 'reaper.toml: [alerts] urls: entry 2: must be a URL as Apprise has them, such as "ntfy://host/topic"'
    )


@pytest.mark.parametrize(
    "command", ['"/bin/true"', '["true"]', '["", "/bin/true"]', '["/bin/true", "a\\u0000b"]', "[1]"]
)
def test_a_command_is_a_whole_path_with_arguments(command):
    assert fault_of(f"[alerts]\ncommand = {command}").startswith("reaper.toml: [alerts] command: ")


def test_a_command_keeps_its_arguments():
    assert parse('[alerts]\ncommand = ["/bin/x", "-v", "a b"]').alerts.command == ("/bin/x", "-v", "a b")


# -- text from an enemy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param("a = " + "[" * 60_000, "is nested too deeply", id="deep lists"),
        pytest.param("a = " + "{a = " * 10_000, "is nested too deeply", id="deep tables"),
        pytest.param("a" + ".a" * 30_000 + " = 1", "line 1: must have at most 200 dots", id="a deep key"),
        pytest.param("a = 1" + "0" * 5000, "cannot be read", id="5001 digits"),
        pytest.param(f"[kill]\ngrace = 0x{'f' * 9000}", "got a number of 36000 bits", id="hexadecimal"),
        pytest.param("[kill]\ngrace = 1" + "0" * 400, "got a number of 1329 bits", id="no float"),
        pytest.param("[kill]\ngrace = 1e999", "at most 3650d, got inf", id="a float beyond floats"),
        pytest.param("[kill]\ngrace = -inf", "at least 0 s, got -inf", id="-inf"),
        pytest.param(f"[kill]\ngrace = '{'1 ' * 9000}'", '1 1 "...', id="long text"),
        pytest.param("[kill]\ngrace = 2024-02-31", "line 2", id="no date"),
        pytest.param(
            "[scan]\nmemory_threshold = 0x" + "f" * 300, "1048576TiB, got a number of", id="no size"
        ),
        pytest.param(f"[scan]\nmemory_threshold = '{'9' * 5000}B'", "whole bytes", id="5000 digits in text"),
        pytest.param(
            "[sessions]\nmax_workers = 0x" + "f" * 300, "at most 1000000, got a number", id="no count"
        ),
        pytest.param("[daemon]\nlog_level = '\u202etxet'", '"\\u202etxet"', id="right to left"),
        pytest.param("[daemon]\nlog_level = '\U000e0041'", '"\\U000e0041"', id="invisible"),
        pytest.param("[protect]\nusers = ['\udc80']", "not Unicode text", id="half a surrogate pair"),
        pytest.param('[protect]\nusers = ["\\ud800"]', "line 2", id="an escaped half"),
        pytest.param("[kill]\ngrace = 1\0", "line 2", id="NUL"),
        pytest.param(f"[kill]\n{'k' * 60_000} = 1", "unknown key", id="a long key"),
        pytest.param("#" * (MAX_TEXT_CHARS + 1), f"at most {MAX_TEXT_CHARS} characters", id="a long text"),
    ],
)
def test_hostile_text_is_an_ordinary_fault(text, fault):
    found = fault_of(text)
    assert fault in found
    assert len(found) < 250
    assert found.isprintable()


def test_a_file_name_cannot_forge_a_line_of_the_log():
    with pytest.raises(ConfigError) as caught:
        parse_config([("a\nb\udcff.toml", "x")])
    assert caught.value.faults[0].startswith("a\\u000ab\\udcff.toml: line 1")


def reads_back_or_has_faults(text: str) -> None:
    try:
        config = parse(text)
    except ConfigError:  # any other exception fails the test
        return
    assert parse(render_config(config)) == config


TOML_VALUES = st.recursive(
    st.sampled_from(
        ['""', '"x"', '"5s"', '"1GiB"', "0", "-1", "1.5", "nan", "inf", "true", "1e400", "07:32:00",
         "1979-05-27T07:32:00Z", "0x" + "f" * 400, "[[[[]]]]", "{}", '{ name = "x" }']
    ),
    lambda values: st.lists(values, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    max_leaves=3,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ALL_KEYS), TOML_VALUES), max_size=4))
def test_whatever_stands_behind_a_key_gives_a_config_or_its_faults(lines):
    reads_back_or_has_faults("".join(f"{table}.{key} = {value}\n" for (table, key), value in lines))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_text_gives_a_config_or_its_faults(data):
    text = render_config(Config())
    at = data.draw(st.integers(0, len(text)))
    damage = data.draw(st.text(st.sampled_from("[]{}=.\"'\\#\n\r\0eE+-_:0\u00e9\udc80"), max_size=5))
    reads_back_or_has_faults(text[:at] + damage + text[at + data.draw(st.integers(0, 5)) :])


# -- writing it back -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
DURATIONS = st.one_of(
    st.integers(0, 315_360_000).map(float),
    st.integers(0, 10**7).map(lambda ms: ms / 1000),
    st.floats(0, 315_360_000),
)
POSITIVE_DURATIONS = DURATIONS.filter(lambda seconds: seconds > 0)
PERCENTS = st.floats(1, 1_000_000)
MEMORY_LIMITS = st.none() | st.integers(2**20, 2**60) | st.integers(1, 2**20).map(lambda mib: mib * 2**20)
OPTIONAL_PERCENTS = st.none() | PERCENTS
COUNTS = st.integers(1, 1_000_000)
ADDRESSES = st.builds(
    Address, st.sampled_from(["127.0.0.1", "::", "fe80::1", "a-b.example"]), st.integers(1, 65535)
)
SIGNATURES = st.builds(ExtraSignature, TEXT, TEXTS.filter(bool), st.sampled_from(["worker", "tracker"]))

CONFIGS = st.builds(
    Config,
    daemon=st.builds(
        DaemonConfig,
        st.sampled_from(["debug", "info", "warning", "error"]),
        st.sampled_from(["text", "json"]),
    ),
    scan=st.builds(
        ScanConfig,
        enabled=st.booleans(),
        interval_s=POSITIVE_DURATIONS,
        orphan_age_limit_s=DURATIONS,
        cpu_threshold_percent=st.floats(0, 1_000_000, exclude_min=True),
        cpu_window_s=POSITIVE_DURATIONS,
        memory_threshold_bytes=st.integers(0, 2**60),
        action=st.sampled_from(["kill", "quarantine", "report"]),
        quarantine_for_s=POSITIVE_DURATIONS,
        extra_signatures=st.lists(SIGNATURES, max_size=2).map(tuple),
    ),
    kill=st.builds(KillConfig, DURATIONS, DURATIONS, DURATIONS, st.booleans(), st.booleans()),
    sessions=st.builds(SessionsConfig, COUNTS, COUNTS, st.booleans()),
    limits=st.builds(
        LimitsConfig,
        MEMORY_LIMITS,
        MEMORY_LIMITS,
        OPTIONAL_PERCENTS,
        OPTIONAL_PERCENTS,
        st.sampled_from(["kill-worker", "kill-session", "report"]),
    ),
    protect=st.builds(ProtectConfig, TEXTS, TEXTS, TEXTS),
    access=st.builds(AccessConfig, TEXTS),
    metrics=st.builds(MetricsConfig, st.booleans(), ADDRESSES),
    alerts=st.builds(
        AlertsConfig,
        st.lists(st.sampled_from(["ntfy://h/t", 'json://u:"p\\@h/\u00e4']), max_size=2).map(tuple),
        TEXTS.map(lambda words: ("/x", *(w.replace("\0", "0") for w in words)) if words else ()),
        st.lists(st.sampled_from(["ended", "stuck"]), max_size=2).map(tuple),
        POSITIVE_DURATIONS.map(lambda seconds: max(1.0, seconds)),
    ),
    history=st.builds(HistoryConfig, POSITIVE_DURATIONS),
)


@settings(max_examples=40, deadline=None)
@given(CONFIGS)
def test_a_rendered_config_parses_back_to_the_same(config):
    text = render_config(config)
    assert parse(text) == config
    assert text.replace("\n", "").isprintable()


def test_a_rendered_config_has_every_key_and_units_for_people():
    text = render_config(
        parse(
            "[scan]\ninterval = 5400\norphan_age_limit = 0.25\nmemory_threshold = 3000000\ncpu_window = 1e-5\n"
            '[limits]\nworker_memory = 2147483648\nsession_cpu = "2.5 cores"\n[metrics]\nlisten = "[::1]:9478"\n'
            '[[scan.extra_signatures]]\nname = "a \\"b\\""\ntokens = ["c"]'
        )
    )
    assert [(table, key) for table, keys in tomllib.loads(text).items() for key in keys] == ALL_KEYS
    for line in (
        'interval = "1h30min"',
        'orphan_age_limit = "250ms"',
        "cpu_window = 1e-05",
        "cpu_threshold = 50",
        'memory_threshold = "3000000B"',
        'quarantine_for = "10min"',
        'extra_signatures = [{ name = "a \\"b\\"", tokens = ["c"], role = "worker" }]',
        'worker_memory = "2GiB"',
        'session_memory = ""',
        'session_cpu = "250%"',
        'listen = "[::1]:9478"',
        'keep = "90d"',
        "dry_run = false",
    ):
        assert line in text.splitlines()


# -- the table of settings -------------------------------------------------------------------------------


def test_only_changed_settings_of_missing_features_are_without_effect():
    assert without_effect(Config()) == ()
    built = (
        '[daemon]\nlog_level = "debug"\nlog_format = "json"\n[scan]\ninterval = 1\naction = "report"\n[kill]\ngrace = 1\n'
        "exit_grace = 1\ntracker_grace = 1\nreclaim_shm = false\ndry_run = true\n"
        '[sessions]\nmax_workers = 1\nmax_per_uid = 1\nisolate = true\n[protect]\nusers = ["a"]\nnames = ["a"]\nunits = ["a"]\n'
        '[access]\nadmins = []\n[history]\nkeep = "1d"\n[alerts]\nurls = ["a://b"]\ncommand = ["/x"]\non = []\n'
        "group_within = 5\n"
    )
    assert without_effect(parse(built)) == ()
    missing = '[limits]\non_breach = "kill-worker"\nworker_cpu = "50%"'
    assert without_effect(parse(missing)) == ("limits.worker_cpu",)


def test_a_field_is_named_as_its_key_with_the_unit_behind():
    units = {"", "_s", "_bytes", "_percent"}
    for table, key in ALL_KEYS:
        setting = SETTINGS[table][key]
        assert setting.key == key
        assert setting.field.removeprefix(key) in units
        assert hasattr(getattr(Config(), table), setting.field)


def test_every_default_obeys_its_own_rule():
    for table, keys in SETTINGS.items():
        for setting in keys.values():
            default = getattr(getattr(Config(), table), setting.field)
            given_value = tomllib.loads(f"x = {setting.kind.render(default)}")["x"]
            assert setting.kind.parse(given_value) == default


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().kill.grace_s = 0  # type: ignore[misc]
    assert hash(Config()) == hash(parse(""))


# -- the files that come with it -------------------------------------------------------------------------


def test_the_file_that_comes_with_reaper_says_exactly_the_defaults():
    text = (CONFIG_DIRECTORY / "reaper.toml").read_text(encoding="utf-8")
    assert parse(text) == Config()
    assert [(table, key) for table, keys in tomllib.loads(text).items() for key in keys] == ALL_KEYS


def test_the_file_that_comes_with_reaper_explains_every_key():
    blocks = (CONFIG_DIRECTORY / "reaper.toml").read_text(encoding="utf-8").split("\n\n")
    settings_found = 0
    for block in blocks:
        *comment, last = block.strip().splitlines()
        if " = " in last and not last.startswith("#"):
            settings_found += 1
            assert comment, f"{last} is not explained"
            assert all(line.startswith("# ") and line[2:].strip() for line in comment)
            assert len(" ".join(comment)) > 20
    assert settings_found == len(ALL_KEYS)


def settings_said_not_to_be_built(text: str) -> set[tuple[str, str]]:
    """Return the (table, key) that ``text`` marks, by a line at the table's head (but for a key) or beside the key."""
    found, table, whole, here, apart = set(), "", False, False, ""
    for line in text.splitlines():
        if line.startswith("["):
            table, whole, here = line[1 : line.index("]")], False, False
        elif line.startswith("# Not built yet"):
            here, apart = True, line
        elif not line:  # a comment that no key follows speaks for the table
            whole, here = whole or here, False
        elif " = " in line and not line.startswith("#"):
            key = line.partition(" = ")[0]
            if here or (whole and f"`{key}`" not in apart):
                found.add((table, key))
            here = False
    return found


def test_the_file_that_comes_with_reaper_says_which_settings_have_no_effect_yet():
    text = (CONFIG_DIRECTORY / "reaper.toml").read_text(encoding="utf-8")
    assert settings_said_not_to_be_built(text) == {
        (table, key) for table, keys in SETTINGS.items() for key, setting in keys.items() if not setting.built
    }


PRESETS = sorted((CONFIG_DIRECTORY / "presets").glob("*.toml"))


def test_there_are_presets():
    assert [path.stem for path in PRESETS] == ["careful", "shared-server", "workstation"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_drop_in_that_changes_what_it_names_and_says_why(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    config = parse_config([(path.name, text)])
    assert bool(without_effect(config)) == ("Not built yet" in text)
    for table, keys in tomllib.loads(text).items():
        for key in keys:
            field = SETTINGS[table][key].field
            changed, default = (
                getattr(getattr(config, table), field),
                getattr(getattr(Config(), table), field),
            )
            assert changed != default, f"[{table}] {key} says only the default"


def test_the_careful_preset_touches_nothing():
    text = (CONFIG_DIRECTORY / "presets" / "careful.toml").read_text(encoding="utf-8")
    config = parse(text)
    assert (config.kill.dry_run, config.kill.reclaim_shm) == (True, False)
    assert (config.scan.action, config.limits.on_breach) == ("report", "report")
