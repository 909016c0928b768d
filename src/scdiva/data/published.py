"""The sets on which scDiVa's numbers were published: what their files are called, their keys and splits, a loader.

Nothing is downloaded. The authors publish neither files nor keys; the table says what the files hold that scGPT, scIB,
TOSICA and others published under these names, and what is a guess says so (:class:`Key`). The sizes are those the
authors print; a file of other sizes is read, and the difference noted. docs/published_sets.md has the printed results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.conditions import is_missing, label_text
from scdiva.data.reader import find_counts, is_gene_expression
from scdiva.data.source import CellSource, Matrix, open_source
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, ScaleError, SourceError
from scdiva.genes import detect_species

if TYPE_CHECKING:
    from anndata import AnnData

Task = Literal["reconstruction", "integration", "annotation", "probe", "perturbation"]
"""``annotation`` is the authors' fine-tuning, ``probe`` their "zero-shot" annotation, which trains a head on labels."""

_BLOCK = 4096
_TRAIN = frozenset({"train", "training", "reference", "ref", "0", "false"})
_TEST = frozenset({"test", "testing", "query", "1", "true"})
_SYMBOL_COLUMNS = ("gene_symbols", "gene_name", "gene_symbol", "Gene Symbol", "feature_name", "Symbol", "Gene")


@dataclass(frozen=True, slots=True)
class Key:
    """A column of ``.obs``.

    Parameters
    ----------
    name
        Its name.
    certain
        Whether the published file is known to have it. Otherwise it is our guess, and a note says so where it is used.
    """

    name: str
    certain: bool = True


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """What is known of a set.

    Parameters
    ----------
    name
        As the authors call it.
    tasks
        What they measured on it.
    size
        Printed numbers of cells, genes, batches and types; None where none is printed.
    label_key, batch_key, perturbation_key
        Columns of ``.obs``; None where the set has nothing of the kind. A file may lack labels or batches that nothing
        which the authors measured on the set needs.
    files
        What its file is called; for a set with a published split, the file of training cells and that of test cells.
    source
        Where it is from.
    is_split
        Whether training and test cells are published. Otherwise those who evaluate split it, with their own seeds.
    exclude
        Column and values of cells that do not belong to it.
    notes
        What one should know before believing a result.
    """

    name: str
    tasks: tuple[Task, ...]
    size: tuple[int | None, int | None, int | None, int | None]
    label_key: Key | None
    batch_key: Key | None
    files: tuple[str, ...]
    source: str
    is_split: bool = False
    perturbation_key: Key | None = None
    exclude: tuple[str, tuple[str, ...]] | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSet:
    """A published set in memory.

    Parameters
    ----------
    definition
        Its row of the table.
    adata
        int32 raw counts in ``X`` (CSR), genes only; ``.obs`` and ``.var`` of the file.
    labels, batches, perturbations
        ``(n_cells,)`` text, empty where nothing is known; None where there is no such key.
    is_test
        ``(n_cells,)``: the published split; None where none is published.
    keys
        The columns that were used, by what they were used for.
    counts_in
        Where the counts were found, and on which scale they were.
    notes
        What differs from the published set, and which keys are guesses. Show them.
    """

    definition: PublishedSet
    adata: AnnData
    labels: NDArray[np.str_] | None
    batches: NDArray[np.str_] | None
    perturbations: NDArray[np.str_] | None
    is_test: NDArray[np.bool_] | None
    keys: Mapping[str, str]
    counts_in: str
    notes: tuple[str, ...]

    @property
    def train(self) -> NDArray[np.int64]:
        """Positions of the published training cells; all cells where no split is published."""
        return np.arange(self.adata.n_obs) if self.is_test is None else np.flatnonzero(~self.is_test)

    @property
    def test(self) -> NDArray[np.int64]:
        """Positions of the published test cells; none where no split is published."""
        return np.arange(0) if self.is_test is None else np.flatnonzero(self.is_test)


def _guess(name: str) -> Key:
    return Key(name, certain=False)


_SCGPT = "files published with scGPT (github.com/bowang-lab/scGPT, data/README.md)"
_TRAN = "batch-effect benchmark of Tran et al. 2020 (doi:10.1186/s13059-019-1850-9)"

