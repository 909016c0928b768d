"""``grn``: gene regulation as a model sees it; scored edges from regulators to targets.

Every method is a row of :data:`METHODS`: a function from cells, model, regulators and targets to scores, and what the
scores mean. What each is worth is measured by ``scdiva evaluate grn``, not claimed here.

Shape letters: R regulators, T targets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scdiva.data.conditions import column_text
from scdiva.data.network import GeneNetwork
from scdiva.data.reader import CountsReader, measured_share, reader_warnings
from scdiva.errors import ConfigError, GeneError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.attention import attention_sums
from scdiva.models.scdiva.gene_states import mean_gene_states
from scdiva.models.scdiva.knockout import ReadOut, content_order, knockout_sums
from scdiva.models.scdiva.response import responses
from scdiva.tasks.regulons import edge_table
from scdiva.types import CellCounts

if TYPE_CHECKING:
    import pandas as pd

Correction = Literal["lift", "difference", "none"]
KnockoutScore = Literal["effect", "standardised"]

_WEIGHT_OF_REPRESSION = 0.5
"""Of six known edges, five are activations (our decision: without it the strongest repressions rank too high)."""
_MIN_Z_OF_SIGN = 2.5
"""Weaker responses have a sign that is right as often as wrong (docs/results/grn.md)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GrnOptions:
    """How networks are inferred.

    Parameters
    ----------
    min_cells
        Fewest cells: that express a regulator, that express a target, and, for attention, that express both.
    max_cells
        Largest number of cells: of a group, or, for knock-outs, of each regulator. Chosen by what is in them, so that
        their order has no say. None: all.
    max_tokens
        Genes of each cell that the trunk reads, the best-ranked, besides the regulators. None: all that the cell
        expresses. Transcription factors and most of their targets are seldom among the few best-ranked genes that a
        model was trained to read, and a pair that is not read is a pair that nothing is known of.
    layers, heads
        Of the attention: positions, negative ones from the end. None: all.
    correction
        Of the attention. "lift": divided by what is expected under the regulator's popularity; "difference": that
        subtracted; "none": the mean attention as it is, which is mostly popularity.
    knockout_score
        "effect": the absolute mean change, in nats; "standardised": that over its standard error over cells.
    """

    min_cells: int = 20
    max_cells: int | None = None
    max_tokens: int | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    correction: Correction = "lift"
    knockout_score: KnockoutScore = "effect"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        for name, value in (
            ("min_cells", self.min_cells),
            ("max_cells", self.max_cells),
            ("max_tokens", self.max_tokens),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}", expected="a positive number", fix="leave it out")
        for name, chosen, known in (
            ("correction", self.correction, get_args(Correction)),
            ("knockout_score", self.knockout_score, get_args(KnockoutScore)),
        ):
            if chosen not in known:
                raise ConfigError(f"{name}={chosen!r}", expected=" or ".join(map(repr, known)), fix="name one of these")


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What a method says of regulators and targets.

    Parameters
    ----------
    score_RT
        The larger, the likelier an edge; NaN where nothing can be said.
    sign_RT
        +1, -1, 0; None for a method without signs.
    normalisation
        What a score means.
    """

    score_RT: NDArray[np.float64]
    sign_RT: NDArray[np.int8] | None
    normalisation: str


OnCells = Callable[[int], None]
_Run = Callable[
    [CellCounts, ScDiVa, NDArray[np.int64], NDArray[np.int64], GrnOptions, OnCells | None],
    Scores,
]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to infer a network.

    Parameters
    ----------
    run
        From cells, model, regulators, targets, options and a callback for progress to scores.
    is_directed, is_signed
        What its edges are.
    meaning
        One sentence for a biologist.
    """

    run: _Run
    is_directed: bool
    is_signed: bool
    meaning: str


