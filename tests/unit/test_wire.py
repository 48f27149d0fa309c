"""Messages, session ids and pages: what is well formed comes back whole, and what an enemy sends is one WireError."""

from __future__ import annotations

import binascii
import contextlib
import json
import struct
import sys
import types
from _json import encode_basestring, make_encoder, make_scanner
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import wire
from agent.wire import SessionId, WireError
from reaperd import pages
from reaperd.pages import TornPage

ID = "4711-2a-0000000b-0000000c"
BOOT = "0f0f0f0f-0000-4000-8000-000000000000"
SOCKET = "/run/reaper/reaper.sock"


def kind_of(data: bytes) -> str:
    with pytest.raises(WireError) as caught:
        wire.decode(data)
    return caught.value.kind


# -- messages ---------------------------------------------------------------------------------------


def test_a_message_comes_back_as_it_was_sent() -> None:
    message = {
        "op": "register",
        "name": "Zürich \u2603 \U0001f9ea",
        "n": -1,
        "list": [1, {"x": None}, 0.5, True],
    }
    assert wire.decode(wire.encode(message)) == {"v": 1, **message}


def test_a_message_is_one_line_of_utf8() -> None:
    assert wire.encode({"name": "Zürich"}) == '{"v":1,"name":"Zürich"}'.encode()


def test_what_is_no_unicode_is_sent_with_a_question_mark_in_its_place() -> None:
    message = wire.decode(wire.encode({"cmdline": ["a\udcffb", "\ud800"], "\udfff": "\ud83e\uddea"}))
    assert message == {"v": 1, "cmdline": ["a?b", "?"], "?": "??"}


HALVES = [b"\\ud800", b"\\udfff", b"\\uD83E", b"x\\uddea\\ud83e", b"\\ud83ex\\uddea"]


def test_half_of_a_surrogate_pair_is_a_bad_request_wherever_it_stands() -> None:
    for half in HALVES:
        for data in (b'{"v":1,"a":"%s"}', b'{"v":1,"%s":1}', b'{"v":1,"a":[{"b":[1,"x%s"]}]}'):
            assert kind_of(data % half) == "bad-request", data % half


def test_a_whole_pair_and_an_escaped_backslash_are_no_half_of_one() -> None:
    assert wire.decode(b'{"v":1,"a":"\\ud83e\\uddea \\u00fc"}')["a"] == "\U0001f9ea \u00fc"
    assert wire.decode(b'{"v":1,"a":"\\\\ud800"}')["a"] == "\\ud800"


def test_a_message_nested_to_the_very_limit_of_the_parser_is_a_message_or_one_wire_error() -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        with contextlib.suppress(WireError):
            wire.decode(f'{{"v":1,"b":"\\u0041","a":{"[" * depth}{"]" * depth}}}'.encode())


def test_what_is_no_json_is_never_sent() -> None:
    for value in ({1, 2}, b"bytes", object()):
        with pytest.raises(TypeError, match="not JSON serializable"):
            wire.encode({"a": value})
    circle: list[Any] = []
    circle.append(circle)
    for _ in range(2):
        with pytest.raises(ValueError, match="Circular"):
            wire.encode({"a": circle})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=3), st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none()
    )
)
def test_a_message_is_written_as_json_itself_writes_it(message: dict[str, Any]) -> None:
    message.pop("v", None)
    as_json = json.dumps({"v": 1, **message}, ensure_ascii=False, separators=(",", ":"))
    assert wire.encode(message) == as_json.encode("utf-8", "replace")


def test_blanks_around_a_message_are_no_part_of_it_and_other_blanks_are_none() -> None:
    assert wire.decode(b' \t\r\n{"v":1}\n\r\t ') == {"v": 1}
    for blank in "\u00a0\u2028\v\f\x1c":
        for text in (f'{blank}{{"v":1}}', f'{{"v":1}}{blank}'):
            assert kind_of(text.encode()) == "bad-request", text


def test_nothing_that_is_no_number_is_ever_sent() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            wire.encode({"done": value})


