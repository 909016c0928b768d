"""Simple classifiers of cell types: what annotation is judged against, and null controls.

All have one shape: raw counts of labelled training cells and of test cells over the same genes, and a seed; back come
:class:`Predictions`. Whatever is fitted (variable genes, components, classifiers) is fitted on the training cells
alone, but for :func:`logistic_pca_of_all`. Each is deterministic given its seed.

Values are log1p(CP10K). The regressions are multinomial, not standardised, and have C = 0.1 (scikit-learn's: the
inverse of the L2 penalty). This is our decision, taken on one 80/20 split each of pbmc3k and zheng_sorted7_3500.
Accuracy and log-loss (nats) on the 2,000 variable genes: C = 0.1, 0.911 / 0.909 and 0.24 / 0.26; C = 1, 0.902 / 0.901
and 0.30 / 0.31; standardised and clipped at 10, at the best C of three (0.01), 0.890 / 0.909 and 0.28 / 0.32. There is
no inner cross-validation: with five cells per type it would have little to choose by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scdiva.baselines.common import other_package, require
from scdiva.data.components import components_of, fit_components, log_cp10k, variable_genes
from scdiva.errors import ConfigError, UnsupportedError

C = 0.1
MAX_ITERATIONS = 1000
N_NEIGHBOURS = 15
_BLOCK = 2000
# no other use of the same seed has this tag
_NULL_STREAM = 17


@dataclass(frozen=True, slots=True)
class Predictions:
    """Labels of test cells.

    Parameters
    ----------
    label
        ``(n_cells,)`` the class of the largest probability; of equal ones, the first.
    probabilities
        ``(n_cells, n_classes)`` float64, rows add up to 1; columns in the order of ``classes``.
    classes
        ``(n_classes,)`` the labels of the training cells, sorted.
    """

    label: NDArray[np.str_]
    probabilities: NDArray[np.float64]
    classes: NDArray[np.str_]

    @classmethod
    def of(cls, probabilities: NDArray[Any], classes: NDArray[np.str_]) -> Predictions:
        """Take the most probable class of every cell."""
        probabilities = np.asarray(probabilities, dtype=np.float64)
        return cls(classes[probabilities.argmax(axis=1)], probabilities, classes)


Classifier = Callable[..., Predictions]


def logistic_hvg(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Logistic regression on the training cells' 2,000 variable genes (flavour "seurat"); see the module for C.

    Parameters
    ----------
    train
        CSR ``(n_train, n_genes)`` raw counts.
    train_labels
        ``(n_train,)`` labels, taken as text. A class may have a single cell, and there may be a single class.
    test
        CSR ``(n_test, n_genes)`` raw counts over the same genes.
    seed
        Seed; this method draws nothing.

    Returns
    -------
    Predictions

    Raises
    ------
    ConfigError
        There are no training cells, numbers of cells and labels differ, or the genes do.
    """
    labels = _checked(train, train_labels, test)
    values = log_cp10k(train)
    genes = variable_genes(values)
    return _logistic(values[:, genes], labels, log_cp10k(test)[:, genes], seed)


