"""Labels of cell types, as authors write them, to ids of the Cell Ontology; offline, and nothing is guessed.

A label is an id if its text is the name of exactly one term, exactly or after a normalisation that changes no meaning,
or if a written table says so. Anything else stays without an id and is listed. The rules are our own.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scdiva.data.conditions import is_missing, label_text
from scdiva.data.ontology.abbreviations import AMBIGUOUS, ANYWHERE, IN_TISSUE
from scdiva.data.ontology.terms import CellOntology
from scdiva.errors import KeyNotFoundError

HOW = {
    "given": "by your own mapping",
    "id": "the label is an id",
    "label": "the name of the term",
    "abbreviation": "by the table of abbreviations",
    "synonym": "a synonym of the term",
    "normalised": "a name of the term but for case, plural, hyphens, +, Greek letters, order of words or 'cell'",
    "shortened": "a name of the term without 'alpha-beta', 'thymus-derived' or 'human'",
    "": "no id",
}
"""How a label was matched, in the order in which it is tried."""

Words = tuple[str, ...]

# Terms of other species keep their own name, but none of their synonyms: "alpha cell" is one of a mouse retinal neuron.
_OTHER_SPECIES = re.compile(r"\((Mmus|sensu (?!Vertebrata)[^)]*)\)|, mouse$")
# Short synonyms ("IC", "PD", "LP" of crustacean neurons) read like names of clusters; those in use are in our table.
_MIN_SYNONYM = 5
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "κ": "kappa", "μ": "mu", "φ": "phi"}
_WHOLE_WORDS = {
    "mono": "monocyte",
    "mac": "macrophage",
    "mphi": "macrophage",
    "mem": "memory",
    "lo": "low",
    "hi": "high",
}
_SAME_ENDING = ("ss", "us", "is")
# "endothelial" and "myofibroblast" are types of cells without "cell"; "heart", "lens", "CCK" or "D" are not; others
# ("mast") are in the table.
_TYPE_ENDING = re.compile(r"\w{3,}(al|ar|ed|ic|id|ous|blast|cyte|phage|phil)$")
_SUFFIXES = "low|lo|high|hi|dim|bright"


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """What one label is in the Cell Ontology.

    Parameters
    ----------
    label
        The label.
    id, name
        Term and its name; both empty for a label without one.
    how
        A key of :data:`HOW`.
    candidates
        Ids that the label may mean, where they are several, or where the table of a tissue knows it.
    note
        Why it has no id, and what would help; empty for a match.
    """

    label: str
    id: str
    name: str
    how: str
    candidates: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class LabelMatches:
    """Labels and their terms.

    Parameters
    ----------
    matches
        One for each different label that says something, in order of appearance.
    missing
        Labels that say that nothing is known ("unassigned", "nan", ...): they are no types.
    unused
        Labels of your own mapping that no cell has.
    """

    matches: tuple[LabelMatch, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def id_of(self) -> dict[str, str]:
        """Label to id, of those that have one."""
        return {match.label: match.id for match in self.matches if match.id}

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Labels without an id."""
        return tuple(match.label for match in self.matches if not match.id)

    def ids(self, labels: pd.Series | ArrayLike) -> NDArray[np.object_]:
        """Return the id of every cell; ``""`` for a label that is missing, without an id, or was not asked for.

        Parameters
        ----------
        labels
            ``(N,)`` labels.

        Returns
        -------
        NDArray
            ``(N,)`` texts.
        """
        position, texts = _distinct(labels)
        id_of = self.id_of
        # missing values have position -1: the last entry
        return np.array([*(id_of.get(text, "") for text in texts), ""], dtype=object)[position]

    def table(self) -> pd.DataFrame:
        """Return one row per label: ``label``, ``id``, ``name``, ``how`` and ``note``."""
        columns = ["label", "id", "name", "how", "note"]
        return pd.DataFrame([[getattr(match, column) for column in columns] for match in self.matches], columns=columns)

    def lines(self) -> list[str]:
        """Return one line of text per label, for logs; then the labels of the mapping that no cell has."""
        told = [
            f"{match.label}: {match.id} ({match.name}), {HOW[match.how]}"
            if match.id
            else f"{match.label}: no id; {match.note}"
            for match in self.matches
        ]
        return told + [f"{label}: in the mapping, but no label of these cells" for label in self.unused]


