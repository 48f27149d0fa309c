"""Who a peer is, by the kernel's word alone, and how much each uid may ask."""

from __future__ import annotations

import pwd
import socket
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.wire import WireError
from reaperd import gate, gate_frames
from reaperd.gate import Gate, Quota, parse_peer_address
from reaperd.unprivileged import CannotBeNobody, be_expendable, find_user

OVERFLOW = 65534
BURST, PER_S = int(gate._BURST), gate._REQUESTS_PER_S


def test_a_peer_is_who_the_kernel_says() -> None:
    assert parse_peer_address("localhost:1000:100:4711", OVERFLOW) == (1000, 100, 4711)
    assert parse_peer_address("localhost:0:0:1", OVERFLOW) == (0, 0, 1)
    assert parse_peer_address(":1000:100:4711", OVERFLOW) == (1000, 100, 4711)


def test_an_address_of_any_other_form_is_refused() -> None:
    for text in (
        "",
        "localhost",
        "localhost:1000:100",
        "localhost:1000:100:4711:5",
        "localhost:1000:100:4711\n",
        "localhost:1000:100:",
        "localhost::100:4711",
        "localhost:-1:100:4711",
        "localhost:+1:100:4711",
        "localhost: 1:100:4711",
        "localhost:1e3:100:4711",
        "localhost:0x0:100:4711",
        "localhost:\u0660:100:4711",
        "localhost:\u00b2:100:4711",
        "localhost:10000000000:0:1",
        "a:b:0:0:1",
        "127.0.0.1",
        "localhost:1000:100:4711\0",
    ):
        with pytest.raises(WireError) as caught:
            pytest.fail(f"{text!r} was read as {parse_peer_address(text, OVERFLOW)}")
        assert caught.value.kind == "not-allowed"


def test_a_peer_whose_ids_mean_nothing_here_is_refused() -> None:
    for ids in ("1000:100:0", "0:0:0", f"{OVERFLOW}:100:4711", "7:7:00"):
        with pytest.raises(WireError) as caught:
            pytest.fail(f"{ids} was read as {parse_peer_address(f'localhost:{ids}', OVERFLOW)}")
        assert caught.value.kind == "not-allowed"
        assert "container" in str(caught.value)


def test_the_overflow_gid_alone_is_no_reason_to_refuse() -> None:
    assert parse_peer_address(f"localhost:1000:{OVERFLOW}:4711", OVERFLOW) == (1000, OVERFLOW, 4711)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.text(alphabet="localhost:0123456789 -\n\u0661", max_size=30))
def test_any_address_is_a_peer_or_one_wire_error(text: str) -> None:
    try:
        uid, gid, pid = parse_peer_address(text, OVERFLOW)
    except WireError:
        return
    assert max(uid, gid, pid) < 2**32
    assert uid != OVERFLOW
    assert pid > 0


# -- what the gate and the core say to each other ---------------------------------------------------


def test_a_request_comes_back_as_it_was_passed_on() -> None:
    for request in (
        gate_frames.Request(1000, 100, 4711, b"\0\x80id", b'{"v":1}'),
        gate_frames.Request(2**32 - 1, 0, 2**31, b"", b""),
        gate_frames.Request(0, 0, 1, b"x" * 255, b"y" * 16384),
    ):
        data = gate_frames.pack_request(request)
        assert gate_frames.parse_request(data) == request
        assert len(data) <= gate_frames.MAX_REQUEST_BYTES


def test_what_is_too_short_for_a_request_is_none() -> None:
    for data in (b"", b"\0" * 12, b"\0" * 12 + b"\5abcd"):
        with pytest.raises(ValueError, match="short"):
            gate_frames.parse_request(data)


def test_what_is_too_short_for_a_reply_is_none() -> None:
    for data in (b"", b"\1", b"\1\5abcd"):
        with pytest.raises(ValueError, match="short"):
            gate_frames.parse_reply(data)