NOT_STRICT_JSON = [
    '{"v":1,"op":"ping","op":"stop"}',
    '{"v":1,"v":1}',
    '{"v":1,"a":{"b":1,"b":2}}',
    '{"v":1,"a":[{"b":1,"b":1}]}',
    '{"v":1,"a":NaN}',
    '{"v":1,"a":Infinity}',
    '{"v":1,"a":-Infinity}',
    '{"v":1,"a":9223372036854775808}',
    '{"v":1,"a":-9223372036854775808}',
    '{"v":1,"a":' + "9" * 5000 + "}",
    '{"v":1,"a":1e999}',
    '{"v":1,"a":[-1e999]}',
    '{"v":1,"a":' + "9" * 400 + ".5}",
    '{"v":1,"a":-' + "9" * 20 + "}",
    '{"v":1,"a":' + "[" * 100_000,
    '{"v":1,"a":' + '{"a":' * 100_000,
    '{"v":1,"a":' + "[" * 50_000 + "]" * 50_000 + "}",
    '{"v":1}{"v":1}',
    '{"v":1} x',
    '{"v":1,}',
    "{'v':1}",
    '{"v":1',
    '{"v":1,"a":"\n"}',
    '{"v":1,"a":01}',
    '{"v":1,"a":"\\x"}',
    '\ufeff{"v":1}',
    "",
    " ",
    "null",
    "[]",
    '[{"v":1}]',
    '"v"',
    "1",
    "true",
]


def test_what_is_not_one_strict_json_object_is_a_bad_request() -> None:
    for text in NOT_STRICT_JSON:
        assert kind_of(text.encode()) == "bad-request", text[:40]


NOT_UTF8 = [
    b'{"v":1,"a":"\xff"}',
    b'{"v":1,"a":"\xed\xa0\x80"}',  # a surrogate
    b'{"v":1,"a":"\xc0\x80"}',  # an overlong NUL
    b"\x80\x81\x82",
    '{"v":1}'.encode("utf-16"),
    '{"v":1}'.encode("utf-32-le"),
    b"\0",
]


def test_what_is_not_utf8_is_a_bad_request() -> None:
    for data in NOT_UTF8:
        with pytest.raises(WireError, match=r"UTF-8|JSON") as caught:
            pytest.fail(f"{data!r} was read as {wire.decode(data)}")
        assert caught.value.kind == "bad-request"
    with pytest.raises(WireError, match="is not UTF-8"):
        wire.decode(NOT_UTF8[0])


def test_the_largest_integers_of_64_bits_are_read() -> None:
    largest = 2**63 - 1
    assert wire.decode(f'{{"v":1,"a":{largest},"b":-{largest}}}'.encode())["a"] == largest


@pytest.mark.parametrize(
    "version", ["0", "2", "1.0", "1e0", "true", '"1"', "null", "[1]", '"' + "x" * 9000 + '"']
)
def test_another_version_is_refused_as_such_and_told_briefly(version: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(f'{{"v":{version}}}'.encode())
    assert caught.value.kind == "bad-version"
    assert len(str(caught.value)) < 100


def test_a_message_without_a_version_is_refused() -> None:
    assert kind_of(b'{"op":"ping"}') == "bad-version"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]",:v1eE-+.Nnulltrue\\u0 ', max_size=40)))
def test_any_bytes_are_a_message_or_one_wire_error(data: bytes | str) -> None:
    try:
        message = wire.decode(data if isinstance(data, bytes) else data.encode())
    except WireError:
        return
    assert message["v"] == 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc\0é", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_JSON)
def test_any_json_comes_back_as_it_was_sent(value: Any) -> None:
    assert wire.decode(wire.encode({"value": value})) == {"v": 1, "value": value}


def test_a_refusal_says_what_kind_it_is_and_why() -> None:
    reply = wire.refusal(WireError("unknown-session", "there is no such session"))
    assert reply == {"ok": False, "kind": "unknown-session", "message": "there is no such session"}
    assert wire.ok(session="x") == {"ok": True, "session": "x"}


