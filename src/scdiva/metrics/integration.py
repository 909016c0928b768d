"""How well an embedding keeps cell types and loses batches: AvgBIO and AvgBATCH, scib-metrics' set, confounding.

docs/metrics.md has every definition, and how each can be gamed. All but Leiden clusters and kBET are plain scikit-learn
and NumPy, with exact neighbours; where scib-metrics has the same metric the two agree (a test). Ideal is 1 throughout.
A metric that has no value for the cells at hand is NaN with its reason, and so is every mean that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import ConfigError, SourceError, UnsupportedError
from scdiva.metrics.annotation import _labels
from scdiva.metrics.generation_distances import _perplexity_weights
from scdiva.metrics.generation_space import NotMeasurableError, Score

RESOLUTIONS = (0.01, 0.02, 0.05, *(round(0.1 * i, 1) for i in range(1, 21)))
"""Leiden resolutions: scib's 0.1 to 2, and lower ones, without which a few well separated types are always cut up."""
K_GRAPH, K_KBET, K_LISI = 15, 50, 90
"""Neighbours of graphs, kBET and LISI, the cell itself counted, as scanpy and scib-metrics count them."""
PERPLEXITY = 30
N_STARTS_KMEANS = 10
BIO_SHARE = 0.6
"""Weight of biology in scib's total (Luecken et al. 2022); batch mixing has the rest."""

Embedding = NDArray[np.floating[Any]]

BATCH_METRICS = ("bras", "ilisi", "kbet", "graph_connectivity_directed", "pcr_comparison")
"""scib-metrics' set of batch metrics."""
BIO_METRICS = ("isolated_labels", "kmeans_nmi", "kmeans_ari", "asw_label", "clisi")
"""scib-metrics' set of biology metrics."""
MEANS: dict[str, tuple[str, ...]] = {
    "avg_bio": ("leiden_nmi", "leiden_ari", "asw_label"),
    "avg_batch": ("asw_batch", "graph_connectivity"),
    "scib_bio": BIO_METRICS,
    "scib_batch": BATCH_METRICS,
    "scib_total": ("scib_bio", "scib_batch"),
}
"""Aggregates and what they are made of."""
METRICS = (
    *("leiden_nmi", "leiden_ari", "asw_label", "asw_batch", "graph_connectivity"),
    *("isolated_labels", "kmeans_nmi", "kmeans_ari", "clisi"),
    *BATCH_METRICS,
)
"""Every metric that is no aggregate."""
EXTRAS = {"leiden_nmi": "igraph", "leiden_ari": "igraph", "kbet": "scib_metrics"}
"""Modules of the extra ``eval`` that metrics need."""
PLAIN_METRICS = (*(name for name in METRICS if name not in EXTRAS), "avg_batch", "scib_bio")
"""What can be measured without the extra ``eval``."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Exact Euclidean nearest neighbours; build with :meth:`fit`.

    Parameters
    ----------
    distance, index
        ``(n_cells, k - 1)``: the nearest *other* cells, nearest first.
    """

    distance: NDArray[np.float64]
    index: NDArray[np.int64]

    @property
    def k(self) -> int:
        """Number of neighbours, the cell itself counted."""
        return self.index.shape[1] + 1

    @classmethod
    def fit(cls, embedding: Embedding, k: int = K_LISI) -> Self:
        """Find the k - 1 nearest others of each cell, or all others where there are fewer."""
        from sklearn.neighbors import NearestNeighbors

        points = np.asarray(embedding, dtype=np.float64)
        k = min(k, len(points))
        if k < 2:
            raise NotMeasurableError(f"neighbours need two cells, found {len(points)}")
        distance, index = NearestNeighbors(n_neighbors=k - 1).fit(points).kneighbors()
        return cls(distance, index)

    def first(self, k: int) -> Neighbours:
        """Return the k - 1 nearest others.

        Raises
        ------
        NotMeasurableError
            There are not that many.
        """
        if self.k < k:
            raise NotMeasurableError(f"{k} neighbours need {k} cells, found {self.k}")
        return Neighbours(self.distance[:, : k - 1], self.index[:, : k - 1])


