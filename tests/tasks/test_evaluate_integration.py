from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from scdiva.baselines import integration as baselines
from scdiva.config import IntegrationConfig
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, ScdivaError, SourceError, UnsupportedError
from scdiva.metrics import integration as metrics
from scdiva.metrics.generation_space import Score
from scdiva.tasks import evaluate_integration as task
from scdiva.tasks.integration_figure import draw_integration
from scdiva.tasks.integration_report import IntegrationReport, Run, _half_width

N = 240
METHODS = ("pca", "harmony", "zero_shot", "scdiva", "random", "scanvi", "scdiva_labels", "oracle")
N_UNKNOWN = 10
PACKAGES = dict(task.PACKAGES)


class FakeModel:
    """In the place of an integrated model: the z of a model, moved by type where labels were given."""

    def __init__(self, model, labels):
        self.model, self.labels, self.n_latent = model, labels, model.n_latent

    def embed(self, cells):
        z = self.model.embed(cells)
        if self.labels is None:
            return z
        names = np.unique(self.labels)
        return z + 3 * z.std() * np.eye(len(names), z.shape[1])[np.searchsorted(names, self.labels[cells.cell_index])]


class FakeIntegration:
    """In the place of the training, which takes minutes."""

    def __init__(self):
        self.calls, self.configs = [], []

    def integrate_cells(self, cells, batch, model, *, labels=None, config=None, seed=0, name=""):
        self.calls.append((cells.n_cells, sorted(set(batch)), labels, seed))
        self.configs.append(config)
        return SimpleNamespace(z=FakeModel(model, labels).embed(cells))


