from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdiva.data.perturbation_sets import load_perturbed, load_published_perturbations
from scdiva.errors import ConfigError, KeyNotFoundError, ScaleError, SourceError
from scdiva.genes import GeneVocabulary

VOCABULARY = GeneVocabulary.default().subset(np.arange(300))
N_GENES = 250
A, B, C = VOCABULARY.symbol[[3, 5, 8]].tolist()
PLAIN = {"perturbation_key": "perturbation", "control": "control", "min_cells": 3}


def cells(labels, key="perturbation", **columns) -> ad.AnnData:
    """Cells of 250 genes of the vocabulary, with labels in a column of .obs."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(0.8, (len(labels), N_GENES)).astype(np.int32))
    obs = pd.DataFrame({key: labels, **columns}, index=[f"c{i}" for i in range(len(labels))])
    var = pd.DataFrame(index=VOCABULARY.symbol[:N_GENES].astype(str))
    return ad.AnnData(counts, obs=obs, var=var)


def names_of(loaded) -> list[str]:
    return [loaded.data.perturbations[p].name for p in loaded.data.perturbation_code]


def pair(one: str, other: str) -> str:
    return "+".join(sorted((one, other)))


class TestLayouts:
    def test_gears(self, tmp_path):
        adata = cells(["ctrl", f"{A}+ctrl", f"ctrl+{B}", f"{B}+{A}"] * 5, key="condition", cell_type="K562")
        counts = adata.X.copy()
        adata.layers["counts"] = counts.astype(np.float64)
        total = np.asarray(counts.sum(axis=1)).ravel()
        adata.X = sp.csr_matrix(sp.diags(1e4 / total) @ counts).log1p()
        adata.write_h5ad(tmp_path / "perturb_processed.h5ad")
        loaded = load_perturbed(tmp_path / "perturb_processed.h5ad", VOCABULARY, layout="gears", min_cells=3)
        assert names_of(loaded) == ["control", A, B, pair(A, B)] * 5
        assert loaded.data.contexts == ("K562",)
        assert (loaded.data.cells.counts[:, :N_GENES] != counts).nnz == 0
        assert loaded.report.counts_in == "layers['counts']: raw counts"
        assert dict(loaded.report.keys) == {"perturbation": "condition", "context": "cell_type"}
        assert (loaded.report.n_perturbations, loaded.report.n_combinations) == (3, 1)

    def test_scperturb(self):
        adata = cells(["control", A, f"{A}_{B}", f"{A}_guide"] * 5)
        loaded = load_perturbed(adata, VOCABULARY, layout="scperturb", min_cells=3)
        assert names_of(loaded) == ["control", A, pair(A, B), f"{A}_guide"] * 5
        assert loaded.report.unknown == ((f"{A}_guide", 5),)
        assert f"kept by name: 1: {A}_guide (5 cells)" in str(loaded.report)

    def test_replogle(self):
        adata = cells(["non-targeting", A, B] * 6, key="gene", gem_group=[1, 1, 1, 2, 2, 2] * 3)
        adata.obs["gene_transcript"] = [
            "10746_non-targeting_non-targeting_non-targeting",
            f"1_{A}_P1P2_{VOCABULARY.ensembl_id[3]}",
            f"2_{B}_P1_{VOCABULARY.ensembl_id[5]}",
        ] * 6
        by_gene = load_perturbed(adata, VOCABULARY, layout="replogle")
        by_guide = load_perturbed(adata, VOCABULARY, layout="replogle", perturbation_key="gene_transcript")
        assert names_of(by_gene) == names_of(by_guide) == ["control", A, B] * 6
        assert by_gene.data.batches == ("1", "2")
        assert by_gene.data.batch_code.tolist() == [0, 0, 0, 1, 1, 1] * 3

    def test_plain_with_contexts_batches_and_categories(self):
        adata = cells(
            pd.Categorical(["NT", A, "safe", pair(A, B)] * 4),
            key="target",
            line=["x"] * 8 + ["y"] * 8,
            lane=["1", "1", "2", "2"] * 4,
        )
        loaded = load_perturbed(
            adata, VOCABULARY, perturbation_key="target", control=["NT", "safe"], context_key="line", batch_key="lane",
            kind="activation", min_cells=2,
        )  # fmt: skip
        assert names_of(loaded) == ["control", A, "control", pair(A, B)] * 4
        assert loaded.data.perturbations[1].kind == "activation"
        assert loaded.data.contexts == ("x", "y")
        assert loaded.data.context_code.tolist() == [0] * 8 + [1] * 8
        assert loaded.is_scored.tolist() == [[False, False], [True, True], [True, True]]
        assert loaded.report.contexts == (("x", 8, 4), ("y", 8, 4))
        assert loaded.cell_names.tolist() == adata.obs_names.tolist()

    def test_doses_in_a_column(self):
        adata = cells(["veh", "drug", "drug", "veh"] * 3, dose=["0", "1.5", "3", "nan"] * 3)
        options = {"perturbation_key": "perturbation", "control": "veh", "kind": "treatment", "dose_key": "dose"}
        assert (
            names_of(load_perturbed(adata, VOCABULARY, **options)) == ["control", "drug@1.5", "drug@3", "control"] * 3
        )
        adata.obs["dose"] = ["0", "1.5 uM", "3", "nan"] * 3
        with pytest.raises(KeyNotFoundError, match=r"'1\.5 uM'"):
            load_perturbed(adata, VOCABULARY, **options)

    @pytest.mark.parametrize(("name", "kind"), [("norman", "activation"), ("Adamson", "knockout")])
    def test_published_sets(self, name, kind, tmp_path):
        adata = cells(["ctrl", f"{A}+ctrl"] * 10, key="condition", cell_type="line")
        adata.write_h5ad(tmp_path / "perturb_processed.h5ad")
        loaded = load_published_perturbations(name, tmp_path, VOCABULARY, min_cells=5)
        assert names_of(loaded) == ["control", A] * 10
        assert loaded.data.perturbations[1].kind == kind
        with pytest.raises(ConfigError, match="Adamson, Norman"):
            load_published_perturbations("Immune", tmp_path, VOCABULARY)


class TestNames:
    def test_a_target_is_called_as_its_own_column_is_aligned(self):
        vocabulary = GeneVocabulary.default()
        names = ["MARCH8", *vocabulary.symbol[:200].tolist()]
        counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (40, 201)).astype(np.int32))
        adata = ad.AnnData(counts, var=pd.DataFrame(index=names))
        adata.obs["perturbation"] = ["control", "MARCH8"] * 20
        loaded = load_perturbed(adata, vocabulary, **PLAIN)
        assert loaded.data.perturbations[1].targets == ("MARCHF8",)
        assert loaded.report.renamed == (("MARCH8", "MARCHF8"),)
        assert loaded.report.n_measured_targets == 1
        assert "MARCH8 to MARCHF8" in str(loaded.report)

    def test_a_missing_control_is_told_with_candidates(self):
        with pytest.raises(KeyNotFoundError, match="control='non-targeting'"):
            load_perturbed(cells(["non-targeting", A] * 5), VOCABULARY, **PLAIN)


class TestWhatIsLeftOut:
    def test_cells_without_label_are_refused_or_counted(self):
        adata = cells(["control", A, None, "nan", "control", A])
        with pytest.raises(SourceError, match="2 of 6 cells of the AnnData have no perturbation"):
            load_perturbed(adata, VOCABULARY, **PLAIN)
        loaded = load_perturbed(adata, VOCABULARY, drop_missing=True, **PLAIN)
        assert loaded.data.cells.cell_index.tolist() == [0, 1, 4, 5]
        assert loaded.cell_names.tolist() == ["c0", "c1", "c4", "c5"]
        assert loaded.report.dropped == (("without perturbation", 2),)
        assert "left out: 2 cells, without perturbation" in str(loaded.report)

    @pytest.mark.parametrize("use", ["context", "batch"])
    def test_cells_without_context_or_batch(self, use):
        adata = cells(["control", A] * 4, where=["x", "x", "x", "x", "y", "y", "", None])
        with pytest.raises(SourceError, match=f"2 of 8 cells of the AnnData have no {use}"):
            load_perturbed(adata, VOCABULARY, **PLAIN, **{f"{use}_key": "where"})
        loaded = load_perturbed(adata, VOCABULARY, drop_missing=True, **PLAIN, **{f"{use}_key": "where"})
        assert loaded.data.n_cells == 6

    def test_excluded_labels(self):
        adata = cells(["control", A, "enhancer_only", "control", A, B])
        loaded = load_perturbed(adata, VOCABULARY, exclude=["enhancer_only"], **PLAIN)
        assert names_of(loaded) == ["control", A, "control", A, B]
        assert (loaded.data.cells.counts[:, :N_GENES] != adata.X[[0, 1, 3, 4, 5]]).nnz == 0
        with pytest.raises(KeyNotFoundError, match="'enhancers'"):
            load_perturbed(adata, VOCABULARY, exclude=["enhancers"], **PLAIN)

    def test_empty_cells(self):
        adata = cells(["control", A, B, "control"])
        dense = adata.X.toarray()
        dense[2] = 0
        adata.X = sp.csr_matrix(dense)
        loaded = load_perturbed(adata, VOCABULARY, **PLAIN)
        assert names_of(loaded) == ["control", A, "control"]
        assert loaded.report.dropped == (("without a UMI", 1),)

    def test_too_few_cells_are_kept_but_not_scored(self):
        loaded = load_perturbed(cells(["control"] * 5 + [A] * 3 + [B] * 2), VOCABULARY, **PLAIN)
        scored = dict(zip([p.name for p in loaded.data.perturbations], loaded.is_scored[:, 0].tolist(), strict=True))
        assert scored == {"control": False, A: True, B: False}
        assert loaded.data.n_cells == 10
        assert (loaded.report.n_scored, loaded.report.n_unscored) == (1, 1)

    def test_contexts_with_too_few_control_cells_are_not_scored(self):
        adata = cells(["control"] * 4 + [A] * 8 + ["control"], line=["x"] * 8 + ["y"] * 5)
        loaded = load_perturbed(adata, VOCABULARY, context_key="line", **PLAIN)
        assert loaded.is_scored.tolist() == [[False, False], [True, False]]


class TestLibrarySize:
    def test_it_replaces_the_sum_of_the_panel(self):
        adata = cells(["control", A] * 4, n_umis=np.arange(8) + 1000)
        loaded = load_perturbed(adata, VOCABULARY, library_size_key="n_umis", **PLAIN)
        np.testing.assert_array_equal(loaded.data.cells.library_size, np.arange(8) + 1000)
        assert not any("panel" in note for note in loaded.report.notes)
        loaded = load_perturbed(adata, VOCABULARY, **PLAIN)
        np.testing.assert_array_equal(loaded.data.cells.library_size, np.asarray(adata.X.sum(axis=1)).ravel())
        assert any("library_size_key" in note for note in loaded.report.notes)

    def test_one_cell_with_less_than_its_counts_is_refused(self):
        adata = cells(["control", A] * 4, n_umis=1000)
        adata.obs.iloc[6, 1] = 10
        with pytest.raises(KeyNotFoundError, match="smaller than the sum of the counts in 1 of 8 cells"):
            load_perturbed(adata, VOCABULARY, library_size_key="n_umis", **PLAIN)


class TestBatches:
    CONFOUNDED = ("ctrl_run", "stim_run") * 6

    def test_batches_that_are_the_condition_are_refused(self):
        with pytest.raises(SourceError, match="either control cells only or perturbed cells only"):
            load_perturbed(cells(["control", A] * 6, run=self.CONFOUNDED), VOCABULARY, batch_key="run", **PLAIN)

    def test_or_left_out_with_a_word_about_it(self):
        loaded = load_perturbed(
            cells(["control", A] * 6, run=self.CONFOUNDED), VOCABULARY, batch_key="run", ignore_confounded_batch=True,
            **PLAIN,
        )  # fmt: skip
        assert loaded.data.batches == ("",)
        assert set(loaded.data.batch_code) == {0}
        assert "batches are not used, and a difference between batches counts as an effect" in str(loaded.report)

    def test_some_batches_without_control_are_told(self):
        adata = cells(["control", A, A, B] * 3, run=["1", "1", "2", "2"] * 3)
        loaded = load_perturbed(adata, VOCABULARY, batch_key="run", **PLAIN)
        assert "batches without control cells (6 cells): 2" in loaded.report.notes

    def test_contexts_that_are_the_condition_are_refused(self):
        with pytest.raises(SourceError, match=r"'run'.* both control and perturbed"):
            load_perturbed(cells(["control", A] * 6, run=self.CONFOUNDED), VOCABULARY, context_key="run", **PLAIN)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({}, ConfigError, "no perturbation_key"),
            ({"perturbation_key": "perturbation"}, ConfigError, "no control"),
            ({"layout": "geers"}, ConfigError, "gears, scperturb, replogle"),
            ({"layout": "gears"}, KeyNotFoundError, "'condition'"),
            ({**PLAIN, "context_key": "line"}, KeyNotFoundError, "'line'"),
            ({**PLAIN, "dose_key": "dose"}, KeyNotFoundError, "'dose'"),
            ({**PLAIN, "kind": "knockin"}, ConfigError, "'knockin'"),
            ({**PLAIN, "layer": "counts"}, KeyNotFoundError, "layer 'counts'"),
            ({**PLAIN, "control": ["control", A]}, SourceError, "all 8 cells of the AnnData are control cells"),
        ],
    )
    def test_arguments(self, options, error, text):
        with pytest.raises(error, match=text):
            load_perturbed(cells(["control", A] * 4), VOCABULARY, **options)

    def test_values_that_are_no_counts(self):
        adata = cells(["control", A] * 4)
        adata.X = adata.X * 1.1 + sp.csr_matrix(np.random.default_rng(0).random(adata.shape))
        with pytest.raises(ScaleError):
            load_perturbed(adata, VOCABULARY, **PLAIN)


@pytest.mark.shared
class TestRealFiles:
    def test_kang(self, shared_data):
        options = {
            "perturbation_key": "perturbation", "control": "control", "context_key": "cell_type", "kind": "treatment",
        }  # fmt: skip
        path, vocabulary = shared_data / "perturb_kang_ifnb.h5ad", GeneVocabulary.default()
        loaded = load_perturbed(path, vocabulary, **options)
        assert [p.name for p in loaded.data.perturbations] == ["control", "IFNB"]
        assert (loaded.data.n_cells, loaded.report.n_control, len(loaded.data.contexts)) == (2754, 1355, 9)
        # DC and Mk have fewer than 20 cells of either
        assert (loaded.report.n_scored, loaded.report.n_unscored) == (7, 2)
        with pytest.raises(SourceError, match="ignore_confounded_batch"):
            load_perturbed(path, vocabulary, batch_key="batch", **options)

    def test_papalexi(self, shared_data):
        loaded = load_perturbed(
            shared_data / "perturb_papalexi_eccite303.h5ad", GeneVocabulary.default(), layout="scperturb",
            library_size_key="n_umis_full", batch_key="batch",
        )  # fmt: skip
        assert (loaded.data.n_cells, loaded.report.n_control, loaded.report.n_perturbations) == (20729, 2386, 25)
        assert loaded.report.renamed == (("MARCH8", "MARCHF8"),)
        assert loaded.report.unknown == ()
        assert loaded.data.batches == ("rep_1", "rep_2", "rep_3")
        assert np.median(loaded.data.cells.library_size) > 20 * np.median(loaded.data.cells.counts.sum(axis=1).A1)
        assert loaded.is_scored[1:].all()

    def test_gasperini(self, shared_data):
        loaded = load_perturbed(
            shared_data / "perturb_gasperini_k562_tss366.h5ad", GeneVocabulary.default(), batch_key="batch",
            perturbation_key="perturbation", control="control", exclude=["enhancer_only"],
        )  # fmt: skip
        assert loaded.data.n_cells == 40002 - 2879
        singles = [p for p in loaded.data.perturbations if len(p.targets) == 1]
        assert len(singles) == 10
        assert loaded.report.n_combinations == loaded.report.n_perturbations - 10 == 45
        assert loaded.report.unknown == ()
        assert loaded.report.n_scored == 10
