"""``evaluate generation-protocol``: kept cells of ``evaluate generation``, measured as scDiffusion's authors do.

Nothing is generated anew: the cells of every seed lie in ``cells/seed-K`` (:mod:`scdiva.tasks.evaluate_generation`).
Simple samplers, the null and the ceiling of real cells are always beside them. The published numbers are against
*training* cells, where a generator that copies cannot fail; here they are also taken against held-out cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import annotation
from scdiva.baselines import generation as baselines
from scdiva.data.output import replacing
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, SourceError, UnsupportedError
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_space import LabelledCells, Score
from scdiva.metrics.paper_protocol import METRICS, N_TREES, genes_of, protocol_scores
from scdiva.tasks.evaluate_generation import IS_SAMPLE, _content_hash, _sizes, _tidy
from scdiva.tasks.generation_report import (
    BASELINES,
    CEILING,
    NULL,
    TITLES,
    MethodRun,
    Summary,
    append_row,
    read_rows,
)

if TYPE_CHECKING:
    from anndata import AnnData

TRAINING, HELDOUT = "training cells", "held-out cells"
REFERENCES = {TRAINING: "against training cells, as published", HELDOUT: "against held-out cells"}
CELLTYPIST = "celltypist"
SAMPLERS = tuple(name for name in BASELINES if name != "scvi")
"""Drawn where they were not kept; scVI takes minutes, and is shown only if its cells were kept."""
MAX_BALANCED = 20_000
"""Most cells that CellTypist learns from; the published script stops at 80,000."""

_FORMAT = 1
_STREAM = 23  # no other use of the same seed has this tag
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProtocolReport:
    """The result of :func:`evaluate_protocol`.

    Parameters
    ----------
    runs
        One per method and seed, those of a method together. Scopes are :data:`REFERENCES` (metrics of
        :data:`scdiva.metrics.paper_protocol.METRICS`), and "pooled" and types for CellTypist's accuracy.
    sizes
        Held-out cells of each type, of the last seed.
    """

    runs: tuple[MethodRun, ...]
    sizes: Mapping[str, int]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs: generators, samplers, null, ceiling."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    def summary(self, method: str, metric: str, scope: str) -> Summary:
        """Return mean and spread over seeds; NaN with the reason where no seed has a value."""
        scores = [r.scores[scope, metric] for r in self.runs if r.method == method and (scope, metric) in r.scores]
        found = [score.value for score in scores if np.isfinite(score.value)]
        if not found:
            return Summary(float("nan"), float("nan"), 0, scores[0].reason if scores else "not measured")
        return Summary(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0, len(found))

    def to_markdown(self) -> str:
        """Return a table for each reference, CellTypist's accuracy type by type, and what is missing."""
        lines = ["### scDiffusion's protocol"]
        for scope, title in REFERENCES.items():
            columns = [(name, scope) for name in METRICS] + [(CELLTYPIST, metrics.POOLED)]
            titles = [metric.title for metric in METRICS.values()] + ["CellTypist accuracy"]
            ideals = ["ceiling" if m.ideal is None else f"{m.ideal:g}" for m in METRICS.values()] + ["ceiling"]
            lines += ["", f"{title[0].upper()}{title[1:]}:", ""]
            lines += [f"| method | seeds | {' | '.join(titles)} |", "|---|---:|" + "---:|" * len(titles)]
            lines += [f"| ideal | | {' | '.join(ideals)} |"]
            for name in self.methods:
                n = sum(run.method == name for run in self.runs)
                cells = [self._cell(name, metric, where) for metric, where in columns]
                lines.append(f"| {TITLES.get(name, name)} | {n} | {' | '.join(cells)} |")
        lines += [
            "",
            "Correlations of means, MMD, iLISI and forest on the components of real and generated cells together, "
            "neighbours within types; real and generated cells in equal numbers. CellTypist: mean over types of the "
            "share of cells called what was asked for, trained on real training cells; the ceiling's are held-out "
            "cells. Correlations of means are near 1 for the null, too: it has every gene's mean.",
        ]
        if any(self.summary(name, CELLTYPIST, metrics.POOLED).n for name in self.methods):
            head = " | ".join(TITLES.get(name, name) for name in self.methods)
            lines += ["", "CellTypist accuracy, by type:", "", f"| type | held out | {head} |"]
            lines += ["|---|---:|" + "---:|" * len(self.methods)]
            for kind, n in self.sizes.items():
                cells = [self._cell(name, CELLTYPIST, kind) for name in self.methods]
                lines.append(f"| {kind} | {n:,} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self._reasons()]).rstrip() + "\n"

    def write(self, folder: Path) -> Path:
        """Write ``protocol.md`` into a folder, whole or not at all."""
        target = folder / "protocol.md"
        with replacing(target) as partial:
            partial.write_text(self.to_markdown(), encoding="utf-8")
        return target

    def _cell(self, method: str, metric: str, scope: str) -> str:
        found = self.summary(method, metric, scope)
        return "–" if not found.n else f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.n > 1 else "")

    def _reasons(self) -> list[str]:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for run in self.runs:
            for (scope, metric), score in run.scores.items():
                if not np.isfinite(score.value) and scope in (*REFERENCES, metrics.POOLED):
                    title = "CellTypist accuracy" if metric == CELLTYPIST else METRICS[metric].title
                    found.setdefault((title, score.reason), {})[TITLES.get(run.method, run.method)] = None
        return [f"- No {title} of {', '.join(names)}: {reason}." for (title, reason), names in found.items()]


