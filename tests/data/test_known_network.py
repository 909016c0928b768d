"""Tables of known regulation: columns, spellings, repeated pairs, what is lost."""

import numpy as np
import pandas as pd
import pytest

from scdiva.data.known_network import read_truth
from scdiva.errors import SourceError
from scdiva.genes import GeneVocabulary


def table(**columns):
    return pd.DataFrame(columns)


def test_names_become_symbols_and_what_is_no_gene_is_counted():
    found = read_truth(
        # PU.1 is an alias of SPI1, ENSG00000066336 its Ensembl id
        table(source=["PU.1", "ENSG00000066336", "NOGENE", "GATA1"], target=["CD14", "CD14", "CD14", "NOR_THIS"]),
        name="mine",
    )
    assert found.regulators.tolist() == ["SPI1"]
    assert found.targets.tolist() == ["CD14"]
    assert (found.n_rows, found.n_lost, found.n_merged, found.n_edges) == (4, 2, 1, 1)
    assert found.lost_regulators == ("NOGENE",)
    assert found.lost_targets == ("NOR_THIS",)
    assert not found.has_signs
    assert "1 pairs of 1 regulators" in str(found)


def test_signs_come_from_numbers_and_words_and_most_rows_win():
    rows = table(
        tf=["SPI1"] * 5 + ["GATA1"] * 2,
        target=["CD14", "CD14", "CD14", "LYZ", "CD68", "HBB", "HBB"],
        mode=["Activation", "Activation", "Repression", "Repression", "Unknown", "Activation", "Repression"],
    )
    assert read_truth(rows).of("SPI1") == {"CD14": 1, "CD68": 0, "LYZ": -1}
    assert read_truth(rows).of("GATA1") == {"HBB": 0}
    assert read_truth(rows).of("MYC") == {}
    numbers = read_truth(table(source=["SPI1", "SPI1"], target=["CD14", "LYZ"], weight=[0.5, -2.0]))
    assert numbers.of("SPI1") == {"CD14": 1, "LYZ": -1}
    assert numbers.has_signs


def test_a_column_named_sign_comes_before_mode_and_weight():
    rows = table(source=["SPI1"], target=["CD14"], mode=["Activation"], sign=[-1])
    assert read_truth(rows).of("SPI1") == {"CD14": -1}


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".csv", ".csv.gz"])
def test_files_say_the_same_as_the_frame(tmp_path, suffix):
    rows = table(source=["SPI1", "GATA1"], target=["CD14", "HBB"], weight=[1, -1])
    rows.to_csv(tmp_path / f"known{suffix}", sep="," if "csv" in suffix else "\t", index=False)
    found = read_truth(tmp_path / f"known{suffix}")
    assert found.name == "known"
    assert found.of("GATA1") == {"HBB": -1}


def test_only_genes_of_the_vocabulary_are_taken():
    genes = GeneVocabulary.default()
    small = genes.subset(genes.find(["SPI1", "CD14"]))
    found = read_truth(table(source=["SPI1", "SPI1"], target=["CD14", "LYZ"]), small)
    assert found.targets.tolist() == ["CD14"]
    assert found.lost_targets == ("LYZ",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (table(a=["SPI1"], target=["CD14"]), "columns"),
        (table(source=["SPI1"], target=["nothing"]), "no row"),
        (table(source=["SPI1"], target=["CD14"], mode=["perhaps"]), "perhaps"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(rows, words):
    with pytest.raises(SourceError, match=words):
        read_truth(rows)


def test_missing_files_and_other_formats_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no file"):
        read_truth(tmp_path / "none.tsv")
    (tmp_path / "table.xlsx").write_text("x")
    with pytest.raises(SourceError, match="no table"):
        read_truth(tmp_path / "table.xlsx")


def test_edges_are_sorted_and_unique():
    rng = np.random.default_rng(0)
    names = np.array(["SPI1", "GATA1", "CD14", "LYZ", "HBB"])
    found = read_truth(table(source=rng.choice(names, 200), target=rng.choice(names, 200)))
    pairs = list(zip(found.regulators.tolist(), found.targets.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
