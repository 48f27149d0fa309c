"""Which files make up the configuration, and what is said of those that cannot be read."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Scratch

from reaperd.config import MAX_TEXT_CHARS, Config, ConfigError
from reaperd.config_files import read_config, secrets_open_to_others


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """Return where the main file would be; its directory of drop-ins exists and is empty."""
    (tmp_path / "reaper.toml.d").mkdir()
    return tmp_path / "reaper.toml"


def drop_in(main: Path, name: str, text: str) -> Path:
    path = main.parent / "reaper.toml.d" / name
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path | str | None, *, required: bool = False) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_config(None if path is None else str(path), required=required)
    return caught.value.faults


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Give up what lets root read everything; anybody else may just as well stay who they are."""
    own = os.geteuid()
    os.seteuid(65534 if own == 0 else own)
    try:
        yield
    finally:
        os.seteuid(own)


def test_no_path_means_the_defaults():
    assert read_config(None, required=False) == Config()


@pytest.mark.parametrize("path", [None, ""])
def test_no_path_where_one_is_required_is_a_fault(path):
    assert faults_of(path, required=True) == ("cannot read the configuration: no file was named",)


def test_an_empty_path_does_not_read_drop_ins_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / ".d").mkdir()
    (tmp_path / ".d" / "x.toml").write_text("[kill]\ngrace = 99\n")
    monkeypatch.chdir(tmp_path)
    assert read_config("", required=False) == Config()


def test_a_missing_file_means_the_defaults(tmp_path):
    assert read_config(str(tmp_path / "no" / "reaper.toml"), required=False) == Config()


def test_a_missing_file_that_is_required_is_a_fault(main):
    assert faults_of(main, required=True) == (f"cannot read {main}: no such file or directory",)


def test_a_file_is_read(main):
    main.write_text("[kill]\ngrace = 7\n")
    assert read_config(str(main), required=True).kill.grace_s == 7


def test_drop_ins_are_merged_in_name_order(main):
    main.write_text("[kill]\ngrace = 1\nexit_grace = 1\ntracker_grace = 1\n")
    drop_in(main, "90-last.toml", "[kill]\ngrace = 90\n")
    drop_in(main, "10-first.toml", "[kill]\ngrace = 10\nexit_grace = 10\n")
    kill = read_config(str(main), required=True).kill
    assert (kill.grace_s, kill.exit_grace_s, kill.tracker_grace_s) == (90, 10, 1)


def test_drop_ins_count_without_the_main_file(main):
    drop_in(main, "a.toml", "[kill]\ngrace = 2\n")
    assert read_config(str(main), required=False).kill.grace_s == 2


def test_only_visible_toml_files_are_drop_ins(main):
    for name in (".#a.toml", "a.toml~", "a.toml.dpkg-old", "README", ".toml"):
        drop_in(main, name, "this is no TOML")
    assert read_config(str(main), required=False) == Config()


def test_the_faults_of_all_files_come_at_once(main):
    main.write_text("[kill]\ngrace = -1\n")
    bad = drop_in(main, "1.toml", "[scan\n")
    latin = drop_in(main, "2.toml", "")
    latin.write_bytes(b"# caf\xe9")
    folder = main.parent / "reaper.toml.d" / "3.toml"
    folder.mkdir()
    dangling = main.parent / "reaper.toml.d" / "4.toml"
    dangling.symlink_to("nowhere")
    assert faults_of(main) == (
        f"cannot read {latin}: it is not UTF-8 at byte 5",
        f"cannot read {folder}: it is a directory",
        f"cannot read {dangling}: no such file or directory",
        f"{main}: [kill] grace: must be at least 0 s, got -1",
        f"{bad}: line 1, column 6: Expected ']' at the end of a table declaration",
    )


def test_a_file_that_cannot_be_read_is_a_fault_even_if_the_others_are_good(main):
    main.mkdir()
    drop_in(main, "a.toml", "[kill]\ngrace = 2\n")
    assert faults_of(main) == (f"cannot read {main}: it is a directory",)


def test_a_file_without_permission_is_a_fault(main):
    main.write_text("")
    main.chmod(0)
    with as_nobody():
        faults = faults_of(main)
    assert f"cannot read {main}: permission denied" in faults


