import numpy as np
import pytest

from scdiva.errors import GeneError
from scdiva.genes import GeneVocabulary, detect_species, gene_table, mouse_to_human, require_human

HUMAN_10 = ["CD3D", "MS4A1", "NKG7", "LYZ", "PPBP", "GNLY", "FCGR3A", "CST3", "IL7R", "CCR7"]
MOUSE_10 = ["Cd3d", "Ms4a1", "Nkg7", "Lyz2", "Ppbp", "Gzma", "Fcgr4", "Cst3", "Il7r", "Ccr7"]


@pytest.fixture(scope="module")
def human() -> np.ndarray:
    return GeneVocabulary.default().symbol[:20_000]


@pytest.fixture(scope="module")
def mouse() -> np.ndarray:
    return np.array(sorted(mouse_to_human()))


@pytest.mark.parametrize("size", [10, 300, 5_000])
@pytest.mark.parametrize("seed", range(5))
def test_panels_of_one_species(human: np.ndarray, mouse: np.ndarray, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert detect_species(rng.choice(human, size, replace=False)) == "human"
    assert detect_species(rng.choice(mouse, size, replace=False)) == "mouse"


def test_small_panels_of_well_known_genes() -> None:
    assert detect_species(HUMAN_10) == "human"
    assert detect_species(MOUSE_10) == "mouse"


def test_ids_speak_too() -> None:
    names = [f"gene{i}" for i in range(300)]
    assert detect_species(names, ["ENSMUSG00000032094"] * 300) == "mouse"
    assert detect_species(names, ["ENSG00000167286"] * 300) == "human"
    assert detect_species(names, ["ENSG00000167286", "ENSMUSG00000032094"] * 150) == "mixed"
    assert detect_species(["ENSMUSG00000032094.4"] * 3) == "mouse"


@pytest.mark.parametrize(
    ("human_prefix", "mouse_prefix"),
    [("GRCh38_", "mm10_"), ("hg19_", "mm10_"), ("GRCh38___", "mm10___"), ("GRCh38-", "GRCm39-")],
)
def test_genome_prefixes(human_prefix: str, mouse_prefix: str) -> None:
    human = [human_prefix + name for name in HUMAN_10]
    mouse = [mouse_prefix + name for name in MOUSE_10]
    assert detect_species(human) == "human"
    assert detect_species(mouse) == "mouse"
    assert detect_species(human + mouse) == "mixed"


def test_a_transgene_does_not_make_a_human_file_mixed(human: np.ndarray) -> None:
    assert detect_species([*human[:300], "Cd4", "mm10_Trp53"]) == "human"


def test_old_human_names_are_human() -> None:
    assert detect_species(["MARCH1", "SEPT7", "FAM46C", "C1orf56", "KIAA1551", "ATP5B"]) == "human"


@pytest.mark.parametrize("names", [["gene1", "gene2"], ["ENSDARG00000000001"] * 5, ["0", "1", "2"], []])
def test_the_unknown_stays_unknown(names: list[str]) -> None:
    assert detect_species(names) == "unknown"


def test_mostly_unknown_names_are_unknown() -> None:
    assert detect_species(["CD3D"] + [f"peak_{i}" for i in range(100)]) == "unknown"


def test_order_does_not_matter(human: np.ndarray, mouse: np.ndarray) -> None:
    names = [*human[:100], *mouse[:100]]
    assert detect_species(names) == detect_species(names[::-1]) == "mixed"


def test_require_human_lets_human_pass() -> None:
    require_human(HUMAN_10)
    require_human(["1", "2"], ["ENSG00000167286", "ENSG00000156738"])


def test_require_human_refuses_mouse_with_a_way_out() -> None:
    with pytest.raises(GeneError, match="mouse") as caught:
        require_human(MOUSE_10)
    assert "ortholog" in caught.value.fix
    assert "Cd3d" in caught.value.found


def test_require_human_refuses_mixtures() -> None:
    with pytest.raises(GeneError, match="mouse and human together") as caught:
        require_human([f"GRCh38_{name}" for name in HUMAN_10] + [f"mm10_{name}" for name in MOUSE_10])
    assert "pick the human columns" in caught.value.fix


def test_require_human_shows_what_it_found() -> None:
    with pytest.raises(GeneError) as caught:
        require_human(["peak1", "peak2", "peak3", "peak4", "peak5", "peak6"])
    assert "'peak5'" in caught.value.found
    assert "peak6" not in caught.value.found
    assert "ENSG00000167286" in caught.value.expected


def test_lower_case_human_symbols_are_refused_with_the_fix() -> None:
    with pytest.raises(GeneError, match="upper case"):
        require_human([name.lower() for name in HUMAN_10])


def test_mouse_to_human_knows_the_orthologs() -> None:
    table = gene_table()
    orthologs = mouse_to_human()
    assert table.at[orthologs["Cd3d"], "symbol"] == "CD3D"
    assert table.at[orthologs["Trp53"], "symbol"] == "TP53"
    known = [ensembl for ensembl in orthologs.values() if ensembl]
    assert len(known) > 16_000
    assert set(known) <= set(table.index)
