"""Conditions of cells (cell type, tissue, assay, ...): from columns of ``.obs`` to codes of a model's labels.

A model knows a list of fields, and for each field a list of labels. A cell's code for a field is 0 where its label is
missing or not in the list, and c for the c-th label otherwise. Codes are positions: labels that are added later go to
the end.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scdiva.data.source import CellSource
from scdiva.errors import BundleError, ConfigError, KeyNotFoundError, SourceError

if TYPE_CHECKING:
    from scdiva.data.reader import CountsReader

MISSING = frozenset({"", "unassigned", "unknown", "nan", "na", "none", "<na>"})
"""Texts that say that nothing is known of a cell, whatever their case (our decision)."""

NO_BATCH = frozenset({"", "nan", "none", "<na>"})
"""Lower-case texts in the place of a batch that is not known; a batch may well be called "unknown"."""

_N_LISTED = 20


def column_text(column: pd.Series) -> NDArray[np.str_]:
    """Return a column of ``.obs`` as text, one for every cell; empty where it is missing."""
    missing = column.isna().to_numpy()
    return np.array(["" if gone else label_text(value) for value, gone in zip(column, missing, strict=True)], dtype=str)


def refuse_missing_batches(batch: NDArray[np.str_], name: str) -> None:
    """Refuse cells without a batch.

    Raises
    ------
    SourceError
        Says how many there are.
    """
    n_without = int(np.isin(np.char.lower(batch), list(NO_BATCH)).sum())
    if n_without:
        raise SourceError(
            f"{n_without:,} cells of {name} have no batch",
            expected="the batch of every cell",
            fix="name another column, or leave these cells out of the file",
        )


def label_text(value: Any) -> str:
    """Return the text of one label: stripped, and a whole number without ``.0``.

    pandas turns a column of whole numbers into floats as soon as one of them is missing; cluster 1 of such a file must
    stay cluster 1.
    """
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def is_missing(text: str) -> bool:
    """Tell whether a text says that nothing is known (:data:`MISSING`)."""
    return text.lower() in MISSING


@dataclass(frozen=True, slots=True)
class ConditionLabels:
    """The condition fields of a model and the labels of each; the order of both is part of the model.

    Build it with :func:`collect_labels`, :meth:`from_dict` or :meth:`none`. Two are equal if fields and labels are
    the same in the same order.

    Parameters
    ----------
    by_field
        ``(field, labels)`` of every field. Labels are unique, stripped, and none of them is in :data:`MISSING`.
    """

    by_field: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def none(cls) -> ConditionLabels:
        """No fields: the model takes no conditions."""
        return cls(())

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(field for field, _ in self.by_field)

    @property
    def n_fields(self) -> int:
        """Number of fields."""
        return len(self.by_field)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of labels of each field; codes go from 0 (unknown) to this number."""
        return tuple(len(labels) for _, labels in self.by_field)

    def labels(self, field: str) -> tuple[str, ...]:
        """Return the labels of a field; code c is ``labels(field)[c - 1]``.

        Raises
        ------
        KeyNotFoundError
            There is no such field; the error lists those there are.
        """
        for name, labels in self.by_field:
            if name == field:
                return labels
        raise KeyNotFoundError(
            f"no condition field {field!r}", expected=_one_of(field, self.fields), fix="name a field of the model"
        )

    def codes(self, field: str, values: pd.Series | ArrayLike) -> NDArray[np.int32]:
        """Return the code of every value.

        Parameters
        ----------
        field
            One of :attr:`fields`.
        values
            ``(n_cells,)`` text, categories or numbers; see :func:`label_text`.

        Returns
        -------
        NDArray
            ``(n_cells,)`` int32; 0 where the value is missing or no label of the field.

        Raises
        ------
        KeyNotFoundError
            There is no such field.
        """
        code_of = {label: code for code, label in enumerate(self.labels(field), start=1)}
        position, texts = _distinct(values)
        # missing values have position -1: the last entry
        return np.array([*(code_of.get(text, 0) for text in texts), 0], dtype=np.int32)[position]

    def encode(self, condition: Mapping[str, Any]) -> NDArray[np.int32]:
        """Return the codes of a wanted condition such as ``{"cell_type": "B cell"}``.

        Parameters
        ----------
        condition
            Label of each field that is wanted; fields that are left out are unknown.

        Returns
        -------
        NDArray
            ``(n_fields,)`` int32.

        Raises
        ------
        KeyNotFoundError
            A field or a label does not exist; lists those there are, the most similar first.
        """
        codes = np.zeros(self.n_fields, dtype=np.int32)
        for field, value in condition.items():
            labels, text = self.labels(field), label_text(value)
            if text not in labels:
                raise KeyNotFoundError(
                    f"no label {text!r} in the condition field {field!r}",
                    expected=_one_of(text, labels),
                    fix=f"name one of these labels, or leave {field} out",
                )
            codes[self.fields.index(field)] = labels.index(text) + 1
        return codes

    def merged(self, other: ConditionLabels) -> ConditionLabels:
        """Add what another model or corpus knows: new labels and new fields go to the end, so codes stay valid."""
        merged = dict(self.by_field)
        for field, labels in other.by_field:
            merged[field] = tuple(dict.fromkeys((*merged.get(field, ()), *labels)))
        return ConditionLabels(tuple(merged.items()))

    def to_dict(self) -> dict[str, list[str]]:
        """Return what is written to ``labels.json``: field to labels, in order."""
        return {field: list(labels) for field, labels in self.by_field}

    @classmethod
    def from_dict(cls, labels: Mapping[str, Sequence[str]]) -> ConditionLabels:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        BundleError
            A field without a list of labels, or a label that is no text, that is there twice, or that no cell can
            have (surrounding blanks, or a text that stands for a missing label).
        """
        for field, names in labels.items():
            if not field or isinstance(names, str) or not isinstance(names, Sequence):
                raise BundleError(
                    f"the condition field {field!r} holds {names!r}", expected="a list of labels", fix=_REWRITE
                )
            for name in names:
                if not isinstance(name, str) or name != name.strip() or is_missing(name):
                    raise _bad_label(field, f"the label {name!r}")
            for name, n_times in Counter(names).items():
                if n_times > 1:
                    raise _bad_label(field, f"the label {name!r} {n_times} times")
        return cls(tuple((field, tuple(names)) for field, names in labels.items()))


@dataclass(frozen=True, slots=True)
class FieldKnowledge:
    """What one source knows of one condition field.

    Parameters
    ----------
    source
        Name of the source.
    field
        Name of the condition field.
    column
        The ``.obs`` column that was read; ``None``: the source has none, and all of its cells are unknown.
    n_known, n_unknown
        Cells with and without a label; together all cells of the source that belong to the corpus.
    n_rare
        Those of the unknown cells that have a label, which too few cells of the corpus share (``min_cells``).
    n_labels
        Different labels among the known cells.
    """

    source: str
    field: str
    column: str | None
    n_known: int
    n_unknown: int
    n_rare: int
    n_labels: int


@dataclass(frozen=True, slots=True)
class ConditionReport:
    """What the sources of a corpus know of the condition fields.

    Parameters
    ----------
    entries
        One for each source and field, source by source.
    """

    entries: tuple[FieldKnowledge, ...]

    def lines(self) -> list[str]:
        """Return one line of text for each source and field, for logs."""
        return [_line(entry) for entry in self.entries]


def collect_labels(
    readers_and_rows: Iterable[tuple[CountsReader, NDArray[np.int64] | None]],
    fields: Sequence[str],
    columns_per_reader: Sequence[Mapping[str, str]] | None = None,
    min_cells: int = 1,
) -> tuple[ConditionLabels, ConditionReport]:
    """Collect the labels that the cells of a corpus have; only ``.obs`` is looked at.

    Parameters
    ----------
    readers_and_rows
        The sources and, for each, the cells that belong to the corpus, or ``None`` for all:
        ``zip(corpus.readers, corpus.rows)``.
    fields
        Condition fields, in the order of the model.
    columns_per_reader
        For each source, the ``.obs`` column of a field; a field that is not named is looked for under its own name
        and is unknown in a source that has no such column. None: no field is named.
    min_cells
        Labels that fewer cells of the corpus have are left out; their cells are unknown, and counted.

    Returns
    -------
    labels, report
        Labels in sorted order; how many cells of each source are known.

    Raises
    ------
    ConfigError
        A field twice or without a name, or a column for a field that is not in ``fields``.
    KeyNotFoundError
        A named column does not exist, or no source knows anything of a field.
    """
    parts = list(readers_and_rows)
    columns = [{}] * len(parts) if columns_per_reader is None else list(columns_per_reader)
    _check_fields(fields)
    columns_found: list[list[str | None]] = []
    cells_of_label: list[list[Counter[str]]] = []
    n_cells: list[int] = []
    for (reader, rows), named in zip(parts, columns, strict=True):
        found = condition_columns(reader.source, fields, named)
        columns_found.append(found)
        cells_of_label.append([_count_labels(reader.source, column, rows) for column in found])
        n_cells.append(len(reader) if rows is None else rows.size)
    kept = [
        _frequent(field, sum((counts[i] for counts in cells_of_label), Counter()), min_cells, parts)
        for i, field in enumerate(fields)
    ]
    entries = tuple(
        _knowledge(reader.source.name, field, column, counts, set(labels), n)
        for (reader, _), found, per_field, n in zip(parts, columns_found, cells_of_label, n_cells, strict=True)
        for field, column, counts, labels in zip(fields, found, per_field, kept, strict=True)
    )
    return ConditionLabels(tuple(zip(fields, kept, strict=True))), ConditionReport(entries)


def condition_columns(source: CellSource, fields: Sequence[str], named: Mapping[str, str]) -> list[str | None]:
    """Return the ``.obs`` column of each field, or ``None`` where the source has none.

    Parameters
    ----------
    source
        The cells.
    fields
        Condition fields.
    named
        Columns that were asked for; a field that is not named is looked for under its own name.

    Raises
    ------
    ConfigError
        A column is named for something that is no condition field.
    KeyNotFoundError
        A named column does not exist; lists those there are.
    """
    surplus = [field for field in named if field not in fields]
    if surplus:
        raise ConfigError(
            f"{source.name}: a column for {', '.join(map(repr, surplus))}, which is no condition field",
            expected=_one_of(surplus[0], fields),
            fix="add it to data.conditions, or leave the column out",
        )
    available = source.obs.columns
    for field, column in named.items():
        if column not in available:
            raise KeyNotFoundError(
                f"{source.name} has no .obs column {column!r} (named for the condition {field!r})",
                expected=_one_of(column, [str(name) for name in available]),
                fix="name an existing column, or none if the file does not know this condition",
            )
    return [named.get(field, field if field in available else None) for field in fields]


def condition_codes(source: CellSource, labels: ConditionLabels, named: Mapping[str, str]) -> NDArray[np.int32]:
    """Return the codes of all cells of a source.

    Parameters
    ----------
    source, named
        See :func:`condition_columns`.
    labels
        Fields and labels of the model.

    Returns
    -------
    NDArray
        ``(n_cells, n_fields)`` int32; 0 is unknown.

    Raises
    ------
    ConfigError, KeyNotFoundError
        See :func:`condition_columns`.
    """
    codes = np.zeros((source.n_cells, labels.n_fields), dtype=np.int32)
    for i, (field, column) in enumerate(
        zip(labels.fields, condition_columns(source, labels.fields, named), strict=True)
    ):
        if column is not None:
            codes[:, i] = labels.codes(field, source.column(column))
    return codes


_REWRITE = "correct labels.json, or write the model again"


def _bad_label(field: str, what: str) -> BundleError:
    return BundleError(
        f"the condition field {field!r} holds {what}",
        expected="different texts without surrounding blanks, none of which stands for an unknown label",
        fix=_REWRITE,
    )


def _distinct(values: pd.Series | ArrayLike) -> tuple[NDArray[np.int64], list[str]]:
    """Return the distinct values as texts, and the position of each value's text; -1 is NaN or None."""
    position, distinct = pd.factorize(pd.Series(values))
    return np.asarray(position, dtype=np.int64), [label_text(value) for value in distinct]


