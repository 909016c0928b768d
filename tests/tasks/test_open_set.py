from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from scdiva.errors import ScdivaError, SourceError
from scdiva.tasks import annotation_splits as splits
from scdiva.tasks import open_set


@pytest.fixture(scope="module")
def cells(_cells, tiny_model) -> splits.LabelledCounts:
    return splits.LabelledCounts.open(_cells, tiny_model, "cell_type")


@pytest.fixture(scope="module")
def report(cells, tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return open_set.run_open_set([partial(splits.within, cells)], tiny_model, seeds=(0, 1), rows_path=path), path


class TestSplits:
    def test_all_cells_of_the_type_are_held_out_within_a_set(self, cells):
        task = splits.within(cells, 0)
        name = str(cells.label[0])
        split = open_set.leave_type_out(task, name)
        assert name not in split.train.label
        held = split.test.cells.cell_index[split.test.label == name]
        assert sorted(held.tolist()) == np.flatnonzero(cells.label == name).tolist()
        known = split.test.label != name
        assert split.test.cells.cell_index[known].tolist() == [
            i for i, label in zip(task.test.cells.cell_index.tolist(), task.test.label, strict=True) if label != name
        ]
        row = int(np.flatnonzero(split.test.label == name)[-1])
        expected = cells.cells.counts[split.test.cells.cell_index[row]].toarray()
        np.testing.assert_array_equal(split.test.cells.counts[row].toarray(), expected)

    def test_across_sets_training_cells_are_not_moved(self, cells):
        task = replace(splits.within(cells, 0), kind=splits.ACROSS)
        split = open_set.leave_type_out(task, str(cells.label[0]))
        assert split.test is task.test

    def test_joined_cells_keep_the_genes_of_their_source(self, cells):
        some = np.ones(cells.cells.n_genes, dtype=bool)
        some[:50] = False
        both = splits.joined(cells.take(np.arange(3)), cells.with_genes(some).take(np.arange(3, 5)))
        is_measured = both.cells.is_measured[both.cells.source_of_cell]
        np.testing.assert_array_equal(is_measured[:3], np.repeat(cells.cells.is_measured, 3, axis=0))
        np.testing.assert_array_equal(is_measured[3:], np.repeat(cells.cells.is_measured & some, 2, axis=0))
        assert both.label.tolist() == cells.label[:5].tolist()

    def test_rare_types_are_not_left_out(self, cells):
        task = splits.within(cells, 0)
        assert open_set.types_to_leave_out(task) == ("type 0", "type 1", "type 2")
        sizes = {name: (task.test.label == name).sum() for name in ("type 0", "type 1", "type 2")}
        assert sizes["type 2"] >= 10 > max(sizes["type 0"], sizes["type 1"])
        assert open_set.types_to_leave_out(replace(task, kind=splits.ACROSS)) == ("type 2",)
        with pytest.raises(SourceError, match="0 of them with 11"):
            open_set.types_to_leave_out(replace(task, kind=splits.ACROSS), min_cells=11)
        rows = np.flatnonzero(cells.label != cells.label[0])
        with pytest.raises(SourceError, match="2 types"):
            open_set.types_to_leave_out(splits.within(cells.take(rows), 0))


class TestReport:
    def test_every_method_type_and_seed_once(self, report, cells):
        found = report[0]
        asked = {(run.left_out, run.method, run.seed) for run in found.runs}
        assert len(found.runs) == len(asked) == 3 * len(open_set.METHODS) * 2
        for run in found.runs:
            n = (cells.label == run.left_out).sum()
            assert run.n_unknown == n
            assert run.n_known == pytest.approx(0.2 * (120 - n), abs=1.5)
            assert min(run.auroc, run.recall, run.false_unknown_rate) >= 0
            assert run.versions["numpy"]

    def test_new_types_are_noticed_and_random_numbers_notice_nothing(self, report):
        found = report[0]
        task = found.tasks[0]
        assert found.mean(task, "reference") > 0.8
        assert abs(found.mean(task, "random") - 0.5) < 0.2
        assert found.mean(task, "reference", "recall") > 2 * found.mean(task, "reference", "false_unknown_rate")

    def test_known_cells_are_seldom_called_unknown(self, report):
        for method in report[0].methods:
            assert report[0].mean(report[0].tasks[0], method, "false_unknown_rate") < 0.25, method

    def test_differences_are_paired(self, report):
        found = report[0]
        task = found.tasks[0]
        gap = found.difference(task, "probe")
        assert gap.value == pytest.approx(found.mean(task, "probe") - found.mean(task, "knn_pca"))
        assert gap.low <= gap.value <= gap.high
        assert found.difference(task, "knn_pca") is None

    def test_what_is_there_is_not_run_again(self, report, cells, tiny_model, monkeypatch):
        found, path = report
        monkeypatch.setattr(open_set, "_run", lambda *a: pytest.fail("ran again"))
        again = open_set.run_open_set([partial(splits.within, cells)], tiny_model, seeds=(0, 1), rows_path=path)
        assert again.to_dict() == json.loads(json.dumps(found.to_dict()))

    def test_tables(self, report, cells):
        text = "\n".join(report[0].to_lines())
        assert "each of 3 types left out in turn, 2 seeds" in text
        assert f"| type 0 | {(cells.label == 'type 0').sum()} |" in text
        assert "random numbers (null)" in text

    def test_a_null_that_is_no_null_stops_it(self, report):
        wrong = [replace(run, auroc=0.9) if run.method == "random" else run for run in report[0].runs]
        with pytest.raises(ScdivaError, match="null of the open set"):
            open_set.OpenSetReport(tuple(wrong)).check_null()
        report[0].check_null()


def test_baselines_notice_what_is_far_or_between():
    rng = np.random.default_rng(0)
    label = np.repeat(["a", "b"], 100)
    near = rng.normal(size=(200, 2)) + np.where(label == "a", -4.0, 4.0)[:, None]
    far = np.concatenate([near + rng.normal(scale=0.5, size=near.shape), rng.normal(scale=0.3, size=(50, 2))])
    folds = tuple(open_set._Fold(near[i::2], label[i::2], near[1 - i :: 2]) for i in (0, 1))
    space = open_set._Space(near, far, folds, 0.0)
    for novelty in (open_set._neighbour_distance, open_set._least_sure):
        found = novelty(space.near, label, space.far) > space.threshold(novelty)
        assert found[:200].mean() == pytest.approx(0.05, abs=0.05)
        assert found[200:].mean() > 0.9
    both = open_set._neighbour_distance_of_all(space)
    assert (both.value > both.threshold)[200:].all()
    np.testing.assert_allclose(both.value, open_set._neighbour_distance(near, label, far))


def test_seeds_of_one_type_do_not_count_as_types():
    rng = np.random.default_rng(0)
    by_type = rng.normal(size=(6, 1))
    one, many = (open_set.over_types_and_seeds(np.repeat(by_type, n, axis=1)) for n in (1, 20))
    assert many.value == pytest.approx(by_type.mean())
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


def test_labels_of_held_out_cells_are_not_seen(cells, tiny_model):
    task = splits.within(cells, 0)
    rng = np.random.default_rng(0)
    # every known label of a held-out cell is another known one; new cells stay new
    shuffled = replace(task, test=replace(task.test, label=rng.permutation(task.test.label)))
    name = str(cells.label[0])
    for method in open_set.METHODS[:-1]:
        values = []
        for given in (task, shuffled):
            split = open_set.leave_type_out(given, name)
            embedding = [open_set._Embedding.of(tiny_model, given)] if method in open_set.OURS else []
            space = [open_set._Space.fit(split, 0)]
            found = []
            original = open_set.open_set_auroc
            open_set.open_set_auroc = lambda known, new, found=found: found.append(np.sort([*known, *new])) or 0.5
            try:
                open_set._run(split, name, method, 0, "0" * 24, embedding, space)
            finally:
                open_set.open_set_auroc = original
            values.append(found[0])
        np.testing.assert_allclose(*values)