def _attention(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
    *,
    rollout: bool = False,
) -> Scores:
    sums = attention_sums(
        model,
        cells,
        regulators,
        targets,
        layers=options.layers,
        heads=options.heads,
        rollout=rollout,
        max_tokens=options.max_tokens,
        on_cells=on_cells,
    )
    n_RT = np.where(sums.n_cells_RT >= options.min_cells, sums.n_cells_RT, np.nan)
    observed_RT, expected_RT = sums.observed_RT / n_RT, sums.expected_RT / n_RT
    what = "attention rollout" if rollout else "attention"
    if options.correction == "lift":
        score_RT = observed_RT / np.maximum(expected_RT, 1e-12)
        meaning = f"{what} of the target to the regulator over that of the other genes of the same cells; 1: no more"
    elif options.correction == "difference":
        score_RT = observed_RT - expected_RT
        meaning = f"{what} of the target to the regulator minus that of the other genes of the same cells; 0: no more"
    else:
        score_RT = observed_RT
        meaning = f"mean {what} of the target to the regulator, not corrected for the regulator's popularity"
    meaning += (
        f"; means over the at least {options.min_cells} cells that express both; "
        f"{sums.special_share:.0%} of the genes' attention went to tokens that are no genes and is left out"
    )
    return Scores(score_RT, None, meaning)


def _rollout(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
) -> Scores:
    return _attention(cells, model, regulators, targets, options, on_cells, rollout=True)


def _knockout(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
    *,
    read_out: ReadOut = "profile",
) -> Scores:
    sums = knockout_sums(
        model,
        cells,
        regulators,
        targets,
        read_out=read_out,
        max_tokens=options.max_tokens,
        max_cells=options.max_cells,
        on_cells=on_cells,
    )
    mean_RT = sums.mean_RT
    score_RT, over = np.abs(mean_RT), ", in nats"
    if options.knockout_score == "standardised":
        score_RT, over = score_RT / np.maximum(sums.standard_error_RT, 1e-12), ", over its standard error over cells"
    by = "profile decoder" if read_out == "profile" else "value head"
    return Scores(
        score_RT,
        np.sign(mean_RT).astype(np.int8),
        f"absolute mean change of the {by}'s expected log share of the target when the regulator is taken away from "
        f"the cells that express it (at most {sums.n_cells_R.max(initial=0):,} of one){over}; the target's own value "
        "is hidden",
    )


def _knockout_value(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
) -> Scores:
    return _knockout(cells, model, regulators, targets, options, on_cells, read_out="value")


def _embedding(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
) -> Scores:
    genes = np.union1d(regulators, targets)
    state_GD, n_cells_G = mean_gene_states(model, cells, genes, max_tokens=options.max_tokens, on_cells=on_cells)
    state_GD[n_cells_G < options.min_cells] = np.nan
    return Scores(
        _cosines(state_GD, genes, regulators, targets),
        None,
        "cosine of the trunk's states of both genes, averaged over the cells that express them, with the mean over all "
        "genes taken off; below 0: less alike than genes are on average, which does not mean repression",
    )


def _gene_embedding(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
) -> Scores:
    genes = np.union1d(regulators, targets)
    weight = model.native("gene embeddings").anchor.gene_embedding.detach().double().cpu().numpy()
    return Scores(
        _cosines(weight[genes], genes, regulators, targets),
        None,
        "cosine of the model's gene embeddings, with the mean over all genes taken off: what it learned from its own "
        "corpus, whatever the cells are; below 0 does not mean repression",
    )


def _response(
    cells: CellCounts,
    model: ScDiVa,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    options: GrnOptions,
    on_cells: OnCells | None,
) -> Scores:
    raw_RT = responses(model, cells, regulators, targets, max_cells=options.max_cells, on_cells=on_cells)
    raw_RT[regulators[:, None] == targets[None, :]] = np.nan
    spread_R = np.nanstd(raw_RT, axis=1, keepdims=True)
    z_RT = (raw_RT - np.nanmean(raw_RT, axis=1, keepdims=True)) / np.maximum(spread_R, 1e-12)
    return Scores(
        np.where(z_RT < 0, -z_RT * _WEIGHT_OF_REPRESSION, z_RT),
        np.where(np.abs(z_RT) >= _MIN_Z_OF_SIGN, np.sign(z_RT), 0).astype(np.int8),
        "response of the profile decoder's log-rate of the target to a little more of the regulator, in standard "
        f"deviations of that regulator's responses from their mean; repressions count {_WEIGHT_OF_REPRESSION:g} times, "
        f"and a sign is told from {_MIN_Z_OF_SIGN:g} standard deviations on; mostly what the model learned from its "
        "own corpus, whatever the cells are",
    )


