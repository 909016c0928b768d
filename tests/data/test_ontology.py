from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from scdiva.data.ontology import TOO_GENERAL, CellOntology, back_off, match_labels
from scdiva.data.ontology.abbreviations import AMBIGUOUS, ANYWHERE, IN_TISSUE
from scdiva.data.ontology.backing_off import candidate_terms
from scdiva.data.ontology.matching import HOW, words_of
from scdiva.errors import ConfigError, KeyNotFoundError

CL = CellOntology.load()

CELL, LEUKOCYTE, LYMPHOCYTE, T = "CL:0000000", "CL:0000738", "CL:0000542", "CL:0000084"
B, NK, CD4, CD8, TREG = "CL:0000236", "CL:0000623", "CL:0000624", "CL:0000625", "CL:0000815"
MONO, CD14, CD16, DC = "CL:0000576", "CL:0001054", "CL:0002396", "CL:0000451"
FIBROBLAST, ENDOTHELIAL = "CL:0000057", "CL:0000115"


def ids(labels, **kwargs):
    """The id of each label, empty where there is none."""
    matches = match_labels(labels, **kwargs)
    return {match.label: match.id for match in matches.matches}


class TestTerms:
    def test_terms_have_labels_synonyms_and_ancestors(self):
        assert CL.label(B) == "B cell"
        assert "B lymphocyte" in CL.term(B).synonyms
        assert CL.ancestors(B)["CL:0000945"] == 1
        assert CL.ancestors(B)[LYMPHOCYTE] == 2
        assert B not in CL.ancestors(B)
        assert dict(CL.ancestors(CELL)) == {}

    def test_every_term_in_use_is_a_cell_and_every_parent_is_in_use(self):
        for term in CL.terms.values():
            if term.is_deprecated:
                assert not term.parents
            else:
                assert term.label
                assert CL.is_a(term.id, CELL)
                assert not any(CL.terms[parent].is_deprecated for parent in term.parents)

    def test_is_a_and_distance(self):
        assert CL.is_a(CD8, T)
        assert CL.is_a(T, T)
        assert not CL.is_a(T, CD8)
        assert CL.distance(CD8, CD8) == 0
        assert CL.distance(CD8, T) == 3
        assert CL.distance(T, CD8) is None
        assert CD8 in CL.descendants(T)
        assert T not in CL.descendants(T)
        assert B not in CL.descendants(T)

    def test_loading_again_gives_the_same_object(self):
        assert CellOntology.load() is CL

    def test_deprecated_ids_follow_their_successor(self):
        assert CL.terms["CL:0000003"].is_deprecated  # native cell
        assert CL.current_id("CL:0000003") == CELL
        followed = [term for term in CL.terms.values() if term.is_deprecated and term.replaced_by in CL.terms]
        assert len(followed) > 100
        old = next(term.id for term in followed if CL.ancestors(term.replaced_by))
        assert CL.ancestors(old) == CL.ancestors(CL.terms[old].replaced_by)
        assert CL.common_ancestor([old]) == CL.common_ancestor([CL.current_id(old)])

    def test_a_deprecated_id_without_successor_is_refused_and_names_what_to_consider(self):
        with pytest.raises(KeyNotFoundError, match=r"deprecated.*CL:0000140 \(odontocyte\)"):
            CL.current_id("CL:0000013")

    @pytest.mark.parametrize(("wrong", "right"), [("CL:236", B), ("CL_0000236", B), ("T cel", T)])
    def test_an_unknown_id_names_the_closest(self, wrong, right):
        with pytest.raises(KeyNotFoundError, match=right):
            CL.current_id(wrong)


