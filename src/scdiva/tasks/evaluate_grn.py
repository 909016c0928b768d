"""``evaluate grn``: gene networks beside co-expression, regressions and nulls, judged by known regulation.

Candidates of a truth: regulators with at least as many known targets as asked for among the expressed genes, times all
expressed genes; a gene with itself is no candidate. Expressed: measured by all files, and detected in a share of all
cells. All methods see the same cells, regulators and targets; no method sees the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import network as baselines
from scdiva.data.known_network import KnownNetwork
from scdiva.data.network import GeneNetwork
from scdiva.data.reader import open_corpus
from scdiva.errors import ConfigError, ScdivaError
from scdiva.metrics import network as metrics
from scdiva.tasks import grn
from scdiva.tasks.evaluation_rows import append_row, content_hash, package_versions, read_rows, row_key
from scdiva.tasks.grn_report import DEGREE, NULL, REFERENCE, SHUFFLED, TABLE, GrnReport, Run, drawn
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.source import DataLike
    from scdiva.models.scdiva import ScDiVa

MIN_SHARE = 0.02
"""Share of the cells that a gene must be detected in to be expressed (our decision)."""
MIN_TARGETS = 10
"""Known targets among the expressed genes that a regulator must have (our decision)."""
N_SAMPLED = 300
"""Targets on which regressions are compared."""
DEFAULT_METHODS = ("spearman", "pearson", "covariance", "expression", "variability", "random", NULL)
_SAMPLE_STREAM = 59
_FORMAT = 2
_VERSION_OF_MODEL_METHODS = 1
_VERSIONS = ("scdiva", "numpy", "scipy", "scikit-learn", "torch")


@dataclass(frozen=True, slots=True, eq=False)
class NetworkCells:
    """Cells, and which of their genes are expressed.

    Parameters
    ----------
    name
        Of the data.
    cells
        Their counts.
    symbols
        ``(n_genes,)`` symbol of every gene.
    expressed
        Genes that all files measure and that enough cells detect; of genes with one symbol the first.
    """

    name: str
    cells: CellCounts
    symbols: NDArray[np.str_]
    expressed: NDArray[np.int64]

    @classmethod
    def open(
        cls, data: Sequence[DataLike] | DataLike, model: ScDiVa, *, name: str = "", min_share: float = MIN_SHARE
    ) -> Self:
        """Read files or AnnData as one set of cells.

        Raises
        ------
        SourceError, KeyNotFoundError, ScaleError, GeneError
            The data cannot be used.
        ConfigError
            Fewer than two genes are expressed.
        """
        corpus = open_corpus(data, model.vocabulary)
        cells = corpus.read(np.arange(len(corpus)))
        found = name or " + ".join(reader.source.name.removesuffix(".h5ad") for reader in corpus.readers)
        return cls.of(cells, np.asarray(model.vocabulary.symbol, dtype=np.str_), name=found, min_share=min_share)

    @classmethod
    def of(cls, cells: CellCounts, symbols: NDArray[np.str_], *, name: str, min_share: float = MIN_SHARE) -> Self:
        """Take cells in memory."""
        n_detected = np.bincount(cells.counts.indices, minlength=cells.n_genes)
        is_expressed = cells.is_measured.all(axis=0) & (n_detected >= min_share * cells.n_cells) & (n_detected > 0)
        genes = np.flatnonzero(is_expressed)
        _, first = np.unique(symbols[genes], return_index=True)
        genes = genes[np.sort(first)]
        if genes.size < 2:
            raise ConfigError(
                f"{genes.size} genes are detected in {min_share:.1%} of the cells of {name}",
                expected="at least two",
                fix="lower --min-share",
            )
        return cls(name, cells, symbols, genes)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The pairs that are judged, and which of them are known.

    Parameters
    ----------
    truth
        Name of the truth.
    regulators, targets
        ``(R,)`` and ``(G,)`` genes of the cells.
    is_edge, is_candidate
        ``(R, G)`` bool.
    sign
        ``(R, G)`` int8 signs of the known edges, 0 elsewhere.
    is_sample
        Whether the targets are a sample of the expressed genes.
    digest
        Hash of all of it.
    """

    truth: str
    regulators: NDArray[np.int64]
    targets: NDArray[np.int64]
    is_edge: NDArray[np.bool_]
    is_candidate: NDArray[np.bool_]
    sign: NDArray[np.int8]
    is_sample: bool
    digest: str

    @classmethod
    def of(
        cls,
        truth: KnownNetwork,
        data: NetworkCells,
        *,
        min_targets: int = MIN_TARGETS,
        targets: NDArray[np.int64] | None = None,
    ) -> Self:
        """Find the candidates of a truth.

        Parameters
        ----------
        truth
            Known edges.
        data
            The cells.
        min_targets
            Fewest known targets of a regulator, among all expressed genes.
        targets
            A sample of the expressed genes; regulators without a known target among them are left out.

        Raises
        ------
        ConfigError
            No regulator is left.
        """
        place = {symbol: i for i, symbol in enumerate(data.symbols[data.expressed].tolist())}
        ends = [
            np.array([place.get(name, -1) for name in names.tolist()], dtype=np.int64)
            for names in (truth.regulators, truth.targets)
        ]
        is_kept = (ends[0] >= 0) & (ends[1] >= 0) & (ends[0] != ends[1])
        n = data.expressed.size
        known = np.bincount(ends[0][is_kept], minlength=n)
        rows = np.flatnonzero(known >= min_targets)
        chosen = np.arange(n) if targets is None else np.flatnonzero(np.isin(data.expressed, targets))
        sign = np.zeros((n, n), dtype=np.int8)
        is_edge = np.zeros((n, n), dtype=bool)
        is_edge[ends[0][is_kept], ends[1][is_kept]] = True
        sign[ends[0][is_kept], ends[1][is_kept]] = truth.sign[is_kept]
        rows = rows[is_edge[np.ix_(rows, chosen)].any(axis=1)]
        if not rows.size:
            raise ConfigError(
                f"no regulator of {truth.name} has {min_targets} known targets among the {n:,} expressed genes of "
                f"{data.name}",
                expected="at least one",
                fix="lower --min-targets or --min-share, or name another truth",
            )
        part = np.ix_(rows, chosen)
        digest = row_key(
            data.symbols[data.expressed[rows]].tolist(),
            data.symbols[data.expressed[chosen]].tolist(),
            np.argwhere(is_edge[part]).tolist(),
            sign[part][is_edge[part]].tolist(),
        )
        return cls(
            truth.name,
            data.expressed[rows],
            data.expressed[chosen],
            is_edge[part],
            rows[:, None] != chosen[None, :],
            sign[part],
            targets is not None,
            digest,
        )