@dataclass(frozen=True, slots=True)
class ClusterAgreement:
    """The clustering, of several, that agrees best with types.

    Parameters
    ----------
    nmi, ari
        Normalised mutual information (arithmetic mean of the entropies), adjusted Rand index.
    resolution, n_clusters
        Which clustering it is.
    """

    nmi: float
    ari: float
    resolution: float
    n_clusters: int


@dataclass(frozen=True, slots=True)
class IntegrationScores:
    """Metrics of one embedding.

    Parameters
    ----------
    scores
        By name (:data:`METRICS` and :data:`MEANS`), a number or NaN with the reason.
    leiden
        The clustering behind ``leiden_nmi`` and ``leiden_ari``; None if it was not asked for or has no value.
    """

    scores: Mapping[str, Score]
    leiden: ClusterAgreement | None

    def __getitem__(self, name: str) -> float:
        """Return the value of a metric."""
        return self.scores[name].value


def integration_scores(
    embedding: Embedding,
    labels: ArrayLike,
    batches: ArrayLike,
    *,
    seed: int,
    unintegrated: Embedding | None = None,
    metrics: Collection[str] | None = None,
) -> IntegrationScores:
    """Measure an embedding.

    Parameters
    ----------
    embedding
        ``(n_cells, n_dimensions)``.
    labels, batches
        ``(n_cells,)`` type and batch of each cell.
    seed
        Seed of Leiden and k-means.
    unintegrated
        ``(n_cells, n_dimensions)`` the PCA before integration, which ``pcr_comparison`` compares with; without it that
        metric, and scib's means of which it is a part, are NaN.
    metrics
        Names from :data:`METRICS` and :data:`MEANS`; all by default. :data:`PLAIN_METRICS` need no extra.

    Raises
    ------
    UnsupportedError
        A metric needs the extra ``eval``, which is not installed.
    SourceError
        No cells, missing labels, an embedding that is not finite, or lengths that differ.
    ConfigError
        No such metric.
    """
    points, types, batch = _checked(embedding, labels, batches)
    before = None if unintegrated is None else _checked(unintegrated, labels, batches)[0]
    wanted = _with_parts((*METRICS, *MEANS) if metrics is None else metrics)
    _require_extras(wanted)
    found: list[Neighbours] = []

    def near() -> Neighbours:
        if not found:
            found.append(Neighbours.fit(points))
        return found[0]

    functions: dict[str, Callable[[], float]] = {
        "asw_label": lambda: asw_label(points, types),
        "asw_batch": lambda: asw_batch(points, types, batch),
        "graph_connectivity": lambda: graph_connectivity(near(), types),
        "isolated_labels": lambda: isolated_labels(points, types, batch),
        "clisi": lambda: clisi(near(), types),
        "bras": lambda: bras(points, types, batch),
        "ilisi": lambda: ilisi(near(), batch),
        "kbet": lambda: kbet(near(), types, batch),
        "graph_connectivity_directed": lambda: graph_connectivity(near(), types, is_directed=True),
        "pcr_comparison": lambda: pcr_comparison(before, points, batch),
    }
    scores = {name: Score.of(function) for name, function in functions.items() if name in wanted}
    leiden, scores_leiden = _agreement("leiden", wanted, lambda: leiden_agreement(points, types, seed=seed))
    _, scores_kmeans = _agreement("kmeans", wanted, lambda: kmeans_agreement(points, types, seed=seed))
    scores |= scores_leiden | scores_kmeans
    for name, parts in MEANS.items():
        if name in wanted:
            weights = (BIO_SHARE, 1 - BIO_SHARE) if name == "scib_total" else (1 / len(parts),) * len(parts)
            scores[name] = _mean_of(scores, parts, weights)
    return IntegrationScores({name: scores[name] for name in (*METRICS, *MEANS) if name in wanted}, leiden)