class TestCommonAncestor:
    @pytest.mark.parametrize(
        ("term_ids", "label"),
        [
            ([CD4, CD8], "mature alpha-beta T cell"),
            ([CD8, B], "lymphocyte"),
            ([T, NK], "lymphocyte"),
            ([CD14, CD16], "CD14-positive monocyte"),
            ([CD14, CD16, "CL:0000860"], "monocyte"),
            ([CD8, MONO], "mononuclear leukocyte"),
            (["CL:0000169", "CL:0000171"], "pancreatic endocrine cell"),
            ([CD8, T], "T cell"),
            ([CD8, CD8], "CD8-positive, alpha-beta T cell"),
        ],
    )
    def test_of_real_terms(self, term_ids, label):
        assert CL.label(CL.common_ancestor(term_ids)) == label
        assert CL.common_ancestor(term_ids[::-1]) == CL.common_ancestor(term_ids)

    def test_too_general_terms_are_no_answer(self):
        assert CL.common_ancestor([FIBROBLAST, ENDOTHELIAL]) == ""
        assert CL.common_ancestor([FIBROBLAST, ENDOTHELIAL], too_general=[]) == "CL:0000255"
        assert CL.common_ancestor([CELL]) == ""
        assert CL.common_ancestor([]) == ""
        assert CL.common_ancestor([CD8, B], CL.too_general([LYMPHOCYTE])) == ""  # and all above it

    def test_the_list_names_terms_in_use_and_leaves_types(self):
        for term_id, label in TOO_GENERAL.items():
            assert not CL.terms[term_id].is_deprecated
            assert CL.label(term_id) == label
        types = {"leukocyte", "neuron", "neural cell", "epithelial cell", "endothelial cell", "muscle cell"}
        assert not types & set(TOO_GENERAL.values())

    def test_ties_go_to_fewest_steps_then_to_the_smallest_id(self):
        # two terms above both, neither above the other: a monocyte is mononuclear phagocyte and myeloid leukocyte
        pair = ["CL:0000235", MONO]
        common = [t for t in CL.ancestors(MONO) if t in CL.ancestors("CL:0000235") and t not in TOO_GENERAL]
        lowest = [t for t in common if not any(CL.distance(o, t) for o in common)]
        assert len(lowest) > 1
        steps = {t: sum(CL.distance(p, t) for p in pair) for t in lowest}
        assert CL.common_ancestor(pair) == min(lowest, key=lambda t: (steps[t], t))


PBMC3K = {
    "Naive CD4 T": "CL:0000895",
    "Memory CD4 T": "CL:0000897",
    "CD8 T": CD8,
    "NK": NK,
    "B": B,
    "CD14+ Mono": CD14,
    "FCGR3A+ Mono": CD16,
    "DC": DC,
    "Platelet": "CL:0000233",
}
ZHENG = {
    "B cell": B,
    "CD4+ memory T cell": "CL:0000897",
    "CD4+ naive T cell": "CL:0000895",
    "CD4+ regulatory T cell": "CL:0000792",
    "CD8+ naive cytotoxic T cell": "CL:0000900",
    "CD14+ monocyte": CD14,
    "NK cell": NK,
}


