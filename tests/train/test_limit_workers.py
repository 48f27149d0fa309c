"""What estimators ask for, within ``limit_workers()`` and after it."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.decomposition import DictionaryLearning
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline

import agent
from agent import limits


@pytest.fixture
def six_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "usable_cpus", lambda: 6)


def jobs(estimator: Any) -> dict[str, Any]:
    return {key: value for key, value in estimator.get_params(deep=True).items() if key.endswith("n_jobs")}


@pytest.mark.usefixtures("six_cpus")
def test_the_outermost_gets_the_limit_and_what_works_inside_it_one_worker() -> None:

    forest = RandomForestClassifier(n_jobs=-1)
    candidate = RandomForestClassifier(n_jobs=5)
    vote = VotingClassifier([("forest", forest), ("plain", LogisticRegression())], n_jobs=2)
    pipeline = Pipeline([("model", vote)])
    search = GridSearchCV(pipeline, {"model__forest": [candidate, "drop"]}, n_jobs=-1)
    asked = jobs(search)
    with agent.limit_workers(search, 3) as limited:
        assert limited is search
        assert (search.n_jobs, vote.n_jobs, forest.n_jobs, candidate.n_jobs) == (3, 1, 1, 1)
    assert jobs(search) == asked
    assert candidate.n_jobs == 5


@pytest.mark.usefixtures("six_cpus")
@pytest.mark.parametrize(
    ("asked", "granted"),
    [(-1, 4), (-3, 4), (-5, 2), (-6, 1), (-100, 1), (2, 2), (50, 4), (1, 1), (None, None)],
)
def test_a_number_of_jobs_is_read_as_joblib_reads_it(asked: int | None, granted: int | None) -> None:

    one = RandomForestClassifier(n_jobs=asked)
    with agent.limit_workers(one, 4):
        assert one.n_jobs == granted
    assert one.n_jobs == asked


@pytest.mark.usefixtures("six_cpus")
def test_steps_of_a_pipeline_follow_each_other_and_each_gets_the_limit() -> None:

    first, second = DictionaryLearning(n_jobs=-1), RandomForestClassifier(n_jobs=-1)
    with agent.limit_workers(make_pipeline(first, second), 2):
        assert (first.n_jobs, second.n_jobs) == (2, 2)


@pytest.mark.usefixtures("six_cpus")
def test_what_was_asked_for_comes_back_whatever_happens_inside() -> None:

    one = RandomForestClassifier(n_jobs=-1)
    with pytest.raises(ZeroDivisionError), agent.limit_workers(one, 2):
        raise ZeroDivisionError
    assert one.n_jobs == -1
