"""``evaluate generation``: generated cells against held-out real ones, beside simple generators, a null and a ceiling.

Of each type 70 % of the cells are trained on and 30 % held out. Every method sees the training cells and makes as many
cells of each type as are held out. Among the training cells as many again are set aside as the *sample*: real cells
that take the part of generated ones, the ceiling. Everything that has to be fitted before cells can be compared is
fitted on the training cells that are left, the *third* cells (see :mod:`scdiva.metrics.generation_space`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import generation as baselines
from scdiva.data.conditions import is_missing, label_text
from scdiva.data.output import replacing
from scdiva.data.reader import find_counts, is_gene_expression, open_counts
from scdiva.data.source import open_source
from scdiva.errors import (
    ConfigError,
    GeneError,
    KeyNotFoundError,
    ScaleError,
    ScdivaError,
    SourceError,
    UnsupportedError,
)
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError, Score

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.genes import GeneVocabulary

Generator: TypeAlias = "Callable[[AnnData, Mapping[str, int], int], AnnData]"
"""``(train, wanted, seed) -> generated``: ``train`` holds raw counts in X and types in ``.obs[labels_key]``; ``wanted``
numbers of cells by type; back come raw counts over genes of ``train`` (absent ones count as 0, and are counted) with
their types in ``.obs[labels_key]``. An attribute ``fingerprint`` (text) tells generators of one name apart."""
Unit = Literal["counts", "cp10k", "log1p_cp10k"]

BASELINES: Mapping[str, Callable[..., baselines.Drawn]] = {
    "scvi": baselines.scvi_posterior,
    "multinomial": baselines.multinomial_per_type,
    "negative_binomial": baselines.negative_binomial_per_type,
    "independent_genes": baselines.independent_genes_per_type,
    "pca_gaussian": baselines.pca_gaussian_per_type,
}
NULL = "shuffled"
CEILING = "ceiling"
METHODS = (*BASELINES, NULL, CEILING)
"""Methods that need no model."""
TITLES = {
    "scvi": "scVI, posterior predictive",
    "multinomial": "multinomial per type",
    "negative_binomial": "negative binomial per type",
    "independent_genes": "independent genes per type",
    "pca_gaussian": "PCA-Gaussian per type",
    NULL: "shuffled (null)",
    CEILING: "real cells (ceiling)",
}
OVER_TYPES = "mean over types"
MIN_CELLS = 10
"""Fewest cells of a type that takes part."""

_MIN_THIRD = 30
_FORMAT = 1
_HEADLINE = "c2st_forest_hvg"
_BY_TYPE = ("c2st_forest_hvg", "c2st_forest_pca", "mmd2", "recall", "conditional_accuracy", "genes_per_cell_ks")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method with one seed: what is written as one line of ``rows.jsonl``.

    Parameters
    ----------
    method, seed
        Which.
    key
        Hash of data, split, method and settings: a line is used again only if it is the same.
    scores
        ``(scope, metric)`` to :class:`Score`; the scope is "pooled" or a type.
    seconds_generate, seconds_score
        What it took.
    n_genes_absent
        Genes of the data that the generator does not make.
    """

    method: str
    seed: int
    key: str
    scores: Mapping[tuple[str, str], Score]
    seconds_generate: float
    seconds_score: float
    n_genes_absent: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON); NaN is None, with its reason."""
        rows = [
            {"scope": scope, "metric": metric, "value": _or_none(score.value), "reason": score.reason}
            for (scope, metric), score in self.scores.items()
        ]
        return {
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "seconds_generate": round(self.seconds_generate, 3),
            "seconds_score": round(self.seconds_score, 3),
            "n_genes_absent": self.n_genes_absent,
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> MethodRun:
        """Read what :meth:`to_dict` made."""
        scores = {
            (row["scope"], row["metric"]): Score(
                float("nan") if row["value"] is None else float(row["value"]), row["reason"]
            )
            for row in found["rows"]
        }
        return cls(
            found["method"],
            int(found["seed"]),
            found["key"],
            scores,
            found["seconds_generate"],
            found["seconds_score"],
            found["n_genes_absent"],
        )

    def __str__(self) -> str:
        def value(metric: str) -> str:
            score = self.scores.get((metrics.POOLED, metric))
            return "–" if score is None or not np.isfinite(score.value) else f"{score.value:.3f}"

        return (
            f"{self.method}, seed {self.seed}: C2ST forest {value('c2st_forest_hvg')} (genes) "
            f"{value('c2st_forest_pca')} (PCA), MMD² {value('mmd2')}, recall {value('recall')}, called as asked "
            f"{value('conditional_accuracy')}, KS of genes per cell {value('genes_per_cell_ks')}; "
            f"{self.seconds_generate:.1f} s to make, {self.seconds_score:.0f} s to score"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, standard deviation (0 for one seed) and number of seeds; NaN with the reason where no seed has a value."""

    mean: float
    sd: float
    n: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """The result of :func:`evaluate_generation`.

    Parameters
    ----------
    name
        Of the data.
    labels_key
        Column of ``.obs`` with the types.
    n_train, n_heldout, n_third
        Cells trained on, held out, and those of the training cells that PCA and variable genes come from.
    n_left_out
        Cells without a label, and of types with fewer than ten cells.
    sizes
        Held-out cells of each type.
    types_with_own_space
        Types whose principal components are their own; the others use those of all cells.
    ours
        Methods under evaluation: neither baselines nor controls.
    runs
        One per method and seed.
    n_trees
        Trees of the random forest.
    """

    name: str
    labels_key: str
    n_train: int
    n_heldout: int
    n_third: int
    n_left_out: int
    sizes: Mapping[str, int]
    types_with_own_space: tuple[str, ...]
    ours: tuple[str, ...]
    runs: tuple[MethodRun, ...]
    n_trees: int = metrics.N_TREES

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def scored_types(self) -> tuple[str, ...]:
        """Types that are scored on their own."""
        return tuple(name for name in self.sizes if any((name, _HEADLINE) in run.scores for run in self.runs))

    def values(self, method: str, metric: str, scope: str = metrics.POOLED) -> dict[int, Score]:
        """Return the score of each seed; the scope "mean over types" averages over types that have a value."""
        found = {}
        for run in self.runs:
            if run.method != method:
                continue
            if scope != OVER_TYPES:
                if (scope, metric) in run.scores:
                    found[run.seed] = run.scores[scope, metric]
                continue
            scores = [score for (name, of), score in run.scores.items() if of == metric and name != metrics.POOLED]
            numbers = [score.value for score in scores if np.isfinite(score.value)]
            if numbers:
                found[run.seed] = Score(float(np.mean(numbers)))
            elif scores:
                found[run.seed] = scores[0]
        return found

    def summary(self, method: str, metric: str, scope: str = metrics.POOLED) -> Summary:
        """Return mean and spread over seeds."""
        scores = self.values(method, metric, scope)
        numbers = [score.value for score in scores.values() if np.isfinite(score.value)]
        if not numbers:
            reason = next((score.reason for score in scores.values()), "not measured in this scope")
            return Summary(float("nan"), float("nan"), 0, reason)
        return Summary(
            float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0, len(numbers)
        )

    def is_better(self, method: str, metric: str, scope: str = metrics.POOLED) -> bool:
        """Tell whether a method is better than every baseline, beyond its interval over seeds.

        Its distances from the ideal value (or from the ceiling's, where that is the ideal) have a 95 % t-interval over
        seeds; the mean distance of the best baseline must lie above it. One seed has no interval: never.
        """
        from scipy.stats import t

        ceiling = self.summary(CEILING, metric, scope).mean
        ideal = metrics.METRICS[metric]
        if ideal.ideal is None and not np.isfinite(ceiling):
            return False

        def distances(name: str) -> NDArray[np.float64]:
            found = [s.value for s in self.values(name, metric, scope).values() if np.isfinite(s.value)]
            return np.array([ideal.distance(value, ceiling) for value in found])

        ours = distances(method)
        others = [d.mean() for name in self.methods if name in BASELINES and (d := distances(name)).size]
        if ours.size < 2 or not others:
            return False
        half = float(t.ppf(0.975, ours.size - 1)) * float(ours.std(ddof=1)) / ours.size**0.5
        return bool(ours.mean() + half < min(others))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        head = {
            key: getattr(self, key)
            for key in ("name", "labels_key", "n_train", "n_heldout", "n_third", "n_left_out", "n_trees")
        }
        scopes = (metrics.POOLED, *([OVER_TYPES] if self.scored_types else []), *self.scored_types)
        summaries = [
            {"method": method, "scope": scope, "metric": metric, **_finite(asdict(self.summary(method, metric, scope)))}
            for scope in scopes
            for metric in metrics.METRICS
            for method in self.methods
            if self.values(method, metric, scope)
        ]
        lists = {"types_with_own_space": list(self.types_with_own_space), "ours": list(self.ours)}
        return {
            **head,
            **lists,
            "sizes": dict(self.sizes),
            "summary": summaries,
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_json(self) -> str:
        """Return the whole report as JSON: settings, summaries, and every row of every run."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the tables: all cells, the mean over types, a few metrics type by type, and what is missing."""
        seeds = sorted({run.seed for run in self.runs})
        small = [name for name in self.sizes if name not in self.scored_types]
        lines = [
            f"### {self.name}: {self.n_train:,} cells trained on, {self.n_heldout:,} held out, "
            f"{len(self.sizes)} types, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}",
            "",
            "Mean ± standard deviation over seeds (split, generator and judges). Bold: nearer to the ideal than every "
            f"baseline, beyond a 95 % interval over seeds. Variable genes and components are those of {self.n_third:,} "
            f"training cells in neither sample. {self.n_left_out:,} cells without a usable label are left out.",
            "",
            *self._table(metrics.POOLED),
        ]
        if self.scored_types:
            lines += ["", f"Mean over {len(self.scored_types)} types with enough held-out cells:", ""]
            lines += self._table(OVER_TYPES)
            own = ", ".join(self.types_with_own_space) or "none"
            lines += ["", f"Components of their own: {own}. Not scored on their own: {', '.join(small) or 'none'}."]
            for metric in _BY_TYPE:
                lines += ["", f"{metrics.METRICS[metric].title}, by type:", "", *self._type_table(metric)]
        absent = {run.method: run.n_genes_absent for run in self.runs if run.n_genes_absent}
        lines += [""] + [
            f"- {TITLES.get(m, m)} does not make {n:,} genes of the data; they count as 0." for m, n in absent.items()
        ]
        lines += self._reasons()
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json`` into a folder, each whole or not at all."""
        targets = folder / "report.md", folder / "report.json"
        for path, text in zip(targets, (self.to_markdown(), self.to_json()), strict=True):
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return targets

    def _cell(self, method: str, metric: str, scope: str) -> str:
        found = self.summary(method, metric, scope)
        if not found.n:
            return "–"
        text = f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.n > 1 else "")
        return f"**{text}**" if method in self.ours and self.is_better(method, metric, scope) else text

    def _table(self, scope: str) -> list[str]:
        names = self.methods
        rows = [
            f"| {metric.title} | {'ceiling' if metric.ideal is None else f'{metric.ideal:g}'} | "
            + " | ".join(self._cell(method, key, scope) for method in names)
            + " |"
            for key, metric in metrics.METRICS.items()
            if any(self.values(method, key, scope) for method in names)
        ]
        head = " | ".join(TITLES.get(name, name) for name in names)
        seconds = [f"{np.mean([r.seconds_generate for r in self.runs if r.method == name]):.1f}" for name in names]
        last = [f"| seconds to train and make | | {' | '.join(seconds)} |"] if scope == metrics.POOLED else []
        return [f"| | ideal | {head} |", "|---|---:|" + "---:|" * len(names), *rows, *last]

    def _type_table(self, metric: str) -> list[str]:
        names = self.methods
        rows = [
            f"| {name} | {self.sizes[name]:,} | " + " | ".join(self._cell(m, metric, name) for m in names) + " |"
            for name in self.scored_types
        ]
        head = " | ".join(TITLES.get(name, name) for name in names)
        return [f"| type | held out | {head} |", "|---|---:|" + "---:|" * len(names), *rows]

    def _reasons(self) -> list[str]:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for run in self.runs:
            for (scope, metric), score in run.scores.items():
                if not np.isfinite(score.value) and scope == metrics.POOLED:
                    found.setdefault((run.method, score.reason), {})[metrics.METRICS[metric].title] = None
        return [
            f"- {TITLES.get(method, method)} has no value of: {', '.join(titles)} ({reason})."
            for (method, reason), titles in found.items()
        ]


@dataclass(frozen=True, slots=True)
class GenerationData:
    """Labelled real cells as they are in the file.

    Parameters
    ----------
    name
        For the report.
    cells
        Raw counts of all genes of the file, with types.
    obs_names, var_names
        Names of cells and genes; genes are unique.
    n_left_out
        Cells without a label, or of too small a type.
    """

    name: str
    cells: LabelledCells
    obs_names: NDArray[np.str_]
    var_names: NDArray[np.str_]
    n_left_out: int = 0

    @classmethod
    def open(
        cls, data: DataLike, labels_key: str, *, layer: str | None = None, min_cells: int = MIN_CELLS
    ) -> GenerationData:
        """Read raw counts and types from an AnnData or a file.

        Cells that have no label ("unassigned", missing) are left out and counted, as are types of fewer than ten.

        Raises
        ------
        KeyNotFoundError
            There is no such column.
        ScaleError
            No raw counts.
        GeneError
            Gene names that occur twice.
        SourceError
            No type has enough cells.
        """
        source = open_source(data)
        labels = np.array([label_text(value) for value in source.column(labels_key)], dtype=str)
        found = find_counts(source, layer)
        is_gene = is_gene_expression(found.matrix.var)
        names = found.matrix.var.index.astype(str).to_numpy(dtype=str)[is_gene]
        _refuse_duplicates(names, source.name)
        counts = found.scale.to_counts(found.matrix.rows(0, source.n_cells), found.matrix.name)
        kinds, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        is_kind = np.array([not is_missing(kind) and n >= min_cells for kind, n in zip(kinds, sizes, strict=True)])
        is_kept = is_kind[inverse]
        if not is_kept.any():
            raise SourceError(
                f"no type in .obs[{labels_key!r}] of {source.name} has {min_cells} cells",
                expected="labelled cells",
                fix="name another column with --labels-key",
            )
        cells = LabelledCells(_tidy(counts[:, is_gene]), labels).take(is_kept)
        obs_names = source.obs.index.astype(str).to_numpy(dtype=str)[is_kept]
        n_left_out = int((~is_kept).sum())
        if n_left_out:
            log.warning(
                "%s: %d cells without a usable label in .obs[%r] are left out", source.name, n_left_out, labels_key
            )
        return cls(source.name, cells, obs_names, names, n_left_out)

    def to_anndata(self, rows: NDArray[np.int64], labels_key: str) -> AnnData:
        """Return some cells as a generator is given them: raw counts in X, types in ``.obs``."""
        part = self.cells.take(rows)
        return _as_anndata(part, self.obs_names[rows], self.var_names, labels_key)


def known_cells(
    data: DataLike, vocabulary: GeneVocabulary, labels_key: str, *, layer: str | None = None
) -> tuple[AnnData, str]:
    """Return cells in the genes that a model knows and the data measure, and how much that leaves out.

    Genes that a model cannot make would tell its cells from real ones whatever it makes of the others: all methods are
    judged on the genes that it knows.

    Raises
    ------
    SourceError, ScaleError, GeneError
        The data cannot be used.
    """
    import anndata as ad

    source = open_source(data)
    reader = open_counts(source, vocabulary, layer=layer)
    cells = reader.read(np.arange(len(reader)))
    is_measured = reader.alignment.is_measured
    share = 1.0 - cells.counts.sum() / cells.library_size.sum()
    what = (
        f"{int(is_measured.sum()):,} genes of {source.name} are known to the model; {share:.2%} of the UMIs are in "
        "others, which are left out for all methods"
    )
    obs = source.obs[[labels_key]].copy() if labels_key in source.obs else source.obs.iloc[:, :0].copy()
    return ad.AnnData(X=cells.counts[:, is_measured], obs=obs, var=vocabulary.annotation()[is_measured]), what


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of the cells of one seed.

    Parameters
    ----------
    train, heldout
        Sorted positions.
    is_sample
        ``(n_train,)``: training cells set aside as the ceiling's sample; the rest are the third cells.
    """

    train: NDArray[np.int64]
    heldout: NDArray[np.int64]
    is_sample: NDArray[np.bool_]


def split_cells(labels: NDArray[np.str_], train_fraction: float, seed: int) -> Split:
    """Split every type into cells to train on and to hold out, and set a sample aside among the former.

    Parameters
    ----------
    labels
        ``(n_cells,)`` types, each at least three times.
    train_fraction
        Share to train on; at least one cell of each type is held out, and at least two are trained on.
    seed
        Seed of the draw.

    Returns
    -------
    Split
        The sample has as many cells of each type as are held out, but leaves at least one third cell.
    """
    rng = np.random.default_rng(seed)
    train, heldout, sample = [], [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        n = int(np.clip(round((1 - train_fraction) * rows.size), 1, rows.size - 2))
        heldout.append(rows[:n])
        train.append(rows[n:])
        sample.append(rows[n : n + min(n, rows.size - n - 1)])
    in_train = np.sort(np.concatenate(train))
    return Split(in_train, np.sort(np.concatenate(heldout)), np.isin(in_train, np.concatenate(sample)))


def evaluate_generation(
    data: DataLike,
    generators: Mapping[str, Generator] | None = None,
    *,
    labels_key: str,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    train_fraction: float = 0.7,
    layer: str | None = None,
    rows_path: Path | None = None,
    cells_folder: Path | None = None,
    n_trees: int = metrics.N_TREES,
    min_cells_per_type: int = metrics.MIN_CELLS_PER_TYPE,
    on_row: Callable[[MethodRun], None] | None = None,
) -> GenerationReport:
    """Train generators on most cells of a set, and judge what they make by the rest.

    Parameters
    ----------
    data
        AnnData or path, raw counts.
    generators
        Methods under evaluation, by name (:data:`Generator`).
    labels_key
        Column of ``.obs`` with the types.
    methods
        Which methods to run, in this order: names of ``generators`` and of :data:`METHODS`; all of them if left out.
    seeds
        Each seed splits the cells anew, and seeds generators and judges.
    train_fraction
        Share of each type that is trained on.
    layer
        Where the counts are; found if left out.
    rows_path
        JSONL file that takes each run as it finishes. Runs that are there already, of the same data and settings, are
        not run again.
    cells_folder
        Folder that takes the held-out cells and every method's cells of the first seed as ``.h5ad``.
    n_trees, min_cells_per_type
        As in :func:`scdiva.metrics.generation.realism`.
    on_row
        Called with each run as it finishes.

    Returns
    -------
    GenerationReport

    Raises
    ------
    KeyNotFoundError, ScaleError, GeneError, SourceError
        The data cannot be used.
    ConfigError
        An unknown method, a name of a generator that is taken, or an impossible fraction.
    ScdivaError
        A generator broke its word, or the controls are out of order (:func:`check_controls`).
    """
    own = dict(generators or {})
    chosen = _chosen_methods(own, methods)
    if not 0 < train_fraction < 1 or not seeds:
        raise ConfigError(
            f"train_fraction={train_fraction}, {len(seeds)} seeds",
            expected="a fraction between 0 and 1, at least one seed",
            fix="leave them out",
        )
    loaded = GenerationData.open(data, labels_key, layer=layer)
    splits = {seed: split_cells(loaded.cells.labels, train_fraction, seed) for seed in seeds}
    return _evaluate(
        loaded, splits, own, chosen, labels_key, n_trees, min_cells_per_type, rows_path, cells_folder, on_row
    )


def evaluate_generated(
    real_train: DataLike,
    real_holdout: DataLike,
    generated: DataLike,
    *,
    labels_key: str,
    name: str = "generated",
    unit: Unit = "counts",
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    layer: str | None = None,
    rows_path: Path | None = None,
    n_trees: int = metrics.N_TREES,
    min_cells_per_type: int = metrics.MIN_CELLS_PER_TYPE,
    on_row: Callable[[MethodRun], None] | None = None,
) -> GenerationReport:
    """Judge cells that were generated elsewhere, beside baselines trained on the same training cells.

    Parameters
    ----------
    real_train
        The cells that the generator was trained on. Memorisation can only be seen if it is really these.
    real_holdout
        Real cells that it was not trained on.
    generated
        Its cells, with their types; of each type as many are compared as are held out, or as there are.
    labels_key
        Column of ``.obs`` with the types, in all three.
    name
        What to call them.
    unit
        What X of ``generated`` holds: raw counts, or expression as methods emit that know no counts.
    methods
        Baselines and controls to run beside (:data:`METHODS`); all if left out.
    seeds
        The split is given; seeds draw baselines, samples and folds.
    layer, rows_path, n_trees, min_cells_per_type, on_row
        As in :func:`evaluate_generation`.

    Raises
    ------
    KeyNotFoundError, ScaleError, GeneError, SourceError
        The data cannot be used.
    ConfigError
        An unknown method.
    """
    train, heldout = (GenerationData.open(d, labels_key, layer=layer, min_cells=3) for d in (real_train, real_holdout))
    names = train.var_names
    there = np.isin(heldout.cells.labels, train.cells.labels)
    if not there.any():
        raise SourceError(
            "no type of the held-out cells is among the training cells",
            expected="the same types in both",
            fix="use the labels of one annotation",
        )
    aligned = _aligned(heldout.cells.take(there), heldout.var_names, names)[0]
    both = GenerationData(
        train.name,
        LabelledCells(
            sp.csr_matrix(sp.vstack([train.cells.counts, aligned.counts], format="csr")),
            np.concatenate([train.cells.labels, aligned.labels]),
        ),
        np.concatenate([train.obs_names, heldout.obs_names[there]]),
        names,
        train.n_left_out + heldout.n_left_out + int((~there).sum()),
    )
    cells, n_absent = _read_generated(generated, labels_key, names, unit, set(aligned.labels))
    rows = np.arange(both.cells.n_cells)
    n_train = train.cells.n_cells
    splits = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        is_sample = np.zeros(n_train, dtype=bool)
        for label, n in _sizes(aligned.labels).items():
            of_type = rng.permutation(np.flatnonzero(train.cells.labels == label))
            is_sample[of_type[: min(n, of_type.size // 2)]] = True
        splits[seed] = Split(rows[:n_train], rows[n_train:], is_sample)
    chosen = _chosen_methods({name: None}, None if methods is None else [name, *methods])
    fixed = _Fixed(cells, n_absent)
    return _evaluate(
        both, splits, {name: fixed}, chosen, labels_key, n_trees, min_cells_per_type, rows_path, None, on_row
    )


_FACTORIES = {"scdiva": "scdiva.tasks.generate:scdiva_generator"}


def generator_of(name: str, *arguments: Any, **options: Any) -> Generator:
    """Build a generator of the package by name; the code of the others is not loaded.

    Parameters
    ----------
    name
        "scdiva": ``scdiva_generator(model, labels_key)`` of :mod:`scdiva.tasks.generate`.
    *arguments, **options
        What its factory takes.

    Raises
    ------
    UnsupportedError
        There is no such generator.
    """
    module, _, factory = _FACTORIES.get(name, "").partition(":")
    if not module or find_spec(module) is None:
        raise UnsupportedError(
            f"this version has no generator {name!r}",
            expected=f"one of {', '.join(METHODS)}, or a generator of your own in Python",
            fix="name the methods to run: --methods multinomial ...",
        )
    made: Generator = getattr(import_module(module), factory)(*arguments, **options)
    return made


def check_controls(report: GenerationReport) -> None:
    """Refuse a report whose controls are out of order: real cells must be harder to tell apart than shuffled ones.

    Raises
    ------
    ScdivaError
        The ceiling's C2ST AUC (forest, variable genes) is not nearer to 0.5 than the null's, or has no value.
    """
    if not {NULL, CEILING} <= set(report.methods):
        return
    null, ceiling = (report.summary(name, _HEADLINE).mean for name in (NULL, CEILING))
    if abs(ceiling - 0.5) < abs(null - 0.5):
        return
    raise ScdivaError(
        f"the controls are out of order: C2ST AUC {ceiling:.3f} of real cells, {null:.3f} of shuffled",
        expected="real cells nearer to 0.5",
        fix="the set is too small or its genes too few for this evaluation; the rows that were measured are kept",
    )


class _Fixed:
    """Cells that exist already, in the place of a generator."""

    def __init__(self, cells: LabelledCells, n_absent: int) -> None:
        self.cells, self.n_absent = cells, n_absent
        self.fingerprint = _content_hash(cells, np.array([], dtype=str))


def _evaluate(
    data: GenerationData,
    splits: Mapping[int, Split],
    own: Mapping[str, Any],
    methods: Sequence[str],
    labels_key: str,
    n_trees: int,
    min_cells_per_type: int,
    rows_path: Path | None,
    cells_folder: Path | None,
    on_row: Callable[[MethodRun], None] | None,
) -> GenerationReport:
    import torch  # deferred: heavy, and --help does not need it

    # scikit-learn and scanpy set the number of OpenMP threads of the whole process, and with it torch's
    n_threads = torch.get_num_threads()
    known = {} if rows_path is None else {run.key: run for run in read_rows(rows_path)}
    content = _content_hash(data.cells, data.var_names)
    runs: list[MethodRun] = []
    with_own_space: tuple[str, ...] = ()
    for seed, split in splits.items():
        train, heldout = data.cells.take(split.train), data.cells.take(split.heldout)
        if int((~split.is_sample).sum()) < _MIN_THIRD:
            raise SourceError(
                f"{int((~split.is_sample).sum())} training cells of {data.name} are in neither sample",
                expected=f"at least {_MIN_THIRD}, for variable genes and components",
                fix="give more cells",
            )
        try:
            reference = metrics.RealismReference.fit(train, split.is_sample, seed=seed)
        except NotMeasurableError as error:
            raise SourceError(
                f"{data.name} cannot be compared: {error}", expected="cells that differ", fix="give other cells"
            ) from error
        with_own_space = tuple(reference.space_of_type)
        if cells_folder is not None and seed == next(iter(splits)):
            _write_cells(data.to_anndata(split.heldout, labels_key), cells_folder / "heldout.h5ad")
        for method in methods:
            key = _key(
                content, split, method, seed, getattr(own.get(method), "fingerprint", ""), n_trees, min_cells_per_type
            )
            if key in known:
                run = known[key]
            else:
                keep = cells_folder if seed == next(iter(splits)) else None
                job = _Job(data, split, train, heldout, reference, labels_key, seed, n_trees, min_cells_per_type)
                torch.set_num_threads(n_threads)
                run = _run(job, method, own.get(method), key, keep)
                if rows_path is not None:
                    _append(rows_path, run)
            runs.append(run)
            if on_row is not None:
                on_row(run)
    report = GenerationReport(
        name=data.name,
        labels_key=labels_key,
        n_train=int(split.train.size),
        n_heldout=int(split.heldout.size),
        n_third=int((~split.is_sample).sum()),
        n_left_out=data.n_left_out,
        sizes=_sizes(heldout.labels),
        types_with_own_space=with_own_space,
        ours=tuple(name for name in methods if name in own),
        runs=tuple(runs),
        n_trees=n_trees,
    )
    check_controls(report)
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    data: GenerationData
    split: Split
    train: LabelledCells
    heldout: LabelledCells
    reference: metrics.RealismReference
    labels_key: str
    seed: int
    n_trees: int
    min_cells_per_type: int
    wanted: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wanted", _sizes(self.heldout.labels))


def _run(job: _Job, method: str, generator: Any, key: str, keep: Path | None) -> MethodRun:
    options: dict[str, Any] = {
        "seed": job.seed,
        "n_trees": job.n_trees,
        "min_cells_per_type": job.min_cells_per_type,
    }
    started = time.perf_counter()
    n_absent = 0
    made: LabelledCells | None = None
    if isinstance(generator, _Fixed):
        made, n_absent = generator.cells, generator.n_absent
    elif generator is not None:
        train = job.data.to_anndata(job.split.train, job.labels_key)
        found = generator(train, dict(job.wanted), job.seed)
        made, n_absent = _checked(found, method, job)
    elif method != CEILING:
        draw = BASELINES.get(method, baselines.shuffled)
        made = LabelledCells(*draw(job.train.counts, job.train.labels, job.wanted, job.seed))
    generated_in = time.perf_counter() - started
    if keep is not None and made is not None:
        names = np.array([f"{method}_{i}" for i in range(made.n_cells)])
        _write_cells(_as_anndata(made, names, job.data.var_names, job.labels_key), keep / f"{method}.h5ad")
    started = time.perf_counter()
    if made is None:
        scores = metrics.ceiling(job.heldout, job.reference, **options)
    else:
        scores = metrics.realism(job.heldout, made, job.reference, **options)
    return MethodRun(method, job.seed, key, scores, generated_in, time.perf_counter() - started, n_absent)


def _checked(found: AnnData, method: str, job: _Job) -> tuple[LabelledCells, int]:
    """Return what a generator made, in the order of the data's genes; refuse what is not as promised."""
    if job.labels_key not in found.obs.columns:
        raise KeyNotFoundError(
            f"the generator {method!r} gives no .obs[{job.labels_key!r}]",
            expected="the types that were asked for",
            fix="correct the generator",
        )
    labels = np.array([label_text(value) for value in found.obs[job.labels_key]], dtype=str)
    sizes = _sizes(labels)
    if sizes != dict(job.wanted):
        wrong = [f"{k}: {sizes.get(k, 0)} of {n}" for k, n in job.wanted.items() if sizes.get(k, 0) != n]
        more = sorted(set(sizes) - set(job.wanted))
        raise ScdivaError(
            f"the generator {method!r} made {'; '.join([*wrong, *more])} cells",
            expected="exactly the numbers that were asked for",
            fix="correct the generator",
        )
    cells = LabelledCells(_linear(found.X, "counts", f"the generator {method!r}"), labels)
    return _aligned(cells, found.var_names.astype(str).to_numpy(dtype=str), job.data.var_names)


def _read_generated(
    generated: DataLike, labels_key: str, names: NDArray[np.str_], unit: Unit, types: set[str]
) -> tuple[LabelledCells, int]:
    source = open_source(generated)
    labels = np.array([label_text(value) for value in source.column(labels_key)], dtype=str)
    matrix = source.matrix(None)
    cells = LabelledCells(_linear(matrix.rows(0, source.n_cells), unit, source.name), labels)
    is_known = np.isin(labels, sorted(types))
    if not is_known.any():
        raise SourceError(
            f"no cell of {source.name} is of a held-out type",
            expected=f"types in .obs[{labels_key!r}]: {', '.join(sorted(types)[:10])}",
            fix="write the types that were asked for into that column",
        )
    if not is_known.all():
        log.warning("%s: %d cells of types that are not held out are left out", source.name, int((~is_known).sum()))
    return _aligned(cells.take(is_known), matrix.var.index.astype(str).to_numpy(dtype=str), names)


def _linear(x: Any, unit: Unit, name: str) -> sp.csr_matrix:
    """Return values on a linear scale; refuse what is no unit of the kind."""
    values = _tidy(sp.csr_matrix(x))
    data = np.asarray(values.data)
    if data.size and (not np.isfinite(data).all() or data.min() < 0):
        raise ScaleError(f"{name} holds negative or non-finite values", expected=unit, fix="correct the generator")
    if unit == "counts":
        if not np.array_equal(data, np.rint(data)):
            raise ScaleError(
                f"{name} holds values that are no whole numbers",
                expected="raw counts",
                fix="say what they are: --unit cp10k or --unit log1p_cp10k",
            )
        return sp.csr_matrix(values.astype(np.int32))
    if unit == "log1p_cp10k":
        values.data = np.expm1(data.astype(np.float64))
    return sp.csr_matrix(values.astype(np.float32))


def _aligned(cells: LabelledCells, found: NDArray[np.str_], names: NDArray[np.str_]) -> tuple[LabelledCells, int]:
    """Bring cells into the order of other genes; return how many of those they lack."""
    _refuse_duplicates(found, "the generated cells")
    position = {name: i for i, name in enumerate(names)}
    column = np.array([position.get(name, -1) for name in found], dtype=np.int64)
    if (column >= 0).sum() == 0:
        raise GeneError(
            f"no gene of the cells ({', '.join(found[:3])}, ...) is a gene of the training cells",
            expected=f"names such as {', '.join(names[:3])}",
            fix="name genes as the training cells do",
        )
    entries = sp.coo_matrix(cells.counts)
    is_known = column[entries.col] >= 0
    counts = sp.csr_matrix(
        (entries.data[is_known], (entries.row[is_known], column[entries.col[is_known]])),
        shape=(cells.n_cells, names.size),
    )
    return LabelledCells(_tidy(counts), cells.labels), int(names.size - (column >= 0).sum())


def _refuse_duplicates(names: NDArray[np.str_], where: str) -> None:
    kinds, sizes = np.unique(names, return_counts=True)
    if (sizes > 1).any():
        raise GeneError(
            f"{int((sizes > 1).sum())} gene names of {where} occur more than once ({', '.join(kinds[sizes > 1][:3])})",
            expected="unique names",
            fix="adata.var_names_make_unique()",
        )


def _chosen_methods(own: Mapping[str, Any], methods: Sequence[str] | None) -> tuple[str, ...]:
    taken = sorted(set(own) & set(METHODS))
    if taken:
        raise ConfigError(
            f"a generator is called {taken[0]!r}", expected="a name that is free", fix=f"not {', '.join(METHODS)}"
        )
    chosen = tuple(dict.fromkeys((*own, *METHODS) if methods is None else methods))
    unknown = [name for name in chosen if name not in own and name not in METHODS]
    if unknown or not chosen:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join((*own, *METHODS))}",
            fix="correct the name",
        )
    if "scvi" in chosen:
        baselines.require_scvi()
    return chosen


def read_rows(path: Path) -> list[MethodRun]:
    """Read ``rows.jsonl``; a last line that was cut off by a kill is left out, a missing file has no rows."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [MethodRun.from_dict(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _append(path: Path, run: MethodRun) -> None:
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # a line that was cut off
            with replacing(path) as partial:
                partial.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run.to_dict(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _key(content: str, split: Split, *settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, content, *settings]).encode())
    for part in (split.train, split.heldout, split.is_sample):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:24]


def _content_hash(cells: LabelledCells, names: NDArray[np.str_]) -> str:
    digest = hashlib.sha256()
    for part in (cells.counts.indptr, cells.counts.indices):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(cells.counts.data, dtype=np.float64).tobytes())
    for texts in (cells.labels, names):
        digest.update("\x1f".join(texts.tolist()).encode())
    return digest.hexdigest()


def _sizes(labels: NDArray[np.str_]) -> dict[str, int]:
    return {str(name): int(n) for name, n in zip(*np.unique(labels, return_counts=True), strict=True)}


def _tidy(counts: Any) -> sp.csr_matrix:
    result = sp.csr_matrix(counts)
    result.sum_duplicates()
    result.eliminate_zeros()
    result.sort_indices()
    return result


def _as_anndata(
    cells: LabelledCells, obs_names: NDArray[np.str_], var_names: NDArray[np.str_], labels_key: str
) -> AnnData:
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame({labels_key: pd.Categorical(cells.labels)}, index=obs_names)
    return ad.AnnData(cells.counts.copy(), obs=obs, var=pd.DataFrame(index=var_names))


def _write_cells(adata: AnnData, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        adata.write_h5ad(partial)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _or_none(value) if isinstance(value, float) else value for key, value in values.items()}
