"""A grid search as people write it, and the one line that lets no worker of it outlive it."""

from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV

import agent

agent.register(name="grid-search")

# 24 MB: joblib puts arrays of more than 1 MB into shared memory, where the workers map them.
X, y = make_classification(n_samples=30_000, n_features=100, n_informative=20, random_state=0)

search = GridSearchCV(
    RandomForestClassifier(random_state=0),
    {"n_estimators": [50, 100, 200], "max_depth": [8, 12, None], "max_features": [0.1, "sqrt"]},
    cv=5,
    n_jobs=2,
    verbose=2,
)
search.fit(X, y)
print(f"best: {search.best_params_}, accuracy {search.best_score_:.3f}")
