"""Fits kept on disk: which fits are the same, what is not kept, and what becomes of files that are broken or too many."""

from __future__ import annotations

import functools
import operator
import os
import pickle
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, make_regression
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import fbeta_score, make_scorer, max_error, mean_squared_error, r2_score
from sklearn.model_selection import GridSearchCV, KFold, RandomizedSearchCV, ShuffleSplit, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from agent import checkpoint
from agent.checkpoint import Checkpointed, UncheckpointedWarning, checkpointed_search, key_of

X, Y = load_iris(return_X_y=True)


class Counted(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Counts its fits in a file."""

    def __init__(self, path: str = "", shift: int = 0) -> None:
        self.path = path
        self.shift = shift

    def fit(self, X: Any, y: Any) -> Counted:
        with open(self.path, "a") as file:
            file.write("x")
        self.classes_ = numpy.unique(y)
        return self

    def predict(self, X: Any) -> Any:
        return self.classes_[(numpy.arange(len(X)) + self.shift) % len(self.classes_)]


def fits(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(random_state=0),
        Ridge(random_state=0),
        PCA(random_state=0),
        KMeans(n_init=1, random_state=0),
        StandardScaler(),
        make_pipeline(StandardScaler(), LogisticRegression(random_state=0)),
    ],
    ids=repr,
)
def test_scikit_learns_own_checks_pass(estimator: Any, tmp_path: Path) -> None:
    done = check_estimator(Checkpointed(estimator, str(tmp_path)), on_skip=None)
    assert sum(one["status"] == "passed" for one in done) > 30


def test_a_finished_fit_is_not_done_again(tmp_path: Path) -> None:
    count, folder = tmp_path / "count", tmp_path / "kept"
    first = Checkpointed(Counted(str(count)), folder).fit(X, Y)
    again = Checkpointed(Counted(str(count)), folder).fit(X, Y)
    assert fits(count) == 1
    assert (first.from_checkpoint_, again.from_checkpoint_) == (False, True)
    assert (again.predict(X) == first.predict(X)).all()
    assert again.score(X, Y) == first.score(X, Y)
    assert list(again.classes_) == [0, 1, 2]
    Checkpointed(Counted(str(count), shift=1), folder).fit(X, Y)
    Checkpointed(Counted(str(count)), folder).fit(X[1:], Y[1:])
    Checkpointed(Counted(str(count)), folder).fit(X, 2 * Y)
    assert fits(count) == len(files(folder)) == 4
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_a_search_gives_what_it_gives_without_checkpoints(tmp_path: Path) -> None:
    grid = {"C": [0.1, 1.0, 10.0], "fit_intercept": [True, False]}
    plain = GridSearchCV(LogisticRegression(max_iter=1000, random_state=0), grid, cv=3)
    kept = checkpointed_search(plain, tmp_path / "kept").fit(X, Y)
    again = checkpointed_search(plain, tmp_path / "kept").fit(X, Y)
    plain.fit(X, Y)
    for one in (kept, again):
        assert one.best_params_ == {f"estimator__{name}": value for name, value in plain.best_params_.items()}
        for name, values in plain.cv_results_.items():
            if "time" not in name and not name.startswith("param"):
                assert numpy.array_equal(values, one.cv_results_[name]), name
    assert again.best_estimator_.from_checkpoint_
    assert len(files(tmp_path / "kept")) == 6 * 3 + 1


def test_a_grid_in_several_parts_is_rewritten_part_by_part(tmp_path: Path) -> None:
    grid = [{"C": [1.0]}, {"C": [2.0], "fit_intercept": [False]}]
    search = checkpointed_search(GridSearchCV(LogisticRegression(random_state=0), grid), tmp_path)
    assert search.param_grid == [
        {"estimator__C": [1.0]},
        {"estimator__C": [2.0], "estimator__fit_intercept": [False]},
    ]
    drawn = RandomizedSearchCV(LogisticRegression(random_state=0), {"C": [1.0]}, n_iter=1, random_state=0)
    assert checkpointed_search(drawn, tmp_path).param_distributions == {"estimator__C": [1.0]}
    with pytest.raises(TypeError, match="a search with an estimator and a grid is wanted, got Ridge"):
        checkpointed_search(Ridge(), tmp_path)


def test_in_a_pipeline_and_in_a_cross_validation_it_is_an_estimator_like_another(tmp_path: Path) -> None:
    count = tmp_path / "count"
    pipeline = make_pipeline(StandardScaler(), Checkpointed(Counted(str(count)), tmp_path / "kept"))
    first = cross_val_score(pipeline, X, Y, cv=3)
    assert (cross_val_score(pipeline, X, Y, cv=3) == first).all()
    assert fits(count) == 3
    kept = Checkpointed(
        make_pipeline(StandardScaler(), LogisticRegression(random_state=0)), tmp_path / "kept"
    )
    assert kept.fit(X, Y).score(X, Y) > 0.9
    assert kept.predict_proba(X).shape == (150, 3)
    assert not hasattr(kept, "transform")
    assert pickle.loads(pickle.dumps(kept)).score(X, Y) == kept.score(X, Y)
    assert not hasattr(clone(kept), "estimator_")


# -- what is not kept -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(n_estimators=2),
        RandomForestClassifier(n_estimators=2, random_state=numpy.random.RandomState(0)),
        Pipeline([("forest", RandomForestClassifier(n_estimators=2))]),
    ],
)
def test_what_draws_without_a_seed_is_fitted_anew_and_said_so(tmp_path: Path, estimator: Any) -> None:
    one = Checkpointed(estimator, tmp_path / "kept")
    with pytest.warns(UncheckpointedWarning, match="random_state is not a number"):
        one.fit(X, Y)
    assert not one.from_checkpoint_
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("cv", "warned"),
    [
        (3, False),
        (KFold(3), False),
        (KFold(3, shuffle=True, random_state=0), False),
        (KFold(3, shuffle=True), True),
        (ShuffleSplit(2), True),
    ],
)
def test_splits_that_are_drawn_without_a_seed_are_warned_of(tmp_path: Path, cv: Any, warned: bool) -> None:
    search = GridSearchCV(LogisticRegression(random_state=0), {"C": [1.0]}, cv=cv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpointed_search(search, tmp_path)
    assert [one.category for one in caught] == warned * [UncheckpointedWarning]


# -- what tells fits apart ------------------------------------------------------------------------


def test_each_parameter_each_datum_and_each_line_of_code_makes_another_fit(tmp_path: Path) -> None:
    def keys() -> list[str]:
        variants: list[tuple[Any, Any, Any, dict[str, Any]]] = [
            (Ridge(), X, Y, {}),
            (Ridge(alpha=2.0), X, Y, {}),
            (Ridge(alpha=2), X, Y, {}),
            (LogisticRegression(), X, Y, {}),
            (make_pipeline(Ridge()), X, Y, {}),
            (make_pipeline(StandardScaler(), Ridge()), X, Y, {}),
            (make_pipeline(StandardScaler(with_mean=False), Ridge()), X, Y, {}),
            (Ridge(), X[::-1], Y, {}),
            (Ridge(), X, None, {}),
            (Ridge(), X, Y, {"sample_weight": Y}),
        ]
        return [key_of(*one) for one in variants]

    assert len(set(keys())) == len(keys())
    assert keys() == keys()


def test_a_function_of_ones_own_counts_with_its_source() -> None:
    def double(values: Any) -> Any:
        return values * 2

    before = key_of(FunctionTransformer(double), X, None, {})

    def double(values: Any) -> Any:  # type: ignore[no-redef]
        return values * 3

    assert key_of(FunctionTransformer(double), X, None, {}) != before


DATA = load_iris(return_X_y=True)


def times(factor: int) -> Any:
    def apply(x: Any) -> Any:
        return x * factor

    return apply


def power(x: Any, *, of: int = 1) -> Any:
    return x**of


def with_default(of: int) -> Any:
    def apply(x: Any, *, of: int = of) -> Any:
        return x**of

    return apply


class Scale:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return x * self.factor

    def scaled(self, x: Any) -> Any:
        return x * self.factor


@pytest.mark.parametrize(
    "make",
    [
        times,
        with_default,
        lambda number: functools.partial(power, of=number),
        lambda number: functools.partial(functools.partial(power), of=number),
        Scale,
        lambda number: Scale(number).scaled,
        lambda number: (numpy.log1p, numpy.exp, numpy.sqrt)[number],
        operator.itemgetter,
        lambda number: make_scorer((r2_score, mean_squared_error, max_error)[number]),
        lambda number: make_scorer(fbeta_score, beta=number),
    ],
)
def test_what_a_function_was_made_with_makes_another_fit(make: Any) -> None:
    def key(number: int) -> str:
        return key_of(FunctionTransformer(make(number)), *DATA, {})

    assert key(1) == key(1)
    assert key(1) != key(2)


def test_a_function_that_calls_itself_is_told_from_another() -> None:
    def countdown(step: int) -> Any:
        def apply(x: Any) -> Any:
            return apply(x - step) if x > 0 else x

        return apply

    one, same, other = (key_of(FunctionTransformer(countdown(n)), *DATA, {}) for n in (1, 1, 2))
    assert one == same != other


def test_what_cannot_be_told_from_another_is_fitted_anew_and_said_so(tmp_path: Path) -> None:
    odd = Scale(1)
    odd.factor = lambda: 1  # type: ignore[assignment]  # no pickle of it is to be had
    for _ in range(2):
        with pytest.warns(UncheckpointedWarning, match="cannot be told from another"):
            one = Checkpointed(FunctionTransformer(func=None, inverse_func=odd), tmp_path).fit(DATA[0])
        assert not one.from_checkpoint_
    assert os.listdir(tmp_path) == []


def test_another_version_of_a_library_makes_another_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(Ridge(), X, Y, {})
    monkeypatch.setattr(checkpoint.metadata, "version", lambda name: "99")
    assert key_of(Ridge(), X, Y, {}) != before


# -- the files ------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    count, folder = tmp_path / "count", tmp_path / "kept"
    Checkpointed(Counted(str(count)), folder).fit(X, Y)
    (name,) = files(folder)
    (folder / name).write_bytes(b"half a pickle")
    with pytest.warns(RuntimeWarning, match="cannot read"):
        Checkpointed(Counted(str(count)), folder).fit(X, Y)
    assert Checkpointed(Counted(str(count)), folder).fit(X, Y).from_checkpoint_
    assert fits(count) == 2


def test_what_is_too_much_goes_the_longest_unused_first(tmp_path: Path) -> None:
    data = make_regression(50, 3, random_state=0)
    for alpha in (1.0, 2.0, 3.0):
        Checkpointed(Ridge(alpha=alpha, random_state=0), tmp_path).fit(*data)
    sizes = [entry.stat().st_size for entry in os.scandir(tmp_path)]
    for age, alpha in enumerate((2.0, 1.0, 3.0)):
        key = key_of(Ridge(alpha=alpha, random_state=0), *data, {})
        os.utime(tmp_path / f"{key}.fit", (1e9 - age, 1e9 - age))
    assert Checkpointed(Ridge(alpha=3.0, random_state=0), tmp_path).fit(*data).from_checkpoint_  # used again
    Checkpointed(Ridge(alpha=4.0, random_state=0), tmp_path, max_bytes=2 * max(sizes)).fit(*data)
    left = {alpha for alpha in (1.0, 2.0, 3.0, 4.0) if (tmp_path / f"{key_of(Ridge(alpha=alpha, random_state=0), *data, {})}.fit").exists()}  # fmt: skip
    assert left == {3.0, 4.0}


def test_what_somebody_left_unfinished_goes_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".unfinished-old", tmp_path / ".unfinished-new"
    tmp_path.chmod(0o700)
    for one in (old, new):
        one.write_bytes(b"x")
    os.utime(old, (1e9, 1e9))
    Checkpointed(Ridge(random_state=0), tmp_path).fit(X, Y)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_others_may_write_is_refused_for_its_pickles_would_be_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write there"):
        Checkpointed(Ridge(random_state=0), tmp_path).fit(X, Y)


def test_a_failure_in_mid_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.cloudpickle, "dump", fail)
    with pytest.raises(OSError, match="No space"):
        Checkpointed(Ridge(random_state=0), tmp_path).fit(X, Y)
    assert files(tmp_path) == []
