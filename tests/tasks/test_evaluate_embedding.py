from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from scdiva.baselines.embedding import random_projection
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, ScdivaError, SourceError, UnsupportedError
from scdiva.metrics import integration
from scdiva.metrics.embedding import knn_scores
from scdiva.tasks import evaluate_embedding as task
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.integration_figure import draw_embedding


@pytest.fixture(scope="module")
def synthetic():
    adata = synthetic_cells(240, 200, n_types=3, mean_depth=400.0, seed=2)
    label = adata.obs["cell_type"].astype(str).to_numpy()
    label[:6], label[6:10] = "unassigned", "rare"
    adata.obs["cell_type"] = label
    return adata


@pytest.fixture(scope="module")
def cells(synthetic, tiny_model):
    return task.LabelledCells.open(synthetic, tiny_model, "cell_type", "batch")


@pytest.fixture(scope="module")
def report(cells, tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return task.evaluate_embedding(cells, tiny_model, seeds=(0, 1), rows_path=path), path


def test_cells_without_a_usable_label_are_embedded_and_not_scored(cells, synthetic, tiny_model):
    assert cells.cells.n_cells == 240
    np.testing.assert_array_equal(np.flatnonzero(~cells.is_scored), np.arange(10))
    synthetic = synthetic.copy()
    synthetic.obs["one"] = "a"
    with pytest.raises(SourceError, match="1 types of the AnnData have 10 cells"):
        task.LabelledCells.open(synthetic, tiny_model, "one")


class TestReport:
    def test_it_scores_what_was_embedded(self, report, cells, tiny_model):
        rows = np.flatnonzero(cells.is_scored)
        labels, batches = cells.label[rows], cells.batch[rows]
        embeddings = {
            "scdiva": embed_cells(tiny_model, cells.cells),
            "random_projection": random_projection(cells.cells, seed=1),
        }
        for method, z in embeddings.items():
            (run,) = (r for r in report[0].runs if (r.method, r.seed) == (method, 1))
            expected = knn_scores(z[rows], labels, seed=1)
            np.testing.assert_array_equal(run.is_correct["knn_accuracy"], expected.is_correct)
            assert run.scores["knn_macro_f1"] == pytest.approx(expected.macro_f1)
            assert run.scores["probe_accuracy"] == pytest.approx(run.is_correct["probe_accuracy"].mean())
            assert run.scores["asw_batch"] == pytest.approx(integration.asw_batch(z[rows], labels, batches))
            assert run.scores["asw_label"] == pytest.approx(integration.asw_label(z[rows], labels))
            assert set(run.scores) == set(task.SCORES)

    def test_nulls_and_ceiling(self, report):
        mean = {name: np.mean(report[0].values(name, "probe_accuracy")) for name in report[0].methods}
        assert mean["shuffled"] < 0.5 < mean["scdiva"]
        assert mean["random_projection"] <= mean["pca"]
        assert mean["ceiling"] > 0.9
        assert report[0].values("ceiling", "knn_accuracy") == []

    def test_differences_are_of_the_same_cells(self, report):
        found = report[0]
        gap = found.difference("knn_accuracy")
        means = [np.mean(found.values(name, "knn_accuracy")) for name in ("scdiva", "pca")]
        assert gap.value == pytest.approx(means[0] - means[1])
        assert gap.low <= gap.value <= gap.high
        assert found.difference("knn_accuracy", "scvi") is None

    def test_files_and_picture(self, report, tmp_path):
        md, js = report[0].write(tmp_path)
        text = md.read_text()
        for words in (
            "6 cells without a label, 4 of types with fewer than 10",
            "iLISI",
            "ceiling",
            "Every type occurs",
        ):
            assert words in text
        content = json.loads(js.read_text())
        assert {row["method"] for row in content["summary"]} == set(task.DEFAULT_METHODS)
        gap = report[0].difference("probe_accuracy")
        assert content["differences"]["scdiva - pca"]["probe_accuracy"] == [gap.value, gap.low, gap.high]
        draw_embedding(report[0], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_there_is_not_run_again(self, report, cells, tiny_model, monkeypatch):
        monkeypatch.setattr(task, "_run", lambda *a: pytest.fail("ran again"))
        again = task.evaluate_embedding(cells, tiny_model, seeds=(0, 1), rows_path=report[1])
        assert again.to_dict() == report[0].to_dict()

    def test_controls_out_of_order_stop_it(self, report):
        task.check_controls(report[0])
        for method in ("shuffled", "random_projection"):
            wrong = tuple(
                replace(run, scores={**run.scores, "knn_accuracy": 1.1}) if run.method == method else run
                for run in report[0].runs
            )
            with pytest.raises(ScdivaError, match="out of order"):
                task.check_controls(replace(report[0], runs=wrong))


def test_without_batches_nothing_is_said_of_them(synthetic, tiny_model):
    cells = task.LabelledCells.open(synthetic, tiny_model, "cell_type")
    found = task.evaluate_embedding(cells, tiny_model, methods=["scdiva"], seeds=(0,))
    assert found.confounding == ""
    assert "ilisi" not in found.scores
    assert "asw_label" in found.scores


def test_the_scale_of_an_embedding_does_not_matter_to_the_probe():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 40)
    z = rng.normal(size=(120, 6)) + 1.2 * (labels[:, None] == np.unique(labels)).repeat(2, axis=1)
    found = [task.linear_probe(z * scale, labels, seed=0) for scale in (1.0, 1e-3, 300.0)]
    assert 0.6 < found[0].accuracy < 0.98
    for other in found[1:]:
        assert (other.is_correct == found[0].is_correct).mean() > 0.97


def test_what_cannot_be_asked_for(cells, tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="'magic'"):
        task.evaluate_embedding(cells, tiny_model, methods=["magic"])
    with pytest.raises(ConfigError, match="no seeds"):
        task.evaluate_embedding(cells, tiny_model, seeds=())
    monkeypatch.setattr("scdiva.baselines.common.find_spec", lambda module: None)
    with pytest.raises(UnsupportedError, match="scvi-tools"):
        task.evaluate_embedding(cells, tiny_model, methods=["scvi"])