def evaluate_protocol(
    cells_folder: Path,
    *,
    labels_key: str = "cell_type",
    methods: Sequence[str] | None = None,
    rows_path: Path | None = None,
    n_trees: int = N_TREES,
    on_row: Callable[[MethodRun], None] | None = None,
) -> ProtocolReport:
    """Measure kept cells of each seed as scDiffusion's authors measure theirs.

    Parameters
    ----------
    cells_folder
        What :func:`scdiva.tasks.evaluate_generation.evaluate_generation` kept: ``seed-K/train.h5ad``,
        ``heldout.h5ad``, ``METHOD.h5ad``.
    labels_key
        Column of ``.obs`` with the types.
    methods
        Generators whose cells to measure; all that were kept if left out. Simple samplers, null and ceiling are
        always beside them.
    rows_path
        JSONL file that takes each run as it finishes; runs of the same cells are not measured again.
    n_trees
        Trees of the forest.
    on_row
        Called with each run as it finishes.

    Raises
    ------
    SourceError
        No cells were kept there, or none of a method that was named.
    KeyNotFoundError
        They have no such column.
    GeneError
        Cells of one seed are not of the same genes.
    ConfigError
        A method that was named is measured anyway.
    """
    seeds = _seeds(cells_folder)
    known = {} if rows_path is None else {run.key: run for run in read_rows(rows_path)}
    wanted = None if methods is None else tuple(dict.fromkeys(methods))
    for name in wanted or ():
        if name in (*SAMPLERS, NULL, CEILING):
            raise ConfigError(f"{name!r} is measured in any case", expected="names of generators", fix="leave it out")
        if not any((folder / f"{name}.h5ad").exists() for folder in seeds.values()):
            raise SourceError(
                f"no cells of {name!r} in {cells_folder}",
                expected=f"cells/seed-K/{name}.h5ad",
                fix="run scdiva evaluate generation with it first, with the same --out",
            )
    runs: list[MethodRun] = []
    sizes: Mapping[str, int] = {}
    for seed, folder in seeds.items():
        cells = _KeptCells.read(folder, labels_key)
        sizes = _sizes(cells.heldout.labels)
        generated = cells.generated(wanted, seed)
        keys = {name: _key(cells, made, name, seed, n_trees) for name, made in generated.items()}
        missing = {name: made for name, made in generated.items() if keys[name] not in known}
        called = _called(cells, missing, seed) if missing else {}
        for name, made in generated.items():
            run = known.get(keys[name])
            if run is None:
                started = time.perf_counter()
                scores = {**_scores(cells, made, seed, n_trees), **called[name]}
                run = MethodRun(name, seed, keys[name], scores, 0.0, time.perf_counter() - started)
                if rows_path is not None:
                    append_row(rows_path, run)
            runs.append(run)
            if on_row is not None:
                on_row(run)
    order = [*dict.fromkeys(r.method for r in runs if r.method not in (*BASELINES, NULL, CEILING))]
    order += [*BASELINES, NULL, CEILING]
    return ProtocolReport(tuple(sorted(runs, key=lambda run: (order.index(run.method), run.seed))), sizes)


