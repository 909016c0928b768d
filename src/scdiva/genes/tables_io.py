"""The shipped gene tables, read once and only when they are needed.

Sources and licences are in ``tables/README.md``; ``scripts/build_gene_tables.py`` builds the files.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

#: Tier of a gene that is not in the ranked table: after every ranked gene.
UNRANKED = 99


@dataclass(frozen=True, slots=True)
class HumanGenes:
    """The human gene table (GENCODE 48), column by column, sorted by Ensembl id.

    A position in these columns is called a *table index*; it is not a gene index of a vocabulary.

    Parameters
    ----------
    ensembl_id
        ``(N,)`` current Ensembl ids without version.
    symbol
        ``(N,)`` current GENCODE symbols; the Ensembl id where a gene has no symbol.
    biotype, chrom
        ``(N,)`` GENCODE biotype and chromosome or scaffold.
    is_tf, is_mito, is_ribo
        ``(N,)`` bool: transcription factor (Lambert 2018), mitochondrial, ribosomal protein.
    tier
        ``(N,)`` rank class of the vocabulary, 1 (first) to 12, ``UNRANKED`` for a gene that is not ranked.
    n_releases
        ``(N,)`` in how many of six annotations (Ensembl 75 to GENCODE 48) the id is.
    n_symbol
        ``(N,)`` in how many of them it has its current symbol.
    index_of_id
        Ensembl id to table index.
    indices_of_symbol
        Current symbol to the table indices that share it.
    """

    ensembl_id: list[str]
    symbol: list[str]
    biotype: list[str]
    chrom: list[str]
    is_tf: NDArray[np.bool_]
    is_mito: NDArray[np.bool_]
    is_ribo: NDArray[np.bool_]
    tier: NDArray[np.int16]
    n_releases: NDArray[np.int16]
    n_symbol: NDArray[np.int16]
    index_of_id: Mapping[str, int]
    indices_of_symbol: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class OldNames:
    """Names that genes had before, or have besides.

    Parameters
    ----------
    moves
        Old Ensembl id to ``(old symbol, table index of the gene today)`` pairs.
    symbols_of_alias
        Alias to the current symbol it belongs to, or to several, joined by ``|``; an alias that is a current symbol
        itself is not in it.
    indices_of_old_symbol
        Former symbol, which is no current one, to the table indices of the genes that carried it; none, if they are
        all retired without successor.
    once_shared
        Current symbols that another Ensembl id carried too in some release, so that files may have them twice.
    old_symbols_of_id
        Retired Ensembl id (not in ``moves``) to the symbols it carried: mostly copies on alternative haplotypes.
    """

    moves: Mapping[str, tuple[tuple[str, int], ...]]
    symbols_of_alias: Mapping[str, str]
    indices_of_old_symbol: Mapping[str, tuple[int, ...]]
    once_shared: frozenset[str]
    old_symbols_of_id: Mapping[str, tuple[str, ...]]


def _columns(name: str) -> list[list[str]]:
    """Read one shipped table; return its columns without the header."""
    packed = resources.files("scdiva.genes").joinpath("tables", name).read_bytes()
    header, _, body = gzip.decompress(packed).decode().partition("\n")
    n_columns = header.count("\t") + 1
    # One flat split and strides: several times faster than a split per line.
    fields = body.removesuffix("\n").replace("\n", "\t").split("\t")
    return [fields[column::n_columns] for column in range(n_columns)]


@functools.cache
def human_genes() -> HumanGenes:
    """Return the human gene table; read once."""
    columns = _columns("human_genes.tsv.gz")
    ensembl_id, symbol, biotype, chrom, is_tf, is_mito, is_ribo, tier, n_releases, n_symbol = columns
    symbols = [name or ensembl for name, ensembl in zip(symbol, ensembl_id, strict=True)]
    indices_of_symbol: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(symbol):
        if name:
            known = indices_of_symbol.get(name)
            indices_of_symbol[name] = (index,) if known is None else (*known, index)
    return HumanGenes(
        ensembl_id=ensembl_id,
        symbol=symbols,
        biotype=biotype,
        chrom=chrom,
        is_tf=np.array(is_tf) == "1",
        is_mito=np.array(is_mito) == "1",
        is_ribo=np.array(is_ribo) == "1",
        tier=np.array([value or str(UNRANKED) for value in tier]).astype(np.int16),
        n_releases=np.array(n_releases).astype(np.int16),
        n_symbol=np.array(n_symbol).astype(np.int16),
        index_of_id={ensembl: index for index, ensembl in enumerate(ensembl_id)},
        indices_of_symbol=indices_of_symbol,
    )


@functools.cache
def old_names() -> OldNames:
    """Return moved ids, aliases and former symbols; read once."""
    genes = human_genes()
    index_of_id = genes.index_of_id

    moves: dict[str, tuple[tuple[str, int], ...]] = {}
    for old_id, old_symbol, current_id in zip(*_columns("ensembl_id_moves.tsv.gz"), strict=True):
        moves[old_id] = (*moves.get(old_id, ()), (old_symbol, index_of_id[current_id]))

    indices_of_old_symbol: dict[str, tuple[int, ...]] = {}
    old_symbols_of_id: dict[str, tuple[str, ...]] = {}
    once_shared: set[str] = {name for name, indices in genes.indices_of_symbol.items() if len(indices) > 1}
    for old_symbol, ensembl_id in zip(*_columns("symbol_history.tsv.gz"), strict=True):
        index = index_of_id.get(ensembl_id)
        targets: tuple[int, ...] = ()
        if index is not None:
            targets = (index,)
        elif ensembl_id in moves:
            # A retired id with several successors: the one that took this very symbol along.
            pairs = moves[ensembl_id]
            targets = tuple(target for symbol, target in pairs if symbol == old_symbol) or tuple(t for _, t in pairs)
        else:
            old_symbols_of_id[ensembl_id] = (*old_symbols_of_id.get(ensembl_id, ()), old_symbol)
        if old_symbol in genes.indices_of_symbol:
            once_shared.add(old_symbol)
            continue
        known = indices_of_old_symbol.get(old_symbol)
        indices_of_old_symbol[old_symbol] = targets if not known else tuple(dict.fromkeys(known + targets))
    return OldNames(
        moves=moves,
        symbols_of_alias=dict(zip(*_columns("gene_aliases.tsv.gz"), strict=True)),
        indices_of_old_symbol=indices_of_old_symbol,
        once_shared=frozenset(once_shared),
        old_symbols_of_id=old_symbols_of_id,
    )


@functools.cache
def mouse_to_human() -> Mapping[str, str]:
    """Return mouse symbols and the human gene each one stands for.

    Returns
    -------
    Mapping[str, str]
        Mouse symbol to the Ensembl id of its one-to-one human ortholog, or to ``""`` where there is none. Systematic
        mouse names (``Gm1234``, ``1700016H13Rik``) are left out unless they have an ortholog. Source: GENCODE M37 and
        Ensembl Compara.
    """
    return dict(zip(*_columns("mouse_symbols.tsv.gz"), strict=True))


@functools.cache
def make_names_symbols() -> Mapping[str, str]:
    """Return names as R's ``make.names`` (or Seurat) writes them, to the name they stand for.

    ``HLA.DRA`` for ``HLA-DRA``, ``RP11.34P13.7`` for ``RP11-34P13.7``, ``X7SK`` for ``7SK``. Only names that the
    function changes, only where the result means one name, and only where it is no known name itself.
    """
    current = human_genes().indices_of_symbol
    former = old_names().indices_of_old_symbol
    found: dict[str, str] = {}
    clashes: set[str] = set()
    for names in (current, former):
        layer: dict[str, str] = {}
        for name in names:
            dotted = name.replace("-", ".").replace("_", ".").replace("/", ".")
            if dotted[:1].isdigit():
                dotted = "X" + dotted
            seurat = name.replace("_", "-")
            for mangled in {dotted, seurat}:
                if mangled == name or mangled in current or mangled in former:
                    continue
                if mangled in layer:
                    clashes.add(mangled)
                layer[mangled] = name
        for mangled, name in layer.items():
            if mangled not in clashes and mangled not in found:
                found[mangled] = name
    return found


def gene_table() -> pd.DataFrame:
    """Return all human genes of GENCODE 48 as a data frame.

    Returns
    -------
    pandas.DataFrame
        Index ``ensembl_id`` (78,894 genes, sorted); columns ``symbol``, ``biotype``, ``chrom``, ``is_tf`` (human
        transcription factor, Lambert 2018), ``is_mito``, ``is_ribo`` and ``tier`` (rank class of the default
        vocabulary; 99 for a gene that is not ranked). A fresh frame each time: it may be changed.
    """
    import pandas as pd

    genes = human_genes()
    return pd.DataFrame(
        {
            "symbol": genes.symbol,
            "biotype": genes.biotype,
            "chrom": genes.chrom,
            "is_tf": genes.is_tf,
            "is_mito": genes.is_mito,
            "is_ribo": genes.is_ribo,
            "tier": genes.tier,
        },
        index=pd.Index(genes.ensembl_id, name="ensembl_id"),
    )
