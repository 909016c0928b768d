"""Simple predictors of what a perturbation does: what a model is judged against, and a null control.

Each learns from cells of a training set and predicts, for a perturbation in a context, the mean change of log1p(CP10K)
of every gene. None looks at anything but the training cells and the control cells that it is given. Where a predictor
knows nothing of a perturbation (its target has no embedding, it was in no training context) it predicts the mean of the
training perturbations.

How they go about a perturbation: what was seen in this very context is repeated. What was seen in other contexts is
carried over, by the mean (or as :class:`NearestContext` and :class:`Ridge` do). A combination is the sum of its single
perturbations. A single perturbation that was never seen is the mean of those that were (or as
:class:`NearestPerturbation`, :class:`Ridge`, :class:`RandomForest` and :class:`NearestNeighbours` do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scdiva.data.perturbation_effects import Effect, effects_of, log_values, mean_of
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.genes.gene_sets import hallmark_sets

N_OWN_COMPONENTS = 50
N_LINEAR_COMPONENTS = 10
N_NEIGHBOURS = 5
N_TREES = 200
PENALTIES = tuple(10.0**k for k in range(-3, 5))
"""Of the ridge regressions, relative to the mean variance of the features; the mean alone is tried as well."""
_NULL_STREAM = 23
Vector = NDArray[np.float64]


@runtime_checkable
class EffectPredictor(Protocol):
    """What predicts the effect of a perturbation: a baseline or a model.

    A predictor may have a further method ``predict_cells(perturbation, context, control) -> CellCounts`` that returns
    perturbed cells; they are then used wherever a metric takes cells.
    """

    def fit(self, train: PerturbedCells) -> Self:
        """Learn from training cells, perturbed ones and controls; returns itself."""
        ...

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> NDArray[np.floating]:
        """Return the mean change of log1p(CP10K), ``(n_genes,)``.

        Parameters
        ----------
        perturbation
            What is done; it need not have been seen.
        context
            Name of the cell type or line.
        control
            Control cells of that context to predict from.
        """
        ...


@dataclass(eq=False)
class Additive:
    """Sum of the single perturbations' changes; the base of the other baselines.

    In a context without the perturbation: its mean change over training contexts. A single perturbation that was never
    seen counts as the mean of the training perturbations.

    Parameters
    ----------
    vocabulary
        Genes, to find targets by their symbols; only predictors that embed genes need it.
    embedding
        ``(n_genes, n_dimensions)`` features of genes; None: principal components of the training cells.
    seed
        Seed of what is drawn.
    components
        What :func:`own_embedding` gives for the training cells, if it is there already.
    """

    vocabulary: GeneVocabulary | None = None
    embedding: NDArray[np.floating] | None = None
    seed: int = 0
    components: NDArray[np.floating] | None = None

    def fit(self, train: PerturbedCells) -> Self:
        """Measure the effects of the training conditions."""
        self.effects = effects_of(train)
        if not self.effects:
            raise ConfigError(
                "no training condition has perturbed and control cells",
                expected="at least one perturbation with control cells in its context",
                fix="check the split",
            )
        self._learn(train)
        return self

    def _learn(self, train: PerturbedCells) -> None:
        """Learn more than effects."""

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> Vector:
        """Return the mean change, ``(n_genes,)``; see the module."""
        state = mean_of(log_values(control))
        known = self._known(perturbation, context, state)
        if known is not None:
            return known
        change = np.zeros_like(self.effects[0].change)
        for target in perturbation.targets:
            single = replace(perturbation, targets=(target,))
            found = self._known(single, context, state)
            change += self._unseen(target, context) if found is None else found
        return change

    def _known(self, perturbation: Perturbation, context: str, state: Vector) -> Vector | None:
        """Return the change of what was seen, here or elsewhere; None where it never was.

        Another dose of the same treatment counts where this one was not seen.
        """
        same = [e for e in self.effects if e.perturbation == perturbation]
        same = same or [
            e
            for e in self.effects
            if e.perturbation.targets == perturbation.targets and e.perturbation.kind == perturbation.kind
        ]
        if not same:
            return None
        here = [e for e in same if e.context == context]
        return _mean(here) if here else self._carried_over(same, state)

    def _carried_over(self, same: Sequence[Effect], state: Vector) -> Vector:
        """Return the change in a new context, of effects of one perturbation in others."""
        return _mean(same)

    def _unseen(self, target: str, context: str) -> Vector:
        """Return the change of a single perturbation that was never seen."""
        return _mean(self._of_context(context))

    def _of_context(self, context: str) -> Sequence[Effect]:
        """Return effects in this context; all of them where it has none."""
        return [e for e in self.effects if e.context == context] or self.effects


class NoChange(Additive):
    """Predict that nothing changes."""

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> Vector:
        """Return zeros."""
        return np.zeros_like(self.effects[0].change)


class MeanChange(Additive):
    """Mean of the training perturbations, of this context where it has any, whatever is asked for."""

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> Vector:
        """Return the mean."""
        return _mean(self._of_context(context))


class NearestContext(Additive):
    """In a new context: the change in the training context whose control mean is nearest (Euclidean)."""

    def _carried_over(self, same: Sequence[Effect], state: Vector) -> Vector:
        distance = [float(((e.control_mean - state) ** 2).sum()) for e in same]
        return same[int(np.argmin(distance))].change


class _Embedded(Additive):
    """What predicts single perturbations that were never seen from an embedding of their target genes."""

    def _learn(self, train: PerturbedCells) -> None:
        self.position: dict[str, int] = {}
        if self.vocabulary is not None:
            targets = sorted({t for e in self.effects for t in e.perturbation.targets})
            # any target may be asked for: it is looked up then
            self.position = dict(zip(targets, self._find(targets), strict=True))
        features = self.components if self.embedding is None else self.embedding
        self.features = own_embedding(train, seed=self.seed) if features is None else np.asarray(features, np.float64)
        if self.features.shape[0] != train.cells.n_genes:
            raise ConfigError(
                f"an embedding of {self.features.shape[0]} genes for cells of {train.cells.n_genes}",
                expected="one row for each gene",
                fix="take the model whose vocabulary the cells are in",
            )
        self.has_features = np.isfinite(self.features).all(axis=1) & (np.abs(self.features).sum(axis=1) > 0)
        self.single = [e for e in self.effects if len(e.perturbation.targets) == 1]
        self.rows = np.array([self._row(e.perturbation.targets[0]) for e in self.single], dtype=np.int64)

    def _find(self, targets: Sequence[str]) -> list[int]:
        assert self.vocabulary is not None
        return [int(row) for row in genes_of(self.vocabulary, targets)]

    def _row(self, target: str) -> int:
        """Return the gene of a target; -1 where it has none or no features."""
        if target not in self.position:
            self.position[target] = self._find([target])[0] if self.vocabulary is not None else -1
        row = self.position[target]
        return row if row >= 0 and self.has_features[row] else -1

    def _training(self, context: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return genes and changes of the single perturbations of this context (of all, averaged, where it has none).

        Only perturbations whose target has features.
        """
        context_has_any = any(e.context == context for e in self.single)
        changes: dict[int, list[Vector]] = {}
        for effect, row in zip(self.single, self.rows, strict=True):
            if row >= 0 and (effect.context == context or not context_has_any):
                changes.setdefault(int(row), []).append(effect.change)
        rows = np.array(sorted(changes), dtype=np.int64)
        means = [np.mean(changes[int(row)], axis=0) for row in rows]
        return rows, np.array(means).reshape(rows.size, self.effects[0].change.size)

    def _unseen(self, target: str, context: str) -> Vector:
        row = self._row(target)
        rows, changes = self._training(context)
        if row < 0 or rows.size < 2:
            return super()._unseen(target, context)
        return self._from_features(row, rows, changes)

    def _from_features(self, row: int, rows: NDArray[np.int64], changes: NDArray[np.float64]) -> Vector:
        """Predict the change of perturbing one gene from those of others."""
        raise NotImplementedError