# -- fields -----------------------------------------------------------------------------------------


def test_a_text_that_is_none_is_a_bad_request() -> None:
    for value in (None, 1, True, "", "x" * 11, "a\0b", ["a"], {"a": 1}):
        with pytest.raises(WireError) as caught:
            pytest.fail(f"{value!r} was read as {wire.text_field({'name': value}, 'name', limit=10)}")
        assert caught.value.kind == "bad-request"
        assert str(caught.value).startswith("name:")
    with pytest.raises(WireError):
        wire.text_field({}, "name")


def test_a_text_up_to_its_limit_is_taken() -> None:
    assert wire.text_field({"name": "x" * 10}, "name", limit=10) == "x" * 10


def test_an_integer_that_is_none_or_too_small_is_a_bad_request() -> None:
    for value in (None, "1", 1.0, True, False, -1, [1], {}):
        with pytest.raises(WireError) as caught:
            pytest.fail(f"{value!r} was read as {wire.integer_field({'n': value}, 'n')}")
        assert caught.value.kind == "bad-request"
        assert str(caught.value).startswith("n:")


def test_an_absent_integer_is_its_default_and_none_without_one() -> None:
    assert wire.integer_field({"n": -1}, "n", least=-1) == -1
    assert wire.integer_field({}, "n", default=7) == 7
    with pytest.raises(WireError):
        wire.integer_field({}, "n")


def test_no_field_quotes_much_of_what_was_sent() -> None:
    for read in (wire.text_field, wire.integer_field):
        with pytest.raises(WireError) as caught:
            read({"n": ["x" * 100_000]}, "n")
        assert len(str(caught.value)) < 150


# -- session ids ------------------------------------------------------------------------------------


def test_a_session_id_says_who_its_leader_is_and_where() -> None:
    text = wire.format_session_id(4711, 0x2A, 11, 12)
    assert text == ID
    assert SessionId.parse(text) == (4711, 0x2A, 11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 2**31 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
)
def test_every_session_id_that_is_made_can_be_read(pid: int, ticks: int, place: int, nonce: int) -> None:
    text = wire.format_session_id(pid, ticks, place, nonce)
    assert SessionId.parse(text) == (pid, ticks, place)
    assert wire.parse_lineage(text) == (text,)
    assert len(text) <= 64


NO_SESSION_IDS = [
    "",
    "-",
    "---",
    "4711",
    "4711-2a-0000000b",
    "4711-2a-0000000b-0000000c-",
    "4711-2a-0000000b-0000000c-1",
    "-2a-0000000b-0000000c",
    "0-2a-0000000b-0000000c",
    "04711-2a-0000000b-0000000c",
    "-4711-2a-0000000b-0000000c",
    "+4711-2a-0000000b-0000000c",
    "47_11-2a-0000000b-0000000c",
    " 4711-2a-0000000b-0000000c",
    "4711-2a-0000000b-0000000c\n",
    "\u0664711-2a-0000000b-0000000c",
    "4711\u00b2-2a-0000000b-0000000c",
    "4711-2A-0000000b-0000000c",
    "4711-0x2a-0000000b-0000000c",
    "4711--0000000b-0000000c",
    "4711-2a-b-0000000c",
    "4711-2a-0000000b-c",
    "4711-2a-0000000b-0000000g",
    f"{2**31}-2a-0000000b-0000000c",
    "4711-ffffffffffffffff-0000000b-0000000c",
    "4711-" + "0" * 40 + "2a-0000000b-0000000c",
    "9" * 10_000,
    "-" * 10_000,
]


def test_what_is_no_session_id_is_refused_briefly() -> None:
    for text in NO_SESSION_IDS:
        with pytest.raises(WireError) as caught:
            pytest.fail(f"{text[:80]!r} was read as {SessionId.parse(text)}")
        assert caught.value.kind == "bad-session"
        assert len(str(caught.value)) < 120