@dataclass(frozen=True, slots=True)
class _KeptCells:
    """The real cells of one seed, and where those of generators are."""

    folder: Path
    labels_key: str
    train: LabelledCells
    is_sample: NDArray[np.bool_]
    heldout: LabelledCells
    var_names: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, labels_key: str) -> _KeptCells:
        found = _read(folder / "train.h5ad", labels_key)
        names = tuple(found.var_names.astype(str))
        if IS_SAMPLE not in found.obs:
            raise KeyNotFoundError(
                f"{folder / 'train.h5ad'} has no .obs[{IS_SAMPLE!r}]",
                expected="training cells that scdiva evaluate generation wrote",
                fix="run it again with the same --out",
            )
        is_sample = found.obs[IS_SAMPLE].to_numpy(dtype=bool)
        heldout = _labelled(_read(folder / "heldout.h5ad", labels_key), labels_key, names)
        return cls(folder, labels_key, _labelled(found, labels_key, names), is_sample, heldout, names)

    @property
    def sample(self) -> LabelledCells:
        return self.train.take(self.is_sample)

    def generated(self, wanted: Sequence[str] | None, seed: int) -> dict[str, LabelledCells]:
        """Return the cells of each method; samplers and the null are drawn, the ceiling's are held-out cells."""
        paths = {path.stem: path for path in sorted(self.folder.glob("*.h5ad"))}
        names = [name for name in paths if name not in ("train", "heldout", *SAMPLERS, NULL)]
        made = {
            name: _labelled(_read(paths[name], self.labels_key), self.labels_key, self.var_names)
            for name in names
            if wanted is None or name in wanted
        }
        sizes = _sizes(self.heldout.labels)
        for name in (*SAMPLERS, NULL):
            draw = BASELINES.get(name, baselines.shuffled)
            made[name] = LabelledCells(*draw(self.train.counts, self.train.labels, sizes, seed))
        return {**made, CEILING: self.heldout}


def _scores(cells: _KeptCells, made: LabelledCells, seed: int, n_trees: int) -> metrics.Scores:
    genes, scores = genes_of(cells.train.counts), {}
    for scope, reference in {TRAINING: cells.sample, HELDOUT: cells.heldout}.items():
        # real cells against real ones: the sample takes the part of what is compared with held-out cells
        other = cells.sample if made is cells.heldout and scope == HELDOUT else made
        pair = metrics.match_types(reference, other, np.random.default_rng(seed))
        found = protocol_scores(*pair, genes, seed=seed, n_trees=n_trees)
        scores.update({(scope, name): score for name, score in found.items()})
    return scores


