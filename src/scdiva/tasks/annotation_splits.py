"""Splits of labelled cells for ``evaluate annotation``: within a set, across sets, one group (donor) left out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.data.conditions import is_missing, label_text
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, KeyNotFoundError, SourceError
from scdiva.models.base import Embedder
from scdiva.types import CellCounts
from scdiva.types import joined as joined_cells

if TYPE_CHECKING:
    from scdiva.data.source import CellSource, DataLike

WITHIN, ACROSS, GROUPS, PUBLISHED = "within sets", "across sets", "across groups", "published splits"
"""Kinds of splits: calibration is pooled within each and not over them."""
KINDS = (WITHIN, ACROSS, GROUPS, PUBLISHED)
_N_LISTED = 20


@dataclass(frozen=True, slots=True)
class LabelledCounts:
    """Labelled cells in the order of the model's vocabulary.

    Parameters
    ----------
    name
        Of the data.
    cells
        Counts; ``cells.cell_index`` are positions in the data.
    label
        ``(n_cells,)`` types.
    group
        ``(n_cells,)`` donor, batch or the like; "" where it is not known. Empty where no column was named.
    notes
        What was left out on reading.
    """

    name: str
    cells: CellCounts
    label: NDArray[np.str_]
    group: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, dtype=str))
    notes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        data: DataLike,
        model: Embedder,
        label_key: str,
        label_map: Mapping[str, str] | None = None,
        *,
        where: Mapping[str, Collection[str]] | None = None,
        group_key: str | None = None,
    ) -> Self:
        """Read cells that have a label; with a map, those whose label it names.

        Parameters
        ----------
        data
            Raw counts.
        model
            Its vocabulary is the order of genes.
        label_key
            Column of ``.obs`` with the types.
        label_map
            New label by label of the column; others are left out.
        where
            Values by column of ``.obs``: only cells that have one of the values in each column.
        group_key
            Column of ``.obs`` that :attr:`group` is read from.

        Raises
        ------
        SourceError
            No cell is left.
        KeyNotFoundError, ScaleError, GeneError
            The data cannot be used, or no cell has a label or value that is named.
        """
        source = open_source(data)
        label = _texts(source, label_key)
        if label_map is not None:
            _refuse_absent(source, label_key, label, label_map, "correct the map")
            label = np.array([label_map.get(name, "") for name in label], dtype=str)
        is_wanted, notes = np.ones(label.size, dtype=bool), []
        for column, values in (where or {}).items():
            found = _texts(source, column)
            _refuse_absent(source, column, found, values, "correct the filter")
            is_wanted &= np.isin(found, sorted(values))
            notes.append(f"{source.name}: only cells whose {column} is {' or '.join(sorted(values))}.")
        if not is_wanted.all():
            label = np.where(is_wanted, label, "")
        group = np.empty(0, dtype=str) if group_key is None else _texts(source, group_key)
        return cls._of(source, model, label, group, tuple(notes))

    @classmethod
    def of(cls, data: DataLike, model: Embedder, label: NDArray[np.str_]) -> Self:
        """Read cells whose labels are given; those without one are left out.

        Raises
        ------
        SourceError
            No cell is left.
        """
        return cls._of(open_source(data), model, label, np.empty(0, dtype=str), ())

    @classmethod
    def _of(
        cls,
        source: CellSource,
        model: Embedder,
        label: NDArray[np.str_],
        group: NDArray[np.str_],
        notes: tuple[str, ...],
    ) -> Self:
        rows = np.flatnonzero(~_is_missing(label))
        if not rows.size:
            what = " that passes the filter" if notes else ""
            raise SourceError(f"no cell of {source.name}{what} has a label", expected="labels", fix="name another key")
        cells = open_counts(source, model.vocabulary).read(rows)
        return cls(source.name, cells, label[rows], group[rows] if group.size else group, notes)

    def take(self, rows: NDArray[np.integer]) -> Self:
        """Return some cells."""
        group = self.group[rows] if self.group.size else self.group
        return replace(self, cells=self.cells.take(rows), label=self.label[rows], group=group)

    def with_genes(self, is_kept: NDArray[np.bool_]) -> Self:
        """Return the cells as if only some genes had been measured."""
        return replace(self, cells=self.cells.with_genes(is_kept))

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that are known, sorted."""
        return tuple(np.unique(self.group[~_is_missing(self.group)]).tolist())