class NearestPerturbation(_Embedded):
    """Of a perturbation that was never seen: the change of the one whose target is most alike (cosine of features)."""

    def _from_features(self, row: int, rows: NDArray[np.int64], changes: NDArray[np.float64]) -> Vector:
        return np.asarray(changes[int(np.argmax(self._likeness(row, rows)))])

    def _likeness(self, row: int, rows: NDArray[np.int64]) -> Vector:
        x = self.features[rows] / np.linalg.norm(self.features[rows], axis=1, keepdims=True)
        return np.asarray(x @ self.features[row] / np.linalg.norm(self.features[row]))


class NearestNeighbours(NearestPerturbation):
    """Mean change of the five perturbations whose targets are most alike (Csendes et al. 2025, arXiv:2410.13956)."""

    def _from_features(self, row: int, rows: NDArray[np.int64], changes: NDArray[np.float64]) -> Vector:
        nearest = np.argsort(-self._likeness(row, rows), kind="stable")[:N_NEIGHBOURS]
        return np.asarray(changes[nearest].mean(axis=0))


class RandomForest(_Embedded):
    """Random forest from the features of the target to the change (Csendes et al. 2025, arXiv:2410.13956).

    200 trees, scikit-learn's defaults; the change is predicted in the components of the training changes.
    """

    def _from_features(self, row: int, rows: NDArray[np.int64], changes: NDArray[np.float64]) -> Vector:
        from sklearn.ensemble import RandomForestRegressor

        mean = changes.mean(axis=0)
        u, s, v = np.linalg.svd(changes - mean, full_matrices=False)
        kept = s > 1e-9 * max(float(s[0]), 1e-12)
        if not kept.any():
            return np.asarray(mean)
        forest = RandomForestRegressor(N_TREES, random_state=self.seed, n_jobs=1)
        scores = u[:, kept] * s[kept]
        forest.fit(self.features[rows], scores if scores.shape[1] > 1 else scores[:, 0])
        return np.asarray(mean + np.atleast_1d(forest.predict(self.features[[row]])[0]) @ v[kept])