def test_a_reply_of_any_length_comes_back_in_parts_that_fit() -> None:
    for size in (1, 59_999, 60_000, 60_001, 150_000):
        body = bytes(range(256)) * (size // 256 + 1)
        parts = list(gate_frames.pack_reply(b"id", body[:size]))
        # Net.core.wmem_default.
        assert max(len(part) for part in parts) <= gate_frames.MAX_REPLY_BYTES <= 208 * 1024
        told = [gate_frames.parse_reply(part) for part in parts]
        assert {routing_id for routing_id, _, _ in told} == {b"id"}
        assert b"".join(part for _, part, _ in told) == body[:size]
        assert [last for _, _, last in told] == [False] * (len(told) - 1) + [True]


# -- quotas -----------------------------------------------------------------------------------------


def granted(quota: Quota, uid: int, at_s: float, requests: int) -> int:
    return sum(quota.allows(uid, at_s) for _ in range(requests))


def test_a_uid_may_ask_in_a_burst_and_then_at_a_steady_rate() -> None:
    quota = Quota()
    assert granted(quota, 1000, 0.0, BURST + 100) == BURST
    assert granted(quota, 1000, 0.01, 1000) == int(0.01 * PER_S)
    assert granted(quota, 1000, 0.01, 10) == 0


def test_one_uid_never_uses_up_the_quota_of_another() -> None:
    quota = Quota()
    assert granted(quota, 1000, 0.0, BURST + 10) == BURST
    assert granted(quota, 1001, 0.0, 10) == 10


def test_a_uid_that_was_quiet_gets_no_more_than_a_burst() -> None:
    quota = Quota()
    quota.allows(1000, 0.0)
    assert granted(quota, 1000, 1e6, BURST + 100) == BURST


def test_refused_requests_are_no_debt() -> None:
    quota = Quota()
    granted(quota, 1000, 0.0, 3 * BURST)
    assert quota.allows(1000, 0.01)


def test_any_number_of_uids_takes_a_bounded_amount_of_memory() -> None:
    quota = Quota()
    for uid in range(25_000):
        assert quota.allows(uid, 0.0)
    assert len(quota._buckets) <= 10_001


# -- the end of the core ----------------------------------------------------------------------------


def test_a_core_that_was_killed_with_requests_unread_is_gone_like_any_other() -> None:
    for unread in (b"", b"a request"):
        core, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            if unread:
                ours.send(unread)
            core.close()
            assert not Gate(router, ours, OVERFLOW)._pass_reply()


# -- whom it becomes ------------------------------------------------------------------------------

ACCOUNTS = """\
# a comment: x
root:x:0:0:root:/root:/bin/bash
+@group::::::
nobody:x:65534:65533:nobody:/:/usr/sbin/nologin
reaper-gate:!:978:977:Reaper's gate:/:/usr/sbin/nologin
"""


def test_the_gate_becomes_the_first_of_its_users_that_the_host_has(tmp_path: Path) -> None:
    accounts = tmp_path / "passwd"
    accounts.write_text(ACCOUNTS)
    assert find_user(("reaper-gate", "nobody"), "the gate", str(accounts)) == (978, 977)
    assert find_user(("none", "nobody"), "the gate", str(accounts)) == (65534, 65533)


def test_a_user_that_only_a_name_service_has_is_asked_for(tmp_path: Path) -> None:
    me = pwd.getpwuid(0)
    assert find_user(("none", me.pw_name), "the gate", str(tmp_path / "missing")) == (me.pw_uid, me.pw_gid)


def test_there_is_no_gate_where_there_is_nobody_to_be(tmp_path: Path) -> None:
    accounts = tmp_path / "passwd"
    accounts.write_text("none\nnone:x:1\n")
    with pytest.raises(CannotBeNobody, match="none of the users none for the gate"):
        find_user(("none",), "the gate", str(accounts))


def test_a_core_that_is_gone_before_the_gate_is_up_ends_the_gate_without_a_word() -> None:
    core, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    core.close()
    with ours, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        Gate(router, ours, OVERFLOW).run()


@pytest.mark.parametrize(("before", "after"), [("-900\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")])
def test_the_gate_keeps_no_protection_when_memory_runs_out(before: str, after: str, tmp_path: Path) -> None:
    score = tmp_path / "oom_score_adj"
    score.write_text(before)
    be_expendable(str(score))
    assert score.read_text() == after
