"""How well a predicted effect of a perturbation is right: the published columns, and those that are hard to game.

Everything is measured for one *condition* (a perturbation in a context) and averaged over conditions by the caller.
The truth has mean log1p(CP10K) of perturbed cells, mu_p, and of control cells of the same batch and context, mu_c; its
change is d = mu_p - mu_c. A prediction is a change d' over all genes (mu_p' = mu_c + d'), and cells where the predictor
makes any.

DE genes: Wilcoxon rank-sum of perturbed against control cells (stratified by batch), p adjusted by Benjamini and
Hochberg over the genes that are not targets of the perturbation; "top 20": by |z|. Log fold change: log2 of
(expm1(mu_p) + 0.1) / (expm1(mu_c) + 0.1), as cell-eval does (geometric means) but for the 0.1, which PerturBench adds.

Sources. PearsonΔ, DEMSE, DEP, C-DEP, AUPRC, LFCSp and HR@20 are the columns of scDiVa's perturbation table
(arXiv:2602.03477); its authors do not publish their definitions, so that these are ours, and their figures do not
compare with figures by these. Perturbed reference and centroid accuracy: Systema (Viñas Torné et al. 2025,
doi:10.1038/s41587-025-02777-8). Weighted errors: Mejia et al. 2025 (arXiv:2506.22641). Discrimination: cell-eval
(Arc Institute, Virtual Cell Challenge 2025).

Without a value: a constant prediction has correlation 0 (it says nothing). What the truth leaves undefined (a constant
truth, no significant gene, no other perturbation) is NaN with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.metrics.generation_genes import correlation
from scdiva.metrics.generation_space import NotMeasurableError, Score

N_TOP = 20
N_COMMON = 100
MAX_P = 0.05
LOG_FOLD_OFFSET = 0.1
"""Added to both means of CP10K in a log fold change; it matters (PerturBench takes the same)."""
Vector = NDArray[np.float64]


class Metric(NamedTuple):
    """What a column of the report is: its title, its ideal value, and whether more is better."""

    title: str
    ideal: float
    is_higher_better: bool


METRICS: Mapping[str, Metric] = {
    "pearson_delta": Metric("PearsonΔ", 1.0, True),
    "demse": Metric("DEMSE", 0.0, False),
    "dep": Metric("DEP", 1.0, True),
    "c_dep": Metric("C-DEP", 1.0, True),
    "auprc": Metric("AUPRC", 1.0, True),
    "lfc_spearman": Metric("LFCSp", 1.0, True),
    "hit_rate_20": Metric("HR@20", 1.0, True),
    "common_de": Metric("common DE genes", 1.0, True),
    "pearson_perturbed": Metric("PearsonΔ, perturbed reference", 1.0, True),
    "centroid_accuracy": Metric("centroid accuracy", 1.0, True),
    "weighted_mse": Metric("weighted MSE", 0.0, False),
    "weighted_r2": Metric("weighted R²Δ", 1.0, True),
    "pds_l1": Metric("PDS L1", 1.0, True),
    "pds_l2": Metric("PDS L2", 1.0, True),
    "pds_cosine": Metric("PDS cosine", 1.0, True),
    "direction_match": Metric("direction match", 1.0, True),
    "mse": Metric("MSE", 0.0, False),
    "e_distance": Metric("E-distance", 0.0, False),
}
"""Every metric by name, in the order of the tables."""
PUBLISHED = ("pearson_delta", "demse", "dep", "c_dep", "auprc", "lfc_spearman", "hit_rate_20")
"""The columns of scDiVa's table."""


