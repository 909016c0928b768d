"""Realism of generated cells: every metric of the catalogue, pooled and per type, through one function.

:data:`METRICS` names them, says what value is ideal and how each is defined (docs/evaluation.md has the whole text). A
metric that cannot be measured is NaN with a reason. Real against real, the ceiling, goes through the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.metrics import generation_distances as distances
from scdiva.metrics import generation_genes as by_gene
from scdiva.metrics.generation_classifiers import CLASSIFIERS, TypeClassifier, accuracy_and_f1, c2st_auc
from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError, ReferenceSpace, Score

POOLED = "pooled"
MIN_CELLS_PER_TYPE = 50
"""Fewest held-out cells of a type that is scored on its own."""
MIN_CELLS_OWN_SPACE = 200
"""Fewest third cells of a type to which principal components of its own are fitted."""
RARE_SHARE = 0.05
"""Types with less than this share of the held-out cells are rare."""
N_TREES = 300
"""Trees of the forest here; scDiffusion's 1,000 take three times as long and differ by less than folds do."""

Scores = dict[tuple[str, str], Score]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the catalogue.

    Parameters
    ----------
    title
        For people.
    ideal
        The value that a perfect generator has; None where it is what real cells reach, the ceiling.
    """

    title: str
    ideal: float | None

    def distance(self, value: float, ceiling: float) -> float:
        """Return how far a value is from the ideal one."""
        return abs(value - (ceiling if self.ideal is None else self.ideal))


_JUDGES = {
    "forest": "random forest",
    "knn5": "5 nearest neighbours",
    "logistic": "logistic",
    "mlp": "two-layer network",
}
_FEATURES = {"hvg": "2,000 variable genes", "pca": "PCA-50"}
_MOMENTS = {"mean": "mean", "variance": "variance", "zero_fraction": "zero fraction", "cv": "coefficient of variation"}

METRICS: Mapping[str, Metric] = {
    **{
        f"c2st_{judge}_{space}": Metric(f"C2ST AUC, {_JUDGES[judge]}, {_FEATURES[space]}", 0.5)
        for judge in CLASSIFIERS
        for space in _FEATURES
    },
    "mmd2": Metric("MMD², unbiased", 0.0),
    "mmd_scdiffusion": Metric("MMD as in scDiffusion (biased)", None),
    "energy_distance": Metric("energy distance", 0.0),
    "wasserstein1": Metric("Wasserstein-1", None),
    "wasserstein2": Metric("Wasserstein-2", None),
    "sliced_wasserstein": Metric("sliced Wasserstein-2", None),
    "ilisi": Metric("iLISI", None),
    "precision": Metric("precision", None),
    "recall": Metric("recall", None),
    "density": Metric("density", None),
    "coverage": Metric("coverage", None),
    "pairwise_distance_ratio": Metric("mean pairwise distance, generated / real", 1.0),
    "effective_cluster_ratio": Metric("effective number of clusters, generated / real", 1.0),
    "rare_type_recall": Metric("recall of rare types (< 5 % of cells)", None),
    "conditional_accuracy": Metric("classifier trained on real cells calls it as asked: accuracy", None),
    "conditional_f1": Metric("the same: macro-F1", None),
    "own_type_nearest": Metric("types whose mean is nearest to their own real mean: share", None),
    "tstr_accuracy": Metric("train on synthetic, test on real: accuracy", None),
    "tstr_f1": Metric("the same: macro-F1", None),
    "gene_correlation": Metric("agreement of gene-gene correlations", None),
    "gene_correlation_within": Metric("the same within types", None),
    "marker_fold_change": Metric("Spearman of markers' log fold changes", None),
    **{
        f"{kind}_{name}": Metric(f"{kind.title()} over genes: {_MOMENTS[name]}", 1.0)
        for kind in ("spearman", "pearson")
        for name in _MOMENTS
    },
    "zero_fraction_error": Metric("error of the genes' zero fractions", 0.0),
    "library_size_ks": Metric("library sizes, KS", 0.0),
    "genes_per_cell_ks": Metric("genes per cell, KS", 0.0),
    "mean_variance_error": Metric("mean-variance curve, L1 (log10)", 0.0),
    "mean_dropout_error": Metric("mean-dropout curve, L1", 0.0),
    "nearer_to_train": Metric("nearer to a training than to a held-out cell", 0.5),
    "nearest_distance_ratio": Metric("distance to training / to held-out cells", 1.0),
    "closer_than_5_percent": Metric("closer to training cells than 95 % of held-out cells", 0.05),
    "n_copies": Metric("copies of a training cell", 0.0),
}


@dataclass(frozen=True, slots=True)
class RealismReference:
    """All that is fitted on real cells before any generated cell is looked at. Build it with :meth:`fit`.

    Parameters
    ----------
    train
        Every real cell that generators were trained on.
    third
        Those of them that are in neither sample: variable genes, components, clusters and markers come from here.
    sample
        The others, as many of each type as are held out: the "generated" cells of the ceiling, and the training cells
        that memorisation is measured by.
    space
        Variable genes and components of the third cells.
    space_of_type
        Components within a type, for types with at least 200 third cells.
    is_used
        ``(n_genes,)`` genes that at least three training cells have: correlations over genes and zero fractions.
    correlated
        Positions among the variable genes of the 500 whose log1p(CP10K) varies most among the third cells: gene-gene
        correlations are taken between these, since between rarer genes they cannot be measured.
    markers
        Marker genes of the third cells.
    classifier
        Types, learned from all training cells; None where there is but one type.
    """

    train: LabelledCells
    third: LabelledCells
    sample: LabelledCells
    space: ReferenceSpace
    space_of_type: Mapping[str, ReferenceSpace]
    is_used: NDArray[np.bool_]
    correlated: NDArray[np.int64]
    markers: NDArray[np.int64]
    classifier: TypeClassifier | None

    @classmethod
    def fit(cls, train: LabelledCells, is_sample: NDArray[np.bool_], *, seed: int) -> Self:
        """Fit.

        Parameters
        ----------
        train
            Real training cells.
        is_sample
            ``(n_cells,)``: cells set aside as the ceiling's sample; the rest are the third cells.
        seed
            Seed of the PCA solver.

        Raises
        ------
        NotMeasurableError
            The third cells are too few, or do not differ.
        """
        third, sample = train.take(~is_sample), train.take(is_sample)
        space = ReferenceSpace.fit(third.counts, seed=seed)
        names, sizes = np.unique(third.labels, return_counts=True)
        own = {
            str(name): ReferenceSpace.fit(third.take(third.labels == name).counts, seed=seed, genes=space.genes)
            for name in names[sizes >= MIN_CELLS_OWN_SPACE]
        }
        is_used = np.bincount(train.counts.indices, minlength=train.counts.shape[1]) >= 3
        classifier = TypeClassifier(space.values(train.counts), train.labels) if names.size > 1 else None
        spread = space.values(third.counts).var(axis=0)
        correlated = np.argsort(-spread, kind="stable")[: by_gene.N_CORRELATED_GENES]
        markers = by_gene.marker_genes(third)
        return cls(train, third, sample, space, own, is_used, correlated, markers, classifier)


def match_types(
    real: LabelledCells, generated: LabelledCells, rng: np.random.Generator
) -> tuple[LabelledCells, LabelledCells]:
    """Return equally many cells of each type, drawn at random where one side has more, grouped by type."""
    rows: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for name in np.unique(real.labels):
        found = [np.flatnonzero(cells.labels == name) for cells in (real, generated)]
        n = min(part.size for part in found)
        for side, part in zip(rows, found, strict=True):
            side.append(part if part.size == n else np.sort(rng.choice(part, n, replace=False)))
    return real.take(np.concatenate(rows[0])), generated.take(np.concatenate(rows[1]))


def realism(
    heldout: LabelledCells,
    generated: LabelledCells,
    reference: RealismReference,
    *,
    seed: int,
    n_trees: int = N_TREES,
    min_cells_per_type: int = MIN_CELLS_PER_TYPE,
) -> Scores:
    """Measure generated cells against held-out real ones, pooled and per type.

    Parameters
    ----------
    heldout
        Real cells that the generator was not trained on.
    generated
        Generated cells, same genes; of each type as many are compared as both have.
    reference
        What was fitted on the training cells.
    seed
        Seed of folds, forests, projections and subsamples.
    n_trees
        Trees of the random forest on all cells; a third of them within a type.
    min_cells_per_type
        Fewest cells of a type that is scored on its own.

    Returns
    -------
    dict
        ``(scope, metric)`` to :class:`Score`; the scope is "pooled" or a type.
    """
    rng = np.random.default_rng(seed)
    real, made = match_types(heldout, generated, rng)
    if real.n_cells == 0:
        return {(POOLED, name): Score(float("nan"), "no cells of a held-out type") for name in METRICS}
    scores = _all_scopes(real, made, reference, seed, n_trees, min_cells_per_type, rng, None)
    return scores | _own_type_nearest(heldout, generated, reference)


def ceiling(
    heldout: LabelledCells,
    reference: RealismReference,
    *,
    seed: int,
    n_trees: int = N_TREES,
    min_cells_per_type: int = MIN_CELLS_PER_TYPE,
) -> Scores:
    """Measure real cells against held-out real ones through the same functions as :func:`realism`.

    The reference's sample takes the part of the generated cells. Where that would be circular, because the sample was
    trained on, held-out cells take its part: the classifier of types judges the held-out cells, copies are counted
    among them, and memorisation asks of one half of them whether it lies nearer to the sample than to the other half.
    """
    rng = np.random.default_rng(seed)
    real, made = match_types(heldout, reference.sample, rng)
    if real.n_cells == 0:
        return {(POOLED, name): Score(float("nan"), "no cells of a held-out type") for name in METRICS}
    is_half = np.zeros(real.n_cells, dtype=bool)
    is_half[rng.permutation(real.n_cells)[: real.n_cells // 2]] = True
    scores = _all_scopes(real, made, reference, seed, n_trees, min_cells_per_type, rng, is_half)
    return scores | _own_type_nearest(heldout, reference.sample, reference)


def nearest_types(heldout: LabelledCells, generated: LabelledCells, reference: RealismReference) -> dict[str, str]:
    """Tell, for each type, which type's real held-out mean the mean of its generated cells is nearest to.

    Means of the 50 principal components of the third cells, Euclidean distance: single genes of a type with few cells
    are noise. All cells of both sides are used, of types of any size. A generator that makes one and the same cell
    under every name passes many pooled tests and fails here. Our decision.

    Parameters
    ----------
    heldout
        Real cells; all of their types are candidates.
    generated
        Generated cells of at least one of them; other types have no say.
    reference
        What was fitted on the training cells.

    Returns
    -------
    dict
        Type that was asked for to type that it is nearest to; of the types that both have.

    Raises
    ------
    NotMeasurableError
        There are fewer than two types, or none that both have.
    """
    real, made = (_type_means(cells, reference.space) for cells in (heldout, generated))
    if len(real) < 2 or not set(real) & set(made):
        raise NotMeasurableError("there is only one type" if len(real) < 2 else "no cells of a held-out type")
    names, means = list(real), np.stack(list(real.values()))
    return {
        name: names[int(np.argmin(np.linalg.norm(means - mean, axis=1)))] for name, mean in made.items() if name in real
    }


def _type_means(cells: LabelledCells, space: ReferenceSpace) -> dict[str, NDArray[np.float64]]:
    points = space.project(space.values(cells.counts))
    return {str(name): points[cells.labels == name].mean(axis=0) for name in np.unique(cells.labels)}


def _own_type_nearest(heldout: LabelledCells, generated: LabelledCells, reference: RealismReference) -> Scores:
    """Return the share of types that are nearest to their own mean, and 0 or 1 for each type."""
    try:
        found = nearest_types(heldout, generated, reference)
    except NotMeasurableError as error:
        return {(POOLED, "own_type_nearest"): Score(float("nan"), str(error))}
    of_type = {(name, "own_type_nearest"): Score(float(name == nearest)) for name, nearest in found.items()}
    share = float(np.mean([score.value for score in of_type.values()]))
    return {(POOLED, "own_type_nearest"): Score(share), **of_type}


def _all_scopes(
    real: LabelledCells,
    made: LabelledCells,
    reference: RealismReference,
    seed: int,
    n_trees: int,
    min_cells_per_type: int,
    rng: np.random.Generator,
    is_half: NDArray[np.bool_] | None,
) -> Scores:
    values = reference.space.values(real.counts), reference.space.values(made.counts)
    pair = _Pair(real, made, *values, reference, reference.space, seed, n_trees, rng, is_half)
    scores: Scores = {(POOLED, name): score for name, score in {**_common(pair), **_pooled_only(pair)}.items()}
    names, sizes = np.unique(real.labels, return_counts=True)
    for name in names[sizes >= min_cells_per_type] if names.size > 1 else []:
        space = reference.space_of_type.get(str(name), reference.space)
        found = {**_common(pair.of_type(str(name), space)), "marker_fold_change": _markers(pair, [str(name)])}
        scores |= {(str(name), metric): score for metric, score in found.items()}
    return scores


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two samples with equally many cells of each type; values are log1p(CP10K) of variable genes."""

    real: LabelledCells
    made: LabelledCells
    real_values: NDArray[np.float32]
    made_values: NDArray[np.float32]
    reference: RealismReference
    space: ReferenceSpace
    seed: int
    n_trees: int
    rng: np.random.Generator
    is_half: NDArray[np.bool_] | None  # of the real cells: the ceiling's stand-ins for generated cells

    def of_type(self, name: str, space: ReferenceSpace) -> _Pair:
        ours, theirs = self.real.labels == name, self.made.labels == name
        return _Pair(
            self.real.take(ours),
            self.made.take(theirs),
            self.real_values[ours],
            self.made_values[theirs],
            self.reference,
            space,
            self.seed,
            max(self.n_trees // 3, 1),  # fewer cells need fewer trees
            self.rng,
            None if self.is_half is None else self.is_half[ours],
        )


def _common(pair: _Pair) -> dict[str, Score]:
    """Every metric that means something within one type, too."""
    x, y = pair.space.project(pair.real_values), pair.space.project(pair.made_values)
    scores = _two_sample_tests(pair, tuple(judge for judge in CLASSIFIERS if judge != "mlp"))
    scores |= {
        "mmd2": Score.of(distances.mmd2, x, y),
        "mmd_scdiffusion": Score.of(_joint_mmd, pair),
        "energy_distance": Score.of(distances.energy_distance, x, y),
        "wasserstein1": Score.of(distances.wasserstein, x, y, order=1, rng=pair.rng),
        "wasserstein2": Score.of(distances.wasserstein, x, y, order=2, rng=pair.rng),
        "sliced_wasserstein": Score.of(distances.sliced_wasserstein, x, y, rng=pair.rng),
        "ilisi": Score.of(distances.ilisi, x, y),
        **_several(distances.prdc, ("precision", "recall", "density", "coverage"), x, y),
        "pairwise_distance_ratio": Score.of(distances.pairwise_distance_ratio, x, y),
        **by_gene.moment_agreement(pair.real.counts, pair.made.counts, pair.reference.is_used),
        "zero_fraction_error": Score.of(
            by_gene.zero_fraction_error, pair.real.counts, pair.made.counts, pair.reference.is_used
        ),
        "library_size_ks": Score.of(by_gene.library_size_ks, pair.real, pair.made),
        "genes_per_cell_ks": Score.of(by_gene.genes_per_cell_ks, pair.real, pair.made),
        "mean_variance_error": Score.of(by_gene.curve_error, pair.real.counts, pair.made.counts, "variance"),
        "mean_dropout_error": Score.of(by_gene.curve_error, pair.real.counts, pair.made.counts, "dropout"),
        "gene_correlation": Score.of(by_gene.gene_correlation_agreement, *_top(pair)),
        "conditional_accuracy": Score.of(lambda: _called_as_asked(pair)[0]),
        **_memory(pair, x, y),
    }
    return scores


def _two_sample_tests(pair: _Pair, judges: tuple[str, ...]) -> dict[str, Score]:
    x, y = pair.space.project(pair.real_values), pair.space.project(pair.made_values)
    return {
        f"c2st_{judge}_{space}": Score.of(c2st_auc, a, b, classifier=judge, seed=pair.seed, n_trees=pair.n_trees)
        for judge in judges
        for space, (a, b) in {"hvg": (pair.real_values, pair.made_values), "pca": (x, y)}.items()
    }


def _pooled_only(pair: _Pair) -> dict[str, Score]:
    """Metrics that need several types, or that are too slow to ask of each."""
    x, y = pair.space.project(pair.real_values), pair.space.project(pair.made_values)
    names, sizes = np.unique(pair.real.labels, return_counts=True)
    is_rare = np.isin(pair.real.labels, names[sizes < RARE_SHARE * pair.real.n_cells])
    third = pair.space.project(pair.space.values(pair.reference.third.counts))
    within = [
        by_gene.centred_by_type(values, cells.labels)
        for values, cells in zip(_top(pair), (pair.real, pair.made), strict=True)
    ]
    return {
        **_two_sample_tests(pair, ("mlp",)),
        "effective_cluster_ratio": Score.of(distances.effective_cluster_ratio, x, y, third, seed=pair.seed),
        "rare_type_recall": Score.of(distances.recall_of, x, y, is_rare),
        "conditional_f1": Score.of(lambda: _called_as_asked(pair)[1]),
        "tstr_accuracy": Score.of(lambda: _trained_on_made(pair)[0]),
        "tstr_f1": Score.of(lambda: _trained_on_made(pair)[1]),
        "gene_correlation_within": Score.of(by_gene.gene_correlation_agreement, *within),
        "marker_fold_change": _markers(pair, [str(name) for name in names]),
    }


def _several(function: Any, names: tuple[str, ...], *arguments: Any) -> dict[str, Score]:
    try:
        found = function(*arguments)
    except NotMeasurableError as error:
        return {name: Score(float("nan"), str(error)) for name in names}
    return {name: Score.of(lambda value: value, found[name]) for name in names}


def _joint_mmd(pair: _Pair) -> float:
    """scDiffusion's: components of both samples together."""
    from sklearn.decomposition import PCA

    both = np.concatenate([pair.real_values, pair.made_values])
    if len(both) < 4:
        raise NotMeasurableError(f"needs 2 cells on both sides, found {len(pair.real_values)}")
    size = min(50, min(both.shape) - 1)
    z = PCA(size, svd_solver="arpack", random_state=pair.seed).fit_transform(both)
    return distances.mmd_scdiffusion(z[: len(pair.real_values)], z[len(pair.real_values) :])


def _top(pair: _Pair) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return log1p(CP10K) of the genes whose correlations are compared."""
    chosen = pair.reference.correlated
    return pair.real_values[:, chosen], pair.made_values[:, chosen]


def _called_as_asked(pair: _Pair) -> tuple[float, float]:
    classifier = pair.reference.classifier
    if classifier is None:
        raise NotMeasurableError("there is only one type")
    # the ceiling's sample was trained on: what counts there is how often held-out cells are called right
    values, cells = (pair.made_values, pair.made) if pair.is_half is None else (pair.real_values, pair.real)
    return accuracy_and_f1(classifier.predict(values), cells.labels)


def _trained_on_made(pair: _Pair) -> tuple[float, float]:
    return accuracy_and_f1(
        TypeClassifier(pair.made_values, pair.made.labels).predict(pair.real_values), pair.real.labels
    )


def _markers(pair: _Pair, names: list[str]) -> Score:
    """Mean over types that have enough cells."""
    markers = pair.reference.markers
    found = [Score.of(by_gene.marker_agreement, pair.real, pair.made, markers, name) for name in names]
    values = [score.value for score in found if np.isfinite(score.value)]
    return Score(float(np.mean(values))) if values else (found[0] if found else Score(float("nan"), "no types"))


def _memory(pair: _Pair, x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, Score]:
    names = ("nearer_to_train", "nearest_distance_ratio", "closer_than_5_percent")
    is_there = np.isin(pair.reference.sample.labels, np.unique(pair.real.labels))
    sample = pair.reference.sample.take(is_there)
    # shuffled, since the first rows are used of the larger side
    train = pair.space.project(pair.space.values(sample.counts))[pair.rng.permutation(sample.n_cells)]
    if pair.is_half is None:
        near = _several(distances.memorisation, names, y, train, x[pair.rng.permutation(len(x))])
        return {**near, "n_copies": Score.of(by_gene.n_copies, pair.made, pair.reference.train)}
    near = _several(distances.memorisation, names, x[pair.is_half], train, x[~pair.is_half])
    return {**near, "n_copies": Score.of(by_gene.n_copies, pair.real, pair.reference.train)}
