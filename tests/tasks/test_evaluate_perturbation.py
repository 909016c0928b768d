"""Judging predicted effects: bounds, rows that are used again, intervals, and cell-eval's format."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp

from perturbed import N_GENES, perturbed_cells, vocabulary
from scdiva.baselines.perturbation import make
from scdiva.data.perturbation_effects import effects_of
from scdiva.errors import ConfigError, ScdivaError
from scdiva.metrics.perturbation import METRICS
from scdiva.tasks import cell_eval
from scdiva.tasks import evaluate_perturbation as task
from scdiva.tasks.perturbation_report import CEILING, FULL_DEPTH, PerturbationEvaluation, Row, bootstrap_of_mean

TARGETS = ((0,), (1,), (2,), (3,), (0, 1), (2, 3))


@pytest.fixture(scope="module")
def cells():
    return perturbed_cells(TARGETS, n_cells=60)


class Oracle:
    """Knows the truth: the changes of all cells."""

    def __init__(self, cells):
        self.change = {(e.perturbation, e.context): e.change for e in effects_of(cells)}

    def fit(self, train):
        self.seen = train
        return self

    def predict(self, perturbation, context, control):
        return self.change[perturbation, context]


def test_a_perfect_predictor_is_near_the_ceiling_and_the_null_near_nothing(cells):
    splits = task.splits_of(cells, "unseen_single", seeds=(0,), n_folds=2)
    report = task.evaluate_perturbation(
        cells,
        splits,
        predictors={"oracle": task.Method(lambda seed: Oracle(cells), "oracle")},
        vocabulary=vocabulary(),
    )
    (kind,) = report.kinds
    assert kind == "unseen single"
    assert len(report.conditions(kind)) == 4
    for metric in ("pearson_delta", "dep", "auprc", "lfc_spearman"):
        assert report.mean(kind, "oracle", metric) > report.mean(kind, CEILING, metric) - 0.05, metric
        assert report.mean(kind, CEILING, metric) > report.mean(kind, "mean", metric), metric
        assert report.mean(kind, FULL_DEPTH, metric) >= report.mean(kind, CEILING, metric)
    assert report.mean(kind, "no_change", "pearson_delta") == 0.0
    assert abs(report.mean(kind, "shuffled", "pearson_delta")) < 0.4
    assert report.calibrated(kind, "mean", "pearson_delta") == 0.0
    assert report.calibrated(kind, "oracle", "pearson_delta") == pytest.approx(1.0, abs=0.1)
    assert report.mean(kind, "oracle", "e_distance") < 0.3 * report.mean(kind, "no_change", "e_distance")
    gap = report.difference(kind, "oracle", "pearson_delta")
    assert gap is not None
    assert gap.low <= gap.value <= gap.high
    assert gap.low > 0
    assert gap.baseline not in ("shuffled", "random_condition", "oracle", CEILING)
    assert gap.n_conditions == 4


def test_combinations_have_a_table_for_each_number_of_seen_genes():
    cells = perturbed_cells([*((g,) for g in range(6)), *combinations(range(6), 2)], n_cells=30)
    splits = task.splits_of(cells, "combination", seeds=(0,))
    report = task.evaluate_perturbation(cells, splits, methods=["additive"], vocabulary=vocabulary())
    assert "seen 2 of 2" in report.kinds
    assert report.methods("seen 2 of 2") == ("mean", "additive", "shuffled", CEILING)
    kind = "seen 2 of 2"
    assert report.mean(kind, "additive", "pearson_delta") > report.mean(kind, "mean", "pearson_delta")


def test_contexts_are_held_out_one_by_one():
    cells = perturbed_cells(((0,), (1,)), contexts=("a", "b", "c"), n_cells=40)
    splits = task.splits_of(cells, "unseen_context", seeds=(0, 1))
    assert [split.name for split in splits] == 2 * ["without a", "without b", "without c"]
    report = task.evaluate_perturbation(cells, splits, methods=["additive", "ridge"], vocabulary=vocabulary())
    (kind,) = report.kinds
    assert len(report.conditions(kind)) == 6
    assert report.mean(kind, "additive", "pearson_delta") > 0.7
    assert report.mean(kind, "additive", "centroid_accuracy") == 1.0


def test_rows_are_used_again_only_if_nothing_changed(cells, tmp_path):
    splits = task.splits_of(cells, "seen", seeds=(0,))
    path = tmp_path / "rows.jsonl"
    made = []

    def factory(seed):
        made.append(seed)
        return Oracle(cells)

    def run(data, fingerprint=""):
        method = task.Method(factory, "oracle", fingerprint)
        return task.evaluate_perturbation(
            data, splits, predictors={"oracle": method}, methods=["oracle"], vocabulary=vocabulary(), rows_path=path
        )

    first = run(cells)
    n = len(path.read_text().splitlines())
    assert n == len(first.rows)
    again = run(cells)
    assert len(path.read_text().splitlines()) == n
    assert made == [0]
    assert again.to_markdown() == first.to_markdown()
    run(cells, "other weights")
    assert made == [0, 0]
    more = cells.cells.counts.copy()
    more.data[0] += 1
    run(replace(cells, cells=replace(cells.cells, counts=more)), "other weights")
    assert made == [0, 0, 0]


def test_the_report_is_whole(cells, tmp_path):
    splits = task.splits_of(cells, "seen", seeds=(0, 1))
    report = task.evaluate_perturbation(cells, splits, vocabulary=vocabulary())
    markdown, content = report.write(tmp_path)
    text = markdown.read_text()
    for metric in METRICS.values():
        assert metric.title in text
    for method in report.methods("seen"):
        assert report.titles[method] in text
    found = json.loads(content.read_text())
    assert {row["metric"] for row in found["summary"]} == set(METRICS)
    rows = tuple(Row.from_dict(row) for row in found["rows"])
    assert PerturbationEvaluation(rows, report.titles, (), report.notes).to_markdown() == text


def test_predicted_cells_are_judged_as_cells(cells):
    class WithCells(Oracle):
        def predict_cells(self, perturbation, context, control):
            code = cells.perturbations.index(perturbation)
            return cells.cells.take(np.flatnonzero(cells.perturbation_code == code)[:30])

    splits = task.splits_of(cells, "seen", seeds=(0,))
    methods = {
        "cells": task.Method(lambda seed: WithCells(cells), "cells"),
        "mean only": task.Method(lambda seed: Oracle(cells), "mean only"),
    }
    report = task.evaluate_perturbation(
        cells, splits, predictors=methods, methods=list(methods), vocabulary=vocabulary()
    )
    # shifted control cells have the mean, but not the spread
    assert report.mean("seen", "cells", "e_distance") < report.mean("seen", "mean only", "e_distance")
    assert report.mean("seen", "cells", "pearson_delta") == report.mean("seen", "mean only", "pearson_delta")
    assert report.mean("seen", "cells", "auprc") != report.mean("seen", "mean only", "auprc")


def test_few_cells_are_named_and_not_judged(cells):
    (split,) = task.splits_of(cells, "seen", seeds=(0,), min_cells=20)
    rare = cells.perturbations[1].name
    kept = np.flatnonzero(cells.perturbation_code == 1)[:25]
    train = np.union1d(split.train, kept[5:])
    few = replace(split, train=np.setdiff1d(np.union1d(train, np.flatnonzero(cells.perturbation_code == 1)), kept[:5]))
    report = task.evaluate_perturbation(cells, [few], methods=["mean"], vocabulary=vocabulary())
    assert rare not in report.conditions("seen")
    assert any(rare in note for note in report.notes)


def test_refusals(cells):
    (split,) = task.splits_of(cells, "seen", seeds=(0,))
    with pytest.raises(ConfigError, match="no splits"):
        task.evaluate_perturbation(cells, [])
    with pytest.raises(ConfigError, match="nonsense"):
        task.evaluate_perturbation(cells, [split], methods=["nonsense"])
    with pytest.raises(ConfigError, match="both seen and held out"):
        task.evaluate_perturbation(cells, [replace(split, reference=split.source)])
    with pytest.raises(ConfigError, match="perturbed cells among"):
        task.evaluate_perturbation(cells, [replace(split, source=np.arange(cells.n_cells))])

    class Broken(Oracle):
        def predict(self, perturbation, context, control):
            return np.full(N_GENES, np.nan)

    broken = {"broken": task.Method(lambda seed: Broken(cells), "broken")}
    with pytest.raises(ScdivaError, match="not all finite"):
        task.evaluate_perturbation(cells, [split], predictors=broken, methods=["broken"])


def test_intervals_of_a_mean_are_those_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.3, 1.0, 400)
    low, high = bootstrap_of_mean(values, np.random.default_rng(1))
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_gene_features_follow_the_vocabulary_of_the_cells(tiny_model):
    genes = vocabulary(40)
    found = task.gene_features(tiny_model, genes)
    own = tiny_model.module.anchor.gene_embedding.detach().numpy()
    # the tiny model starts at the tenth gene
    assert np.isnan(found[:10]).all()
    np.testing.assert_allclose(found[10:], own[:30])
    predictor = make("knn_corpus", vocabulary=genes, corpus=found)
    assert predictor.embedding is found


# ---- cell-eval ----


def test_shifted_cells_have_the_predicted_mean():
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.exponential(1.0, (50, 30)) * (rng.random((50, 30)) < 0.6))
    change = rng.normal(0, 0.8, 30)
    found = cell_eval.shifted_cells(x, change)
    assert (found >= 0).all()
    wanted = np.maximum(x.toarray().mean(axis=0) + change, 0)
    np.testing.assert_allclose(found.mean(axis=0), wanted, rtol=1e-5, atol=1e-6)


def test_exported_cells_are_as_cell_eval_takes_them(cells):
    (split,) = task.splits_of(cells, "seen", seeds=(0,))
    predicted = {p: np.full(N_GENES, 0.1) for p, _ in split.conditions}
    real, made = cell_eval.to_cell_eval(
        cells,
        predicted,
        context=0,
        reference=split.reference,
        held_out=np.setdiff1d(np.arange(cells.n_cells), split.train),
        gene_names=vocabulary().symbol.tolist(),
    )
    names = {cells.perturbations[p].name for p in predicted} | {cell_eval.CONTROL_NAME}
    for adata in (real, made):
        assert set(adata.obs[cell_eval.PERTURBATION_COLUMN]) == names
        assert adata.X.min() >= 0
        assert adata.X.max() < 15
        assert (adata.X.data % 1 > 1e-3).any()  # log-normalised, not counts
    assert list(real.var_names) == list(made.var_names)
    is_control = (real.obs[cell_eval.PERTURBATION_COLUMN] == cell_eval.CONTROL_NAME).to_numpy()
    n = int(is_control.sum())
    np.testing.assert_array_equal(real.X[:n].toarray(), made.X[:n].toarray())


def test_cell_eval_agrees_on_what_both_measure(tmp_path):
    pytest.importorskip("cell_eval")
    # one batch, so that both compare with the same control mean
    cells = perturbed_cells(((0,), (1,), (2,), (3,)), n_cells=50, n_batches=1)
    splits = task.splits_of(cells, "unseen_single", seeds=(0,), n_folds=2)
    methods = ["mean", "knn"]
    ours = task.evaluate_perturbation(cells, splits, methods=methods, vocabulary=vocabulary())
    theirs = cell_eval.evaluate_with_cell_eval(cells, splits, methods, tmp_path / "ce", vocabulary=vocabulary())
    (kind,) = ours.kinds
    for method in methods:
        assert theirs[method]["pearson_delta"] == pytest.approx(ours.mean(kind, method, "pearson_delta"), abs=0.02)
        assert theirs[method]["mse"] == pytest.approx(ours.mean(kind, method, "mse"), rel=0.05)
    text = ours.with_cell_eval(theirs).to_markdown()
    assert "discrimination_score_l1" in text


def test_without_cell_eval_the_way_out_is_named(monkeypatch, cells, tmp_path):
    from scdiva.baselines import common
    from scdiva.errors import UnsupportedError

    monkeypatch.setattr(common, "find_spec", lambda module: None)
    with pytest.raises(UnsupportedError, match="cell-eval"):
        cell_eval.evaluate_with_cell_eval(cells, [], ["mean"], tmp_path / "x", vocabulary=vocabulary())
