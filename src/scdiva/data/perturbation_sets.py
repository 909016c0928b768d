"""From a file to cells that say what was done to them: labels, controls, contexts and batches, and a report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scdiva.data.conditions import NO_BATCH, column_text, is_missing
from scdiva.data.perturbations import Kind, PerturbedCells, parse_perturbations
from scdiva.data.published import load_published
from scdiva.data.reader import MIN_COVERAGE, CountsReader, open_counts
from scdiva.data.source import CellSource, open_source
from scdiva.errors import ConfigError, KeyNotFoundError, SourceError
from scdiva.genes import GeneVocabulary

if TYPE_CHECKING:
    from scdiva.data.source import DataLike

MIN_CELLS = 20
"""Default smallest number of cells, and of control cells of the same context, that an effect is scored from."""

_N_LISTED = 10


@dataclass(frozen=True, slots=True)
class PerturbationLayout:
    """Where a family of files keeps its perturbations.

    Parameters
    ----------
    perturbation_key
        Column of ``.obs`` with the labels.
    control
        Label of control cells.
    context_key, batch_key
        Columns that are used where the file has them.
    """

    perturbation_key: str
    control: str
    context_key: str | None = None
    batch_key: str | None = None


PERTURBATION_LAYOUTS: Mapping[str, PerturbationLayout] = {
    "gears": PerturbationLayout("condition", "ctrl", context_key="cell_type"),
    "scperturb": PerturbationLayout("perturbation", "control"),
    "replogle": PerturbationLayout("gene", "non-targeting", batch_key="gem_group"),
}
"""Known layouts: GEARS (Roohani et al. 2023), scPerturb (Peidli et al. 2024), Replogle et al. 2022."""

_PUBLISHED_KINDS: Mapping[str, Kind] = {"Adamson": "knockout", "Norman": "activation"}


@dataclass(frozen=True, slots=True)
class PerturbationReport:
    """What was found in a file; ``str(report)`` is plain text.

    Parameters
    ----------
    source
        Name of the file.
    counts_in
        Where the counts were found, and on which scale.
    keys
        Columns that were used, by what they were used for.
    kind
        What was done to the targets.
    n_cells, n_control
        Cells that are kept, and those of them that are control.
    n_genes
        Genes of the vocabulary that the file measures.
    n_perturbations, n_combinations
        Perturbations without control, and those of them with several targets.
    contexts
        ``(name, n_cells, n_control)`` of each.
    batches
        The same of each batch.
    dropped
        Cells that were left out: reason and number.
    renamed
        Targets that the vocabulary calls otherwise: name in the file, symbol.
    unknown
        Targets that are no gene of the vocabulary, and their numbers of cells.
    n_targets, n_measured_targets
        Different targets, and those of them that the file measures the expression of.
    n_scored, n_unscored
        Pairs of a perturbation and a context with enough cells and control cells, and with too few.
    min_cells
        How many are enough.
    notes
        What else one should know before a result is believed.
    """

    source: str
    counts_in: str
    keys: tuple[tuple[str, str], ...]
    kind: Kind
    n_cells: int
    n_control: int
    n_genes: int
    n_perturbations: int
    n_combinations: int
    contexts: tuple[tuple[str, int, int], ...]
    batches: tuple[tuple[str, int, int], ...]
    dropped: tuple[tuple[str, int], ...]
    renamed: tuple[tuple[str, str], ...]
    unknown: tuple[tuple[str, int], ...]
    n_targets: int
    n_measured_targets: int
    n_scored: int
    n_unscored: int
    min_cells: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.n_cells:,} cells, {self.n_control:,} of them control, {self.n_genes:,} genes",
            f"counts: {self.counts_in}",
            "columns: " + ", ".join(f"{use} {key!r}" for use, key in self.keys),
            f"perturbations ({self.kind}): {self.n_perturbations:,}, {self.n_combinations:,} of them combinations"
            + (
                ""
                if self.kind == "treatment"
                else f"; {self.n_measured_targets:,} of {self.n_targets:,} genes measured"
            ),
            f"scored: {self.n_scored:,} pairs of perturbation and context; not scored, with fewer than "
            f"{self.min_cells} cells or control cells: {self.n_unscored:,}",
            *_group_lines("contexts", self.contexts),
            *_group_lines("batches", self.batches),
        ]
        lines += [f"left out: {n:,} cells, {why}" for why, n in self.dropped]
        if self.renamed:
            lines.append(f"renamed targets: {_listed([f'{old} to {new}' for old, new in self.renamed])}")
        if self.unknown:
            named = _listed([f"{name} ({n:,} cells)" for name, n in self.unknown])
            lines.append(f"targets that are no gene of the vocabulary, kept by name: {len(self.unknown)}: {named}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPerturbations:
    """Perturbed cells of a file in memory.

    Parameters
    ----------
    data
        The cells; ``data.cells.cell_index`` is their row in the file.
    vocabulary
        Genes of ``data.cells``, in order.
    cell_names
        ``(n_cells,)`` text.
    is_scored
        ``(n_perturbations, n_contexts)``: enough cells and control cells to know the effect. The others are kept: they
        may be trained on.
    report
        Numbers and notes. Show it.
    """

    data: PerturbedCells
    vocabulary: GeneVocabulary
    cell_names: NDArray[np.str_]
    is_scored: NDArray[np.bool_]
    report: PerturbationReport


def scored_conditions(data: PerturbedCells, min_cells: int = MIN_CELLS) -> NDArray[np.bool_]:
    """Tell the pairs of perturbation and context that have enough cells, and enough control cells in the context.

    Parameters
    ----------
    data
        The cells.
    min_cells
        How many are enough, at least 1.

    Returns
    -------
    NDArray
        ``(n_perturbations, n_contexts)`` bool; control itself is never scored.
    """
    n_contexts = len(data.contexts)
    pair = data.perturbation_code * n_contexts + data.context_code
    n_cells = np.bincount(pair, minlength=len(data.perturbations) * n_contexts).reshape(-1, n_contexts)
    is_scored = (n_cells >= max(min_cells, 1)) & (n_cells[0] >= max(min_cells, 1))
    is_scored[0] = False
    return np.asarray(is_scored)


def load_perturbed(
    data: DataLike,
    vocabulary: GeneVocabulary,
    *,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    layout: str | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    kind: Kind = "knockout",
    dose_key: str | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    exclude: Collection[str] = (),
    drop_missing: bool = False,
    ignore_confounded_batch: bool = False,
    min_cells: int = MIN_CELLS,
    min_coverage: float = MIN_COVERAGE,
) -> LoadedPerturbations:
    """Read perturbed cells: raw counts in vocabulary order, and what was done to each cell.

    Parameters
    ----------
    data
        AnnData or path.
    vocabulary
        The genes to align to.
    perturbation_key
        Column of ``.obs`` with the labels (:func:`~scdiva.data.perturbations.parse_perturbation` tells which are
        understood).
    control
        Label or labels of control cells.
    layout
        One of :data:`PERTURBATION_LAYOUTS`, which gives the keys that are not named here.
    context_key
        Column of cell types or lines that are compared within; None: one context.
    batch_key
        Column of experimental batches.
    kind
        What was done.
    dose_key
        Column of numbers; of control cells they do not matter.
    library_size_key
        Column with each cell's total UMIs, for a gene panel.
    layer
        Where the counts are; by default they are found (:func:`~scdiva.data.reader.find_counts`).
    exclude
        Labels of cells to leave out.
    drop_missing
        Leave out cells without a label, context or batch; otherwise such cells are refused.
    ignore_confounded_batch
        Go on without batches, and say so in the report, where no batch has both control and perturbed cells; otherwise
        such batches are refused.
    min_cells
        Perturbations with fewer cells in a context, and those of contexts with fewer control cells, are not scored.
    min_coverage
        Smallest share of the file's UMIs that must land in the vocabulary.

    Returns
    -------
    LoadedPerturbations

    Raises
    ------
    ConfigError
        Neither keys nor a layout, or an unknown layout or kind.
    KeyNotFoundError
        A column or a control label does not exist, doses are no numbers, or the library size is smaller than a cell's
        counts.
    SourceError
        Cells without label, context or batch; batches or contexts of which none has both control and perturbed cells;
        nothing perturbed; or a source that cannot be read.
    ScaleError, GeneError
        See :func:`~scdiva.data.reader.open_counts`.
    """
    source = open_source(data)
    keys, controls = _keys(source, layout, perturbation_key, control, context_key, batch_key, dose_key, kind)
    texts = {use: column_text(source.column(key)) for use, key in keys.items() if use != "dose"}
    doses = _doses(source, keys["dose"]) if "dose" in keys else None
    kept, dropped = _kept_rows(source, texts, keys, controls, exclude, drop_missing)
    reader = open_counts(source, vocabulary, layer=layer, library_size_key=library_size_key, min_coverage=min_coverage)
    # rows that lie apart are read one run at a time: reading everything is faster unless most cells are left out
    n_cells = source.n_cells
    cells = reader.read(kept) if 2 * kept.size < n_cells else reader.read(np.arange(n_cells)).take(kept)
    if (cells.library_size == 0).any():
        is_read = cells.library_size > 0
        dropped.append(("without a UMI", int((~is_read).sum())))
        cells, kept = cells.take(np.flatnonzero(is_read)), kept[is_read]
    parsed = parse_perturbations(
        texts["perturbation"][kept],
        control=controls,
        kind=kind,
        vocabulary=vocabulary,
        names=_file_genes(reader),
        doses=None if doses is None else doses[kept],
    )
    if len(parsed.perturbations) == 1:
        raise SourceError(
            f"all {kept.size:,} cells of {source.name} are control cells",
            expected="perturbed cells",
            fix="check the column and the names of control",
        )
    is_control = parsed.code == 0
    contexts, context_code = _coded(texts.get("context"), kept)
    if not _has_both(context_code, is_control).any():
        raise SourceError(
            f"no value of .obs[{keys.get('context')!r}] has both control and perturbed cells",
            expected="control cells in the same context",
            fix="name the column of cell types or lines, or leave context_key out",
        )
    batches, batch_code, notes = _batches(source, keys, texts, kept, is_control, ignore_confounded_batch)
    perturbed = PerturbedCells(cells, parsed.perturbations, parsed.code, contexts, context_code, batches, batch_code)
    is_scored = scored_conditions(perturbed, min_cells)
    notes += _notes(perturbed, is_scored, library_size_key)
    n_pairs = np.unique(perturbed.perturbation_code[~is_control] * len(contexts) + context_code[~is_control]).size
    targets = sorted({target for perturbation in parsed.perturbations for target in perturbation.targets})
    measured = set(vocabulary.symbol[perturbed.is_measured].tolist())
    used = {**keys, **({} if library_size_key is None else {"library size": library_size_key})}
    report = PerturbationReport(
        source=source.name,
        counts_in=reader.found.description,
        keys=tuple(used.items()),
        kind=kind,
        n_cells=perturbed.n_cells,
        n_control=int(is_control.sum()),
        n_genes=int(perturbed.is_measured.sum()),
        n_perturbations=len(parsed.perturbations) - 1,
        n_combinations=sum(len(perturbation.targets) > 1 for perturbation in parsed.perturbations),
        contexts=_group_sizes(contexts, context_code, is_control) if "context" in keys else (),
        batches=_group_sizes(batches, batch_code, is_control) if len(batches) > 1 else (),
        dropped=tuple(dropped),
        renamed=tuple(parsed.renamed.items()),
        unknown=tuple(parsed.unknown.items()),
        n_targets=len(targets),
        n_measured_targets=sum(target in measured for target in targets),
        n_scored=int(is_scored.sum()),
        n_unscored=int(n_pairs - is_scored.sum()),
        min_cells=min_cells,
        notes=tuple(notes),
    )
    names = source.obs.index.astype(str).to_numpy(dtype=str)[kept]
    return LoadedPerturbations(perturbed, vocabulary, names, is_scored, report)


def load_published_perturbations(
    name: str, path: str | Path, vocabulary: GeneVocabulary, *, min_cells: int = MIN_CELLS
) -> LoadedPerturbations:
    """Read Adamson (CRISPRi) or Norman (CRISPRa) from the file that GEARS published.

    Parameters
    ----------
    name
        "Adamson" or "Norman".
    path
        ``perturb_processed.h5ad``, or its folder.
    vocabulary
        The genes to align to.
    min_cells
        See :func:`load_perturbed`.

    Raises
    ------
    ConfigError
        Another set.
    ScdivaError
        See :func:`~scdiva.data.published.load_published` and :func:`load_perturbed`.
    """
    kinds = {known.lower(): kind for known, kind in _PUBLISHED_KINDS.items()}
    if name.lower() not in kinds:
        raise ConfigError(
            f"the published set {name!r} is none of perturbations",
            expected=f"one of {', '.join(_PUBLISHED_KINDS)}",
            fix="read other files with load_perturbed",
        )
    adata = load_published(name, path).adata
    return load_perturbed(adata, vocabulary, layout="gears", kind=kinds[name.lower()], min_cells=min_cells)


def _keys(
    source: CellSource,
    layout: str | None,
    perturbation_key: str | None,
    control: str | Sequence[str] | None,
    context_key: str | None,
    batch_key: str | None,
    dose_key: str | None,
    kind: str,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the columns to use, and the names of control."""
    if kind not in ("knockout", "activation", "treatment"):
        raise ConfigError(f"kind {kind!r}", expected="knockout, activation or treatment", fix="name one of them")
    preset = None
    if layout is not None:
        if layout not in PERTURBATION_LAYOUTS:
            raise ConfigError(
                f"no layout {layout!r}",
                expected=f"one of {', '.join(PERTURBATION_LAYOUTS)}",
                fix="name perturbation_key and control instead",
            )
        preset = PERTURBATION_LAYOUTS[layout]
        perturbation_key = perturbation_key or preset.perturbation_key
        control = preset.control if control is None else control
    if perturbation_key is None or not control:
        raise ConfigError(
            "no perturbation_key" if perturbation_key is None else "no control",
            expected="the column with the labels, and the label of control cells",
            fix=f"name both, or a layout: {', '.join(PERTURBATION_LAYOUTS)}",
        )
    keys = {"perturbation": perturbation_key}
    named = {"context": context_key, "batch": batch_key}
    usual = {} if preset is None else {"context": preset.context_key, "batch": preset.batch_key}
    for use, key in named.items():
        if key is None and usual.get(use) in source.obs.columns:
            key = usual[use]
        if key is not None:
            keys[use] = key
    if dose_key is not None:
        keys["dose"] = dose_key
    for key in keys.values():
        source.column(key)
    return keys, (control,) if isinstance(control, str) else tuple(control)