@dataclass(frozen=True, slots=True, eq=False)
class ConditionTruth:
    """What is known of one condition.

    Parameters
    ----------
    change
        ``(n_genes,)`` d, mean log1p(CP10K) of perturbed minus control cells.
    control_mean
        ``(n_genes,)`` mu_c.
    z
        ``(n_genes,)`` z of the rank-sum test.
    is_target
        ``(n_genes,)`` genes that the perturbation acts on itself: in no DE gene, and in no discrimination.
    training_change
        ``(n_genes,)`` mean change of the training conditions (of the same context where there are any): mu_c plus this
        is the mean of the training perturbations' centroids, the reference of C-DEP, of Systema and of weighted R².
    t
        ``(n_genes,)`` t of perturbed cells against those of all other perturbations in the context (against control
        cells where there is no other); None: no weighted metrics.
    others
        ``(n_others, n_genes)`` true changes of other perturbations in the same context; may be empty.
    """

    change: Vector
    control_mean: Vector
    z: Vector
    is_target: NDArray[np.bool_]
    training_change: Vector
    t: Vector | None = None
    others: Vector | None = None

    @property
    def adjusted_p(self) -> Vector:
        """Benjamini-Hochberg adjusted p, ``(n_genes,)``; NaN for target genes."""
        return adjusted_p(self.z, ~self.is_target)

    @property
    def is_significant(self) -> NDArray[np.bool_]:
        """Genes with adjusted p below 0.05, targets left out."""
        with np.errstate(invalid="ignore"):
            return self.adjusted_p < MAX_P

    @property
    def top_genes(self) -> NDArray[np.int64]:
        """The 20 genes with the largest |z|, targets left out (all others where there are fewer)."""
        return top(np.where(self.is_target, -np.inf, np.abs(self.z)), min(N_TOP, int((~self.is_target).sum())))

    @property
    def log_fold(self) -> Vector:
        """Log2 fold changes, ``(n_genes,)``."""
        return log_fold_change(self.control_mean, self.change)

    def take(self, genes: NDArray[np.integer]) -> Self:
        """Return the same of some genes."""
        return replace(
            self,
            change=self.change[genes],
            control_mean=self.control_mean[genes],
            z=self.z[genes],
            is_target=self.is_target[genes],
            training_change=self.training_change[genes],
            t=None if self.t is None else self.t[genes],
            others=None if self.others is None else self.others[:, genes],
        )


def adjusted_p(z: Vector, is_tested: NDArray[np.bool_]) -> Vector:
    """Return Benjamini-Hochberg adjusted two-sided p of z, over the tested genes; NaN elsewhere."""
    from scipy.stats import false_discovery_control, norm

    result = np.full(z.size, np.nan)
    if is_tested.any():
        result[is_tested] = false_discovery_control(2 * norm.sf(np.abs(z[is_tested])))
    return result


def top(score: Vector, k: int) -> NDArray[np.int64]:
    """Return the k positions with the largest scores, the largest first; ties in the order of the genes."""
    return np.argsort(-score, kind="stable")[:k]


def log_fold_change(control_mean: Vector, change: Vector) -> Vector:
    """Return log2 of (expm1(mu_c + d) + 0.1) / (expm1(mu_c) + 0.1); a mean below 0 counts as 0."""
    perturbed, control = (np.expm1(np.maximum(mean, 0.0)) for mean in (control_mean + change, control_mean))
    return np.log2(perturbed + LOG_FOLD_OFFSET) - np.log2(control + LOG_FOLD_OFFSET)


