from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from test_sources import assert_equal, read_all

from scdiva.data.conditions import ConditionLabels
from scdiva.data.reader import CellCorpus, CellsInMemory, NamedCells, list_sources, open_corpus, open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, ScaleError, SourceError
from scdiva.genes import GeneVocabulary

DEFAULT = GeneVocabulary.default()


def log_normalised(X) -> sp.csr_matrix:
    X = sp.csr_matrix(X, dtype=np.float64)
    total = np.asarray(X.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(1e4 / total) @ X).log1p()


class TestWhereTheCountsAre:
    def test_counts_in_x(self, adata):
        assert open_counts(adata, DEFAULT).found.description == "X: raw counts"

    def test_a_layer_with_counts_is_preferred_to_inverting_x(self, adata):
        expected = read_all(adata, DEFAULT)
        adata.layers["umis"] = adata.X.copy()
        adata.X = log_normalised(adata.X)
        reader = open_counts(adata, DEFAULT)
        assert reader.found.description == "layers['umis']: raw counts"
        assert_equal(reader.read(np.arange(120)), expected)

    def test_raw_with_more_genes_is_found_and_used(self, adata):
        expected = read_all(adata, DEFAULT)
        adata.raw = adata.copy()
        scaled = adata[:, :60].copy()
        scaled.X = np.asarray(scaled.X.todense()) - 1.7
        reader = open_counts(scaled, DEFAULT)
        assert reader.found.description == "raw.X: raw counts"
        assert_equal(reader.read(np.arange(120)), expected)

    def test_log_data_alone_are_inverted_and_that_is_said(self, adata):
        expected = read_all(adata, DEFAULT)
        adata.X = log_normalised(adata.X).astype(np.float32)
        reader = open_counts(adata, DEFAULT)
        assert reader.found.description == "X: log1p of normalised counts, inverted to raw counts exactly"
        assert_equal(reader.read(np.arange(120)), expected)

    def test_a_named_layer_is_the_only_one_looked_at(self, adata):
        adata.layers["scaled"] = np.asarray(adata.X.todense()) - 1.5
        with pytest.raises(ScaleError, match=r"layers\['scaled'\].*negative"):
            open_counts(adata, DEFAULT, layer="scaled")

    def test_nothing_usable_speaks_of_x(self, adata):
        adata.layers["scaled"] = np.asarray(adata.X.todense()) - 1.5
        adata.X = adata.X * 0.37
        adata.X.data[::3] += 0.11
        with pytest.raises(ScaleError, match=r"^X holds"):
            open_counts(adata, DEFAULT)

    def test_bad_values_in_a_cell_that_the_sample_missed_are_refused_when_read(self, adata):
        big = adata[np.tile(np.arange(120), 12)].copy()
        big.obs_names_make_unique()
        big.X = big.X.astype(np.float32)
        row = 140  # eight blocks of 128 rows over 1,440 cells: rows 128 to 186 are not in the sample
        big.X.data[big.X.indptr[row]] = np.nan
        reader = open_counts(big, DEFAULT)
        with pytest.raises(ScaleError, match="NaN"):
            reader.read(np.arange(row - 2, row + 2))


class TestCoverage:
    def narrow(self, adata, share: float) -> GeneVocabulary:
        """A vocabulary whose genes hold at most that share of the UMIs."""
        totals = np.asarray(adata.X.sum(axis=0)).ravel()
        order = np.argsort(totals)
        return DEFAULT.subset(order[: int(np.searchsorted(np.cumsum(totals[order]), share * totals.sum()))])

    def test_below_half_is_refused_and_the_share_is_named(self, adata):
        vocabulary = self.narrow(adata, 0.45)
        with pytest.raises(GeneError, match=r"only 4\d\.\d% of the UMIs") as error:
            open_counts(adata, vocabulary)
        totals = np.asarray(adata.X.sum(axis=0)).ravel()
        assert adata.var_names[totals.argmax()] in error.value.found
        assert "50%" in error.value.expected

    def test_the_threshold_can_be_changed_on_purpose(self, adata):
        open_counts(adata, self.narrow(adata, 0.45), min_coverage=0.3)
        with pytest.raises(GeneError, match="UMIs"):
            open_counts(adata, self.narrow(adata, 0.8), min_coverage=0.9)

    def test_umis_count_not_genes(self, adata):
        totals = np.asarray(adata.X.sum(axis=0)).ravel()
        top = np.argsort(-totals)
        few = DEFAULT.subset(top[: int(np.searchsorted(np.cumsum(totals[top]), 0.6 * totals.sum())) + 1])
        assert few.n_genes < 100  # fewer than half of the genes, more than half of the UMIs
        open_counts(adata, few)


