from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdiva.data.conditions import ConditionLabels, collect_labels
from scdiva.data.reader import CellCorpus, open_corpus, open_counts
from scdiva.data.thinning import split_counts, thin_counts
from scdiva.errors import BundleError, ConfigError, KeyNotFoundError
from scdiva.genes import GeneVocabulary
from twins import cell_counts

DEFAULT = GeneVocabulary.default()
LABELS = ConditionLabels.from_dict({"cell_type": ["B cell", "NK cell", "T cell"], "tissue": ["blood", "lung"]})

label = st.text(alphabet="abAB 1-", min_size=1, max_size=4).map(str.strip).filter(bool)
label_lists = st.lists(label.filter(lambda text: text.lower() != "na"), unique=True, max_size=6)
by_field = st.dictionaries(st.sampled_from(["cell_type", "tissue", "assay", "donor"]), label_lists, max_size=4)


def collect(adatas, fields, columns=None, *, rows=None, min_cells=1):
    readers = [open_counts(adata, DEFAULT) for adata in adatas]
    return collect_labels(zip(readers, rows or [None] * len(readers), strict=True), fields, columns, min_cells)


class TestCodes:
    def test_codes_are_positions_and_unknown_labels_are_zero(self):
        codes = LABELS.codes("cell_type", ["T cell", "B cell", "macrophage", "NK cell"])
        np.testing.assert_array_equal(codes, [3, 1, 0, 2])
        assert codes.dtype == np.int32

    @pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, "", "  ", "Unassigned", "UNKNOWN", "NaN", "nA"])
    def test_what_says_nothing_is_unknown(self, missing):
        labels = ConditionLabels.from_dict({"x": ["a"]})
        np.testing.assert_array_equal(labels.codes("x", pd.Series(["a", missing, " a "], dtype=object)), [1, 0, 1])

    def test_none_as_a_text_is_unknown_even_where_it_is_collected(self, adata):
        adata.obs["fate"] = ["None", "alive"] * 60
        labels, _ = collect([adata], ["fate"])
        assert labels.labels("fate") == ("alive",)

    def test_categories_are_read_as_their_text_and_unused_ones_do_not_matter(self):
        values = pd.Categorical(["lung", None, "blood"], categories=["liver", "lung", "blood"])
        np.testing.assert_array_equal(LABELS.codes("tissue", pd.Series(values)), [2, 0, 1])
        np.testing.assert_array_equal(LABELS.codes("tissue", values), [2, 0, 1])

    @pytest.mark.parametrize(
        "values",
        [
            np.array([2, 10, 7]),
            pd.Series([2.0, 10.0, np.nan]),
            pd.Series([2, 10, None], dtype="Int64"),
            pd.Series(pd.Categorical([2, 10, 7])),
            pd.Series([2, "10", None], dtype=object),
            np.array(["2", "10", "7"]),
        ],
    )
    def test_whole_numbers_are_the_same_label_in_every_type(self, values):
        labels = ConditionLabels.from_dict({"cluster": ["10", "2", "2.5"]})
        np.testing.assert_array_equal(labels.codes("cluster", values), [2, 1, 0])
        np.testing.assert_array_equal(labels.codes("cluster", [2.5, np.inf]), [3, 0])

    def test_a_field_that_does_not_exist_is_refused(self):
        with pytest.raises(KeyNotFoundError, match=r"'tisue'.*one of tissue, cell_type"):
            LABELS.codes("tisue", ["blood"])

    def test_no_fields(self):
        none = ConditionLabels.none()
        assert (none.fields, none.n_fields, none.sizes) == ((), 0, ())
        assert none.encode({}).shape == (0,)
        with pytest.raises(KeyNotFoundError, match="there is none"):
            none.encode({"cell_type": "B cell"})


