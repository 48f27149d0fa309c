"""Search a grid with scikit-learn, every fit of which takes longer than the test that kills it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy
import stage
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GridSearchCV

import agent


class SlowClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Says that it is being fitted, then burns a core."""

    def __init__(self, pipe: str = "", depth: int = 1) -> None:
        self.pipe = pipe
        self.depth = depth

    def fit(self, X: Any, y: Any) -> SlowClassifier:
        stage.report(self.pipe)
        stage.spin()
        self.classes_ = numpy.unique(y)
        return self

    def predict(self, X: Any) -> Any:
        return numpy.zeros(len(X), dtype=int)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    agent.register("grid search")
    muster = stage.Muster()

    def announce() -> None:
        muster.wait(options.workers)
        stage.announce()

    stage.serve_beside(announce)
    generator = numpy.random.default_rng(1)
    features, labels = generator.random((200, 4)), generator.integers(0, 2, 200)
    grid = {"depth": list(range(1, 9))}
    GridSearchCV(SlowClassifier(muster.pipe), grid, n_jobs=options.workers, cv=3).fit(features, labels)


if __name__ == "__main__":
    main()
