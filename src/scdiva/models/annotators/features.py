"""What the regressions of annotators read, and the regressions; shapes of classes.

Shape letters: N cells, K classes, F features, Z latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.components import N_COMPONENTS, variable_genes
from scdiva.models.annotators.calibration import TINY, log_softmax
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

_LATENT_SIZE = 3.0
"""Size of z beside components, whose first ones have standard deviations of about 5, where nothing chooses it."""
_MIN_CELLS_PER_GENE = 3
_FIT_CELLS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the regressions of a probe read.

    Parameters
    ----------
    centre, scale
        ``(Z,)`` mean of z over the reference, and one number: its overall standard deviation.
    gene
        ``(P,)`` variable genes of the reference, as vocabulary indices.
    gene_mean, loading
        ``(P,)`` mean of log1p(CP10K) and ``(P, C)`` components.
    detected
        ``(D,)`` genes that the regression on all genes reads.
    detected_mean
        ``(D,)`` their mean: what a gene that a file does not measure is taken to be.
    latent_size
        Standard deviation of z in the joint features; with 0 they are the components alone.
    """

    centre: NDArray[np.float32]
    scale: float
    gene: NDArray[np.int64]
    gene_mean: NDArray[np.float32]
    loading: NDArray[np.float32]
    detected: NDArray[np.int64]
    detected_mean: NDArray[np.float32]
    latent_size: float = _LATENT_SIZE

    @classmethod
    def fit(cls, *groups: tuple[CellCounts, NDArray[np.float32]], seed: int) -> Self:
        """Choose variable genes and fit components on cells and their embeddings; labels are not looked at."""
        from sklearn.decomposition import PCA

        values = sp.csr_matrix(sp.vstack([log_values(cells) for cells, _ in groups]))
        z = np.concatenate([z for _, z in groups])
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.permutation(values.shape[0])[:_FIT_CELLS])
        gene = variable_genes(sp.csr_matrix(values[rows]))
        dense = values[rows][:, gene].toarray()
        n_components = max(1, min(N_COMPONENTS, *(size - 1 for size in dense.shape)))
        pca = PCA(n_components, random_state=seed).fit(dense)
        n_detected = np.bincount(values.indices, minlength=values.shape[1])
        detected = np.flatnonzero(n_detected >= min(_MIN_CELLS_PER_GENE, values.shape[0]))
        mean = np.asarray(values.mean(axis=0)).ravel().astype(np.float32)
        return cls(
            z.mean(axis=0).astype(np.float32),
            max(float(z.std()), TINY),
            gene,
            pca.mean_.astype(np.float32),
            pca.components_.T.astype(np.float32),
            detected,
            mean[detected],
        )

    def of(self, cells: CellCounts, z: NDArray[np.float32]) -> dict[str, Any]:
        """Return the features of each regression: ``(N, F)`` by name; CSR for "genes"."""
        values = log_values(cells)
        own = ((_filled(values, cells, self.gene, self.gene_mean) - self.gene_mean) @ self.loading).astype(np.float32)
        genes = values[:, self.detected]
        if not cells.is_measured[:, self.detected].all():
            genes = sp.csr_matrix(_filled(values, cells, self.detected, self.detected_mean))
        model = (_LATENT_SIZE * (z - self.centre) / self.scale).astype(np.float32)
        return {"model": model, "own": own, "joint": joint_features(model, own, self.latent_size), "genes": genes}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        names = ("centre", "gene", "gene_mean", "loading", "detected", "detected_mean")
        numbers = {f"features_{name}": np.array(getattr(self, name)) for name in ("scale", "latent_size")}
        return {**{f"features_{name}": getattr(self, name) for name in names}, **numbers}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        values: dict[str, Any] = {
            name.removeprefix("features_"): array for name, array in arrays.items() if name.startswith("features_")
        }
        values |= {name: float(values[name]) for name in ("scale", "latent_size") if name in values}
        return cls(**values)


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A multinomial logistic regression: log-odds are ``x @ coef + intercept``."""

    coef: NDArray[np.float32]
    intercept: NDArray[np.float32]

    @classmethod
    def fit(
        cls,
        x: Any,
        code: NDArray[np.integer],
        n_classes: int,
        weight: NDArray[np.floating] | None,
        c: float,
        *,
        tolerance: float = 1e-4,
    ) -> Self:
        """Fit on cells of some of the classes; the others are never called.

        Parameters
        ----------
        x, code, n_classes
            ``(N, F)`` features, dense or CSR; classes; K.
        weight
            ``(N,)`` of cells; None: all alike.
        c
            Inverse L2 penalty, scikit-learn's C.
        tolerance
            Largest component of the gradient at which the optimum counts as reached.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        present = np.unique(code)
        coef = np.zeros((x.shape[1], n_classes), dtype=np.float32)
        intercept = np.full(n_classes, -30.0, dtype=np.float32)
        if present.size == 1:
            intercept[present] = 0.0
            return cls(coef, intercept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a convex optimum do not matter
            found = LogisticRegression(C=c, max_iter=300, tol=tolerance).fit(x, code, sample_weight=weight)
        own = found.coef_.T if present.size > 2 else np.concatenate([-found.coef_, found.coef_]).T / 2
        bias = found.intercept_ if present.size > 2 else np.array([-found.intercept_[0], found.intercept_[0]]) / 2
        coef[:, present], intercept[present] = own, bias
        return cls(coef, intercept)

    def log_probability(self, x: Any) -> NDArray[np.float64]:
        """Return normalised log-probabilities, ``(N, K)``."""
        logit = np.asarray(x @ self.coef, dtype=np.float64) + self.intercept
        return log_softmax(logit)


def joint_features(model: NDArray[np.float32], own: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    """Return z, of a size, beside the components: ``(N, Z + C)``; the components alone with size 0."""
    if size == 0:
        return own
    return np.concatenate([np.float32(size / _LATENT_SIZE) * model, own], axis=1)


def class_means(x: NDArray[np.floating], code: NDArray[np.integer], n_classes: int) -> NDArray[np.float64]:
    """Means of the classes, ``(K, F)``; NaN for classes without a cell."""
    sizes = np.bincount(code, minlength=n_classes)
    total = np.zeros((n_classes, x.shape[1]))
    np.add.at(total, code, x)
    return total / np.where(sizes > 0, sizes, np.nan)[:, None]


def log_values(cells: CellCounts) -> sp.csr_matrix:
    """Return log1p(CP10K), CSR; library sizes are those of the files."""
    return sp.csr_matrix((log1p_cp10k(cells), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape)


def _filled(
    values: sp.csr_matrix, cells: CellCounts, gene: NDArray[np.int64], mean: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return some genes' values, dense; a gene that a cell's file does not measure is unknown, not zero."""
    dense: NDArray[np.float32] = values[:, gene].toarray()
    is_measured = cells.is_measured[:, gene]
    if not is_measured.all():
        dense = np.where(is_measured[cells.source_of_cell], dense, mean)
    return dense


def class_shape(
    x: NDArray[np.float32], code: NDArray[np.integer], n_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means of the classes, and what whitens deviations from them (covariance shrunk by a tenth).

    Parameters
    ----------
    x
        ``(N, F)`` features.
    code
        ``(N,)`` classes.
    n_classes
        K.

    Returns
    -------
    mean
        ``(K, F)``; NaN for classes without a cell.
    whitening
        ``(F, F)``: distances of whitened features are Mahalanobis distances with the pooled covariance within classes.
    """
    mean = class_means(x, code, n_classes)
    sizes = np.bincount(code, minlength=n_classes)
    deviation = x - mean[code]
    covariance = deviation.T @ deviation / max(code.size - (sizes > 0).sum(), 1)
    level = max(float(np.trace(covariance)) / x.shape[1], TINY)
    precision_root = np.linalg.inv(np.linalg.cholesky(covariance + 0.1 * level * np.eye(x.shape[1]))).T
    return mean.astype(np.float32), precision_root.astype(np.float32)


def class_distance(
    x: NDArray[np.float32], mean: NDArray[np.float32], whitening: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Distance from the nearest class mean, whitened: arguments as :func:`class_shape` takes and returns them."""
    white, centre = x @ whitening, mean[np.isfinite(mean).all(axis=1)] @ whitening
    squared = (white**2).sum(axis=1)[:, None] - 2.0 * white @ centre.T + (centre**2).sum(axis=1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0.0)).astype(np.float64)


def some_of_each(code: NDArray[np.integer], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw at most ``n`` cells of each class; sorted positions."""
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(code == c))[:n] for c in np.unique(code)]))


def classes_of(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return the distinct labels, sorted, and the code of each."""
    names, code = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return tuple(names.tolist()), code.astype(np.int32)