def evaluate_grn(
    data: NetworkCells,
    truths: Sequence[KnownNetwork],
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    networks: Mapping[str, baselines.Inference] | None = None,
    titles: Mapping[str, str] | None = None,
    fingerprint: str = "",
    seeds: Sequence[int] = (0, 1, 2),
    min_targets: int = MIN_TARGETS,
    n_sampled: int = N_SAMPLED,
    rows_path: Path | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> GrnReport:
    """Judge methods on one set of cells.

    Parameters
    ----------
    data
        The cells.
    truths
        Known networks, each with candidates of its own.
    methods
        Names of baselines and of ``networks``; with the ending ``_shuffled`` the method on cells in which each gene's
        counts were dealt out anew. Regressions take seconds per target, and are compared with the others on a sample of
        targets. Co-expression is always run, since differences are from it.
    networks
        Further methods, of the shape of :mod:`scdiva.baselines.network`.
    titles
        What they are called in tables.
    fingerprint
        What, beside their names, the further methods depend on (a model's hash): rows of another are not used again.
    seeds
        Of what is drawn: trees, shuffled cells, random numbers. Other methods are run once.
    min_targets
        Fewest known targets of a candidate regulator.
    n_sampled
        Targets of the sample.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run, but not with the parts that know nothing of pairs.

    Raises
    ------
    ConfigError
        An unknown method, no truth, two truths of one name, no seed, or a truth without candidates.
    ScdivaError
        The null is better than co-expression: something is wrong, and the rows are kept.
    """
    inferences = {**baselines.BASELINES, **(networks or {})}
    chosen = _checked_methods(methods, inferences)
    if not truths or len({truth.name for truth in truths}) < len(truths) or not seeds:
        raise ConfigError(
            f"{len(truths)} truths ({', '.join(truth.name for truth in truths)}) and {len(seeds)} seeds",
            expected="at least one truth, no two of one name, and a seed",
            fix="name other files",
        )
    everything = [Candidates.of(truth, data, min_targets=min_targets) for truth in truths]
    sampled: list[Candidates] = []
    if any(_base(method) in baselines.TREES for method in chosen):
        rng = np.random.default_rng(_SAMPLE_STREAM)
        targets = np.sort(rng.permutation(data.expressed)[:n_sampled])
        sampled = [Candidates.of(truth, data, min_targets=min_targets, targets=targets) for truth in truths]
    known = {
        run.key: run
        for run in map(Run.from_dict, (row for row in read_rows(rows_path) if row.get("table", TABLE) == TABLE))
    }
    content = content_hash(data.cells)
    runs: list[Run] = []
    for method in chosen:
        is_tree = _base(method) in baselines.TREES
        candidates = sampled if is_tree else [*everything, *sampled]
        print_of = fingerprint if _base(method) in (networks or {}) else ""
        for seed in seeds if _is_drawn(method) else seeds[:1]:
            keys = [
                [row_key(_FORMAT, content, each.digest, method, seed, part, print_of) for part in ("", DEGREE)]
                for each in candidates
            ]
            if all(key in known for pair in keys for key in pair):
                found = [known[key] for pair in keys for key in pair]
            else:
                found = list(_run(data, candidates, method, inferences[_base(method)], seed, keys))
                if rows_path is not None:
                    for run in found:
                        append_row(rows_path, run.to_dict())
            runs += found
            if on_row is not None:
                for run in found:
                    if not run.part:
                        on_row(run)
    report = GrnReport(tuple(runs), tuple(_notes(data, truths, min_targets, bool(sampled))), titles or {})
    check_controls(report)
    return report


def model_networks(
    model: ScDiVa, options: grn.GrnOptions | None = None
) -> tuple[dict[str, baselines.Inference], dict[str, str], str]:
    """Return the methods of :data:`scdiva.tasks.grn.METHODS` on a model, what tables call them, and a fingerprint.

    The three are what :func:`evaluate_grn` takes as ``networks``, ``titles`` and ``fingerprint``.
    """
    chosen = options or grn.GrnOptions()

    def of(name: str) -> baselines.Inference:
        def infer(
            cells: CellCounts,
            symbols: NDArray[np.str_],
            regulators: NDArray[np.int64],
            targets: NDArray[np.int64],
            *,
            seed: int,
        ) -> GeneNetwork:
            return grn.infer(cells, model, grn.Genes(regulators, targets, {}), name, options=chosen)

        return infer

    titles = {name: f"scDiVa {name.replace('_', ' ')}" for name in grn.METHODS}
    fingerprint = row_key(str(model.provenance["model_hash"]), repr(chosen), _VERSION_OF_MODEL_METHODS)
    return {name: of(name) for name in grn.METHODS}, titles, fingerprint


def check_controls(report: GrnReport) -> None:
    """Refuse a report in which cells without relations between genes do better than the cells.

    Raises
    ------
    ScdivaError
        On some task the AUPRC ratio of the null is above that of co-expression, by the interval of the difference.
    """
    for task in report.tasks:
        if NULL not in report.methods(task):
            continue
        gap = report.compare(task, NULL).auprc_difference
        if gap is not None and gap.low > 0:
            raise ScdivaError(
                f"the controls are out of order on {task[0]}, {task[1]}: shuffled cells are {gap.value:+.3f} above "
                f"co-expression ({gap.low:+.3f} to {gap.high:+.3f})",
                expected="shuffled cells to do worse",
                fix="the set is too small, or co-expression in it says nothing; the rows that were measured are kept",
            )


def _base(method: str) -> str:
    return method.removesuffix(SHUFFLED)


def _is_drawn(method: str) -> bool:
    """Tell whether a method draws random numbers."""
    return method.endswith(SHUFFLED) or method in (*baselines.TREES, "random")


def _checked_methods(methods: Sequence[str], inferences: Mapping[str, Any]) -> tuple[str, ...]:
    unknown = [method for method in methods if _base(method) not in inferences]
    if unknown or not methods:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join(inferences)}, or one of them with {SHUFFLED!r}",
            fix="correct the name",
        )
    return tuple(dict.fromkeys((REFERENCE, *methods)))