_SETS = (
    PublishedSet(
        "Immune", ("reconstruction", "integration"), (32484, 12303, 9, 16), Key("final_annotation"), Key("batch"),
        ("Immune_ALL_human.h5ad",), "scIB (Luecken et al. 2022), figshare.com/ndownloader/files/25717328",
        exclude=("batch", ("Villani",)),
        notes="Counts are in layers['counts']. The file has 33,506 cells; those of Villani (1,022) are TPM, no counts. "
        "Without them 32,484 in nine batches are left, as printed.",
    ),
    PublishedSet(
        "Zheng68k", ("reconstruction",), (68579, 32738, None, None), _guess("celltype"), None,
        ("Zheng68K.h5ad",), "Zheng et al. 2017, 10x Genomics; labels by correlation with sorted cells",
        notes="The file that scBERT published has log values of fewer genes; 10x's own matrix has 32,738 genes and no "
        "labels.",
    ),
    PublishedSet(
        "Pancreas", ("reconstruction",), (None, None, None, None), _guess("celltype"), _guess("tech"),
        ("human_pancreas_norm_complexBatch.h5ad",), "not stated; scIB's file has these keys",
        notes="The authors do not say which pancreas set. scIB's has values of several technologies, some of which are "
        "no counts.",
    ),
    PublishedSet(
        "BMMC", ("integration",), (90261, 14087, 12, 45), Key("cell_type"), Key("batch"),
        ("GSE194122_openproblems_neurips2021_cite_BMMC_processed.h5ad",), "GEO GSE194122 (NeurIPS 2021, CITE-seq)",
        notes="Counts are in layers['counts']. The printed 14,087 features include 134 antibodies; genes alone are "
        "kept here.",
    ),
    PublishedSet(
        "PBMC12k", ("reconstruction", "integration"), (11990, 3346, 2, 9), Key("str_labels"), Key("batch"),
        ("pbmc_10k.h5ad",), "scvi.data.pbmc_dataset() (10x PBMC 4k and 8k), as scGPT uses it",
        notes="Write it with scvi.data.pbmc_dataset().write_h5ad(...). Copies made by others call the labels "
        "'celltype'. 3,346 selected genes.",
    ),
    PublishedSet(
        "Perirhinal", ("integration",), (17535, 59357, 2, 10), _guess("cell_type"), _guess("sample_id"),
        ("PerirhinalCortex.h5ad",), f"{_SCGPT}; Siletti et al. 2023, CELLxGENE",
    ),
    PublishedSet(
        "COVID-19", ("integration",), (20000, 1200, 2, 39), Key("celltype"), _guess("batch"),
        ("covid_subsampled.h5ad",), f"{_SCGPT}; Lotfollahi et al. 2022",
        notes="scGPT counts 18 batches. The printed two are perhaps its reference (15,997 cells) and query (4,003).",
    ),
    PublishedSet(
        "hPancreas", ("annotation",), (14818, 3000, 2, 14), Key("Celltype"), None,
        ("demo_train.h5ad", "demo_test.h5ad"), f"TOSICA (figshare.com/projects/TOSICA_demo/158489); {_SCGPT}",
        is_split=True,
        notes="10,600 training cells (Baron, Muraro), 4,218 test cells (Xin, Segerstolpe, Lawlor): log values of 3,000 "
        "genes, of several technologies. Where they do not go back to counts the file is refused.",
    ),
    PublishedSet(
        "MS", ("annotation",), (21312, 3000, 2, 18), Key("Factor Value[inferred cell type - authors labels]"),
        None, ("c_data.h5ad", "filtered_ms_adata.h5ad"), f"{_SCGPT}; Schirmer et al. 2019, EMBL-EBI E-HCAD-35",
        is_split=True,
        notes="7,844 control cells to train on, 13,468 cells of patients to test on. Some copies exchange the two, "
        "which makes it another task.",
    ),
    PublishedSet(
        "Myeloid", ("annotation",), (13178, 3000, 2, 21), Key("cell_type"), Key("batch"),
        ("reference_adata.h5ad", "query_adata.h5ad"), f"{_SCGPT}; Cheng et al. 2021, GEO GSE154763", is_split=True,
        notes="9,748 training cells of six cancers, 3,430 test cells of three others.",
    ),
    PublishedSet(
        "Myeloid_b", ("annotation",), (9926, 3000, 2, 7), _guess("cell_type"), _guess("batch"),
        ("reference_adata.h5ad", "query_adata.h5ad"), "not stated; Myeloid with fewer types, as GeneMamba has it",
        is_split=True, notes="No published file is known to us.",
    ),
    PublishedSet(
        "Cell_Lines", ("probe",), (9531, 32738, 3, 2), _guess("celltype"), _guess("batch"), ("Cell_Lines.h5ad",),
        f"{_TRAN}, set 6; 10x Jurkat, 293T and 50:50",
    ),
    PublishedSet(
        "DC", ("probe",), (576, 26593, 2, 4), _guess("celltype"), _guess("batch"), ("DC.h5ad",),
        f"{_TRAN}, set 1; Villani et al. 2017", notes="Smart-seq2: refused where it is TPM.",
    ),
    PublishedSet(
        "HumanPBMC", ("probe",), (15476, 33694, 2, 9), _guess("celltype"), _guess("batch"), ("HumanPBMC.h5ad",),
        f"{_TRAN}, set 5; 10x 3' and 5'",
    ),
    PublishedSet(
        "MCA", ("probe",), (6954, 15006, 2, 11), _guess("celltype"), _guess("batch"), ("MCA.h5ad",),
        f"{_TRAN}, set 2; Mouse Cell Atlas and Tabula Muris",
        notes="Mouse genes: human models refuse it, and what the authors did with it is not stated.",
    ),
    PublishedSet(
        "PBMC", ("probe",), (18868, 6998, 2, 7), _guess("cell_type"), _guess("condition"), ("PBMC.h5ad",),
        "not stated; the size is that of Kang et al. 2018 as scGen has it", notes="Batches are control and IFN-beta.",
    ),
    PublishedSet(
        "PBMC368K", ("probe",), (4638, 14236, 2, 8), _guess("celltype"), _guess("batch"), ("PBMC368k.h5ad",),
        "10x PBMC 3k and a part of Zheng68k, as iMAP and ResPAN have it",
    ),
    PublishedSet(
        "Pancrm", ("probe",), (14767, 15558, 5, 15), _guess("celltype"), _guess("batch"), ("Pancrm.h5ad",),
        f"{_TRAN}, set 4; five pancreas studies", notes="Several technologies, some of which are no counts.",
    ),
    PublishedSet(
        "Adamson", ("perturbation",), (68603, 5060, None, None), None, None, ("perturb_processed.h5ad",),
        "GEARS (Adamson et al. 2016)", perturbation_key=Key("condition"), notes="Control cells are 'ctrl'.",
    ),
    PublishedSet(
        "Norman", ("perturbation",), (91205, 5045, None, None), None, None, ("perturb_processed.h5ad",),
        "GEARS (Norman et al. 2019)", perturbation_key=Key("condition"),
        notes="Control cells are 'ctrl', a pair of genes is 'A+B', a single one 'A+ctrl' or 'ctrl+A'.",
    ),
)  # fmt: skip