def _count_labels(source: CellSource, column: str | None, rows: NDArray[np.int64] | None) -> Counter[str]:
    """Count the cells of each label, over the cells that belong to the corpus."""
    counts: Counter[str] = Counter()
    if column is None:
        return counts
    values = source.column(column)
    position, texts = _distinct(values if rows is None else values.iloc[rows])
    n_of_text = np.bincount(position[position >= 0], minlength=len(texts))
    for text, n in zip(texts, n_of_text.tolist(), strict=True):
        if not is_missing(text):
            counts[text] += n
    return counts


def _check_fields(fields: Sequence[str]) -> None:
    repeated = [field for field, n in Counter(fields).items() if n > 1 or not field.strip()]
    if repeated:
        raise ConfigError(
            f"data.conditions = {list(fields)}: {repeated[0]!r} is empty or there more than once",
            expected="different names",
            fix="name each condition once",
        )


def _frequent(
    field: str, counts: Counter[str], min_cells: int, parts: Sequence[tuple[CountsReader, Any]]
) -> tuple[str, ...]:
    """Return the labels that enough cells have, sorted; refuse a field without any."""
    kept = tuple(sorted(label for label, n in counts.items() if n >= min_cells))
    if kept:
        return kept
    if counts:
        label, n = counts.most_common(1)[0]
        raise KeyNotFoundError(
            f"no label of the condition field {field!r} is that of {min_cells} cells; the most frequent, {label!r}, "
            f"is that of {n}",
            expected=f"at least one label with {min_cells} cells",
            fix=f"ask for fewer cells per label, or remove {field} from data.conditions",
        )
    available = list(dict.fromkeys(str(column) for reader, _ in parts for column in reader.source.obs.columns))
    raise KeyNotFoundError(
        f"no file knows the condition {field!r} of any of its cells",
        expected=f".obs columns with labels; there are {_listed(field, available)}",
        fix=f"name the column of {field} for each file (conditions), or remove {field} from data.conditions",
    )


