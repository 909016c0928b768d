from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiva as sd
from scdiva.errors import KeyNotFoundError, SourceError
from scdiva.genes import GeneVocabulary


@pytest.fixture
def by_hand() -> ad.AnnData:
    """Four cells and nine features whose fate is known."""
    features = {
        "CD3D": [5, 0, 2, 0],  # current symbol
        "MS4A1": [0, 4, 0, 0],  # current symbol
        "GAPDH": [10, 10, 0, 0],  # current symbol
        "ENSG00000167286": [1, 0, 0, 0],  # CD3D again, by id: summed
        "probe_7": [0, 6, 0, 1],  # unknown
        "NOT-A-GENE": [0, 0, 2, 0],  # unknown
        "2-Sep": [1, 0, 0, 0],  # a spreadsheet's SEPT2
        "CD19_TotalSeq": [99, 99, 99, 99],  # antibody
        "GAPDH_protein": [99, 99, 99, 99],  # antibody
    }
    counts = np.array(list(features.values())).T
    kind = ["Gene Expression"] * 7 + ["Antibody Capture"] * 2
    var = pd.DataFrame({"feature_types": kind}, index=list(features))
    return ad.AnnData(sp.csr_matrix(counts), var=var, obs=pd.DataFrame(index=["a", "b", "c", "d"]))


def test_the_numbers_are_those_counted_by_hand(by_hand):
    report = sd.pp.check(by_hand)
    assert report.is_usable
    assert report.problem is None
    assert (report.n_cells, report.n_features, report.n_genes) == (4, 9, 7)
    assert report.counts_in == "X: raw counts"
    # 42 UMIs in genes; 7 + 4 + 20 + 1 = 32 of them in the vocabulary
    assert report.coverage == pytest.approx(32 / 42)
    genes = report.genes
    assert (genes["by_symbol"], genes["by_id"], genes["missing"], genes["not_genes"]) == (3, 1, 3, 2)
    assert (genes["n_used"], genes["n_genes"], genes["n_merged"], genes["n_excel_damaged"]) == (4, 3, 1, 1)
    assert list(report.largest_unmatched.items()) == [
        ("probe_7", pytest.approx(7 / 42)), ("NOT-A-GENE", pytest.approx(2 / 42)), ("2-Sep", pytest.approx(1 / 42)),
    ]  # fmt: skip
    sizes = [17, 20, 4, 1]
    assert (report.library_size.minimum, report.library_size.median, report.library_size.maximum) == (
        1, np.median(sizes), 20,
    )  # fmt: skip
    n_genes = [4, 3, 2, 1]
    assert (report.genes_per_cell.minimum, report.genes_per_cell.median, report.genes_per_cell.maximum) == (
        1, np.median(n_genes), 4,
    )  # fmt: skip
    assert report.n_empty_cells == 1  # the last cell has counts in an unknown gene only
    assert report.vocabulary_fingerprint == GeneVocabulary.default().fingerprint
    text = " ".join(report.warnings)
    assert "1 cells have no UMI" in text
    assert "spreadsheet" in text


def test_too_little_coverage_is_a_verdict_with_the_full_report(by_hand):
    report = sd.pp.check(by_hand, min_coverage=0.9)
    assert not report.is_usable
    assert set(report.problem) == {"found", "expected", "fix"}
    assert "76.2%" in report.problem["found"]
    assert report.coverage == pytest.approx(32 / 42)
    assert sd.pp.check(by_hand, min_coverage=0.7).is_usable


def test_a_scale_that_stands_in_the_way_is_a_verdict(adata):
    adata.X = adata.X.toarray() - 1.5
    report = sd.pp.check(adata)
    assert not report.is_usable
    assert "negative" in report.problem["found"]
    assert (report.n_cells, report.n_features) == (120, 200)
    assert report.coverage is None


def test_mouse_genes_are_a_verdict(adata):
    del adata.var["ensembl_id"]
    adata.var_names = [f"ENSMUSG{i:011d}" for i in range(200)]
    report = sd.pp.check(adata)
    assert not report.is_usable
    assert "mouse" in report.problem["found"]


def test_inverted_and_layered_counts_are_told(adata):
    adata.layers["umis"] = adata.X.copy()
    adata.X = adata.X * -0.5
    report = sd.pp.check(adata)
    assert report.counts_in == "layers['umis']: raw counts"
    assert any("X does not hold raw counts" in warning for warning in report.warnings)
    logged = adata.copy()
    counts = adata.layers["umis"].toarray()
    logged.X = np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True))
    del logged.layers["umis"]
    report = sd.pp.check(logged)
    assert "inverted to raw counts exactly" in report.counts_in
    assert any("recovered exactly" in warning for warning in report.warnings)
    assert report.library_size.maximum == counts.sum(axis=1).max()


def test_every_cell_is_looked_at(adata):
    big = ad.concat([adata] * 12, index_unique="-", merge="same")
    big.X = big.X.astype(np.float32)
    big.X.data[big.X.indptr[140]] = np.nan  # outside the rows that the scale is guessed from
    report = sd.pp.check(big)
    assert not report.is_usable
    assert "NaN" in report.problem["found"]


def test_the_vocabulary_of_a_model_can_be_asked_for(adata, tiny_model):
    report = sd.pp.check(adata, tiny_model)
    assert report.genes["n_genes"] == 190
    assert report.genes["outside"] == 10
    assert report.vocabulary_fingerprint == tiny_model.vocabulary.fingerprint
    assert report.genes_of == "tiny"
    assert "by the genes of tiny" in repr(report)


def test_file_and_memory_get_the_same_report(adata, h5ad):
    memory, file = sd.pp.check(adata).to_dict(), sd.pp.check(h5ad).to_dict()
    assert (memory.pop("name"), file.pop("name")) == ("the AnnData", "cells")
    assert memory == file


def test_checking_changes_nothing(by_hand):
    before = by_hand.copy()
    sd.pp.check(by_hand)
    np.testing.assert_array_equal(by_hand.X.toarray(), before.X.toarray())
    assert by_hand.var.equals(before.var)
    assert not by_hand.uns


def test_the_report_is_json(by_hand):
    assert json.loads(json.dumps(sd.pp.check(by_hand).to_dict()))["genes"]["n_used"] == 4


def test_what_cannot_be_read_at_all_raises(adata, tmp_path):
    with pytest.raises(SourceError):
        sd.pp.check(tmp_path / "absent.h5ad")
    with pytest.raises(KeyNotFoundError):
        sd.pp.check(adata, layer="absent")


@pytest.mark.shared
def test_ten_real_files_have_the_size_that_their_manifest_says(shared_data):
    known = {"pbmc4k_sub": (2000, 4060), "tcell_covid_trex_320": (320, 13459), "cortex_pollen_scde_64": (64, 16166)}
    for name, size in known.items():
        report = sd.pp.check(shared_data / f"{name}.h5ad")
        assert report.is_usable, name
        assert (report.n_cells, report.n_features) == size
        assert report.counts_in == "X: raw counts"
        assert 0.9 < report.coverage <= 1
