from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, ScdivaError, SourceError
from scdiva.metrics.annotation import annotation_scores
from scdiva.tasks import evaluate_annotation as task
from scdiva.tasks.annotation_report import calibration_interval

METHODS = ("probe", "reference", "chosen", "logistic_pca", "majority", "shuffled")


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
        md, js, png = report[0].write(tmp_path)
        assert md.read_text() == text
        assert png.read_bytes().startswith(b"\x89PNG")
        content = json.loads(js.read_text())
        assert {row["method"] for row in content["summary"]} == set(METHODS)

    def test_what_is_there_is_not_run_again(self, report, tiny_model, monkeypatch):
        found, path, tasks = report
        monkeypatch.setattr(task, "_run", lambda *a: pytest.fail("ran again"))
        with path.open("a") as file:
            file.write('{"task": "cut o')
        again = task.evaluate_annotation(tasks, tiny_model, methods=METHODS, seeds=(0, 1), rows_path=path)
        assert again.to_dict() == found.to_dict()

    def test_every_row_says_how_long_it_took_and_with_which_packages(self, report):
        import numpy
        import sklearn

        for run in report[0].runs:
            assert run.seconds > 0 or run.method == "majority"
            assert run.versions["numpy"] == numpy.__version__
            assert run.versions["scikit-learn"] == sklearn.__version__
        text = report[0].to_markdown()
        assert f"numpy {numpy.__version__}" in text
        seconds = np.mean([run.seconds for run in report[0].runs if run.method == "probe"])
        assert f"| seconds, mean of all runs | | {seconds:.1f} |" in text

    def test_rows_of_an_older_version_are_used(self, report, tiny_model, tmp_path, monkeypatch):
        found, path, tasks = report
        old = tmp_path / "rows.jsonl"
        new_fields = ("table", "kind", "picked", "validation", "versions")
        with old.open("w") as file:
            for line in path.read_text().splitlines():
                row = json.loads(line) if line.endswith("}") else {"method": "chosen"}
                if row["method"] != "chosen":
                    file.write(json.dumps({k: v for k, v in row.items() if k not in new_fields}) + "\n")
        monkeypatch.setattr(task, "_run", lambda *a: pytest.fail("ran again"))
        asked = [name for name in METHODS if name != "chosen"]
        again = task.evaluate_annotation(tasks, tiny_model, methods=asked, seeds=(0, 1), rows_path=old)
        expected = [row for row in found.to_dict()["summary"] if row["method"] != "chosen"]
        assert again.to_dict()["summary"] == expected
        assert "did not record packages" in again.to_markdown()

    def test_controls_out_of_order_stop_it(self, report):
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