PUBLISHED: Mapping[str, PublishedSet] = {row.name: row for row in _SETS}
"""Every set by name."""


def published_set(name: str) -> PublishedSet:
    """Return a row of the table; upper and lower case do not matter.

    Raises
    ------
    KeyNotFoundError
        There is no such set; the error lists those there are.
    """
    for known, row in PUBLISHED.items():
        if known.lower() == name.lower():
            return row
    raise KeyNotFoundError(
        f"no published set {name!r}", expected=f"one of {', '.join(PUBLISHED)}", fix="see docs/published_sets.md"
    )


def load_published(
    name: str,
    path: str | Path | Sequence[str | Path],
    *,
    label_key: str | None = None,
    batch_key: str | None = None,
    split_key: str | None = None,
    layer: str | None = None,
) -> LoadedSet:
    """Read a published set from files that you have, with its keys and its split.

    Parameters
    ----------
    name
        One of :data:`PUBLISHED`.
    path
        A file; for a set whose training and test cells are two files, both in this order, or the folder that holds
        them under their published names, or one file with a column that tells them apart.
    label_key, batch_key
        Columns of ``.obs`` instead of those of the table.
    split_key
        Column of ``.obs`` that tells training cells ("train", "reference", "0") from test cells ("test", "query", "1");
        by default "split" where a set with a published split is given as one file.
    layer
        Where the counts are; by default they are found (:func:`~scdiva.data.reader.find_counts`).

    Returns
    -------
    LoadedSet
        All counts are read into memory.

    Raises
    ------
    SourceError
        A file is missing or damaged, or a set of two files is given as one without a split.
    KeyNotFoundError
        A column does not exist (the error lists those there are), or does not tell training from test cells.
    ScaleError
        No matrix holds raw counts or goes back to them exactly; the error lists the matrices.
    GeneError
        Training and test file have no genes in common, or duplicated ones in different order.
    """
    row = published_set(name)
    paths = _paths(row, path)
    wanted = {
        use: key
        for use, key in (
            ("label", _named(label_key) or row.label_key),
            ("batch", _named(batch_key) or row.batch_key),
            ("perturbation", row.perturbation_key),
        )
        if key is not None
    }
    may_lack = {
        use for use, given in (("label", label_key), ("batch", batch_key)) if given is None and not _is_needed(row, use)
    }
    parts = [_read_part(row, part, wanted, may_lack, layer) for part in paths]
    wanted = {use: key for use, key in wanted.items() if all(key.name in part.obs.columns for part in parts)}
    adata, gene_notes = _joined(row, parts, paths)
    is_test, split = _split(row, parts, paths, split_key)
    texts = {use: np.concatenate([_texts(part.obs[key.name]) for part in parts]) for use, key in wanted.items()}
    guesses = [
        f"the {use} key {key.name!r} is our guess; columns: {_columns(parts[0].obs)}"
        for use, key in wanted.items()
        if not key.certain
    ]
    excluded = [note for part in parts for note in part.notes]
    return LoadedSet(
        definition=row,
        adata=adata,
        labels=texts.get("label"),
        batches=texts.get("batch"),
        perturbations=texts.get("perturbation"),
        is_test=is_test,
        keys={**{use: key.name for use, key in wanted.items()}, **split},
        counts_in="; ".join(dict.fromkeys(part.counts_in for part in parts)),
        notes=tuple(dict.fromkeys([*excluded, *gene_notes, *_size_notes(row, adata, texts), *guesses])),
    )


