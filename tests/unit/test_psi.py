"""Pressure as the kernel tells it, and as it may be told on another one."""

from __future__ import annotations

from pathlib import Path

from reaperd.linux.psi import parse_stalls, read_stalls

TEXT = "some avg10=5.60 avg60=5.04 avg300=15.04 total=7251824052\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=12\n"


def test_the_totals_are_read_in_microseconds() -> None:
    assert parse_stalls(TEXT) == {"some": 7251824052, "full": 12}


def test_what_is_of_another_form_is_left_out() -> None:
    for text in (
        "",
        "\n\n",
        "some",
        "some total=",
        "some total=-1",
        "some total=1e3",
        "most total=5",
        "total=5 some",
    ):
        assert parse_stalls(text) == {}, text


def test_a_resource_that_the_kernel_tells_nothing_of_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cpu").write_text(TEXT.splitlines()[0])  # older kernels have no "full" for it
    (tmp_path / "io").write_text("")
    assert read_stalls(str(tmp_path)) == {"cpu": {"some": 7251824052}}
    assert read_stalls(str(tmp_path / "none")) == {}
