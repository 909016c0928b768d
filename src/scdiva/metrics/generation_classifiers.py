"""Classifiers as judges: whether real and generated cells can be told apart, and types are what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdiva.metrics.generation_space import NotMeasurableError

N_TREES = 1000
N_FOLDS = 4
_FEWEST = 10
Values = NDArray[np.floating[Any]]


def _forest(seed: int, n_trees: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    # scDiffusion's settings
    return RandomForestClassifier(n_trees, max_depth=5, class_weight="balanced", random_state=seed)


def _neighbours(seed: int, n_trees: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(5)


def _logistic(seed: int, n_trees: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2000)


def _perceptron(seed: int, n_trees: int) -> Any:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier((64, 64), early_stopping=True, random_state=seed)
    return make_pipeline(StandardScaler(), network)


CLASSIFIERS: dict[str, Callable[[int, int], Any]] = {
    "forest": _forest,
    "knn5": _neighbours,
    "logistic": _logistic,
    "mlp": _perceptron,
}
"""Two-sample judges: 1,000 balanced trees of depth 5; five neighbours; logistic regression; two layers of 64 units."""


def c2st_auc(
    real: Values, generated: Values, *, classifier: str, seed: int, n_trees: int = N_TREES, n_folds: int = N_FOLDS
) -> float:
    """Classifier two-sample test: area under the ROC curve of telling generated from real cells; 0.5 is ideal.

    Mean over four stratified folds of the AUC on the fold that the classifier has not seen (25 %, scDiffusion's share).

    Parameters
    ----------
    real, generated
        ``(n_cells, n_features)``.
    classifier
        One of :data:`CLASSIFIERS`.
    seed
        Seed of folds and classifier.
    n_trees, n_folds
        Size of the forest; folds.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    n = min(len(real), len(generated))
    if n < _FEWEST:
        raise NotMeasurableError(f"a two-sample test needs {_FEWEST} cells on both sides, found {n}")
    x = np.concatenate([real, generated])
    is_generated = np.arange(len(x)) >= len(real)
    scores = []
    for train, test in StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(x, is_generated):
        fitted = CLASSIFIERS[classifier](seed, n_trees).fit(x[train], is_generated[train])
        scores.append(roc_auc_score(is_generated[test], fitted.predict_proba(x[test])[:, 1]))
    return float(np.mean(scores))


class TypeClassifier:
    """Logistic regression of cell types on log1p(CP10K) of variable genes.

    Parameters
    ----------
    values
        ``(n_cells, n_features)``.
    labels
        ``(n_cells,)``.

    Raises
    ------
    NotMeasurableError
        Fewer than two types.
    """

    def __init__(self, values: Values, labels: NDArray[np.str_]) -> None:
        if np.unique(labels).size < 2:
            raise NotMeasurableError("a classifier of types needs two of them")
        self._model = _logistic(0, 0).fit(values, labels)

    def predict(self, values: Values) -> NDArray[np.str_]:
        """Return the type of every cell."""
        return np.asarray(self._model.predict(values))


def accuracy_and_f1(predicted: NDArray[np.str_], labels: NDArray[np.str_]) -> tuple[float, float]:
    """Return accuracy and macro-F1 over the types that occur among ``labels``."""
    from sklearn.metrics import f1_score

    names = np.unique(labels)
    f1 = f1_score(labels, predicted, labels=names, average="macro", zero_division=0)
    return float((predicted == labels).mean()), float(f1)