def _cosines(
    vector_GD: NDArray[np.float64], genes: NDArray[np.int64], regulators: NDArray[np.int64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    centred_GD = vector_GD - np.nanmean(vector_GD, axis=0)
    unit_GD = centred_GD / np.maximum(np.linalg.norm(centred_GD, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit_GD[np.searchsorted(genes, regulators)] @ unit_GD[np.searchsorted(genes, targets)].T)


METHODS: Mapping[str, Method] = {
    "attention": Method(_attention, True, False, "how much the target attends to the regulator, given its popularity"),
    "rollout": Method(_rollout, True, False, "the same, followed through all layers"),
    "knockout": Method(
        _knockout, True, True, "what the profile decoder expects of the target with and without the regulator"
    ),
    "knockout_value": Method(
        _knockout_value, True, True, "what the value head expects of the target with and without the regulator"
    ),
    "response": Method(
        _response,
        True,
        True,
        "how the profile decoder's expectation of the target answers to a little more of the regulator",
    ),
    "embedding": Method(_embedding, False, False, "how alike the trunk's states of both genes are in these cells"),
    "gene_embedding": Method(_gene_embedding, False, False, "how alike the model's embeddings of both genes are"),
}
"""By name; further ones are added here and nowhere else."""
DEFAULT_METHOD = "response"
"""The best measured, and seconds for all transcription factors (``scdiva evaluate grn``)."""


@dataclass(frozen=True, slots=True, eq=False)
class Genes:
    """Which genes a network is asked of.

    Parameters
    ----------
    regulators, targets
        Gene indices, ascending.
    omitted
        Regulators that were asked for and are left out: name to the reason.
    """

    regulators: NDArray[np.int64]
    targets: NDArray[np.int64]
    omitted: Mapping[str, str]


def transcription_factors(vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Return the gene indices of the human transcription factors of a vocabulary (Lambert et al., Cell 2018)."""
    table = vocabulary.annotation()
    return np.flatnonzero(table["is_tf"].to_numpy(dtype=bool))


def choose_genes(
    cells: CellCounts, vocabulary: GeneVocabulary, regulators: Sequence[str] | None, min_cells: int
) -> Genes:
    """Choose regulators and targets: genes that enough cells express.

    Parameters
    ----------
    cells
        Raw counts in the order of the vocabulary.
    vocabulary
        The genes.
    regulators
        Symbols or Ensembl ids of any genes; None: all human transcription factors.
    min_cells
        Fewest cells that express a gene.

    Raises
    ------
    GeneError
        A name is unknown, no regulator is left, or no target.
    """
    n_cells_G = np.bincount(cells.counts.indices, minlength=cells.n_genes)
    is_measured_G = np.asarray(cells.is_measured.any(axis=0))
    asked = transcription_factors(vocabulary) if regulators is None else np.unique(vocabulary.find(regulators))
    omitted = {}
    for gene in asked[n_cells_G[asked] < min_cells]:
        reason = f"expressed in {n_cells_G[gene]} cells" if is_measured_G[gene] else "not measured"
        omitted[str(vocabulary.symbol[gene])] = reason
    left = asked[n_cells_G[asked] >= min_cells]
    targets = np.flatnonzero(n_cells_G >= min_cells)
    if not left.size:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(omitted.items())[:10])
        raise GeneError(
            f"none of {asked.size} regulators is expressed in {min_cells} of {cells.n_cells:,} cells: {named}",
            expected="at least one that is",
            fix="name other regulators, give more cells, or lower min_cells",
        )
    return Genes(left, targets, omitted)


def grn_cells(
    cells: CellCounts,
    model: ScDiVa,
    regulators: Sequence[str] | None = None,
    method: str = DEFAULT_METHOD,
    *,
    options: GrnOptions | None = None,
    group: str = "",
    on_cells: OnCells | None = None,
) -> GeneNetwork:
    """Infer the gene network of some cells.

    Parameters
    ----------
    cells
        Raw counts in the order of ``model.vocabulary``. Conditions are not told to the model.
    model
        A native model; all methods but "gene_embedding" and "knockout" need a trunk that reads sets.
    regulators
        Symbols or Ensembl ids of any genes; None: all human transcription factors (Lambert et al. 2018). Those that too
        few cells express are left out, with a warning that counts and names them.
    method
        One of :data:`METHODS`.
    options
        Settings of the methods; None: their defaults.
    group
        Name of the group that the cells are.
    on_cells
        Called with the number of cells done, for progress.

    Returns
    -------
    GeneNetwork
        Regulators and targets are the genes that at least ``options.min_cells`` cells express, in the order of the
        vocabulary. Neither the order of cells and genes in the file nor what else is asked for changes a score (but for
        ``max_tokens``, where the regulators that are asked for are read besides).

    Raises
    ------
    ConfigError
        There is no such method.
    GeneError
        A regulator is unknown, or none is expressed in enough cells.
    UnsupportedError, UntrainedHeadError
        The model cannot do it.
    """
    options = options or GrnOptions()
    if method not in METHODS:
        raise ConfigError(f"method {method!r}", expected=f"one of {', '.join(METHODS)}", fix="name one of these")
    genes = choose_genes(cells, model.vocabulary, regulators, options.min_cells)
    if genes.omitted and regulators is not None:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(genes.omitted.items())[:10])
        log.warning("%d regulators left out: %s", len(genes.omitted), named)
    return infer(cells, model, genes, method, options=options, group=group, on_cells=on_cells)


def infer(
    cells: CellCounts,
    model: ScDiVa,
    genes: Genes,
    method: str,
    *,
    options: GrnOptions,
    group: str = "",
    on_cells: OnCells | None = None,
) -> GeneNetwork:
    """Infer the network of genes that are chosen already; everything else as in :func:`grn_cells`."""
    chosen = METHODS[method]
    read = cells
    if options.max_cells is not None and not chosen.is_signed and cells.n_cells > options.max_cells:
        read = cells.take(np.flatnonzero(content_order(cells) < options.max_cells))
    said = chosen.run(read, model, genes.regulators, genes.targets, options, on_cells)
    score_RT = said.score_RT.astype(np.float32)
    at_R = np.flatnonzero(np.isin(genes.regulators, genes.targets))
    score_RT[at_R, np.searchsorted(genes.targets, genes.regulators[at_R])] = np.nan  # a gene and itself
    sign_RT = said.sign_RT
    if sign_RT is not None:
        sign_RT = np.where(np.isnan(score_RT), np.int8(0), sign_RT)
    return GeneNetwork(
        method=method,
        regulators=model.vocabulary.symbol[genes.regulators],
        targets=model.vocabulary.symbol[genes.targets],
        score=score_RT,
        sign=sign_RT,
        is_directed=chosen.is_directed,
        normalisation=said.normalisation,
        n_cells=read.n_cells,
        group=group,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Grn:
    """The result of :func:`grn`.

    Parameters
    ----------
    networks
        One for all cells, or one for each group.
    edges
        The best edges of every regulator, the best first: columns ``group``, ``source``, ``target``, ``score`` and, for
        methods with signs, ``sign``.
    record
        What was done, for ``.uns``.
    """

    networks: tuple[GeneNetwork, ...]
    edges: pd.DataFrame
    record: Mapping[str, Any]


def grn(
    reader: CountsReader,
    model: ScDiVa,
    *,
    method: str = DEFAULT_METHOD,
    regulators: Sequence[str] | None = None,
    group_key: str | None = None,
    options: GrnOptions | None = None,
    n_top: int = 50,
    on_cells: OnCells | None = None,
) -> Grn:
    """Infer the gene network of a source, or of each group of its cells.

    Parameters
    ----------
    reader
        Raw counts, aligned to the model's vocabulary; they are read into memory.
    model, method, regulators, options, on_cells
        As for :func:`grn_cells`.
    group_key
        Column of ``.obs``. Cells without a value are left out and counted; so are groups of which nothing can be said
        (too few cells, no regulator in enough of them, no pair with a score), with the reason.
    n_top
        Targets of each regulator in ``edges``.

    Returns
    -------
    Grn

    Raises
    ------
    ConfigError, GeneError, UnsupportedError, UntrainedHeadError
        See :func:`grn_cells`; or ``n_top`` is not positive, no group has enough cells, none has a regulator in enough
        of them, or no pair has a score.
    KeyNotFoundError
        There is no such column.
    """
    options = options or GrnOptions()
    if n_top < 1:
        raise ConfigError(f"n_top={n_top}", expected="a positive number", fix="leave it out")
    if method not in METHODS:
        raise ConfigError(f"method {method!r}", expected=f"one of {', '.join(METHODS)}", fix="name one of these")
    names = [regulators] if isinstance(regulators, str) else regulators
    if names is not None:
        model.vocabulary.find(names)  # an unknown name is an error before anything is read
    rows, n_without = {"": np.arange(len(reader))}, 0
    if group_key is not None:
        text = column_text(reader.source.column(group_key))
        rows = {str(group): np.flatnonzero(text == group) for group in np.unique(text) if group}
        n_without = int(np.count_nonzero(text == ""))
    left_out = {name: f"{found.size} cells" for name, found in rows.items() if found.size < options.min_cells}
    if len(left_out) == len(rows):
        raise ConfigError(
            f"no group of .obs[{group_key!r}] has {options.min_cells} cells: {_named(left_out) or 'there is none'}"
            if group_key
            else f"{len(reader)} cells in {reader.source.name}",
            expected=f"at least {options.min_cells} cells",
            fix="give more cells, or lower min_cells",
        )
    networks, omitted, done = [], {}, 0
    for name, found in rows.items():
        if name in left_out:
            continue
        cells = reader.read(found)
        try:
            chosen = choose_genes(cells, model.vocabulary, names, options.min_cells)
            network = infer(
                cells,
                model,
                chosen,
                method,
                options=options,
                group=name,
                on_cells=None if on_cells is None else _after(done, on_cells),
            )
            unscored = _unscored(network, options)
        except GeneError as error:
            if group_key is None:
                raise
            left_out[name] = error.found
            continue
        done += found.size
        networks.append(network)
        if names is not None:
            omitted.update({_in_group(gene, name): why for gene, why in {**chosen.omitted, **unscored}.items()})
    if not networks:
        raise GeneError(
            f"no group of .obs[{group_key!r}] has a network: {_named(left_out)}",
            expected=f"a group with a regulator in {options.min_cells} cells, and pairs that have a score",
            fix="name other regulators, lower min_cells, or leave group_key out",
        )
    for warning in reader_warnings(reader, model):
        log.warning("%s: %s", reader.source.name, warning)
    for what, reasons in (("regulators", omitted), ("groups", left_out)):
        if reasons:
            log.warning("%s: %d %s left out: %s", reader.source.name, len(reasons), what, _named(reasons))
    if n_without:
        log.warning("%s: %d cells without a value in .obs[%r] left out", reader.source.name, n_without, group_key)
    record = {
        **model.provenance,
        "method": method,
        "directed": METHODS[method].is_directed,
        "signed": METHODS[method].is_signed,
        "normalisation": [network.normalisation for network in networks],
        "regulators": "human transcription factors (Lambert et al. 2018)" if names is None else list(names),
        "regulators_left_out": [f"{name}: {reason}" for name, reason in omitted.items()],
        "groups_left_out": [f"{name}: {reason}" for name, reason in left_out.items()],
        "cells_without_group": n_without,
        "group_key": group_key or "",
        "groups": [network.group for network in networks],
        "n_cells": [network.n_cells for network in networks],
        "n_regulators": [int(network.regulators.size) for network in networks],
        "n_targets": [int(network.targets.size) for network in networks],
        "n_top": n_top,
        **{f"option_{key}": _recorded(value) for key, value in asdict(options).items()},
        "counts_in": reader.found.description,
        "measured_share": measured_share(reader, model),
        "genes": reader.alignment.counts(),
    }
    return Grn(tuple(networks), edge_table(networks, n_top), record)


def _unscored(network: GeneNetwork, options: GrnOptions) -> dict[str, str]:
    """Return the regulators that have a score with no target, and why.

    Raises
    ------
    GeneError
        That are all of them.
    """
    has_score_R = np.isfinite(network.score).any(axis=1)
    if not has_score_R.any():
        raise GeneError(
            f"{network.method} gives no pair of genes a score in {network.n_cells:,} cells",
            expected=f"pairs that {options.min_cells} of these cells express, for attention both genes in one cell",
            fix="leave max_cells out or raise it, give more cells, lower min_cells, or name other regulators",
        )
    return {str(name): "no pair with a score" for name in network.regulators[~has_score_R]}


def _named(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:10])


def _in_group(gene: str, group: str) -> str:
    return f"{gene} in {group}" if group else gene


def _recorded(value: Any) -> Any:
    """Return an option as .uns can hold it."""
    return "all" if value is None else list(value) if isinstance(value, tuple) else value


def _after(done: int, on_cells: OnCells) -> OnCells:
    return lambda n: on_cells(done + n)
