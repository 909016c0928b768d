"""Generated cells: in memory, in files, resumed, and by command."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scdiva as sd
from conftest import files_under
from generating import generating
from scdiva.config import LoopConfig, OfficialConfig
from scdiva.errors import (
    BundleError,
    ConfigError,
    KeyNotFoundError,
    OutputError,
    SourceError,
    UnsupportedError,
    UntrainedHeadError,
)
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.model import build_network
from scdiva.tasks import generate as task
from scdiva.tasks.pretrain import adapt

FEW = sd.Sampler(n_steps=3)
TYPES = ("type 0", "type 1", "type 2")


@pytest.fixture(scope="module")
def model(tiny_trunk_model, _cells) -> ScDiVa:
    """A model that takes cell types, with a population."""
    return generating(tiny_trunk_model, _cells)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("generator") / "bundle"
    model.save_pretrained(path)
    return path


@pytest.fixture
def in_small_parts(monkeypatch):
    """Groups of 8 cells, and blocks of 16 in files."""
    monkeypatch.setattr(task, "GROUP", 8)
    monkeypatch.setattr(task, "BLOCK", 16)


def made(model, n_cells=20, **options) -> ad.AnnData:
    return sd.tl.generate(model, n_cells, **{"sampler": FEW, "condition": {"cell_type": "type 1"}, **options})


def assert_equal_cells(left: ad.AnnData, right: ad.AnnData) -> None:
    assert (left.X != right.X).nnz == 0
    assert left.X.dtype == right.X.dtype == np.int32
    pd.testing.assert_frame_equal(left.obs, right.obs)
    pd.testing.assert_frame_equal(left.var, right.var, check_names=False)


class TestWhatComesOut:
    def test_counts_labels_genes_and_the_record(self, model):
        cells = made(model, 30, weight=2.0, seed=5)
        assert cells.shape == (30, model.vocabulary.n_genes)
        assert cells.X.dtype == np.int32
        assert cells.X.format == "csr"
        assert cells.X.data.min() >= 1
        np.testing.assert_array_equal(np.diff(cells.X.indptr), cells.obs["scdiva_n_genes"])
        assert cells.obs["cell_type"].tolist() == ["type 1"] * 30
        assert cells.obs["scdiva_synthetic"].all()
        assert (cells.obs["scdiva_n_umis"] >= cells.obs["scdiva_n_genes"]).all()
        assert cells.obs_names.is_unique
        ids = {str(name) for name in model.vocabulary.ensembl_id}
        found = cells.var.get("ensembl_id", cells.var_names)
        assert list(found) == [str(name) for name in model.vocabulary.ensembl_id]
        assert set(found) == ids
        assert cells.var_names.is_unique
        record = cells.uns["scdiva"]["generate"]
        assert record["model"] == "tiny"
        assert record["vocabulary_fingerprint"] == model.vocabulary.fingerprint
        assert (record["seed"], record["n_cells"], record["latent"]) == (5, 30, "prior")
        assert record["guidance_weights"] == {"cell_type": 2.0}
        assert record["sampler"]["n_steps"] == 3
        assert list(record["notes"]) == []

    def test_genes_that_no_training_cell_measured_are_absent(self, model, adata):
        cells = made(model, 40)
        is_unmeasured = cells.var["scdiva_measured"] == 0
        assert is_unmeasured.sum() == 20  # of the vocabulary's genes, those that the synthetic cells lack
        assert cells.X[:, is_unmeasured.to_numpy()].nnz == 0

    def test_sizes_are_those_of_training_cells_of_the_type(self, model):
        cells = made(model, 20)
        sizes = model.population.sizes
        rows, _ = sizes.matching(np.array([2]))
        real = set(zip(sizes.n_genes[rows].tolist(), sizes.depth[rows].tolist(), strict=True))
        assert set(zip(cells.obs["scdiva_n_genes"], cells.obs["scdiva_n_umis"], strict=True)) <= real

    def test_cells_are_all_different_and_have_about_the_depth(self, model):
        cells = made(model, 70)
        assert len({cells.X[i].toarray().tobytes() for i in range(70)}) == 70
        found = np.asarray(cells.X.sum(axis=1)).ravel()
        assert 0.4 < found.mean() / cells.obs["scdiva_n_umis"].mean() < 2.5

    def test_normalised_values_on_request(self, model):
        cells = made(model, 5, normalize=True)
        counts = cells.X.toarray()
        expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(cells.layers["log1p_cp10k"].toarray(), expected, rtol=1e-5)

    def test_without_a_condition(self, model):
        cells = made(model, 10, condition=None)
        assert "cell_type" not in cells.obs
        assert cells.uns["scdiva"]["generate"]["guidance_weights"] == {}

    def test_a_model_without_trunk_generates_too(self, tiny_model, adata):
        cells = sd.tl.generate(generating(tiny_model, adata), 10, sampler=FEW)
        assert cells.X.nnz == cells.obs["scdiva_n_genes"].sum()

    def test_they_can_be_embedded_and_checked(self, model):
        cells = made(model, 12)
        sd.tl.embed(cells, model)
        assert cells.obsm["X_scdiva"].shape == (12, 8)


class TestRepeats:
    def test_a_seed_gives_the_same_cells(self, model):
        assert_equal_cells(made(model, seed=3), made(model, seed=3))

    def test_another_seed_gives_others(self, model):
        one, other = made(model, seed=3), made(model, seed=4)
        assert (one.X != other.X).nnz > one.X.nnz / 4
        assert one.obs["scdiva_n_genes"].tolist() != other.obs["scdiva_n_genes"].tolist()

    @pytest.mark.parametrize("batch_size", [1, 8, 9, 1000])
    def test_batch_size_changes_nothing(self, batch_size, model, in_small_parts):
        seen: list[int] = []
        cells = made(model, 30, batch_size=batch_size, on_block=seen.append)
        assert_equal_cells(cells, made(model, 30))
        assert seen[-1] == 30
        assert seen == sorted(seen)

    def test_the_callers_generators_are_not_touched(self, model):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - the global generator is what is tested
        expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        made(model, 5)
        assert torch.equal(torch.rand(2), expected[0])
        np.testing.assert_array_equal(np.random.rand(2), expected[1])  # noqa: NPY002

    def test_every_setting_shows(self, model):
        usual = made(model)
        for options in (
            {"condition": {"cell_type": "type 2"}},
            {"weight": 4.0},
            {"latent": "visible"},
            {"latent": "null"},
            {"sampler": sd.Sampler(n_steps=5)},
            {"sampler": sd.Sampler(n_steps=3, gibbs_rounds=1)},
            {"n_umis": 900},
            {"n_genes": 30},
        ):
            assert (made(model, **options).X != usual.X).nnz > 0, options


class TestConditions:
    def test_a_table_with_a_row_per_cell(self, model):
        labels = ["type 2", "type 0", None, "type 2", "type 1"] * 4
        cells = made(model, None, condition=pd.DataFrame({"cell_type": labels}))
        assert cells.n_obs == 20
        found = [None if pd.isna(label) else label for label in cells.obs["cell_type"]]
        assert found == labels
        sizes = model.population.sizes
        for code, kind in enumerate(TYPES, start=1):
            rows, _ = sizes.matching(np.array([code]))
            of_kind = cells.obs.loc[cells.obs["cell_type"] == kind, "scdiva_n_genes"]
            assert set(of_kind) <= set(sizes.n_genes[rows])

    def test_a_table_is_as_good_as_one_label(self, model):
        table = pd.DataFrame({"cell_type": pd.Categorical(["type 1"] * 20, categories=TYPES)}, index=range(50, 70))
        assert_equal_cells(made(model, condition=table), made(model))

    def test_cells_are_most_like_their_type(self, model, adata):
        """By the likelihood of their counts under the mean profiles of real cells."""
        symbols = [name for name in adata.var_names if name in set(model.vocabulary.symbol)]
        column = {str(s): i for i, s in enumerate(model.vocabulary.symbol)}
        log_share = np.log(
            np.stack([
                np.asarray(adata[(adata.obs["cell_type"] == kind).to_numpy(), symbols].X.sum(axis=0)).ravel() + 1.0
                for kind in TYPES
            ])
        )  # fmt: skip
        log_share -= np.log(np.exp(log_share).sum(axis=1, keepdims=True))
        hits = []
        for i, kind in enumerate(TYPES):
            cells = made(model, 30, condition={"cell_type": kind}, sampler=sd.Sampler(n_steps=6))
            counts = cells.X.toarray()[:, [column[s] for s in symbols]]
            hits.append((counts @ log_share.T).argmax(axis=1) == i)
        assert np.mean(hits) > 0.8

    @pytest.mark.parametrize(
        ("condition", "words"),
        [
            ({"tissue": "lung"}, ["tissue", "cell_type"]),
            ({"cell_type": "type 9"}, ["type 9", "type 0", "type 1", "type 2"]),
            ({"celltype": "type 1"}, ["celltype", "cell_type"]),
            (pd.DataFrame({"cell_type": ["type 1", "type 7"]}), ["type 7", "type 0"]),
            (pd.DataFrame({"kind": ["type 1"]}), ["kind", "cell_type"]),
        ],
    )
    def test_what_the_model_does_not_know_is_refused_with_what_it_knows(self, condition, words, model):
        with pytest.raises(KeyNotFoundError) as error:
            made(model, None if isinstance(condition, pd.DataFrame) else 5, condition=condition)
        for word in words:
            assert word in str(error.value)

    def test_a_combination_that_no_training_cell_had_is_told(self, tiny_trunk_model, adata):
        from scdiva.data.conditions import ConditionLabels
        from scdiva.models.scdiva.init import grow

        cells = adata.copy()
        cells.obs["lane"] = np.where(cells.obs["cell_type"] == "type 0", "left", "right")
        of = tiny_trunk_model
        labels = of.labels.merged(ConditionLabels((("lane", ("left", "right")),)))
        network = build_network(of.vocabulary.n_genes, of.config, labels).eval()
        grow(network, of, labels)
        two = generating(
            ScDiVa(network, of.config, of.vocabulary, of.statistics, details=of.details, labels=labels), cells
        )
        cells = made(two, 8, condition={"cell_type": "type 0", "lane": "right"})
        (note,) = cells.uns["scdiva"]["generate"]["notes"]
        assert "cell_type=type 0 and lane=right" in note
        assert "without regard to cell_type" in note
        known = made(two, 8, condition={"cell_type": "type 0", "lane": "left"}, weight={"lane": 3.0})
        assert list(known.uns["scdiva"]["generate"]["notes"]) == []
        assert known.uns["scdiva"]["generate"]["guidance_weights"] == {"cell_type": 1.0, "lane": 3.0}


class TestSizes:
    def test_given_numbers(self, model):
        cells = made(model, 6, n_genes=[5, 6, 7, 8, 9, 10], n_umis=400)
        assert cells.obs["scdiva_n_genes"].tolist() == np.diff(cells.X.indptr).tolist() == [5, 6, 7, 8, 9, 10]
        assert (cells.obs["scdiva_n_umis"] == 400).all()

    def test_each_gene_has_at_least_one_molecule(self, model):
        cells = made(model, 6, n_genes=50, n_umis=10)
        assert (cells.obs["scdiva_n_umis"] == 50).all()

    def test_deeper_cells_have_more_counts(self, model):
        few, many = (np.asarray(made(model, 40, n_genes=60, n_umis=n).X.sum(axis=1)).mean() for n in (100, 3000))
        assert many > 3 * few

    def test_all_measured_genes_and_one_more(self, model):
        n = int(model.population.sizes.is_measured.sum())
        assert made(model, 2, n_genes=n).X.nnz == 2 * n
        with pytest.raises(ConfigError, match=f"at most {n}"):
            made(model, 2, n_genes=n + 1)


class TestVariations:
    def test_of_given_cells(self, model, adata):
        cells = sd.tl.generate(model, like=adata[:10].copy(), sampler=FEW)
        assert cells.n_obs == 10
        measured = adata[:, adata.var["ensembl_id"].isin(set(map(str, model.vocabulary.ensembl_id)))].X[:10]
        np.testing.assert_array_equal(cells.obs["scdiva_n_genes"], np.diff(measured.indptr))
        np.testing.assert_array_equal(cells.obs["scdiva_n_umis"], np.asarray(measured.sum(axis=1)).ravel())
        assert cells.uns["scdiva"]["generate"]["latent"] == "given cells"

    def test_several_of_each(self, model, adata):
        cells = sd.tl.generate(model, 25, like=adata[:10].copy(), sampler=FEW)
        n = cells.obs["scdiva_n_genes"].to_numpy()
        np.testing.assert_array_equal(n[10:20], n[:10])
        assert (cells.X[:10] != cells.X[10:20]).nnz > 0

    def test_groups_that_are_drawn_after_each_other_differ(self, model, adata, in_small_parts):
        # the same cell again and again: nothing but the random stream tells the groups of 8 apart
        cells = sd.tl.generate(model, 24, like=adata[:1].copy(), sampler=FEW)
        assert len({cells.X[i].toarray().tobytes() for i in range(24)}) == 24

    def test_they_resemble_their_cells_more_than_others(self, model, adata):
        real = adata[:60].copy()
        cells = sd.tl.generate(model, like=real, sampler=sd.Sampler())
        sd.tl.embed(real, model)
        sd.tl.embed(cells, model)
        a, b = (x.obsm["X_scdiva"] for x in (real, cells))
        distance = np.linalg.norm(a[:, None] - b[None], axis=2)
        own, others = np.diag(distance), distance[~np.eye(60, dtype=bool)]
        assert own.mean() < 0.9 * others.mean()

    def test_they_need_no_population_and_can_be_conditioned(self, tiny_trunk_model, adata):
        cells = sd.tl.generate(
            tiny_trunk_model, like=adata[:6].copy(), condition={"cell_type": "type 2"}, weight=2.0, sampler=FEW
        )
        assert cells.obs["cell_type"].tolist() == ["type 2"] * 6

    def test_library_sizes_go_with_the_depth_that_is_asked_for(self, model, adata):
        from scdiva.data.reader import open_counts

        counts = open_counts(adata, model.vocabulary).read(np.arange(10))
        assert (counts.library_size > np.asarray(counts.counts.sum(axis=1)).ravel()).any()
        usual, deep = (task.plan_cells(model, None, None, like=counts, n_umis=n) for n in (None, 4000))
        np.testing.assert_allclose(usual.sizes.library_size, counts.library_size)
        share = usual.sizes.depth / usual.sizes.library_size
        np.testing.assert_allclose(deep.sizes.depth / deep.sizes.library_size, share)
        np.testing.assert_array_equal(deep.z_depth, usual.z_depth)  # z is of the cells as they are

    def test_cells_without_counts_are_refused(self, model, adata):
        counts = adata.X.toarray()
        counts[3] = 0
        adata.X = counts
        with pytest.raises(ConfigError, match="1 of the given cells"):
            sd.tl.generate(model, like=adata, sampler=FEW)


class Fixed:
    """A prior that draws one z."""

    view_share = 1.0

    def __init__(self, z: np.ndarray) -> None:
        self.z = z

    def sample(self, condition, sizes, rng):
        return np.tile(self.z, (condition.shape[0], 1))


class TestLatentPriors:
    def test_any_object_that_draws_z(self, model):
        z = np.zeros(8, dtype=np.float32)
        one, same, other = (made(model, latent=Fixed(value)) for value in (z, z, z + 3))
        assert_equal_cells(one, same)
        assert (one.X != other.X).nnz > 0
        assert one.uns["scdiva"]["generate"]["latent"] == "Fixed"

    @pytest.mark.parametrize("z", [np.zeros(7), np.full(8, np.nan)])
    def test_z_that_is_not_of_the_model_is_refused(self, z, model):
        with pytest.raises(ConfigError, match="Fixed drew z"):
            made(model, latent=Fixed(z))


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n_cells": 0}, "n_cells=0"),
            ({"n_cells": -3}, "n_cells=-3"),
            ({"n_cells": None}, "n_cells=0"),
            ({"seed": -1}, "seed=-1"),
            ({"weight": -1.0}, "0 or more"),
            ({"weight": float("nan")}, "0 or more"),
            ({"weight": {"cell_type": 2.0}, "condition": None}, "no condition"),
            ({"n_genes": 0}, "smallest 0"),
            ({"n_genes": 10_000}, "at most"),
            ({"n_genes": 3.5}, "float64"),
            ({"n_genes": "many"}, "n_genes"),
            ({"n_umis": [5, 6]}, "one whole number"),
            ({"n_umis": [[5]] * 4}, "one whole number"),
            ({"latent": "best"}, "latent='best'"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"condition": pd.DataFrame({"cell_type": ["type 1"] * 3})}, "conditions of 3 cells"),
            ({"n_cells": None, "condition": pd.DataFrame({"cell_type": []})}, "n_cells=0"),
            ({"sampler": sd.Sampler(n_steps=0)}, "n_steps=0"),
            ({"sampler": sd.Sampler(gibbs_share=1.5)}, "gibbs_share"),
            ({"sampler": sd.Sampler(gibbs_rounds=-1)}, "gibbs_rounds"),
            ({"sampler": sd.Sampler(selection_noise=-1)}, "selection_noise"),
            ({"sampler": sd.Sampler(remask=0.1)}, "remask with random"),
            ({"sampler": sd.Sampler("best")}, "a strategy"),
            ({"sampler": sd.Sampler(grid="linear")}, "grid='linear'"),
        ],
    )  # fmt: skip
    def test_impossible_wishes(self, options, words, model):
        with pytest.raises(ConfigError, match=words):
            made(model, **{"n_cells": 4, **options})

    def test_a_weight_for_an_unknown_field(self, model):
        with pytest.raises(KeyNotFoundError, match="cell_type"):
            made(model, weight={"tissue": 2.0})

    def test_a_bundle_without_a_population(self, tiny_trunk_model, tmp_path):
        tiny_trunk_model.save_pretrained(tmp_path / "old")
        old = ScDiVa.from_pretrained(tmp_path / "old", device="cpu")
        with pytest.raises(BundleError, match=r"population\.npz.*finetune"):
            made(old)

    def test_untrained_heads(self, model):
        details = {**model.details, "trained_heads": ["anchor", "profile_decoder"]}
        untrained = ScDiVa(model.network, model.config, model.vocabulary, model.statistics, details=details,
                           labels=model.labels, population=model.population)  # fmt: skip
        with pytest.raises(UntrainedHeadError, match="identity and the value"):
            made(untrained)

    def test_a_published_model(self, model):
        config = OfficialConfig(architecture="official", n_layers=1, width=8, n_heads=2, n_hidden=8, max_tokens=16)
        network = build_network(model.vocabulary.n_genes, config)
        official = ScDiVa(network, config, model.vocabulary, model.statistics, details={"name": "published"})
        with pytest.raises(UnsupportedError, match="does not do generation"):
            sd.tl.generate(official, 3)


class TestFiles:
    @pytest.mark.parametrize("kind", ["h5ad", "zarr"])
    @pytest.mark.parametrize("n_cells", [10, 53])
    def test_equal_what_is_made_in_memory(self, kind, n_cells, model, in_small_parts, tmp_path):
        path = tmp_path / f"cells.{kind}"
        plan = sd.tl.generate_file(path, model, n_cells, condition={"cell_type": "type 1"}, sampler=FEW, seed=2)
        assert plan.n_cells == n_cells
        found, expected = getattr(ad, f"read_{kind}")(path), made(model, n_cells, seed=2)
        assert_equal_cells(found, expected)
        assert found.X.format == "csr"
        record, other = (x.uns["scdiva"]["generate"] for x in (found, expected))
        assert set(record) == set(other)
        for key in ("seed", "n_cells", "latent", "model", "vocabulary_fingerprint"):
            assert record[key] == other[key]
        assert record["sampler"]["strategy"] == "random"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing waits beside it

    @pytest.mark.parametrize("kind", ["h5ad", "zarr"])
    def test_an_interrupted_call_resumes(self, kind, model, in_small_parts, tmp_path):
        path = tmp_path / f"cells.{kind}"
        options = {"condition": {"cell_type": "type 1"}, "sampler": FEW, "seed": 2}

        def stop(done: int) -> None:
            if done >= 40:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sd.tl.generate_file(path, model, 53, on_block=stop, **options)
        assert not path.exists()
        (parts,) = tmp_path.iterdir()
        assert parts.name.startswith(f".cells.{kind}.parts-")
        assert len(list(parts.iterdir())) == 2  # finished blocks of 16, and no half of a third
        drawn: list[int] = []
        draw = ScDiVa.draw

        def counted(self, wish, *arguments, **keywords):
            drawn.append(wish.depth.size)
            return draw(self, wish, *arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScDiVa, "draw", counted)
            sd.tl.generate_file(path, model, 53, **options)
        assert sum(drawn) == 53 - 32
        assert_equal_cells(getattr(ad, f"read_{kind}")(path), made(model, 53, seed=2))
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_what_was_asked_otherwise_is_not_resumed(self, model, tiny_model, in_small_parts, tmp_path):
        def plan(of=model, **options):
            full = {"condition": {"cell_type": "type 1"}, "sampler": FEW, **options}
            return task.fingerprint(of, task.plan_cells(of, full.pop("condition"), full.pop("n_cells", 20), **full))

        usual = plan()
        assert plan() == usual
        changed = [
            {"condition": {"cell_type": "type 2"}}, {"seed": 1}, {"n_cells": 21}, {"weight": 2.0}, {"n_genes": 7},
            {"n_umis": 700}, {"latent": "null"}, {"sampler": sd.Sampler(n_steps=4)}, {"latent": Fixed(np.zeros(8))},
            {"latent": Fixed(np.ones(8))},
        ]  # fmt: skip
        names = [plan(**options) for options in changed]
        assert len({usual, *names}) == len(names) + 1

    def test_another_model_that_was_never_saved_is_not_resumed(self, model):
        from copy import deepcopy

        network = deepcopy(model.network)
        with torch.no_grad():
            network.log_theta[0] += 1
        other = ScDiVa(network, model.config, model.vocabulary, model.statistics, details=model.details,
                       labels=model.labels, population=model.population)  # fmt: skip
        assert model.bundle_hash == other.bundle_hash == ""
        one, two = (task.fingerprint(m, task.plan_cells(m, None, 20, latent="visible")) for m in (model, other))
        assert one != two

    @pytest.mark.parametrize("kind", ["h5ad", "zarr"])
    def test_an_error_while_writing_leaves_what_was_there(self, kind, model, in_small_parts, tmp_path, monkeypatch):
        path = tmp_path / f"cells.{kind}"
        options = {"sampler": FEW, "overwrite": True}
        sd.tl.generate_file(path, model, 20, **options)
        before = files_under(tmp_path)

        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("anndata.io.write_elem", fail)
            with pytest.raises(OSError, match="no space"):
                sd.tl.generate_file(path, model, 30, seed=1, **options)
        after = files_under(tmp_path)
        kept = {name: content for name, content in after.items() if not name.startswith(f".cells.{kind}.parts-")}
        assert kept == before  # the drawn blocks wait for the next call
        assert len(after) > len(before)
        sd.tl.generate_file(path, model, 30, seed=1, **options)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert getattr(ad, f"read_{kind}")(path).n_obs == 30

    def test_outputs_are_refused_before_any_work(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(ScDiVa, "draw", lambda *a, **k: pytest.fail("worked"))
        (tmp_path / "there.h5ad").write_text("precious")
        for name in ("there.h5ad", "cells.csv", "no/folder.h5ad"):
            with pytest.raises(OutputError):
                sd.tl.generate_file(tmp_path / name, model, 3)
        assert (tmp_path / "there.h5ad").read_text() == "precious"

    def test_variations_of_the_cells_of_a_file(self, model, h5ad, adata, tmp_path):
        sd.tl.generate_file(tmp_path / "o.h5ad", model, like=h5ad, sampler=FEW)
        assert_equal_cells(ad.read_h5ad(tmp_path / "o.h5ad"), sd.tl.generate(model, like=adata, sampler=FEW))
        with pytest.raises(SourceError):
            sd.tl.generate(model, like=tmp_path / "absent.h5ad")


class TestFineTuned:
    """A model that was fine-tuned with conditions can generate."""

    LOOP = LoopConfig.model_validate(
        {
            "data": {"heldout_fraction": 0.2},
            "optim": {"lr": 1e-2, "gene_lr_ratio": 2.0, "warmup_steps": 1, "ema_decay": 0.5},
            "training": {"max_steps": 3, "batch_size": 16, "validate_every": 1, "device": "cpu", "precision": "fp32"},
        }
    )

    @pytest.fixture(autouse=True)
    def few_cells_settle_the_depth(self, monkeypatch):
        monkeypatch.setattr("scdiva.tasks.pretrain._SETTLING_CELLS", 64)

    def test_its_bundle_has_a_population_of_the_training_cells(self, tiny_trunk_model, adata, tmp_path):
        adata.obs["lane"] = np.where(np.arange(120) % 3 == 0, "left", "right")
        trained = adapt(
            adata,
            tiny_trunk_model,
            tmp_path / "run",
            config=self.LOOP,
            conditions=["cell_type", "lane"],
            progress=False,
        )
        population = trained.model.population
        assert population is not None
        assert population.sizes.n_records == 96  # held-out cells are none of them
        assert population.sizes.condition.shape[1] == 2
        assert set(map(tuple, population.prior.condition.tolist())) == {(t, lane) for t in (1, 2, 3) for lane in (1, 2)}
        cells = sd.tl.generate(
            trained.model, 12, condition={"cell_type": "type 0", "lane": "left"}, weight={"lane": 2.0}, sampler=FEW
        )
        assert (np.diff(cells.X.indptr) == cells.obs["scdiva_n_genes"]).all()
        again = adapt(
            adata,
            tiny_trunk_model,
            tmp_path / "run",
            config=self.LOOP,
            conditions=["cell_type", "lane"],
            progress=False,
        )
        assert again.model.bundle_hash == trained.model.bundle_hash  # calibration and population repeat

    def test_calibration_makes_genes_as_frequent_as_they_are(self, tiny_trunk_model, adata, tmp_path):
        """A run moves the offsets of genes too little: without calibration, genes ten times as frequent stay rare."""
        counts = adata.X.toarray()
        rare = np.argsort((counts > 0).sum(axis=0))[:6]
        counts[:, rare] = 3
        adata.X = counts
        trained = adapt(
            adata, tiny_trunk_model, tmp_path / "run", config=self.LOOP, conditions=["cell_type"], progress=False
        ).model
        column = {str(name): i for i, name in enumerate(trained.vocabulary.ensembl_id)}
        genes = [column[name] for name in adata.var["ensembl_id"].iloc[rare] if name in column]
        assert len(genes) > 3
        detected = {
            name: (made(m, 60, sampler=sd.Sampler()).X[:, genes] > 0).mean()
            for name, m in (("before", generating(tiny_trunk_model, adata)), ("after", trained))
        }
        assert detected["after"] > detected["before"] + 0.2
        assert detected["after"] > 0.5

    def test_a_model_that_learns_no_heads_is_not_calibrated(self, tiny_trunk_model, adata, tmp_path):
        from scdiva.config import NativeObjectiveConfig

        for weights, heads in (
            ({"value_weight": 0.0}, {"identity"}),
            ({"identity_weight": 0.0, "value_weight": 0.0}, set()),
        ):
            trained = adapt(
                adata, tiny_trunk_model, tmp_path / str(len(heads)), config=self.LOOP, conditions=["cell_type"],
                objective=NativeObjectiveConfig(**weights), progress=False,
            ).model  # fmt: skip
            assert set(trained.details["trained_heads"]) == {"anchor", "profile_decoder", *heads}
            with pytest.raises(UntrainedHeadError):
                made(trained, 3)