def _is_needed(row: PublishedSet, use: str) -> bool:
    """Tell whether what the authors measured on a set needs its labels or its batches."""
    return "integration" in row.tasks or (use == "label" and row.tasks != ("reconstruction",))


def _named(key: str | None) -> Key | None:
    return None if key is None else Key(key)


def _paths(row: PublishedSet, path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one file, or training and test file."""
    if not isinstance(path, (str, Path)):
        paths = [Path(part) for part in path]
        if len(paths) != 1 and not (row.is_split and len(paths) == 2):
            raise ConfigError(
                f"{len(paths)} files for {row.name}",
                expected="one file, or one of training and one of test cells" if row.is_split else "one file",
                fix=f"published as {' and '.join(row.files)}",
            )
        return paths
    folder = Path(path)
    is_folder = folder.is_dir() and folder.suffix != ".zarr" and not any(folder.glob("*matrix.mtx*"))
    if not is_folder:
        return [folder]
    absent = [file for file in row.files if not (folder / file).exists()]
    if absent:
        there = sorted(file.name for file in folder.glob("*.h5ad"))
        raise SourceError(
            f"the folder {folder} has no {', '.join(absent)} (it has {', '.join(there[:10]) or 'no .h5ad'})",
            expected=f"the file{'s' if len(row.files) > 1 else ''} of {row.name}: {', '.join(row.files)}",
            fix="rename the files, or name them one by one, training cells first",
        )
    return [folder / file for file in row.files]


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of a set: counts of its genes, with annotation."""

    counts: sp.csr_matrix
    obs: pd.DataFrame
    var: pd.DataFrame
    counts_in: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _SomeRows:
    """Some rows of a matrix, read when they are asked for."""

    matrix: Matrix
    positions: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.positions.size, self.matrix.shape[1])

    def __getitem__(self, key: Any) -> sp.csr_matrix:
        return self.matrix.take(self.positions[key])


