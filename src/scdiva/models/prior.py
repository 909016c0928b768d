"""What a bundle knows of the cells it was trained on as a population: their sizes, and a prior over z.

The prior is a Gaussian mixture per condition; anything else that draws z (``scdiva.types.LatentPrior``) can take its
place in generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.data.population import CellSizes, read_arrays
from scdiva.errors import BundleError

CELLS_PER_COMPONENT = 150
MAX_COMPONENTS = 4
"""Components of one condition: one for each 150 cells, at most four."""
SHRINKAGE_CELLS, MIN_SHRINKAGE = 10, 0.05
"""Weight of a component's diagonal, in cells; and its least share."""
MAX_CONDITIONS = 48
"""Combinations of labels that get components of their own: the most frequent ones."""


N_SIZES = 2
"""Sizes that z is drawn given: log(1 + UMIs) and log(1 + genes)."""


@dataclass(frozen=True, slots=True, eq=False)
class MixturePrior:
    """Gaussian mixtures of z and size, one for each combination of labels seen in training.

    z goes with the size of a cell: active cells are large, and z of few molecules is noisy. The mixture is one of
    (log UMIs, log genes, z), and z is drawn given the sizes. Components are the clusters of k-means within a
    combination of labels. Covariances are shrunk towards their diagonals, little: the programmes that cells of a type
    share are their largest directions, and shrinkage such as Ledoit and Wolf's takes a third of their variance
    (docs/experiments.md; our decisions).

    Parameters
    ----------
    condition
        ``(K, n_fields)`` int32 codes of each component's cells.
    n_cells
        ``(K,)`` int64 cells of each.
    mean
        ``(K, 2 + Z)`` float32, sizes first.
    factor
        ``(K, 2 + Z, 2 + Z)`` float16 lower Cholesky factors of the covariances.
    view_share
        Share of a cell's molecules behind each z that it was fitted to.
    """

    condition: NDArray[np.int32]
    n_cells: NDArray[np.int64]
    mean: NDArray[np.float32]
    factor: NDArray[np.float16]
    view_share: float = 1.0

    @classmethod
    def fit(
        cls,
        z: NDArray[np.float32],
        sizes: NDArray[np.integer],
        condition: NDArray[np.int32],
        seed: int,
        *,
        view_share: float = 1.0,
    ) -> Self:
        """Fit to the embeddings of training cells.

        Parameters
        ----------
        z
            ``(n_cells, Z)``.
        sizes
            ``(n_cells, 2)`` UMIs and genes of the whole cells.
        condition
            ``(n_cells, n_fields)`` codes.
        seed
            Seed of k-means.
        view_share
            Share of the cells' molecules that the embeddings have seen.
        """
        # deferred: scikit-learn takes a second to load
        from sklearn.cluster import KMeans

        joint = np.concatenate([np.log1p(sizes), z], axis=1).astype(np.float64)
        distinct, group = np.unique(condition, axis=0, return_inverse=True)
        group = group.ravel()
        frequent = np.argsort(-np.bincount(group), kind="stable")[:MAX_CONDITIONS]
        parts: list[tuple[NDArray[np.int32], int, NDArray[Any], NDArray[Any]]] = []
        for i in np.sort(frequent):
            points = joint[group == i]
            k = int(np.clip(points.shape[0] // CELLS_PER_COMPONENT, 1, MAX_COMPONENTS))
            cluster = np.zeros(points.shape[0], dtype=int)
            if k > 1:
                cluster = KMeans(k, n_init=4, random_state=seed).fit_predict(points[:, N_SIZES:])
            for j in range(k):
                members = points[cluster == j]
                # one cell has no covariance: that of all cells stands in
                covariance = _shrunk(members if members.shape[0] > 1 else joint)
                parts.append((distinct[i], members.shape[0], members.mean(axis=0), np.linalg.cholesky(covariance)))
        return cls(
            condition=np.array([part[0] for part in parts], dtype=np.int32).reshape(len(parts), condition.shape[1]),
            n_cells=np.array([part[1] for part in parts], dtype=np.int64),
            mean=np.array([part[2] for part in parts], dtype=np.float32),
            factor=np.array([part[3] for part in parts], dtype=np.float16),
            view_share=view_share,
        )

    def sample(
        self, condition: NDArray[np.integer], sizes: NDArray[np.integer], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Draw z of cells of given conditions and sizes.

        Parameters
        ----------
        condition
            ``(n, n_fields)`` codes; 0 matches every component. Of a combination that no component has, those that
            share most labels are drawn from.
        sizes
            ``(n, 2)`` UMIs and genes.
        rng
            Source of randomness.

        Returns
        -------
        numpy.ndarray
            ``(n, Z)`` float32.
        """
        size = np.log1p(sizes.astype(np.float64))
        factor = self.factor.astype(np.float64)
        noise = rng.standard_normal((condition.shape[0], self.mean.shape[1] - N_SIZES))
        # how far each size lies from each component, in its own units, and how likely it is there
        scaled = np.stack(
            [
                np.linalg.solve(f[:N_SIZES, :N_SIZES], (size - m).T).T
                for f, m in zip(factor, self._size_mean, strict=True)
            ],
            axis=1,
        )
        log_det = np.log(factor[:, np.arange(N_SIZES), np.arange(N_SIZES)]).sum(axis=1)
        log_likelihood = -0.5 * np.square(scaled).sum(axis=2) - log_det
        component = np.empty(condition.shape[0], dtype=np.int64)
        for row, codes in enumerate(condition):
            wanted = codes > 0
            n_agreeing = (self.condition[:, wanted] == codes[wanted]).sum(axis=1)
            log_weight = np.where(n_agreeing == n_agreeing.max(), np.log(self.n_cells) + log_likelihood[row], -np.inf)
            weight = np.exp(log_weight - log_weight.max())
            component[row] = rng.choice(weight.size, p=weight / weight.sum())
        z = self.mean[component, N_SIZES:].astype(np.float64)
        for k in np.unique(component):
            rows = component == k
            # sizes far outside of what was seen say no more than the farthest that were
            z[rows] += np.clip(scaled[rows, k], -_FARTHEST, _FARTHEST) @ factor[k, N_SIZES:, :N_SIZES].T
            z[rows] += noise[rows] @ factor[k, N_SIZES:, N_SIZES:].T
        return z.astype(np.float32)

    @property
    def n_latent(self) -> int:
        """Z, dimensions of z."""
        return int(self.mean.shape[1]) - N_SIZES

    @property
    def _size_mean(self) -> NDArray[np.float64]:
        return self.mean[:, :N_SIZES].astype(np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is written to the bundle."""
        return {
            "prior_condition": self.condition,
            "prior_n_cells": self.n_cells,
            "prior_mean": self.mean,
            "prior_factor": self.factor,
            "prior_view_share": np.array(self.view_share),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        return cls(
            condition=arrays["prior_condition"],
            n_cells=arrays["prior_n_cells"],
            mean=arrays["prior_mean"],
            factor=arrays["prior_factor"],
            view_share=float(arrays["prior_view_share"]),
        )


_FARTHEST = 3.0


def _shrunk(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a covariance that is positive definite, in float16 too."""
    # each dimension in its own units: shrinkage towards the identity must not swell the small ones
    scale = np.maximum(points.std(axis=0), 1e-3)
    covariance = np.cov(points / scale, rowvar=False, bias=True)
    share = float(np.clip(SHRINKAGE_CELLS / points.shape[0], MIN_SHRINKAGE, 1.0))
    covariance = (1.0 - share) * covariance + share * np.eye(scale.size)
    return np.asarray(covariance * np.outer(scale, scale))


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Sizes of the training cells, and a prior over their z: file ``population.npz`` of a bundle.

    Parameters
    ----------
    sizes
        Genes and UMIs per cell.
    prior
        Gaussian mixture over z.
    """

    sizes: CellSizes
    prior: MixturePrior

    def save(self, path: Path) -> None:
        """Write to ``.npz`` (no pickle)."""
        arrays: dict[str, Any] = {**self.sizes.arrays(), **self.prior.arrays()}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        BundleError
            The file is damaged or lacks an array, or its arrays do not fit each other.
        """
        sizes = ("n_genes", "depth", "library_size", "condition", "source", "is_measured", "n_vocabulary_genes")
        prior = ("prior_condition", "prior_n_cells", "prior_mean", "prior_factor", "prior_view_share")
        arrays = read_arrays(path, (*sizes, *prior))
        _check_shapes(path, arrays)
        return cls(CellSizes.from_arrays(arrays), MixturePrior.from_arrays(arrays))

    def take_genes(self, is_kept: NDArray[np.bool_]) -> Population:
        """Return the population for a vocabulary of some of the genes."""
        return Population(self.sizes.take_genes(is_kept), self.prior)


_SHAPES = {
    "n_genes": "R", "depth": "R", "library_size": "R", "condition": "RF", "source": "R", "is_measured": "SP",
    "n_vocabulary_genes": "", "prior_condition": "KF", "prior_n_cells": "K", "prior_mean": "KZ", "prior_factor": "KZZ",
    "prior_view_share": "",
}  # fmt: skip
"""Letters of equal dimensions: R records, F fields, S sources, P packed genes, K components, Z sizes and latent."""


def _check_shapes(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise BundleError for arrays that do not fit each other."""
    size: dict[str, int] = {}
    for name, letters in _SHAPES.items():
        array = arrays[name]
        is_number = array.dtype == np.uint8 if name == "is_measured" else array.dtype.kind in "iuf"
        if array.ndim != len(letters) or not is_number:
            _misfit(path, f"{name} is {array.dtype} of shape {array.shape}", f"numbers in {len(letters)} dimensions")
        for letter, n in zip(letters, array.shape, strict=True):
            if size.setdefault(letter, n) != n:
                _misfit(path, f"{name} is of shape {array.shape}", f"{size[letter]} where it has {n}")
    n_bytes = -(-int(arrays["n_vocabulary_genes"]) // 8)
    if n_bytes != size["P"]:
        _misfit(path, f"is_measured packs {8 * size['P']} genes", f"{n_bytes} bytes for n_vocabulary_genes")
    if not size["R"] or not size["K"]:
        _misfit(path, f"{size['R']} cells and {size['K']} components", "at least one of each")
    if arrays["source"].min() < 0 or arrays["source"].max() >= size["S"]:
        _misfit(path, "cells of a source that is not there", f"sources 0 to {size['S'] - 1}")
    if size["Z"] <= N_SIZES:
        _misfit(path, f"a prior of {size['Z']} dimensions", f"more than {N_SIZES}: sizes, then z")
    if arrays["prior_n_cells"].min() < 1:
        _misfit(path, "a component of no cell", "at least one cell in each")


def _misfit(path: Path, found: str, expected: str) -> None:
    raise BundleError(f"{path.name}: {found}", expected=expected, fix="fetch the bundle again")
