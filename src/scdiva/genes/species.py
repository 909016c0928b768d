"""Which species the genes of a file belong to; scdiva's vocabularies are human."""

from __future__ import annotations

from collections.abc import Iterable

from scdiva.errors import GeneError
from scdiva.genes.names import HUMAN_PREFIX, MOUSE_PREFIX, as_strings
from scdiva.genes.tables_io import human_genes, mouse_to_human, old_names

# Our decision. Symbols that mouse and human share count for neither, so on real files the minority is below 2 %.
_MIXED_SHARE = 0.05
_RECOGNISED_SHARE = 0.10


def detect_species(names: Iterable[str], ids: Iterable[str] | None = None) -> str:
    """Say which species the genes are from.

    Evidence, column by column: the kind of Ensembl id (``ENSG``, ``ENSMUSG``), a genome prefix (``GRCh38_``,
    ``mm10_``), a human symbol, former symbol or alias, a mouse symbol. Names that both species have count for neither.
    Upper and lower case matter: ``CD3D`` is human and ``Cd3d`` is mouse. Thresholds: our decision.

    Parameters
    ----------
    names
        Column names (``var_names``).
    ids
        Ensembl ids of the same columns, where known.

    Returns
    -------
    str
        ``"human"``; ``"mouse"``; ``"mixed"`` if at least 5 % of the recognised columns are of the other species;
        ``"unknown"`` if fewer than 10 % of the columns are recognised.
    """
    name_list = as_strings(names)
    n_human, n_mouse, n_both = _evidence(name_list, None if ids is None else as_strings(ids))
    if n_human + n_mouse == 0 or n_human + n_mouse + n_both < _RECOGNISED_SHARE * len(name_list):
        return "unknown"
    mouse_share = n_mouse / (n_human + n_mouse)
    if mouse_share < _MIXED_SHARE:
        return "human"
    return "mouse" if mouse_share > 1 - _MIXED_SHARE else "mixed"


def require_human(names: Iterable[str], ids: Iterable[str] | None = None) -> None:
    """Refuse genes that are not human.

    Parameters
    ----------
    names
        Column names (``var_names``).
    ids
        Ensembl ids of the same columns, where known.

    Raises
    ------
    GeneError
        The genes are mouse, or mouse and human mixed, or not recognised. Human symbols written in another case
        (``cd3d``) are not recognised, and the error says to write them in upper case.
    """
    name_list = as_strings(names)
    species = detect_species(name_list, ids)
    if species == "human":
        return
    shown = ", ".join(repr(name) for name in name_list[:5]) or "no names"
    if species == "mouse":
        raise GeneError(
            f"{len(name_list)} genes that are mouse genes ({shown}, ...)",
            expected="human genes: symbols such as CD3D or Ensembl ids such as ENSG00000167286",
            fix="convert them to human genes by one-to-one orthologs first (scdiva.genes.mouse_to_human), and keep in "
            "mind that a model of human cells was never tested on mouse cells",
        )
    if species == "mixed":
        raise GeneError(
            f"{len(name_list)} genes of mouse and human together ({shown}, ...)",
            expected="human genes only",
            fix="pick the human columns of a mixed experiment (GRCh38_ or ENSG names), and the human cells",
        )
    current = human_genes().indices_of_symbol
    n_other_case = sum(1 for name in name_list if name not in current and name.upper() in current)
    fix = (
        f"{n_other_case} of the names are human symbols in another case: if the data are human, write them in upper "
        "case (adata.var_names = adata.var_names.str.upper())"
        if n_other_case > _RECOGNISED_SHARE * len(name_list)
        else "put gene symbols or Ensembl ids into adata.var_names (they are often in a column of adata.var)"
    )
    raise GeneError(
        f"{len(name_list)} gene names that are not known as human or mouse genes, first: {shown}",
        expected="human gene symbols such as CD3D or Ensembl ids such as ENSG00000167286",
        fix=fix,
    )


def _evidence(names: list[str], ids: list[str] | None) -> tuple[int, int, int]:
    """Count the columns that are human, mouse, or both at once."""
    current = human_genes().indices_of_symbol
    old = old_names()
    mouse = mouse_to_human()
    n_human = n_mouse = n_both = 0
    for position, name in enumerate(names):
        texts = (name,) if ids is None or not ids[position] else (ids[position], name)
        kind = ""
        for text in texts:
            if text in current:
                kind = "both" if text in mouse else "human"
            elif text.startswith("ENSG"):
                kind = "human"
            elif text.startswith("ENSMUSG") or text in mouse:
                kind = "mouse"
            elif text in old.symbols_of_alias or text in old.indices_of_old_symbol or HUMAN_PREFIX.match(text):
                kind = "human"
            elif MOUSE_PREFIX.match(text):
                kind = "mouse"
            if kind:
                break
        n_human += kind == "human"
        n_mouse += kind == "mouse"
        n_both += kind == "both"
    return n_human, n_mouse, n_both
