import numpy as np
import pytest

from scdiva.errors import BundleError, GeneError
from scdiva.genes import FIRST_GENE_ROW, MASK_ROW, PAD_ROW, GeneVocabulary, gene_table


@pytest.fixture(scope="module")
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary.default()


def toy(*ids: str) -> GeneVocabulary:
    return GeneVocabulary(np.array(ids), np.array([f"S{name}" for name in ids]))


def test_default_has_the_papers_number_of_rows(vocabulary: GeneVocabulary) -> None:
    assert (vocabulary.n_genes, vocabulary.n_rows) == (41_813, 41_818)
    assert (PAD_ROW, MASK_ROW, FIRST_GENE_ROW) == (0, 1, 2)
    specials = {PAD_ROW, MASK_ROW, vocabulary.pad_fill_row, vocabulary.bos_row, vocabulary.eos_row}
    genes = set(vocabulary.row_of_gene(np.arange(vocabulary.n_genes)).tolist())
    assert genes | specials == set(range(vocabulary.n_rows))
    assert not genes & specials


def test_default_is_ordered_by_tier_then_id(vocabulary: GeneVocabulary) -> None:
    table = gene_table()
    ranked = table[table["tier"] < 99]
    assert len(ranked) == 41_818
    expected = sorted(ranked.index, key=lambda name: (int(ranked.at[name, "tier"]), name))[:-5]
    assert vocabulary.ensembl_id.tolist() == expected
    assert vocabulary.ensembl_id[0] == "ENSG00000000003"
    # Tier 10 sorts after tier 9, not after tier 1: a sort of strings would not.
    tiers = table.loc[vocabulary.ensembl_id, "tier"].to_numpy()
    assert (np.diff(tiers) >= 0).all()
    assert tiers[-1] == 12


def test_default_is_made_once(vocabulary: GeneVocabulary) -> None:
    assert GeneVocabulary.default() is vocabulary


def test_default_fingerprint_is_pinned(vocabulary: GeneVocabulary) -> None:
    # Every bundle stores it: if this changes, shipped models stop loading.
    assert vocabulary.fingerprint == "93015cd09300f4e5bb7ad7a53523c8731d4a06b0a259d1d7637a22ff97ca0b11"


def test_fingerprint_sees_order_and_ids_but_not_symbols() -> None:
    base = toy("A", "B", "C")
    assert base.fingerprint == GeneVocabulary(base.ensembl_id, np.array(["x", "y", "z"])).fingerprint
    assert base.fingerprint != toy("B", "A", "C").fingerprint
    assert base.fingerprint != toy("A", "B").fingerprint
    assert base == toy("A", "B", "C")
    assert hash(base) == hash(toy("A", "B", "C"))
    assert base != toy("C", "B", "A")
    # Joining without a separator would make these two the same.
    assert toy("AB", "C").fingerprint != toy("A", "BC").fingerprint


def test_arrays_cannot_be_changed_and_are_not_shared() -> None:
    ids = np.array(["A", "B"])
    vocabulary = GeneVocabulary(ids, ids)
    ids[0] = "Z"
    assert vocabulary.ensembl_id[0] == "A"
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.ensembl_id[0] = "Q"


@pytest.mark.parametrize(
    ("ids", "symbols"), [(["A", "A"], ["x", "y"]), (["A"], ["x", "y"]), ([], []), (["A", ""], ["x", "y"])]
)
def test_impossible_vocabularies_are_refused(ids: list[str], symbols: list[str]) -> None:
    with pytest.raises(BundleError):
        GeneVocabulary(np.array(ids, dtype=str), np.array(symbols, dtype=str))


def test_tsv_round_trip(vocabulary: GeneVocabulary, tmp_path) -> None:
    path = tmp_path / "vocabulary.tsv"
    vocabulary.write_tsv(path)
    back = GeneVocabulary.read_tsv(path)
    assert back.fingerprint == vocabulary.fingerprint
    assert (back.symbol == vocabulary.symbol).all()
    lines = path.read_text().splitlines()
    assert lines[0] == "row\tensembl_id\tsymbol"
    assert lines[1] == "2\tENSG00000000003\tTSPAN6"
    assert len(lines) == 41_814


