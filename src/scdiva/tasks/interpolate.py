"""``interpolate``: cells on the way from one label to another, by three methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.data.conditions import column_text
from scdiva.data.population import DrawnSizes
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, KeyNotFoundError, UnsupportedError
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.tasks.generate import annotate_cells
from scdiva.tasks.latent_generation import checked_sampler
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike

InterpolationMethod = Literal["gradient", "slerp", "linear"]
METHODS: tuple[str, ...] = ("gradient", "slerp", "linear")
START_TIME = {"cosine": 0.9, "linear": 0.6}
"""How far the source cells of "gradient" are noised if nothing else is said, by schedule. 0.6 is published (Luo et al.
2024); 0.9 of the cosine schedule leaves the signal as much of the variance, 2.5 %."""
SLERP_START_TIME = 0.5
"""The same for "slerp"; chosen on two sets (docs/results/scdiffusion_paths.md)."""
STRENGTH = 4.0
"""Sum of the two weights of gradient interpolation; with the published 2 paths end short of real cells of the target
(our decision, same place)."""
_PAIRS, _LATENT, _COUNTS = 11, 12, 13  # tags of the random streams


def linear_weights(steps: int, strength: float) -> NDArray[np.float64]:
    """Return the usual weights of source and target at each position, ``(steps, 2)``: s (1 - p) and s p.

    Source: Luo et al. 2024, where the sum s is 2 and there are 11 steps.
    """
    position = np.linspace(0.0, 1.0, steps)
    return np.asarray(strength * np.stack([1.0 - position, position], axis=1))


def mix_counts(
    source: sp.csr_matrix, target: sp.csr_matrix, position: float, rng: np.random.Generator
) -> sp.csr_matrix:
    """Mix the molecules of pairs of cells: the baseline of every interpolation.

    Each molecule of the source cell stays with probability (1 - p) m / n_source, each of the target cell with
    p m / n_target, where m is the smaller number of UMIs of the two: the expected UMIs are m at every position, and no
    molecule is made up. (Our decision.)

    Parameters
    ----------
    source, target
        CSR ``(n, n_genes)`` int32 raw counts of cells with counts; row i of both is a pair.
    position
        p, from 0 (source) to 1 (target).
    rng
        Source of randomness.

    Returns
    -------
    scipy.sparse.csr_matrix
        ``(n, n_genes)`` int32.
    """
    totals = [np.asarray(x.sum(axis=1), dtype=np.float64).ravel() for x in (source, target)]
    least = np.minimum(*totals)
    parts = []
    for counts, total, share in ((source, totals[0], 1.0 - position), (target, totals[1], position)):
        kept = rng.binomial(counts.data, np.repeat(np.minimum(share * least / total, 1.0), np.diff(counts.indptr)))
        parts.append(sp.csr_matrix((kept.astype(np.int32), counts.indices, counts.indptr), shape=counts.shape))
    mixed = sp.csr_matrix(parts[0] + parts[1])
    mixed.eliminate_zeros()
    mixed.sort_indices()
    return mixed


def interpolate(
    model: ScDiffusion,
    data: DataLike,
    *,
    source: str,
    target: str,
    method: InterpolationMethod = "gradient",
    field: str | None = None,
    steps: int = 11,
    n_cells: int = 100,
    start_time: float | None = None,
    strength: float | None = None,
    weights: Sequence[tuple[float, float]] | None = None,
    from_noise: bool = False,
    sampler: LatentSampler | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Make cells on the way from one label to another.

    Every path starts from a real cell of the source, and has a cell at each position from 0 to 1.

    *gradient*: Gradient Interpolation (Luo et al. 2024). The source cell's z is noised to ``start_time``; on the way
    back the classifier of the field pulls towards both labels, with the weights of the position.

    *slerp*: the source cell and a target cell are noised with the same noise to ``start_time``; their spherical
    interpolation at the position is denoised without any condition. (Our decision.)

    *linear*: molecules of the source cell and of a target cell are mixed (:func:`mix_counts`): the baseline. The model
    says which genes and nothing else.

    For slerp and linear, source cells and target cells are paired by rank of UMIs, so that depth, which is no state,
    changes little along a path. All cells of a path have the UMIs of its source cell to expect, those of linear mixing
    the smaller number of the two. Equal seeds use the same cells and the same noise at every position; counts are drawn
    anew at each.

    Parameters
    ----------
    model
        Gives genes, z, and for "gradient" a classifier of the field.
    data
        Raw counts with a column ``field``.
    source, target
        Labels at the two ends.
    method
        "gradient", "slerp" or "linear".
    field
        Column of both labels; if left out the model's field that has them.
    steps
        Positions on the path, both ends included.
    n_cells
        Paths: cells at each position. Source (and target) cells are chosen at random; they go around if there are
        fewer.
    start_time
        How far real cells are noised, in (0, 1]; None: :data:`START_TIME` of the model's schedule, or
        :data:`SLERP_START_TIME`. The more, the freer the path and the less of the start cell is left.
    strength
        gradient: sum of the two weights; None: :data:`STRENGTH`.
    weights
        gradient: weight of source and target at each position, in the place of :func:`linear_weights`.
    from_noise
        gradient: start from noise; of the source cells only the UMIs are used.
    sampler
        How z is drawn; None: the model's usual sampler.
    layer
        Where the counts are; found if left out.
    seed
        Seed of everything random.

    Returns
    -------
    AnnData
        ``n_cells * steps`` cells, position by position, int32 counts over the model's genes. ``.obs``:
        ``scdiva_position``, ``scdiva_path``, ``scdiva_method``, ``scdiva_source_cell`` and ``scdiva_target_cell``
        (names of the real cells; the latter only where there is one), ``scdiva_n_umis`` and ``scdiva_synthetic``. z in
        ``.obsm["X_scdiffusion"]`` (not for linear), the settings in ``.uns["scdiva"]["interpolate"]``.

    Raises
    ------
    ConfigError
        Impossible numbers, equal labels, options of another method, or cells without counts.
    KeyNotFoundError
        No such field, label or column, or no cell of an end.
    UnsupportedError
        A model of another family, or without a classifier of the field.
    SourceError, ScaleError, GeneError
        Data that cannot be used.
    """
    import anndata as ad
    import pandas as pd

    if not isinstance(model, ScDiffusion):
        raise UnsupportedError(
            f"interpolation with a {type(model).__name__}",
            expected="a latent diffusion",
            fix="fit one (scdiva scdiffusion fit)",
        )
    sampler = checked_sampler(model, sampler)
    _check(source, target, method, steps, n_cells, start_time, strength, weights, from_noise, seed)
    strength = STRENGTH if strength is None else strength
    field = field or _field_of(model, source, target, method)
    pulls = _pulls(model, field, source, target, weights, steps, strength) if method == "gradient" else None
    opened = open_source(data)
    column = column_text(opened.column(field))
    rng = np.random.default_rng([seed, _PAIRS])
    ends = [
        _chosen(column, label, n_cells, rng, opened.name, field) for label in (source, target)[: 1 + (pulls is None)]
    ]
    reader = open_counts(opened, model.vocabulary, layer=layer)
    pair = [reader.read(rows) for rows in ends]
    depths = [_depth(cells, opened.name) for cells in pair]
    if pulls is None:
        # the k-th deepest source cell with the k-th deepest target cell
        order = np.empty(n_cells, dtype=np.int64)
        order[np.argsort(depths[0], kind="stable")] = np.argsort(depths[1], kind="stable")
        ends[1], pair[1], depths[1] = ends[1][order], pair[1].take(order), depths[1][order]
    depth = np.minimum(*depths) if method == "linear" else depths[0]
    positions = np.linspace(0.0, 1.0, steps)
    if start_time is None:
        start_time = START_TIME[model.config.schedule] if method == "gradient" else SLERP_START_TIME
    drawing = _Drawing(model, sampler, depth, seed, None if from_noise else start_time)
    counts, latents = [], []
    z = [] if method == "linear" or from_noise else [model.encode(cells) for cells in pair]
    for i, position in enumerate(positions):
        rng = np.random.default_rng([seed, _COUNTS, i])
        if method == "linear":
            counts.append(mix_counts(pair[0].counts, pair[1].counts, float(position), rng))
            continue
        if pulls is not None:
            latents.append(drawing.draw(z[0] if z else None, pull={field: pulls[i]}))
        else:
            latents.append(drawing.draw(z[0], end=z[1], position=float(position)))
        counts.append(model.decode(latents[-1], depth, rng))
    n_umis = np.tile(depth, steps)
    sizes = DrawnSizes(n_umis, n_umis, n_umis.astype(float), np.zeros(n_umis.size, dtype=np.int32))
    nothing = np.zeros((n_umis.size, model.labels.n_fields), dtype=np.int32)
    obs, var = annotate_cells(model.labels, model.vocabulary, nothing, sizes, model.population.sizes.is_measured)
    del obs["scdiva_n_genes"]
    obs["scdiva_position"] = np.repeat(positions, n_cells)
    obs["scdiva_path"] = pd.Categorical([str(i) for i in np.tile(np.arange(n_cells), steps)])
    obs["scdiva_method"] = pd.Categorical([method] * n_umis.size)
    names = np.asarray(opened.obs.index.astype(str))
    for end, rows in zip(("source", "target"), ends, strict=False):
        obs[f"scdiva_{end}_cell"] = pd.Categorical(np.tile(names[rows], steps))
    record: dict[str, Any] = {
        **model.provenance, "method": method, "field": field, "source": source, "target": target, "steps": steps,
        "data": opened.name, "seed": seed,
    }  # fmt: skip
    if method != "linear":
        record["start"] = "noise" if from_noise else "given cells"
        record["start_time"] = 1.0 if from_noise else start_time
        record["sampler"] = {**dataclasses.asdict(sampler), "n_steps": sampler.steps(model.config.n_times)}
    if method == "gradient":
        record["weights"] = _weights(weights, steps, strength)
    return ad.AnnData(
        X=sp.vstack(counts, format="csr"),
        obs=obs,
        var=var,
        obsm={"X_scdiffusion": np.concatenate(latents)} if latents else None,
        uns={"scdiva": {"interpolate": record}},
    )