def pearson(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Pearson correlation; 0 where the prediction is constant, not measurable where the truth is."""
    return _correlation(truth, predicted, by_rank=False)


def spearman(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Spearman correlation; 0 where the prediction is constant, not measurable where the truth is."""
    return _correlation(truth, predicted, by_rank=True)


def _correlation(truth: ArrayLike, predicted: ArrayLike, *, by_rank: bool) -> float:
    x, y = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if x.size < 3:
        raise NotMeasurableError(f"a correlation needs 3 genes, found {x.size}")
    if _is_constant(x):
        raise NotMeasurableError(f"the truth is constant over {x.size} genes")
    return 0.0 if _is_constant(y) else correlation(x, y, by_rank=by_rank)


def _is_constant(x: Vector) -> bool:
    # differences of sums of the same numbers in another order are no change
    return x.size == 0 or float(np.ptp(x)) <= 1e-9 * max(1.0, float(np.abs(x).max()))


def average_precision(is_true: NDArray[np.bool_], score: Vector) -> float:
    """Area under the precision-recall curve (scikit-learn's average precision): the prevalence where all tie."""
    from sklearn.metrics import average_precision_score

    if not is_true.any() or is_true.all():
        raise NotMeasurableError(f"{int(is_true.sum())} of {is_true.size} genes are significant")
    return float(average_precision_score(is_true, score))


def overlap(truth: Vector, predicted: Vector, k: int) -> float:
    """Share of the k genes with the largest true score among the k with the largest predicted score.

    0 where the prediction is constant: its order is none.
    """
    if k == 0:
        raise NotMeasurableError("no genes to find")
    if _is_constant(predicted):
        return 0.0
    return np.intersect1d(top(truth, k), top(predicted, k)).size / k


def discrimination(
    truth: Vector, others: Vector, predicted: Vector, metric: Literal["l1", "l2", "cosine"] = "l1"
) -> float:
    """1 - rank of the right perturbation among all, by the distance of true changes to the predicted one, over n.

    cell-eval's discrimination score; ties have the mean of their ranks (there: their order). Half of it is chance.

    Parameters
    ----------
    truth
        ``(n_genes,)`` true change of this perturbation; targets left out.
    others
        ``(n_others, n_genes)`` true changes of the others.
    predicted
        ``(n_genes,)``.
    metric
        Distance.
    """
    closer, tied = _closer(truth, others, predicted, metric)
    return 1.0 - (closer + tied / 2) / (len(others) + 1)


def centroid_accuracy(truth: Vector, others: Vector, predicted: Vector) -> float:
    """Share of other perturbations whose centroid is farther (Euclidean) than the right one; ties half.

    Centroids and prediction have the control mean in common, so that changes do as well.
    """
    closer, tied = _closer(truth, others, predicted, "l2")
    return 1.0 - (closer + tied / 2) / len(others)


def _closer(truth: Vector, others: Vector, predicted: Vector, metric: str) -> tuple[int, int]:
    """How many others are closer to the prediction than the truth, and how many exactly as far."""
    if len(others) == 0:
        raise NotMeasurableError("there is no other perturbation in this context")
    every = np.concatenate([truth[None, :], others])
    if metric == "cosine":
        size = np.linalg.norm(every, axis=1) * np.linalg.norm(predicted)
        distance = 1.0 - np.divide(every @ predicted, size, out=np.zeros(len(every)), where=size > 0)
    else:
        distance = np.linalg.norm(every - predicted, ord=1 if metric == "l1" else 2, axis=1)
    gap = distance[1:] - distance[0]
    is_tied = np.abs(gap) <= 1e-12 * max(1.0, float(distance[0]))
    return int((gap[~is_tied] < 0).sum()), int(is_tied.sum())


def weights_of(t: Vector) -> Vector:
    """Return squared min-max-scaled |t|, divided by their sum (Mejia et al. 2025); not measurable where all agree."""
    score = np.abs(t)
    if _is_constant(score):
        raise NotMeasurableError("no gene differs from the other perturbations")
    weight = ((score - score.min()) / np.ptp(score)) ** 2
    return weight / weight.sum()


def weighted_mse(truth: Vector, predicted: Vector, weight: Vector) -> float:
    """Mean squared error of the change under weights that sum to 1."""
    return float(weight @ (truth - predicted) ** 2)


def weighted_r2(truth: Vector, predicted: Vector, weight: Vector) -> float:
    """1 - weighted squared error over weighted variance of the truth: 1 is perfect, 0 its weighted mean."""
    spread = float(weight @ (truth - weight @ truth) ** 2)
    if spread == 0:
        raise NotMeasurableError("the truth is constant under the weights")
    return 1.0 - weighted_mse(truth, predicted, weight) / spread


def direction_match(truth: Vector, predicted: Vector, is_significant: NDArray[np.bool_]) -> float:
    """Share of truly significant genes whose predicted change has the right sign; no change is wrong."""
    if not is_significant.any():
        raise NotMeasurableError("no gene is significant")
    return float((np.sign(truth) == np.sign(predicted))[is_significant].mean())


def welch_t(mean: Vector, variance: Vector, n: int, other_mean: Vector, other_variance: Vector, n_other: int) -> Vector:
    """Return Welch's t of two samples by their moments (variances with n - 1), ``(n_genes,)``; 0 where none varies."""
    error = np.sqrt(variance / n + other_variance / n_other)
    return np.divide(mean - other_mean, error, out=np.zeros_like(error), where=error > 0)


def effect_scores(truth: ConditionTruth, predicted: Vector, predicted_z: Vector | None = None) -> dict[str, Score]:
    """Return every metric of a predicted change.

    - ``pearson_delta``: Pearson of d and d' over all genes.
    - ``demse``: mean over the top 20 DE genes of (d - d')².
    - ``dep``: Pearson of d and d' over them.
    - ``c_dep``: Pearson over them of both minus the mean training change (Systema's PearsonΔ20 with the perturbed
      reference); ``pearson_perturbed`` is the same over all genes. The mean of training perturbations has 0.
    - ``common_de``: the other reading of "C-DEP": share of the k significant genes with the largest |z| that is
      among the k largest |d'|, k = their number, at most 100.
    - ``auprc``: average precision of |d'| (of |z| of predicted cells, where given) against adjusted p < 0.05.
    - ``lfc_spearman``: Spearman of true and predicted log2 fold change over significant genes.
    - ``hit_rate_20``: share of the top 20 DE genes among the 20 largest |d'|.
    - ``centroid_accuracy``, ``pds_*``: :func:`centroid_accuracy`, :func:`discrimination`; target genes left out.
    - ``weighted_mse``, ``weighted_r2``: :func:`weighted_mse` of d, and :func:`weighted_r2` of d and d' minus the mean
      training change; target genes left out (our decision: a target that is knocked down would be all the weight).
    - ``direction_match``: :func:`direction_match` over significant genes.
    - ``mse``: mean over all genes of (d - d')².

    Parameters
    ----------
    truth
        The condition.
    predicted
        ``(n_genes,)`` d'.
    predicted_z
        ``(n_genes,)`` z of the rank-sum test of predicted cells against control cells.

    Returns
    -------
    dict
        By name, in the order of :data:`METRICS`; all but ``e_distance``.
    """
    d, tested = truth.change, ~truth.is_target
    genes, significant = truth.top_genes, truth.is_significant
    n_common = min(int(significant.sum()), N_COMMON)
    evidence = np.abs(predicted if predicted_z is None else predicted_z)
    others = np.zeros((0, d.size)) if truth.others is None else truth.others
    centred, centred_prediction = d - truth.training_change, predicted - truth.training_change

    def hits(k: int) -> float:
        return overlap(np.abs(truth.z)[tested], np.abs(predicted)[tested], k)

    def weighted(function: str) -> float:
        if truth.t is None:
            raise NotMeasurableError("there are no other cells to weigh genes by")
        weight = weights_of(truth.t[tested])
        if function == "mse":
            return weighted_mse(d[tested], predicted[tested], weight)
        return weighted_r2(centred[tested], centred_prediction[tested], weight)

    scores = {
        "pearson_delta": Score.of(pearson, d, predicted),
        "demse": Score.of(lambda: float(((d - predicted)[genes] ** 2).mean())),
        "dep": Score.of(pearson, d[genes], predicted[genes]),
        "c_dep": Score.of(pearson, centred[genes], centred_prediction[genes]),
        "pearson_perturbed": Score.of(pearson, centred, centred_prediction),
        "auprc": Score.of(average_precision, significant[tested], evidence[tested]),
        "lfc_spearman": Score.of(
            _on_significant, truth.log_fold, log_fold_change(truth.control_mean, predicted), significant
        ),
        "hit_rate_20": Score.of(hits, genes.size),
        "common_de": Score.of(hits, n_common),
        "centroid_accuracy": Score.of(centroid_accuracy, d[tested], others[:, tested], predicted[tested]),
        "weighted_mse": Score.of(weighted, "mse"),
        "weighted_r2": Score.of(weighted, "r2"),
        "direction_match": Score.of(direction_match, d, predicted, significant),
        "mse": Score.of(lambda: float(((d - predicted) ** 2).mean())),
    }
    metrics: tuple[Literal["l1", "l2", "cosine"], ...] = ("l1", "l2", "cosine")
    for metric in metrics:
        scores[f"pds_{metric}"] = Score.of(discrimination, d[tested], others[:, tested], predicted[tested], metric)
    return {name: scores[name] for name in METRICS if name in scores}


def _on_significant(truth: Vector, predicted: Vector, is_significant: NDArray[np.bool_]) -> float:
    if not is_significant.any():
        raise NotMeasurableError("no gene is significant")
    return spearman(truth[is_significant], predicted[is_significant])


def calibrated(score: float, baseline: float, ceiling: float, *, is_higher_better: bool = True) -> float:
    """Return (score - baseline) / (ceiling - baseline): 0 as good as the baseline, 1 as the ceiling.

    Negative where the score is worse than the baseline; NaN where the ceiling is not better than the baseline, so that
    there is nothing to gain.
    """
    sign = 1.0 if is_higher_better else -1.0
    gap = sign * (ceiling - baseline)
    return sign * (score - baseline) / gap if gap > 1e-9 else float("nan")