@pytest.mark.parametrize(
    "text",
    [
        "",
        "row\tensembl_id\tsymbol\n",
        "row\tsymbol\n2\tA\n",
        "row\tensembl_id\tsymbol\n1\tA\ta\n",
        "row\tensembl_id\tsymbol\n2\tA\ta\n4\tB\tb\n",
        "row\tensembl_id\tsymbol\n2\tA\ta\n3\tA\tb\n",
        "row\tensembl_id\tsymbol\n2\tA\n",
        "row\tensembl_id\tsymbol\n2\t\ta\n",
    ],
)
def test_damaged_tsv_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "vocabulary.tsv"
    path.write_text(text)
    with pytest.raises(BundleError):
        GeneVocabulary.read_tsv(path)


def test_absent_tsv_is_refused(tmp_path) -> None:
    with pytest.raises(BundleError, match=r"absent\.tsv"):
        GeneVocabulary.read_tsv(tmp_path / "absent.tsv")


def test_subset_keeps_the_order_of_the_vocabulary(vocabulary: GeneVocabulary) -> None:
    by_index = vocabulary.subset(np.array([30, 3, 200]))
    mask = np.zeros(vocabulary.n_genes, dtype=bool)
    mask[[3, 30, 200]] = True
    assert by_index.ensembl_id.tolist() == vocabulary.ensembl_id[[3, 30, 200]].tolist()
    assert by_index == vocabulary.subset(mask)
    assert by_index.n_rows == 8


@pytest.mark.parametrize("genes", [[1, 1], [-1], [41_813], [], [True, False]])
def test_impossible_subsets_are_refused(vocabulary: GeneVocabulary, genes: list) -> None:
    with pytest.raises(GeneError):
        vocabulary.subset(np.array(genes) if genes else np.zeros(0, dtype=int))


def test_rows_and_genes_are_inverse_and_checked(vocabulary: GeneVocabulary) -> None:
    genes = np.array([[0, 5], [41_812, 7]])
    assert (vocabulary.gene_of_row(vocabulary.row_of_gene(genes)) == genes).all()
    for special in (PAD_ROW, MASK_ROW, vocabulary.pad_fill_row, vocabulary.eos_row):
        with pytest.raises(GeneError):
            vocabulary.gene_of_row(special)
    with pytest.raises(GeneError):
        vocabulary.row_of_gene([-1])


def test_find_understands_what_people_type(vocabulary: GeneVocabulary) -> None:
    names = ["CD3D", "ENSG00000167286", "ENSG00000167286.9", "MARCH1", "MATR3", "CD99"]
    found = vocabulary.find(names)
    assert vocabulary.symbol[found].tolist() == ["CD3D", "CD3D", "CD3D", "MARCHF1", "MATR3", "CD99"]
    assert vocabulary.find("CD3D").tolist() == [found[0]]
    assert vocabulary.find([]).shape == (0,)


def test_find_names_the_unknown_and_suggests(vocabulary: GeneVocabulary) -> None:
    with pytest.raises(GeneError) as caught:
        vocabulary.find(["CD3D", "cd3e", "FOXP33", "SNORA70"])
    text = str(caught.value)
    assert "3 of 4" in text
    assert "'cd3e' (unknown)" in text
    assert "CD3E" in caught.value.fix
    assert "FOXP3" in caught.value.fix
    assert "'SNORA70' (ambiguous)" in text


def test_find_says_when_a_gene_is_outside_the_vocabulary(vocabulary: GeneVocabulary) -> None:
    small = vocabulary.subset(vocabulary.find(["CD3D", "MS4A1"]))
    assert small.find(["MS4A1"]).size == 1
    with pytest.raises(GeneError, match=r"'NKG7' \(not in this vocabulary\)"):
        small.find(["NKG7"])


def test_annotation_is_in_vocabulary_order(vocabulary: GeneVocabulary) -> None:
    genes = vocabulary.find(["MT-CO1", "RPL3", "SPI1", "CD3D"])
    some = vocabulary.annotation().iloc[genes]
    assert some["is_mito"].tolist() == [True, False, False, False]
    assert some["is_ribo"].tolist() == [False, True, False, False]
    assert some["is_tf"].tolist() == [False, False, True, False]
    assert some["chrom"].tolist() == ["chrM", "chr22", "chr11", "chr11"]
    foreign = GeneVocabulary(np.array(["NOT_A_GENE", "ENSG00000198804"]), np.array(["X", "MT-CO1"])).annotation()
    assert foreign["is_mito"].tolist() == [False, True]
    assert foreign["biotype"].tolist() == ["", "protein_coding"]


def test_gene_table_has_no_withheld_columns() -> None:
    table = gene_table()
    assert not {"entrez", "description", "hgnc_approved_2022"} & set(table.columns)
    assert len(table) == 78_894
    assert table["is_tf"].sum() > 1_500
    assert table["is_mito"].sum() == 37