def match_labels(
    labels: pd.Series | ArrayLike,
    mapping: Mapping[str, str] | None = None,
    *,
    tissue: str | None = None,
    ontology: CellOntology | None = None,
) -> LabelMatches:
    """Find the Cell Ontology id of every label.

    Tried in this order, each time only if exactly one term fits: your mapping; the label is an id; the name of a term;
    the table of abbreviations; a synonym; the same names normalised; and names without "alpha-beta", "thymus-derived"
    and "human", which annotations leave out (:data:`HOW`). The table goes before synonyms because a few of those mean
    something else than authors do today ("DC2", "CD16+ monocyte").

    Parameters
    ----------
    labels
        ``(N,)`` labels of cells, or the different ones; text, categories or numbers.
    mapping
        Label to id, before everything else; ``""`` for a label that is to have none.
    tissue
        Also use the abbreviations of this tissue ("alpha" is a pancreatic cell in ``"pancreas"``).
    ontology
        None: the shipped one.

    Returns
    -------
    LabelMatches
        One match per different label; deprecated ids are replaced by their successors.

    Raises
    ------
    KeyNotFoundError
        An id of the mapping is unknown or deprecated without successor, or there is no table for the tissue.
    """
    ontology = CellOntology.load() if ontology is None else ontology
    if tissue is not None and tissue not in IN_TISSUE:
        raise KeyNotFoundError(
            f"no abbreviations for the tissue {tissue!r}",
            expected=f"one of {', '.join(IN_TISSUE)}",
            fix="name one of these, or leave tissue out",
        )
    given = _checked({} if mapping is None else mapping, ontology)
    _, texts = _distinct(labels)
    texts = list(dict.fromkeys(texts))
    names = _names(ontology)
    matches = [
        _given(text, given[text], ontology) if text in given else _match(text, tissue, names, ontology)
        for text in texts
        if text in given or not is_missing(text)
    ]
    return LabelMatches(
        matches=tuple(matches),
        missing=tuple(text for text in texts if is_missing(text) and text not in given),
        unused=tuple(label for label in given if label not in texts),
    )


def words_of(text: str) -> Words:
    """Return the words of a label, sorted, so that spellings of one name become equal.

    Case, accents, plural, hyphens, underscores and "cell" go; Greek letters are spelled out; "CD14+" and
    "CD14-positive" become "cd14", "CD16-" and "CD16-negative" become "cd16neg". Signs that join two types ("/", "&")
    stay words, so that no label of two types becomes the name of one.
    """
    text = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in text if not unicodedata.combining(char)).casefold()
    text = re.sub("[‐‑‒–—−]", "-", text)
    text = re.sub("[α-ω]", lambda match: f" {_GREEK.get(match.group(), match.group())} ", text)
    text = text.replace("m phi", "mphi")
    text = re.sub(r"\b(nkt|nk|t|b)cells?\b", r"\1 cell", text)
    text = re.sub(r"[\s_-]*(?:\bpositive|(?<=\d)pos)\b", "+", text)
    text = re.sub(r"(\w)[\s_-]+(?:negative|neg)\b", r"\1neg ", text)
    # a minus is a sign after a marker that ends there, or that another marker follows
    text = re.sub(r"(\b[a-z]+\d+[a-z]?)-(?=$|[\s/,)]|cd\d)", r"\1neg ", text)
    text = re.sub(rf"(\bcd\d+[a-z]*)[\s_-]+({_SUFFIXES})\b", r"\1\2", text)
    # "CD4+/CD25+ T" lists markers; any other slash joins types
    text = re.sub(r"(?<=\+)/|(?<=neg )/", " ", text)
    text = re.sub(r"([/&|])", r" \1 ", text)
    text = re.sub(r"[\s_,.;:()'\"+\[\]-]+", " ", text)
    words = [_WHOLE_WORDS.get(word, word) for word in (_singular(word) for word in text.split())]
    found = " " + " ".join(words) + " "
    found = found.replace(" natural killer ", " nk ").replace(" dendritic ", " dc ").replace(" t reg ", " treg ")
    kept = [word for word in found.split() if word != "cell"]
    if "regulatory" in kept and "t" in kept:
        kept = [word for word in kept if word not in ("regulatory", "t")] + ["treg"]
    elif "treg" in kept and "t" in kept:
        kept.remove("t")
    return tuple(sorted(kept)) or tuple(sorted(words))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith(_SAME_ENDING) else word