def _read_part(
    row: PublishedSet, path: Path, wanted: Mapping[str, Key], may_lack: Set[str], layer: str | None
) -> _Part:
    """Read the counts of one file."""
    source = open_source(path)
    lacking: tuple[str, ...] = ()
    for use, key in wanted.items():
        if key.name not in source.obs.columns and use in may_lack:
            lacking = (*lacking, f"no .obs column {key.name!r}: nothing is known of the {use} of cells")
        else:
            _require_column(row, path, source.obs, use, key)
    source, excluded = _without_excluded(row, source)
    notes = (*lacking, *excluded)
    try:
        found = find_counts(source, layer)
        blocks = [
            found.scale.to_counts(found.matrix.rows(a, min(a + _BLOCK, source.n_cells)), found.matrix.name)
            for a in range(0, source.n_cells, _BLOCK)
        ]
    except ScaleError as error:
        raise ScaleError(
            f"{path} ({row.name}) holds {', '.join(source.matrices)}; {error.found}",
            expected=error.expected,
            fix=f"{error.fix}. Of this set: {row.notes or 'nothing more is known'}",
        ) from error
    var = found.matrix.var
    is_gene = _is_gene(var)
    if not is_gene.all():
        notes = (*notes, f"{int((~is_gene).sum())} features that are no genes are left out")
    var, renamed = _with_known_names(var[is_gene])
    counts = sp.csr_matrix(sp.vstack(blocks, format="csr"))
    counts = counts if is_gene.all() else sp.csr_matrix(counts[:, np.flatnonzero(is_gene)])
    return _Part(counts, source.obs, var, found.description, (*notes, *renamed))


def _require_column(row: PublishedSet, path: Path, obs: pd.DataFrame, use: str, key: Key) -> None:
    if key.name not in obs.columns:
        kind = "the key of the published file" if key.certain else "our guess, the published key is not known to us"
        raise KeyNotFoundError(
            f"{path} has no .obs column {key.name!r} for the {use} of {row.name} ({kind})",
            expected=f"one of its columns (distinct values): {_columns(obs)}",
            fix=f"name it: {use}_key=..." if use in ("label", "batch") else "rename the column",
        )


def _columns(obs: pd.DataFrame) -> str:
    """Name all columns of ``.obs`` with their numbers of distinct values."""
    return ", ".join(f"{column} ({obs[column].nunique()})" for column in obs.columns) or "none"


def _without_excluded(row: PublishedSet, source: CellSource) -> tuple[CellSource, tuple[str, ...]]:
    """Leave out the cells that do not belong to the set."""
    if row.exclude is None:
        return source, ()
    column, values = row.exclude
    if column not in source.obs.columns:
        return source, (f"no .obs column {column!r}: cells of {', '.join(values)} could not be left out",)
    kept = np.flatnonzero(~source.obs[column].astype(str).isin(values).to_numpy())
    n_excluded = source.n_cells - kept.size
    if n_excluded == 0:
        return source, ()
    if kept.size == 0:
        raise SourceError(
            f"{source.name} holds cells of {', '.join(values)} only",
            expected=f"other cells of {row.name}",
            fix=row.notes,
        )
    matrices = {m.name: Matrix(m.name, _SomeRows(m, kept), m.var) for m in source.matrices.values()}
    note = f"{n_excluded} cells of {', '.join(values)} are left out, as in the published set"
    return CellSource(source.name, source.path, source.obs.iloc[kept], matrices), (note,)


