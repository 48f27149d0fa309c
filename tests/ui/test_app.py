"""What the panel draws, without a browser: for whom it refuses, and what it makes of hostile text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
from streamlit.testing.v1 import AppTest

from agent import launch
from agent.jobs import Job
from agent.status import StatusFile

WITHIN_S = 30.0


def app(status_file: str) -> None:
    import agent.streamlit

    agent.streamlit.training_panel(status_file=status_file, socket="/nonexistent/reaper.sock")


@pytest.fixture
def draw(tmp_path: Path) -> Callable[[str], AppTest]:
    def drawn(name: str) -> AppTest:
        path = str(tmp_path / "run.json")
        StatusFile(path, name, "")
        return AppTest.from_function(app, args=(path,), default_timeout=WITHIN_S).run()

    return drawn


def button(found: AppTest, label: str) -> Any:
    return next(one for one in found.button if one.label == label)


def test_a_training_inside_of_the_server_is_not_stopped_and_the_panel_says_why(
    draw: Callable[[str], AppTest],
) -> None:
    found = draw("risk")
    found = button(found, "Stop Training").click().run()

    def told() -> bool | None:
        found.run()
        return True if found.error else None

    harness.repeat_until(told, WITHIN_S, "the panel says nothing")
    assert "inside of this very server" in found.error[0].value
    assert not found.exception


def app_of_training(status_file: str) -> None:
    import agent.streamlit

    agent.streamlit.training_panel(agent.streamlit.find_training(status_file=status_file))


def test_a_training_that_is_between_two_attempts_is_shown_so_and_stopped(tmp_path: Path) -> None:
    path = str(tmp_path / "run.json")
    fails = ["sh", "-c", "exit $(($$ % 100 + 1))"]  # each time otherwise: it is started again and again
    training = launch.start_training(
        fails, name="risk", status_file=path, restarts=1000, socket="/nonexistent/reaper.sock"
    )
    found = AppTest.from_function(app_of_training, args=(path,), default_timeout=WITHIN_S)

    def shown(text: str) -> bool | None:
        found.run()
        drawn = [*found.markdown, *found.caption, *found.success, *found.error]
        return any(text in one.value for one in drawn) or None

    harness.repeat_until(lambda: shown("Restarting"), WITHIN_S, "it does not fail")
    button(found, "Stop Training").click()
    harness.repeat_until(lambda: shown("The training was stopped"), WITHIN_S, "it is not stopped")
    assert not found.exception
    assert not training.supervised
    assert not shown("Restarting")
    assert button(found, "Stop Training").disabled


def test_a_hostile_name_is_shown_as_it_is(draw: Callable[[str], AppTest]) -> None:
    found = draw("![x](http://example.org/a.png) <b>\n:red[x]")
    assert not found.exception
    assert any(r"\!\[x\]\(http" in one.value for one in found.markdown)


def app_that_resets(status_file: str, how: str) -> None:
    import streamlit as st

    import agent.streamlit

    def reset(button: str) -> None:
        st.session_state.resets = st.session_state.get("resets", 0) + 1
        if how == "raise":
            raise KeyError(button)
        st.rerun()

    agent.streamlit.training_panel(status_file=status_file, socket="/nonexistent/reaper.sock", on_reset=reset)


def failing() -> Job[Any]:
    def fail() -> None:
        raise KeyError("x")

    one = Job("Cleaning up", fail)
    assert one.wait(WITHIN_S)
    return one


def test_a_clean_up_that_fails_in_a_way_that_nobody_expected_is_told_of(
    draw: Callable[[str], AppTest],
) -> None:
    found = draw("risk")
    found.session_state["reaper.job"] = "cleanup", failing()
    found.run()
    assert not found.exception
    assert "Cleaning up has failed" in found.error[0].value
    assert not button(found, "Cleanup Processes").disabled


@pytest.mark.parametrize("how", ["raise", "rerun"])
def test_an_app_that_comes_to_no_end_of_its_reset_is_drawn_all_the_same(tmp_path: Path, how: str) -> None:
    path = str(tmp_path / "run.json")
    StatusFile(path, "risk", "")
    found = AppTest.from_function(app_that_resets, args=(path, how), default_timeout=WITHIN_S)
    found.session_state["reaper.job"] = "cleanup", failing()
    found.run()
    assert bool(found.exception) == (how == "raise")
    found.run()
    assert not found.run().exception
    assert found.session_state["resets"] == 2
    assert not button(found, "Cleanup Processes").disabled


def page_of_deeds() -> None:
    from reaperd.ctl.ui import drawing

    drawing.draw_deeds()


def test_a_deed_of_the_page_that_fails_in_a_way_that_nobody_expected_is_told_of() -> None:
    found = AppTest.from_function(page_of_deeds, default_timeout=WITHIN_S)
    found.session_state["working"] = failing()
    found.run()
    assert not found.exception
    assert "Cleaning up has failed" in found.warning[0].value
    assert "working" not in found.session_state


def page_that_cannot_look() -> None:
    import typing

    from reaperd.ctl.link import Link
    from reaperd.ctl.ui import drawing
    from reaperd.ctl.ui.recorder import Recorder

    class Failing(Recorder):
        def cleanable(self, *, leftovers: bool) -> tuple[dict[str, typing.Any], str]:
            raise OSError("*no* more processes")

    drawing.orphans(Failing(Link(["/nonexistent/reaper.sock"], timeout_s=1), 1000))


def test_why_the_page_cannot_look_for_orphans_is_plain_text() -> None:
    found = AppTest.from_function(page_that_cannot_look, default_timeout=WITHIN_S).run()

    def told() -> str | None:
        return next((one.value for one in found.run().caption if "more processes" in one.value), None)

    assert harness.repeat_until(told, WITHIN_S, "the page says nothing") == r"\*no\* more processes"
    assert not found.exception


def test_the_example_draws_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("REAPER_SOCKET", "/nonexistent/reaper.sock")
    path = os.path.join(harness.ROOT, "examples", "streamlit_app.py")
    found = AppTest.from_file(path, default_timeout=WITHIN_S).run()
    assert not found.exception
    assert not button(found, "Train").disabled
    assert button(found, "Stop Training").disabled
