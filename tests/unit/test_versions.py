"""What an earlier version wrote is still understood: messages, session pages and the database, as they were recorded."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fuzzing.messages import answering, framed
from fuzzing.requests import opened_world
from versions import FIXTURES, NAMES

from agent import client, wire
from reaperd import pages
from reaperd.ctl import DONE, FAILED
from reaperd.ctl.main import main
from reaperd.store import Store

BOOT = "11111111-2222-4333-8444-555555555555"  # of every fixture
# What was asked about nobody.
REFUSED = ("unknown-process", "unknown-session", "not-quarantined", "not-protected", "not-allowed", "gone")
MAX_FIXTURE_BYTES = 200_000


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(FIXTURES) / request.param


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))


def test_there_is_an_earlier_version_and_it_is_small() -> None:
    assert NAMES
    for name in NAMES:
        sizes = [path.stat().st_size for path in (Path(FIXTURES) / name).iterdir()]
        assert sum(sizes) < MAX_FIXTURE_BYTES


# -- messages -------------------------------------------------------------------------------------


def test_every_request_of_an_earlier_version_is_one_and_is_answered(folder: Path) -> None:
    said = read(folder, "messages.json")
    operations = {json.loads(request)["op"] for request, _ in said}
    assert operations >= {"register", "unregister", "ping", "status", "ps", "events", "stop", "config"}
    with opened_world() as world:
        for request, before in said:
            message = wire.decode(request.encode())
            told = wire.decode(world.ask(message))
            if message["op"] == "register":  # of another process, long ago
                assert (told["ok"], told["kind"]) == (False, "bad-session")
                assert "pid" in told["message"]
            elif message["op"] == "nonsense":
                assert told["kind"] == json.loads(before)["kind"] == "unknown-op"
            else:
                assert told["ok"] or told["kind"] in REFUSED, f"{request}: {told}"
                if told["ok"] and json.loads(before)["ok"]:
                    assert told.keys() >= json.loads(before).keys(), "a field that was there is gone"


def test_every_reply_of_an_earlier_version_is_understood(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "ping": ["ping"], "status": ["status"], "ps": ["ps"], "events": ["events"], "config": ["config", "show"],
        "orphans": ["orphans"], "explain": ["explain", "1"], "cleanup": ["cleanup", "--dry-run"],
        "protect": ["protect", "4194304"], "release": ["release", "4194304"], "stop": ["stop", "nobody"],
    }  # fmt: skip
    seen = set()
    with answering() as server:
        for request, reply in read(folder, "messages.json"):
            message, told = json.loads(request), json.loads(reply)
            server.answer = framed(reply.encode())
            if told["ok"]:
                assert client.request(server.path, message) == told
            else:
                with pytest.raises(wire.WireError) as refusal:
                    client.request(server.path, message)
                assert (refusal.value.kind, str(refusal.value)) == (told["kind"], told["message"])
            command = commands.get(message["op"])
            if command is not None:
                command = [*command, "--score"] if message.get("score") else command
                code = main(["--socket", server.path, "--timeout", "5", *command])
                assert (code == DONE) == told["ok"], f"{command}: {code}, {capsys.readouterr().err}"
                assert code in (DONE, FAILED, 2, 4)
                seen.add(message["op"])
    assert seen == set(commands)


# -- session pages --------------------------------------------------------------------------------


def test_a_page_of_an_earlier_agent_says_what_it_said_then(folder: Path) -> None:
    found = {path.stem: pages.parse_page(path.read_bytes()) for path in sorted(folder.glob("page-*.bin"))}
    assert found.keys() == {"page-registered", "page-progress"}
    for page in found.values():
        assert page.name == "grid search"
        assert page.boot_id == BOOT
        assert page.sockets
        assert page.start_ticks == wire.SessionId.parse(page.id).start_ticks
        assert (page.status_file, page.stray, page.attempt) == ("", None, None)
    assert (found["page-registered"].progress, found["page-registered"].spared) == (None, ())
    assert found["page-progress"].progress == (12.0, 64.0, "fold 3")
    assert found["page-progress"].spared == ((7, 8), (9, 10))


def test_a_page_with_more_than_is_known_here_is_read_all_the_same(folder: Path) -> None:
    data = bytearray((folder / "page-progress.bin").read_bytes())
    before = pages.parse_page(bytes(data))
    size = int.from_bytes(data[16:18], "little")
    record = json.loads(data[64 : 64 + size])
    more = json.dumps({**record, "later": {"a": [1, 2]}, "v": 1}).encode()
    data[16:18] = len(more).to_bytes(2, "little")
    data[64 : 64 + len(more)] = more
    data[12] |= 0x80  # a flag of a later version
    data[4000:4008] = b"\xff" * 8  # and a block, where there is none yet
    found = pages.parse_page(bytes(data))
    assert found._replace(flags=0) == before._replace(flags=0)


# -- the database ---------------------------------------------------------------------------------


def restored(folder: Path, state: Path) -> Path:
    path = state / "reaper.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript((folder / "reaper.sql").read_text("utf-8"))
    return path


def test_the_database_of_an_earlier_daemon_is_read_as_it_was(folder: Path, tmp_path: Path) -> None:
    expected = read(folder, "expected.json")
    restored(folder, tmp_path)
    with closing(Store(str(tmp_path), BOOT)) as store:
        assert not list(tmp_path.glob("*.broken-*"))
        found = {one.id: one for one in store.sessions()}
        assert found.keys() == expected["sessions"].keys()
        for id_, facts in expected["sessions"].items():
            session = found[id_]
            cause = session.cause and [session.cause.kind.value, *session.cause[1:]]
            now = {**session._asdict(), "cause": cause}
            now["namespaces"] = now["namespaces"][: len(facts["namespaces"])]  # there is one more by now
            now.update({key: sorted(value) for key, value in now.items() if isinstance(value, frozenset)})
            assert {key: json.loads(json.dumps(now[key])) for key in facts} == facts
        suspects = [[*id_, *one] for id_, one in store.orphans().items()]
        assert json.loads(json.dumps(suspects)) == expected["orphans"]
        assert json.loads(json.dumps(sorted(store.spared()))) == expected["spared"]
        assert store.events() == expected["events"]
        assert store.total("reaped") == expected["reaped"]
        (key,) = {one.key for one in found.values() if one.cause is None}
        assert store.is_settled(key._replace(id="2861-2f1c6-eb9f3362-3e9773f6"))
        # And it can be written as any other.
        store.add_event({"kind": "started"}, 2e9)
        store.save(found[key.id]._replace(attempt=(1, 4)))
        assert store.commit()


def test_the_sessions_of_an_earlier_daemons_boot_are_dropped_and_its_history_stays(
    folder: Path, tmp_path: Path
) -> None:
    restored(folder, tmp_path)
    with closing(Store(str(tmp_path), "another boot")) as store:
        assert (store.sessions(), store.orphans(), store.spared()) == ([], {}, frozenset())
        assert store.events() == read(folder, "expected.json")["events"]


def test_nothing_in_a_fixture_tells_of_the_place_that_it_was_made_in(folder: Path) -> None:
    for path in folder.iterdir():
        for word in (
            os.fsencode(str(Path(FIXTURES).parents[1])),
            os.fsencode(sys.prefix),
            b"/.pyenv/",
            b"/home/",
        ):
            assert word not in path.read_bytes(), path