@dataclass(frozen=True, slots=True)
class _Drawing:
    """Draws z of all paths at one position; the same noise at each."""

    model: ScDiffusion
    sampler: LatentSampler
    depth: NDArray[np.int64]
    seed: int
    start_time: float | None

    def draw(self, start: NDArray[np.float32] | None, **options: Any) -> NDArray[np.float32]:
        state = np.random.SeedSequence([self.seed, _LATENT]).generate_state(1, np.uint64)[0]
        return self.model.sample_latents(
            np.zeros((self.depth.size, self.model.labels.n_fields), dtype=np.int32),
            self.depth,
            torch.Generator().manual_seed(int(state >> np.uint64(1))),
            sampler=self.sampler,
            start=start,
            start_time=1.0 if self.start_time is None else self.start_time,
            **options,
        )


def _check(
    source: str,
    target: str,
    method: str,
    steps: int,
    n_cells: int,
    start_time: float | None,
    strength: float | None,
    weights: Sequence[tuple[float, float]] | None,
    from_noise: bool,
    seed: int,
) -> None:
    try:
        table = np.asarray([(1.0, 1.0)] if weights is None else weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"weights={weights!r}", expected=f"{steps} pairs of numbers", fix="see scdiva interpolate --help"
        ) from None
    for is_wrong, found, expected in (
        (method not in METHODS, f"method={method!r}", " or ".join(METHODS)),
        (source == target, f"from {source} to {target}", "two different labels"),
        (steps < 2, f"steps={steps}", "at least 2"),
        (n_cells < 1, f"n_cells={n_cells}", "at least 1"),
        (seed < 0, f"seed={seed}", "0 or more"),
        (start_time is not None and not 0 < start_time <= 1, f"start_time={start_time}", "above 0, at most 1"),
        (strength is not None and not (np.isfinite(strength) and strength > 0), f"strength={strength}", "above 0"),
        (strength is not None and weights is not None, "a strength and weights", "one of the two"),
        (weights is not None and table.shape != (steps, 2), f"weights of shape {table.shape}", f"{steps} pairs"),
        (not (np.isfinite(table).all() and (table >= 0).all()), f"weights {table.tolist()}", "0 or more"),
        (
            weights is not None and bool(table.size) and not table.any(axis=-1).all(),
            "a position where both weights are 0",
            "a pull at every position",
        ),
        (from_noise and start_time is not None, "a start time and a start from noise", "one of the two"),
        (
            method != "gradient" and (from_noise or weights is not None or strength is not None),
            f"from_noise, weights or strength with method={method!r}",
            "these with gradient interpolation only",
        ),
        (method == "linear" and start_time is not None, "start_time with method='linear'", "none: nothing is noised"),
    ):
        if is_wrong:
            raise ConfigError(found, expected=expected, fix="see scdiva interpolate --help")


