"""The Cell Ontology, offline: terms and their ancestors, labels to ids, and answers that say no more than is known."""

from scdiva.data.ontology.backing_off import BackOff, back_off
from scdiva.data.ontology.matching import LabelMatch, LabelMatches, match_labels
from scdiva.data.ontology.terms import TOO_GENERAL, CellOntology, CellTerm

__all__ = [
    "TOO_GENERAL",
    "BackOff",
    "CellOntology",
    "CellTerm",
    "LabelMatch",
    "LabelMatches",
    "back_off",
    "match_labels",
]