def _run(
    data: NetworkCells,
    candidates: Sequence[Candidates],
    method: str,
    infer: baselines.Inference,
    seed: int,
    keys: Sequence[Sequence[str]],
) -> Iterator[Run]:
    """Estimate a network once, and judge it on each set of candidates."""
    regulators, targets = (
        np.unique(np.concatenate([getattr(each, name) for each in candidates])) for name in ("regulators", "targets")
    )
    cells = data.cells
    if method.endswith(SHUFFLED):
        cells = baselines.permuted(cells, seed=seed)
    started = time.perf_counter()
    network = infer(cells, data.symbols, regulators, targets, seed=seed)
    seconds = time.perf_counter() - started
    for each, pair in zip(candidates, keys, strict=True):
        part_of = _aligned(network, data.symbols[each.regulators], data.symbols[each.targets])
        for part, found, key in zip(("", DEGREE), (part_of, baselines.degree_part(part_of)), pair, strict=True):
            yield _judged(found, each, data, method, seed, part, key, network.n_cells, seconds)


def _judged(
    network: GeneNetwork,
    candidates: Candidates,
    data: NetworkCells,
    method: str,
    seed: int,
    part: str,
    key: str,
    n_cells: int,
    seconds: float,
) -> Run:
    draws = drawn(candidates.regulators.size)
    scores = metrics.network_scores(network.score, candidates.is_edge, candidates.is_candidate, draws)
    has_sign = (candidates.sign != 0) & candidates.is_edge & candidates.is_candidate
    regulator = np.nonzero(has_sign)[0]
    return Run(
        data=data.name,
        truth=candidates.truth,
        method=method,
        seed=seed,
        part=part,
        n_targets=candidates.targets.size,
        is_sample=candidates.is_sample,
        key=key,
        regulators=tuple(data.symbols[candidates.regulators].tolist()),
        auprc=scores.auprc_of_regulator,
        early=scores.early_of_regulator,
        chance=scores.chance_of_regulator,
        prevalence=scores.prevalence_of_regulator,
        matched=scores.matched_of_regulator,
        pooled={
            "auprc": scores.auprc,
            "early": scores.early,
            "chance": scores.chance,
            "prevalence": scores.prevalence,
            "n_self": int(np.count_nonzero(~candidates.is_candidate)),
        },
        auprc_draws=scores.auprc_ratio_draws,
        early_draws=scores.early_ratio_draws,
        n_nan=scores.n_nan,
        sign_regulator=regulator.astype(np.int64),
        sign_truth=candidates.sign[has_sign].astype(np.int64),
        sign_predicted=None if network.sign is None else network.sign[has_sign].astype(np.int64),
        n_cells=n_cells,
        seconds=seconds,
        versions=package_versions(_VERSIONS),
    )