class TestEncode:
    def test_fields_that_are_left_out_are_unknown(self):
        codes = LABELS.encode({"tissue": " lung "})
        np.testing.assert_array_equal(codes, [0, 2])
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(LABELS.encode({"tissue": "blood", "cell_type": "T cell"}), [3, 1])

    def test_numbers_are_taken_as_their_text(self):
        labels = ConditionLabels.from_dict({"donor": ["1", "2"]})
        assert labels.encode({"donor": 2})[0] == labels.encode({"donor": np.float64(2)})[0] == 2

    def test_an_unknown_field_or_label_lists_the_known_ones(self):
        with pytest.raises(KeyNotFoundError, match=r"'celltype'.*one of cell_type, tissue"):
            LABELS.encode({"celltype": "B cell"})
        with pytest.raises(KeyNotFoundError, match=r"'t-cell'.*one of T cell, .*leave cell_type out"):
            LABELS.encode({"cell_type": "t-cell"})

    @pytest.mark.parametrize("value", [None, "unknown", float("nan")])
    def test_unknown_is_no_label_to_ask_for(self, value):
        with pytest.raises(KeyNotFoundError, match="leave tissue out"):
            LABELS.encode({"tissue": value})

    def test_of_many_labels_twenty_are_listed_and_similar_ones_first(self):
        labels = ConditionLabels.from_dict({"x": [f"type {i}" for i in range(50)] + ["Memory B"]})
        with pytest.raises(KeyNotFoundError) as error:
            labels.encode({"x": "memory b cell"})
        listed, _, more = error.value.expected.partition(" and ")
        assert listed.startswith("one of Memory B, ")
        assert len(listed.split(", ")) == 20
        assert more == "31 more"


class TestMergeAndStore:
    def test_new_labels_and_fields_go_to_the_end(self):
        other = ConditionLabels.from_dict({"assay": ["10x"], "cell_type": ["A cell", "NK cell", "zygote"]})
        assert LABELS.merged(other).to_dict() == {
            "cell_type": ["B cell", "NK cell", "T cell", "A cell", "zygote"],
            "tissue": ["blood", "lung"],
            "assay": ["10x"],
        }

    @given(first=by_field, second=by_field)
    def test_merging_keeps_the_codes_of_the_first_and_knows_all_of_the_second(self, first, second):
        a, b = ConditionLabels.from_dict(first), ConditionLabels.from_dict(second)
        merged = a.merged(b)
        assert merged.fields[: a.n_fields] == a.fields
        for field in a.fields:
            np.testing.assert_array_equal(merged.codes(field, a.labels(field)), np.arange(len(a.labels(field))) + 1)
        for field in b.fields:
            assert (merged.codes(field, b.labels(field)) > 0).all()
        assert merged.merged(b) == merged == merged.merged(a)

    @given(labels=by_field)
    def test_written_and_read_again_they_are_equal_and_order_counts(self, labels):
        found = ConditionLabels.from_dict(labels)
        assert ConditionLabels.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        assert found.sizes == tuple(len(names) for names in labels.values())
        turned = ConditionLabels.from_dict(dict(reversed(labels.items())))
        assert (turned == found) == (len(labels) < 2)

    @given(names=label_lists.filter(bool), seed=st.integers(0, 99))
    def test_codes_lead_back_to_the_labels(self, names, seed):
        labels = ConditionLabels.from_dict({"x": names})
        chosen = np.random.default_rng(seed).choice(np.array(names, dtype=object), 20)
        codes = labels.codes("x", chosen)
        assert [labels.labels("x")[code - 1] for code in codes] == list(chosen)
        assert [labels.encode({"x": name})[0] for name in chosen] == list(codes)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"x": ["a", "b", "a"]}, "'a' 2 times"),
            ({"x": [" a"]}, "' a'"),
            ({"x": ["Unknown"]}, "'Unknown'"),
            ({"x": [1]}, "label 1"),
            ({"x": "abc"}, "'abc'"),
            ({"x": 3}, "3"),
            ({"": ["a"]}, "''"),
        ],
    )
    def test_a_damaged_list_is_refused(self, content, message):
        with pytest.raises(BundleError, match=message):
            ConditionLabels.from_dict(content)


