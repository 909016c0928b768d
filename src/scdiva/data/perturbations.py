"""Perturbations, cells that say which one each of them had, and how files write the names of perturbations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scdiva.data.conditions import is_missing
from scdiva.errors import KeyNotFoundError, SourceError
from scdiva.genes import GeneVocabulary, align_genes
from scdiva.types import CellCounts

Kind: TypeAlias = Literal["knockout", "activation", "treatment"]
"""Loss of a gene (knock-out, CRISPRi), gain of one (CRISPRa, over-expression), or a drug or cytokine by its name."""
CONTROL = "control"
"""Name of no perturbation."""

# Replogle et al. 2022: number of the guide pair, target, transcription start, Ensembl id
_GUIDE = re.compile(
    r"^\d+_(?P<name>.+)_(?:P\d(?:P\d)*|ENST\d+|non-targeting|nan)_(?P<id>ENSG\d{11}|non-targeting|nan)$"
)
_DOSED = re.compile(r"^(?P<name>.+)@(?P<dose>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)$")
_CONTROL_LIKE = re.compile(
    r"ctrl|control|non.?target|neg|^nt\d*$|scrambl|safe|vehicle|dmso|untreat|unstim|mock|pbs|wild.?type|^wt$|^none$",
    re.IGNORECASE,
)
_N_LISTED = 10


@dataclass(frozen=True, slots=True, order=True)
class Perturbation:
    """What was done to a cell.

    Parameters
    ----------
    targets
        Genes (symbols of the vocabulary, or as the file has them where the vocabulary has no such gene), or names of
        drugs and cytokines; sorted, no two equal. None of them: control.
    kind
        What was done to them.
    dose
        Of a treatment, in the unit of the data; None where it is not known or does not apply.
    """

    targets: tuple[str, ...]
    kind: Kind = "knockout"
    dose: float | None = None

    @property
    def name(self) -> str:
        """``"A+B"``, with a dose ``"A@2.5"``; of no target ``"control"``."""
        if not self.targets:
            return CONTROL
        return "+".join(self.targets) + ("" if self.dose is None else f"@{self.dose:g}")

    @property
    def is_control(self) -> bool:
        """Tell whether nothing was perturbed."""
        return not self.targets


@dataclass(frozen=True, slots=True, eq=False)
class PerturbedCells:
    """Cells of one data set with what was done to each, and where.

    Parameters
    ----------
    cells
        Raw counts in vocabulary order; ``library_size`` is over all genes of the cell where the file tells.
    perturbations
        All of the set; ``perturbations[0]`` is control.
    perturbation_code
        ``(n_cells,)`` int64 position in ``perturbations``.
    contexts
        Names of the cell types or lines that are compared within; one, ``""``, where the data has no context.
    context_code
        ``(n_cells,)`` int64.
    batches
        Names of batches; perturbed cells are compared with control cells of their batch where it has any.
    batch_code
        ``(n_cells,)`` int64.
    """

    cells: CellCounts
    perturbations: tuple[Perturbation, ...]
    perturbation_code: NDArray[np.int64]
    contexts: tuple[str, ...]
    context_code: NDArray[np.int64]
    batches: tuple[str, ...]
    batch_code: NDArray[np.int64]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.cells.n_cells

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Cells that nothing was done to, ``(n_cells,)``."""
        return self.perturbation_code == 0

    @property
    def is_measured(self) -> NDArray[np.bool_]:
        """Genes of the vocabulary that the data measures, ``(n_genes,)``: the panel."""
        return np.asarray(self.cells.is_measured.all(axis=0))

    def take(self, rows: NDArray[np.integer]) -> PerturbedCells:
        """Return the given cells, in the given order; perturbations, contexts and batches keep their codes."""
        return PerturbedCells(
            self.cells.take(rows),
            self.perturbations,
            self.perturbation_code[rows],
            self.contexts,
            self.context_code[rows],
            self.batches,
            self.batch_code[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class ParsedPerturbations:
    """What the labels of a column mean.

    Parameters
    ----------
    perturbations
        Control first, then sorted by targets and dose.
    code
        ``(n_cells,)`` int64 position in ``perturbations``; -1 where the label is missing.
    renamed
        Targets that the vocabulary calls otherwise: name in the file to symbol.
    unknown
        Targets that are no gene of the vocabulary, with their numbers of cells; none for treatments.
    """

    perturbations: tuple[Perturbation, ...]
    code: NDArray[np.int64]
    renamed: Mapping[str, str]
    unknown: Mapping[str, int]


def parse_perturbation(
    text: str,
    *,
    control: str | Collection[str],
    kind: Kind = "knockout",
    vocabulary: GeneVocabulary | None = None,
    names: Mapping[str, str] | None = None,
    dose: float | None = None,
) -> Perturbation:
    """Return what a label means.

    Understood are ``A``, ``A+B``, ``A+ctrl`` and ``ctrl+A`` (GEARS), ``A_B`` (scPerturb), guide pairs such as
    ``10023_A_P1_ENSG00000121410`` (Replogle et al. 2022), and a dose after ``@``: ``A@2.5``. An underscore separates
    targets only if the whole is no known name and every part is one (or control); so does a plus between treatments,
    because drugs have names such as "(+)-JQ1". Two guides of one gene are one target. (Our decisions.)

    Parameters
    ----------
    text
        Label of a cell.
    control
        Name or names of no perturbation; as a part of a label they are left out.
    kind
        What was done to the targets. Names of treatments stay as they are: a drug may be called like some gene's alias.
    vocabulary
        Genes, whose symbols the targets get; None: names stay as they are.
    names
        Names that are known besides those of the vocabulary, such as the genes of the file, with what the vocabulary
        calls each (empty: it has no such gene). They come before the vocabulary.
    dose
        From a column of doses.

    Raises
    ------
    SourceError
        An empty label or part, or more than one dose.
    """
    return _Parser(control, kind, vocabulary, names).parse(text, dose)


def parse_perturbations(
    labels: Sequence[str] | NDArray[np.str_],
    *,
    control: str | Collection[str],
    kind: Kind = "knockout",
    vocabulary: GeneVocabulary | None = None,
    names: Mapping[str, str] | None = None,
    doses: NDArray[np.float64] | None = None,
) -> ParsedPerturbations:
    """Return what the labels of a column mean; labels of the same meaning (``A+B``, ``B+A``) get the same code.

    Parameters
    ----------
    labels
        ``(n_cells,)`` text; a text that says that nothing is known ("", "nan", "unknown", ...) is no label, unless it
        is a name of control.
    control, kind, vocabulary, names
        See :func:`parse_perturbation`.
    doses
        ``(n_cells,)``, NaN where there is none; those of control cells do not matter.

    Raises
    ------
    KeyNotFoundError
        A name of control is in no label, or no cell is a control cell; lists the most frequent labels, and those that
        look like control.
    SourceError
        See :func:`parse_perturbation`.
    """
    texts = np.char.strip(np.asarray(labels, dtype=str))
    known = dict(names or {})
    if kind == "treatment":
        known.update((text, text) for text in np.unique(texts).tolist())
    parser = _Parser(control, kind, vocabulary, known)
    frame = pd.DataFrame({"label": texts, "dose": np.nan if doses is None else doses})
    grouped = frame.groupby(["label", "dose"], dropna=False, sort=False)
    of_cell = grouped.ngroup().to_numpy()
    meanings: list[Perturbation | None] = []
    for text, dose in frame.drop_duplicates().itertuples(index=False):  # in the order of the groups
        is_label = text in parser.control or not is_missing(text)
        meanings.append(parser.parse(text, None if np.isnan(dose) else float(dose)) if is_label else None)
    present = {meaning for meaning in meanings if meaning is not None}
    absent = parser.control - parser.control_met
    if absent or not any(meaning.is_control for meaning in present):
        raise _no_control(absent or parser.control, Counter(texts.tolist()))
    ordered = sorted(present, key=lambda p: (p.targets, -1.0 if p.dose is None else p.dose))
    position: dict[Perturbation | None, int] = {meaning: i for i, meaning in enumerate(ordered)}
    position[None] = -1
    code = np.array([position[meaning] for meaning in meanings], dtype=np.int64)[of_cell]
    n_cells = np.bincount(code[code >= 0], minlength=len(ordered))
    unknown: Counter[str] = Counter()
    for perturbation, n in zip(ordered, n_cells.tolist(), strict=True):
        for target in perturbation.targets:
            if target in parser.unknown:
                unknown[target] += n
    return ParsedPerturbations(
        tuple(ordered), code, dict(sorted(parser.renamed.items())), dict(sorted(unknown.items()))
    )


class _Parser:
    """Parses the labels of one column, and remembers what it met."""

    def __init__(
        self,
        control: str | Collection[str],
        kind: Kind,
        vocabulary: GeneVocabulary | None,
        names: Mapping[str, str] | None,
    ) -> None:
        self.control = frozenset([control] if isinstance(control, str) else control)
        self.kind: Kind = kind
        self.vocabulary = vocabulary
        self.names = names or {}
        self.control_met: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.unknown: set[str] = set()
        self._symbols: dict[tuple[str, str], str] = {}

    def parse(self, text: str, dose: float | None) -> Perturbation:
        text = text.strip()
        if not text:
            raise SourceError(
                "an empty label", expected="the name of a perturbation", fix="correct or leave out the cell"
            )
        if self._is_control(text):
            return Perturbation((), self.kind)
        guide = _GUIDE.match(text)
        if guide is not None and self.kind != "treatment":
            parts, ensembl_id = [guide["name"]], guide["id"] if guide["id"].startswith("ENSG") else ""
            doses = {dose}
        else:
            body, of_all = _without_dose(text)
            named = [_without_dose(part) for part in self._parts(body)]
            parts, ensembl_id = [part for part, _ in named], ""
            doses = {dose, of_all, *(of_part for _, of_part in named)}
        doses.discard(None)
        if not all(parts) or len(doses) > 1:
            what = f"the label {text!r}" + (f" with the doses {sorted(map(str, doses))}" if len(doses) > 1 else "")
            raise SourceError(
                what,
                expected="a perturbation, several joined by '+', and one dose for all",
                fix="correct the label, or leave these cells out",
            )
        targets = {self._symbol(part, ensembl_id) for part in parts if not self._is_control(part)}
        return Perturbation(tuple(sorted(targets)), self.kind, doses.pop() if targets and doses else None)

    def _is_control(self, name: str) -> bool:
        if name in self.control:
            self.control_met.add(name)
        return name in self.control

    def _parts(self, body: str) -> list[str]:
        """Take the names of several targets apart."""
        is_gene = self.kind != "treatment"
        if is_gene and "+" in body and body not in self.names:
            return [part.strip() for part in body.split("+")]
        if is_gene and "ENSG" in body:
            # "SYMBOL_ENSG..." is one gene; an Ensembl id with the name of another gene is a pair
            parts = [part.strip() for part in body.split("_")]
            symbols = [self._of_vocabulary(part, "") for part in parts]
            if all(symbols) and len(set(symbols)) > 1:
                return parts
        if is_gene and self._is_known(body):
            return [body]
        for separator in ("+", "_"):
            parts = [part.strip() for part in body.split(separator)]
            if len(parts) > 1 and all(part in self.control or self._is_known(part) for part in parts):
                return parts
        return [body]

    def _is_known(self, name: str) -> bool:
        return name in self.names or (self.kind != "treatment" and bool(self._of_vocabulary(name, "")))

    def _symbol(self, name: str, ensembl_id: str) -> str:
        if self.kind == "treatment" or self.vocabulary is None:
            return name
        symbol = self.names[name] if name in self.names else self._of_vocabulary(name, ensembl_id)
        if not symbol:
            self.unknown.add(name)
            return name
        if symbol != name:
            self.renamed[name] = symbol
        return symbol

    def _of_vocabulary(self, name: str, ensembl_id: str) -> str:
        """Return the symbol of a name; empty for no gene of the vocabulary."""
        if self.vocabulary is None or not name:
            return ""
        if (name, ensembl_id) not in self._symbols:
            # one by one: no label may change what another one means
            gene = int(align_genes([name], self.vocabulary, ids=[ensembl_id]).gene_of_source[0])
            self._symbols[name, ensembl_id] = str(self.vocabulary.symbol[gene]) if gene >= 0 else ""
        return self._symbols[name, ensembl_id]


def _without_dose(text: str) -> tuple[str, float | None]:
    match = _DOSED.match(text)
    return (text, None) if match is None else (match["name"].strip(), float(match["dose"]))


def _no_control(control: Collection[str], n_of_label: Counter[str]) -> KeyNotFoundError:
    frequent = ", ".join(f"{label!r} ({n:,})" for label, n in n_of_label.most_common(_N_LISTED))
    likely = [label for label, _ in n_of_label.most_common() if _CONTROL_LIKE.search(label)][:_N_LISTED]
    return KeyNotFoundError(
        f"no cell has the control {' or '.join(map(repr, sorted(control)))}; the most frequent labels are {frequent}",
        expected="labels of control cells",
        fix=f"name them: control={likely[0]!r}" + (f" (or {', '.join(map(repr, likely[1:]))})" if likely[1:] else "")
        if likely
        else "name the label of control cells; without control cells no effect is known",
    )