def _called(cells: _KeptCells, generated: Mapping[str, LabelledCells], seed: int) -> dict[str, metrics.Scores]:
    """Return how often CellTypist calls cells what was asked for, type by type, and the mean over types.

    Learned from 80 % of the real training cells, balanced by drawing cells of rarer types again, as published. Values
    are log1p(CP10K), which cannot exceed the log1p(10,000) that the published script clips at.
    """
    try:
        annotation.require_celltypist()
    except UnsupportedError as error:
        missing = Score(float("nan"), str(error))
        return {name: {(metrics.POOLED, CELLTYPIST): missing} for name in generated}
    log.info("CellTypist learns the types of seed %d", seed)
    genes = genes_of(cells.train.counts)
    fit = cells.train.take(balanced_rows(cells.train.labels, np.random.default_rng([seed, _STREAM])))
    test = sp.csr_matrix(sp.vstack([made.counts[:, genes] for made in generated.values()]))
    found = annotation.celltypist(sp.csr_matrix(fit.counts[:, genes]), fit.labels, test, seed=seed).label
    ends = np.cumsum([made.n_cells for made in generated.values()])
    scores: dict[str, metrics.Scores] = {}
    for (name, made), label in zip(generated.items(), np.split(found, ends[:-1]), strict=True):
        of_type: metrics.Scores = {
            (str(kind), CELLTYPIST): Score(float((label[made.labels == kind] == kind).mean()))
            for kind in np.unique(made.labels)
        }
        scores[name] = {(metrics.POOLED, CELLTYPIST): Score(float(np.mean([s.value for s in of_type.values()])))}
        scores[name] |= of_type
    return scores


def balanced_rows(labels: NDArray[np.str_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return positions of 80 % of the cells, those of rarer types several times, so that types are equally large.

    Parameters
    ----------
    labels
        ``(n_cells,)`` types.
    rng
        Draws the 80 %, and what is repeated.

    Returns
    -------
    numpy.ndarray
        As many of each type as the largest has, but no more than :data:`MAX_BALANCED` in all.
    """
    fit = rng.permutation(labels.size)[: max(round(0.8 * labels.size), 1)]
    kinds, sizes = np.unique(labels[fit], return_counts=True)
    n = max(min(int(sizes.max()), MAX_BALANCED // kinds.size), 1)
    rows = []
    for kind in kinds:
        of_type = fit[labels[fit] == kind][:n]
        rows.append(np.concatenate([of_type, rng.choice(of_type, n - of_type.size)]))
    return np.concatenate(rows).astype(np.int64)


def _seeds(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("seed-*"):
        number = path.name.removeprefix("seed-")
        if number.isdecimal() and all((path / f"{name}.h5ad").exists() for name in ("train", "heldout")):
            found[int(number)] = path
    if not found:
        raise SourceError(
            f"no cells in {folder}",
            expected="cells/seed-K/ with train.h5ad and heldout.h5ad",
            fix="run scdiva evaluate generation with the same --out first",
        )
    return dict(sorted(found.items()))


def _read(path: Path, labels_key: str) -> AnnData:
    import anndata as ad

    found = ad.read_h5ad(path)
    if labels_key not in found.obs:
        raise KeyNotFoundError(
            f"{path} has no .obs[{labels_key!r}]",
            expected=f"one of {', '.join(map(str, found.obs.columns)) or 'none'}",
            fix="name the column with the types with --labels-key",
        )
    return found


def _labelled(adata: AnnData, labels_key: str, names: tuple[str, ...]) -> LabelledCells:
    if tuple(adata.var_names.astype(str)) != names:
        raise GeneError(
            f"kept cells have {adata.n_vars} genes, the training cells {len(names)}, or they differ",
            expected="cells that one run of scdiva evaluate generation kept",
            fix="run it again into a new folder",
        )
    return LabelledCells(_tidy(adata.X), adata.obs[labels_key].astype(str).to_numpy(dtype=str))


def _key(cells: _KeptCells, made: LabelledCells, method: str, seed: int, n_trees: int) -> str:
    try:
        annotation.require_celltypist()
        judge = version("celltypist")
    except UnsupportedError:  # once it is there, what it could not measure is measured
        judge = ""
    names = np.array(cells.var_names, dtype=str)
    parts = [_content_hash(part, names) for part in (cells.train, cells.heldout, made)]
    digest = hashlib.sha256(json.dumps([_FORMAT, method, seed, n_trees, judge, *parts]).encode())
    digest.update(cells.is_sample.tobytes())
    return digest.hexdigest()[:24]
