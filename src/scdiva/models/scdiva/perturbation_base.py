"""What is predicted of a perturbation before any network is trained: many simple predictors, weighed by what they miss.

Every predictor is a closed formula on the measured effects of the training conditions. Which of them there are depends
on the question:

- *seen*: the condition itself was measured, in other cells: its effect, as it is and with noise shrunk;
- *context*: the perturbation was seen in other contexts: ridge regression of effects on the state of control cells
  (components of their log1p(CP10K), and z), with several penalties, with noise shrunk, and corrected for how much of
  each gene the new context has to begin with; the nearest context; and what fluctuates together within the control
  cells of the new context itself (linear response: Kubo 1966, doi:10.1088/0034-4885/29/1/306, as a heuristic);
- *single*: no context shows the perturbation of this gene: the mean of the others; ridge regressions on the target's
  gene embedding, its loadings in components of the training cells and the gene sets that it is in; the nearest targets;
  a random forest on the loadings; and what varies with the target's own expression within control cells;
- *combination*: the sum of the parts, with noise shrunk and not; their larger part; and the sum with what a ridge
  regression on products of the parts' components says of how they interact.

The weights of the predictors are fitted, not negative and drawn towards equal ones, to training conditions that are
left out in the way of the question: a whole context, a whole perturbation, a combination (stacked regressions: Breiman
1996, doi:10.1007/BF00117832). Large and small predicted changes have weights of their own: where little happens, heavy
shrinkage is right, and where much happens, it is wrong. (The choice of predictors is our decision; docs/perturbation.md
tells what was tried.)

Arrays: N conditions, G genes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.perturbations import Perturbation

Vector = NDArray[np.float64]
Question = Literal["seen", "context", "single", "combination"]

PENALTIES = (0.1, 0.3, 1.0)
"""Of regressions on contexts, in units of the features' mean square; noisier contexts are penalised more."""
TARGET_PENALTIES = (1.0, 3.0, 10.0)
"""Of regressions on targets."""
N_NEIGHBOURS = 5
"""Targets that "nearest" is the mean of."""
N_TREES = 100
"""Of the random forest."""
N_COMPONENTS = 10
N_EFFECT_COMPONENTS = 8
EQUAL_WEIGHT = 0.3
"""How strongly weights are drawn towards equal ones, relative to the predictors' mean square."""
QUANTILES = (0.9, 0.98)
"""Shares of the genes below which a predicted change counts as small, and as middling."""
MIN_LEFT_OUT = 3
"""Fewest left-out problems that weights are fitted to; with fewer, weights are equal."""
OWN_LEVEL = 0.3
"""How far a change is corrected for the gene's own level in control cells (:func:`at_own_level`)."""
MAX_LEFT_OUT = 60
"""Most left-out problems; of more, a random choice."""
_SPREAD_FLOOR = 0.05
MIN_CELLS = 10
"""Conditions of fewer cells, perturbed or control, teach, but are not left out, and are no nearest neighbour."""