class TestGroups:
    def test_one_group_is_tested_on_and_the_others_trained_on(self, cells):
        group = np.array(["a", "b", "c"])[np.arange(120) % 3]
        split = task.leave_one_group_out(cells, group, "b")
        assert split.test.cells.cell_index.tolist() == np.flatnonzero(group == "b").tolist()
        assert split.train.cells.cell_index.tolist() == np.flatnonzero(group != "b").tolist()
        assert split.kind == "across groups"
        few = task.leave_one_group_out(cells, group, "b", 1, n_per_type=2)
        assert np.unique(few.train.label, return_counts=True)[1].tolist() == [2, 2, 2]
        assert few.test.cells.cell_index.tolist() == split.test.cells.cell_index.tolist()

    def test_types_that_training_lacks_are_counted_and_not_scored(self, cells):
        rare = cells.label == cells.label[0]
        group = np.where(rare, "own", np.where(np.arange(120) % 2, "a", "own"))
        group[np.flatnonzero(rare)[:4]] = "a"  # fewer than five
        group[np.flatnonzero(~rare)[0]] = ""
        split = task.leave_one_group_out(cells, group, "own")
        assert cells.label[0] not in {*split.train.label, *split.test.label}
        assert any(f"{cells.label[0]} ({rare.sum() - 4})" in note for note in split.notes)
        assert any("1 cells of no known group" in note for note in split.notes)
        assert split.train.label.size + split.test.label.size == (~rare).sum() - 1

    def test_what_cannot_be(self, cells):
        with pytest.raises(KeyNotFoundError, match="one of a"):
            task.leave_one_group_out(cells, np.full(120, "a"), "b")
        with pytest.raises(SourceError, match="0 types"):
            task.leave_one_group_out(cells, np.full(120, "a"), "a")
        with pytest.raises(ConfigError, match="3 groups for 120 cells"):
            task.leave_one_group_out(cells, np.array(["a", "b", "c"]), "a")

    def test_groups_and_filters_are_columns_of_the_file(self, synthetic, tiny_model):
        adata = synthetic.copy()
        adata.obs["donor"] = np.array(["d1", "d2"])[np.arange(120) % 2]
        adata.obs["how"] = np.where(np.arange(120) < 50, "seen", "guessed")
        found = task.LabelledCounts.open(adata, tiny_model, "cell_type", where={"how": {"seen"}}, group_key="donor")
        assert found.cells.cell_index.tolist() == list(range(50))
        assert found.group.tolist() == adata.obs["donor"][:50].tolist()
        assert found.groups == ("d1", "d2")
        assert "only cells whose how is seen" in found.notes[0]
        with pytest.raises(KeyNotFoundError, match="'sen'"):
            task.LabelledCounts.open(adata, tiny_model, "cell_type", where={"how": {"sen"}})
        with pytest.raises(SourceError, match="passes the filter"):
            task.LabelledCounts.open(adata, tiny_model, "cell_type", {"type 0": ""}, where={"how": {"seen"}})

    def test_a_file_without_the_column_is_used_whole_and_named(self, synthetic):
        adata = synthetic.copy()
        adata.obs["how"] = "seen"
        where, notes = task.filters_by_source([synthetic, adata], {"how": {"seen"}})
        assert where == [{}, {"how": {"seen"}}]
        assert "no column how" in notes[0]
        with pytest.raises(KeyNotFoundError, match="'nowhere'"):
            task.filters_by_source([synthetic, adata], {"nowhere": {"x"}})


class TestChosen:
    def test_it_is_the_run_that_validates_best(self, cells, tiny_model, tmp_path, monkeypatch):
        asked = ("probe", "reference", "chosen")

        def run(path=None):
            tasks = [partial(task.within, cells)]
            return task.evaluate_annotation(tasks, tiny_model, methods=asked, seeds=(0,), rows_path=path).runs

        probe, reference, chosen = run(tmp_path / "rows.jsonl")
        assert set(chosen.validation) == {"probe", "reference"}
        best = max(chosen.validation.values())
        assert chosen.picked == ("reference" if chosen.validation["reference"] == best else "probe")
        taken = reference if chosen.picked == "reference" else probe
        np.testing.assert_array_equal(chosen.predicted, taken.predicted)
        assert chosen.seconds > taken.seconds
        assert run(tmp_path / "rows.jsonl")[2].to_dict() == chosen.to_dict()

        # another winner on the validation cells is another choice, whatever held-out cells say
        real = task._fit

        class Wrong:
            def calls(self, cells, z):
                said = real("reference", *self.rest).calls(cells, z)
                return type(said)(said.probability[:, ::-1], said.novelty)

        def fit(method, *rest):
            if method == "reference" and len(rest[0].label) < 96:
                wrong = Wrong()
                wrong.rest = rest
                return wrong
            return real(method, *rest)

        monkeypatch.setattr(task, "_fit", fit)
        assert run()[2].picked == "probe"

    def test_ties_go_to_the_simpler(self, cells, tiny_model, monkeypatch):
        real = task._fit
        monkeypatch.setattr(task, "_fit", lambda method, *rest: real("reference", *rest))
        asked = ("probe", "probe_self_trained", "reference", "chosen", "logistic_pca")
        for n in (None, 6):  # one split, and three folds
            tasks = [partial(task.within, cells, n_per_type=n)]
            found = task.evaluate_annotation(tasks, tiny_model, methods=asked, seeds=(0,))
            assert found.runs[3].picked == "reference"
            assert len(set(found.runs[3].validation.values())) == 1
            assert "scDiVa neighbours (1)" in found.to_markdown()

    def test_one_method_is_no_choice(self, cells, tiny_model):
        with pytest.raises(ConfigError, match="fewer than two"):
            task.evaluate_annotation([partial(task.within, cells)], tiny_model, methods=["probe", "chosen"])


