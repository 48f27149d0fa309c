"""A grid search of 64 fits and a refit, whose fits are kept on disk and counted; ended at whatever moment, it can be run again.

    search.py FOLDER N_JOBS BACKEND

FOLDER gets run.json, kept/ (the fits) and begun (a byte for each fit that began). SIGUSR1 makes it raise, SIGUSR2 sys.exit(3).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from typing import Any

import joblib
import numpy
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import agent
import agent.joblib
from agent.checkpoint import checkpointed_search

GRID = {"C": list(numpy.logspace(-3, 3, 8)), "fit_intercept": [True, False]}


class Counted(LogisticRegression):  # type: ignore[misc]
    """Takes its time, and leaves a byte for each fit that it begins."""

    def __init__(
        self, C: float = 1.0, fit_intercept: bool = True, random_state: int | None = None, path: str = ""
    ):
        super().__init__(C=C, fit_intercept=fit_intercept, random_state=random_state, max_iter=1000)
        self.path = path

    def fit(self, X: Any, y: Any) -> Counted:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, b"x")
        os.close(handle)
        for _ in range(4):
            super().fit(X, y)
        return self


def fail(number: int, frame: Any) -> None:
    raise ArithmeticError("no more")


def leave(number: int, frame: Any) -> None:
    sys.exit(3)


def digest(results: dict[str, Any]) -> str:
    kept = {name: repr(values) for name, values in sorted(results.items()) if "time" not in name}
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def main() -> None:
    folder, n_jobs, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    agent.joblib.register()
    signal.signal(signal.SIGUSR1, fail)
    signal.signal(signal.SIGUSR2, leave)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    data = make_classification(1000, 20, random_state=0)
    estimator = Counted(random_state=0, path=os.path.join(folder, "begun"))
    search = checkpointed_search(
        GridSearchCV(estimator, GRID, cv=4, n_jobs=n_jobs), os.path.join(folder, "kept")
    )
    try:
        with agent.training_session(
            "search", status_file=os.path.join(folder, "run.json"), grace=2.0
        ) as session:
            print(json.dumps({"begun": True}), flush=True)
            with joblib.parallel_config(backend=backend):
                search.fit(*data)
            assert session.running
    finally:
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        print(json.dumps({"restored": before == after}), flush=True)
    print(json.dumps({"results": digest(search.cv_results_), "best": str(search.best_params_)}), flush=True)


if __name__ == "__main__":
    main()
