"""``ReportProgress``: a search tells how many of its fits are done, whichever process does them."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV

from agent import session
from agent.checkpoint import Checkpointed, checkpointed_search
from agent.sklearn import ReportProgress, _Counter

pytest.importorskip("sklearn.callback", reason="scikit-learn has callbacks from 1.9 on")
DATA = load_iris(return_X_y=True)
GRID = {"C": [0.1, 1.0, 10.0]}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``agent.progress()`` is told."""
    found: list[Any] = []
    monkeypatch.setattr(session, "progress", lambda *words: found.append(words))
    return found


def model() -> LogisticRegression:
    return LogisticRegression(max_iter=1000, random_state=0)


@pytest.mark.parametrize("refit", [True, False])
def test_a_search_counts_candidates_times_splits_and_the_refit(told: list[Any], refit: bool) -> None:
    search = GridSearchCV(model(), GRID, cv=4, refit=refit).set_callbacks(ReportProgress("fits"))
    search.fit(*DATA)
    assert told[-1] == (12 + refit, 12 + refit, "fits")
    search.fit(*DATA)  # and once more from the start
    assert told[-1] == (12 + refit, 12 + refit, "fits")


def test_a_search_that_draws_its_candidates_counts_them_as_well(told: list[Any]) -> None:
    RandomizedSearchCV(model(), GRID, n_iter=2, cv=2, random_state=0).set_callbacks(ReportProgress()).fit(
        *DATA
    )
    assert told[-1] == (5, 5, "")


def test_what_was_kept_counts_as_done(told: list[Any], tmp_path: Any) -> None:
    for _ in range(2):
        search = checkpointed_search(GridSearchCV(model(), GRID, cv=4), tmp_path / "kept")
        search.set_callbacks(ReportProgress()).fit(*DATA)
        assert told[-1] == (13, 13, "")
    for kept in (False, True):
        one = Checkpointed(model(), tmp_path / "alone").set_callbacks(ReportProgress("one")).fit(*DATA)
        assert (told[-1], one.from_checkpoint_) == ((1, 1, "one"), kept)


def test_a_fit_that_fails_leaves_nothing_behind(told: list[Any]) -> None:
    import threading

    callback = ReportProgress()
    search = GridSearchCV(model(), GRID, cv=4, error_score="raise").set_callbacks(callback)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        search.fit(DATA[0], DATA[1][1:])
    assert not any(thread.name == "reaper-progress" for thread in threading.enumerate())
    assert callback._counter is None


def test_fits_at_the_same_time_are_told_of_together(told: list[Any]) -> None:
    """Two threads may fit copies of one estimator, and with them one callback."""
    import threading

    class Context:
        max_subtasks, parent = 0, "a task"

    callback = ReportProgress("both")
    callback.setup(None, None)
    callback.setup(None, None)
    callback.on_fit_task_end(None, Context)
    callback.teardown(None, None)
    callback.on_fit_task_end(None, Context)
    assert callback._counter is not None
    callback.teardown(None, None)
    assert told[-1] == (2, 0, "both")
    assert callback._counter is None
    assert not any(thread.name == "reaper-progress" for thread in threading.enumerate())


def test_of_tasks_with_an_unknown_number_of_parts_only_those_that_are_done_are_told(told: list[Any]) -> None:
    class Unknown:
        max_subtasks, parent = None, "a task"

    class Leaf:
        max_subtasks, parent = 0, "a task"

    callback = ReportProgress()
    callback.setup(None, None)
    for _ in range(5):
        callback.on_fit_task_begin(None, Unknown)
        callback.on_fit_task_end(None, Leaf)
    callback.teardown(None, None)
    assert told[-1] == (5, None, "")


def test_a_copy_counts_where_the_first_one_reads_and_reports_nothing_itself(told: list[Any]) -> None:
    class Context:
        max_subtasks, parent = 0, "a task"

    first = ReportProgress()
    first.setup(None, None)
    copy = pickle.loads(pickle.dumps(first))
    copy.on_fit_task_end(None, Context)
    assert copy._reporter is None
    assert first._counter is not None
    assert first._counter.read() == (1, 0)
    gone = first._counter._replace(start_ticks=1)
    gone.add(1, 1)  # the pid is another's: nobody is written to
    assert first._counter.read() == (1, 0)
    first.teardown(None, None)
    copy.on_fit_task_end(None, Context)  # too late, and no error
    assert told == [(1, 0, "")]


def test_many_who_count_at_once_lose_nothing(told: list[Any]) -> None:
    counter = _Counter.make()
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda _: counter.add(1, 2), range(800)):
                pass
        assert counter.read() == (800, 1600)
    finally:
        os.close(counter.descriptor)