class TestLibrarySize:
    def test_a_column_replaces_the_sum(self, adata):
        adata.obs["n_umis"] = 1e5 + np.arange(1, 121)
        cells = open_counts(adata, DEFAULT, library_size_key="n_umis").read(np.array([3, 1]))
        np.testing.assert_array_equal(cells.library_size, [100_004, 100_002])

    def test_a_missing_column_lists_those_there_are(self, adata):
        with pytest.raises(KeyNotFoundError, match="cell_type"):
            open_counts(adata, DEFAULT, library_size_key="total")

    @pytest.mark.parametrize("values", [["many"] * 120, np.zeros(120), np.full(120, np.nan), np.full(120, -5)])
    def test_a_column_that_is_no_depth_is_refused(self, adata, values):
        adata.obs["n_umis"] = values
        with pytest.raises(KeyNotFoundError, match="positive"):
            open_counts(adata, DEFAULT, library_size_key="n_umis")


class TestGenesOfTheFile:
    def test_symbols_and_ensembl_ids_give_equal_cells(self, adata):
        expected = read_all(adata, DEFAULT)
        symbols = adata.copy()
        del symbols.var["ensembl_id"]
        by_id = symbols.copy()
        by_id.var_names = adata.var["ensembl_id"].astype(str) + ".7"
        other_column = symbols.copy()
        other_column.var["gene_ids"] = adata.var["ensembl_id"]
        other_column.var_names = [f"gene {i}" for i in range(200)]
        for data in (symbols, by_id, other_column):
            assert_equal(read_all(data, DEFAULT), expected)

    def test_the_order_of_genes_does_not_matter(self, adata):
        order = np.random.default_rng(0).permutation(200)
        assert_equal(read_all(adata[:, order].copy(), DEFAULT), read_all(adata, DEFAULT))

    def test_features_that_are_no_genes_count_for_nothing(self, adata):
        expected = read_all(adata, DEFAULT.subset(np.arange(150)))
        adata.var["feature_types"] = ["Gene Expression"] * 150 + ["Peaks"] * 50
        genes_only = adata[:, :150].copy()
        found = read_all(adata, DEFAULT.subset(np.arange(150)))
        np.testing.assert_array_equal(found.counts.toarray(), expected.counts.toarray())
        np.testing.assert_array_equal(found.library_size, np.asarray(genes_only.X.sum(axis=1)).ravel())

    @pytest.mark.parametrize("case", ["mouse", "unknown", "mixed"])
    def test_genes_of_another_species_are_refused(self, case, adata):
        del adata.var["ensembl_id"]
        mouse = [f"ENSMUSG{i:011d}" for i in range(200)]
        adata.var_names = {
            "mouse": mouse,
            "unknown": [f"probe{i}" for i in range(200)],
            "mixed": [*mouse[:100], *adata.var_names[100:]],
        }[case]
        with pytest.raises(
            GeneError, match={"mouse": "mouse", "unknown": "not known", "mixed": "mouse and human"}[case]
        ):
            open_counts(adata, DEFAULT)


