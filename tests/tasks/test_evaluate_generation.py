from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.datasets import synthetic_cells
from scdiva.errors import (
    ConfigError,
    GeneError,
    KeyNotFoundError,
    ScaleError,
    ScdivaError,
    SourceError,
    UnsupportedError,
)
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_classifiers import CLASSIFIERS
from scdiva.metrics.generation_space import Score
from scdiva.tasks import evaluate_generation as task
from scdiva.tasks import generation_report

FAST = {"n_trees": 5, "min_cells_per_type": 1000, "labels_key": "cell_type"}
CHEAP = ("multinomial", "shuffled", "ceiling")


@pytest.fixture(scope="module", autouse=True)
def _quick_judges():
    """The judges themselves are tested elsewhere: two that take seconds are replaced by one that takes none."""
    from sklearn.naive_bayes import GaussianNB

    with pytest.MonkeyPatch.context() as patch:
        for name in ("logistic", "mlp"):
            patch.setitem(CLASSIFIERS, name, lambda seed, n_trees: GaussianNB())
        yield


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    made = synthetic_cells(360, 120, n_types=3, n_batches=1, mean_depth=600.0, seed=3)
    made.obs["cell_type"] = made.obs["cell_type"].cat.add_categories("unassigned")
    made.obs.loc[made.obs_names[:4], "cell_type"] = "unassigned"
    return made