def _is_gene(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell genes from other features; the NeurIPS 2021 files call genes "GEX"."""
    if "feature_types" in var.columns:
        is_gex = (var["feature_types"].astype(str) == "GEX").to_numpy()
        if is_gex.any():
            return is_gex
    return is_gene_expression(var)


def _with_known_names(var: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Take gene symbols from a column of ``.var`` where its index holds none."""
    if detect_species(var.index.astype(str).to_numpy(dtype=str)) != "unknown":
        return var, ()
    for column in _SYMBOL_COLUMNS:
        if column in var.columns:
            names = var[column].astype(str).to_numpy(dtype=str)
            if detect_species(names) != "unknown":
                return var.set_index(pd.Index(names)), (f"gene names are those of .var[{column!r}]",)
    return var, ()


def _joined(row: PublishedSet, parts: Sequence[_Part], paths: Sequence[Path]) -> tuple[AnnData, list[str]]:
    """Join training and test cells over the genes that both have, in the order of the first file."""
    import anndata as ad

    names = [part.var.index.astype(str).to_numpy(dtype=str) for part in parts]
    counts, var, notes = [part.counts for part in parts], parts[0].var, []
    if len(parts) == 2 and not np.array_equal(names[0], names[1]):
        if any(np.unique(part).size < part.size for part in names):
            raise GeneError(
                f"{paths[0]} and {paths[1]} have their genes in different order, and some names twice",
                expected="the same genes in the same order, or unique names",
                fix="adata.var_names_make_unique() in neither: match the files by Ensembl id",
            )
        common, first, second = np.intersect1d(names[0], names[1], return_indices=True)
        if common.size == 0:
            raise GeneError(
                f"{paths[0]} and {paths[1]} ({row.name}) have no genes in common",
                expected="the same names in both",
                fix="check that both have symbols, or both Ensembl ids",
            )
        order = np.argsort(first)
        counts = [sp.csr_matrix(counts[0][:, first[order]]), sp.csr_matrix(counts[1][:, second[order]])]
        var = var.iloc[first[order]]
        n_lost = names[0].size + names[1].size - 2 * common.size
        if n_lost:
            notes.append(f"{n_lost} genes that only one of the two files has are left out")
    cells = [part.obs.index.astype(str) for part in parts]
    if len(parts) == 2 and len(cells[0].intersection(cells[1])):
        cells = ["train/" + cells[0], "test/" + cells[1]]
    # pandas is about to change what becomes of columns without a value
    filled = [part.obs.dropna(axis="columns", how="all") for part in parts]
    obs = pd.concat([part.set_axis(index) for part, index in zip(filled, cells, strict=True)])
    return ad.AnnData(sp.csr_matrix(sp.vstack(counts, format="csr")), obs=obs, var=var.copy()), notes


def _split(
    row: PublishedSet, parts: Sequence[_Part], paths: Sequence[Path], split_key: str | None
) -> tuple[NDArray[np.bool_] | None, dict[str, str]]:
    """Return which cells are test cells, and the column that says so."""
    if len(parts) == 2:
        return np.repeat([False, True], [len(part.obs) for part in parts]), {}
    if split_key is None and not row.is_split:
        return None, {}
    key, obs = split_key or "split", parts[0].obs
    if key not in obs.columns:
        why = f"{row.name} is published as {' and '.join(row.files)}" if row.is_split else "it was asked for"
        raise KeyNotFoundError(
            f"{paths[0]} has no .obs column {key!r} with the split; {why}",
            expected=f"both files or their folder, or one of the columns (distinct values): {_columns(obs)}",
            fix="give the training file and the test file, or name the column: split_key=...",
        )
    value = obs[key].map(label_text).astype(str).str.lower()
    is_train, is_test = value.isin(_TRAIN).to_numpy(dtype=bool), value.isin(_TEST).to_numpy(dtype=bool)
    if not (is_train | is_test).all() or not is_train.any() or not is_test.any():
        raise KeyNotFoundError(
            f".obs[{key!r}] of {paths[0]} holds {', '.join(map(str, sorted(value.unique())[:10]))}",
            expected=f"training cells ({', '.join(sorted(_TRAIN))}) and test cells ({', '.join(sorted(_TEST))})",
            fix="name another column, or write one",
        )
    return is_test, {"split": key}


def _texts(column: pd.Series) -> NDArray[np.str_]:
    """Return the text of every value, empty where it says that nothing is known."""
    texts = ["" if pd.isna(value) or is_missing(label_text(value)) else label_text(value) for value in column]
    return np.array(texts, dtype=str)


def _size_notes(row: PublishedSet, adata: AnnData, texts: Mapping[str, NDArray[np.str_]]) -> list[str]:
    """Say where the file has other sizes than the published set."""
    n_of = {use: np.unique(text[text != ""]).size for use, text in texts.items()}
    # the two batches of a set with a split are its training and its test cells
    n_batches = None if row.is_split else n_of.get("batch")
    sizes = (("cells", adata.n_obs), ("genes", adata.n_vars), ("batches", n_batches), ("types", n_of.get("label")))
    return [
        f"{found:,} {what}, the authors print {printed:,}"
        for (what, found), printed in zip(sizes, row.size, strict=True)
        if printed is not None and found is not None and found != printed
    ]