def _field_of(model: ScDiffusion, source: str, target: str, method: str) -> str:
    fields = model.config.classified if method == "gradient" else model.labels.fields
    if not fields:
        raise UnsupportedError(
            f"{model.name} has no classifier of z" if method == "gradient" else f"{model.name} has no conditions",
            expected="a field that has both labels",
            fix="add a classifier (scdiva scdiffusion add-condition)"
            if method == "gradient"
            else "name the column of the labels (field)",
        )
    known = [field for field in fields if {source, target} <= set(model.labels.labels(field))]
    if not known:
        model.labels.encode({fields[0]: source})  # names the wrong label and those there are
        model.labels.encode({fields[0]: target})
    return known[0] if known else fields[0]


def _weights(weights: Sequence[tuple[float, float]] | None, steps: int, strength: float) -> NDArray[np.float64]:
    return linear_weights(steps, strength) if weights is None else np.asarray(weights, dtype=np.float64)


def _pulls(
    model: ScDiffusion,
    field: str,
    source: str,
    target: str,
    weights: Sequence[tuple[float, float]] | None,
    steps: int,
    strength: float,
) -> NDArray[np.float32]:
    """Return the weight of every label at every position, ``(steps, n_labels)``."""
    column = model.labels.fields.index(field) if field in model.labels.fields else 0
    codes = [int(model.labels.encode({field: label})[column]) for label in (source, target)]
    if field not in model.config.classified:
        raise UnsupportedError(
            f"{model.name} has no classifier of {field}",
            expected=f"one of {', '.join(model.config.classified) or 'no field'}",
            fix="add a classifier (scdiva scdiffusion add-condition), or use method='slerp'",
        )
    pulls = np.zeros((steps, len(model.labels.labels(field))), dtype=np.float32)
    pulls[:, [code - 1 for code in codes]] = _weights(weights, steps, strength)
    return pulls


def _chosen(
    column: NDArray[np.str_], label: str, n: int, rng: np.random.Generator, name: str, field: str
) -> NDArray[np.int64]:
    rows = np.flatnonzero(column == label)
    if not rows.size:
        raise KeyNotFoundError(
            f"{name} has no cell whose {field} is {label!r}",
            expected="real cells of both ends",
            fix="name another label, or another file",
        )
    return np.resize(rng.permutation(rows), n)


def _depth(cells: CellCounts, name: str) -> NDArray[np.int64]:
    depth = np.asarray(cells.counts.sum(axis=1)).ravel().astype(np.int64)
    if not depth.all():
        raise ConfigError(
            f"{name}: {int((depth == 0).sum())} of the chosen cells have no counts in the model's genes",
            expected="cells with counts at the ends of a path",
            fix="leave empty cells out",
        )
    return depth