class TestMatching:
    @pytest.mark.parametrize(("name", "expected"), [("pbmc3k", PBMC3K), ("zheng_sorted7_3500", ZHENG)])
    def test_all_labels_of_the_bundled_sets(self, name, expected):
        labels = getattr(sd.datasets, name)().obs["cell_type"]
        matches = match_labels(labels)
        assert matches.id_of == expected
        assert matches.unmatched == ()
        assert set(matches.missing) <= {"unassigned"}
        np.testing.assert_array_equal(matches.ids(labels), [expected.get(label, "") for label in labels])

    @pytest.mark.parametrize(
        ("label", "term_id", "how"),
        [
            ("B cell", B, "label"),
            ("CL:0000236", B, "id"),
            ("CL:0000003", CELL, "id"),
            ("B lymphocyte", B, "synonym"),
            ("B cells", B, "normalised"),
            ("b-cells", B, "normalised"),
            ("t_cell", T, "normalised"),
            ("Tcells", T, "normalised"),
            ("Monocytes", MONO, "normalised"),
            ("γδ T", "CL:0000798", "normalised"),
            ("naïve B cells", "CL:0000788", "normalised"),
            ("B_memory", "CL:0000787", "normalised"),
            ("Regulatory T cells", TREG, "normalised"),
            ("endothelial", ENDOTHELIAL, "normalised"),
            ("Myofibroblasts", "CL:0000186", "normalised"),
            ("CD14 positive monocyte", CD14, "normalised"),
            ("Memory CD4+ T", "CL:0000897", "shortened"),
            ("CD4_T", CD4, "abbreviation"),
            ("CD8-positive T cells", CD8, "abbreviation"),
            ("CD4+/CD25 T Reg", "CL:0000792", "abbreviation"),
            ("CD16 Mono", CD16, "abbreviation"),
            ("pDC", "CL:0000784", "abbreviation"),
            ("mast", "CL:0000097", "normalised"),  # in the table, and the ontology agrees
        ],
    )
    def test_rules(self, label, term_id, how):
        match = match_labels([label]).matches[0]
        assert (match.id, match.how, match.note) == (term_id, how, "")
        assert match.name == CL.label(term_id)

    def test_the_table_goes_before_synonyms_that_mean_something_else(self):
        assert "CD16+ monocyte" in CL.term("CL:0002397").synonyms
        assert "DC2" in CL.term("CL:0000784").synonyms
        assert ids(["CD16+ monocyte", "DC2"]) == {"CD16+ monocyte": CD16, "DC2": "CL:0002399"}

    @pytest.mark.parametrize(
        "label",
        [
            *["0", "A", "D", "M", "IC", "G5", "Heart", "CCK", "cluster 3", "Doublet", "Tumor", "Stromal mix"],
            *["T/NK", "T_NK", "NK/T", "T_cells_&_NK_cells", "Mono/Mac", "CD4/CD8 T", "B and T cells"],
            *["Macrophages_A", "MDC", "alpha", "beta", "alpha cell", "Ductal_MHC_Class_II", "CL:9999999"],
        ],
    )
    def test_nothing_is_guessed(self, label):
        matches = match_labels([label])
        assert matches.unmatched == (label,)
        assert matches.id_of == {}
        assert matches.matches[0].how == ""
        assert "mapping" in matches.matches[0].note or "tissue" in matches.matches[0].note

    def test_unmatched_labels_name_what_they_may_be(self):
        matches = match_labels(["Macrophages_A", "T_NK", "beta"]).lines()
        assert "CL:0000235 (macrophage)" in matches[0]
        assert "CL:0000814" in matches[1]
        assert "'pancreas'" in matches[2]

    def test_abbreviations_of_a_tissue(self):
        found = ids(["alpha", "beta", "activated_stellate", "ductal", "mast"], tissue="pancreas")
        assert found["alpha"] == "CL:0000171"
        assert found["beta"] == "CL:0000169"
        assert CL.label(found["activated_stellate"]) == "pancreatic stellate cell"
        assert CL.label(found["ductal"]) == "pancreatic ductal cell"
        assert found["mast"] == "CL:0000097"
        with pytest.raises(KeyNotFoundError, match="pancreas"):
            match_labels(["alpha"], tissue="moon")

    def test_negative_markers_are_not_positive_ones(self):
        assert words_of("CD16- Mono") == words_of("CD16-negative monocyte") != words_of("CD16+ Mono")
        assert ids(["CD16- Mono"])["CD16- Mono"] == "CL:0002057"
        assert ids(["CD4- T"])["CD4- T"] == ""
        assert words_of("CD4+/CD45RA+/CD25- naive T") == ("cd25neg", "cd4", "cd45ra", "naive", "t")

    def test_your_own_mapping_goes_first(self):
        matches = match_labels(["MDC", "B", "NK", "unknown"], {"MDC": "CL:0000782", "B": "", "x": CD8, "unknown": T})
        assert matches.id_of == {"MDC": "CL:0000782", "NK": NK, "unknown": T}
        assert matches.unmatched == ("B",)
        assert matches.unused == ("x",)
        assert [match.how for match in matches.matches] == ["given", "given", "normalised", "given"]

    def test_a_wrong_id_in_the_mapping_is_refused(self):
        with pytest.raises(KeyNotFoundError, match=r"mapping of 'MDC'.*CL:0000782"):
            match_labels(["MDC"], {"MDC": "CL:000782"})
        with pytest.raises(KeyNotFoundError, match="deprecated"):
            match_labels(["x"], {"x": "CL:0000013"})
        assert ids(["x"], mapping={"x": "CL:0000003"}) == {"x": CELL}

    def test_missing_labels_are_no_types(self):
        labels = pd.Series(["B", None, "unassigned", "B", "nope"], dtype="category")
        matches = match_labels(labels)
        assert [match.label for match in matches.matches] == ["B", "nope"]
        assert matches.missing == ("unassigned",)
        assert matches.ids(labels).tolist() == [B, "", "", B, ""]
        assert match_labels("B cell").id_of == {"B cell": B}
        assert match_labels([]).matches == ()
        assert match_labels([]).ids([]).tolist() == []

    def test_the_table_lists_every_label(self):
        table = match_labels(["B", "MDC"]).table()
        assert table["id"].tolist() == [B, ""]
        assert set(table["how"]) <= set(HOW)

    @pytest.mark.parametrize("table", [ANYWHERE, *IN_TISSUE.values()])
    def test_written_tables_name_terms_in_use_once(self, table):
        by_words: dict[tuple[str, ...], str] = {}
        for label, term_id in table.items():
            assert not CL.terms[term_id].is_deprecated
            assert by_words.setdefault(words_of(label), term_id) == term_id, label

    def test_the_table_for_any_tissue_contradicts_no_name_of_a_term(self):
        names = {words_of(term.label): term.id for term in CL.terms.values() if not term.is_deprecated}
        for label, term_id in ANYWHERE.items():
            assert names.get(words_of(label), term_id) == term_id, label
        assert all(not CL.terms[term_id].is_deprecated for listed in AMBIGUOUS.values() for term_id in listed)


