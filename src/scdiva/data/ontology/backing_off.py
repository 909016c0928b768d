"""Answers that say no more than is known: from class probabilities to the most specific term that is probable enough.

A classifier that cannot tell CD4 from CD8 T cells still knows that a cell is an alpha-beta T cell. The rule is our own;
the hierarchy is the Cell Ontology.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.data.ontology.terms import CellOntology
from scdiva.errors import ConfigError

TOLERANCE = 1e-6
"""How much a sum of probabilities may miss the threshold: single-precision probabilities add up to 0.9999998."""

_BLOCK = 16384


@dataclass(frozen=True, slots=True)
class BackOff:
    """The most specific term that is probable enough, for every cell.

    Parameters
    ----------
    ids
        ``(N,)`` Cell Ontology ids, as Python texts; ``""`` where only a too general term is probable enough, or where
        the class that is has no id.
    labels
        ``(N,)`` names of these terms; ``""`` where there is no id.
    probabilities
        ``(N,)`` summed probability of the classes that the term stands for; where there is no id, the probability of
        the best class.
    is_backed_off
        ``(N,)`` bool: no single class was probable enough, so the answer is a wider term or none.
    """

    ids: NDArray[np.object_]
    labels: NDArray[np.object_]
    probabilities: NDArray[np.float64]
    is_backed_off: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The terms that can be answers for a list of classes.

    Parameters
    ----------
    ids
        ``(C,)`` terms, those that stand for few classes first.
    members
        ``(K, C)`` bool: the class is the term or a kind of it.
    """

    ids: tuple[str, ...]
    members: NDArray[np.bool_]


def candidate_terms(
    class_ids: Sequence[str], ontology: CellOntology | None = None, also_too_general: Iterable[str] = ()
) -> Candidates:
    """Return the terms that can be answers: one for each set of classes that some term stands for.

    Of several terms that stand for the same classes only the most specific one is kept, by the rule of
    :meth:`CellOntology.common_ancestor`.

    Parameters
    ----------
    class_ids
        ``(K,)`` term of each class; ``""`` for a class without one, which no candidate stands for. Several classes may
        have the same term.
    ontology
        None: the shipped one.
    also_too_general
        Ids that are no answer, besides :data:`TOO_GENERAL`, each with everything above it.

    Raises
    ------
    KeyNotFoundError
        An id is unknown, or deprecated without successor.
    """
    ontology = CellOntology.load() if ontology is None else ontology
    refused = ontology.too_general(also_too_general)
    current = [ontology.current_id(term_id) if term_id else "" for term_id in class_ids]
    above = [{term_id, *ontology.ancestors(term_id)} - refused if term_id else set() for term_id in current]
    # one entry per set of classes: it is the set that decides the probability
    members_of_term = {
        term_id: frozenset(k for k, terms in enumerate(above) if term_id in terms) for term_id in set().union(*above)
    }
    by_members = {
        members: ontology.common_ancestor([current[k] for k in members], refused)
        for members in set(members_of_term.values())
    }
    # few classes first; equal ones in the order of the classes, so that ties do not depend on hashing
    ordered = sorted(by_members, key=lambda members: (len(members), sorted(members)))
    members = np.zeros((len(class_ids), len(ordered)), dtype=bool)
    for column, positions in enumerate(ordered):
        members[sorted(positions), column] = True
    return Candidates(tuple(by_members[positions] for positions in ordered), members)