def test_drop_ins_that_may_not_be_listed_are_a_fault(main):
    drop_in(main, "a.toml", "[kill]\ngrace = 2\n")
    (main.parent / "reaper.toml.d").chmod(0)
    with as_nobody():
        faults = faults_of(main)
    (main.parent / "reaper.toml.d").chmod(0o700)
    assert f"cannot read {main}.d: permission denied" in faults


def test_a_path_below_a_file_is_a_fault(main):
    main.write_text("")
    below = main / "reaper.toml"
    assert f"cannot read {below}: not a directory" in faults_of(below)


def test_a_loop_of_links_is_a_fault(main):
    main.symlink_to(main)
    assert faults_of(main) == (f"cannot read {main}: too many levels of symbolic links",)


def test_drop_ins_that_are_no_directory_are_a_fault(tmp_path):
    (tmp_path / "reaper.toml").write_text("[kill]\ngrace = -1\n")
    (tmp_path / "reaper.toml.d").write_text("")
    assert faults_of(tmp_path / "reaper.toml") == (
        f"cannot read {tmp_path}/reaper.toml.d: not a directory",
        f"{tmp_path}/reaper.toml: [kill] grace: must be at least 0 s, got -1",
    )


def test_a_fifo_is_a_fault_and_blocks_nobody(main):
    os.mkfifo(main)
    assert faults_of(main) == (f"cannot read {main}: it is not a regular file",)


def test_a_device_is_a_fault():
    assert faults_of("/dev/zero") == ("cannot read /dev/zero: it is not a regular file",)


def test_a_socket_is_a_fault(main):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(main))
        assert faults_of(main)[0].startswith(f"cannot read {main}: ")


def test_the_null_device_is_an_empty_file():
    assert read_config("/dev/null", required=True) == Config()


def test_a_drop_in_linked_to_the_null_device_is_masked(main):
    (main.parent / "reaper.toml.d" / "a.toml").symlink_to("/dev/null")
    assert read_config(str(main), required=False) == Config()


def test_a_file_that_is_too_large_is_a_fault(main):
    main.write_text("#" * MAX_TEXT_CHARS)
    assert read_config(str(main), required=True) == Config()
    main.write_text("#" * (MAX_TEXT_CHARS + 1))
    assert faults_of(main) == (f"cannot read {main}: it is larger than {MAX_TEXT_CHARS} bytes",)


def test_a_byte_order_mark_is_no_fault(main):
    main.write_bytes(b"\xef\xbb\xbf[kill]\r\ngrace = 3\r\n")
    assert read_config(str(main), required=True).kill.grace_s == 3


def test_a_name_cannot_forge_a_line_of_the_log(tmp_path):
    (fault,) = faults_of(f"{tmp_path}/a\nb\udcff", required=True)
    assert fault == f"cannot read {tmp_path}/a\\nb\\udcff: no such file or directory"


def test_a_path_with_a_nul_is_a_fault(tmp_path):
    fault = faults_of(f"{tmp_path}/a\0b")[0]
    assert fault.startswith(f"cannot read {tmp_path}/a\\x00b.d: ")
    assert "embedded null" in fault


def test_no_descriptor_stays_open(main):
    main.mkdir()
    drop_in(main, "a.toml", "x")
    before = os.listdir("/proc/self/fd")
    faults_of(main)
    assert os.listdir("/proc/self/fd") == before


# -- who can read the secrets ----------------------------------------------------------------------------


def test_a_file_with_urls_of_alerts_that_all_can_read_is_named(scratch: Scratch) -> None:
    outer = Path(scratch.directory("outer"))
    path = outer / "reaper.toml"
    drop_ins = outer / "reaper.toml.d"
    drop_ins.mkdir(parents=True)
    for name, text, mode in (
        (path, "[kill]\ngrace = 1", 0o644),
        (drop_ins / "10.toml", '[alerts]\nurls = ["a://b"]', 0o644),
        (drop_ins / "20.toml", '[alerts]\nurls = ["a://b"]', 0o640),
        (drop_ins / "30.toml", "[alerts]\nurls = []", 0o644),
        (drop_ins / "40.toml", "[alerts", 0o644),
    ):
        name.write_text(text, "utf-8")
        name.chmod(mode)
    assert secrets_open_to_others(str(path)) == [str(drop_ins / "10.toml")]
    outer.chmod(0o700)
    assert secrets_open_to_others(str(path)) == []
    assert secrets_open_to_others(None) == []
    assert secrets_open_to_others(scratch.file("none.toml")) == []