def logistic_all_genes(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Logistic regression on all genes. Parameters as in :func:`logistic_hvg`."""
    labels = _checked(train, train_labels, test)
    return _logistic(log_cp10k(train), labels, log_cp10k(test), seed)


def logistic_pca(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Logistic regression on 50 principal components of the training cells' 2,000 variable genes.

    Components keep their own variances. Parameters as in :func:`logistic_hvg`; the seed is that of the PCA solver.
    """
    labels = _checked(train, train_labels, test)
    return _logistic(*_components(train, labels, test, seed), seed)


def logistic_pca_of_all(
    train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int
) -> Predictions:
    """Logistic regression on components of training and test cells together; labels of test cells are not seen.

    The one baseline that looks at test cells: with five labelled cells of each type, components of labelled cells alone
    are noise. C = 1, which does better there than 0.1. Parameters as in :func:`logistic_hvg`.
    """
    labels = _checked(train, train_labels, test)
    both = log_cp10k(sp.csr_matrix(sp.vstack([train, test])))
    values = both[:, variable_genes(both)]
    x = components_of(fit_components(values, seed=seed), values)
    n_train = train.shape[0]
    return _logistic(x[:n_train], labels, x[n_train:], seed, c=1.0)


def knn_pca(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Vote of the 15 nearest training cells among the components of :func:`logistic_pca`.

    Each of them has one vote (Euclidean distances; all training cells, where there are fewer), and probabilities are
    shares of votes. Parameters as in :func:`logistic_hvg`; the seed is that of the PCA solver.
    """
    from sklearn.neighbors import NearestNeighbors

    labels = _checked(train, train_labels, test)
    near, _, far = _components(train, labels, test, seed)
    classes, code = np.unique(labels, return_inverse=True)
    if far.shape[0] == 0:
        return Predictions.of(np.zeros((0, classes.size)), classes)
    finder = NearestNeighbors(n_neighbors=min(N_NEIGHBOURS, labels.size)).fit(near)
    neighbours = code[finder.kneighbors(far, return_distance=False)]
    votes = np.stack([(neighbours == c).mean(axis=1) for c in range(classes.size)], axis=1)
    return Predictions.of(votes, classes)


def celltypist(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """CellTypist, trained on the training cells with its defaults (extra ``eval``).

    One-against-the-rest logistic regressions on all genes, standardised and clipped at 10, C = 1; best match, no
    majority vote over clusters. Its scores are a sigmoid per class and do not add up to 1: they are divided by their
    sum (our decision), which leaves the best match as it is. Importing CellTypist makes an empty folder
    ``~/.celltypist`` (or ``$CELLTYPIST_FOLDER``); nothing is downloaded. Training cells are made dense.

    Parameters as in :func:`logistic_hvg`.

    Raises
    ------
    ConfigError
        As for :func:`logistic_hvg`.
    UnsupportedError
        CellTypist is not installed, or cannot train with the scikit-learn that is.
    """
    require_celltypist()
    import anndata as ad

    labels = _checked(train, train_labels, test)
    classes = np.unique(labels)
    n_test = test.shape[0]
    if classes.size == 1 or n_test == 0:
        return Predictions.of(np.ones((n_test, classes.size)) / classes.size, classes)
    names = [f"gene {i}" for i in range(train.shape[1])]
    with other_package("celltypist") as package:
        model = package.train(log_cp10k(train), labels=labels, genes=names, check_expression=False, random_state=seed)
        scores = np.empty((n_test, classes.size))
        for first in range(0, n_test, _BLOCK):  # CellTypist makes the cells dense
            block = ad.AnnData(log_cp10k(test[first : first + _BLOCK]))
            block.var_names = names
            found = package.annotate(block, model=model, mode="best match", majority_voting=False)
            scores[first : first + _BLOCK] = found.probability_matrix[list(classes)].to_numpy()
    scores = np.maximum(scores, np.finfo(np.float64).tiny)
    return Predictions.of(scores / scores.sum(axis=1, keepdims=True), classes)


def majority(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Call every cell the commonest training label; probabilities are the training frequencies.

    Parameters as in :func:`logistic_hvg`; nothing is drawn.
    """
    labels = _checked(train, train_labels, test)
    classes, n_cells = np.unique(labels, return_counts=True)
    return Predictions.of(np.tile(n_cells / labels.size, (test.shape[0], 1)), classes)


def shuffled(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix, *, seed: int) -> Predictions:
    """Train :func:`logistic_pca` on permuted labels: the null control. Parameters as in :func:`logistic_hvg`."""
    labels = _checked(train, train_labels, test)
    permuted = np.random.default_rng([seed, _NULL_STREAM]).permutation(labels)
    return logistic_pca(train, permuted, test, seed=seed)


BASELINES: Mapping[str, Classifier] = {
    "logistic_hvg": logistic_hvg,
    "logistic_all_genes": logistic_all_genes,
    "logistic_pca": logistic_pca,
    "logistic_pca_of_all": logistic_pca_of_all,
    "knn_pca": knn_pca,
    "celltypist": celltypist,
    "majority": majority,
    "shuffled": shuffled,
}
"""Every baseline of annotation by name; ``shuffled`` is the null control."""

TITLES: Mapping[str, str] = {
    "logistic_hvg": "logistic regression, 2,000 HVG",
    "logistic_all_genes": "logistic regression, all genes",
    "logistic_pca": "logistic regression, PCA-50",
    "logistic_pca_of_all": "logistic regression, PCA-50 of all cells",
    "knn_pca": "15-nn, PCA-50",
    "celltypist": "CellTypist trained on the split",
    "majority": "majority",
    "shuffled": "logistic regression on shuffled labels (null)",
}
"""What they are called in tables."""


def require_celltypist() -> None:
    """Refuse to go on without a CellTypist that can train.

    Raises
    ------
    UnsupportedError
        It is not installed; or it is 1.7.1 or older and scikit-learn is 1.8 or newer, which dropped an argument that
        it passes.
    """
    require("celltypist", "celltypist", "CellTypist")
    from sklearn.linear_model import LogisticRegression

    is_old = tuple(int(part) for part in version("celltypist").split(".")[:3] if part.isdigit()) <= (1, 7, 1)
    if is_old and "multi_class" not in inspect.signature(LogisticRegression).parameters:
        raise UnsupportedError(
            f"CellTypist {version('celltypist')} cannot train with scikit-learn {version('scikit-learn')}",
            expected="scikit-learn below 1.8",
            fix="pip install 'scdiva[eval]' 'scikit-learn<1.8', or leave 'celltypist' out of the methods",
        )


def _checked(train: sp.csr_matrix, train_labels: ArrayLike, test: sp.csr_matrix) -> NDArray[np.str_]:
    """Return the labels as text."""
    labels = np.asarray(train_labels).astype(str).ravel()
    if labels.size == 0 or labels.size != train.shape[0]:
        raise ConfigError(
            f"{train.shape[0]} training cells and {labels.size} labels",
            expected="a label for each of at least one training cell",
            fix="check the split and the labels",
        )
    if train.shape[1] != test.shape[1]:
        raise ConfigError(
            f"{train.shape[1]} genes in the training cells and {test.shape[1]} in the test cells",
            expected="the same genes in the same order",
            fix="take the genes that both have",
        )
    return labels


def _components(
    train: sp.csr_matrix, labels: NDArray[np.str_], test: sp.csr_matrix, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.str_], NDArray[np.float32]]:
    """Return components of training and test cells, fitted on the training cells; labels pass through."""
    values = log_cp10k(train)
    genes = variable_genes(values)
    values = values[:, genes]
    pca = fit_components(values, seed=seed)
    return components_of(pca, values), labels, components_of(pca, log_cp10k(test)[:, genes])


def _logistic(train: Any, labels: NDArray[np.str_], test: Any, seed: int, c: float = C) -> Predictions:
    """Fit scikit-learn's multinomial logistic regression; with a single class there is nothing to fit."""
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    n_test = test.shape[0]
    if classes.size == 1 or n_test == 0:
        return Predictions.of(np.ones((n_test, classes.size)) / classes.size, classes)
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, random_state=seed).fit(train, labels)
    return Predictions.of(model.predict_proba(test), classes)
