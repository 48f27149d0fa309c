"""A training to copy: several models with a search each, evaluated, saved with a model card; ended at any point, it goes on there.

    python examples/risk_model.py --model-dir models

Run it, press Ctrl-C or kill -9 it, and run it again: no worker is left in between, and what was fitted is not fitted again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from datetime import datetime, timezone
from typing import Any, NamedTuple

import joblib
import sklearn
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import agent
import agent.joblib
from agent.checkpoint import checkpointed_search


class Evaluation(NamedTuple):
    """How one model does on data that it has not seen."""

    name: str
    parameters: dict[str, Any]
    roc_auc: float  # 0.5 is chance, 1 is perfect
    brier: float  # mean squared error of the probabilities: less is better
    path: str  # of the saved model


class RiskModelTrainer:
    """Trains models that tell the probability of the rarer of two classes, and keeps the best of each kind in ``model_dir``.

    ``max_workers`` bounds the workers of every search, ``use_gpu`` adds a model that is trained on an NVIDIA GPU (needs
    xgboost), and ``random_state`` makes two runs, and a run that was interrupted, give the same.
    """

    def __init__(
        self, model_dir: str, max_workers: int = 4, use_gpu: bool = False, random_state: int = 42
    ) -> None:
        self.model_dir = model_dir
        self.max_workers = max_workers
        self.use_gpu = use_gpu
        self.random_state = random_state

    @property
    def status_file(self) -> str:
        """Where others read what became of the run: ``agent.read_status()``."""
        return os.path.join(self.model_dir, "run.json")

    def candidates(self) -> dict[str, tuple[Any, dict[str, list[Any]]]]:
        """Return each model with the grid that is searched."""
        seed = self.random_state
        found: dict[str, tuple[Any, dict[str, list[Any]]]] = {
            "logistic": (
                make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, random_state=seed)),
                {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]},
            ),
            "forest": (
                RandomForestClassifier(n_jobs=-1, random_state=seed),
                {"n_estimators": [100, 200], "max_depth": [4, 8, None]},
            ),
            "boosting": (
                HistGradientBoostingClassifier(random_state=seed),
                {"learning_rate": [0.05, 0.1], "max_leaf_nodes": [15, 31]},
            ),
        }
        if self.use_gpu:
            try:
                from xgboost import XGBClassifier
            except ImportError:
                raise SystemExit("--gpu needs xgboost: pip install xgboost") from None
            model = XGBClassifier(device="cuda", random_state=seed)
            found["xgboost"] = model, {"max_depth": [4, 8], "learning_rate": [0.05, 0.1]}
        return found

    def train(self, X: Any, y: Any) -> list[Evaluation]:  # noqa: N803 - as scikit-learn has it
        """Search, evaluate and save every model, the best first in what is returned; can be interrupted, and run again."""
        os.makedirs(self.model_dir, exist_ok=True)
        train_x, test_x, train_y, test_y = train_test_split(
            X, y, test_size=0.25, stratify=y, random_state=self.random_state
        )
        candidates, found = self.candidates(), []
        with agent.training_session(
            "risk model", max_workers=self.max_workers, status_file=self.status_file
        ) as session:
            for done, (name, (model, grid)) in enumerate(candidates.items()):
                agent.progress(done, len(candidates), name)
                search = self._search(name, model, grid, session.n_jobs)
                with agent.limit_workers(search, self.max_workers):
                    search.fit(train_x, train_y)
                found.append(self._evaluate(name, search, test_x, test_y))
            agent.progress(len(candidates), len(candidates), "done")
            found.sort(key=lambda one: one.roc_auc, reverse=True)
            self._write_card(found, len(train_y), len(test_y), float(sum(y)) / len(y))
        return found

    def _search(self, name: str, model: Any, grid: dict[str, list[Any]], n_jobs: int) -> Any:
        splits = StratifiedKFold(4, shuffle=True, random_state=self.random_state)
        search = GridSearchCV(model, grid, scoring="roc_auc", cv=splits, n_jobs=n_jobs)
        return checkpointed_search(search, os.path.join(self.model_dir, "checkpoints", name))

    def _evaluate(self, name: str, search: Any, test_x: Any, test_y: Any) -> Evaluation:
        fitted = search.best_estimator_.estimator_
        chances = fitted.predict_proba(test_x)[:, 1]
        path = os.path.join(self.model_dir, f"{name}.joblib")
        # Whoever loads it meanwhile has the old one, and never half of the new.
        joblib.dump(fitted, f"{path}.new")
        os.replace(f"{path}.new", path)
        parameters = {key.removeprefix("estimator__"): value for key, value in search.best_params_.items()}
        roc_auc, brier = roc_auc_score(test_y, chances), brier_score_loss(test_y, chances)
        return Evaluation(name, parameters, float(roc_auc), float(brier), path)

    def _write_card(self, found: list[Evaluation], train_rows: int, test_rows: int, share: float) -> None:
        rows = [f"| {one.name} | {one.roc_auc:.4f} | {one.brier:.4f} | `{one.parameters}` |" for one in found]
        lines = [
            "# Risk model",
            "",
            f"Best: **{found[0].name}** (`{os.path.basename(found[0].path)}`), trained {datetime.now(timezone.utc):%Y-%m-%d}.",
            "",
            "| model | ROC AUC | Brier score | parameters |",
            "|---|---|---|---|",
            *rows,
            "",
            f"- Data: {train_rows} rows to train and choose by (4 stratified folds), {test_rows} that no model has seen before.",
            f"- {share:.0%} of all rows are of the class whose probability is told.",
            f"- Python {platform.python_version()}, scikit-learn {sklearn.__version__}, random_state {self.random_state}.",
            "- Not examined: fairness between groups, drift of the data, and rows unlike those above.",
            "",
        ]
        path = os.path.join(self.model_dir, "MODEL_CARD.md")
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
        os.replace(f"{path}.new", path)


def main() -> int:
    """Train on data that scikit-learn ships: is a tumour malignant?"""
    parser = argparse.ArgumentParser(
        description="Train risk models on the breast cancer data of scikit-learn."
    )
    parser.add_argument("--model-dir", default="models", help="where everything is kept (default: models)")
    parser.add_argument("--max-workers", type=int, default=4, help="workers at most (default 4)")
    parser.add_argument("--gpu", action="store_true", help="also a model on an NVIDIA GPU; needs xgboost")
    options = parser.parse_args()
    agent.joblib.register(make_default=True)
    X, y = load_breast_cancer(return_X_y=True)  # noqa: N806 - as scikit-learn has it
    trainer = RiskModelTrainer(options.model_dir, options.max_workers, options.gpu)
    for one in trainer.train(X, 1 - y):  # in these data, 0 is malignant
        print(f"{one.name:<10} ROC AUC {one.roc_auc:.4f}, Brier score {one.brier:.4f}, {one.parameters}")
    print(
        f"models and MODEL_CARD.md are in {options.model_dir}; status: {agent.read_status(trainer.status_file).state}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
