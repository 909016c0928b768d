"""``tl.grn``: gene regulation as a model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdiva.data.output import check_output, check_recorded_in, write_with_slots
from scdiva.data.reader import MIN_COVERAGE, CountsReader, open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, OutputError
from scdiva.tasks.grn import DEFAULT_METHOD, Grn, GrnOptions
from scdiva.tasks.grn import grn as _grn
from scdiva.tasks.regulons import EDGE_SUFFIXES, Regulon, regulons, write_edges
from scdiva.tl.common import check_adata, check_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from scdiva.models.scdiva import ScDiVa

_ANNDATA_SUFFIXES = (".h5ad", ".zarr")


def grn(
    adata: AnnData,
    model: ScDiVa,
    *,
    method: str = DEFAULT_METHOD,
    regulators: Sequence[str] | None = None,
    group_key: str | None = None,
    layer: str | None = None,
    key_added: str = "scdiva_grn",
    n_top: int = 50,
    varp: bool = False,
    options: GrnOptions | None = None,
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Infer which genes regulate which, as the model sees it.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``; native.
    method
        One of ``scdiva.tasks.grn.METHODS``: "response", "knockout", "knockout_value", "attention", "rollout",
        "embedding", "gene_embedding". What each means, and how good it is: docs/grn.md.
    regulators
        Symbols or Ensembl ids of any genes; None: all human transcription factors (Lambert et al. 2018) that enough
        cells express. Those named here that too few cells express are left out, with a warning.
    group_key
        Column of ``.obs``: a network for each group. Cells without a value, and groups of which nothing can be said
        (too few cells, no regulator in enough of them, no pair with a score), are left out with a warning.
    layer
        Layer with the counts; ``"raw"`` for ``adata.raw``.
    key_added
        Slot in ``.uns``, and in ``.varp``.
    n_top
        Targets of each regulator that are kept.
    varp
        Also write the kept edges as a sparse matrix: rows regulators, columns targets, values scores times signs.
    options
        ``sd.tl.GrnOptions(...)``.
    min_coverage
        Smallest share of UMIs that the model's genes must cover.
    library_size_key
        ``.obs`` column with each cell's total UMIs, for data that hold a gene panel only.
    copy
        Return a copy with the result instead of writing into ``adata``.

    Returns
    -------
    AnnData or None
        ``.uns[key_added]["edges"]``: DataFrame with ``group``, ``source``, ``target``, ``score`` and, for methods with
        signs, ``sign``, the best first; ``["targets"]``: all genes that could have had an edge. ``.varp[key_added]`` if
        asked for. ``.uns["scdiva"]["grn"][key_added]``:
        method, whether directed and signed, what a score means, cells; regulators, groups and cells left out; model,
        version.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, ConfigError, UnsupportedError, UntrainedHeadError
        The data or the model cannot be used; nothing is written.
    OutputError
        ``varp`` with several groups, or with counts of ``.raw``.
    """
    check_key(key_added)
    check_adata(adata, copy=copy)
    reader = _open(adata, model, layer, min_coverage, library_size_key)
    _check_varp(varp, reader, group_key)
    found = _grn(reader, model, method=method, regulators=regulators, group_key=group_key, options=options, n_top=n_top)
    target = adata.copy() if copy else adata
    target.uns[key_added] = _slot(found)
    if varp:
        target.varp[key_added] = _matrix(found, reader, model)
    earlier = target.uns.get("scdiva", {})
    records = {**earlier.get("grn", {}), key_added: dict(found.record)}
    target.uns["scdiva"] = {**earlier, "grn": records}
    return target if copy else None