class TestCollect:
    @pytest.fixture
    def two(self, adata):
        """Two files: cell types in both under different names, the tissue in one, donors as numbers in the other."""
        first, second = adata[:50].copy(), adata[50:].copy()
        first.obs["tissue"] = ["lung"] * 30 + ["unknown"] * 20
        second.obs = second.obs.rename(columns={"cell_type": "annotation"})
        second.obs["donor"] = [1.0] * 40 + [np.nan] * 30
        return first, second

    def test_labels_of_all_files_in_sorted_order_and_a_report(self, two):
        labels, report = collect(two, ["donor", "cell_type", "tissue"], [{}, {"cell_type": "annotation"}])
        assert labels.to_dict() == {
            "donor": ["1"],
            "cell_type": ["type 0", "type 1", "type 2"],
            "tissue": ["lung"],
        }
        found = [(e.field, e.column, e.n_known, e.n_unknown, e.n_labels) for e in report.entries]
        assert found == [
            ("donor", None, 0, 50, 0),
            ("cell_type", "cell_type", 50, 0, 3),
            ("tissue", "tissue", 30, 20, 1),
            ("donor", "donor", 40, 30, 1),
            ("cell_type", "annotation", 70, 0, 3),
            ("tissue", None, 0, 70, 0),
        ]
        assert "no column for donor, unknown in all 50 cells" in report.lines()[0]
        assert ".obs['annotation'], 3 labels, known in 70 cells, unknown in 0" in report.lines()[4]

    def test_only_cells_of_the_corpus_count(self, adata):
        adata.obs["cell_type"] = ["rare"] + ["common"] * 119
        labels, report = collect([adata], ["cell_type"], rows=[np.arange(1, 120)])
        assert labels.labels("cell_type") == ("common",)
        assert (report.entries[0].n_known, report.entries[0].n_unknown) == (119, 0)

    def test_rare_labels_are_left_out_and_counted_over_all_files(self, two):
        first, second = two
        first.obs["assay"] = ["a"] * 2 + ["b"] * 48
        second.obs["assay"] = ["a"] * 2 + ["c"] * 3 + [None] * 65
        labels, report = collect(two, ["assay"], min_cells=4)
        assert labels.labels("assay") == ("a", "b")
        assert [(e.n_known, e.n_unknown, e.n_rare, e.n_labels) for e in report.entries] == [
            (50, 0, 0, 2),
            (2, 68, 3, 1),
        ]
        assert "(3 of them with a rare label)" in report.lines()[1]

    def test_a_named_column_that_does_not_exist_is_refused(self, two):
        with pytest.raises(KeyNotFoundError, match=r"'anotation'.*'cell_type'.*one of annotation, "):
            collect(two, ["cell_type"], [{}, {"cell_type": "anotation"}])

    def test_a_column_for_no_field_is_refused(self, two):
        with pytest.raises(ConfigError, match=r"'celltype'.*one of cell_type.*data\.conditions"):
            collect(two, ["cell_type"], [{"celltype": "cell_type"}, {}])

    def test_a_field_that_no_file_knows_is_refused(self, two):
        two[0].obs["stage"] = "unknown"
        with pytest.raises(KeyNotFoundError, match=r"no file knows.*'stages'.*there are stage, "):
            collect(two, ["cell_type", "stages"])
        with pytest.raises(KeyNotFoundError, match=r"no file knows.*'stage'"):
            collect(two, ["stage"])
        with pytest.raises(KeyNotFoundError, match=r"of 41 cells.*'1', is that of 40"):
            collect(two, ["donor"], min_cells=41)

    @pytest.mark.parametrize("fields", [["cell_type", "cell_type"], [" "]])
    def test_fields_have_different_names(self, two, fields):
        with pytest.raises(ConfigError, match=r"data\.conditions"):
            collect(two, fields)

    def test_no_fields_give_no_labels(self, two):
        labels, report = collect(two, [])
        assert labels == ConditionLabels.none()
        assert report.lines() == []

    def test_a_corpus_is_coded_by_what_was_collected(self, two):
        corpus = open_corpus(list(two), DEFAULT)
        kept = CellCorpus(corpus.readers, (np.arange(25, 50), None))
        columns = [{}, {"cell_type": "annotation"}]
        labels, _ = collect_labels(zip(kept.readers, kept.rows, strict=True), ["cell_type", "donor"], columns)
        order = np.array([94, 0, 24, 25, 60, 3])
        found = kept.with_conditions(labels, columns).read(order).condition
        text = [*two[0].obs["cell_type"][25:], *two[1].obs["annotation"]]
        donor = [0] * 25 + [1] * 40 + [0] * 30
        np.testing.assert_array_equal(found, [[int(text[i][-1]) + 1, donor[i]] for i in order])


class TestCellsKeepTheirConditions:
    @pytest.fixture
    def cells(self):
        counts = cell_counts(np.random.default_rng(0).poisson(3.0, (6, 8)))
        return replace(counts, condition=np.arange(12, dtype=np.int32).reshape(6, 2))

    def test_both_views_of_a_split(self, cells):
        for view in (
            *split_counts(cells, 0.3, np.random.default_rng(1)),
            thin_counts(cells, 0.0, np.random.default_rng(1)),
        ):
            np.testing.assert_array_equal(view.condition, cells.condition)

    def test_cells_that_are_taken(self, cells):
        np.testing.assert_array_equal(cells.take(np.array([4, 0, 4])).condition, [[8, 9], [0, 1], [8, 9]])

    def test_cells_without_conditions_have_none_of_them(self):
        cells = cell_counts(np.ones((3, 4)))
        view, _ = split_counts(cells.take(np.array([2, 1])), 0.5, np.random.default_rng(0))
        assert view.condition.shape == (2, 0)