@dataclass(frozen=True, slots=True, eq=False)
class _Names:
    """Names of terms to ids: as they are written, and by their words; ``nouns`` are names that do not need "cell"."""

    labels: Mapping[str, str]
    synonyms: Mapping[str, tuple[str, ...]]
    normalised: Mapping[Words, tuple[str, ...]]
    nouns: frozenset[Words]
    shortened: Mapping[Words, tuple[str, ...]]
    abbreviations: Mapping[Words, str]
    of_tissue: Mapping[str, Mapping[Words, str]]
    ambiguous: Mapping[Words, tuple[str, ...]]


@functools.lru_cache(maxsize=4)
def _names(ontology: CellOntology) -> _Names:
    labels: dict[str, str] = {}
    synonyms: dict[str, set[str]] = {}
    by_words: dict[Words, set[str]] = {}
    by_words_of_synonym: dict[Words, set[str]] = {}
    for term in ontology.terms.values():
        if term.is_deprecated:
            continue
        labels[term.label] = term.id
        if _OTHER_SPECIES.search(term.label):
            continue
        by_words.setdefault(words_of(term.label), set()).add(term.id)
        for synonym in term.synonyms:
            if len(synonym) >= _MIN_SYNONYM:
                synonyms.setdefault(synonym, set()).add(term.id)
                by_words_of_synonym.setdefault(words_of(synonym), set()).add(term.id)
    written = [*labels, *synonyms]
    # the name of a term goes before a synonym of another
    normalised = {**by_words_of_synonym, **by_words}
    return _Names(
        labels=labels,
        synonyms=_sorted(synonyms),
        normalised=_sorted(normalised),
        nouns=frozenset(words_of(name) for name in written if " " not in name and "cell" not in name.lower()),
        shortened=_sorted(_shortened(normalised)),
        abbreviations=_by_words(ANYWHERE),
        of_tissue={tissue: _by_words(table) for tissue, table in IN_TISSUE.items()},
        ambiguous={words_of(label): ids for label, ids in AMBIGUOUS.items()},
    )


def _sorted(ids_of_name: Mapping[Any, set[str]]) -> dict[Any, tuple[str, ...]]:
    return {name: tuple(sorted(ids)) for name, ids in ids_of_name.items()}


def _by_words(table: Mapping[str, str]) -> dict[Words, str]:
    return {words_of(label): term_id for label, term_id in table.items()}


def _shortened(normalised: Mapping[Words, set[str]]) -> dict[Words, set[str]]:
    """Return the words of names without those that annotations leave out, where they were left out."""
    shortened: dict[Words, set[str]] = {}
    for words, ids in normalised.items():
        left_out = {"human", "thymus", "derived"} if "thymus" in words else {"human"}
        if {"alpha", "beta"} <= set(words) and {"t", "treg"} & set(words):
            left_out |= {"alpha", "beta"}
        short = tuple(word for word in words if word not in left_out)
        if short and short != words:
            shortened.setdefault(short, set()).update(ids)
    return shortened