@dataclass(frozen=True, slots=True)
class Task:
    """Training and held-out cells of one seed.

    Parameters
    ----------
    name
        What the table calls it.
    train, test
        Over the genes that both measure.
    kind
        One of :data:`KINDS`.
    notes
        Who was left out.
    """

    name: str
    train: LabelledCounts
    test: LabelledCounts
    kind: str = WITHIN
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return a hash of names, labels and counts."""
        digest = hashlib.sha256(self.name.encode())
        for part in (self.train, self.test):
            digest.update("\x1f".join(part.label.tolist()).encode())
            for array in (part.cells.counts.indptr, part.cells.counts.indices, part.cells.counts.data):
                digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()


def within(
    cells: LabelledCounts, seed: int, *, test_fraction: float = 0.2, n_per_type: int | None = None, min_cells: int = 10
) -> Task:
    """Hold out a share of each type; optionally only a few of the others have a label.

    Types of fewer than ``min_cells`` cells are left out.

    Raises
    ------
    SourceError
        Fewer than two types are left.
    """
    rng = np.random.default_rng([seed, 5])
    train, test, rare = [], [], {}
    for name in np.unique(cells.label):
        rows = rng.permutation(np.flatnonzero(cells.label == name))
        if rows.size < min_cells:
            rare[str(name)] = rows.size
            continue
        n_test = max(1, round(test_fraction * rows.size))
        test.append(rows[:n_test])
        train.append(rows[n_test:][:n_per_type])
    if len(train) < 2:
        raise SourceError(
            f"{len(train)} types of {cells.name} have {min_cells} cells", expected="at least two", fix="give more cells"
        )
    notes = (f"{cells.name}: types of fewer than {min_cells} cells are left out: {_sizes(rare)}.",) if rare else ()
    learned, held = (cells.take(np.sort(np.concatenate(rows))) for rows in (train, test))
    return Task(f"{cells.name}{_few(n_per_type)}", learned, held, WITHIN, (*cells.notes, *notes))


def across(
    train: LabelledCounts, test: LabelledCounts, seed: int, *, n_per_type: int | None = None, min_cells: int = 5
) -> Task:
    """Train on one set and test on another, over types and genes in common.

    Types of fewer than ``min_cells`` training cells count as absent.

    Raises
    ------
    SourceError
        Fewer than two types are common to both.
    """
    kinds, sizes = np.unique(train.label, return_counts=True)
    common = sorted(set(kinds[sizes >= min_cells].tolist()) & set(test.label.tolist()))
    if len(common) < 2:
        raise SourceError(
            f"{train.name} and {test.name} have {len(common)} labels in common",
            expected="at least two",
            fix="give maps from their labels to common ones",
        )
    rng = np.random.default_rng([seed, 6])
    rows = [rng.permutation(np.flatnonzero(train.label == name))[:n_per_type] for name in common]
    learned = train.take(np.sort(np.concatenate(rows)))
    held = test.take(np.flatnonzero(np.isin(test.label, common)))
    is_shared = np.concatenate([train.cells.is_measured, test.cells.is_measured]).all(axis=0)
    learned, held = (part.with_genes(np.asarray(is_shared)) for part in (learned, held))
    name = f"{train.name} → {test.name}"
    notes = [
        f"{name}: types of {part.name} that {other.name} lacks (or has fewer than {min_cells} training cells of) are "
        f"left out: {_sizes(left)}."
        for part, other in ((train, test), (test, train))
        if (left := _counted(part.label[~np.isin(part.label, common)]))
    ]
    return Task(f"{name}{_few(n_per_type)}", learned, held, ACROSS, (*train.notes, *test.notes, *notes))


def fixed(name: str, train: LabelledCounts, test: LabelledCounts, seed: int) -> Task:
    """Return a published split: the same for every seed; types that were not trained on count as errors."""
    return Task(name, train, test, PUBLISHED, (*train.notes, *test.notes))


def leave_one_group_out(
    cells: LabelledCounts,
    group: NDArray[np.str_],
    name: str,
    seed: int = 0,
    *,
    n_per_type: int | None = None,
    min_cells: int = 5,
) -> Task:
    """Train on the other groups (donors, batches) and test on one.

    Types that are absent from training are left out of the scored cells, and counted in the notes; so are cells whose
    group is not known, since they may be of the one that is tested on. Without ``n_per_type`` the split is the same for
    every seed.

    Parameters
    ----------
    cells
        Cells of all groups.
    group
        ``(n_cells,)`` group of each cell: ``cells.group``.
    name
        The group to test on.
    seed
        Seed of the draw of ``n_per_type``.
    n_per_type
        Labelled cells of each type; all if left out.
    min_cells
        Types of fewer training cells count as absent (our decision, as in :func:`across`).

    Raises
    ------
    ConfigError
        Groups and cells differ in number.
    KeyNotFoundError
        There is no such group.
    SourceError
        Fewer than two types can be trained on, or none of the group's cells can be scored.
    """
    group = np.asarray(group, dtype=str)
    if group.shape != cells.label.shape:
        raise ConfigError(
            f"{group.size} groups for {cells.label.size} cells", expected="one per cell", fix="give group_key=..."
        )
    is_known, is_held = ~_is_missing(group), group == name
    if not is_held.any() or is_missing(name):
        there = np.unique(group[is_known]).tolist()
        raise KeyNotFoundError(
            f"{cells.name} has no group {name!r}", expected=f"one of {', '.join(there[:_N_LISTED])}", fix="correct it"
        )
    is_train = is_known & ~is_held
    kinds, sizes = np.unique(cells.label[is_train], return_counts=True)
    trained = kinds[sizes >= min_cells]
    is_scored = is_held & np.isin(cells.label, trained)
    if trained.size < 2 or not is_scored.any():
        raise SourceError(
            f"without {name}, {trained.size} types of {cells.name} have {min_cells} cells, and {int(is_scored.sum())} "
            f"cells of {name} are of one of them",
            expected="two types to train on, and cells to test on",
            fix="name another group, or another column",
        )
    rng = np.random.default_rng([seed, 7])
    rows = [rng.permutation(np.flatnonzero(is_train & (cells.label == kind)))[:n_per_type] for kind in trained]
    title = f"{cells.name}: others → {name}"
    notes = list(cells.notes)
    if n_unknown := int((~is_known).sum()):
        notes.append(f"{cells.name}: {n_unknown:,} cells of no known group are left out.")
    if left := _counted(cells.label[is_held & ~is_scored]):
        notes.append(f"{title}: not scored, since fewer than {min_cells} cells could be trained on: {_sizes(left)}.")
    learned, held = cells.take(np.sort(np.concatenate(rows))), cells.take(np.flatnonzero(is_scored))
    return Task(f"{title}{_few(n_per_type)}", learned, held, GROUPS, tuple(notes))


def joined(one: LabelledCounts, other: LabelledCounts) -> LabelledCounts:
    """Return the cells of both, one after the other."""
    return replace(
        one,
        cells=joined_cells(one.cells, other.cells),
        label=np.concatenate([one.label, other.label]),
        group=np.concatenate([one.group, other.group]),
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
    )


def validation_folds(label: NDArray[np.str_], rng: np.random.Generator, *, n_folds: int) -> NDArray[np.int64]:
    """Deal the cells of each type over folds, ``(n_cells,)``; the only cell of a type is in none (-1)."""
    fold = np.full(label.size, -1, dtype=np.int64)
    for name in np.unique(label):
        rows = rng.permutation(np.flatnonzero(label == name))
        if rows.size > 1:
            fold[rows] = (np.arange(rows.size) + rng.integers(n_folds)) % n_folds
    return fold


def filters_by_source(
    data: Sequence[DataLike], where: Mapping[str, Collection[str]]
) -> tuple[list[dict[str, Collection[str]]], tuple[str, ...]]:
    """Return the filters of each source: those whose column it has; and notes on who lacks which.

    Raises
    ------
    KeyNotFoundError
        No source has the column.
    """
    sources = [open_source(part) for part in data]
    for column in where:
        if not any(column in source.obs.columns for source in sources):
            sources[0].column(column)  # its error lists the columns there are
    found = [{c: v for c, v in where.items() if c in source.obs.columns} for source in sources]
    notes = tuple(
        f"{source.name} has no column {column}: all of its cells are used."
        for source, own in zip(sources, found, strict=True)
        for column in where
        if column not in own
    )
    return found, notes


def _texts(source: CellSource, key: str) -> NDArray[np.str_]:
    return np.array([label_text(value) for value in source.column(key)], dtype=str)


def _is_missing(texts: NDArray[np.str_]) -> NDArray[np.bool_]:
    kinds, inverse = np.unique(texts, return_inverse=True)
    return np.array([is_missing(kind) for kind in kinds], dtype=bool)[inverse]


def _refuse_absent(source: CellSource, key: str, there: NDArray[np.str_], wanted: Collection[str], fix: str) -> None:
    known = set(there.tolist())
    if absent := sorted(set(wanted) - known):
        raise KeyNotFoundError(
            f"{source.name} has no label {', '.join(map(repr, absent[:5]))}",
            expected=f"labels of .obs[{key!r}]: {', '.join(sorted(known)[:_N_LISTED])}",
            fix=fix,
        )


def _counted(label: NDArray[np.str_]) -> dict[str, int]:
    names, sizes = np.unique(label, return_counts=True)
    return dict(zip(names.tolist(), sizes.tolist(), strict=True))


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n:,})" for name, n in sizes.items())


def _few(n_per_type: int | None) -> str:
    return "" if n_per_type is None else f", {n_per_type} per type"
