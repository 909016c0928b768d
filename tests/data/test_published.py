from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdiva.data.published import PUBLISHED, load_published, published_set
from scdiva.data.reader import open_counts
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, ScaleError, SourceError
from scdiva.genes import GeneVocabulary

MS_LABEL = "Factor Value[inferred cell type - authors labels]"


def log_normalised(X) -> sp.csr_matrix:
    X = sp.csr_matrix(X, dtype=np.float64)
    total = np.asarray(X.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(1e4 / total) @ X).log1p()


def same(found: sp.csr_matrix, expected: sp.csr_matrix) -> bool:
    return found.shape == expected.shape and (found != expected).nnz == 0


@pytest.fixture
def write(tmp_path):
    def write(cells: ad.AnnData, name: str):
        cells.write_h5ad(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def immune(adata):
    """Log values in X, counts in a layer, and a batch of TPM, as scIB's file has it."""
    adata.obs["final_annotation"] = adata.obs["cell_type"]
    adata.obs["batch"] = np.where(np.arange(120) % 5 == 0, "Villani", adata.obs["batch"].astype(str))
    counts = adata.X.astype(np.float64)
    is_tpm = (adata.obs["batch"] == "Villani").to_numpy()
    tpm = sp.csr_matrix(sp.diags(np.where(is_tpm, 1.37, 1.0)) @ counts)
    adata.layers["counts"] = tpm
    adata.X = log_normalised(tpm * np.pi)
    adata.X.data = adata.X.data + np.random.default_rng(0).uniform(0, 0.1, adata.X.nnz)  # corrected: no way back
    return adata, sp.csr_matrix(counts[~is_tpm], dtype=np.int32), ~is_tpm


class TestOneFile:
    def test_counts_in_a_layer_and_cells_that_do_not_belong_to_it(self, immune, write):
        adata, counts, is_kept = immune
        found = load_published("Immune", write(adata, "Immune_ALL_human.h5ad"))
        assert found.adata.X.dtype == np.int32
        assert same(found.adata.X, counts)
        assert found.adata.obs_names.tolist() == adata.obs_names[is_kept].tolist()
        assert found.labels.tolist() == adata.obs["cell_type"].astype(str)[is_kept].tolist()
        assert "Villani" not in found.batches
        assert found.keys == {"label": "final_annotation", "batch": "batch"}
        assert found.counts_in == "layers['counts']: raw counts"
        assert "24 cells of Villani are left out, as in the published set" in found.notes
        assert "96 cells, the authors print 32,484" in found.notes
        assert found.is_test is None
        assert found.train.size == 96
        assert found.test.size == 0

    def test_raw_counts_in_x_and_labels_as_text_or_categories(self, adata, write):
        labels = adata.obs["cell_type"].astype(str).to_numpy()
        labels[3] = "unknown"
        for column in (pd.Series(labels), pd.Series(labels).astype("category")):
            adata.obs["str_labels"] = column.to_numpy()
            found = load_published("pbmc12K", write(adata, "pbmc.h5ad"))
            assert found.definition.name == "PBMC12k"
            assert same(found.adata.X, adata.X)
            assert found.labels[3] == ""
            assert found.labels[4] == labels[4]
            assert found.counts_in == "X: raw counts"
            assert not any("guess" in note for note in found.notes)

    def test_log_values_that_go_back_exactly_are_read(self, adata, write):
        counts = adata.X.copy()
        adata.X = log_normalised(counts)
        adata.obs["str_labels"] = adata.obs["cell_type"]
        found = load_published("PBMC12k", write(adata, "pbmc.h5ad"))
        assert same(found.adata.X, counts)

    def test_what_is_read_can_be_aligned_like_any_anndata(self, immune, write):
        found = load_published("Immune", write(immune[0], "a.h5ad"))
        vocabulary = GeneVocabulary.default()
        reader = open_counts(found.adata, vocabulary)
        assert reader.read(np.arange(96)).counts.sum() == immune[1].sum()

    def test_values_that_are_no_counts_are_refused_with_the_matrices_there_are(self, immune, write):
        adata, _, _ = immune
        del adata.layers["counts"]
        adata.layers["scaled"] = adata.X * 1.1
        with pytest.raises(ScaleError, match=r"holds X, layers\['scaled'\]; X holds non-integer"):
            load_published("Immune", write(adata, "a.h5ad"))

    def test_a_missing_column_lists_the_others(self, adata, write):
        path = write(adata, "a.h5ad")
        with pytest.raises(
            KeyNotFoundError, match=r"'celltype' for the label of COVID-19 \(the key of the.*cell_type \(3\)"
        ):
            load_published("COVID-19", path)
        with pytest.raises(KeyNotFoundError, match=r"'sample_id' for the batch of Perirhinal \(our guess"):
            load_published("Perirhinal", path)
        found = load_published("COVID-19", path, label_key="cell_type")
        assert found.keys == {"label": "cell_type", "batch": "batch"}
        assert any("batch key 'batch' is our guess" in note for note in found.notes)
        assert not any("label key" in note for note in found.notes)

    def test_labels_that_no_task_needs_may_be_absent_and_are_noted(self, adata, write):
        path = write(adata, "a.h5ad")
        found = load_published("Zheng68k", path)
        assert found.labels is None
        assert any("no .obs column 'celltype'" in note for note in found.notes)
        with pytest.raises(KeyNotFoundError, match="'nothing'"):
            load_published("Zheng68k", path, label_key="nothing")

    def test_antibodies_are_left_out(self, adata, write):
        adata.var["feature_types"] = np.where(np.arange(200) < 190, "GEX", "ADT")
        found = load_published("BMMC", write(adata, "a.h5ad"))
        assert found.adata.var_names.tolist() == adata.var_names[:190].tolist()
        assert same(found.adata.X, adata.X[:, :190])
        assert "10 features that are no genes are left out" in found.notes

    def test_symbols_are_taken_from_a_column_where_the_index_has_none(self, adata, write):
        symbols = adata.var_names.tolist()
        adata.var["gene_symbols"] = symbols
        adata.var_names = [f"row{i}" for i in range(200)]
        adata.obs["str_labels"] = adata.obs["cell_type"]
        found = load_published("PBMC12k", write(adata, "a.h5ad"))
        assert found.adata.var_names.tolist() == symbols
        assert "gene names are those of .var['gene_symbols']" in found.notes

    def test_perturbations(self, adata, write):
        adata.obs["condition"] = np.where(np.arange(120) < 60, "ctrl", "CEBPA+ctrl")
        found = load_published("Norman", write(adata, "a.h5ad"))
        assert set(found.perturbations) == {"ctrl", "CEBPA+ctrl"}
        assert found.labels is None

    def test_other_sets_and_other_files_are_refused(self, adata, write, tmp_path):
        with pytest.raises(KeyNotFoundError, match="one of Immune, Zheng68k"):
            published_set("Lung")
        with pytest.raises(SourceError, match="does not exist"):
            load_published("Immune", tmp_path / "absent.h5ad")
        path = write(adata, "a.h5ad")
        with pytest.raises(ConfigError, match="2 files for Immune"):
            load_published("Immune", [path, path])
        adata.obs["final_annotation"], adata.obs["batch"] = "T", "Villani"
        with pytest.raises(SourceError, match="Villani only"):
            load_published("Immune", write(adata, "b.h5ad"))


class TestSplit:
    @pytest.fixture
    def halves(self, adata, write):
        adata.obs[MS_LABEL] = adata.obs["cell_type"]
        adata.obs["nothing"] = np.nan
        counts = adata.X.copy()
        adata.X = log_normalised(counts)
        second = adata[70:].copy()
        second.obs["only here"] = "x"
        return write(adata[:70].copy(), "c_data.h5ad"), write(second, "filtered_ms_adata.h5ad"), counts

    def test_two_files_by_name_or_by_their_folder(self, halves, adata):
        train, test, counts = halves
        for path in ([train, test], train.parent):
            found = load_published("MS", path)
            assert found.train.tolist() == list(range(70))
            assert found.test.tolist() == list(range(70, 120))
            assert same(found.adata.X, counts)
            assert found.labels.tolist() == adata.obs["cell_type"].astype(str).tolist()
            assert found.adata.obs_names.tolist() == adata.obs_names.tolist()
            assert not any("batches" in note for note in found.notes)

    def test_genes_are_matched_by_name(self, halves, write):
        train, test, counts = halves
        other = ad.read_h5ad(test)[:, ::-1][:, :150].copy()
        found = load_published("MS", [train, write(other, "other.h5ad")])
        first = ad.read_h5ad(train)
        assert found.adata.var_names.tolist() == first.var_names[50:].tolist()
        assert same(found.adata.X, counts[:, 50:])
        assert "50 genes that only one of the two files has are left out" in found.notes

    def test_cells_of_the_same_name_are_told_apart(self, halves):
        train, _, _ = halves
        found = load_published("MS", [train, train])
        assert found.adata.obs_names.is_unique
        assert found.adata.obs_names[0].startswith("train/")

    def test_files_without_common_genes_are_refused(self, halves, write):
        train, test, _ = halves
        other = ad.read_h5ad(test)
        other.var_names = [f"x{i}" for i in range(200)]
        with pytest.raises(GeneError, match="no genes in common"):
            load_published("MS", [train, write(other, "other.h5ad")])
        other.var_names = ["A"] * 200
        with pytest.raises(GeneError, match="some names twice"):
            load_published("MS", [train, write(other, "twice.h5ad")])

    @pytest.mark.parametrize("values", [("train", "test"), ("0", "1"), (0, 1), (False, True), ("Reference", "query")])
    def test_one_file_with_a_column(self, values, halves, write):
        cells = ad.concat([ad.read_h5ad(path) for path in halves[:2]])
        cells.obs["split"] = [values[0]] * 70 + [values[1]] * 50
        found = load_published("MS", write(cells, "both.h5ad"))
        assert found.test.tolist() == list(range(70, 120))
        assert found.keys["split"] == "split"

    def test_one_file_without_the_split_is_refused(self, halves, write):
        with pytest.raises(KeyNotFoundError, match=r"published as c_data\.h5ad and filtered_ms"):
            load_published("MS", halves[0])
        cells = ad.read_h5ad(halves[0])
        with pytest.raises(KeyNotFoundError, match="training cells"):
            load_published("MS", halves[0], split_key="batch")
        cells.obs["split"] = "train"
        with pytest.raises(KeyNotFoundError, match="holds train"):
            load_published("MS", write(cells, "one_sided.h5ad"))

    def test_a_folder_without_one_of_the_files_is_refused(self, halves):
        halves[1].rename(halves[1].with_name("other.h5ad"))
        with pytest.raises(SourceError, match=r"no filtered_ms_adata.h5ad \(it has c_data.h5ad, other.h5ad\)"):
            load_published("MS", halves[0].parent)


def test_the_table_is_consistent():
    for name, row in PUBLISHED.items():
        assert row.name == name
        assert len(row.files) == (2 if row.is_split else 1)
        assert (row.label_key is None) == (row.tasks == ("perturbation",))
        if "integration" in row.tasks:
            assert row.batch_key is not None
    assert sum(row.is_split for row in PUBLISHED.values()) == 4