def test_the_place_tells_sockets_cgroups_and_users_apart() -> None:
    words = [(socket, cgroup, uid) for socket in ("/a", "/b") for cgroup in ("/", "/x") for uid in (0, 1)]
    places = {wire.place_of(*one) for one in words}
    assert len(places) == 8
    assert wire.place_of("/a", "b", 0) != wire.place_of("/", "ab", 0)
    assert all(0 <= place < 2**32 for place in places)
    wire.place_of("/a", "/\udcff", 0)  # a cgroup's name is any bytes


def test_a_realm_is_two_namespaces_and_the_machines_own_needs_no_name() -> None:
    pids, times = wire.PID_NAMESPACE_OF_MACHINE, wire.TIME_NAMESPACE_OF_MACHINE
    assert wire.realm_of(pids, times) == wire.realm_of(pids, 0) == ""
    realms = {wire.realm_of(*one) for one in ((1, times), (pids, 1), (1, 1), (0, 0), (0, times))}
    assert (
        len(realms) == 4
    )  # a kernel without time namespaces, and one whose time namespace is the first, are alike
    assert "" not in realms
    assert len({wire.place_of("/a", "/", 0, realm) for realm in ("", *realms)}) == 5


@pytest.mark.parametrize(("told", "realm"), [(None, ""), ("1:2", "1:2"), ("", "?"), (7, "?"), (["1:2"], "?")])
def test_a_realm_that_makes_no_sense_is_nobodys(told: object, realm: str) -> None:
    fields = {} if told is None else {"realm": told}
    assert pages.parse_page(page(changed(**fields))).realm == realm


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_the_checksum_is_crc_32(data: bytes) -> None:
    assert wire.crc32(data) == binascii.crc32(data)


def test_a_lineage_is_read_outermost_first_and_words_that_are_no_id_are_left_out() -> None:
    other = wire.format_session_id(1, 1, 1, 1)
    assert wire.parse_lineage(f"{other}:{ID}") == (other, ID)
    assert wire.parse_lineage(f":junk:{ID}::{ID.upper()}: {other}:\udcff:{other}\n") == (ID,)
    assert wire.parse_lineage("") == ()


def test_of_a_lineage_longer_than_anybody_nests_the_innermost_count() -> None:
    ids = [wire.format_session_id(pid, 1, 1, 1) for pid in range(1, 41)]
    assert wire.parse_lineage(":".join(ids)) == tuple(ids[-wire.MAX_LINEAGE :])
    assert wire.parse_lineage(":".join(ids[: wire.MAX_LINEAGE])) == tuple(ids[: wire.MAX_LINEAGE])
    assert len(wire.parse_lineage(":".join([ID] * 100_000))) == wire.MAX_LINEAGE


# -- pages ------------------------------------------------------------------------------------------

RECORD = {"id": ID, "name": "grid", "start_ticks": 42, "boot_id": BOOT, "fd": 5, "sockets": [SOCKET]}


def page(
    record: bytes | None = None,
    *,
    sequence: int = 2,
    flags: int = 0,
    progress: bytes = b"",
    spared: bytes = b"",
    magic: bytes = b"",
    record_bytes: int | None = None,
) -> bytes:
    record = wire.encode(RECORD) if record is None else record
    data = bytearray(wire.PAGE_BYTES)
    data[wire.RECORD_AT : wire.RECORD_AT + len(record)] = record
    data[wire.PROGRESS_AT : wire.PROGRESS_AT + len(progress)] = progress
    data[wire.SPARED_AT : wire.SPARED_AT + len(spared)] = spared
    header = wire.pack_header(sequence, flags, len(record) if record_bytes is None else record_bytes)
    data[: len(header)] = header
    data[: len(magic)] = magic
    assert len(data) == wire.PAGE_BYTES
    return bytes(data)


def changed(**fields: Any) -> bytes:
    return wire.encode({**RECORD, **fields})