def _agreement(
    kind: str, wanted: Collection[str], measure: Callable[[], ClusterAgreement]
) -> tuple[ClusterAgreement | None, dict[str, Score]]:
    """Return a clustering and its two scores, those that are wanted."""
    names = [name for name in (f"{kind}_nmi", f"{kind}_ari") if name in wanted]
    if not names:
        return None, {}
    try:
        agreement = measure()
    except NotMeasurableError as error:
        return None, {name: Score(float("nan"), str(error)) for name in names}
    return agreement, {name: Score(getattr(agreement, name.removeprefix(f"{kind}_"))) for name in names}


def _mean_of(scores: Mapping[str, Score], parts: tuple[str, ...], weights: tuple[float, ...]) -> Score:
    missing = [f"{name}: {scores[name].reason}" for name in parts if np.isnan(scores[name].value)]
    if missing:
        return Score(float("nan"), "; ".join(missing))
    return Score(float(np.dot(weights, [scores[name].value for name in parts])))


def _with_parts(names: Collection[str]) -> frozenset[str]:
    """Return the names with everything that aggregates among them are made of."""
    if unknown := sorted(set(names) - set(METRICS) - set(MEANS)):
        raise ConfigError(
            f"no metric {', '.join(unknown)}", expected=f"some of {', '.join((*METRICS, *MEANS))}", fix="name these"
        )
    wanted = set(names)
    while (larger := wanted | {part for name in wanted for part in MEANS.get(name, ())}) != wanted:
        wanted = larger
    return frozenset(wanted)


def _require_extras(names: Collection[str]) -> None:
    lacking = [name for name, module in EXTRAS.items() if name in names and find_spec(module) is None]
    if lacking:
        modules = sorted({EXTRAS[name].replace("_", "-") for name in lacking})
        raise UnsupportedError(
            f"{', '.join(lacking)}: needs {' and '.join(modules)}, which is not installed",
            expected="the extra 'eval'",
            fix="pip install 'scdiva[eval]', or choose among metrics=PLAIN_METRICS",
        )


# Types -------------------------------------------------------------------------------------------------------------


def asw_label(embedding: Embedding, labels: ArrayLike) -> float:
    """(mean silhouette width of types + 1) / 2, Euclidean; 0.5 where types overlap.

    Raises
    ------
    NotMeasurableError
        Fewer than two types, or as many as cells.
    """
    return float((_silhouettes(embedding, _labels(labels, "labels")).mean() + 1) / 2)


def isolated_labels(embedding: Embedding, labels: ArrayLike, batches: ArrayLike) -> float:
    """(silhouette width + 1) / 2 of the types that occur in the fewest batches, mean over these types.

    As in scib-metrics: where all types occur in equally many batches, all are "isolated", and rare types weigh as much
    as frequent ones.

    Raises
    ------
    NotMeasurableError
        As :func:`asw_label`.
    """
    types, batch = _labels(labels, "labels"), _labels(batches, "batches")
    width = (_silhouettes(embedding, types) + 1) / 2
    names, table = _table(types, batch)
    n_batches = (table > 0).sum(axis=1)
    return float(np.mean([width[types == name].mean() for name in names[n_batches == n_batches.min()]]))


def kmeans_agreement(embedding: Embedding, labels: ArrayLike, *, seed: int) -> ClusterAgreement:
    """Agreement of types with k-means clusters, as many as types; the best of ten starts by inertia.

    scib-metrics starts once (and with its own seed): a different number, of larger spread.

    Raises
    ------
    NotMeasurableError
        Fewer than two types.
    """
    from sklearn.cluster import KMeans

    types = _labels(labels, "labels")
    k = _require_two(types, "type")
    clusters = KMeans(k, n_init=N_STARTS_KMEANS, random_state=seed).fit_predict(np.asarray(embedding, dtype=np.float64))
    return best_agreement({float("nan"): clusters}, types)


