"""Prints the seconds of a grid search of 64 fits on two loky workers.

    gridsearch.py without | with SOCKET | all SOCKET STATUS_FILE

``with`` registers first; ``all`` is a training session with Reaper's joblib backend, its progress and a status file.
"""

from __future__ import annotations

import sys
import time

from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV

GRID = {"max_depth": [2, 4, 6, 8], "min_samples_leaf": [1, 2, 4, 8]}
FOLDS = 4


def main() -> None:
    features, target = make_classification(n_samples=600, random_state=1)
    search = GridSearchCV(RandomForestClassifier(30, random_state=1), GRID, cv=FOLDS, n_jobs=2)
    began_s = time.perf_counter()
    if sys.argv[1] == "with":
        import agent

        assert agent.register(socket=sys.argv[2]).socket is not None, "no daemon accepted the session"
        search.fit(features, target)
    elif sys.argv[1] == "all":
        import agent
        import agent.joblib
        from agent.sklearn import ReportProgress

        agent.joblib.register(make_default=True)
        with agent.training_session(
            max_workers=2, socket=sys.argv[2], required=True, status_file=sys.argv[3]
        ):
            search.set_callbacks(ReportProgress("fits")).fit(features, target)
    else:
        search.fit(features, target)
    print(time.perf_counter() - began_s)
    assert len(search.cv_results_["params"]) * FOLDS == 64


if __name__ == "__main__":
    main()