class Ridge(_Embedded):
    """Ridge regressions: from the state of control cells in a new context, from the target gene of a new perturbation.

    In a new context: from the components of the training contexts' control means to the perturbation's change there.
    Of a perturbation that was never seen: from the first ten components of the target's features to the change, as in
    Ahlmann-Eltze, Huber and Anders (2025, doi:10.1038/s41592-025-02772-6), with the change itself in place of its
    projection on gene features. The penalty is the one that does best when each training condition is left out in
    turn; the mean alone is among the choices.
    """

    def _carried_over(self, same: Sequence[Effect], state: Vector) -> Vector:
        by_context = {e.context: [o for o in same if o.context == e.context] for e in same}
        x = np.stack([np.mean([e.control_mean for e in group], axis=0) for group in by_context.values()])
        y = np.stack([_mean(group) for group in by_context.values()])
        return ridge_from(x, y, state)

    def _from_features(self, row: int, rows: NDArray[np.int64], changes: NDArray[np.float64]) -> Vector:
        features = self.features[:, :N_LINEAR_COMPONENTS] if self.embedding is None else self.features
        return ridge_from(features[rows], changes, features[row])


def ridge_from(x: NDArray[np.floating], y: NDArray[np.floating], query: NDArray[np.floating]) -> Vector:
    """Ridge regression with the penalty of :data:`PENALTIES`, or the mean, that is best by leave-one-out.

    In its dual form: there are few conditions and many features, of which the components of x are all that counts.

    Parameters
    ----------
    x, y
        ``(n_conditions, n_features)`` and ``(n_conditions, n_genes)``.
    query
        ``(n_features,)``.

    Returns
    -------
    numpy.ndarray
        ``(n_genes,)``.
    """
    n = len(x)
    if n < 3:
        return np.asarray(y.mean(axis=0))
    kernel = x @ x.T
    cross = x @ query
    scale = float(np.trace(kernel - kernel.mean(axis=0)) / n)
    if scale <= 0:
        return np.asarray(y.mean(axis=0))
    errors = {
        penalty: sum(
            float(((_dual(kernel[np.ix_(rest, rest)], kernel[rest, i], penalty * scale, y[rest]) - y[i]) ** 2).sum())
            for i, rest in ((i, np.delete(np.arange(n), i)) for i in range(n))
        )
        for penalty in (np.inf, *reversed(PENALTIES))
    }
    best = min(errors, key=lambda penalty: errors[penalty])  # ties to the larger penalty
    return _dual(kernel, cross, best * scale, y)