class TestCorpus:
    @pytest.fixture
    def files(self, adata, tmp_path):
        folder = tmp_path / "corpus"
        folder.mkdir()
        adata[:50].copy().write_h5ad(folder / "a.h5ad")
        adata[50:90, :120].copy().write_zarr(folder / "b.zarr")
        adata[90:].copy().write_h5ad(folder / "c.h5ad")
        return folder

    def test_a_folder_is_read_as_one_collection(self, files, adata):
        corpus = open_corpus(files, DEFAULT)
        assert len(corpus) == 120
        np.testing.assert_array_equal(corpus.sizes, [50, 40, 30])
        masked = adata.copy()
        masked.X = masked.X.toarray()
        masked.X[50:90, 120:] = 0  # the second file has fewer genes
        order = np.random.default_rng(0).permutation(120)
        found, expected = corpus.read(order), open_counts(masked, DEFAULT).read(order)
        np.testing.assert_array_equal(found.counts.toarray(), expected.counts.toarray())
        np.testing.assert_array_equal(found.library_size, expected.library_size)
        np.testing.assert_array_equal(found.cell_index, order)
        np.testing.assert_array_equal(found.source_of_cell, np.digitize(order, [50, 90]))
        np.testing.assert_array_equal(found.is_measured.sum(axis=1), [200, 120, 200])

    def test_lists_of_files_and_objects_mix(self, files, adata):
        corpus = open_corpus([files / "a.h5ad", adata[50:].copy()], DEFAULT)
        assert_equal(corpus.read(np.arange(120)), read_all(adata, DEFAULT))

    def test_excluded_rows_are_not_there(self, files, adata):
        whole = open_corpus(files, DEFAULT)
        kept = CellCorpus(whole.readers, (np.array([1, 4, 30]), None, np.array([29])))
        assert len(kept) == 3 + 40 + 1
        found = kept.read(np.array([43, 0, 2, 3]))
        np.testing.assert_array_equal(found.counts.toarray(), whole.read(np.array([119, 1, 30, 50])).counts.toarray())
        assert "cell_119" in kept.describe([43])
        assert "cell_4 " in kept.describe([1])

    def test_groups_are_batches_within_sources(self, files, adata):
        whole = open_corpus(files, DEFAULT)
        corpus = CellCorpus(whole.readers, (np.array([0, 2]), None, None))
        groups = corpus.groups(["batch", None, "batch"])
        assert list(groups[:2]) == [f"a/{adata.obs['batch'].iloc[i]}" for i in (0, 2)]
        assert set(groups[2:42]) == {"b/"}
        assert list(groups[42:]) == [f"c/{batch}" for batch in adata.obs["batch"][90:]]

    def test_in_memory_equals_on_disk(self, files):
        corpus = open_corpus(files, DEFAULT)
        memory = CellsInMemory.of(corpus)
        order = np.array([70, 3, 3, 119])
        assert len(memory) == 120
        assert_equal(memory.read(order), corpus.read(order))
        np.testing.assert_array_equal(memory.read(order).cell_index, order)
        assert memory.describe([70]) == corpus.describe([70])

    def test_a_choice_of_cells_is_read_by_position_and_named_by_row(self, files):
        cells = open_corpus(files, DEFAULT).read(np.array([70, 3, 119]))
        assert_equal(NamedCells(cells, "mine").read(np.array([2, 0])), cells.take(np.array([2, 0])))
        assert len(NamedCells(cells, "mine")) == 3
        assert NamedCells(cells, "mine").describe([2, 0]) == "mine, cells 2, 0"
        assert NamedCells(cells, "mine", np.array([70, 3, 119])).describe([2, 0]) == "mine, cells 119, 70"

    def test_the_first_unusable_file_is_named(self, files, adata):
        adata.X = adata.X.toarray() - 1.5
        adata.write_h5ad(files / "bad.h5ad")
        with pytest.raises(ScaleError, match="negative"):
            open_corpus(files, DEFAULT)

    def test_an_empty_folder_and_an_empty_corpus_are_refused(self, tmp_path):
        with pytest.raises(SourceError, match=r"no \.h5ad"):
            list_sources([tmp_path])
        with pytest.raises(SourceError, match="no files"):
            CellCorpus((), ())

    def test_readers_of_different_vocabularies_do_not_mix(self, adata):
        readers = (open_counts(adata, DEFAULT), open_counts(adata, DEFAULT.subset(np.arange(300))))
        with pytest.raises(GeneError, match="different vocabularies"):
            CellCorpus(readers, (None, None))