def _knowledge(
    source: str, field: str, column: str | None, counts: Counter[str], kept: set[str], n_cells: int
) -> FieldKnowledge:
    n_known = sum(n for label, n in counts.items() if label in kept)
    return FieldKnowledge(
        source=source,
        field=field,
        column=column,
        n_known=n_known,
        n_unknown=n_cells - n_known,
        n_rare=counts.total() - n_known,
        n_labels=len(counts.keys() & kept),
    )


def _line(entry: FieldKnowledge) -> str:
    if entry.column is None:
        return f"{entry.source}: no column for {entry.field}, unknown in all {entry.n_unknown:,} cells"
    rare = f" ({entry.n_rare:,} of them with a rare label)" if entry.n_rare else ""
    return (
        f"{entry.source}: {entry.field} from .obs[{entry.column!r}], {entry.n_labels:,} labels, known in "
        f"{entry.n_known:,} cells, unknown in {entry.n_unknown:,}{rare}"
    )


def _one_of(wanted: str, known: Sequence[str]) -> str:
    return f"one of {_listed(wanted, known)}" if known else "nothing: there is none"


def _listed(wanted: str, known: Sequence[str]) -> str:
    """List names, the most similar ones first, whatever their case."""
    lowered = [name.lower() for name in known]
    close = difflib.get_close_matches(wanted.lower(), lowered, n=3, cutoff=0.5)
    similar = [name for text in close for name in known if name.lower() == text]
    names = list(dict.fromkeys([*similar, *known]))
    more = f" and {len(names) - _N_LISTED} more" if len(names) > _N_LISTED else ""
    return (", ".join(names[:_N_LISTED]) or "none") + more