def _dual(kernel: Vector, cross: Vector, penalty: float, y: NDArray[np.floating]) -> Vector:
    """Ridge with an intercept from scalar products of features, among conditions and with a query."""
    mean = y.mean(axis=0)
    if not np.isfinite(penalty):
        return np.asarray(mean)
    row = kernel.mean(axis=0)
    centred = kernel - row - row[:, None] + kernel.mean()
    query = cross - row - cross.mean() + kernel.mean()
    weight = np.linalg.solve(centred + penalty * np.eye(len(kernel)), query)
    return np.asarray(mean + weight @ (y - mean))


class RandomCondition(Additive):
    """The change of a random training condition: says how much all perturbations of the data have in common."""

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> Vector:
        """Draw one of another perturbation in this context; of any where there is none."""
        pool = [e for e in self._of_context(context) if e.perturbation != perturbation] or self.effects
        rng = np.random.default_rng([self.seed, _NULL_STREAM, *perturbation.name.encode(), *context.encode()])
        return pool[int(rng.integers(len(pool)))].change


class Shuffled(Additive):
    """:class:`Additive` after the perturbations, control among them, were dealt out anew in each context: the null."""

    def fit(self, train: PerturbedCells) -> Self:
        """Shuffle, and measure effects."""
        rng = np.random.default_rng([self.seed, _NULL_STREAM])
        code = train.perturbation_code.copy()
        for context in np.unique(train.context_code):
            here = np.flatnonzero(train.context_code == context)
            code[here] = rng.permutation(code[here])
        return super().fit(replace(train, perturbation_code=code))


def own_embedding(cells: PerturbedCells, *, seed: int = 0) -> NDArray[np.float64]:
    """Return features of genes: their loadings in the principal components of cells, times the singular values.

    Parameters
    ----------
    cells
        Training cells.
    seed
        Seed of the solver.

    Returns
    -------
    numpy.ndarray
        ``(n_genes, n_components)``, at most 50 components; zeros for genes without counts.
    """
    from sklearn.decomposition import PCA

    values = log_values(cells)
    size = min(N_OWN_COMPONENTS, min(values.shape) - 1)
    if size < 1 or values.nnz == 0:
        return np.zeros((values.shape[1], 1))
    detected = np.flatnonzero(np.bincount(values.indices, minlength=values.shape[1]))
    size = min(size, detected.size - 1)
    result = np.zeros((values.shape[1], max(size, 1)))
    if size >= 1:
        pca = PCA(size, svd_solver="arpack", random_state=seed).fit(values[:, detected])
        result[detected] = pca.components_.T * np.sqrt(pca.explained_variance_)
    return result


