"""Metrics of perturbation effects: twins in plain NumPy, hand-made cases, and cell-eval where it is installed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from scdiva.metrics import perturbation as m
from scdiva.metrics.generation_space import NotMeasurableError

G = 120


def truth(seed: int = 0, n_others: int = 6) -> m.ConditionTruth:
    rng = np.random.default_rng(seed)
    strong = rng.random(G) < 0.35
    change = np.where(strong, rng.normal(0, 1, G), rng.normal(0, 0.02, G))
    control = rng.uniform(1.5, 3.0, G)
    z = change * 12 + rng.normal(0, 0.5, G)
    is_target = np.zeros(G, dtype=bool)
    is_target[int(np.argmax(np.abs(z)))] = True
    others = np.where(strong, rng.normal(0, 1, (n_others, G)), 0.0)
    return m.ConditionTruth(
        change, control, z, is_target, others.mean(axis=0), t=z + rng.normal(0, 1, G), others=others
    )


def values(scores: dict) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def test_every_metric_has_a_title_and_is_computed_in_order():
    found = m.effect_scores(truth(), truth().change)
    assert list(found) == [name for name in m.METRICS if name != "e_distance"]
    assert set(m.PUBLISHED) <= set(m.METRICS)


def test_the_true_change_is_ideal_in_every_metric():
    t = truth()
    # DE genes are ranked by z, so that z and change must have one order for a full hit rate
    t = replace(t, z=t.change * 12)
    found = values(m.effect_scores(t, t.change))
    n = len(t.others)
    for name, value in found.items():
        assert value == pytest.approx(m.METRICS[name].ideal, abs=1e-9), name
    assert n == 6


def test_no_change_and_constants_have_no_correlation():
    t = truth()
    for constant in (np.zeros(G), np.full(G, 0.3)):
        found = m.effect_scores(t, constant)
        for name in ("pearson_delta", "dep", "hit_rate_20", "common_de"):
            assert found[name].value == 0.0, name
    none = values(m.effect_scores(t, np.zeros(G)))
    assert none["lfc_spearman"] == 0.0
    assert none["direction_match"] == 0.0
    tested = ~t.is_target
    assert none["auprc"] == pytest.approx(t.is_significant[tested].mean())  # the prevalence
    assert none["mse"] == pytest.approx((t.change**2).mean())


def test_the_mean_of_training_perturbations_has_nothing_left_when_centred():
    t = truth()
    found = values(m.effect_scores(t, t.training_change))
    assert found["c_dep"] == 0.0
    assert found["pearson_perturbed"] == 0.0
    assert found["weighted_r2"] <= 0.0
    assert found["pearson_delta"] != 0.0


def test_the_flipped_change_is_wrong_everywhere():
    t = truth()
    right, flipped = values(m.effect_scores(t, t.change)), values(m.effect_scores(t, -t.change))
    for name in ("pearson_delta", "dep"):
        assert flipped[name] == pytest.approx(-1.0)
    assert flipped["lfc_spearman"] < -0.9
    assert flipped["direction_match"] == 0.0
    assert flipped["mse"] == pytest.approx(4 * (t.change**2).mean())
    # what looks at sizes only cannot see the sign
    for name in ("auprc", "hit_rate_20"):
        assert flipped[name] == right[name]


def test_permuted_genes_are_at_chance():
    rng = np.random.default_rng(3)
    t = truth()
    found = [values(m.effect_scores(t, rng.permutation(t.change))) for _ in range(60)]
    mean = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    assert abs(mean["pearson_delta"]) < 0.05
    assert abs(mean["dep"]) < 0.1
    assert mean["hit_rate_20"] == pytest.approx(20 / (G - 1), abs=0.04)
    assert mean["auprc"] == pytest.approx(t.is_significant[~t.is_target].mean(), abs=0.05)


def test_twins_in_plain_numpy():
    t = truth(1)
    rng = np.random.default_rng(4)
    p = t.change + rng.normal(0, 0.5, G)
    found = values(m.effect_scores(t, p))
    tested = np.flatnonzero(~t.is_target)
    genes = sorted(tested, key=lambda g: -abs(t.z[g]))[:20]
    pvalue = 2 * stats.norm.sf(np.abs(t.z[tested]))
    order = np.argsort(pvalue)
    adjusted = np.minimum.accumulate((pvalue[order] * tested.size / np.arange(1, tested.size + 1))[::-1])[::-1]
    significant = tested[order[adjusted < 0.05]]
    assert set(np.flatnonzero(t.is_significant)) == set(significant)
    assert found["pearson_delta"] == pytest.approx(np.corrcoef(t.change, p)[0, 1])
    assert found["demse"] == pytest.approx(np.mean([(t.change[g] - p[g]) ** 2 for g in genes]))
    assert found["dep"] == pytest.approx(np.corrcoef(t.change[genes], p[genes])[0, 1])
    r = t.training_change
    assert found["c_dep"] == pytest.approx(np.corrcoef((t.change - r)[genes], (p - r)[genes])[0, 1])
    mine = sorted(tested, key=lambda g: -abs(p[g]))
    assert found["hit_rate_20"] == len(set(mine[:20]) & set(genes)) / 20
    k = min(len(significant), 100)
    best = sorted(tested, key=lambda g: -abs(t.z[g]))[:k]
    assert found["common_de"] == pytest.approx(len(set(mine[:k]) & set(best)) / k)
    precision = [
        len(set(mine[:i]) & set(significant)) / i for i in range(1, len(mine) + 1) if mine[i - 1] in significant
    ]
    assert found["auprc"] == pytest.approx(np.mean(precision))

    def fold(d, g):
        return math.log2((math.expm1(t.control_mean[g] + d[g]) + 0.1) / (math.expm1(t.control_mean[g]) + 0.1))

    folds = [[fold(d, g) for g in significant] for d in (t.change, p)]
    assert found["lfc_spearman"] == pytest.approx(stats.spearmanr(*folds).statistic)
    assert found["direction_match"] == pytest.approx(np.mean([(t.change[g] > 0) == (p[g] > 0) for g in significant]))
    evidence = np.abs(t.t[tested])
    weight = (evidence - evidence.min()) ** 2
    weight = weight / weight.sum()
    error = (weight * (t.change - p)[tested] ** 2).sum()
    assert found["weighted_mse"] == pytest.approx(error)
    centred = (t.change - r)[tested]
    spread = (weight * (centred - (weight * centred).sum()) ** 2).sum()
    assert found["weighted_r2"] == pytest.approx(1 - error / spread)
    every = np.stack([t.change, *t.others])[:, tested]
    for name, distance in (
        ("pds_l1", [np.abs(e - p[tested]).sum() for e in every]),
        ("pds_l2", [((e - p[tested]) ** 2).sum() for e in every]),
        ("pds_cosine", [1 - e @ p[tested] / np.linalg.norm(e) / np.linalg.norm(p[tested]) for e in every]),
    ):
        assert found[name] == pytest.approx(1 - sum(d < distance[0] for d in distance) / len(every))
    farther = [((e - p[tested]) ** 2).sum() > ((every[0] - p[tested]) ** 2).sum() for e in every[1:]]
    assert found["centroid_accuracy"] == pytest.approx(np.mean(farther))


def test_discrimination_of_the_right_a_wrong_and_no_perturbation():
    t = truth(2)
    assert m.discrimination(t.change, t.others, t.change) == 1.0
    assert m.discrimination(t.change, t.others, t.others[0]) < 1.0
    assert m.centroid_accuracy(t.change, t.others, t.change) == 1.0
    # a prediction without direction ties with all: mean rank
    assert m.discrimination(t.change, t.others, np.zeros(G), "cosine") == pytest.approx(1 - 3 / 7)


def test_target_genes_do_not_count_where_they_would_give_the_answer_away():
    t = truth(5)
    target = int(np.flatnonzero(t.is_target)[0])
    p = np.zeros(G)
    p[target] = t.change[target]
    moved = t.change + 0.0
    others = t.others.copy()
    others[:, target] += 100.0
    with_far_targets = values(m.effect_scores(replace(t, others=others, change=moved), p))
    without = values(m.effect_scores(t, p))
    assert with_far_targets["pds_l1"] == without["pds_l1"]
    assert without["hit_rate_20"] == 0.0
    assert target not in t.top_genes
    assert not t.is_significant[target]
    assert np.isnan(t.adjusted_p[target])


def test_predicted_cells_give_the_evidence_of_auprc_where_there_are_any():
    t = truth(6)
    noise = np.random.default_rng(0).normal(size=G)
    assert m.effect_scores(t, noise, t.z)["auprc"].value == pytest.approx(1.0)
    assert m.effect_scores(t, noise)["auprc"].value < 0.7


def test_what_the_truth_leaves_open_is_nan_with_a_reason():
    t = truth()
    silent = replace(t, z=np.zeros(G), others=np.zeros((0, G)), t=None)
    found = m.effect_scores(silent, t.change)
    for name in (
        "auprc",
        "lfc_spearman",
        "common_de",
        "direction_match",
        "pds_l1",
        "centroid_accuracy",
        "weighted_mse",
    ):
        assert np.isnan(found[name].value), name
        assert found[name].reason
    with pytest.raises(NotMeasurableError, match="constant"):
        m.pearson(np.ones(5), np.arange(5.0))


def test_calibrated_scores_know_the_direction():
    assert m.calibrated(0.5, 0.3, 0.7) == pytest.approx(0.5)
    assert m.calibrated(0.5, 0.7, 0.3, is_higher_better=False) == pytest.approx(0.5)
    assert m.calibrated(0.9, 0.7, 0.3, is_higher_better=False) == pytest.approx(-0.5)
    assert np.isnan(m.calibrated(0.5, 0.7, 0.3))


# ---- cell-eval ----


def _frames(t: m.ConditionTruth, p: np.ndarray):
    """DE tables of one perturbation, truth and prediction, without target genes, as cell-eval takes them."""
    import polars as pl
    from cell_eval._types import initialize_de_comparison

    tested = np.flatnonzero(~t.is_target)
    columns = {"target": ["X"] * tested.size, "feature": [f"g{g:03d}" for g in tested]}
    evidence = stats.norm.sf(np.abs(p[tested]) * 5) * 2
    real, predicted = (
        pl.DataFrame({**columns, "log2_fold_change": fold[tested], "p_value": fdr, "fdr": fdr})
        for fold, fdr in (
            (t.log_fold, t.adjusted_p[tested]),
            (m.log_fold_change(t.control_mean, p), evidence),
        )
    )
    return initialize_de_comparison(real=real, pred=predicted), tested, evidence


def test_de_metrics_are_those_of_cell_eval():
    pytest.importorskip("cell_eval")
    from cell_eval.metrics import _de

    t = truth(7)
    p = t.change + np.random.default_rng(1).normal(0, 0.4, G)
    comparison, tested, evidence = _frames(t, p)
    found = values(m.effect_scores(t, p))
    assert _de.DESpearmanLFC()(comparison)["X"] == pytest.approx(found["lfc_spearman"], abs=1e-6)
    assert _de.DEDirectionMatch()(comparison)["X"] == pytest.approx(found["direction_match"])
    # evidence of |d'| has the order of |d'|: the same curve
    assert _de.compute_pr_auc(comparison)["X"] == pytest.approx(
        m.average_precision(t.is_significant[tested], -np.log10(np.clip(evidence, 1e-10, 1))), abs=1e-6
    )
    n_significant = int(t.is_significant.sum())
    fold, fold_of_p = np.abs(t.log_fold), np.abs(m.log_fold_change(t.control_mean, p))
    # cell-eval ranks within significant genes of either side
    is_called = np.zeros(G, dtype=bool)
    is_called[tested] = evidence < 0.05
    for k in (5, 10, n_significant):
        ours = m.overlap(np.where(t.is_significant, fold, 0.0), np.where(is_called, fold_of_p, 0.0), k)
        theirs = _de.de_overlap_metric(comparison, k=k, metric="overlap")["X"]
        if is_called.sum() >= k:
            assert ours == pytest.approx(theirs)


def test_metrics_of_means_are_those_of_cell_eval():
    pytest.importorskip("cell_eval")
    import anndata as ad
    import pandas as pd
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval.metrics import _anndata

    rng = np.random.default_rng(0)
    names = np.array(["ctrl", *[f"g{i}" for i in range(8)]])
    labels = np.repeat(names, 12)
    var = pd.DataFrame(index=[f"g{i}" for i in range(G)])

    def cells(shift):
        x = np.abs(rng.normal(1.5, 0.4, (labels.size, G)) + shift[np.searchsorted(names, labels)])
        return ad.AnnData(x, obs=pd.DataFrame({"p": labels}, index=[str(i) for i in range(labels.size)]), var=var)

    shift = np.concatenate([np.zeros((1, G)), rng.normal(0, 0.3, (8, G))])
    real, predicted = cells(shift), cells(shift + rng.normal(0, 0.4, shift.shape) * (np.arange(9) > 0)[:, None])
    pair = PerturbationAnndataPair(real=real, pred=predicted, pert_col="p", control_pert="ctrl")
    mean = {
        which: {name: a.X[labels == name].mean(axis=0) for name in names}
        for which, a in (("real", real), ("pred", predicted))
    }
    pearson, mse = _anndata.pearson_delta(pair), _anndata.mse(pair)
    scores = {metric: _anndata.discrimination_score(pair, metric) for metric in ("l1", "l2", "cosine")}
    for i, name in enumerate(names[1:]):
        real_change = {n: mean["real"][n] - mean["real"]["ctrl"] for n in names[1:]}
        change = mean["pred"][name] - mean["pred"]["ctrl"]
        assert m.pearson(real_change[name], change) == pytest.approx(pearson[name])
        # of predicted means; ours is of changes, which is the same where the control mean is shared
        assert ((mean["pred"][name] - mean["real"][name]) ** 2).mean() == pytest.approx(mse[name])
        kept = np.arange(G) != i
        others = np.array([real_change[n][kept] for n in names[1:] if n != name])
        for metric, found in scores.items():
            ours = m.discrimination(real_change[name][kept], others, change[kept], metric)
            assert ours == pytest.approx(found[name]), metric