def test_a_page_comes_back_as_it_was_written() -> None:
    record = wire.pack_record(ID, "grid ☃", 42, BOOT, 5, [SOCKET, "/run/user/1000/reaper/reaper.sock"])
    progress, spared = (
        wire.pack_progress(3, 64, "fold 3"),
        wire.pack_spared([(7, 70), (2**32 - 1, 2**64 - 1)]),
    )
    told = pages.parse_page(page(record, flags=wire.CLOSING, progress=progress, spared=spared))
    assert told == pages.Page(
        id=ID,
        name="grid ☃",
        pid=4711,
        start_ticks=42,
        boot_id=BOOT,
        page_fd=5,
        sockets=(SOCKET, "/run/user/1000/reaper/reaper.sock"),
        flags=wire.CLOSING,
        progress=pages.Progress(3.0, 64.0, "fold 3"),
        spared=((7, 70), (2**32 - 1, 2**64 - 1)),
    )


@pytest.mark.parametrize(
    ("told", "path"),
    [
        ("/home/a/run.json", "/home/a/run.json"),
        ("run.json", ""),
        ("", ""),
        (5, ""),
        (None, ""),
        ("/a\0b", ""),
    ],
)
def test_a_page_names_a_status_file_by_an_absolute_path_or_none(told: Any, path: str) -> None:
    record = {"id": ID, "name": "x", "start_ticks": 42, "boot_id": BOOT, "fd": 5, "sockets": [SOCKET]}
    assert pages.parse_page(page(wire.encode({**record, "status_file": told}))).status_file == path
    assert wire.pack_record(ID, "x", 42, BOOT, 5, [SOCKET], status_file="/run.json") == wire.encode(
        {**record, "status_file": "/run.json"}
    )


def test_a_page_without_progress_says_so() -> None:
    told = pages.parse_page(page())
    assert told.progress is None
    assert told.spared == ()


def test_a_page_in_the_middle_of_a_write_is_torn_and_nothing_else() -> None:
    for data in (page(sequence=3), page(b"junk", sequence=1)):
        with pytest.raises(TornPage):
            pages.parse_page(data)
    assert pages.page_sequence(page(sequence=3)) == 3
    assert pages.page_sequence(page(sequence=0xFFFFFFFE)) == 0xFFFFFFFE


