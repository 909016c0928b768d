from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdiva.data.perturbations import Perturbation, parse_perturbation, parse_perturbations
from scdiva.errors import KeyNotFoundError, SourceError
from scdiva.genes import GeneVocabulary

VOCABULARY = GeneVocabulary.default()
GENES = ("CD86", "IRF1", "JAK2", "STAT1", "TP53")
GUIDE = "10023_STAT1_P1P2_ENSG00000115415"


def name(text: str, control="ctrl", **options) -> str:
    return parse_perturbation(text, control=control, vocabulary=VOCABULARY, **options).name


@pytest.mark.parametrize(
    ("text", "control", "expected"),
    [
        ("ctrl", "ctrl", "control"),
        ("STAT1+ctrl", "ctrl", "STAT1"),
        ("ctrl+STAT1", "ctrl", "STAT1"),
        ("STAT1+IRF1", "ctrl", "IRF1+STAT1"),
        ("STAT1 + IRF1", "ctrl", "IRF1+STAT1"),
        ("control", "control", "control"),
        ("STAT1_IRF1", "control", "IRF1+STAT1"),
        ("STAT1_control", "control", "STAT1"),
        ("STAT1_nobody", "control", "STAT1_nobody"),
        ("STAT1+STAT1", "control", "STAT1"),
        ("non-targeting", "non-targeting", "control"),
        ("non-targeting", ("safe", "non-targeting"), "control"),
        (GUIDE, "non-targeting", "STAT1"),
        ("10746_non-targeting_non-targeting_non-targeting", "non-targeting", "control"),
        ("STAT1@2.5", "ctrl", "STAT1@2.5"),
        ("STAT1+IRF1@2.5", "ctrl", "IRF1+STAT1@2.5"),
        ("STAT1@2.5+ctrl@2.5", "ctrl", "STAT1@2.5"),
        ("ctrl@2.5", "ctrl", "control"),
        ("STAT1@home", "ctrl", "STAT1@home"),
        ("MARCH8", "ctrl", "MARCHF8"),
        ("ENSG00000115415", "ctrl", "STAT1"),
    ],
)
def test_labels_of_every_layout(text, control, expected):
    assert name(text, control) == expected


def test_an_old_name_within_a_guide_is_told_by_its_ensembl_id():
    assert name("7_anything_P1_ENSG00000115415") == "STAT1"


def test_a_known_whole_is_not_taken_apart():
    assert name("STAT1_IRF1", names={"STAT1_IRF1": ""}) == "STAT1_IRF1"
    assert name("HOUSE_IRF1", names={"HOUSE": ""}) == "HOUSE+IRF1"


def test_genes_of_the_file_are_called_as_their_columns_are_aligned():
    assert name("weird", names={"weird": "STAT1"}) == "STAT1"


def test_treatments_keep_their_names():
    # IFNB is an alias of the gene IFNB1, TPA one of PLAT
    assert name("IFNB", kind="treatment") == "IFNB"
    labels = ["DMSO", "(+)-JQ1", "TPA", "LPS", "TPA+LPS", "TPA_LPS", "TPA_once"]
    parsed = parse_perturbations(labels, control="DMSO", kind="treatment", vocabulary=VOCABULARY)
    assert [p.name for p in parsed.perturbations] == ["control", "(+)-JQ1", "LPS", "LPS+TPA", "TPA", "TPA_once"]
    assert parsed.code.tolist() == [0, 1, 4, 2, 3, 3, 5]
    assert parsed.unknown == {}


@pytest.mark.parametrize("text", ["", "  ", "STAT1+", "+", "STAT1@1+IRF1@2"])
def test_labels_without_meaning_are_refused(text):
    with pytest.raises(SourceError, match="label"):
        name(text)


def test_a_dose_of_the_label_and_another_of_the_column_are_refused():
    assert name("STAT1@2", dose=2.0) == "STAT1@2"
    with pytest.raises(SourceError, match="doses"):
        name("STAT1@2", dose=3.0)


