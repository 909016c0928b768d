"""Simulated perturbations of genes and of pairs, with the true effects: what a method can learn, and what it cannot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from anndata import AnnData

# all of these: our decision
_N_SYMBOLS = 15_000  # genes are drawn among the first of the default vocabulary, which code for proteins
_LOADING_SHARE = 0.3  # share of genes in a programme
_LOADING = 0.35  # typical natural-log change of a gene of a programme
_OWN_CHANGE = -1.5  # natural-log change of the target's own expression
_ACTIVITY = 0.6  # spread of a pathway's activity between cells, in units of a typical knock-out
_ACTIVITY_OF_TARGET = 0.5  # natural-log change of a target per unit of its pathway's activity
_SATURATION = 0.5  # share of the sum of two effects that two targets of one pathway have
_SUPPRESSED = 0.1  # share of the effect that the suppressed pathway keeps
_DEPTH_SPREAD = 0.35


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedPerturbations:
    """Simulated cells with the truth about them; made by :func:`simulate_perturbations`.

    Parameters
    ----------
    data
        The cells, P perturbations (control first), C contexts, G genes.
    vocabulary
        The G genes, with human symbols.
    share
        ``(P, C, G)`` float64: expected share of each gene among the UMIs of a condition, the mean over its cells; rows
        sum to 1.
    effect
        ``(P, C, G)``: natural log of ``share`` over that of control.
    additive_effect
        ``(P, C, G)``: sum of the effects of the targets alone; equal to ``effect`` where the targets do not interact,
        up to a constant over the genes (shares sum to 1).
    pathway
        Pathway of each target, 0 to n_pathways - 1.
    interaction
        What the targets of each pair do to each other, by the name of the pair: "additive", "saturation" (one
        pathway), "synergy" or "suppression" (of one pathway by the other).
    """

    data: PerturbedCells
    vocabulary: GeneVocabulary
    share: NDArray[np.float64]
    effect: NDArray[np.float64]
    additive_effect: NDArray[np.float64]
    pathway: Mapping[str, int]
    interaction: Mapping[str, str]

    @property
    def interacting(self) -> tuple[str, ...]:
        """Names of the pairs whose effect is not the sum of both."""
        return tuple(name for name, kind in self.interaction.items() if kind != "additive")

    def to_adata(self) -> AnnData:
        """Return the cells as a file would have them.

        Returns
        -------
        AnnData
            int32 counts; ``.obs["perturbation"]`` ("control", "A", "A+B") and ``.obs["cell_type"]``, the context.
        """
        # deferred: importing anndata takes a second that `--help` need not wait for
        import anndata as ad

        names = np.array([perturbation.name for perturbation in self.data.perturbations])
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical(names[self.data.perturbation_code]),
                "cell_type": pd.Categorical(np.array(self.data.contexts)[self.data.context_code]),
            },
            index=[f"cell_{i}" for i in range(self.data.n_cells)],
        )
        var = pd.DataFrame({"ensembl_id": self.vocabulary.ensembl_id}, index=self.vocabulary.symbol.astype(str))
        adata = ad.AnnData(self.data.cells.counts.copy(), obs=obs, var=var)
        adata.uns["source"] = "scdiva.datasets.simulate_perturbations"
        return adata


def simulate_perturbations(
    rng: np.random.Generator,
    *,
    n_genes: int = 600,
    n_targets: int = 24,
    n_pathways: int = 4,
    n_programmes: int = 8,
    n_pairs: int = 60,
    n_cells: int = 60,
    n_control: int = 600,
    contexts: tuple[str, ...] = ("cells",),
    mean_depth: float = 4000.0,
    dispersion: float = 5.0,
) -> SimulatedPerturbations:
    """Simulate knock-outs of single genes and of pairs, some of which interact.

    *Single effects* are additive in the log of expression and of low rank: genes belong to ``n_programmes``
    programmes, every pathway moves the programmes in a direction of its own, and every target moves them in the
    direction of its pathway, with a strength and a small deviation of its own; its own expression goes down.
    *Pairs* are additive unless the rule of their two pathways says otherwise. Targets of one pathway saturate: half of
    the sum. Pairs of different pathways are, in turn, additive, synergistic (a direction of the two pathways, which
    neither moves alone, in proportion to both strengths) or suppressed (one pathway takes nine tenths of the other's
    effect). Whoever has seen other pairs of the same pathways can predict a pair; whoever adds single effects cannot.
    *Unseen genes* can be predicted from control cells: pathways are more or less active in each cell, activity moves
    the programmes as knock-outs do, in the opposite direction, and targets are expressed with the activity of their
    pathway. What co-varies with a target in control cells is what its knock-out changes.
    *Contexts* have profiles of their own, and scale the effects of each pathway by 0.5 to 1.5; the first scales none.
    *Counts* are negative binomial, with log-normal library sizes. (Our decisions; not a model of any cell.)

    Parameters
    ----------
    rng
        Source of randomness.
    n_genes
        G; protein-coding genes of the default vocabulary.
    n_targets
        Genes that are perturbed alone, the same number in each pathway as far as it goes.
    n_pathways, n_programmes
        The rank of the single effects, beside the targets' own expression, is at most ``n_programmes``.
    n_pairs
        Pairs, spread evenly over the combinations of two pathways.
    n_cells
        Cells of each perturbation in each context.
    n_control
        Control cells of each context.
    contexts
        Names of contexts.
    mean_depth
        Mean UMIs of a cell.
    dispersion
        Inverse dispersion of the negative binomial, typical of the genes: the smaller, the noisier.

    Returns
    -------
    SimulatedPerturbations

    Raises
    ------
    ConfigError
        More pairs than there are, more targets than genes, or a number below 1 (pairs: below 0).
    """
    n_possible = n_targets * (n_targets - 1) // 2
    smallest = min(n_genes, n_targets, n_pathways, n_programmes, n_cells, n_control, len(set(contexts)))
    if smallest < 1 or not 0 <= n_pairs <= n_possible or n_targets > min(n_genes // 2, _N_SYMBOLS):
        raise ConfigError(
            f"{n_genes} genes, {n_targets} targets in {n_pathways} pathways, {n_pairs} pairs, {n_cells} cells, "
            f"{n_control} control cells, {len(contexts)} contexts",
            expected=f"at least one of each, at most {n_possible} pairs of the targets, two genes for each target",
            fix="change the numbers",
        )
    if n_genes > _N_SYMBOLS:
        raise ConfigError(f"{n_genes} genes", expected=f"at most {_N_SYMBOLS}", fix="simulate fewer")
    vocabulary = _genes(rng, n_genes)
    n_contexts = len(contexts)
    base = rng.lognormal(0.0, 1.2, n_genes) * rng.lognormal(0.0, 0.4, (n_contexts, n_genes))
    # targets are well expressed: what co-varies with them can be seen
    is_expressed = np.argsort(-base.min(axis=0), kind="stable")[: n_genes // 2]
    target_gene = np.sort(rng.choice(is_expressed, n_targets, replace=False))
    names = vocabulary.symbol[target_gene].tolist()
    pathway = rng.permutation(np.arange(n_targets) % n_pathways)

    loading = rng.normal(0.0, _LOADING, (n_programmes, n_genes))
    loading *= rng.random((n_programmes, n_genes)) < _LOADING_SHARE
    direction = _directions(rng, n_pathways, n_programmes)
    strength = rng.uniform(0.6, 1.4, n_targets)
    single = strength[:, None] * (direction[pathway] + rng.normal(0.0, 0.15, (n_targets, n_programmes)))
    scale = rng.uniform(0.5, 1.5, (n_contexts, n_pathways))
    scale[0] = 1.0

    pairs = _pairs(rng, pathway, n_pairs)
    rules, new_direction = _rules(rng, n_pathways, n_programmes)
    programme = np.zeros((1 + n_targets + n_pairs, n_contexts, n_programmes))
    own = np.zeros((1 + n_targets + n_pairs, n_genes))
    for i in range(n_targets):
        programme[1 + i] = scale[:, pathway[i], None] * single[i]
        own[1 + i, target_gene[i]] = _OWN_CHANGE
    interaction: dict[str, str] = {}
    for row, (i, j) in enumerate(pairs, start=1 + n_targets):
        rule = rules[pathway[i], pathway[j]]
        one, other = programme[1 + i], programme[1 + j]
        if rule == "saturation":
            programme[row] = _SATURATION * (one + other)
        elif rule == "suppression":  # i is of the lower pathway, which is the one that is suppressed
            programme[row] = _SUPPRESSED * one + other
        else:
            programme[row] = one + other
        if rule == "synergy":
            at_once = np.sqrt(scale[:, pathway[i]] * scale[:, pathway[j]]) * strength[i] * strength[j]
            programme[row] += at_once[:, None] * new_direction[pathway[i], pathway[j]]
        own[row] = own[1 + i] + own[1 + j]
        interaction["+".join(sorted((names[i], names[j])))] = rule
    log_change = programme @ loading + own[:, None, :]
    share = base * np.exp(log_change)
    share /= share.sum(axis=2, keepdims=True)
    effect = np.log(share / share[0])
    additive = effect.copy()
    for row, (i, j) in enumerate(pairs, start=1 + n_targets):
        additive[row] = effect[1 + i] + effect[1 + j]

    of_activity = -_ACTIVITY * (direction @ loading)  # (n_pathways, n_genes)
    of_activity[pathway, target_gene] += _ACTIVITY_OF_TARGET
    theta = dispersion * rng.lognormal(0.0, 0.3, n_genes)
    targets = [(), *((name,) for name in names), *(tuple(sorted((names[i], names[j]))) for i, j in pairs)]
    perturbations, order = _sorted(targets)
    share, effect, additive = share[order], effect[order], additive[order]
    data = _cells(rng, share, of_activity, theta, perturbations, contexts, n_cells, n_control, mean_depth)
    return SimulatedPerturbations(
        data=data,
        vocabulary=vocabulary,
        share=share,
        effect=effect,
        additive_effect=additive,
        pathway=dict(zip(names, pathway.tolist(), strict=True)),
        interaction=dict(sorted(interaction.items())),
    )


def _genes(rng: np.random.Generator, n_genes: int) -> GeneVocabulary:
    """Choose genes whose symbols are their own."""
    default = GeneVocabulary.default()
    symbols, n_times = np.unique(default.symbol, return_counts=True)
    is_own = np.isin(default.symbol[:_N_SYMBOLS], symbols[n_times == 1])
    return default.subset(rng.choice(np.flatnonzero(is_own), n_genes, replace=False))


def _directions(rng: np.random.Generator, n: int, n_programmes: int) -> NDArray[np.float64]:
    """Draw directions in the space of programmes of about the same length, at right angles where there is room."""
    drawn = rng.normal(size=(n, n_programmes))
    if n <= n_programmes:
        drawn = np.linalg.qr(drawn.T)[0].T
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * np.sqrt(n_programmes) / 1.5)


def _pairs(rng: np.random.Generator, pathway: NDArray[np.int64], n_pairs: int) -> list[tuple[int, int]]:
    """Draw pairs of targets, in turn of each combination of two pathways; the lower pathway comes first."""
    by_rule: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in itertools.combinations(range(pathway.size), 2):
        first, second = (i, j) if pathway[i] <= pathway[j] else (j, i)
        by_rule.setdefault((int(pathway[first]), int(pathway[second])), []).append((first, second))
    shuffled = [[by_rule[key][i] for i in rng.permutation(len(by_rule[key]))] for key in sorted(by_rule)]
    in_turn = [pair for pairs in itertools.zip_longest(*shuffled) for pair in pairs if pair is not None]
    return in_turn[:n_pairs]


def _rules(
    rng: np.random.Generator, n_pathways: int, n_programmes: int
) -> tuple[dict[tuple[int, int], str], dict[tuple[int, int], NDArray[np.float64]]]:
    """Return what pathways do to each other, and the new direction of those that act in synergy."""
    rules = {(p, p): "saturation" for p in range(n_pathways)}
    kinds = itertools.cycle(("synergy", "suppression", "additive"))
    rules.update(zip(itertools.combinations(range(n_pathways), 2), kinds, strict=False))
    synergies = [key for key, rule in rules.items() if rule == "synergy"]
    return rules, dict(zip(synergies, _directions(rng, len(synergies), n_programmes), strict=True)) if synergies else {}


def _sorted(targets: list[tuple[str, ...]]) -> tuple[tuple[Perturbation, ...], NDArray[np.int64]]:
    """Return the perturbations in the order in which a file of them would be loaded, and where each one was."""
    order = sorted(range(len(targets)), key=targets.__getitem__)
    return tuple(Perturbation(targets[i], "knockout") for i in order), np.array(order, dtype=np.int64)


def _cells(
    rng: np.random.Generator,
    share: NDArray[np.float64],
    of_activity: NDArray[np.float64],
    theta: NDArray[np.float64],
    perturbations: tuple[Perturbation, ...],
    contexts: tuple[str, ...],
    n_cells: int,
    n_control: int,
    mean_depth: float,
) -> PerturbedCells:
    """Draw counts: a cell's activities multiply the expected share, and leave its mean over cells as it is."""
    n_perturbations, n_contexts, n_genes = share.shape
    per_context = np.repeat(np.arange(n_perturbations), [n_control, *[n_cells] * (n_perturbations - 1)])
    perturbation = np.tile(per_context, n_contexts)
    context = np.repeat(np.arange(n_contexts), per_context.size)
    mean_log = 0.5 * (of_activity**2).sum(axis=0)
    blocks = []
    for start in range(0, perturbation.size, 2048):
        block = slice(start, start + 2048)
        n = perturbation[block].size
        activity = rng.normal(size=(n, of_activity.shape[0]))
        depth = mean_depth * rng.lognormal(-0.5 * _DEPTH_SPREAD**2, _DEPTH_SPREAD, n)
        mean = share[perturbation[block], context[block]] * np.exp(activity @ of_activity - mean_log) * depth[:, None]
        blocks.append(sp.csr_matrix(rng.poisson(mean * rng.gamma(theta, 1.0 / theta, (n, n_genes))).astype(np.int32)))
    counts = sp.csr_matrix(sp.vstack(blocks, format="csr"))
    cells = CellCounts(
        counts=counts,
        library_size=np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
        cell_index=np.arange(perturbation.size, dtype=np.int64),
        source_of_cell=np.zeros(perturbation.size, dtype=np.int32),
        is_measured=np.ones((1, n_genes), dtype=bool),
    )
    one_batch = np.zeros(perturbation.size, dtype=np.int64)
    return PerturbedCells(cells, perturbations, perturbation, contexts, context, ("",), one_batch)
