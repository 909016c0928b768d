"""Terms of the Cell Ontology, their ancestors, and the most specific term that several have in common.

Read from ``cell_ontology.tsv.gz`` on first use; source and licence are in ``README.md`` next to it.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType

from scdiva.errors import BundleError, KeyNotFoundError

TOO_GENERAL: Mapping[str, str] = MappingProxyType(
    {
        "CL:0000000": "cell",
        "CL:0000255": "eukaryotic cell",
        "CL:0000520": "prokaryotic cell",
        # how a cell looks
        "CL:0002242": "nucleate cell",
        "CL:0000226": "single nucleate cell",
        "CL:0000228": "multinucleate cell",
        "CL:0000225": "anucleate cell",
        "CL:0000412": "polyploid cell",
        "CL:0000413": "haploid cell",
        "CL:0000415": "diploid cell",
        # what it does
        "CL:0000219": "motile cell",
        "CL:0000234": "phagocyte",
        "CL:0000518": "phagocyte (sensu Vertebrata)",
        "CL:0000080": "circulating cell",
        "CL:0000145": "professional antigen presenting cell",
        "CL:0000151": "secretory cell",
        "CL:0000154": "protein secreting cell",
        "CL:0000174": "steroid hormone secreting cell",
        "CL:0000167": "peptide hormone secreting cell",
        "CL:0000159": "seromucus secreting cell",
        "CL:0000447": "carbohydrate secreting cell",
        "CL:0000457": "biogenic amine secreting cell",
        "CL:0000325": "stuff accumulating cell",
        "CL:0000329": "oxygen accumulating cell",
        "CL:0000183": "contractile cell",
        "CL:0000197": "sensory receptor cell",
        "CL:0000211": "electrically active cell",
        "CL:0000393": "electrically responsive cell",
        "CL:0000404": "electrically signaling cell",
        "CL:0000422": "mitogenic signaling cell",
        "CL:0000424": "excretory cell",
        "CL:0000630": "supporting cell",
        "CL:0007001": "skeletogenic cell",
        "CL:0009002": "inflammatory cell",
        "CL:0000445": "apoptosis fated cell",
        # at which stage, or where it was kept
        "CL:0011115": "precursor cell",
        "CL:0011026": "progenitor cell",
        "CL:0009010": "transit amplifying cell",
        "CL:0002321": "embryonic cell (metazoa)",
        "CL:0001034": "cell in vitro",
        "CL:0001061": "abnormal cell",
    }
)
"""Terms that are no answer to "which type of cell is this?".