def test_a_column():
    labels = ["ctrl", "B2M+ctrl", "IRF1+STAT1", "STAT1+IRF1", "MARCH8", "nan", "FOO", "FOO+IRF1", "unknown"]
    parsed = parse_perturbations(labels, control="ctrl", kind="activation", vocabulary=VOCABULARY)
    assert parsed.perturbations[0] == Perturbation((), "activation")
    names = [parsed.perturbations[c].name if c >= 0 else None for c in parsed.code]
    assert names == ["control", "B2M", "IRF1+STAT1", "IRF1+STAT1", "MARCHF8", None, "FOO", "FOO+IRF1", None]
    assert parsed.renamed == {"MARCH8": "MARCHF8"}
    assert parsed.unknown == {"FOO": 2}


def test_a_column_of_doses():
    doses = np.array([np.nan, 5.0, 1.0, 1.0, 10.0, np.nan])
    parsed = parse_perturbations(["a", "a", "a", "veh", "b", "b"], control="veh", kind="treatment", doses=doses)
    assert [p.name for p in parsed.perturbations] == ["control", "a", "a@1", "a@5", "b", "b@10"]
    assert parsed.code.tolist() == [1, 3, 2, 0, 5, 4]


def test_control_called_none_is_control_and_no_missing_label():
    parsed = parse_perturbations(["None", "STAT1", ""], control="None", vocabulary=VOCABULARY)
    assert parsed.code.tolist() == [0, 1, -1]


def test_an_absent_control_lists_labels_and_candidates():
    labels = ["STAT1"] * 9 + ["NT"] * 3 + ["DMSO_ctrl"] * 2
    with pytest.raises(KeyNotFoundError, match=r"'STAT1' \(9\), 'NT' \(3\).*control='NT' \(or 'DMSO_ctrl'\)"):
        parse_perturbations(labels, control="control", vocabulary=VOCABULARY)


def test_each_of_several_controls_must_be_there():
    with pytest.raises(KeyNotFoundError, match="'negative'"):
        parse_perturbations(["NT", "STAT1"], control=("NT", "negative"), vocabulary=VOCABULARY)


def test_control_in_combinations_only_is_no_control_cell():
    with pytest.raises(KeyNotFoundError, match="no cell has the control 'ctrl'"):
        parse_perturbations(["STAT1+ctrl"], control="ctrl", vocabulary=VOCABULARY)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(GENES), max_size=3, unique=True), min_size=1, max_size=12),
    st.sampled_from("+_"),
    st.randoms(use_true_random=False),
)
def test_what_the_labels_say_is_what_is_read_in_any_order_of_cells(targets, separator, random):
    labels = ["ctrl", *(separator.join(row) or "ctrl" for row in targets)]
    expected = [(), *(tuple(sorted(row)) for row in targets)]
    order = list(range(len(labels)))
    random.shuffle(order)
    parsed = parse_perturbations([labels[i] for i in order], control="ctrl", vocabulary=VOCABULARY)
    assert [parsed.perturbations[c].targets for c in parsed.code] == [expected[i] for i in order]
    assert [p.targets for p in parsed.perturbations] == sorted(set(expected))
    assert all(name(p.name, "control") == p.name for p in parsed.perturbations)


def test_ensembl_ids_are_taken_apart_as_symbols_are():
    from scdiva.genes import GeneVocabulary

    genes = GeneVocabulary.default()
    stat1, irf3 = "ENSG00000115415", "ENSG00000126456"
    for text in (f"{stat1}+{irf3}", f"STAT1+{irf3}", f"{irf3}_{stat1}", f"STAT1_{irf3}", f"{stat1}+IRF3"):
        assert parse_perturbation(text, control="control", vocabulary=genes).targets == ("IRF3", "STAT1"), text
    for text in (stat1, f"STAT1_{stat1}", f"{stat1}.12", f"{stat1}+control"):
        assert parse_perturbation(text, control="control", vocabulary=genes).targets == ("STAT1",), text