class TestConditions:
    LABELS = ConditionLabels.from_dict({"cell_type": ["type 2", "type 0"], "tissue": ["blood"]})

    def code(self, cell_type) -> list[int]:
        return [{"type 2": 1, "type 0": 2}.get(text, 0) for text in cell_type]

    def test_no_conditions_by_default(self, adata):
        reader = open_counts(adata, DEFAULT)
        assert reader.conditions == ConditionLabels.none()
        assert reader.read(np.array([3, 1])).condition.shape == (2, 0)

    def test_codes_follow_the_cells_that_are_read(self, h5ad, adata):
        reader = open_counts(h5ad, DEFAULT, conditions=self.LABELS)
        order = np.array([119, 3, 3, 50])
        found = reader.read(order).condition
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found[:, 0], self.code(adata.obs["cell_type"].iloc[order]))
        np.testing.assert_array_equal(found[:, 1], 0)  # the file has no such column

    def test_columns_with_other_names(self, adata):
        adata.obs["site"] = ["blood", "?"] * 60
        reader = open_counts(adata, DEFAULT, conditions=self.LABELS, condition_columns={"tissue": "site"})
        np.testing.assert_array_equal(reader.read(np.arange(4)).condition[:, 1], [1, 0, 1, 0])
        again = reader.with_conditions(self.LABELS)
        assert not again.read(np.arange(4)).condition[:, 1].any()

    def test_conditions_can_be_given_later_and_counts_stay(self, adata):
        plain = open_counts(adata, DEFAULT)
        reader = plain.with_conditions(self.LABELS)
        assert_equal(reader.read(np.arange(120)), plain.read(np.arange(120)))
        np.testing.assert_array_equal(
            reader.read(np.arange(120)).condition,
            open_counts(adata, DEFAULT, conditions=self.LABELS).read(np.arange(120)).condition,
        )
        assert plain.read(np.arange(3)).condition.shape == (3, 0)

    def test_a_column_that_does_not_exist_or_is_of_no_field_is_refused(self, adata):
        with pytest.raises(KeyNotFoundError, match=r"'site'.*'tissue'.*cell_type, batch"):
            open_counts(adata, DEFAULT, conditions=self.LABELS, condition_columns={"tissue": "site"})
        with pytest.raises(ConfigError, match="'batch'"):
            open_counts(adata, DEFAULT, conditions=self.LABELS, condition_columns={"batch": "batch"})
        with pytest.raises(ConfigError, match="'tissue'"):
            open_counts(adata, DEFAULT, condition_columns={"tissue": "batch"})

    def test_a_corpus_stacks_them_file_by_file(self, adata, tmp_path):
        first, second = adata[:50].copy(), adata[50:].copy()
        second.obs = second.obs.rename(columns={"cell_type": "label"})
        second.write_h5ad(tmp_path / "second.h5ad")
        corpus = open_corpus([first, tmp_path / "second.h5ad"], DEFAULT)
        coded = corpus.with_conditions(self.LABELS, [{}, {"cell_type": "label"}])
        assert coded.conditions == self.LABELS
        assert corpus.conditions == ConditionLabels.none()
        expected = np.array(self.code(adata.obs["cell_type"]))
        order = np.random.default_rng(0).permutation(120)
        np.testing.assert_array_equal(coded.read(order).condition[:, 0], expected[order])
        unnamed = corpus.with_conditions(self.LABELS)
        np.testing.assert_array_equal(unnamed.read(np.arange(120)).condition[:50, 0], expected[:50])
        assert not unnamed.read(np.arange(50, 120)).condition.any()
        memory = CellsInMemory.of(coded)
        np.testing.assert_array_equal(memory.read(order[:7]).condition, coded.read(order[:7]).condition)

    def test_readers_of_different_conditions_do_not_mix(self, adata):
        turned = ConditionLabels.from_dict(dict(reversed(self.LABELS.to_dict().items())))
        readers = tuple(open_counts(adata, DEFAULT, conditions=labels) for labels in (self.LABELS, turned))
        with pytest.raises(SourceError, match=r"different condition labels.*with_conditions"):
            CellCorpus(readers, (None, None))


def test_a_reader_names_cells(adata):
    text = open_counts(adata, DEFAULT).describe([3, 5, 7, 9])
    assert "cell_3 (row 3)" in text
    assert "and 1 more" in text


def test_an_open_source_can_be_read_twice(h5ad):
    source = open_source(h5ad)
    assert_equal(read_all(source, DEFAULT), read_all(source, DEFAULT))