@dataclass(frozen=True, slots=True, eq=False)
class ContextState:
    """Control cells of a context, as predictors see them.

    Parameters
    ----------
    mean, variance
        ``(G,)`` of log1p(CP10K) over cells.
    components
        ``(F,)`` mean of the cells' principal components.
    z
        ``(Z,)`` mean z.
    n_cells
        Number of control cells.
    values
        CSR ``(n_cells, G)`` log1p(CP10K); None where the cells are not at hand (a model that was saved).
    """

    mean: Vector
    variance: Vector
    components: Vector
    z: Vector
    n_cells: int
    values: sp.csr_matrix | None = None

    def response(self, force: Vector) -> Vector:
        """Return how genes vary over these cells together with a score, per standard deviation of the score.

        Each gene's own part in the score is left out, and what is not larger than its noise is shrunk.

        Parameters
        ----------
        force
            ``(G,)`` weights of the genes in the score.
        """
        if self.values is None or self.n_cells < MIN_CELLS:
            return np.zeros_like(self.mean)
        score = self.values @ force
        score = score - score.mean()
        spread = float(score.std())
        if spread <= 0:
            return np.zeros_like(self.mean)
        slope = (self.values.T @ score / self.n_cells - self.variance * force) / spread
        return shrunk(slope, 3 * self.variance / self.n_cells)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredEffect:
    """What one perturbation changed in one context.

    Parameters
    ----------
    perturbation, context
        Which.
    change
        ``(G,)`` mean log1p(CP10K) of perturbed minus control cells.
    noise
        ``(G,)`` its sampling variance.
    n_cells
        Number of perturbed cells.
    """

    perturbation: Perturbation
    context: str
    change: Vector
    noise: Vector
    n_cells: int

    def precision(self, states: Mapping[str, ContextState]) -> float:
        """Return the number of cells that the change is as precise as: 1 / (1 / perturbed + 1 / control)."""
        return 1.0 / (1.0 / self.n_cells + 1.0 / max(states[self.context].n_cells, 1))