def leiden_agreement(
    embedding: Embedding, labels: ArrayLike, *, seed: int, resolutions: tuple[float, ...] = RESOLUTIONS
) -> ClusterAgreement:
    """Agreement of types with the Leiden clusters that agree best, over resolutions (as scib and scGPT choose them).

    The resolution is chosen *by the labels*: a number for comparison, not what a user without labels gets.

    Raises
    ------
    NotMeasurableError
        Fewer than two types, or fewer than 15 cells.
    UnsupportedError
        igraph is not installed.
    """
    types = _labels(labels, "labels")
    _require_two(types, "type")
    return best_agreement(leiden_clusterings(embedding, seed=seed, resolutions=resolutions), types)


def leiden_clusterings(
    embedding: Embedding, *, seed: int, resolutions: tuple[float, ...] = RESOLUTIONS
) -> dict[float, NDArray[np.int64]]:
    """Cluster by Leiden on scanpy's graph of 15 neighbours, once per resolution (igraph, two iterations, modularity).

    Raises
    ------
    NotMeasurableError
        Fewer than 15 cells.
    UnsupportedError
        igraph is not installed.
    """
    _require_extras(["leiden_nmi"])
    # deferred: scanpy takes seconds to load
    import anndata as ad
    import scanpy as sc

    points = np.asarray(embedding, dtype=np.float32)
    if len(points) < K_GRAPH:
        raise NotMeasurableError(f"{K_GRAPH} neighbours need {K_GRAPH} cells, found {len(points)}")
    cells = ad.AnnData(points)
    sc.pp.neighbors(cells, n_neighbors=K_GRAPH, use_rep="X", random_state=seed)
    clusterings = {}
    for resolution in resolutions:
        sc.tl.leiden(cells, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
        clusterings[resolution] = cells.obs["leiden"].cat.codes.to_numpy(dtype=np.int64)
    return clusterings


def best_agreement(clusterings: Mapping[float, NDArray[np.integer]], labels: ArrayLike) -> ClusterAgreement:
    """Return the clustering with the highest NMI; of equal ones the first.

    Parameters
    ----------
    clusterings
        ``(n_cells,)`` cluster of each cell, by resolution.
    labels
        ``(n_cells,)`` types.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    types = _labels(labels, "labels")
    nmi = {r: float(normalized_mutual_info_score(types, clusters)) for r, clusters in clusterings.items()}
    best = max(nmi, key=lambda r: nmi[r])
    clusters = clusterings[best]
    return ClusterAgreement(nmi[best], float(adjusted_rand_score(types, clusters)), best, np.unique(clusters).size)


def clisi(neighbours: Neighbours, labels: ArrayLike) -> float:
    """(n_types - median LISI of types) / (n_types - 1): 1 where neighbours are of one type (see :func:`lisi`).

    Raises
    ------
    NotMeasurableError
        Fewer than two types, or fewer than 90 cells.
    """
    types = _labels(labels, "labels")
    n = _require_two(types, "type")
    return float((n - np.median(lisi(neighbours, types))) / (n - 1))


# Batches -----------------------------------------------------------------------------------------------------------


def asw_batch(embedding: Embedding, labels: ArrayLike, batches: ArrayLike) -> float:
    """1 - |silhouette width of batches| within each type, mean over its cells, then over types (scib).

    Types in one batch only, and those whose cells are each a batch of their own, are left out. It is 1, too, where all
    cells coincide, and where the batches of one type touch in one corner only: read it beside :func:`bras`.

    Raises
    ------
    NotMeasurableError
        No type occurs in two batches.
    """
    points, types, batch = _checked(embedding, labels, batches)
    means = [float((1 - np.abs(_silhouettes(points[is_in], batch[is_in]))).mean()) for is_in in _mixed(types, batch)]
    return float(np.mean(means))


def bras(embedding: Embedding, labels: ArrayLike, batches: ArrayLike) -> float:
    """As :func:`asw_batch` with cosine distance, and to all cells of *other* batches instead of the nearest batch.

    Batch removal adapted silhouette (Rautenstrauch and Ohler 2025), as in scib-metrics: the nearest batch alone lets
    batches that mix in pairs pass for integrated.

    Raises
    ------
    NotMeasurableError
        No type occurs in two batches, or a cell at the origin, which has no direction.
    """
    points, types, batch = _checked(embedding, labels, batches)
    size = np.linalg.norm(points, axis=1, keepdims=True)
    if (size == 0).any():
        raise NotMeasurableError("a cell lies at the origin: it has no direction")
    unit = points / size
    return float(np.mean([_bras_of_type(unit[is_in], batch[is_in]) for is_in in _mixed(types, batch)]))


def _bras_of_type(unit: NDArray[np.float64], batch: NDArray[np.str_]) -> float:
    """Return the mean of 1 - |silhouette|; cosine distances to a group sum up to those to its summed vector."""
    _, code = np.unique(batch, return_inverse=True)
    n = np.bincount(code)[code]
    total_of_batch = np.stack([unit[code == c].sum(axis=0) for c in range(code.max() + 1)])
    toward_own, toward_all = (unit * total_of_batch[code]).sum(axis=1), unit @ unit.sum(axis=0)
    is_alone = n == 1
    within = (n - toward_own) / np.where(is_alone, 1, n - 1)
    between = ((unit.shape[0] - n) - (toward_all - toward_own)) / (unit.shape[0] - n)
    largest = np.maximum(within, between)
    # cells that are alone in their batch, and those that coincide with all others, have width 0
    is_defined = ~is_alone & (largest > 1e-12)
    width = np.divide(between - within, largest, out=np.zeros(n.size), where=is_defined)
    return float((1 - np.abs(width)).mean())


def graph_connectivity(neighbours: Neighbours, labels: ArrayLike, *, is_directed: bool = False) -> float:
    """Share of each type's cells in the largest connected part of its own graph of 15 neighbours, mean over types.

    Parameters
    ----------
    neighbours
        At least 15.
    labels
        ``(n_cells,)`` types.
    is_directed
        Whether two cells are connected only by paths in both directions (scib-metrics), or by any (scib, which scGPT's
        figures come from: its graph is symmetric).

    Raises
    ------
    NotMeasurableError
        Fewer than 15 cells.
    """
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components

    types = _labels(labels, "labels")
    index = neighbours.first(K_GRAPH).index
    n, k = index.shape
    graph = sp.csr_matrix((np.ones(n * k, np.int8), index.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    shares = []
    for name in np.unique(types):
        rows = np.flatnonzero(types == name)
        _, part = connected_components(graph[rows][:, rows], connection="strong" if is_directed else "weak")
        shares.append(np.bincount(part).max() / rows.size)
    return float(np.mean(shares))


def ilisi(neighbours: Neighbours, batches: ArrayLike) -> float:
    """(median LISI of batches - 1) / (n_batches - 1): 1 where all batches are equally near to each cell.

    It does not ask for types: it punishes keeping apart the types that occur in one batch only, and 1 is out of reach
    where batches differ in size. See :func:`lisi`.

    Raises
    ------
    NotMeasurableError
        Fewer than two batches, or fewer than 90 cells.
    """
    batch = _labels(batches, "batches")
    n = _require_two(batch, "batch")
    return float((np.median(lisi(neighbours, batch)) - 1) / (n - 1))


def lisi(neighbours: Neighbours, labels: ArrayLike) -> NDArray[np.float64]:
    """Inverse Simpson index of labels among the 89 nearest others of each cell, ``(n_cells,)``: how many there are.

    Others are weighted by a Gaussian of their distance whose perplexity is 30 (Korsunsky et al. 2019; scib-metrics).

    Raises
    ------
    NotMeasurableError
        Fewer than 90 cells.
    """
    near = neighbours.first(K_LISI)
    names, code = np.unique(_labels(labels, "labels"), return_inverse=True)
    weight, of_neighbour = _perplexity_weights(near.distance, PERPLEXITY), code[near.index]
    simpson = np.zeros(code.size)
    for c in range(names.size):
        simpson += (weight * (of_neighbour == c)).sum(axis=1) ** 2
    return 1 / simpson


def kbet(neighbours: Neighbours, labels: ArrayLike, batches: ArrayLike) -> float:
    """Share of cells around which batches are as frequent as in their type, mean over types (scib-metrics).

    ``scib_metrics.kbet_per_label`` with 50 neighbours; types of fewer than ten cells or in one batch only are left out.

    Raises
    ------
    NotMeasurableError
        Fewer than 50 cells, or no type that can be tested.
    UnsupportedError
        scib-metrics is not installed.
    """
    _require_extras(["kbet"])
    types, batch = _labels(labels, "labels"), _labels(batches, "batches")
    _, table = _table(types, batch)
    if not ((table.sum(axis=1) >= 10) & ((table > 0).sum(axis=1) > 1)).any():
        raise NotMeasurableError("no type has ten cells and occurs in two batches")
    library = import_module("scib_metrics")
    return float(library.kbet_per_label(_as_scib(neighbours.first(K_KBET)), batch, types))


def pcr_comparison(unintegrated: Embedding | None, embedding: Embedding, batches: ArrayLike) -> float:
    """How much less of the variance batches explain than before integration: max(0, (before - after) / before).

    The share that is explained is the sum of squares between batches over the whole (:func:`variance_of_batches`), to
    which principal component regression adds up when all components are kept.

    Raises
    ------
    NotMeasurableError
        No embedding before integration, fewer than two batches, cells that all coincide, or nothing to remove.
    """
    if unintegrated is None:
        raise NotMeasurableError("the embedding before integration was not given")
    before, after = (variance_of_batches(z, batches) for z in (unintegrated, embedding))
    if before <= 0:
        raise NotMeasurableError("batches explain no variance before integration")
    return max(0.0, (before - after) / before)


def variance_of_batches(embedding: Embedding, batches: ArrayLike) -> float:
    """Share of the variance that lies between batches, 0 to 1.

    Raises
    ------
    NotMeasurableError
        Fewer than two batches, or cells that all coincide.
    """
    batch = _labels(batches, "batches")
    _require_two(batch, "batch")
    points = np.asarray(embedding, dtype=np.float64)
    points = points - points.mean(axis=0)
    total = float((points**2).sum())
    if total == 0:
        raise NotMeasurableError("all cells coincide")
    between = sum(
        float((is_in := batch == name).sum() * (points[is_in].mean(axis=0) ** 2).sum()) for name in np.unique(batch)
    )
    return between / total


def scib_metrics_scores(
    embedding: Embedding, labels: ArrayLike, batches: ArrayLike, *, unintegrated: Embedding
) -> dict[str, float]:
    """Return the ten metrics and three means of scib-metrics by its own functions, with exact neighbours.

    For comparison with published tables; :func:`integration_scores` differs in k-means only (one start there). Metrics
    without a value are NaN and, as in the library, left out of the means.

    Parameters
    ----------
    embedding, labels, batches, unintegrated
        As in :func:`integration_scores`.

    Raises
    ------
    UnsupportedError
        scib-metrics is not installed.
    """
    _require_extras(["kbet"])
    library = import_module("scib_metrics")
    points, types, batch = _checked(embedding, labels, batches)
    before = _checked(unintegrated, labels, batches)[0]
    # the library computes in float32 anyway, and k-means asks for it
    z, z_before = points.astype(np.float32), before.astype(np.float32)
    near = Neighbours.fit(points)
    of_15, of_50, of_90 = (_as_scib(near.first(k)) for k in (K_GRAPH, K_KBET, K_LISI))
    kmeans = library.nmi_ari_cluster_labels_kmeans(z, types)
    scores = {
        "isolated_labels": library.isolated_labels(z, types, batch),
        "kmeans_nmi": kmeans["nmi"],
        "kmeans_ari": kmeans["ari"],
        "asw_label": library.silhouette_label(z, types),
        "clisi": library.clisi_knn(of_90, types),
        "bras": library.bras(z, types, batch),
        "ilisi": library.ilisi_knn(of_90, batch),
        "kbet": library.kbet_per_label(of_50, batch, types),
        "graph_connectivity_directed": library.graph_connectivity(of_15, types),
        "pcr_comparison": library.pcr_comparison(z_before, z, batch, categorical=True),
    }
    scores = {name: float(value) for name, value in scores.items()}
    bio, mixing = (float(np.nanmean([scores[name] for name in names])) for names in (BIO_METRICS, BATCH_METRICS))
    return scores | {
        "scib_bio": bio,
        "scib_batch": mixing,
        "scib_total": BIO_SHARE * bio + (1 - BIO_SHARE) * mixing,
    }


def _as_scib(neighbours: Neighbours) -> Any:
    """Return neighbours as scib-metrics has them: the cell itself first."""
    n = len(neighbours.index)
    return import_module("scib_metrics.nearest_neighbors").NeighborsResults(
        indices=np.column_stack([np.arange(n), neighbours.index]).astype(np.int32),
        distances=np.column_stack([np.zeros(n), neighbours.distance]).astype(np.float32),
    )


# Confounding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchLabelConfounding:
    """How far batch and type are the same thing; what no metric of integration can make good.

    Parameters
    ----------
    n_labels, n_batches
        Numbers of types and batches.
    nmi
        Normalised mutual information of type and batch (arithmetic): 0 independent, 1 the same. NaN with one type or
        one batch.
    cramers_v
        Cramér's V: 0 independent, 1 one determines the other. NaN with one type or one batch.
    labels_in_one_batch
        Types that occur in one batch only, sorted.
    share_in_one_batch
        Share of cells that are of these types.
    batches_without_shared_label
        Pairs of batches that have no type in common, sorted.
    """

    n_labels: int
    n_batches: int
    nmi: float
    cramers_v: float
    labels_in_one_batch: tuple[str, ...]
    share_in_one_batch: float
    batches_without_shared_label: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        """What it means, for people."""
        if self.n_batches < 2:
            return "There is one batch: nothing to integrate."
        if self.n_labels < 2:
            return "There is one type: whether integration keeps types apart cannot be measured."
        alone, n = self.labels_in_one_batch, self.n_labels
        facts = f"Cramér's V of batch and type {self.cramers_v:.2f}, NMI {self.nmi:.2f}"
        if len(alone) == n:
            return (
                f"Every type occurs in one batch only ({facts}): differences between types and between batches cannot "
                "be told apart, and removing one removes the other."
            )
        parts = []
        if alone:
            verb = "occurs" if len(alone) == 1 else "occur"
            parts.append(
                f"{len(alone)} of {n} types ({self.share_in_one_batch:.0%} of cells) {verb} in one batch only: "
                f"{_some(alone)}"
            )
        if pairs := self.batches_without_shared_label:
            are = "pair of batches has" if len(pairs) == 1 else "pairs of batches have"
            parts.append(f"{len(pairs)} {are} no type in common: {_some([' and '.join(pair) for pair in pairs])}")
        if parts:
            return f"Batch and type are partly confounded ({facts}). {'. '.join(parts)}. Mixing these is no success."
        return f"Every type occurs in several batches, and every two batches share a type ({facts})."


def batch_label_confounding(labels: ArrayLike, batches: ArrayLike) -> BatchLabelConfounding:
    """Measure how far batch and type are the same thing.

    Parameters
    ----------
    labels, batches
        ``(n_cells,)`` type and batch of each cell.

    Raises
    ------
    SourceError
        No cells, missing labels, or lengths that differ.
    """
    from scipy.stats.contingency import association
    from sklearn.metrics import normalized_mutual_info_score

    types, batch = _labels(labels, "labels"), _labels(batches, "batches")
    _require_lengths(types.size, types, batch)
    names, table = _table(types, batch)
    batch_names = np.unique(batch)
    nmi = cramers_v = float("nan")
    if min(table.shape) > 1:
        nmi = float(normalized_mutual_info_score(types, batch))
        cramers_v = float(association(table, method="cramer", correction=False))
    is_alone = (table > 0).sum(axis=1) == 1 if batch_names.size > 1 else np.zeros(names.size, dtype=bool)
    is_shared = (table > 0).T.astype(np.int64) @ (table > 0)
    first, second = np.nonzero(np.triu(is_shared == 0, k=1))
    return BatchLabelConfounding(
        n_labels=names.size,
        n_batches=batch_names.size,
        nmi=nmi,
        cramers_v=cramers_v,
        labels_in_one_batch=tuple(map(str, names[is_alone])),
        share_in_one_batch=float(table[is_alone].sum() / table.sum()),
        batches_without_shared_label=tuple(
            (str(batch_names[i]), str(batch_names[j])) for i, j in zip(first, second, strict=True)
        ),
    )


def _some(names: Collection[str], n: int = 5) -> str:
    shown = list(names)[:n]
    return ", ".join(shown) + (f" and {len(names) - n} more" if len(names) > n else "")


# Checks ------------------------------------------------------------------------------------------------------------


def _checked(
    embedding: Embedding, labels: ArrayLike, batches: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.str_], NDArray[np.str_]]:
    points = np.asarray(embedding, dtype=np.float64)
    types, batch = _labels(labels, "labels"), _labels(batches, "batches")
    if points.ndim != 2:
        raise SourceError(
            f"an embedding of shape {points.shape}", expected="one row per cell", fix="give (n_cells, n_dimensions)"
        )
    _require_lengths(len(points), types, batch)
    if not np.isfinite(points).all():
        raise SourceError(
            f"{int((~np.isfinite(points)).any(axis=1).sum())} cells whose embedding is not finite",
            expected="numbers",
            fix="leave these cells out, or embed them again",
        )
    return points, types, batch


def _require_lengths(n_cells: int, types: NDArray[np.str_], batch: NDArray[np.str_]) -> None:
    if n_cells == 0 or types.size != n_cells or batch.size != n_cells:
        raise SourceError(
            f"{n_cells} cells, {types.size} labels, {batch.size} batches",
            expected="one of each for every cell, at least one cell",
            fix="give all for the same cells",
        )


def _require_two(labels: NDArray[np.str_], what: str) -> int:
    n = np.unique(labels).size
    if n < 2:
        raise NotMeasurableError(f"there is only one {what}")
    return n


def _silhouettes(embedding: Embedding, labels: NDArray[np.str_]) -> NDArray[np.float64]:
    """Return Euclidean silhouette widths, ``(n_cells,)``; 0 for a cell that is alone in its group."""
    from sklearn.metrics import silhouette_samples

    n = _require_two(labels, "type")
    if n == labels.size:
        raise NotMeasurableError("every cell is a type of its own")
    return silhouette_samples(np.asarray(embedding, dtype=np.float64), labels)


def _table(types: NDArray[np.str_], batch: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Return the types, sorted, and ``(n_types, n_batches)`` numbers of cells."""
    names, row = np.unique(types, return_inverse=True)
    columns, column = np.unique(batch, return_inverse=True)
    table = np.bincount(row * columns.size + column, minlength=names.size * columns.size)
    return names, table.reshape(names.size, columns.size)


def _mixed(types: NDArray[np.str_], batch: NDArray[np.str_]) -> list[NDArray[np.bool_]]:
    """Return which cells are of each type in several batches, type by type; not those of batches of one cell only."""
    names, table = _table(types, batch)
    n_batches = (table > 0).sum(axis=1)
    chosen = [types == name for name in names[(n_batches > 1) & (n_batches < table.sum(axis=1))]]
    if not chosen:
        what = "there is only one batch" if table.shape[1] == 1 else "no type occurs in two batches"
        raise NotMeasurableError(what)
    return chosen