def grn_file(
    path_in: str | Path,
    path_out: str | Path,
    model: ScDiVa,
    *,
    method: str = DEFAULT_METHOD,
    regulators: Sequence[str] | None = None,
    group_key: str | None = None,
    layer: str | None = None,
    key_added: str = "scdiva_grn",
    n_top: int = 50,
    varp: bool = False,
    options: GrnOptions | None = None,
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    overwrite: bool = False,
    on_cells: Callable[[int], None] | None = None,
) -> Grn:
    """Infer the gene network of a file and write a copy of it with the result, or the edges alone.

    Everything as in :func:`grn`; the output appears whole or not at all.

    Parameters
    ----------
    path_in
        ``.h5ad``, ``.zarr``, 10x ``.h5`` or 10x mtx folder.
    path_out
        ``.h5ad`` or ``.zarr``: a copy with the result. ``.tsv`` or ``.csv``: the edges. ``.gmt``: the regulons.
    overwrite
        Replace an existing output.
    on_cells
        Called with the number of cells done, for progress.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist, or ``varp`` with an output that holds edges
        alone; raised before any work is done.
    """
    check_key(key_added)
    target = Path(path_out)
    check_grn_output(target, overwrite=overwrite, varp=varp)
    check_recorded_in(Path(path_in))
    reader = _open(path_in, model, layer, min_coverage, library_size_key)
    _check_varp(varp, reader, group_key)
    found = _grn(
        reader,
        model,
        method=method,
        regulators=regulators,
        group_key=group_key,
        options=options,
        n_top=n_top,
        on_cells=on_cells,
    )
    if target.suffix in EDGE_SUFFIXES:
        write_edges(found.edges, target)
        return found
    slots: dict[str, Any] = {f"uns/{key_added}": _slot(found)}
    if varp:
        slots[f"varp/{key_added}"] = _matrix(found, reader, model)
    write_with_slots(reader.source, target, {**slots, f"uns/scdiva/grn/{key_added}": dict(found.record)})
    return found


def _slot(found: Grn) -> dict[str, Any]:
    targets = np.unique(np.concatenate([network.targets for network in found.networks]))
    return {"edges": found.edges, "targets": targets.astype(object)}


def check_grn_output(path: Path, *, overwrite: bool, varp: bool = False) -> None:
    """Refuse an output before any work is done.

    Raises
    ------
    OutputError
        It exists, has another suffix, or its folder does not exist, or it holds edges alone and ``varp`` is asked for.
    """
    if path.suffix in _ANNDATA_SUFFIXES:
        check_output(path, overwrite=overwrite)
        return
    if path.suffix not in EDGE_SUFFIXES:
        raise OutputError(
            f"output {path.name!r}",
            expected=f"a name ending in {', '.join((*_ANNDATA_SUFFIXES, *EDGE_SUFFIXES))}",
            fix="rename it",
        )
    if varp:
        raise OutputError(
            f"output {path.name!r} holds edges alone, no .varp",
            expected=f"a name ending in {' or '.join(_ANNDATA_SUFFIXES)}",
            fix="rename it, or leave varp out",
        )
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", expected="a folder", fix="create it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists", expected="a new file", fix="name another one, or pass --overwrite")


def _open(
    data: Any, model: ScDiVa, layer: str | None, min_coverage: float, library_size_key: str | None
) -> CountsReader:
    return open_counts(
        open_source(data), model.vocabulary, layer=layer, min_coverage=min_coverage, library_size_key=library_size_key
    )


def _check_varp(varp: bool, reader: CountsReader, group_key: str | None) -> None:
    if varp and group_key is not None:
        raise ConfigError(
            "varp holds one network, and group_key makes several", expected="one or the other", fix="leave varp out"
        )
    if varp and reader.found.matrix.name == "raw.X":
        raise OutputError(
            "a network of genes of .raw has no .varp to go to",
            expected="counts in X or a layer",
            fix="leave varp out, or move the counts to a layer",
        )


def _matrix(found: Grn, reader: CountsReader, model: ScDiVa) -> sp.csr_matrix:
    """Return the kept edges over the genes of the file, ``(n_vars, n_vars)`` float32."""
    column_of: dict[str, int] = {}
    for gene, columns in reader.alignment.source_of_gene().items():
        column_of.setdefault(str(model.vocabulary.symbol[gene]), columns[0])
    edges, n = found.edges, len(reader.is_gene)
    value = edges["score"].to_numpy() * (edges["sign"].to_numpy() if "sign" in edges else 1)
    row, column = (np.array([column_of[name] for name in edges[side]], dtype=np.int64) for side in ("source", "target"))
    return sp.csr_matrix((value.astype(np.float32), (row, column)), shape=(n, n))


__all__ = ["GrnOptions", "Regulon", "check_grn_output", "grn", "grn_file", "regulons"]