@dataclass(frozen=True, slots=True, eq=False)
class TargetFeatures:
    """What is known of genes that can be perturbed, whether they were or not.

    Parameters
    ----------
    gene_of
        Gene of the vocabulary of a target's symbol.
    embedding
        ``(genes, E)`` gene embeddings of the model.
    sets_of
        Positions of the gene sets that a symbol is in.
    n_sets
        Number of gene sets.
    """

    gene_of: Mapping[str, int]
    embedding: NDArray[np.floating]
    sets_of: Mapping[str, Sequence[int]]
    n_sets: int

    def embedded(self, target: str) -> Vector | None:
        """Return the unit gene embedding of a target; None where it is no gene of the model."""
        gene = self.gene_of.get(target)
        if gene is None:
            return None
        row = np.asarray(self.embedding[gene], dtype=np.float64)
        return np.asarray(row / max(float(np.linalg.norm(row)), 1e-6))

    def sets(self, target: str) -> Vector:
        """Return which gene sets a target is in, ``(n_sets,)``."""
        row = np.zeros(self.n_sets)
        row[list(self.sets_of.get(target, ()))] = 1.0
        return row


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights of the predictors of a question.

    Parameters
    ----------
    names
        Predictors.
    weight
        ``(bins, predictors)``.
    limits
        ``(bins - 1,)`` absolute mean predicted change that separates the bins.
    n_problems
        Left-out conditions they were fitted to; 0: equal weights.
    """

    names: tuple[str, ...]
    weight: NDArray[np.float64]
    limits: NDArray[np.float64]
    n_problems: int

    def combine(self, said: Mapping[str, Vector]) -> Vector:
        """Return the weighted predictions, ``(G,)``."""
        stacked = np.stack([said[name] for name in self.names])
        bins = np.searchsorted(self.limits, np.abs(stacked.mean(axis=0)))
        return np.asarray((self.weight[bins].T * stacked).sum(axis=0))


def fit_weights(problems: Sequence[tuple[Mapping[str, Vector], Vector]], names: Sequence[str]) -> Weights:
    """Fit weights to left-out conditions.

    Parameters
    ----------
    problems
        What each predictor said of a left-out condition, and what was measured.
    names
        Predictors.
    """
    from scipy.optimize import nnls

    n = len(names)
    if len(problems) < MIN_LEFT_OUT:
        return Weights(tuple(names), np.full((1, n), 1.0 / n), np.zeros(0), 0)
    x = np.concatenate([np.stack([said[name] for name in names], axis=1) for said, _ in problems])
    y = np.concatenate([change for _, change in problems])
    size = np.abs(x.mean(axis=1))
    limits = np.quantile(size, QUANTILES)
    bins = np.searchsorted(limits, size)
    weight = np.full((len(QUANTILES) + 1, n), 1.0 / n)
    for b in range(weight.shape[0]):
        rows = bins == b
        gram = x[rows].T @ x[rows]
        ridge = EQUAL_WEIGHT * np.trace(gram) / n + 1e-12
        # least squares with a penalty on the distance from equal weights, through the normal equations' square root
        root = np.linalg.cholesky(gram + ridge * np.eye(n))
        wanted = x[rows].T @ y[rows] + ridge / n
        weight[b] = nnls(root.T, np.linalg.solve(root, wanted))[0]
    return Weights(tuple(names), weight, limits, len(problems))


def kernel_ridge(
    features: NDArray[np.floating], effects: Sequence[MeasuredEffect], precision: Vector, query: Vector, penalty: float
) -> Vector:
    """Predict the effect at ``query`` from effects at ``features``, ``(N, F)``; penalised more where fewer cells are.

    The mean effect, weighted by precision, is not penalised.
    """
    changes = np.stack([effect.change for effect in effects])
    mean = precision @ changes / precision.sum()
    centre = precision @ features / precision.sum()
    gram = (features - centre) @ (features - centre).T
    scale = float(precision @ np.diag(gram) / precision.sum())
    if scale <= 0:
        return np.asarray(mean)
    cross = (features - centre) @ (query - centre) / scale
    noise = penalty * precision.mean() / precision
    return np.asarray(mean + np.linalg.solve(gram / scale + np.diag(noise), cross) @ (changes - mean))


def shrunk(change: Vector, noise: Vector) -> Vector:
    """Shrink a change where it is not larger than its noise."""
    return np.asarray(change * change**2 / np.maximum(change**2 + noise, 1e-30))


def at_own_level(change: Vector, level: Vector, own_level: Vector) -> Vector:
    """Correct a change for where a gene's control expression is, against where the contexts learned from would have it.

    A gene that is induced ends at a common level rather than so much above where it was; one that is reduced loses a
    share of what there is. Corrected by :data:`OWN_LEVEL` of the way. (Our decision.)

    Parameters
    ----------
    change
        ``(G,)`` predicted change.
    level, own_level
        ``(G,)`` mean log1p(CP10K) of control cells: as predicted from the contexts learned from, and as it is.
    """
    is_up = change > 0
    share = np.abs(change) / (np.abs(change) + level + _SPREAD_FLOOR)
    ratio = np.clip((own_level + _SPREAD_FLOOR) / (level + _SPREAD_FLOOR), 0.3, 3.0)
    return np.where(is_up, change + OWN_LEVEL * share * (level - own_level), change * ratio**OWN_LEVEL)


@dataclass(eq=False)
class BasePredictor:
    """The weighted simple predictors.

    Parameters
    ----------
    effects
        Measured effects of the training conditions.
    states
        Control cells of every context that has any, those without effects included.
    targets
        What is known of genes.
    on_panel
        Position in the panel of each symbol that is on it.
    spread
        ``(G,)`` variance of log1p(CP10K) over all control cells.
    loadings
        ``(G, F)`` loadings of the genes in principal components of the training cells, times their standard deviations.
    weights
        Weights of the predictors of each question; fitted when they are first needed.
    axes, axis_scale
        ``(K, G)`` main components of the training effects, and the size of these along each (:meth:`fit_axes`).
    """

    effects: tuple[MeasuredEffect, ...]
    states: Mapping[str, ContextState]
    targets: TargetFeatures
    on_panel: Mapping[str, int]
    spread: Vector
    loadings: NDArray[np.float64]
    weights: dict[Question, Weights] = field(default_factory=dict)
    axes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    axis_scale: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    # --- the question ---

    def question(self, perturbation: Perturbation, context: str) -> Question:
        """Tell which question it is to predict a perturbation in a context."""
        same = self._same(perturbation)
        if any(effect.context == context for effect in same):
            return "seen"
        if same:
            return "context"
        return "combination" if len(perturbation.targets) > 1 else "single"

    def _same(self, perturbation: Perturbation) -> list[MeasuredEffect]:
        """Return the effects of a perturbation; of its other doses where this one was never measured."""
        same = [effect for effect in self.effects if effect.perturbation == perturbation]
        return same or [
            effect
            for effect in self.effects
            if effect.perturbation.targets == perturbation.targets and effect.perturbation.kind == perturbation.kind
        ]

    def unseen(self, perturbation: Perturbation) -> list[str]:
        """Return the targets that no training condition had alone."""
        return [t for t in perturbation.targets if not self._same(replace(perturbation, targets=(t,)))]

    def n_singles(self, kind: str) -> int:
        """Return the number of single perturbations of a kind that were measured."""
        return len({e.perturbation.targets for e in self.effects if len(e.perturbation.targets) == 1
                    and e.perturbation.kind == kind})  # fmt: skip

    # --- prediction ---

    def predict(self, perturbation: Perturbation, context: str, state: ContextState | None = None) -> Vector:
        """Return the predicted mean change, ``(G,)``.

        Parameters
        ----------
        perturbation
            What is done.
        context
            Where; a context that was not seen in training needs its state.
        state
            Control cells to predict from; those of training if left out.
        """
        state = state or self.states[context]
        question = self.question(perturbation, context)
        said = self.said(perturbation, context, state)
        weights = self.weights.get(question)
        if weights is None:
            weights = self.weights[question] = self._fitted(question, tuple(said))
        return weights.combine(said)

    def said(self, perturbation: Perturbation, context: str, state: ContextState) -> dict[str, Vector]:
        """Return what each predictor of the question says, by name."""
        question = self.question(perturbation, context)
        if question == "seen":
            return self._seen(perturbation, context)
        if question == "context":
            return self._context(self._same(perturbation), state)
        if question == "single":
            return self._single(perturbation, context, state)
        return self._combination(perturbation, context, state)

    def _seen(self, perturbation: Perturbation, context: str) -> dict[str, Vector]:
        here = [effect for effect in self._same(perturbation) if effect.context == context]
        change = np.mean([effect.change for effect in here], axis=0)
        noise = np.sum([effect.noise for effect in here], axis=0) / len(here) ** 2
        return {"measured": change, "measured, noise shrunk": shrunk(change, noise)}

    def sampling_error(self, perturbation: Perturbation, context: str) -> Vector:
        """Return the standard error of a change that was measured in training, ``(G,)``."""
        here = [effect.noise for effect in self._same(perturbation) if effect.context == context]
        return np.asarray(np.sqrt(np.sum(here, axis=0)) / len(here))

    def _context(self, same: Sequence[MeasuredEffect], state: ContextState) -> dict[str, Vector]:
        precision = np.array([effect.precision(self.states) for effect in same])
        firm = [effect for effect in same if precision[same.index(effect)] >= MIN_CELLS / 2] or list(same)
        nearest = min(
            firm, key=lambda effect: float(((self.states[effect.context].components - state.components) ** 2).sum())
        )
        said = {"nearest": nearest.change}
        for name, of in (("components", lambda s: s.components), ("z", lambda s: s.z)):
            features = np.stack([of(self.states[effect.context]) for effect in same])
            usual = kernel_ridge(features, same, precision, of(state), 1.0)
            levels = [replace(effect, change=self.states[effect.context].mean) for effect in same]
            level = np.maximum(kernel_ridge(features, levels, precision, of(state), 1.0), 0.0)
            for penalty in PENALTIES:
                said[f"ridge on {name}, {penalty:g}"] = kernel_ridge(features, same, precision, of(state), penalty)
            said[f"ridge on {name}, own level"] = at_own_level(usual, level, state.mean)
        middle = said["ridge on components, 1"]
        noise = np.mean([effect.noise for effect in same], axis=0) / len(same)
        said["ridge, noise shrunk"] = shrunk(middle, 4 * noise)
        said["ridge with linear response"] = middle + state.response(middle / (self.spread + _SPREAD_FLOOR))
        return said

    def _single(self, perturbation: Perturbation, context: str, state: ContextState) -> dict[str, Vector]:
        effects = self._singles(context, perturbation.kind)
        target = perturbation.targets[0]
        precision = np.array([effect.precision(self.states) for effect in effects])
        mean = np.mean([effect.change for effect in effects], axis=0)
        said = {"mean": mean}
        features: dict[str, tuple[list[Vector | None], Vector | None]] = {
            "gene embedding": (
                [self.targets.embedded(effect.perturbation.targets[0]) for effect in effects],
                self.targets.embedded(target),
            ),
            "loadings": (
                [self._loadings(effect.perturbation.targets[0]) for effect in effects],
                self._loadings(target),
            ),
            "gene sets": (
                [self.targets.sets(effect.perturbation.targets[0]) for effect in effects],
                self.targets.sets(target),
            ),
        }
        for name, (rows, query) in features.items():
            known = [i for i, row in enumerate(rows) if row is not None]
            found = [row for row in rows if row is not None]
            if query is None or len(known) < MIN_LEFT_OUT:
                said |= {f"ridge on {name}, {penalty:g}": mean for penalty in TARGET_PENALTIES}
                said[f"nearest on {name}"] = mean
                continue
            stacked, of = np.stack(found), [effects[i] for i in known]
            firm = np.minimum(precision[known], np.median(precision))
            for penalty in TARGET_PENALTIES:
                said[f"ridge on {name}, {penalty:g}"] = kernel_ridge(stacked, of, firm, query, penalty)
            near = np.argsort(-(stacked @ query), kind="stable")[:N_NEIGHBOURS]
            said[f"nearest on {name}"] = np.mean([of[i].change for i in near], axis=0)
        said.pop("nearest on gene sets")  # most targets share no set with any other
        said["forest on loadings"] = self._forest(effects, target, mean)
        gene = self.on_panel.get(target)
        own = np.zeros_like(mean)
        if gene is not None:
            force = np.zeros_like(mean)
            force[gene] = 1.0
            own = state.response(force) * (1.0 if perturbation.kind == "activation" else -1.0)
        said["mean with co-variation"] = mean + own
        return said

    def _forest(self, effects: Sequence[MeasuredEffect], target: str, mean: Vector) -> Vector:
        """Predict by a random forest on the loadings of the targets (in the manner of Csendes et al. 2025).

        It is fitted to scores along all components of the training effects: their sums of squares are those of the
        genes, and so are the trees, whatever the number of genes.
        """
        from sklearn.ensemble import RandomForestRegressor

        known = [effect for effect in effects if self._loadings(effect.perturbation.targets[0]) is not None]
        gene = self.on_panel.get(target)
        if gene is None or len(known) < MIN_LEFT_OUT or self._loadings(target) is None:
            return mean
        features = np.stack([self.loadings[self.on_panel[effect.perturbation.targets[0]]] for effect in known])
        left, size, axes = np.linalg.svd(np.stack([effect.change for effect in known]), full_matrices=False)
        forest = RandomForestRegressor(N_TREES, random_state=0, n_jobs=1).fit(features, left * size)
        return np.asarray(np.atleast_2d(forest.predict(self.loadings[gene][None])).reshape(-1) @ axes)

    def _loadings(self, target: str) -> Vector | None:
        """Return the unit loadings of a target; None where it is not on the panel or never varies."""
        gene = self.on_panel.get(target)
        size = 0.0 if gene is None else float(np.linalg.norm(self.loadings[gene]))
        return None if gene is None or size == 0 else np.asarray(self.loadings[gene] / size)

    def _singles(self, context: str, kind: str) -> list[MeasuredEffect]:
        """Return effects of single targets in this context; where it has none, in all."""
        singles = [e for e in self.effects if len(e.perturbation.targets) == 1 and e.perturbation.kind == kind]
        singles = singles or [e for e in self.effects if len(e.perturbation.targets) == 1] or list(self.effects)
        return [effect for effect in singles if effect.context == context] or singles

    def _combination(self, perturbation: Perturbation, context: str, state: ContextState) -> dict[str, Vector]:
        parts = [self.part(perturbation, target, context, state) for target in perturbation.targets]
        total = np.sum(parts, axis=0)
        noise = self._noise(context)
        largest = np.take_along_axis(np.stack(parts), np.abs(np.stack(parts)).argmax(axis=0)[None], axis=0)[0]
        said = {
            "additive": total,
            "additive, noise shrunk": np.sum([shrunk(part, noise) for part in parts], axis=0),
            "larger part": largest,
        }
        said["additive with interactions"] = total + self._interaction(parts, context)
        return said

    def described(
        self,
        perturbation: Perturbation,
        context: str,
        state: ContextState,
        base: Vector,
        question: Question | None = None,
    ) -> Vector:
        """Describe what is predicted by scores along the main effects of training, ``(3 K,)``: the network is told.

        Sums over the targets, sums of products of two targets, and the largest of the targets' scores.

        Parameters
        ----------
        perturbation, context, state
            As for :meth:`predict`.
        base
            What that returns.
        question
            What is asked, where it is not what the training set makes of it: of conditions that are left out.
        """
        parts = [base]
        if (question or self.question(perturbation, context)) == "combination":
            parts = [self.part(perturbation, target, context, state) for target in perturbation.targets]
        scores = np.stack(parts) @ self.axes.T / self.axis_scale
        total = scores.sum(axis=0)
        largest = np.take_along_axis(scores, np.abs(scores).argmax(axis=0)[None], axis=0)[0]
        return np.concatenate([total, (total**2 - (scores**2).sum(axis=0)) / 2, largest])

    def fit_axes(self) -> None:
        """Find the main components of the training effects, of single targets where there are several."""
        singles = [e.change for e in self.effects if len(e.perturbation.targets) == 1]
        changes = np.stack(singles if len(singles) >= MIN_LEFT_OUT else [e.change for e in self.effects])
        self.axes = np.linalg.svd(changes, full_matrices=False)[2][:N_EFFECT_COMPONENTS]
        self.axis_scale = np.sqrt(((changes @ self.axes.T) ** 2).mean(axis=0)) + 1e-9

    def part(self, perturbation: Perturbation, target: str, context: str, state: ContextState) -> Vector:
        """Return what one target of a combination does alone: measured where it was, else predicted."""
        single = replace(perturbation, targets=(target,))
        measured = self._measured(single, context)
        return self.predict(single, context, state) if measured is None else measured

    def _measured(self, perturbation: Perturbation, context: str) -> Vector | None:
        """Return what a perturbation does in a context; None where it was not measured there."""
        return next((effect.change for effect in self._same(perturbation) if effect.context == context), None)

    def _noise(self, context: str) -> Vector:
        here = [effect.noise for effect in self.effects if effect.context == context]
        return np.asarray(np.mean(here or [effect.noise for effect in self.effects], axis=0))

    def _interaction(self, parts: Sequence[Vector], context: str) -> Vector:
        """Predict what a combination does beyond the sum of its parts, from how other combinations do.

        Ridge regression on products of the parts' scores along the main components of single effects, learned from
        combinations whose parts were all measured alone; the penalty has the least error on combinations left out one
        by one, and no interaction at all is among the choices.
        """
        pairs = []
        for effect in self.effects:
            if len(effect.perturbation.targets) > 1 and effect.context == context:
                alone = [replace(effect.perturbation, targets=(target,)) for target in effect.perturbation.targets]
                of = [change for single in alone if (change := self._measured(single, context)) is not None]
                if len(of) == len(alone):
                    pairs.append((effect, of))
        singles = [e for e in self.effects if len(e.perturbation.targets) == 1 and e.context == context]
        nothing = np.zeros_like(parts[0])
        if len(pairs) < 2 * MIN_LEFT_OUT or len(singles) < MIN_LEFT_OUT:
            return nothing
        changes = np.stack([effect.change for effect in singles])
        axes = np.linalg.svd(changes, full_matrices=False)[2][: min(N_EFFECT_COMPONENTS, len(singles) // 2)]

        def products(vectors: Sequence[Vector]) -> Vector:
            scores = np.stack(vectors) @ axes.T
            total, squares = scores.sum(axis=0), scores.T @ scores
            rows, columns = np.triu_indices(axes.shape[0])
            # of all pairs of different parts, whatever their order
            return np.asarray((np.outer(total, total) - squares)[rows, columns])

        rows, left = [], []
        for effect, of in pairs:
            rows.append(products(of))
            left.append(effect.change - np.sum(of, axis=0))
        x, y, query = np.stack(rows), np.stack(left), products(parts)
        scale = np.sqrt((x**2).mean(axis=0)) + 1e-9
        x, query = x / scale, query / scale
        gram = x @ x.T
        unit = float(np.trace(gram)) / len(gram)
        values, vectors = np.linalg.eigh(gram)
        best, error = np.inf, float((y**2).sum())
        for penalty in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            inverse = (vectors / (values + penalty * unit)) @ vectors.T
            missed = inverse @ y / np.diag(inverse)[:, None]  # of each left out, in closed form
            if float((missed**2).sum()) < error:
                best, error = penalty, float((missed**2).sum())
        if not np.isfinite(best):
            return nothing
        weight = ((vectors / (values + best * unit)) @ vectors.T) @ (x @ query)
        return np.asarray(weight @ y)

    # --- weights ---

    def _fitted(self, question: Question, names: Sequence[str]) -> Weights:
        """Fit the weights of a question to training conditions that are left out in its way."""
        if question == "seen":
            return Weights(tuple(names), np.full((1, len(names)), 1.0 / len(names)), np.zeros(0), 0)
        return fit_weights([(said, change) for said, change, _ in self.left_out(question)], names)

    def fit_weights(
        self, question: Question, problems: Sequence[tuple[Mapping[str, Vector], Vector, MeasuredEffect]]
    ) -> None:
        """Fit the weights of a question to what :meth:`left_out` returned for it."""
        self.weights[question] = fit_weights([(said, change) for said, change, _ in problems], tuple(problems[0][0]))

    def left_out(self, question: Question) -> list[tuple[dict[str, Vector], Vector, MeasuredEffect]]:
        """Return, for training conditions left out in the way of a question, what was said and what was measured."""
        found: list[tuple[dict[str, Vector], Vector, MeasuredEffect]] = []
        firm = [effect for effect in self.effects if effect.precision(self.states) >= MIN_CELLS / 2]
        if len(firm) > MAX_LEFT_OUT:
            firm = [firm[i] for i in np.random.default_rng(0).permutation(len(firm))]
        for effect in firm:
            if len(found) == MAX_LEFT_OUT:
                break
            rest = self._without(effect, question)
            if rest is None:
                continue
            smaller = replace(self, effects=rest, weights=dict(self.weights))
            if smaller.question(effect.perturbation, effect.context) != question:
                continue
            said = smaller.said(effect.perturbation, effect.context, self.states[effect.context])
            found.append((said, effect.change, effect))
        return found

    def _without(self, effect: MeasuredEffect, question: Question) -> tuple[MeasuredEffect, ...] | None:
        own = set(effect.perturbation.targets)
        if question == "context":
            rest = tuple(e for e in self.effects if e.context != effect.context)
            n_same = sum(e.perturbation == effect.perturbation for e in rest)
            return rest if n_same >= MIN_LEFT_OUT else None
        if question == "single":
            if len(own) > 1:
                return None
            rest = tuple(e for e in self.effects if not own & set(e.perturbation.targets))
            return rest if len(rest) >= MIN_LEFT_OUT else None
        if len(own) < 2:
            return None
        return tuple(e for e in self.effects if set(e.perturbation.targets) != own)