def back_off(
    probabilities: ArrayLike,
    class_ids: Sequence[str],
    threshold: float,
    *,
    ontology: CellOntology | None = None,
    also_too_general: Iterable[str] = (),
) -> BackOff:
    """Answer with the most specific term whose probability reaches a threshold.

    A cell whose best class reaches the threshold keeps it. For any other cell the probability of a term is the sum
    over the classes that are the term or a kind of it, and the answer is the term that reaches the threshold with
    fewest classes; of equal ones the more probable, then the one of the earlier classes. It need not contain the best
    class: with monocyte 0.4, CD4 T 0.3 and CD8 T 0.3, "T cell" is the more probable answer.

    Parameters
    ----------
    probabilities
        ``(N, K)`` probabilities of the classes, at least 0; rows sum to at most 1. What is missing to 1 belongs to no
        class.
    class_ids
        ``(K,)`` Cell Ontology id of each class; ``""`` for a class without one.
    threshold
        In (0, 1].
    ontology
        None: the shipped one.
    also_too_general
        Ids that are no answer, besides :data:`TOO_GENERAL`, each with everything above it; ``["CL:0000842"]``
        (mononuclear leukocyte) for blood, of which nearly every cell is one.

    Returns
    -------
    BackOff
        For every cell an id, its name and its probability.

    Raises
    ------
    ConfigError
        The threshold, the shape or the probabilities are impossible.
    KeyNotFoundError
        An id is unknown, or deprecated without successor.
    """
    ontology = CellOntology.load() if ontology is None else ontology
    probability_NK = np.asarray(probabilities)
    _check(probability_NK, class_ids, threshold)
    n_cells, n_classes = probability_NK.shape
    candidates = candidate_terms(class_ids, ontology, also_too_general)
    # answers: the candidates, then the classes themselves, then none
    ids = [*candidates.ids, *(ontology.current_id(term_id) if term_id else "" for term_id in class_ids), ""]
    first_class, none = len(candidates.ids), len(ids) - 1

    answer_N = np.full(n_cells, none, dtype=np.intp)
    sum_N = np.zeros(n_cells)
    is_backed_off_N = np.zeros(n_cells, dtype=bool)
    members_KC = candidates.members.astype(np.float64)
    n_members_C = members_KC.sum(axis=0)
    for start in range(0, n_cells if n_classes else 0, _BLOCK):
        block = slice(start, start + _BLOCK)
        block_BK = probability_NK[block].astype(np.float64)
        best_B = block_BK.argmax(axis=1)
        sum_N[block] = block_BK[np.arange(len(block_BK)), best_B]
        answer_N[block] = first_class + best_B
        unsure_U = np.flatnonzero(sum_N[block] < threshold - TOLERANCE)
        is_backed_off_N[start + unsure_U] = True
        answer_N[start + unsure_U] = none
        if not unsure_U.size or not candidates.ids:
            continue
        # rounded, so that the order of a sum does not decide between equal terms
        sum_UC = np.round(block_BK[unsure_U] @ members_KC, 9)
        # fewest classes first: a sum is at most about 1, so half of it only decides between equal numbers
        cost_UC = np.where(sum_UC >= threshold - TOLERANCE, n_members_C - 0.5 * sum_UC, np.inf)
        chosen_U = cost_UC.argmin(axis=1)
        is_found_U = np.isfinite(cost_UC[np.arange(unsure_U.size), chosen_U])
        found, chosen = unsure_U[is_found_U], chosen_U[is_found_U]
        answer_N[start + found] = chosen
        sum_N[start + found] = np.minimum(sum_UC[is_found_U, chosen], 1.0)
    labels = [ontology.label(term_id) if term_id else "" for term_id in ids]
    return BackOff(
        ids=np.array(ids, dtype=object)[answer_N],
        labels=np.array(labels, dtype=object)[answer_N],
        probabilities=sum_N,
        is_backed_off=is_backed_off_N,
    )


def _check(probability_NK: NDArray[np.floating], class_ids: Sequence[str], threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"threshold = {threshold}", expected="a probability above 0, at most 1", fix="give such a threshold"
        )
    if probability_NK.ndim != 2 or probability_NK.shape[1] != len(class_ids):
        raise ConfigError(
            f"probabilities of shape {probability_NK.shape} for {len(class_ids)} class ids",
            expected=f"(cells, {len(class_ids)})",
            fix="give one id per column, empty for a class without one",
        )
    # NaN fails both comparisons
    if probability_NK.size and not (probability_NK.min() >= -TOLERANCE and probability_NK.sum(axis=1).max() <= 1.001):
        raise ConfigError(
            "class probabilities that are negative, not finite, or sum to more than 1 in a cell",
            expected="probabilities, such as a softmax",
            fix="give probabilities, not scores",
        )