def _match(text: str, tissue: str | None, names: _Names, ontology: CellOntology) -> LabelMatch:
    """Match one label, by the first rule under which exactly one term fits."""
    as_id = re.fullmatch(r"CL[:_](\d{7})", text)
    if as_id and f"CL:{as_id.group(1)}" in ontology.terms:
        try:
            return _matched(text, ontology.current_id(f"CL:{as_id.group(1)}"), "id", ontology)
        except KeyNotFoundError as error:
            return LabelMatch(text, "", "", "", note=f"{error.found}; {error.expected}")
    if text in names.labels:
        return _matched(text, names.labels[text], "label", ontology)
    words = words_of(text)
    if words in names.ambiguous:
        return _unclear(text, names.ambiguous[words], ontology)
    of_tissue = names.of_tissue[tissue].get(words) if tissue else None
    abbreviation = of_tissue or names.abbreviations.get(words)
    if abbreviation and names.normalised.get(words) != (abbreviation,):  # what the ontology says itself needs no table
        return _matched(text, ontology.current_id(abbreviation), "abbreviation", ontology)
    tried = {"synonym": names.synonyms.get(text, ())}
    if abbreviation or not _is_bare(text, words, names):
        tried |= {"normalised": names.normalised.get(words, ()), "shortened": names.shortened.get(words, ())}
    for how, ids in tried.items():
        if len(ids) == 1:
            return _matched(text, ids[0], how, ontology)
        if ids:
            return _unclear(text, ids, ontology)
    return _unmatched(text, words, names, ontology)


def _is_bare(text: str, words: Words, names: _Names) -> bool:
    """Tell whether a label is one word that would need "cell" to be a type: a cluster called "D" is no D cell."""
    if len(words) != 1 or "cell" in text.lower():
        return False
    return len(words[0]) <= 2 or not (words in names.nouns or _TYPE_ENDING.match(words[0]))


def _matched(text: str, term_id: str, how: str, ontology: CellOntology) -> LabelMatch:
    return LabelMatch(text, term_id, ontology.label(term_id), how)


def _given(text: str, term_id: str, ontology: CellOntology) -> LabelMatch:
    if term_id:
        return _matched(text, term_id, "given", ontology)
    return LabelMatch(text, "", "", "given", note="your mapping says that it has none")


def _unclear(text: str, ids: tuple[str, ...], ontology: CellOntology) -> LabelMatch:
    listed = ", ".join(f"{term_id} ({ontology.label(term_id)})" for term_id in ids)
    return LabelMatch(text, "", "", "", candidates=ids, note=f"it may mean {listed}: give a mapping")


def _unmatched(text: str, words: Words, names: _Names, ontology: CellOntology) -> LabelMatch:
    """Say what would help; whatever resembles the label is named and not used."""
    match = LabelMatch(text, "", "", "")
    for tissue, table in names.of_tissue.items():
        if words in table:
            term_id = table[words]
            note = f"in the tissue {tissue!r} it is {term_id} ({ontology.label(term_id)})"
            return replace(match, candidates=(term_id,), note=note)
    near = difflib.get_close_matches(text.lower(), _searchable(ontology), n=3, cutoff=0.6)
    ids = dict.fromkeys(_searchable(ontology)[name] for name in near)
    similar = ", ".join(f"{term_id} ({ontology.label(term_id)})" for term_id in ids)
    return replace(match, note=f"give a mapping; similar names: {similar}" if similar else "give a mapping")


@functools.lru_cache(maxsize=4)
def _searchable(ontology: CellOntology) -> dict[str, str]:
    return {label.lower(): term_id for label, term_id in _names(ontology).labels.items()}


def _checked(mapping: Mapping[str, str], ontology: CellOntology) -> dict[str, str]:
    """Return the user's mapping with ids in use; refuse an id that is none."""
    checked = {}
    for label, term_id in mapping.items():
        try:
            checked[label_text(label)] = ontology.current_id(term_id) if term_id else ""
        except KeyNotFoundError as error:
            raise KeyNotFoundError(
                f"the mapping of {label!r}: {error.found}", expected=error.expected, fix=error.fix
            ) from None
    return checked


def _distinct(labels: pd.Series | ArrayLike) -> tuple[NDArray[np.int64], list[str]]:
    """Return the position of each label's text, and the different texts in order of appearance; -1 is missing."""
    position, distinct = pd.factorize(labels if isinstance(labels, pd.Series) else pd.Series(_as_list(labels)))
    return np.asarray(position, dtype=np.int64), [label_text(value) for value in distinct]


def _as_list(labels: Any) -> list[Any] | Any:
    if isinstance(labels, str):  # one label, not its letters
        return [labels]
    return list(labels) if isinstance(labels, Iterable) and not hasattr(labels, "dtype") else labels
