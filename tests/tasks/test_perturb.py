"""``perturb``: from control cells to predicted changes, what is refused, and files against AnnData."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiva as sd
from conftest import files_under
from perturbation_models import native_model, simulated
from perturbed import perturbed_cells, vocabulary
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError, KeyNotFoundError, OutputError, ScdivaError, SourceError, UnsupportedError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.perturbation_model import PerturbationModel
from scdiva.tasks.fit_perturbation import PerturbationTraining, fit_perturbation
from scdiva.tasks.perturb import control_cells, finetune_perturbation, perturb, wanted_perturbations

SIMPLE = PerturbationTraining(network=False)
KEYS = {"perturbation_key": "perturbation", "control": "control"}


@pytest.fixture(scope="module")
def screen():
    return simulated(n_pairs=12, n_control=80, n_cells=25)


@pytest.fixture(scope="module")
def base(screen) -> ScDiVa:
    return native_model(screen.vocabulary, screen.data.cells)


@pytest.fixture(scope="module")
def model(screen, base) -> PerturbationModel:
    return fit_perturbation(screen.data, base, options=SIMPLE, progress=False)


@pytest.fixture
def control(screen) -> ad.AnnData:
    adata = screen.to_adata()
    return adata[adata.obs["perturbation"] == "control"].copy()


def treated_model(contexts=("a", "b", "c", "d", "e")) -> tuple[PerturbationModel, PerturbedCells]:
    """Two doses of one drug, and another drug, in five contexts."""
    data = perturbed_cells(((0,), (1,), (2,)), contexts=contexts, n_cells=15)
    asked = (
        Perturbation((), "treatment"), Perturbation(("drug",), "treatment", 1.0),
        Perturbation(("drug",), "treatment", 10.0), Perturbation(("other",), "treatment"),
    )  # fmt: skip
    data = PerturbedCells(
        data.cells, asked, data.perturbation_code, data.contexts, data.context_code, data.batches, data.batch_code
    )
    return fit_perturbation(data, native_model(vocabulary(), data.cells), options=SIMPLE, progress=False), data


# --- what comes out ---


def test_a_row_per_perturbation_with_all_that_is_known_of_it(model, screen, control):
    first, second = sorted(screen.pathway)[:2]
    unseen = next(s for s in screen.vocabulary.symbol if s not in screen.pathway)
    before = control.copy()
    found = sd.tl.perturb(control, model, [first, f"{unseen}+{first}", unseen])
    assert found.shape == (3, 150)
    assert found.obs_names[0] == f"{first} | cells"
    assert found.obs["question"].tolist() == ["seen", "combination", "single"]
    assert found.obs["n_control_cells"].tolist() == [80] * 3
    assert (found.var["symbol"].to_numpy() == screen.vocabulary.symbol).all()
    assert (found.var_names == screen.vocabulary.ensembl_id).all()
    for i, name in enumerate((first, "+".join(sorted((unseen, first))), unseen)):
        said = model.predict(Perturbation(tuple(name.split("+"))), screen.data.cells.take(np.arange(80)), "cells")
        assert np.allclose(found.X[i], said.change, atol=1e-5)
    layers = found.layers
    assert set(layers) == {
        "control_mean", "predicted_mean", "simple_predictors", "expected_error", "spread_over_cells",
        "spread_over_seeds",
    }  # fmt: skip
    assert (layers["predicted_mean"] >= 0).all()
    assert np.allclose(layers["predicted_mean"], np.maximum(layers["control_mean"] + found.X, 0))
    error = layers["expected_error"][0]  # what was seen is not left out: its standard error
    assert (error > 0).any()
    assert (error < 1).all()
    assert (layers["expected_error"][1:] > 0).all()
    record = found.uns["scdiva"]["perturb"]
    assert record["n_control_cells"] == 80
    assert record["n_genes_not_measured"] == 0
    assert record["left_out_single_pearson_delta_floor"] < 1
    # the input is as it was
    assert (control.X != before.X).nnz == 0
    assert control.obs.equals(before.obs)
    assert not control.uns.get("scdiva")
    assert second


def test_control_means_are_those_of_the_control_cells(model, control):
    found = sd.tl.perturb(control, model, model.perturbations[0].name)
    counts = control.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    assert np.allclose(found.layers["control_mean"][0], values.mean(axis=0), atol=1e-5)


def test_top_genes_are_the_most_changed_without_the_targets(model, screen, control):
    first = sorted(screen.pathway)[0]
    found = sd.tl.perturb(control, model, first, n_top=3)
    named = found.obs["top_genes"].iloc[0].split(", ")
    assert len(named) == 3
    change = pd.Series(found.X[0], index=found.var["symbol"].to_numpy()).drop(first)
    assert [entry.split()[0] for entry in named] == change.abs().sort_values(ascending=False).index[:3].tolist()
    assert float(named[0].split()[1]) == pytest.approx(change[named[0].split()[0]], abs=0.006)


def test_the_order_of_genes_does_not_matter(model, control):
    genes = np.random.default_rng(0).permutation(control.n_vars)
    cells = np.random.default_rng(1).permutation(control.n_obs)
    seen = {target for p in model.perturbations for target in p.targets}
    unseen = [name for name in model.vocabulary.symbol if name not in seen]
    one, other = (sd.tl.perturb(a, model, unseen[:2]) for a in (control, control[cells][:, genes].copy()))
    assert (one.var_names == other.var_names).all()
    assert np.allclose(one.X, other.X, atol=1e-4)


def test_what_is_asked_for_twice_is_there_once(model, screen, control):
    first, second = sorted(screen.pathway)[:2]
    found = sd.tl.perturb(control, model, [f"{first}+{second}", f"{second}+{first}", first])
    assert found.n_obs == 2
    assert found.obs_names.is_unique


def test_other_names_of_a_gene_are_understood(screen):
    default = GeneVocabulary.default()
    march = int(np.flatnonzero(default.symbol == "MARCHF8")[0])
    genes = default.subset(np.sort(np.append(np.arange(30), march)))
    data = perturbed_cells(((0,), (1,)), n_genes=31, n_cells=15)
    found = fit_perturbation(data, native_model(genes, data.cells), options=SIMPLE, progress=False)
    (asked,) = wanted_perturbations(found, ["MARCH8"], None)
    assert asked.targets == ("MARCHF8",)


# --- contexts, doses, control cells among others ---


def test_each_context_is_predicted_by_itself(control, model):
    control.obs["line"] = np.where(np.arange(80) < 30, "x", "cells")
    control.obs.loc[control.obs_names[:5], "line"] = "unknown"
    name = model.perturbations[0].name
    found = sd.tl.perturb(control, model, name, context_key="line")
    assert found.obs["context"].tolist() == ["cells", "x"]
    assert found.obs["question"].tolist() == ["seen", "context"]
    assert found.obs["n_control_cells"].tolist() == [50, 25]
    assert found.uns["scdiva"]["perturb"]["n_left_out_cells"] == 5
    alone = sd.tl.perturb(control[5:30].copy(), model, name, context_key="line")
    assert np.allclose(alone.X[0], found.X[1], atol=1e-5)


def test_without_a_context_column_cells_are_of_the_only_context_of_training(control, model):
    found = sd.tl.perturb(control, model, model.perturbations[0].name)
    assert found.obs["context"].tolist() == ["cells"]
    several, data = treated_model()
    adata = to_adata(data)
    with pytest.raises(ConfigError, match="5 contexts: a, b"):  # whose cells they are is not known
        sd.tl.perturb(adata[data.is_control].copy(), several, "other")


def test_cells_unlike_those_of_training_are_a_new_context(control, model):
    stirred = control.copy()
    stirred.X = sp.csr_matrix(stirred.X)[:, np.random.default_rng(0).permutation(control.n_vars)]
    found = sd.tl.perturb(stirred, model, model.perturbations[0].name)
    assert found.obs["context"].tolist() == ["unlike the training cells"]
    assert found.obs["question"].tolist() == ["context"]
    assert np.isnan(found.layers["expected_error"]).all()


def test_library_sizes_are_those_of_training(screen, base, tmp_path):
    adata = screen.to_adata()
    adata.obs["n_umis"] = np.asarray(adata.X.sum(axis=1)).ravel() * 3.0
    found, _ = finetune_perturbation(
        adata, base, tmp_path / "run", **KEYS, library_size_key="n_umis", options=SIMPLE, cells=False, progress=False
    )
    name = found.perturbations[0].name
    kept = sd.tl.perturb(adata, found, name, **KEYS)
    named = sd.tl.perturb(adata, found, name, **KEYS, library_size_key="n_umis")
    assert np.array_equal(kept.layers["control_mean"], named.layers["control_mean"])
    del adata.obs["n_umis"]
    with pytest.raises(ConfigError, match="n_umis"):
        sd.tl.perturb(adata, found, name, **KEYS)


def test_drugs_do_not_pass_for_genes(screen, base, tmp_path):
    adata = screen.to_adata()
    is_control = adata.obs["perturbation"] == "control"
    adata.obs["drug"] = np.where(is_control, "control", "aspirin")
    with pytest.raises(ConfigError, match="kind treatment"):
        finetune_perturbation(
            adata, base, tmp_path / "run", perturbation_key="drug", control="control", options=SIMPLE, cells=False
        )
    assert not (tmp_path / "run").exists()


def test_a_combination_of_unseen_genes_is_no_surer_than_one_of_them(model, control, screen):
    unseen = [s for s in screen.vocabulary.symbol if s not in screen.pathway][:2]
    seen = sorted(screen.pathway)[0]
    found = sd.tl.perturb(control, model, [unseen[0], "+".join(unseen), f"{seen}+{unseen[0]}"])
    single, both, mixed = (np.median(row) for row in found.layers["expected_error"])
    assert both > single
    assert mixed > single


def to_adata(data: PerturbedCells) -> ad.AnnData:
    genes = vocabulary()
    obs = pd.DataFrame(
        {
            "perturbation": [data.perturbations[c].name for c in data.perturbation_code],
            "line": [data.contexts[c] for c in data.context_code],
        },
        index=[f"c{i}" for i in range(data.n_cells)],
    )
    var = pd.DataFrame({"ensembl_id": genes.ensembl_id}, index=genes.symbol.astype(str))
    return ad.AnnData(data.cells.counts.copy(), obs=obs, var=var)


def test_doses_and_names_of_drugs():
    model, data = treated_model()
    control = to_adata(data)[data.is_control].copy()
    found = sd.tl.perturb(control, model, ["drug@1", "drug@10", "drug@3", "drug+other"], context_key="line")
    a = found[found.obs["context"] == "a"]
    assert a.obs["question"].tolist() == ["seen", "seen", "seen", "combination"]
    low, high, between, both = a.X
    assert not np.allclose(low, high, atol=0.05)
    assert np.allclose(between, (low + high) / 2, atol=0.1)  # no dose of its own: what other doses do
    assert np.isfinite(both).all()
    with pytest.raises(UnsupportedError, match=r"'aspirin' was not in the training data.*drug, other"):
        sd.tl.perturb(control, model, "aspirin")
    with pytest.raises(UnsupportedError, match="no knockout was in the training data"):
        sd.tl.perturb(control, model, "drug", kind="knockout")


def test_control_cells_are_found_among_others(screen, model, control):
    everything = screen.to_adata()
    name = model.perturbations[0].name
    found = sd.tl.perturb(everything, model, name, **KEYS)
    assert found.uns["scdiva"]["perturb"]["n_left_out_cells"] == everything.n_obs - 80
    assert np.array_equal(found.X, sd.tl.perturb(control, model, name).X)
    assert control_cells(everything, model, **KEYS).names.tolist() == control.obs_names.tolist()
    with pytest.raises(SourceError, match=r"no cell.*ctrl.*control"):
        sd.tl.perturb(everything, model, name, perturbation_key="perturbation", control="ctrl")
    with pytest.raises(ConfigError, match="no column that has it"):
        sd.tl.perturb(everything, model, name, control="control")
    with pytest.raises(KeyNotFoundError):
        sd.tl.perturb(everything, model, name, perturbation_key="guide")
    with pytest.raises(KeyNotFoundError):
        sd.tl.perturb(everything, model, name, context_key="line")


def test_library_sizes_of_panels(model, control):
    control.obs["umis"] = np.asarray(control.X.sum(axis=1)).ravel() * 2.0
    name = model.perturbations[0].name
    found = sd.tl.perturb(control, model, name, library_size_key="umis")
    counts = control.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 5e3)
    assert np.allclose(found.layers["control_mean"][0], values.mean(axis=0), atol=1e-5)
    control.obs["umis"] = 1.0
    with pytest.raises(KeyNotFoundError, match="smaller than the sum"):
        sd.tl.perturb(control, model, name, library_size_key="umis")
    control.obs["umis"] = "many"
    with pytest.raises(ScdivaError):
        sd.tl.perturb(control, model, name, library_size_key="umis")


def test_cells_without_a_count_are_left_out_and_counted(model, control):
    empty = control.copy()
    empty.X = sp.csr_matrix(np.where(np.arange(80)[:, None] < 7, 0, control.X.toarray()))
    found = sd.tl.perturb(empty, model, model.perturbations[0].name)
    assert found.uns["scdiva"]["perturb"]["n_left_out_cells"] == 7
    assert found.obs["n_control_cells"].tolist() == [73]
    rest = sd.tl.perturb(control[7:].copy(), model, model.perturbations[0].name)
    assert np.allclose(found.layers["control_mean"], rest.layers["control_mean"], atol=1e-6)


def test_genes_that_are_not_measured_are_unknown_and_not_zero(model, control, screen):
    unseen = next(s for s in screen.vocabulary.symbol if s not in screen.pathway)
    lacking = control[:, 20:].copy()
    found, whole = (sd.tl.perturb(a, model, unseen) for a in (lacking, control))
    assert found.uns["scdiva"]["perturb"]["n_genes_not_measured"] == 20
    assert np.isnan(found.layers["control_mean"][0, :20]).all()
    assert np.isnan(found.layers["predicted_mean"][0, :20]).all()
    assert np.isfinite(found.layers["control_mean"][0, 20:]).all()
    assert np.isfinite(found.X).all()
    # of the other contexts' ridge regressions and of the state, next to nothing changes
    assert np.corrcoef(found.X[0], whole.X[0])[0, 1] > 0.95
    with pytest.raises(SourceError, match="lacks 100 of the 150 genes"):
        sd.tl.perturb(control[:, 100:].copy(), model, unseen)


# --- refusals ---


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("control", "control is no perturbation"),
        ("stat1x", "no gene of this model's vocabulary"),
        ("{0}+{1}+{2}", "3 targets"),
        ("{0}+nothing", "'nothing' is no gene"),
    ],
)
def test_what_cannot_be_answered_says_why(model, screen, control, asked, words):
    name = asked.format(*sorted(screen.pathway))
    with pytest.raises(UnsupportedError, match=words):
        sd.tl.perturb(control, model, name)


def test_other_impossible_questions(model, screen, control):
    with pytest.raises(ConfigError, match="no perturbation"):
        sd.tl.perturb(control, model, [])
    with pytest.raises(SourceError, match="empty label"):
        sd.tl.perturb(control, model, "")
    for kind in ("activation", "treatment"):
        with pytest.raises(UnsupportedError, match=f"no {kind} was in the training data"):
            sd.tl.perturb(control, model, sorted(screen.pathway)[0], kind=kind)
    with pytest.raises(SourceError):
        sd.tl.perturb(control[:0].copy(), model, sorted(screen.pathway)[0])
    with pytest.raises(UnsupportedError, match="has a dose, and none was in the training data"):
        sd.tl.perturb(control, model, sorted(screen.pathway)[0] + "@3")
    with pytest.raises(UnsupportedError, match="no control cell"):
        model.predict(model.perturbations[0], screen.data.cells.take(np.arange(0)), "cells")


def test_of_several_kinds_in_training_one_must_be_named(screen, base, control):
    data = screen.data
    mixed = tuple(
        Perturbation(p.targets, "activation") if i % 2 and len(p.targets) == 1 else p
        for i, p in enumerate(data.perturbations)
    )
    both = PerturbedCells(
        data.cells, mixed, data.perturbation_code, data.contexts, data.context_code, data.batches, data.batch_code
    )
    found = fit_perturbation(both, base, options=SIMPLE, progress=False)
    name = next(p.targets[0] for p in mixed if p.kind == "activation")
    with pytest.raises(ConfigError, match="activation and knockout"):
        sd.tl.perturb(control, found, name)
    assert sd.tl.perturb(control, found, name, kind="activation").obs["question"].tolist() == ["seen"]
    assert sd.tl.perturb(control, found, name, kind="knockout").obs["question"].tolist() == ["single"]


# --- files ---


def test_a_file_and_an_object_give_the_same(model, control, tmp_path):
    path, out = tmp_path / "control.h5ad", tmp_path / "out.h5ad"
    control.write_h5ad(path)
    before = path.read_bytes()
    names = [p.name for p in model.perturbations[:2]]
    returned = sd.tl.perturb_file(path, out, model, names)
    ours, written = sd.tl.perturb(control, model, names), ad.read_h5ad(out)
    for found in (returned, written):
        assert np.array_equal(found.X, ours.X)
        assert found.obs.astype(str).equals(ours.obs.astype(str))
        assert all(np.array_equal(found.layers[k], ours.layers[k], equal_nan=True) for k in ours.layers)
    assert path.read_bytes() == before
    with pytest.raises(OutputError, match="exists"):
        sd.tl.perturb_file(path, out, model, names)
    with pytest.raises(OutputError, match="h5ad"):
        sd.tl.perturb_file(path, tmp_path / "out.csv", model, names)
    with pytest.raises(OutputError, match="does not exist"):
        sd.tl.perturb_file(path, tmp_path / "no" / "out.h5ad", model, names)
    there = files_under(tmp_path)
    with pytest.raises(UnsupportedError):
        sd.tl.perturb_file(path, out, model, "no gene", overwrite=True)
    assert files_under(tmp_path) == there
    sd.tl.perturb_file(path, out, model, names[:1], overwrite=True)
    assert ad.read_h5ad(out).n_obs == 1


def test_fine_tuning_from_a_file(screen, base, tmp_path):
    path, out = tmp_path / "screen.h5ad", tmp_path / "run"
    screen.to_adata().write_h5ad(path)
    found, loaded = finetune_perturbation(
        path, base, out, **KEYS, context_key="cell_type", options=SIMPLE, cells=False, name="mine", progress=False
    )
    assert loaded.report.n_perturbations == 24
    assert found.name == "mine"
    assert found.bundle_hash
    assert found.details["control"] == ["control"]
    assert found.details["perturbation_key"] == "perturbation"
    assert found.details["base_model"]["name"] == "small"
    assert "screen" in found.details["description"]
    assert sorted(p.name for p in out.iterdir()) == ["bundle"]
    with pytest.raises(OutputError, match="exists"):
        finetune_perturbation(path, base, out, **KEYS, options=SIMPLE, cells=False, progress=False)
    # labels and context are those that the simulator's own arrays have: so are the predictions
    direct = fit_perturbation(screen.data, base, options=SIMPLE, progress=False)
    control = control_cells(path, found, **KEYS)
    for one, other in zip(
        perturb(control, found, found.perturbations[:3]).adata.X,
        perturb(control, direct, direct.perturbations[:3]).adata.X,
        strict=True,
    ):
        assert np.allclose(one, other, atol=1e-5)


def test_perturbed_cells_do_not_pass_for_control_cells(screen, base, control, tmp_path):
    adata = screen.to_adata()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("control", "ctrl")
    adata.obs = adata.obs.rename(columns={"perturbation": "condition"})
    found, _ = finetune_perturbation(
        adata, base, tmp_path / "run", layout="gears", options=SIMPLE, cells=False, progress=False
    )
    name = found.perturbations[0].name
    with pytest.raises(SourceError, match=r"600 cells .* are no control cells by \.obs\['condition'\]"):
        sd.tl.perturb(adata, found, name)
    # the name of control is that of training, unless told otherwise
    one = sd.tl.perturb(adata, found, name, perturbation_key="condition", context_key="cell_type")
    other = sd.tl.perturb(control, found, name, context_key="cell_type")
    assert np.array_equal(one.X, other.X)


def test_fine_tuning_that_fails_leaves_no_bundle(screen, base, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for wrong in ({"control": "ctrl"}, {"context_key": "line"}, {"batch_key": "lane"}):
        with pytest.raises(ScdivaError):
            finetune_perturbation(
                screen.to_adata(), base, out, **(KEYS | wrong), options=SIMPLE, cells=False, progress=False
            )
    assert not out.exists()
    monkeypatch.setattr(PerturbationModel, "from_pretrained", lambda *a, **k: pytest.fail("nothing was saved"))

    def fails(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        finetune_perturbation(screen.to_adata(), base, out, **KEYS, options=SIMPLE, cells=False, progress=False)
    assert not (out / "bundle").exists()
    assert not list(out.iterdir())


def test_single_cells_from_fine_tuning_to_file(screen, base, tmp_path, monkeypatch):
    from scdiva.tasks import fit_perturbed_cells

    monkeypatch.setattr(
        "scdiva.tasks.perturb.fit_cells",
        lambda *arguments, **options: fit_perturbed_cells.fit_cells(*arguments, n_steps=3, **options),
    )
    details = {**base.details, "trained_heads": ["anchor", "profile", "identity", "value"]}
    able = ScDiVa(base.network, base.config, base.vocabulary, base.statistics, details=details)
    path = tmp_path / "screen.h5ad"
    screen.to_adata().write_h5ad(path)
    found, _ = finetune_perturbation(path, able, tmp_path / "run", **KEYS, options=SIMPLE, progress=False)
    first, second = sorted(screen.pathway)[:2]
    control = control_cells(path, found, **KEYS)
    told = wanted_perturbations(found, [first], None)[0]
    drawn = found.draw(told, control.cells, n_cells=200, seed=1)
    assert (drawn.counts.data > 0).all()
    assert drawn.counts.dtype == np.int32
    # the mean of drawn cells is the one that is predicted
    effect = found.predict(told, control.cells)
    mean = np.asarray(found.reader.values(drawn).mean(axis=0)).ravel()
    wanted = np.maximum(effect.control_mean + effect.change, 0)[found.reader.panel]
    before = np.abs(wanted - effect.control_mean[found.reader.panel]).mean()
    assert np.abs(mean - wanted).mean() < 0.6 * before
    out = tmp_path / "effects.h5ad"
    sd.tl.perturb_file(path, out, found, [first, second], cells_out=tmp_path / "cells.h5ad", n_cells=7, seed=3, **KEYS)
    written = ad.read_h5ad(tmp_path / "cells.h5ad")
    python = sd.tl.perturb_cells(path, found, [first, second], 7, seed=3, **KEYS)
    assert (written.X != python.X).nnz == 0
    assert written.obs["perturbation"].astype(str).tolist() == [first] * 7 + [second] * 7
    assert set(written.obs["control_cell"]) <= set(control.names)
    with pytest.raises(ConfigError, match="n_cells"):
        sd.tl.perturb_file(path, tmp_path / "other.h5ad", found, first, n_cells=5, **KEYS)
    assert not (tmp_path / "other.h5ad").exists()


def test_a_model_of_means_draws_no_cells(model, screen):
    with pytest.raises(UnsupportedError, match="means only"):
        sd.tl.perturb_cells(screen.to_adata(), model, sorted(screen.pathway)[0], 5, **KEYS)