def test_methods_that_build_on_others_do_not_fit_them_again(cells, tiny_model, monkeypatch):
    from scdiva.models.annotators import Probe

    fits = []
    real = Probe.fit
    monkeypatch.setattr(Probe, "fit", lambda *a, **k: fits.append(1) or real(*a, **k))
    tasks = [partial(task.within, cells, n_per_type=6)]
    together = task.evaluate_annotation(
        tasks, tiny_model, methods=("probe", "probe_self_trained", "integrate", "consensus"), seeds=(0,)
    )
    assert len(fits) == 1
    alone = task.evaluate_annotation(tasks, tiny_model, methods=("consensus",), seeds=(0,))
    one, two = together.runs[-1], alone.runs[-1]
    np.testing.assert_array_equal(one.predicted, two.predicted)
    np.testing.assert_array_equal(one.confidence, two.confidence)
    # what the parts took is counted, whoever fitted them
    by_method = {run.method: run for run in together.runs}
    assert by_method["consensus"].seconds > by_method["integrate"].seconds
    assert "scDiVa consensus" in together.to_markdown()


def test_fine_tuning_is_run_when_it_is_named_and_as_a_user_would(cells, tiny_model, monkeypatch):
    assert not {"finetune", "lora"} & set(task._checked_methods(None))
    real, asked = task.fit_cell_typer, []

    def fit(reference, model, label_key, *, method, query, seed):
        asked.append((method, reference.n_obs, query.n_obs, seed))
        assert "label" not in query.obs
        return real(reference, model, label_key, method="reference", query=query, seed=seed)

    monkeypatch.setattr(task, "fit_cell_typer", fit)
    found = task.evaluate_annotation(
        [partial(task.within, cells)], tiny_model, methods=["reference", "lora"], seeds=(3,)
    )
    assert asked == [("lora", 96, 24, 3)]
    assert found.methods == ("reference", "lora")
    np.testing.assert_array_equal(found.runs[0].predicted, found.runs[1].predicted)


class TestMergedLabels:
    def test_truth_and_prediction_are_both_mapped(self, report):
        found = report[0]
        first, second, third = found.runs[0].labels
        merged = task.AnnotationReport(found.runs, merge={first: "a", second: "a"}).merged()
        for run, fine in zip(merged.runs, found.runs, strict=True):
            name = {first: "a", second: "a", third: third}
            expected = annotation_scores([name[x] for x in fine.true_label], [name[x] for x in fine.predicted_label])
            assert run.scores["macro_f1"] == pytest.approx(expected.macro_f1)
            assert run.scores["accuracy"] >= fine.scores["accuracy"]
            assert np.isnan(run.scores["calibration_error"])
        assert merged.tasks == found.tasks

    def test_it_is_a_second_table(self, report, tmp_path):
        found = report[0]
        first, second, third = found.runs[0].labels
        merged = task.AnnotationReport(found.runs, merge={first: "a", second: "a"})
        text = merged.to_markdown()
        assert f"(a: {first}, {second})" in text
        assert text.count("| task | seeds |") == 2
        assert len(merged.to_dict()["summary_of_merged_labels"]) == len(merged.to_dict()["summary"])
        nothing = task.AnnotationReport(found.runs, merge={first: "a", second: "a", third: "a"})
        assert "No task has two types left" in nothing.to_markdown()

    def test_labels_that_nobody_has(self, cells, tiny_model):
        with pytest.raises(ConfigError, match="none of the labels to merge"):
            task.evaluate_annotation([partial(task.within, cells)], tiny_model, merge={"X": "Y"})


class TestCalibration:
    def test_it_is_pooled_by_kind_of_split(self, report):
        found = report[0]
        first, second = found.tasks
        runs = tuple(replace(run, kind="across sets") if run.task == second else run for run in found.runs)
        both = task.AnnotationReport(runs)
        assert both.kinds == {"within sets": (first,), "across sets": (second,)}
        pooled, alone = both.calibration("probe", both.kinds["across sets"]), both.calibration("probe", (second,))
        assert pooled == alone
        assert pooled.n_cells == sum(run.truth.size for run in found.of(second, "probe").values())
        errors = [run.scores["calibration_error"] for run in found.of(second, "probe").values()]
        assert pooled.error.value == pytest.approx(np.mean(errors), abs=1e-3)
        text = both.to_markdown()
        assert "| all within sets |" in text
        assert "| all across sets |" in text

    def test_intervals_cover_the_error_of_calibrated_and_of_sure_methods(self):
        rng = np.random.default_rng(0)
        covered = []
        for seed in range(40):
            sure = rng.uniform(0.6, 1.0, 400)
            right = rng.random(400) < sure - 0.2
            found = calibration_interval(sure, right, np.random.default_rng(seed))
            assert found.low <= found.value <= found.high
            covered.append(found.low <= 0.2 <= found.high)
        assert np.mean(covered) > 0.8
        sure = rng.uniform(0.6, 1.0, 4000)
        assert calibration_interval(sure, rng.random(4000) < sure, rng).high < 0.05