def set_features(vocabulary: GeneVocabulary) -> NDArray[np.float64]:
    """Return which of the 50 hallmark gene sets each gene is in, ``(n_genes, 50)``.

    In the place of Gene Ontology terms, whose random forest led in Csendes et al. 2025.
    """
    sets = hallmark_sets()
    return np.stack([np.isin(vocabulary.symbol, genes).astype(np.float64) for genes in sets.values()], axis=1)


def genes_of(vocabulary: GeneVocabulary, targets: Sequence[str]) -> NDArray[np.int64]:
    """Return the gene of each target by its symbol or Ensembl id; -1 where the vocabulary has none."""
    position = {str(name): i for i, name in reversed(list(enumerate(vocabulary.symbol)))}
    position |= {str(name): i for i, name in enumerate(vocabulary.ensembl_id)}
    return np.array([position.get(target, -1) for target in targets], dtype=np.int64)


def _mean(effects: Sequence[Effect]) -> Vector:
    return np.asarray(np.mean([e.change for e in effects], axis=0))


BASELINES: Mapping[str, Callable[..., Additive]] = {
    "no_change": NoChange,
    "mean": MeanChange,
    "additive": Additive,
    "nearest_context": NearestContext,
    "nearest_perturbation": NearestPerturbation,
    "ridge": Ridge,
    "random_forest": RandomForest,
    "knn": NearestNeighbours,
    "ridge_corpus": Ridge,
    "random_forest_corpus": RandomForest,
    "knn_corpus": NearestNeighbours,
    "ridge_sets": Ridge,
    "random_forest_sets": RandomForest,
    "random_condition": RandomCondition,
    "shuffled": Shuffled,
}
"""Every baseline by name; those that end in "_corpus" are given gene features of a pre-trained model."""
NULL = "shuffled"
TITLES: Mapping[str, str] = {
    "no_change": "no change",
    "mean": "mean of training perturbations",
    "additive": "additive",
    "nearest_context": "nearest context",
    "nearest_perturbation": "nearest perturbation",
    "ridge": "ridge on PCA",
    "random_forest": "random forest, own gene features",
    "knn": "5-nn, own gene features",
    "ridge_corpus": "ridge, corpus gene features",
    "random_forest_corpus": "random forest, corpus gene features",
    "knn_corpus": "5-nn, corpus gene features",
    "ridge_sets": "ridge, gene sets",
    "random_forest_sets": "random forest, gene sets",
    "random_condition": "a random training condition",
    "shuffled": "shuffled perturbations (null)",
}
"""What they are called in tables."""


def make(
    name: str,
    *,
    vocabulary: GeneVocabulary | None = None,
    corpus: NDArray[np.floating] | None = None,
    seed: int = 0,
    components: NDArray[np.floating] | None = None,
) -> Additive:
    """Return a baseline, not yet fitted.

    Parameters
    ----------
    name
        One of :data:`BASELINES`.
    vocabulary
        Genes of the cells.
    corpus
        ``(n_genes, n_dimensions)`` features of these genes in a pre-trained model; "_corpus" baselines need it.
    seed
        Seed.
    components
        What :func:`own_embedding` gives for the training cells, if it is there already.

    Raises
    ------
    ConfigError
        There is no such baseline, or it needs features that are not given.
    """
    if name not in BASELINES:
        raise ConfigError(
            f"no baseline is called {name!r}", expected=f"one of {', '.join(BASELINES)}", fix="correct the name"
        )
    is_corpus = name.endswith("_corpus")
    if is_corpus and corpus is None:
        raise ConfigError(
            f"{name!r} without gene features of a model", expected="corpus=(n_genes, n_dimensions)", fix="name a model"
        )
    embedding = corpus if is_corpus else None
    if name.endswith("_sets"):
        if vocabulary is None:
            raise ConfigError(f"{name!r} without a vocabulary", expected="the genes of the cells", fix="give it")
        embedding = set_features(vocabulary)
    return BASELINES[name](vocabulary=vocabulary, embedding=embedding, seed=seed, components=components)