@pytest.mark.parametrize(
    "data",
    [b"", page()[:-1], page() + b"\0", b"\0" * wire.PAGE_BYTES, page(magic=b"reaper\0\2"), page(magic=b"R")],
    ids=["empty", "short", "long", "zeroes", "another version", "another magic"],
)
def test_what_is_no_page_is_refused(data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        pages.parse_page(data)
    assert caught.value.kind == "bad-page"


BAD_RECORDS = [
    page(record_bytes=0),
    page(record_bytes=10),
    page(record_bytes=65535),
    page(record_bytes=wire.PROGRESS_AT - wire.RECORD_AT + 1),
    page(b"not json at all"),
    page(b'{"v":2}'),
    page(b'{"v":1}'),
    page(changed(id="4711")),
    page(changed(id=4711)),
    page(changed(name=None)),
    page(changed(name="x" * (wire.MAX_NAME_CHARS + 1))),
    page(changed(start_ticks=-1)),
    page(changed(start_ticks=True)),
    page(changed(start_ticks="42")),
    page(changed(boot_id="")),
    page(changed(boot_id="x" * 65)),
    page(changed(fd=-1)),
    page(changed(fd=1.5)),
    page(changed(sockets=None)),
    page(changed(sockets={})),
    page(changed(sockets=[1])),
    page(changed(sockets=[["/a"]])),
    page(changed(sockets=["/a"] * (wire.MAX_SOCKETS + 1))),
]


def test_a_page_with_a_bad_record_is_refused() -> None:
    for data in BAD_RECORDS:
        with pytest.raises(WireError) as caught:
            pytest.fail(f"was read as {pages.parse_page(data)}")
        assert not isinstance(caught.value, TornPage)


def test_hostile_progress_is_no_progress_or_has_no_total() -> None:
    rows: list[tuple[float, float, int, tuple[float, float | None, str] | None]] = [
        (float("nan"), 1.0, 0, None),
        (float("inf"), 1.0, 0, None),
        (-float("inf"), 1.0, 0, None),
        (1.0, 2.0, wire.MAX_MESSAGE_BYTES + 1, None),
        (1.0, 2.0, 65535, None),
        (0.0, 0.0, 0, None),
        (1.0, float("nan"), 0, (1.0, None, "")),
        (1.0, float("inf"), 0, (1.0, None, "")),
        (1.0, -float("inf"), 0, (1.0, None, "")),
        (-1.0, -2.0, 0, (-1.0, -2.0, "")),
        (0.0, float("nan"), 0, (0.0, None, "")),
        (0.0, 0.0, 3, (0.0, 0.0, "\0\0\0")),
    ]
    for done, total, length, read in rows:
        told = pages.parse_page(page(progress=struct.pack("<ddH", done, total, length)))
        assert told.progress == read, (done, total, length)


def test_a_message_that_is_no_utf8_is_read_as_far_as_it_is() -> None:
    block = bytearray(wire.pack_progress(1, 2, "abcdef"))
    block[-3] = 0xFF
    told = pages.parse_page(page(progress=bytes(block)))
    assert told.progress is not None
    assert told.progress.message == "abcef"


def test_a_message_that_is_too_long_is_cut_at_a_character() -> None:
    told = pages.parse_page(page(progress=wire.pack_progress(1, None, "x" + "ü" * wire.MAX_MESSAGE_BYTES)))
    assert told.progress is not None
    assert told.progress.message == "x" + "ü" * ((wire.MAX_MESSAGE_BYTES - 1) // 2)
    assert told.progress.total is None


def test_the_longest_progress_and_the_longest_list_of_the_spared_leave_each_other_alone() -> None:
    processes = [(pid, pid) for pid in range(1, 100)]
    told = pages.parse_page(
        page(progress=wire.pack_progress(1, 2, "x" * 5000), spared=wire.pack_spared(processes))
    )
    assert told.progress is not None
    assert told.progress.message == "x" * wire.MAX_MESSAGE_BYTES
    assert told.spared == tuple(processes[-wire.MAX_SPARED :])


def test_a_page_that_claims_to_spare_more_than_fits_is_read_to_the_limit() -> None:
    told = pages.parse_page(page(spared=b"\xff\xff" + b"\1" * 600))
    assert len(told.spared) == wire.MAX_SPARED


def test_a_record_that_does_not_fit_is_refused_when_it_is_written() -> None:
    longest = wire.pack_record(ID, "x", 42, BOOT, 5, ["/" + "s" * 106] * 30)
    assert len(json.loads(longest)["sockets"]) == wire.MAX_SOCKETS
    with pytest.raises(WireError):
        wire.pack_record(ID, "☃" * wire.MAX_NAME_CHARS, 42, BOOT, 5, ["/" + "s" * 2000])


_BLOCKS = st.one_of(st.binary(max_size=40), st.just(wire.encode(RECORD)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    _BLOCKS,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=30),
    st.binary(max_size=30),
)
def test_any_page_is_read_or_one_wire_error(
    record: bytes, sequence: int, flags: int, progress: bytes, spared: bytes
) -> None:
    try:
        told = pages.parse_page(
            page(record, sequence=sequence, flags=flags, progress=progress, spared=spared)
        )
    except WireError:
        return
    assert told.id == ID
    assert told.progress is None or told.progress.done - told.progress.done == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.binary(max_size=100), st.integers(0, wire.PAGE_BYTES - 100))
def test_a_page_with_any_bytes_anywhere_is_read_or_one_wire_error(junk: bytes, at: int) -> None:
    data = bytearray(page(progress=wire.pack_progress(1, 2, "x")))
    data[at : at + len(junk)] = junk
    try:
        pages.parse_page(bytes(data))
    except WireError:
        return


# -- cgroups ----------------------------------------------------------------------------------------


def test_the_cgroup_that_tells_sessions_apart_is_the_unified_one_or_systemds() -> None:
    for text, path in (
        ("0::/user.slice/run.scope\n", "/user.slice/run.scope"),
        ("0::/\n", "/"),
        ("12:memory:/m\n1:name=systemd:/user.slice\n0::/\n", "/user.slice"),
        ("1:name=systemd:/user.slice\n0::/unified\n", "/unified"),
        ("4:memory:/m\n3:cpu,cpuacct:/c\n", "/"),
        ("0::/a:b:c\n", "/a:b:c"),
        ("0::/gone (deleted)\n", "/gone (deleted)"),
        ("0::/..\n", "/.."),
        ("2:name=systemdx:/x\n", "/"),
        ("", "/"),
    ):
        assert wire.parse_cgroup(text) == path, text


def _changed(**names: object) -> types.ModuleType:
    """Return a module like the one that json is made of, with some names changed; those that are None are gone."""
    module = types.ModuleType("_json")
    known = {
        "encode_basestring": encode_basestring,
        "make_encoder": make_encoder,
        "make_scanner": make_scanner,
    }
    vars(module).update({name: value for name, value in {**known, **names}.items() if value is not None})
    return module


@pytest.mark.parametrize(
    "module",
    [
        _changed(make_scanner=None),
        _changed(make_encoder=lambda *arguments: (_ for _ in ()).throw(TypeError("takes 11 arguments"))),
        _changed(make_scanner=lambda context: context.attribute_of_a_later_python),
        _changed(make_encoder=lambda *arguments: lambda value, indent: ("{", "}")),
    ],
    ids=["a part is gone", "takes other arguments", "wants more of its context", "writes something else"],
)
def test_where_json_is_made_otherwise_it_is_used_itself(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType
) -> None:
    monkeypatch.setitem(sys.modules, "_json", module)
    write, scan = wire._json_halves()
    assert write({"a": [1, None, "\u2603"]}) == '{"a":[1,null,"\u2603"]}'
    assert scan('{"a": [1, 2.5]}', 0) == ({"a": [1, 2.5]}, 15)
    for text in ('{"a":1,"a":2}', '{"a":NaN}', '{"a":1e999}'):
        with pytest.raises(ValueError, match=r"."):
            scan(text, 0)


@pytest.mark.parametrize("told", [None, [1, 1], [3, 4], [1, wire.MAX_ATTEMPTS]])
def test_an_attempt_is_one_of_so_many_or_none(told: Any) -> None:
    assert wire.attempt_field({"attempt": told}) == (None if told is None else tuple(told))


@pytest.mark.parametrize(
    "told",
    [
        0,
        "1",
        [],
        [1],
        [1, 2, 3],
        [0, 1],
        [2, 1],
        [1.0, 2],
        [True, 2],
        [1, wire.MAX_ATTEMPTS + 1],
        {"number": 1},
    ],
)
def test_any_other_attempt_is_refused(told: Any) -> None:
    with pytest.raises(wire.WireError, match="attempt: must be"):
        wire.attempt_field({"attempt": told})


@pytest.mark.parametrize(
    ("told", "thresholds"),
    [
        ([300.0, 50], (300.0, 50.0)),
        ([0.5, 0.5], (0.5, 0.5)),
        ([300.0], None),
        ([300.0, "50"], None),
        ([True, 50], None),
        ({"age": 1}, None),
        (None, None),
    ],
)
def test_a_page_says_from_when_on_a_worker_is_a_stray_or_nothing(
    told: Any, thresholds: tuple[float, float] | None
) -> None:
    record = {"id": ID, "name": "x", "start_ticks": 42, "boot_id": BOOT, "fd": 5, "sockets": [SOCKET]}
    assert pages.parse_page(page(wire.encode({**record, "stray": told}))).stray == thresholds
    assert wire.pack_record(ID, "x", 42, BOOT, 5, [SOCKET], stray=(300.0, 50.0)) == wire.encode(
        {**record, "stray": [300.0, 50.0]}
    )
