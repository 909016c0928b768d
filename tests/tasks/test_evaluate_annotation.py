from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, ScdivaError, SourceError
from scdiva.metrics.annotation import annotation_scores
from scdiva.tasks import evaluate_annotation as task

METHODS = ("probe", "reference", "logistic_pca", "majority", "shuffled")


@pytest.fixture(scope="module")
def synthetic(_cells):
    return _cells


@pytest.fixture(scope="module")
def cells(_cells, tiny_model) -> task.LabelledCounts:
    return task.LabelledCounts.open(_cells, tiny_model, "cell_type")


@pytest.fixture(scope="module")
def report(cells, tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tasks = [partial(task.within, cells), partial(task.within, cells, n_per_type=3)]
    return task.evaluate_annotation(tasks, tiny_model, methods=METHODS, seeds=(0, 1), rows_path=path), path, tasks


class TestSplits:
    def test_a_share_of_each_type_is_held_out(self, cells):
        split = task.within(cells, 0, test_fraction=0.25)
        names = [set(part.cells.cell_index.tolist()) for part in (split.train, split.test)]
        assert not names[0] & names[1]
        assert len(names[0] | names[1]) == 120
        for label in np.unique(cells.label):
            n = (cells.label == label).sum()
            assert (split.test.label == label).sum() == round(0.25 * n)
        other = task.within(cells, 1, test_fraction=0.25)
        assert set(other.test.cells.cell_index.tolist()) != names[1]

    def test_few_labels_hold_out_the_same_cells(self, cells):
        whole, few = task.within(cells, 0), task.within(cells, 0, n_per_type=3)
        np.testing.assert_array_equal(whole.test.cells.cell_index, few.test.cells.cell_index)
        assert np.unique(few.train.label, return_counts=True)[1].tolist() == [3, 3, 3]
        assert set(few.train.cells.cell_index.tolist()) < set(whole.train.cells.cell_index.tolist())

    def test_rare_types_are_left_out(self, cells):
        label = cells.label.copy()
        label[:4] = "rare"
        split = task.within(task.LabelledCounts("x", cells.cells, label), 0)
        assert "rare" not in {*split.train.label, *split.test.label}

    def test_across_two_sets_over_labels_and_genes_in_common(self, synthetic, tiny_model):
        names = sorted(set(synthetic.obs["cell_type"]))
        one = task.LabelledCounts.open(synthetic[:60, :150].copy(), tiny_model, "cell_type")
        two = task.LabelledCounts.open(
            synthetic[60:, 20:].copy(), tiny_model, "cell_type", {names[0]: names[0], names[1]: names[1]}
        )
        split = task.across(one, two, 0)
        assert set(split.train.label) == set(split.test.label) == set(names[:2])
        measured = [part.cells.is_measured.all(axis=0) for part in (split.train, split.test)]
        np.testing.assert_array_equal(*measured)
        assert measured[0].sum() <= 130
        assert (split.train.cells.counts[:, ~measured[0]].sum()) == 0

    def test_what_cannot_be(self, synthetic, tiny_model, cells):
        with pytest.raises(KeyNotFoundError, match="'Z'"):
            task.LabelledCounts.open(synthetic, tiny_model, "cell_type", {"Z": "z"})
        with pytest.raises(SourceError, match="no cell"):
            task.LabelledCounts.of(synthetic, tiny_model, np.full(120, ""))
        renamed = task.LabelledCounts("y", cells.cells, np.char.add(cells.label, " of y"))
        with pytest.raises(SourceError, match="0 labels in common"):
            task.across(cells, renamed, 0)


class TestReport:
    def test_it_scores_what_was_predicted(self, report):
        for run in report[0].runs:
            labels = np.array(run.labels)
            scored = annotation_scores(labels[run.truth], labels[run.predicted])
            assert run.scores["accuracy"] == pytest.approx(scored.accuracy)
            assert run.scores["macro_f1"] == pytest.approx(scored.macro_f1)
        assert len(report[0].runs) == 2 * 2 * len(METHODS)

    def test_controls_and_methods_are_in_order(self, report):
        found, (first, few) = report[0], report[0].tasks
        mean = {name: np.mean(found.values(first, name, "accuracy")) for name in METHODS}
        assert mean["probe"] > 0.9
        assert mean["shuffled"] < 0.6
        assert few.endswith(", 3 per type")
        assert found.best_baseline(first) == "logistic_pca"

    def test_differences_are_of_the_same_cells(self, report):
        found = report[0]
        first = found.tasks[0]
        gap = found.difference(first, "probe")
        means = [np.mean(found.values(first, name, "macro_f1")) for name in ("probe", "logistic_pca")]
        assert gap.value == pytest.approx(means[0] - means[1])
        assert gap.low <= gap.value <= gap.high
        assert found.difference(first, "logistic_pca") is None

    def test_files(self, report, tmp_path):
        text = report[0].to_markdown()
        assert "scDiVa probe" in text
        assert "15-nn" not in text
        md, js = report[0].write(tmp_path)
        assert md.read_text() == text
        content = json.loads(js.read_text())
        assert {row["method"] for row in content["summary"]} == set(METHODS)

    def test_what_is_there_is_not_run_again(self, report, tiny_model, monkeypatch):
        found, path, tasks = report
        monkeypatch.setattr(task, "_run", lambda *a: pytest.fail("ran again"))
        with path.open("a") as file:
            file.write('{"task": "cut o')
        again = task.evaluate_annotation(tasks, tiny_model, methods=METHODS, seeds=(0, 1), rows_path=path)
        assert again.to_dict() == found.to_dict()

    def test_controls_out_of_order_stop_it(self, report):
        from dataclasses import replace

        found = report[0]
        wrong = tuple(
            replace(run, scores={**run.scores, "accuracy": 1.0}) if run.method == "shuffled" else run
            for run in found.runs
        )
        with pytest.raises(ScdivaError, match="out of order"):
            task.check_controls(task.AnnotationReport(wrong))

    def test_unknown_methods(self, cells, tiny_model):
        with pytest.raises(ConfigError, match="'magic'"):
            task.evaluate_annotation([partial(task.within, cells)], tiny_model, methods=["magic"])


def test_labels_of_held_out_cells_are_not_seen(cells, tiny_model):
    split = task.within(cells, 0)
    hidden = task.Task(split.name, split.train, task.LabelledCounts("x", split.test.cells, split.test.label[::-1]))
    for method in METHODS:
        found = [
            task.evaluate_annotation([lambda seed, s=s: s], tiny_model, methods=[method], seeds=(0,)).runs[0].predicted
            for s in (split, hidden)
        ]
        np.testing.assert_array_equal(*found)


def test_the_command(bundle, cli, tmp_path):
    synthetic_cells(150, 200, n_types=3, mean_depth=400.0, seed=1).write_h5ad(tmp_path / "one.h5ad")
    methods = [flag for name in ("probe", "logistic_pca", "shuffled") for flag in ("--methods", name)]
    done = cli("evaluate", "annotation", tmp_path / "one.h5ad", "--out", tmp_path / "out", "--model", bundle, *methods,
               "--seeds", 1, "--per-type", 4)  # fmt: skip
    assert done.code == 0, done.err
    assert "one, 4 per type, probe, seed 0" in done.out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report.json", "report.md", "rows.jsonl"]
    (tmp_path / "map.tsv").write_text("no tab here\n")
    bad = cli("evaluate", "annotation", tmp_path / "one.h5ad", "--out", tmp_path / "x", "--map", tmp_path / "map.tsv",
              "--model", bundle)  # fmt: skip
    assert bad.code == 2
    assert "line 1" in bad.err