class Resampler:
    """Gives training cells back, without a gene and with a molecule more here and there."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, int], int]] = []

    def __call__(self, train, wanted, seed):
        self.calls.append((train.n_obs, dict(wanted), seed))
        assert (train.X.data == np.rint(train.X.data)).all()
        rng = np.random.default_rng(seed)
        labels = train.obs["cell_type"].astype(str).to_numpy()
        rows = np.concatenate([rng.choice(np.flatnonzero(labels == kind), n) for kind, n in wanted.items()])
        x = train.X[rows].toarray()[:, :0:-1]  # other order, and without the first gene
        x = sp.csr_matrix(x + rng.poisson(0.1, x.shape))
        return ad.AnnData(
            x, obs=train.obs.iloc[rows].set_axis([str(i) for i in range(rows.size)]), var=train.var.iloc[:0:-1]
        )


@pytest.fixture(scope="module")
def report(cells, tmp_path_factory):
    return task.evaluate_generation(
        cells, {"ours": Resampler()}, methods=("ours", *CHEAP), seeds=(0, 1), **{**FAST, "min_cells_per_type": 30}
    )


def test_splits_are_stratified_disjoint_and_of_the_wanted_size(cells):
    labels = np.repeat(["a", "b", "c"], [100, 40, 4])
    split = task.split_cells(labels, 0.7, seed=0)
    assert sorted([*split.train, *split.heldout]) == list(range(144))
    sizes = [{k: int((labels[rows] == k).sum()) for k in "abc"} for rows in (split.train, split.heldout)]
    assert sizes == [{"a": 70, "b": 28, "c": 3}, {"a": 30, "b": 12, "c": 1}]
    sample = labels[split.train[split.is_sample]]
    assert {k: int((sample == k).sum()) for k in "abc"} == sizes[1]
    again, other = task.split_cells(labels, 0.7, seed=0), task.split_cells(labels, 0.7, seed=1)
    np.testing.assert_array_equal(split.train, again.train)
    assert (split.train != other.train).any()


def test_every_method_makes_as_many_cells_as_are_held_out(cells):
    ours = Resampler()
    report = task.evaluate_generation(cells, {"ours": ours}, methods=("ours",), seeds=(4,), **FAST)
    ((n_train, wanted, seed),) = ours.calls
    assert wanted == dict(report.sizes)
    assert (n_train, sum(wanted.values()), seed) == (report.n_train, report.n_heldout, 4)
    assert report.n_train + report.n_heldout == 356
    assert report.n_left_out == 4
    assert report.runs[0].n_genes_absent == 1


def test_a_generator_never_sees_held_out_cells(cells):
    seen = {}

    def spy(train, wanted, seed):
        seen["train"] = set(train.obs_names)
        return Resampler()(train, wanted, seed)

    labels = cells.obs["cell_type"].astype(str).to_numpy()
    named = labels != "unassigned"
    split = task.split_cells(labels[named], 0.7, 0)
    task.evaluate_generation(cells, {"spy": spy}, methods=("spy",), seeds=(0,), **FAST)
    assert seen["train"] == set(cells.obs_names[named][split.train])


def test_the_report_holds_every_row_and_its_summary(report):
    assert report.methods == ("ours", *CHEAP)
    assert len(report.runs) == 8
    assert set(report.scored_types) == {"type 0", "type 1", "type 2"}
    found = json.loads(report.to_json())
    assert {row["metric"] for row in found["runs"][0]["rows"]} == set(metrics.METRICS)
    values = [s.value for s in report.values("ours", "mmd2").values()]
    summary = report.summary("ours", "mmd2")
    assert (summary.mean, summary.n) == (pytest.approx(np.mean(values)), 2)
    assert summary.sd == pytest.approx(np.std(values, ddof=1))
    over = report.values("ours", "mmd2", generation_report.OVER_TYPES)[0].value
    assert over == pytest.approx(np.mean([report.values("ours", "mmd2", t)[0].value for t in report.scored_types]))
    text = report.to_markdown()
    assert "shuffled (null)" in text
    assert "does not make 1 genes" in text
    assert f"{report.n_train:,} cells trained on" in text
    for metric in metrics.METRICS.values():
        assert f"| {metric.title} |" in text


def test_controls_come_out_in_order(report):
    null, ours, ceiling = (report.summary(m, "c2st_forest_hvg").mean for m in ("shuffled", "ours", "ceiling"))
    assert abs(ceiling - 0.5) < abs(null - 0.5)
    assert null > 0.65
    assert abs(ceiling - 0.5) < abs(ours - 0.5) + 0.1


def test_controls_that_are_out_of_order_are_refused(report):
    swapped = {"shuffled": "ceiling", "ceiling": "shuffled"}
    runs = tuple(
        task.MethodRun(swapped.get(r.method, r.method), r.seed, r.key, r.scores, 0.0, 0.0) for r in report.runs
    )
    wrong = task.GenerationReport("x", "cell_type", 1, 1, 1, 0, {}, (), ("ours",), runs)
    with pytest.raises(ScdivaError, match="out of order"):
        task.check_controls(wrong)
    task.check_controls(report)


def run(method: str, seed: int, value: float) -> task.MethodRun:
    return task.MethodRun(method, seed, "", {(metrics.POOLED, "c2st_forest_hvg"): Score(value)}, 0.0, 0.0)


def made_up(**values: list[float]) -> task.GenerationReport:
    runs = tuple(run(name, seed, v) for name, found in values.items() for seed, v in enumerate(found))
    return task.GenerationReport("x", "cell_type", 1, 1, 1, 0, {}, (), ("ours",), runs)


@pytest.mark.parametrize(
    ("ours", "is_bold"),
    [
        ([0.60, 0.61, 0.62], True),
        ([0.40, 0.39, 0.38], True),  # the other side of 0.5 is as good
        ([0.60, 0.70, 0.75], False),  # the interval reaches the baseline
        ([0.90, 0.91, 0.90], False),  # worse
        ([0.60], False),  # one seed has no interval
    ],
)
def test_bold_needs_an_interval_beyond_the_best_baseline(ours, is_bold):
    report = made_up(ours=ours, multinomial=[0.8] * 3, scvi=[0.72, 0.74, 0.73], shuffled=[0.5] * 3, ceiling=[0.5] * 3)
    assert report.is_better("ours", "c2st_forest_hvg") is is_bold
    assert ("**" in report._table(metrics.POOLED)[2]) is is_bold


def test_rows_are_kept_and_used_again(cells, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    ours = Resampler()
    options = {**FAST, "methods": ("ours", "multinomial"), "rows_path": rows}

    def stop(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.evaluate_generation(cells, {"ours": ours}, seeds=(0,), on_row=stop, **options)
    assert [found.method for found in task.read_rows(rows)] == ["ours"]
    with rows.open("a", encoding="utf-8") as file:
        file.write('{"method": "multinomial", "se')  # killed while it wrote
    printed = []
    report = task.evaluate_generation(cells, {"ours": ours}, seeds=(0,), on_row=printed.append, **options)
    assert len(ours.calls) == 1
    assert [found.method for found in printed] == ["ours", "multinomial"]
    assert [found.method for found in task.read_rows(rows)] == ["ours", "multinomial"]
    fresh = task.evaluate_generation(cells, {"ours": Resampler()}, seeds=(0,), **{**options, "rows_path": None})
    for old, new in zip(report.runs, fresh.runs, strict=True):
        assert str(old.scores) == str(new.scores)


def test_rows_of_other_data_or_settings_are_not_used(cells, tmp_path):
    rows = tmp_path / "rows.jsonl"
    ours = Resampler()
    options = {**FAST, "methods": ("ours",), "rows_path": rows, "seeds": (0,)}
    task.evaluate_generation(cells, {"ours": ours}, **options)
    task.evaluate_generation(cells, {"ours": ours}, **{**options, "n_trees": 6})
    other = cells.copy()
    other.X.data[-1] += 1
    task.evaluate_generation(other, {"ours": ours}, **options)
    ours.fingerprint = "another checkpoint"
    task.evaluate_generation(cells, {"ours": ours}, **options)
    assert len(ours.calls) == 4
    task.evaluate_generation(cells, {"ours": ours}, **options)
    assert len(ours.calls) == 4


def test_generators_are_held_to_their_word(cells):
    def broken(change):
        def generate(train, wanted, seed):
            made = Resampler()(train, wanted, seed)
            return change(made)

        return task.evaluate_generation(cells, {"ours": generate}, methods=("ours",), seeds=(0,), **FAST)

    def set_x(made, x):
        made.X = sp.csr_matrix(x)
        return made

    with pytest.raises(ScdivaError, match=r"type 0: .* of"):
        broken(lambda made: made[3:].copy())
    with pytest.raises(ScaleError, match="whole numbers"):
        broken(lambda made: set_x(made, made.X * 0.3))
    with pytest.raises(ScaleError, match="negative"):
        broken(lambda made: set_x(made, -made.X))
    with pytest.raises(KeyNotFoundError, match="cell_type"):
        broken(lambda made: ad.AnnData(made.X, var=made.var))
    with pytest.raises(GeneError, match="no gene"):
        broken(lambda made: ad.AnnData(made.X, obs=made.obs))


def test_what_cannot_be_evaluated_is_refused(cells):
    for change, error, text in [
        ({"methods": ("scdeva",)}, ConfigError, "scdeva"),
        ({"methods": ()}, ConfigError, "no methods"),
        ({"generators": {"ceiling": Resampler()}}, ConfigError, "ceiling"),
        ({"train_fraction": 1.0}, ConfigError, "train_fraction"),
        ({"seeds": ()}, ConfigError, "0 seeds"),
        ({"labels_key": "celltype"}, KeyNotFoundError, "celltype"),
    ]:
        with pytest.raises(error, match=text):
            task.evaluate_generation(cells, **{**FAST, "methods": ("multinomial",), **change})
    with pytest.raises(SourceError, match="no type"):
        task.evaluate_generation(cells[:4].copy(), **FAST, methods=("multinomial",))
    with pytest.raises(SourceError, match="neither sample"):
        task.evaluate_generation(cells[4:50].copy(), **FAST, methods=("multinomial",))
    log = cells.copy()
    log.X = sp.csr_matrix(np.random.default_rng(0).normal(size=log.shape))
    with pytest.raises(ScaleError):
        task.evaluate_generation(log, **FAST, methods=("multinomial",))
    doubled = cells.copy()
    doubled.var_names = [*doubled.var_names[:-1], doubled.var_names[0]]
    with pytest.raises(GeneError, match="more than once"):
        task.evaluate_generation(doubled, **FAST, methods=("multinomial",))


def test_scvi_that_is_not_installed_is_an_error_not_a_gap(cells, monkeypatch):
    monkeypatch.setattr("scdiva.baselines.generation.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="scvi-tools"):
        task.evaluate_generation(cells, **FAST)


def test_an_unknown_generator_is_named():
    with pytest.raises(UnsupportedError, match="scdeva"):
        task.generator_of("scdeva")


def test_cells_that_exist_already_are_judged(cells, tmp_path):
    named = cells[4:].copy()
    split = task.split_cells(named.obs["cell_type"].astype(str).to_numpy(), 0.7, 0)
    train, heldout = named[split.train].copy(), named[split.heldout].copy()
    made = Resampler()(train, {"type 0": 30, "type 1": 30, "type 2": 20}, 0)
    options = {**FAST, "seeds": (0,), "methods": CHEAP}
    report = task.evaluate_generated(train, heldout, made, **options)
    assert report.methods == ("generated", *CHEAP)
    assert report.ours == ("generated",)
    assert report.runs[0].n_genes_absent == 1
    assert (report.n_train, report.n_heldout) == (train.n_obs, heldout.n_obs)
    copied = task.evaluate_generated(train, heldout, train, **{**options, "methods": ()})
    assert copied.summary("generated", "n_copies").mean == copied.n_heldout
    log = made.copy()
    log.X = sp.csr_matrix(np.log1p(made.X.toarray() / np.maximum(made.X.sum(axis=1), 1) * 1e4))
    logged = task.evaluate_generated(train, heldout, log, **{**options, "methods": (), "unit": "log1p_cp10k"})
    assert np.isnan(logged.summary("generated", "library_size_ks").mean)
    for name in ("mmd2", "spearman_mean"):
        assert logged.summary("generated", name).mean == pytest.approx(report.summary("generated", name).mean, abs=1e-4)
    with pytest.raises(ScaleError, match="--unit"):
        task.evaluate_generated(train, heldout, log, **options)
    other = made.copy()
    other.obs["cell_type"] = "z"
    with pytest.raises(SourceError, match="held-out type"):
        task.evaluate_generated(train, heldout, other, **options)


def test_a_report_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    markdown, as_json = report.write(tmp_path)
    assert markdown.read_text() == report.to_markdown()
    json.loads(as_json.read_text())
    before = as_json.read_bytes()
    monkeypatch.setattr(task.GenerationReport, "to_json", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert as_json.read_bytes() == before


def test_cells_of_every_seed_are_kept(cells, tmp_path):
    task.evaluate_generation(cells, methods=("multinomial",), seeds=(0, 1), cells_folder=tmp_path / "cells", **FAST)
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == ["seed-0", "seed-1"]
    names = ["heldout", "multinomial", "train"]
    for seed in (0, 1):
        folder = tmp_path / "cells" / f"seed-{seed}"
        assert sorted(p.name for p in folder.iterdir()) == [f"{n}.h5ad" for n in names]
        heldout, made, train = (ad.read_h5ad(folder / f"{n}.h5ad") for n in names)
        assert made.n_obs == heldout.n_obs
        assert list(made.var_names) == list(heldout.var_names) == list(train.var_names)
        assert made.obs["cell_type"].value_counts().to_dict() == heldout.obs["cell_type"].value_counts().to_dict()
        assert not set(train.obs_names) & set(heldout.obs_names)
        is_sample = train.obs[task.IS_SAMPLE].to_numpy(dtype=bool)
        assert train.obs["cell_type"][is_sample].value_counts().to_dict() == dict(
            heldout.obs["cell_type"].value_counts()
        )


def test_a_type_that_is_made_like_another_is_named(cells):
    def one_for_all(train, wanted, seed):
        """Give cells of type 1 whatever is asked for."""
        made = Resampler()(train, {"type 1": sum(wanted.values())}, seed)
        made.obs["cell_type"] = np.repeat(list(wanted), list(wanted.values()))
        return made

    options = {**FAST, "seeds": (0,), "methods": ("good", "bad", "ceiling")}
    report = task.evaluate_generation(cells, {"good": Resampler(), "bad": one_for_all}, **options)
    shares = [report.summary(name, "own_type_nearest").mean for name in options["methods"]]
    assert shares == pytest.approx([1, 1 / 3, 1])
    assert report.runs[1].nearest == {"type 0": "type 1", "type 1": "type 1", "type 2": "type 1"}
    assert report.summary("bad", "own_type_nearest", "type 0").mean == 0
    text = report.to_markdown()
    assert "bad, types nearest to another's mean (seeds): type 0 (1 of 1), type 2 (1 of 1) → type 1." in text
    assert "good, types nearest" not in text
    table = text[text.index("bad, type by type:") :]
    assert "| 0 of 1 | type 1 |" in table.split("ceiling")[0]


def test_rows_of_earlier_versions_are_shown_without_what_they_lack(report):
    old = []
    for run in (run for run in report.runs if run.method == "ours"):
        found = run.to_dict()
        del found["nearest"]
        found["rows"] = [row for row in found["rows"] if row["metric"] != "own_type_nearest"]
        old.append(task.MethodRun.from_dict(json.loads(json.dumps(found))))
    runs = (*old, *(run for run in report.runs if run.method != "ours"))
    mixed = task.GenerationReport("x", "cell_type", 1, 1, 1, 0, report.sizes, (), ("ours",), runs, report.n_trees)
    text = mixed.to_markdown()
    assert f"| {metrics.METRICS['own_type_nearest'].title} | ceiling | – |" in text
    table = text[text.index("ours, type by type:") :]
    assert "| – |  |" in table
    json.loads(mixed.to_json())


def test_methods_have_titles_and_files_keep_their_names(cells):
    assert generation_report.TITLES["scdiffusion_parity"] == "scDiffusion, published networks"
    with pytest.raises(ConfigError, match="heldout"):
        task.evaluate_generation(cells, {"heldout": Resampler()}, **FAST)