class TestBackOff:
    CLASSES = (CD4, CD8, B, CD14, CD16)

    def test_the_answer_is_as_wide_as_it_must_be(self):
        answer = back_off(
            [
                [0.90, 0.05, 0.05, 0.00, 0.00],
                [0.45, 0.45, 0.05, 0.05, 0.00],
                [0.35, 0.30, 0.30, 0.05, 0.00],
                [0.00, 0.05, 0.05, 0.50, 0.40],
                [0.20, 0.20, 0.20, 0.20, 0.20],
            ],
            self.CLASSES,
            0.8,
        )
        names = [
            "CD4-positive, alpha-beta T cell",
            "mature alpha-beta T cell",
            "lymphocyte",
            "CD14-positive monocyte",
            "mononuclear leukocyte",
        ]
        assert answer.labels.tolist() == names
        assert [CL.label(term_id) for term_id in answer.ids] == names
        np.testing.assert_allclose(answer.probabilities, [0.9, 0.9, 0.95, 0.9, 1.0])
        assert answer.is_backed_off.tolist() == [False, True, True, True, True]

    def test_the_sum_is_over_the_classes_that_are_the_term(self):
        rng = np.random.default_rng(0)
        probabilities = rng.dirichlet(np.full(5, 0.4), size=500)
        answer = back_off(probabilities, self.CLASSES, 0.7)
        for row, term_id, total, is_backed_off in zip(
            probabilities, answer.ids, answer.probabilities, answer.is_backed_off, strict=True
        ):
            if not is_backed_off:
                assert term_id == self.CLASSES[row.argmax()]
                assert total == row.max() >= 0.7
                continue
            inside = [k for k, class_id in enumerate(self.CLASSES) if CL.is_a(class_id, term_id)]
            assert total == pytest.approx(row[inside].sum())
            assert total >= 0.7 > row.max()
            assert CL.common_ancestor([self.CLASSES[k] for k in inside]) == term_id
            # no term for fewer classes would do
            for other in CL.too_general() ^ {above for c in self.CLASSES for above in CL.ancestors(c)}:
                fewer = [k for k, class_id in enumerate(self.CLASSES) if CL.is_a(class_id, other)]
                if other not in TOO_GENERAL and len(fewer) < len(inside):
                    assert row[fewer].sum() < 0.7

    def test_blocks_do_not_change_the_answer(self, monkeypatch):
        probabilities = np.random.default_rng(1).dirichlet(np.full(5, 0.4), size=50).astype(np.float32)
        whole = back_off(probabilities, self.CLASSES, 0.8)
        monkeypatch.setattr("scdiva.data.ontology.backing_off._BLOCK", 7)
        parts = back_off(probabilities, self.CLASSES, 0.8)
        np.testing.assert_array_equal(whole.ids, parts.ids)
        np.testing.assert_array_equal(whole.probabilities, parts.probabilities)

    def test_too_general_is_no_answer(self):
        answer = back_off([[0.5, 0.5]], [FIBROBLAST, ENDOTHELIAL], 0.8)
        assert (answer.ids[0], answer.labels[0], answer.probabilities[0]) == ("", "", 0.5)
        assert answer.is_backed_off[0]
        answer = back_off([[0.5, 0.5]], [CD8, CD14], 0.8, also_too_general=["CL:0000842"])
        assert answer.ids[0] == ""

    def test_ties_go_to_the_more_probable_then_to_the_earlier_classes(self):
        classes = [CD4, CD8, CD14, CD16]
        tied = back_off([[0.25, 0.25, 0.25, 0.25]], classes, 0.5)
        assert tied.ids[0] == CL.common_ancestor([CD4, CD8])
        swapped = back_off([[0.25, 0.25, 0.25, 0.25]], classes[::-1], 0.5)
        assert swapped.ids[0] == CL.common_ancestor([CD14, CD16])
        more = back_off([[0.15, 0.3, 0.3, 0.25]], classes, 0.4)
        assert more.ids[0] == CL.common_ancestor([CD14, CD16])

    def test_the_answer_need_not_contain_the_best_class(self):
        assert back_off([[0.3, 0.3, 0.4]], [CD4, CD8, MONO], 0.6).ids[0] == CL.common_ancestor([CD4, CD8])

    def test_a_class_may_be_a_kind_of_another(self):
        answer = back_off([[0.5, 0.4, 0.1]], [T, CD8, B], 0.8)
        assert (answer.ids[0], answer.probabilities[0]) == (T, pytest.approx(0.9))

    def test_classes_that_share_a_term_are_added(self):
        answer = back_off([[0.5, 0.5]], ["CL:0002410", "CL:0002410"], 0.9)
        assert answer.ids[0] == "CL:0002410"
        assert answer.probabilities[0] == 1.0

    def test_classes_without_a_term_count_for_nothing(self):
        answer = back_off([[0.5, 0.3, 0.2], [0.1, 0.85, 0.05]], [CD8, "", CD4], 0.8)
        assert answer.ids.tolist() == ["", ""]
        assert answer.is_backed_off.tolist() == [True, False]
        assert back_off([[0.6, 0.4]], ["", ""], 0.8).ids.tolist() == [""]

    def test_single_precision_sums_reach_the_threshold(self):
        row = np.array([[0.1, 0.2, 0.7]], dtype=np.float32)
        assert back_off(row, [CD4, CD8, B], 1.0).labels[0] == "lymphocyte"

    def test_candidates_are_one_per_set_of_classes(self):
        candidates = candidate_terms(self.CLASSES)
        assert candidates.members.shape == (5, len(candidates.ids))
        assert len({tuple(column) for column in candidates.members.T}) == len(candidates.ids)
        assert (np.diff(candidates.members.sum(axis=0)) >= 0).all()
        assert not set(candidates.ids) & set(TOO_GENERAL)

    def test_no_cells_and_no_classes(self):
        answer = back_off(np.zeros((0, 5)), self.CLASSES, 0.8)
        assert answer.ids.shape == answer.probabilities.shape == answer.is_backed_off.shape == (0,)
        assert back_off(np.zeros((3, 0)), [], 0.8).ids.tolist() == ["", "", ""]

    def test_impossible_input_is_refused(self):
        with pytest.raises(ConfigError, match="threshold = 2"):
            back_off([[1.0]], [CD8], 2)
        with pytest.raises(ConfigError, match="2 class ids"):
            back_off([[1.0]], [CD8, B], 0.5)
        for row in ([2.0, 3.0], [-0.5, 0.5], [np.nan, 0.5]):
            with pytest.raises(ConfigError, match="not scores"):
                back_off([row], [CD8, B], 0.5)
        with pytest.raises(KeyNotFoundError, match="CL:0000625"):
            back_off([[1.0]], ["CL:625"], 0.5)

    def test_deprecated_class_ids_are_replaced(self):
        below = CL.descendants("CL:0000066")  # epithelial cell
        old = next(t for t in CL.terms.values() if t.is_deprecated and t.replaced_by in below)
        assert back_off([[1.0]], [old.id], 0.5).ids[0] == old.replaced_by
