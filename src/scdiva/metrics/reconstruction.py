"""How near a reconstructed cell comes to the true one: as a sequence of genes, and gene by gene.

The paper's rank-value task compares two sequences of gene ids: the cell serialised in its order, and what a model makes
of it when some tokens are hidden. Its metrics are known by name only (edit distance, BLEU, rank correlation; names from
GeneMamba); the definitions here are ours. A gene id of -1 stands for "no gene" (a place that was left hidden, or a
special token): it equals no gene, and so counts as an error wherever it stands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

NO_GENE = -1
"""What stands in a sequence where there is no gene."""

BLEU_ORDER = 4
"""Longest n-gram of BLEU."""


def edit_distance(first: ArrayLike, second: ArrayLike) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and substitutions from one sequence to the other.

    Bit-parallel (Myers 1999, in the form of Hyyrö 2003): one column of the table is two integers of as many bits as the
    first sequence is long, so 1,200 tokens against 1,200 take about a millisecond.

    Parameters
    ----------
    first, second
        Integers.
    """
    a, b = np.asarray(first), np.asarray(second)
    n_same = min(a.size, b.size)
    # a common start and a common end cost nothing
    differs = np.flatnonzero(a[:n_same] != b[:n_same])
    start = int(differs[0]) if differs.size else n_same
    a, b = a[start:], b[start:]
    n_same = min(a.size, b.size)
    differs = np.flatnonzero(a[a.size - n_same :][::-1] != b[b.size - n_same :][::-1])
    end = int(differs[0]) if differs.size else n_same
    pattern, text = a[: a.size - end].tolist(), b[: b.size - end].tolist()
    if not pattern or not text:
        return max(len(pattern), len(text))
    every, last = (1 << len(pattern)) - 1, 1 << (len(pattern) - 1)
    at: dict[int, int] = {}
    for place, token in enumerate(pattern):
        at[token] = at.get(token, 0) | 1 << place
    # bit i of `more` (`less`): the table grows (shrinks) by one from row i to row i + 1 of the current column
    more, less, distance = every, 0, len(pattern)
    for token in text:
        equal = at.get(token, 0)
        vertical = equal | less
        horizontal = (((equal & more) + more) ^ more) | equal
        grows = less | ~(horizontal | more) & every
        shrinks = more & horizontal
        if grows & last:
            distance += 1
        elif shrinks & last:
            distance -= 1
        grows, shrinks = (grows << 1 | 1) & every, (shrinks << 1) & every
        more, less = shrinks | ~(vertical | grows) & every, grows & vertical
    return distance


def bleu(truth: ArrayLike, predicted: ArrayLike, *, order: int = BLEU_ORDER) -> float:
    """Return BLEU of one sequence against one other, genes as words.

    The geometric mean over n = 1 to 4 of the clipped n-gram precisions, times min(1, exp(1 - len(truth) /
    len(predicted))). For n > 1 one is added to matches and total (Lin and Och 2004), so that a short sequence without a
    common 4-gram is not simply 0; without a common gene BLEU is 0.

    Parameters
    ----------
    truth, predicted
        Integers; no n-gram with :data:`NO_GENE` in ``predicted`` matches, since ``truth`` has none.
    """
    a, b = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if b.size == 0:
        return 0.0
    _, word = np.unique(np.concatenate([a, b]), return_inverse=True)
    gram_a, gram_b = word_a, word_b = word[: a.size], word[a.size :]
    log_precision = 0.0
    for n in range(1, order + 1):
        if n > 1:
            # an n-gram is an (n - 1)-gram and a word: numbered anew each time, the numbers stay small
            longer = [gram[:-1] * word.size + words[n - 1 :] for gram, words in ((gram_a, word_a), (gram_b, word_b))]
            _, gram = np.unique(np.concatenate(longer), return_inverse=True)
            gram_a, gram_b = gram[: longer[0].size], gram[longer[0].size :]
        size = max(gram_a.max(initial=-1), gram_b.max(initial=-1)) + 1
        n_matches = np.minimum(np.bincount(gram_a, minlength=size), np.bincount(gram_b, minlength=size)).sum()
        if n == 1 and n_matches == 0:
            return 0.0
        added = int(n > 1)
        log_precision += np.log((n_matches + added) / (gram_b.size + added)) / order
    return float(np.exp(log_precision + min(0.0, 1.0 - a.size / b.size)))


def rank_correlation(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the Spearman correlation of gene positions over the union of the genes of two sequences.

    A gene that a sequence lacks has rank L + 1 there, with L the length of the true sequence; of a gene that comes
    twice the first place counts. 0 where the prediction ranks nothing, NaN where the truth has fewer than two genes.

    Parameters
    ----------
    truth, predicted
        Gene ids; :data:`NO_GENE` is no gene.
    """
    a, b = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if a.size < 2:
        return float("nan")
    genes, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    rank = np.full((2, genes.size), a.size + 1.0)
    # written from the end, so that the first place is what stays
    for row, places in enumerate((index[: a.size], index[a.size :])):
        rank[row, places[::-1]] = np.arange(places.size, 0, -1)
    is_gene = genes != NO_GENE
    return spearman(rank[0, is_gene], rank[1, is_gene])


def spearman(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the Spearman correlation; 0 for a constant prediction, NaN for a constant truth."""
    # deferred: scipy.stats takes a while to load
    from scipy.stats import rankdata

    return pearson(rankdata(np.asarray(truth)), rankdata(np.asarray(predicted)))


def pearson(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the Pearson correlation; 0 for a constant prediction, NaN for a constant truth."""
    a, b = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if a.size < 2 or np.ptp(a) == 0:
        return float("nan")
    if np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