def test_labels_of_held_out_cells_are_not_seen(cells, tiny_model):
    split = task.within(cells, 0)
    hidden = task.Task(split.name, split.train, task.LabelledCounts("x", split.test.cells, split.test.label[::-1]))
    found = [
        task.evaluate_annotation([lambda seed, s=s: s], tiny_model, methods=METHODS[:-1], seeds=(0,)).runs
        for s in (split, hidden)
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.predicted, other.predicted)
        assert (one.picked, one.validation) == (other.picked, other.validation)


def test_the_command(bundle, cli, tmp_path):
    synthetic_cells(150, 200, n_types=3, mean_depth=400.0, seed=1).write_h5ad(tmp_path / "one.h5ad")
    (tmp_path / "merge.tsv").write_text("# type, coarser type\ntype 0\tA\ntype 1\tA\n")
    methods = [flag for name in ("reference", "logistic_pca", "shuffled") for flag in ("--methods", name)]
    done = cli("evaluate", "annotation", tmp_path / "one.h5ad", "--out", tmp_path / "out", "--model", bundle, *methods,
               "--seeds", 1, "--per-type", 4, "--open-set", "--merge", tmp_path / "merge.tsv")  # fmt: skip
    assert done.code == 0, done.err
    assert "one, 4 per type, reference, seed 0" in done.out
    assert "one without type 0, reference, seed 0: AUROC" in done.out
    assert "one, 4 per type without" not in done.out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report.json", "report.md", "report.png", "rows.jsonl"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Open set, one: each of 3 types left out in turn, 1 seed." in text
    assert "(A: type 0, type 1)" in text
    (tmp_path / "map.tsv").write_text("no tab here\n")
    bad = cli("evaluate", "annotation", tmp_path / "one.h5ad", "--out", tmp_path / "x", "--map", tmp_path / "map.tsv",
              "--model", bundle)  # fmt: skip
    assert bad.code == 2
    assert "line 1" in bad.err


def test_the_command_by_group_and_filter(bundle, cli, tmp_path):
    adata = synthetic_cells(150, 200, n_types=3, mean_depth=400.0, seed=1)
    adata.obs["donor"] = np.array(["d1", "d2", "d3"])[np.arange(150) % 3]
    adata.obs["how"] = np.where(np.arange(150) < 120, "seen", "guessed")
    adata.write_h5ad(tmp_path / "one.h5ad")
    command = ["evaluate", "annotation", tmp_path / "one.h5ad", "--model", bundle, "--seeds", 1,
               "--methods", "logistic_pca", "--methods", "shuffled"]  # fmt: skip
    done = cli(*command, "--out", tmp_path / "out", "--group-key", "donor", "--filter", "how=seen")
    assert done.code == 0, done.err
    for donor in ("d1", "d2", "d3"):
        assert f"one: others → {donor}, logistic_pca, seed 0" in done.out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "all across groups | 120 |" in text
    assert "only cells whose how is seen" in text
    one = cli(*command, "--out", tmp_path / "out2", "--group-key", "donor", "--test-group", "d2")
    assert one.code == 0, one.err
    assert "→ d2" in one.out
    assert "→ d1" not in one.out
    for flags, said in (
        (["--filter", "how"], "COLUMN=VALUE"),
        (["--filter", "where=there"], "'where'"),
        (["--test-group", "d1"], "--group-key"),
        (["--group-key", "donor", "--test-group", "d9"], "'d9'"),
        (["--group-key", "donor", "--test", tmp_path / "one.h5ad"], "two ways to split"),
    ):
        bad = cli(*command, "--out", tmp_path / "x", *flags)
        assert bad.code == 2
        assert said in bad.err