def _doses(source: CellSource, key: str) -> NDArray[np.float64]:
    """Return the doses, NaN where there is none."""
    text = column_text(source.column(key))
    is_known = ~np.isin(np.char.lower(text), list(NO_BATCH))
    numbers = pd.to_numeric(pd.Series(text), errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(is_known & ~(np.isfinite(numbers) & (numbers >= 0)))
    if wrong.size:
        raise KeyNotFoundError(
            f".obs[{key!r}] of {source.name} holds {text[wrong[0]]!r}",
            expected="doses as numbers of at least 0, all in one unit",
            fix="write a column of numbers",
        )
    return numbers


def _kept_rows(
    source: CellSource,
    texts: Mapping[str, NDArray[np.str_]],
    keys: Mapping[str, str],
    control: Sequence[str],
    exclude: Collection[str],
    drop_missing: bool,
) -> tuple[NDArray[np.int64], list[tuple[str, int]]]:
    """Return the cells to read, and how many were left out for which reason."""
    is_kept = np.ones(source.n_cells, dtype=bool)
    dropped: list[tuple[str, int]] = []
    label = texts["perturbation"]
    for name in sorted({exclude} if isinstance(exclude, str) else set(exclude)):
        is_named = label == name
        if not is_named.any():
            raise KeyNotFoundError(
                f"no cell of {source.name} has the label {name!r} that is to be left out",
                expected=f"labels such as {_listed(np.unique(label[label != '']).tolist())}",
                fix="correct exclude",
            )
        is_kept &= ~is_named
        dropped.append((f"labelled {name!r}, as asked", int(is_named.sum())))
    for use, text in texts.items():
        lacks = {
            "perturbation": lambda value: is_missing(value) and value not in control,
            "context": is_missing,
            "batch": lambda value: value.lower() in NO_BATCH,
        }[use]
        values, of_cell = np.unique(text, return_inverse=True)
        is_lost = np.array([lacks(value) for value in values.tolist()])[of_cell] & is_kept
        if not is_lost.any():
            continue
        if not drop_missing:
            raise SourceError(
                f"{int(is_lost.sum()):,} of {source.n_cells:,} cells of {source.name} have no {use} in "
                f".obs[{keys[use]!r}]",
                expected=f"the {use} of every cell",
                fix="name another column, or leave these cells out: drop_missing=True, --drop-missing",
            )
        is_kept &= ~is_lost
        dropped.append((f"without {use}", int(is_lost.sum())))
    if not is_kept.any():
        raise SourceError(
            f"no cell of {source.name} is left", expected="cells with a label", fix="check the columns and exclude"
        )
    return np.flatnonzero(is_kept), dropped


def _file_genes(reader: CountsReader) -> dict[str, str]:
    """Return what the vocabulary calls the genes of the file; empty: it has no such gene."""
    symbols = reader.alignment.vocabulary.symbol
    found: dict[str, str] = {}
    for name, gene, is_gene in zip(
        reader.alignment.names.tolist(), reader.alignment.gene_of_source.tolist(), reader.is_gene.tolist(), strict=True
    ):
        if is_gene and name and not found.get(name):
            found[name] = str(symbols[gene]) if gene >= 0 else ""
    return found


def _coded(text: NDArray[np.str_] | None, kept: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    if text is None:
        return ("",), np.zeros(kept.size, dtype=np.int64)
    names, code = np.unique(text[kept], return_inverse=True)
    return tuple(names.tolist()), code.astype(np.int64)


def _has_both(group: NDArray[np.int64], is_control: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell the groups that have both control and perturbed cells."""
    n_cells, n_control = np.bincount(group), np.bincount(group, weights=is_control)
    return np.asarray((n_control > 0) & (n_control < n_cells))


def _batches(
    source: CellSource,
    keys: Mapping[str, str],
    texts: Mapping[str, NDArray[np.str_]],
    kept: NDArray[np.int64],
    is_control: NDArray[np.bool_],
    ignore_confounded: bool,
) -> tuple[tuple[str, ...], NDArray[np.int64], list[str]]:
    batches, code = _coded(texts.get("batch"), kept)
    if _has_both(code, is_control).any():
        return batches, code, []
    found = (
        f"every batch in .obs[{keys['batch']!r}] of {source.name} has either control cells only or perturbed cells only"
    )
    if not ignore_confounded:
        raise SourceError(
            f"{found}: the effect of the perturbation cannot be told from that of the batch, and no perturbed cell has "
            "control cells of its batch",
            expected="batches with both",
            fix="name another column, leave batch_key out, or go on without batches, which the report will say: "
            "ignore_confounded_batch=True, --ignore-confounded-batch",
        )
    note = f"{found}: batches are not used, and a difference between batches counts as an effect"
    return ("",), np.zeros(kept.size, dtype=np.int64), [note]


def _notes(data: PerturbedCells, is_scored: NDArray[np.bool_], library_size_key: str | None) -> list[str]:
    """Say what does not stand in the way, but should be known."""
    notes = []
    for what, names, code in (
        ("contexts", data.contexts, data.context_code),
        ("batches", data.batches, data.batch_code),
    ):
        without = np.flatnonzero(np.bincount(code[data.is_control], minlength=len(names)) == 0)
        if without.size:
            n_cells = int(np.isin(code, without).sum())
            notes.append(f"{what} without control cells ({n_cells:,} cells): {_listed([names[i] for i in without])}")
    n_empty = int((np.diff(data.cells.counts.indptr) == 0).sum())
    if n_empty:
        notes.append(f"{n_empty:,} cells have no UMI in the genes of the vocabulary")
    if library_size_key is None and data.is_measured.sum() < 2000:
        notes.append(
            f"{int(data.is_measured.sum()):,} genes: if this is a panel of a larger experiment, name the column with "
            "each cell's total UMIs (library_size_key); the sum over a panel changes with its genes"
        )
    if not is_scored.any():
        notes.append("no perturbation has enough cells and control cells to be scored")
    return notes


def _group_sizes(
    names: Sequence[str], code: NDArray[np.int64], is_control: NDArray[np.bool_]
) -> tuple[tuple[str, int, int], ...]:
    n_cells = np.bincount(code, minlength=len(names)).tolist()
    n_control = np.bincount(code[is_control], minlength=len(names)).tolist()
    return tuple(zip(names, n_cells, n_control, strict=True))


def _group_lines(what: str, groups: Sequence[tuple[str, int, int]]) -> list[str]:
    named = [f"{name} ({n:,} cells, {n_control:,} control)" for name, n, n_control in groups]
    return [f"{what}: {len(named)}: {_listed(named)}"] if named else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_LISTED} more" if len(names) > _N_LISTED else ""
    return ", ".join(names[:_N_LISTED]) + more
