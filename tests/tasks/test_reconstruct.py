from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import scdiva as sd
from scdiva.config import OfficialConfig
from scdiva.data.reader import open_counts
from scdiva.errors import BundleError, ConfigError, GeneError, KeyNotFoundError, OutputError, UntrainedHeadError
from scdiva.models.base import Reconstructor
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.official import OfficialNetwork
from scdiva.serialization import log1p_cp10k, serialize
from scdiva.tasks.reconstruct import (
    CEILING,
    COPY,
    LABEL,
    METRICS,
    NEIGHBOURS,
    NULL,
    ONE_UMI,
    POPULATION,
    hidden_tokens,
    reconstruct,
)

RATIOS = (0.2, 0.6, 1.0)


@pytest.fixture(scope="module")
def cells(_cells) -> ad.AnnData:
    return _cells[:40].copy()


@pytest.fixture(scope="module")
def reader(cells, tiny_trunk_model):
    return open_counts(cells, tiny_trunk_model.vocabulary)


@pytest.fixture(scope="module")
def result(reader, tiny_trunk_model):
    return reconstruct(reader, tiny_trunk_model, mask_ratios=RATIOS, labels_key="cell_type", layer_ratio=0.6)


@pytest.fixture(scope="module")
def published(tiny_model) -> ScDiVa:
    """A model of sequences of at most 30 genes."""
    config = OfficialConfig(architecture="official", n_layers=1, width=16, n_heads=2, n_hidden=16, max_tokens=30)
    network = OfficialNetwork(tiny_model.vocabulary.n_genes, config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return ScDiVa(network, config, tiny_model.vocabulary, tiny_model.statistics, details={"name": "published"})


class TestMasks:
    def test_of_a_cell_depend_on_seed_and_position_alone(self, reader):
        order = np.array([7, 30, 2, 11])
        together, alone = reader.read(order), [reader.read(order[i : i + 1]) for i in range(4)]
        masks = [hidden_tokens(cell, 0.4, seed=3) for cell in alone]
        np.testing.assert_array_equal(hidden_tokens(together, 0.4, seed=3), np.concatenate(masks))
        assert not np.array_equal(hidden_tokens(together, 0.4, seed=4), np.concatenate(masks))

    @pytest.mark.parametrize("ratio", [0.001, 0.15, 0.5, 1.0])
    def test_hide_exactly_so_many_and_at_least_one(self, ratio, reader):
        cells = reader.read(np.arange(40))
        is_hidden = hidden_tokens(cells, ratio, seed=0)
        for start, end in zip(cells.counts.indptr, cells.counts.indptr[1:], strict=False):
            assert is_hidden[start:end].sum() == max(1, round(ratio * (end - start)))

    def test_grow_with_the_share(self, reader):
        cells = reader.read(np.arange(40))
        less, more = (hidden_tokens(cells, ratio, seed=0) for ratio in (0.3, 0.7))
        assert more[less].all()
        assert 0.4 < less.sum() / more.sum() < 0.46


class TestTable:
    def test_has_every_method_at_every_share(self, result):
        methods = ["tiny", COPY, POPULATION, NEIGHBOURS, LABEL, NULL, CEILING, ONE_UMI]
        assert [(row.mask_ratio, row.method) for row in result.rows] == [(r, m) for r in RATIOS for m in methods]
        assert all(row.n_cells == 40 for row in result.rows)
        for row in result.rows:
            assert set(row.mean) <= set(METRICS)
            assert all(np.isfinite(value) for value in row.mean.values()), row
            assert row.saw_answer is (False if row.method in ("tiny", CEILING) else None)

    def test_copying_leaves_exactly_the_hidden_places_wrong(self, reader, result):
        n = np.diff(reader.read(np.arange(40)).counts.indptr)
        for ratio in RATIOS:
            row = result.row(ratio, COPY)
            assert row.mean["edits"] == pytest.approx(np.rint(ratio * n).mean())
            assert row.mean["recall"] == 0.0
        assert result.row(1.0, COPY).mean["rank_spearman"] == 0.0

    def test_ceilings_have_all_genes_and_the_null_control_few(self, result):
        for ratio in RATIOS:
            assert result.row(ratio, CEILING).mean["recall"] == 1.0
            assert result.row(ratio, CEILING).mean["rank_spearman"] > result.row(ratio, NULL).mean["rank_spearman"]
            assert result.row(ratio, POPULATION).mean["recall"] > result.row(ratio, NULL).mean["recall"] + 0.05
            assert result.row(ratio, NULL).mean["identity_nll"] > result.row(ratio, POPULATION).mean["identity_nll"]

    def test_of_random_genes_the_likelihood_is_that_of_a_uniform_draw(self, reader, result):
        # at a share of 1 all measured genes are admissible
        n_measured = reader.alignment.is_measured.sum()
        assert result.row(1.0, NULL).mean["identity_nll"] == pytest.approx(np.log(n_measured), abs=1e-3)

    def test_differences_are_those_of_the_means(self, result):
        for found in result.differences:
            ours, other = (result.row(found.mask_ratio, m).mean[found.metric] for m in (found.method, found.against))
            assert found.difference == pytest.approx(ours - other, abs=1e-9)
            assert found.low <= found.difference <= found.high

    def test_markdown_and_json_say_the_same(self, result):
        text, content = result.to_markdown(), json.loads(result.to_json())
        assert len(content["rows"]) == len(result.rows)
        recall = result.row(0.6, NEIGHBOURS).mean["recall"]
        assert f" {recall:.3f} |" in next(line for line in text.splitlines()[15:] if line.startswith("| kNN-50"))
        found = next(r for r in content["rows"] if (r["mask_ratio"], r["method"]) == (0.6, NEIGHBOURS))
        assert found["mean"]["recall"] == pytest.approx(recall)
        assert content["record"]["lat_saw_answer"] is False

    def test_what_batches_are_is_without_influence(self, reader, result, tiny_trunk_model):
        again = reconstruct(reader, tiny_trunk_model, mask_ratios=[0.6], labels_key="cell_type", batch_size=7)
        for row in again.rows:
            for name, value in result.row(0.6, row.method).mean.items():
                assert row.mean[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (row.method, name)

    def test_nor_is_the_order_of_genes_in_the_file(self, cells, result, tiny_trunk_model):
        turned = open_counts(cells[:, ::-1].copy(), tiny_trunk_model.vocabulary)
        again = reconstruct(turned, tiny_trunk_model, mask_ratios=[0.6])
        assert again.row(0.6, "tiny").mean == pytest.approx(dict(result.row(0.6, "tiny").mean), rel=1e-5)

    def test_a_choice_of_cells_is_fixed_by_the_seed(self, reader, tiny_trunk_model):
        few = [reconstruct(reader, tiny_trunk_model, mask_ratios=[0.5], n_cells=9, seed=s) for s in (1, 1, 2)]
        assert few[0].rows == few[1].rows
        assert few[0].row(0.5, COPY).n_cells == 9
        assert few[0].row(0.5, COPY).mean["edits"] != few[2].row(0.5, COPY).mean["edits"]


class Knowing:
    """A model that knows the answer: the hidden genes are certain, and so are their values."""

    n_places, token_order = None, "entropy"

    def __init__(self, model: ScDiVa, counts: np.ndarray, value: np.ndarray) -> None:
        self.vocabulary, self.statistics = model.vocabulary, model.statistics
        self.provenance = {**model.provenance, "model": "knowing"}
        self.counts, self.value = counts, value

    def predict_hidden(self, cells, is_hidden):
        rows = cells.cell_index

        class Said:
            log_odds = np.where(self.counts[rows] > 0, 20.0, -20.0).astype(np.float32)

            def expected_values(said, cell, gene):  # noqa: N805
                return self.value[rows[cell], gene]

            def value_nll(said, cell, gene, count):  # noqa: N805
                return None

        return {"": Said()}


def test_who_knows_the_answer_is_perfect(reader, tiny_trunk_model):
    counts = reader.read(np.arange(40))
    value = counts.counts.astype(np.float32)
    value.data = log1p_cp10k(counts)
    model = Knowing(tiny_trunk_model, counts.counts.toarray(), value.toarray())
    assert isinstance(model, Reconstructor)
    result = reconstruct(reader, model, mask_ratios=RATIOS, layer_ratio=0.6)
    for ratio in RATIOS:
        mean = result.row(ratio, "knowing").mean
        for name in ("bleu", "rank_spearman", "recall", "top1", "top5", "value_spearman", "value_pearson"):
            assert mean[name] == pytest.approx(1.0), name
        assert mean["edits"] == 0
        assert mean["value_mae"] == 0
        # each hidden gene is one of m equally certain ones
        n_hidden = np.rint(ratio * np.diff(counts.counts.indptr))
        assert mean["identity_nll"] == pytest.approx(np.log(n_hidden).mean(), abs=1e-3)
    inside = result.reconstructed[:, [c[0] for c in reader.alignment.source_of_gene().values()]]
    np.testing.assert_array_equal(inside.toarray(), value[:, list(reader.alignment.source_of_gene())].toarray())


class TestSequences:
    def test_of_a_published_model_are_marked_as_having_seen_the_answer(self, cells, published):
        result = reconstruct(open_counts(cells, published.vocabulary), published, mask_ratios=[0.5])
        saw = {row.method: row.saw_answer for row in result.rows if row.saw_answer is not None}
        for how in ("argmax", "no gene twice"):
            assert saw[f"published, LAT reads the answer, {how}"] is True
            assert saw[f"published, LAT reads visible tokens, {how}"] is False
        assert result.record["lat_saw_answer"] is True
        assert "| published, LAT reads the answer, argmax | **yes** |" in result.to_markdown()

    def test_a_cell_is_what_fits_the_model(self, cells, published):
        reader = open_counts(cells, published.vocabulary)
        counts = reader.read(np.arange(40))
        result = reconstruct(reader, published, mask_ratios=[0.5], layer_ratio=0.5)
        n = np.minimum(np.diff(counts.counts.indptr), 30)
        assert result.record["n_cut_cells"] == (np.diff(counts.counts.indptr) > 30).sum() > 0
        assert result.row(0.5, COPY).mean["edits"] == pytest.approx(np.rint(0.5 * n).mean())
        np.testing.assert_array_equal(np.diff(result.reconstructed.indptr), n)
        # what is visible is among the best-ranked genes, as observed
        best = serialize(counts, published.statistics, max_tokens=30)
        column = {gene: columns[0] for gene, columns in reader.alignment.source_of_gene().items()}
        observed = {column[g - 2]: v for g, v in zip(best.gene_id_BL[0], best.value_BL[0], strict=True) if g}
        row = result.reconstructed[0]
        same = [i for i, v in zip(row.indices, row.data, strict=True) if i in observed and v == observed[i]]
        assert len(same) >= n[0] - round(0.5 * n[0])

    def test_without_a_gene_twice_no_fewer_are_found(self, cells, published):
        result = reconstruct(open_counts(cells, published.vocabulary), published, mask_ratios=[0.7])
        argmax, distinct = (
            result.row(0.7, f"published, LAT reads visible tokens, {how}").mean for how in ("argmax", "no gene twice")
        )
        assert distinct["recall"] >= argmax["recall"]
        assert distinct["identity_nll"] == argmax["identity_nll"]
        assert {"place_top1", "place_top5"} <= set(argmax)


class TestWhatIsWritten:
    def test_record_and_layer(self, cells, tiny_trunk_model, result, tmp_path):
        adata = cells.copy()
        sd.tl.embed(adata, tiny_trunk_model)
        found = sd.tl.reconstruct(
            adata, tiny_trunk_model, mask_ratios=RATIOS, labels_key="cell_type", layer_ratio=0.6, key_added="again"
        )
        assert found.rows == result.rows
        assert (adata.layers["again"] != result.reconstructed).nnz == 0
        assert set(adata.uns["scdiva"]) == {"embed", "reconstruct"}
        record = adata.uns["scdiva"]["reconstruct"]["again"]
        assert record["layer_mask_ratio"] == 0.6
        adata.write_h5ad(tmp_path / "out.h5ad")
        table = ad.read_h5ad(tmp_path / "out.h5ad").uns["scdiva"]["reconstruct"]["again"]["table"]
        assert list(table["method"]) == [row.method for row in result.rows]
        np.testing.assert_allclose(table["recall"], [row.mean["recall"] for row in result.rows])

    def test_visible_genes_are_as_observed_and_as_many_are_restored_as_hidden(self, reader, result):
        counts = reader.read(np.arange(40))
        np.testing.assert_array_equal(np.diff(result.reconstructed.indptr), np.diff(counts.counts.indptr))
        is_hidden = hidden_tokens(counts, 0.6, seed=0)
        column = np.full(counts.n_genes, -1)
        for gene, columns in reader.alignment.source_of_gene().items():
            column[gene] = columns[0]
        cell = np.repeat(np.arange(40), np.diff(counts.counts.indptr))
        found = np.asarray(result.reconstructed[cell, column[counts.counts.indices]]).ravel()
        np.testing.assert_array_equal(found[~is_hidden], log1p_cp10k(counts)[~is_hidden])
        n_hit = (found[is_hidden] > 0).sum()
        recall = np.bincount(cell[is_hidden], found[is_hidden] > 0) / np.bincount(cell[is_hidden])
        assert n_hit < is_hidden.sum()
        assert result.row(0.6, "tiny").mean["recall"] == pytest.approx(recall.mean())

    @pytest.mark.parametrize("suffix", ["json", "md", "h5ad", "zarr"])
    def test_by_command_and_in_python_the_same(self, suffix, cells, tiny_trunk_model, tmp_path):
        from scdiva.cli.reconstruct import reconstruct as command

        cells.write_h5ad(tmp_path / "cells.h5ad")
        tiny_trunk_model.save_pretrained(tmp_path / "model")
        app = typer.Typer()
        app.command()(command)
        out = tmp_path / f"out.{suffix}"
        layer = ["--layer-at", "0.5"] if suffix in ("h5ad", "zarr") else []
        arguments = [tmp_path / "cells.h5ad", out, "--model", tmp_path / "model", "--mask-ratio", "0.5", *layer]
        done = CliRunner().invoke(app, [str(a) for a in [*arguments, "--cells", 40, "--device", "cpu"]])
        assert done.exit_code == 0, done.output
        model = ScDiVa.from_pretrained(tmp_path / "model", device="cpu")
        expected = sd.tl.reconstruct(cells.copy(), model, mask_ratios=[0.5], layer_ratio=0.5)
        assert f"| {expected.row(0.5, NEIGHBOURS).mean['recall']:.3f} |" in done.output
        if suffix == "json":
            rows = json.loads(out.read_text())["rows"]
            assert [row["mean"] for row in rows] == [pytest.approx(dict(row.mean)) for row in expected.rows]
        elif suffix == "md":
            assert out.read_text().splitlines()[3:] == expected.to_markdown().splitlines()[3:]
        else:
            written = getattr(ad, f"read_{suffix}")(out)
            assert (written.layers["scdiva_reconstructed"] != expected.reconstructed).nnz == 0
            record = written.uns["scdiva"]["reconstruct"]["scdiva_reconstructed"]
            np.testing.assert_allclose(record["table"]["recall"], expected.table()["recall"])


class TestReference:
    def test_other_cells_may_be_named(self, adata, cells, tiny_trunk_model):
        other = adata[40:100].copy()
        result = sd.tl.reconstruct(cells.copy(), tiny_trunk_model, mask_ratios=[0.5], reference=other)
        assert "60 cells" in result.record["reference"]
        alone = sd.tl.reconstruct(cells.copy(), tiny_trunk_model, mask_ratios=[0.5])
        assert alone.row(0.5, POPULATION).mean["recall"] != result.row(0.5, POPULATION).mean["recall"]
        assert alone.row(0.5, "tiny").mean == result.row(0.5, "tiny").mean


class TestEmptyCells:
    def test_are_counted_and_not_judged(self, cells, tiny_trunk_model, caplog):
        adata = cells.copy()
        has_counts = np.ones(40, dtype=adata.X.dtype)
        has_counts[[3, 8]] = 0
        adata.X = adata.X.multiply(has_counts[:, None]).tocsr()
        adata.X.eliminate_zeros()
        result = sd.tl.reconstruct(adata, tiny_trunk_model, mask_ratios=[0.5])
        assert (result.record["n_cells"], result.record["n_empty_cells"]) == (38, 2)
        assert "2 cells have no UMI" in caplog.text


class TestRefusals:
    @pytest.mark.parametrize("ratios", [[], [0.0], [1.1], [0.5, -1], [float("nan")]])
    def test_of_impossible_shares(self, ratios, reader, tiny_trunk_model):
        with pytest.raises(ConfigError, match="mask_ratios"):
            reconstruct(reader, tiny_trunk_model, mask_ratios=ratios)

    @pytest.mark.parametrize(
        "setting",
        [
            {"n_cells": 0},
            {"batch_size": 0},
            {"max_tokens": 0},
            {"layer_ratio": 0.3},
            {"layer_ratio": 0.5, "n_cells": 3},
        ],
    )
    def test_of_impossible_sizes(self, setting, reader, tiny_trunk_model):
        with pytest.raises(ConfigError):
            reconstruct(reader, tiny_trunk_model, mask_ratios=[0.5], **setting)

    def test_of_unknown_labels_other_genes_and_other_models(self, cells, reader, tiny_trunk_model):
        with pytest.raises(KeyNotFoundError, match="no_such"):
            reconstruct(reader, tiny_trunk_model, labels_key="no_such")
        smaller = tiny_trunk_model.restricted(np.arange(tiny_trunk_model.vocabulary.n_genes) < 150)
        with pytest.raises(GeneError, match="another vocabulary"):
            reconstruct(reader, smaller)
        with pytest.raises(BundleError, match="no model that says what is hidden"):
            sd.tl.reconstruct(cells.copy(), "scdiva-blood-tiny")  # type: ignore[arg-type]

    def test_of_untrained_heads(self, cells, tiny_trunk_model):
        details = {**tiny_trunk_model.details, "trained_heads": ["anchor", "identity"]}
        model = ScDiVa(
            tiny_trunk_model.network,
            tiny_trunk_model.config,
            tiny_trunk_model.vocabulary,
            tiny_trunk_model.statistics,
            details=details,
            labels=tiny_trunk_model.labels,
        )
        with pytest.raises(UntrainedHeadError, match="value"):
            sd.tl.reconstruct(cells.copy(), model)

    def test_of_outputs_before_any_work(self, h5ad, tiny_trunk_model, tmp_path):
        (tmp_path / "there.json").write_text("{}")
        for path, error in (("there.json", OutputError), ("x.csv", OutputError), ("no/x.json", OutputError)):
            with pytest.raises(error):
                sd.tl.reconstruct_file(h5ad, tmp_path / path, tiny_trunk_model)
        with pytest.raises(ConfigError, match=r"a layer in x\.json"):
            sd.tl.reconstruct_file(h5ad, tmp_path / "x.json", tiny_trunk_model, mask_ratios=[0.5], layer_ratio=0.5)
        assert (tmp_path / "there.json").read_text() == "{}"

    def test_of_a_layer_of_raw(self, cells, tiny_trunk_model):
        adata = cells.copy()
        adata.raw = cells.copy()
        with pytest.raises(OutputError, match=r"\.raw"):
            sd.tl.reconstruct(adata, tiny_trunk_model, mask_ratios=[0.5], layer_ratio=0.5, layer="raw")


def test_the_bundled_model_finds_more_than_frequencies_on_cells_it_never_saw(bundled_model):
    adata = sd.datasets.pbmc3k()
    result = sd.tl.reconstruct(adata, bundled_model, mask_ratios=[0.5], n_cells=24)
    ours, population, null = (result.row(0.5, m).mean["recall"] for m in (bundled_model.name, POPULATION, NULL))
    assert ours > population - 0.01 > null + 0.2
    assert result.record["n_cells"] == 24