@pytest.fixture(scope="module")
def synthetic():
    adata = synthetic_cells(N, 200, n_types=3, mean_depth=400.0, seed=2)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    adata.obs.iloc[:N_UNKNOWN, adata.obs.columns.get_loc("cell_type")] = ["unassigned", "nan"] * (N_UNKNOWN // 2)
    return adata


@pytest.fixture(scope="module")
def cells(synthetic, tiny_model):
    return task.BatchedCells.open(synthetic, tiny_model, "batch", "cell_type")


@pytest.fixture(scope="module")
def fake():
    """Plain metrics; our training, Harmony and scANVI replaced by what takes no time."""
    found = FakeIntegration()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scdiva.tasks.integrate", found)
        patch.setattr(task, "find_spec", lambda module: None)
        patch.setattr(task, "PACKAGES", {})
        patch.setattr(task, "N_DRAWS", 8)
        patch.setitem(baselines.BASELINES, "harmony", baselines.pca)
        patch.setitem(baselines.BASELINES, "scanvi", baselines.pca)
        yield found


@pytest.fixture(scope="module")
def report(cells, tiny_model, fake, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = task.evaluate_integration(cells, tiny_model, methods=METHODS, seeds=(0, 1), rows_path=path)
    return found, path


class TestCells:
    def test_all_cells_are_read_and_those_without_a_label_marked(self, cells):
        assert cells.cells.n_cells == N
        assert (~cells.is_labelled).sum() == N_UNKNOWN
        assert set(cells.label[~cells.is_labelled]) == {""}
        assert cells.counts.shape == (N, 190)  # of 200 genes the model knows 190

    def test_what_cannot_be_integrated(self, synthetic, tiny_model):
        some = synthetic[:60].copy()
        some.obs["one"] = "a"
        some.obs["gaps"] = np.where(np.arange(60) < 3, None, "a")
        with pytest.raises(SourceError, match="3 cells of the AnnData have no batch"):
            task.BatchedCells.open(some, tiny_model, "gaps", "cell_type")
        with pytest.raises(SourceError, match="1 batch "):
            task.BatchedCells.open(some, tiny_model, "one", "cell_type")
        with pytest.raises(SourceError, match="1 type "):
            task.BatchedCells.open(some, tiny_model, "batch", "one")
        with pytest.raises(SourceError, match="60 cells, 60 batches, 3 labels"):
            task.BatchedCells.of(some, tiny_model, np.array(["a", "b"] * 30), np.array(["a", "b", "c"]))

    def test_a_batch_may_be_called_unknown(self, synthetic, tiny_model):
        batch = np.array(["unknown", "b"] * (N // 2))
        found = task.BatchedCells.of(synthetic, tiny_model, batch, np.array(["x", "y", "z"] * (N // 3)), name="named")
        assert found.name == "named"
        assert set(found.batch) == {"unknown", "b"}


class TestSubsamples:
    labels = np.repeat(["a", "b", "c"], [100, 60, 7])
    batches = np.array(["x", "y", "y"] * 55 + ["x", "x"])

    def test_types_and_batches_keep_their_shares(self):
        draws = task.subsamples(self.labels, self.batches, n_draws=6)
        assert draws.shape == (6, 83)
        for rows in draws:
            assert len(set(rows.tolist())) == 83
            for name in "abc":
                of_type = self.labels == name
                assert abs(of_type[rows].sum() - of_type.sum() / 2) <= 1
                for batch in "xy":
                    both = of_type & (self.batches == batch)
                    assert abs(both[rows].sum() - both.sum() / 2) <= 1
        assert len({tuple(rows) for rows in draws.tolist()}) == 6

    def test_they_are_the_same_each_time_and_bounded(self):
        np.testing.assert_array_equal(*(task.subsamples(self.labels, self.batches) for _ in range(2)))
        assert task.subsamples(self.labels, self.batches, n_draws=2, most=30).shape == (2, 30)

    @pytest.mark.parametrize("most", [5000, 100])
    def test_their_spread_is_that_of_the_mean_of_all_cells(self, most):
        values = np.random.default_rng(0).normal(size=600)
        labels = np.repeat(["a", "b"], 300)
        draws = task.subsamples(labels, np.tile(["x", "y"], 300), n_draws=600, most=most)
        m = draws.shape[1]
        found = values[draws].mean(axis=1).var(ddof=1) * m / (600 - m)
        assert found == pytest.approx(values.var(ddof=1) / 600, rel=0.25)


class TestIntervals:
    def test_two_sources_of_variance(self):
        assert _half_width(0.0, 19, 0.0, 2) == 0
        assert _half_width(0.01, 19, 0.0, 0) == pytest.approx(2.093 * 0.1, rel=1e-3)
        assert _half_width(0.0, 19, 0.01, 2) == pytest.approx(4.303 * 0.1, rel=1e-3)
        # Welch and Satterthwaite: two equal variances with 5 degrees of freedom each have 10
        assert _half_width(0.005, 5, 0.005, 5) == pytest.approx(2.228 * 0.1, rel=1e-3)

    def test_the_difference_is_over_the_same_cells_and_seeds(self):
        def run(method, seed, value, drawn):
            scores = {"scib_bio": Score(value)}
            return Run(method, seed, "", scores, {"scib_bio": np.array(drawn)}, 90, 30, 2, 0.0, 0.0)

        # whatever cells do to both does not count
        common = np.array([0.3, -0.2, 0.1, -0.4])
        runs = tuple(
            run(method, seed, value + 0.1 * seed, value + common + own)
            for seed in (0, 1)
            for method, value, own in (
                ("pca", 0.4, np.zeros(4)),
                ("harmony", 0.3, np.zeros(4)),
                ("scdiva", 0.6, np.array([0.01, -0.01, 0.01, -0.01])),
            )
        )
        found = IntegrationReport("x", "", 90, 90, 5, 2, 2, runs)
        assert found.best_baseline("scdiva", "scib_bio") == "pca"
        gap = found.difference("scdiva", "scib_bio")
        assert gap.value == pytest.approx(0.2)
        variance = np.var([0.01, -0.01, 0.01, -0.01], ddof=1) * 30 / 60
        assert gap.high - gap.value == pytest.approx(3.182 * variance**0.5, rel=1e-3)
        assert found.is_better("scdiva", "scib_bio")
        assert not replace(found, runs=runs[:3]).is_better("scdiva", "scib_bio")  # one seed
        assert not found.is_better("pca", "scib_bio")
        assert found.best_baseline("scdiva_labels", "scib_bio") is None


class TestReport:
    def test_it_scores_what_was_embedded_on_labelled_cells(self, report, cells):
        rows = np.flatnonzero(cells.is_labelled)
        for seed in (0, 1):
            before = baselines.pca(cells.counts, cells.batch, seed=seed)[rows]
            noise = baselines.random(cells.counts, cells.batch, seed=seed)[rows]
            for method, z in (("pca", before), ("random", noise)):
                (run,) = (r for r in report[0].runs if (r.method, r.seed) == (method, seed))
                expected = metrics.integration_scores(
                    z, cells.label[rows], cells.batch[rows], seed=seed, unintegrated=before,
                    metrics=metrics.PLAIN_METRICS,
                )  # fmt: skip
                assert set(run.scores) == set(expected.scores) == set(metrics.PLAIN_METRICS)
                for name in expected.scores:
                    assert run.scores[name].value == pytest.approx(expected[name], abs=1e-9), name
        assert len(report[0].runs) == 2 * len(METHODS)

    def test_resampled_means_are_those_of_the_subsamples(self, report, cells):
        rows = np.flatnonzero(cells.is_labelled)
        labels, batches = cells.label[rows], cells.batch[rows]
        z = baselines.pca(cells.counts, cells.batch, seed=0)[rows]
        (run,) = (r for r in report[0].runs if (r.method, r.seed) == ("pca", 0))
        draws = task.subsamples(labels, batches, n_draws=8)
        assert (run.n_scored, run.n_drawn) == (N - N_UNKNOWN, (N - N_UNKNOWN) // 2)
        assert set(run.resampled) == {"avg_batch", "scib_bio"}
        for i in (0, 7):
            at = draws[i]
            found = metrics.integration_scores(
                z[at], labels[at], batches[at], seed=0, unintegrated=z[at], metrics=["avg_batch", "scib_bio"]
            )
            for name in run.resampled:
                assert run.resampled[name][i] == pytest.approx(found[name], abs=1e-9)
        drawn = {(r.method, r.seed) for r in report[0].runs if r.resampled is not None}
        assert drawn == {(name, 0) for name in METHODS if name not in ("random", "oracle")}

    def test_labels_are_shown_to_those_that_may_see_them(self, report, fake, cells):
        calls = fake.calls[:4]
        assert [(n, seed, labels is None) for n, _, labels, seed in calls] == [
            (N, 0, True), (N, 0, False), (N, 1, True), (N, 1, False),
        ]  # fmt: skip
        np.testing.assert_array_equal(calls[1][2], cells.label)
        assert calls[0][1] == ["batch 0", "batch 1"]

    def test_methods_are_compared_with_their_kind(self, report):
        found = report[0]
        assert found.methods == METHODS
        assert found.best_baseline("scdiva", "scib_bio") in ("pca", "harmony")
        assert found.best_baseline("scdiva_labels", "scib_bio") == "scanvi"
        assert found.difference("scdiva_labels", "scib_bio").value == pytest.approx(
            np.mean(found.values("scdiva_labels", "scib_bio")) - np.mean(found.values("scanvi", "scib_bio"))
        )
        assert np.mean(found.values("oracle", "scib_bio")) > 0.98
        assert np.mean(found.values("random", "scib_bio")) < np.mean(found.values("pca", "scib_bio"))

    def test_the_text_says_what_one_must_know(self, report, cells):
        text = report[0].to_markdown()
        rows = cells.is_labelled
        confounding = metrics.batch_label_confounding(cells.label[rows], cells.batch[rows])
        for words in (
            confounding.sentence,
            f"{N_UNKNOWN} cells without a label are integrated with the others",
            "Without igraph and scib-metrics these are not measured:",
            "AvgBIO",
            "scANVI (sees the labels) | yes |",
            "scDiVa, integrated | no |",
            "| kmeans_ari |",
        ):
            assert words in text
        assert "nan" not in text

    def test_files_and_picture(self, report, tmp_path):
        md, js = report[0].write(tmp_path)
        assert md.read_text() == report[0].to_markdown()
        content = json.loads(js.read_text())
        assert {row["method"] for row in content["summary"]} == set(METHODS)
        ours = [row for row in content["summary"] if (row["method"], row["metric"]) == ("scdiva", "avg_batch")]
        gap = report[0].difference("scdiva", "avg_batch")
        assert ours[0]["minus_best_baseline"] == [gap.value, gap.low, gap.high]
        draw_integration(report[0], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert report[0].axes == ("scib_bio", "avg_batch")

    def test_what_is_there_is_not_run_again(self, report, cells, tiny_model, fake, monkeypatch):
        found, path = report
        monkeypatch.setattr(task, "_run", lambda *a: pytest.fail("ran again"))
        with path.open("a") as file:
            file.write('{"method": "cut o')
        again = task.evaluate_integration(cells, tiny_model, methods=METHODS, seeds=(0, 1), rows_path=path)
        assert again.to_dict() == found.to_dict()

    def test_rows_of_other_cells_are_not_used(self, report, cells, tiny_model, fake, monkeypatch):
        ran = []
        monkeypatch.setattr(task, "_run", lambda *a: ran.append(a[3]) or report[0].runs[0])
        other = replace(cells, batch=cells.batch[::-1])
        task.evaluate_integration(other, tiny_model, methods=["pca"], seeds=(0,), rows_path=report[1])
        assert ran == ["pca"]


class TestControls:
    def changed(self, report, method, value):
        return replace(
            report,
            runs=tuple(
                replace(run, scores={**run.scores, "scib_bio": Score(value)}) if run.method == method else run
                for run in report.runs
            ),
        )

    def test_noise_that_keeps_types_stops_it(self, report):
        task.check_controls(report[0])
        with pytest.raises(ScdivaError, match="out of order"):
            task.check_controls(self.changed(report[0], "random", 0.99))

    def test_better_than_the_labels_stops_it(self, report):
        with pytest.raises(ScdivaError, match=r"scDiVa, integrated, 0\.995 of one-hot"):
            task.check_controls(self.changed(self.changed(report[0], "scdiva", 1.0), "oracle", 0.995))

    def test_rows_are_kept(self, cells, tiny_model, fake, monkeypatch, tmp_path):
        monkeypatch.setitem(baselines.BASELINES, "random", lambda counts, b, labels, seed: task.oracle(labels, seed=0))
        with pytest.raises(ScdivaError, match="out of order"):
            task.evaluate_integration(
                cells, tiny_model, methods=["pca", "random"], seeds=(0,), rows_path=tmp_path / "rows.jsonl"
            )
        assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2

    def test_the_ceiling_is_perfect_for_types_only(self, cells):
        z = task.oracle(cells.label, seed=0)
        assert np.isfinite(z).all()
        rows = cells.is_labelled
        assert np.abs(z[~rows]).max() < 0.01
        found = metrics.integration_scores(
            z[rows], cells.label[rows], cells.batch[rows], seed=0, metrics=["kmeans_nmi", "asw_label", "clisi"]
        )
        assert min(found["kmeans_nmi"], found["asw_label"], found["clisi"]) > 0.99


class TestWhatIsInstalled:
    def test_metrics(self, monkeypatch):
        monkeypatch.setattr(task, "find_spec", lambda module: None)
        names, lacking = task.measurable_metrics()
        assert set(names) == set(metrics.PLAIN_METRICS)
        assert lacking == ("igraph", "scib-metrics")
        monkeypatch.setattr(task, "find_spec", lambda module: None if module == "scib_metrics" else object())
        names, lacking = task.measurable_metrics()
        assert set(metrics.METRICS) - set(names) == {"kbet"}
        assert set(metrics.MEANS) - set(names) == {"scib_batch", "scib_total"}
        assert lacking == ("scib-metrics",)
        monkeypatch.setattr(task, "find_spec", lambda module: object())
        assert task.measurable_metrics() == ((*metrics.METRICS, *metrics.MEANS), ())

    def test_methods_are_left_out_with_a_word_or_refused_by_name(self, monkeypatch, caplog):
        monkeypatch.setattr(task, "PACKAGES", PACKAGES)
        monkeypatch.setattr(task, "find_spec", lambda module: None if module == "scvi" else object())
        chosen, notes = task._chosen(None)
        assert set(task.METHODS) - set(chosen) == {"scvi", "scanvi", "scdiva_published"}
        assert "scvi-tools" in notes[0]
        assert notes[0] in caplog.text
        monkeypatch.setattr("scdiva.baselines.common.find_spec", lambda module: None)
        with pytest.raises(UnsupportedError, match="harmonypy"):
            task._chosen(["pca", "harmony"])

    def test_the_published_protocol_is_run_only_if_it_is_named(
        self, cells, tiny_model, tiny_trunk_model, fake, synthetic
    ):
        chosen, _ = task._chosen(None)
        assert set(task.METHODS) - set(chosen) == {"scdiva_published"}
        with pytest.raises(UnsupportedError, match="no trunk"):
            task.evaluate_integration(cells, tiny_model, methods=["scdiva_published"], seeds=(0,))
        fake.calls.clear()
        fake.configs.clear()
        data = task.BatchedCells.open(synthetic, tiny_trunk_model, "batch", "cell_type")
        named = ["pca", "scanvi", "scdiva_labels", "scdiva_published"]
        found = task.evaluate_integration(data, tiny_trunk_model, methods=named, seeds=(0,))
        assert fake.configs == [None, IntegrationConfig.published()]
        assert all(labels is not None for _, _, labels, _ in fake.calls)
        assert found.best_baseline("scdiva_published", "avg_batch") == "scanvi"
        assert "| scDiVa, published protocol (sees the labels) | yes |" in found.to_markdown()

    def test_unknown_methods_and_no_seeds(self, cells, tiny_model):
        with pytest.raises(ConfigError, match="'magic'"):
            task.evaluate_integration(cells, tiny_model, methods=["magic"])
        with pytest.raises(ConfigError, match="no seeds"):
            task.evaluate_integration(cells, tiny_model, methods=["pca"], seeds=())

    def test_leiden_is_chosen_anew_near_the_resolution(self, cells):
        pytest.importorskip("igraph")
        rows = np.flatnonzero(cells.is_labelled)
        z, labels, batches = task.oracle(cells.label, seed=0)[rows], cells.label[rows], cells.batch[rows]
        draws = task.subsamples(labels, batches, n_draws=2)
        found = task.resampled_means(
            z, labels, batches, draws, seed=0, unintegrated=z, resolution=0.01, wanted=[*metrics.METRICS, "avg_bio"]
        )
        assert list(found) == ["avg_bio"]
        assert found["avg_bio"].min() > 0.98