def _aligned(network: GeneNetwork, regulators: NDArray[np.str_], targets: NDArray[np.str_]) -> GeneNetwork:
    """Return a network for these genes; NaN for genes that it lacks."""
    places = []
    for there, wanted in ((network.regulators, regulators), (network.targets, targets)):
        place = {symbol: i for i, symbol in enumerate(there.tolist())}
        places.append(np.array([place.get(symbol, -1) for symbol in wanted.tolist()], dtype=np.int64))
    is_there = (places[0] >= 0)[:, None] & (places[1] >= 0)[None, :]
    part = np.ix_(*places)
    sign = None if network.sign is None else np.where(is_there, network.sign[part], 0).astype(np.int8)
    score = np.where(is_there, network.score[part], np.nan).astype(np.float32)
    return GeneNetwork(
        network.method,
        regulators,
        targets,
        score,
        sign,
        network.is_directed,
        network.normalisation,
        network.n_cells,
        network.group,
    )


def _notes(data: NetworkCells, truths: Sequence[KnownNetwork], min_targets: int, has_sample: bool) -> Iterator[str]:
    yield (
        f"{data.name}: {data.cells.n_cells:,} cells. Candidates: regulators with at least {min_targets} known targets "
        f"among the {data.expressed.size:,} expressed genes (measured by all files, detected in enough cells), times "
        "all expressed genes."
    )
    for truth in truths:
        yield f"{truth}."
    yield (
        "Ratios are over what random scores are expected to have: 1 is chance. Known networks are incomplete, and a "
        "pair that is not known counts as none. Ties count as their expectation; pairs without a score are ranked last."
    )
    yield (
        "Intervals (95 %): regulators drawn with repetition, the same for both sides of a difference. They hold for "
        "these cells and this truth. Bold: mean of regulators above co-expression's."
    )
    yield (
        "Above genes alone: minus the AUPRC ratio of the same method's mean size of scores of regulators and targets, "
        "which knows nothing of pairs. Databases know most of genes that are studied most: where it is below 0, which "
        "genes are targets of anything says more than the pairs do."
    )
    yield (
        "Degree-matched AUROC: known targets of a regulator against genes with about as many known other regulators; "
        "0.5 is chance, also for what knows only how well a gene is studied."
    )
    if has_sample:
        yield "On samples of targets, where regressions are compared, all methods are judged on the same targets."