Our decision: "cell", and of the terms within three steps of it those that group cells by a property or a stage and not
by what they are; "leukocyte", "neural cell" and "epithelial cell", as large as they are, say what a cell is and stay.
(A rule on depth would lose "endothelial cell", two steps below "cell"; one on the number of descendants, "neuron".)
"""

_ID = re.compile(r"^CL[:_](\d{1,7})$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CellTerm:
    """One term of the Cell Ontology.

    Parameters
    ----------
    id
        Such as ``CL:0000236``.
    label
        Its name; empty for some deprecated terms.
    synonyms
        Other names of it, sorted.
    parents
        Ids one step above; none for ``cell`` and for deprecated terms.
    is_deprecated
        It is no longer to be used.
    replaced_by
        Id to use instead of a deprecated one; empty where there is none, or none in the Cell Ontology.
    consider
        Ids that may, but need not, mean the same as a deprecated one: never followed.
    """

    id: str
    label: str
    synonyms: tuple[str, ...]
    parents: tuple[str, ...]
    is_deprecated: bool
    replaced_by: str
    consider: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CellOntology:
    """The Cell Ontology: names of cell types and which is a kind of which.

    Build it with :meth:`load`. Every method takes deprecated ids and goes on with their successor.

    Parameters
    ----------
    terms
        Id to term, deprecated terms included, sorted by id.
    """

    terms: Mapping[str, CellTerm]
    _ancestors: dict[str, Mapping[str, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls) -> CellOntology:
        """Return the Cell Ontology that is shipped; read once."""
        return _load()

    def current_id(self, term_id: str) -> str:
        """Return an id that is in use: the id itself, or the successor of a deprecated one.

        Raises
        ------
        KeyNotFoundError
            The id is unknown (names the most similar ids or labels), or deprecated without successor (names the terms
            to consider).
        """
        term = self.terms.get(term_id)
        if term is None:
            raise KeyNotFoundError(
                f"no term {term_id!r} in the Cell Ontology",
                expected=f"an id such as {', '.join(map(self._named, self.closest(term_id) or ['CL:0000236']))}",
                fix="give the id of a term, as CL:0000236 for a B cell",
            )
        seen = {term_id}
        while term.is_deprecated:
            if term.replaced_by not in self.terms or term.replaced_by in seen:
                considered = [self._named(other) for other in term.consider if other in self.terms]
                raise KeyNotFoundError(
                    f"{self._named(term_id)} is deprecated and has no successor",
                    expected="a term in use" + (f"; to consider: {', '.join(considered)}" if considered else ""),
                    fix="choose the term that describes your cells",
                )
            seen.add(term.replaced_by)
            term = self.terms[term.replaced_by]
        return term.id

    def term(self, term_id: str) -> CellTerm:
        """Return the term of an id, or of its successor; KeyNotFoundError as :meth:`current_id`."""
        return self.terms[self.current_id(term_id)]

    def label(self, term_id: str) -> str:
        """Return the name of a term; KeyNotFoundError as :meth:`current_id`."""
        return self.term(term_id).label

    def ancestors(self, term_id: str) -> Mapping[str, int]:
        """Return every term above one, with the smallest number of steps up to it; the term itself is not in it."""
        current = self.current_id(term_id)
        known = self._ancestors.get(current)
        if known is None:
            steps: dict[str, int] = {}
            level, n_steps = [current], 0
            while level:
                n_steps += 1
                above = dict.fromkeys(parent for term_id in level for parent in self.terms[term_id].parents)
                level = [parent for parent in above if parent not in steps]
                steps.update(dict.fromkeys(level, n_steps))
            known = self._ancestors[current] = MappingProxyType(steps)
        return known

    def descendants(self, term_id: str) -> frozenset[str]:
        """Return every term in use below one; the term itself is not in it."""
        current = self.current_id(term_id)
        return frozenset(t for t, term in self.terms.items() if not term.is_deprecated and current in self.ancestors(t))

    def is_a(self, term_id: str, ancestor_id: str) -> bool:
        """Tell whether a term is another one or a kind of it."""
        return self.distance(term_id, ancestor_id) is not None

    def distance(self, term_id: str, ancestor_id: str) -> int | None:
        """Return the smallest number of steps from a term up to another; 0 for itself, None if it is no kind of it."""
        current, above = self.current_id(term_id), self.current_id(ancestor_id)
        return 0 if current == above else self.ancestors(current).get(above)

    def too_general(self, extra: Iterable[str] = ()) -> frozenset[str]:
        """Return the ids that are no answer: :data:`TOO_GENERAL`, ``extra``, and every term above one of ``extra``."""
        added = {self.current_id(term_id) for term_id in extra}
        return frozenset(TOO_GENERAL).union(added, *(self.ancestors(term_id) for term_id in added))

    def common_ancestor(self, term_ids: Collection[str], too_general: Collection[str] | None = None) -> str:
        """Return the most specific term that all of some terms are, or are a kind of.

        Of all common ancestors (a term counts as its own) those are left that have no other common ancestor below
        them; of these the one with the smallest number of steps, summed over the terms, and of equal ones the smallest
        id.

        Parameters
        ----------
        term_ids
            Ids; one that is there twice counts once.
        too_general
            Ids that are no answer; None: those of :meth:`too_general`.

        Returns
        -------
        str
            An id, or ``""`` where only a too general term is common to all, or no ids were given.

        Raises
        ------
        KeyNotFoundError
            An id is unknown, or deprecated without successor.
        """
        refused = self.too_general() if too_general is None else frozenset(too_general)
        above = [{current: 0, **self.ancestors(current)} for current in sorted({self.current_id(t) for t in term_ids})]
        if not above:
            return ""
        common = set(above[0]).intersection(*above[1:]) - refused
        lowest = common - {up for term_id in common for up in self.ancestors(term_id)}
        return min(lowest, key=lambda term_id: (sum(steps[term_id] for steps in above), term_id), default="")

    def closest(self, text: str, n: int = 3) -> list[str]:
        """Return up to ``n`` ids in use that resemble a wrong id or a name; a help for messages, never an answer."""
        number = _ID.match(text.strip())
        in_use = [term for term in self.terms.values() if not term.is_deprecated]
        if number:
            wanted = f"CL:{number.group(1).zfill(7)}"
            near = difflib.get_close_matches(wanted, [term.id for term in in_use], n=n, cutoff=0)
            return list(dict.fromkeys(([wanted] if wanted in self.terms else []) + near))[:n]
        by_name: dict[str, str] = {}
        for term in in_use:
            for name in (term.label, *term.synonyms):
                by_name.setdefault(name.lower(), term.id)
        names = difflib.get_close_matches(text.strip().lower(), by_name, n=n + 3, cutoff=0.5)
        return list(dict.fromkeys(by_name[name] for name in names))[:n]

    def _named(self, term_id: str) -> str:
        return f"{term_id} ({self.terms[term_id].label})"


@functools.cache
def _load() -> CellOntology:
    packed = resources.files("scdiva.data.ontology").joinpath("cell_ontology.tsv.gz").read_bytes()
    header, *rows = gzip.decompress(packed).decode().rstrip("\n").split("\n")
    if header.count("\t") != 6:
        raise BundleError("the table of the Cell Ontology is damaged", expected="seven columns", fix="install again")
    terms = {}
    for row in rows:
        term_id, label, synonyms, parents, deprecated, replaced_by, consider = row.split("\t")
        terms[term_id] = CellTerm(
            id=term_id,
            label=label,
            synonyms=_parts(synonyms),
            parents=_parts(parents),
            is_deprecated=bool(deprecated),
            replaced_by=replaced_by,
            consider=_parts(consider),
        )
    return CellOntology(MappingProxyType(terms))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("|")) if text else ()
