"""``generate``: new cells, as integer counts of named genes under stated conditions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scdiva.data.conditions import ConditionLabels, label_text
from scdiva.data.output import check_output, replacing
from scdiva.data.population import DrawnSizes
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.diffusion.samplers import Sampler
from scdiva.errors import BundleError, ConfigError, KeyNotFoundError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import Population
from scdiva.models.scdiva.generation import Wish
from scdiva.models.scdiva.model import ScDiVa
from scdiva.types import CellCounts, LatentPrior

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

GROUP = 64
"""Cells that are drawn together, with one random stream: results do not depend on ``batch_size``, nor on a resume."""
BLOCK = 4096
"""Cells per finished piece of a file; a killed run loses at most these."""

LatentName = Literal["visible", "prior", "null"]
DEFAULT_LATENT: LatentName = "prior"
_SIZES, _LATENT, _DRAWS = 1, 2, 3  # tags of the random streams


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be generated; equal plans give equal cells.

    Parameters
    ----------
    condition
        ``(n, n_fields)`` int32 codes; 0 is unknown.
    weight
        ``(n_fields,)`` guidance weights; 1 is plain conditioning.
    sizes
        Genes and UMIs of each cell.
    is_measured
        ``(n_sources, G)`` genes that cells may have, by ``sizes.source``.
    sampler
        How the sets are drawn.
    latent
        Where z comes from: what is visible so far, the bundle's prior, the learned null, or the name of another source.
    prior
        Draws z where ``latent`` is "prior".
    z
        ``(n, Z)`` z of given cells, or None.
    z_depth
        ``(n,)`` UMIs behind ``z``.
    seed
        Seed of everything.
    notes
        What the user should know: combinations that no training cell had, for example.
    """

    condition: NDArray[np.int32]
    weight: NDArray[np.float64]
    sizes: DrawnSizes
    is_measured: NDArray[np.bool_]
    sampler: Sampler
    latent: str
    prior: LatentPrior | None
    z: NDArray[np.float32] | None
    z_depth: NDArray[np.float32] | None
    seed: int
    notes: tuple[str, ...]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.condition.shape[0])


def plan_cells(
    model: ScDiVa,
    condition: Mapping[str, Any] | pd.DataFrame | None,
    n_cells: int | None,
    *,
    weight: float | Mapping[str, float] = 1.0,
    latent: LatentName | LatentPrior = DEFAULT_LATENT,
    like: CellCounts | None = None,
    n_genes: ArrayLike | None = None,
    n_umis: ArrayLike | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> Plan:
    """Check a wish and settle everything but the draws themselves.

    Parameters
    ----------
    model
        A native model with trained identity and value heads.
    condition
        Label of each wanted field, for all cells; or one row per cell.
    n_cells
        Number of cells; left out where ``condition`` has rows or ``like`` cells.
    weight
        Guidance weight of all wanted fields, or of each. 1: plain conditioning; above 1 cells become more typical.
    latent
        Where z comes from.
    like
        Real cells of the model's vocabulary: each gives z, sizes and measured genes of as many cells as go around
        (variations of a cell).
    n_genes, n_umis
        Genes and UMIs of the cells, one number or one per cell; else drawn jointly from those of training cells.
    sampler
        How the sets are drawn.
    seed
        Seed.

    Raises
    ------
    ConfigError
        Impossible numbers, or a weight for a field without a condition.
    KeyNotFoundError
        A field or label that the model does not know; lists those it knows.
    BundleError
        The bundle holds no sizes of training cells, and none are given.
    UnsupportedError, UntrainedHeadError
        The model cannot generate.
    """
    model.check_generates()
    codes, n = condition_codes_of(model.labels, condition, n_cells, 0 if like is None else like.n_cells)
    if n < 1:
        raise ConfigError(f"n_cells={n}", expected="at least 1", fix="say how many cells are wanted")
    if seed < 0:
        raise ConfigError(f"seed={seed}", expected="0 or more", fix="name another seed")
    sampler = sampler or Sampler()
    _check_sampler(sampler)
    weights = _weights(model, weight, codes)
    for name, value in (("n_genes", n_genes), ("n_umis", n_umis)):
        check_sizes(name, value, n)
    notes: list[str] = []
    z = z_depth = None
    prior: LatentPrior | None = None
    rng = np.random.default_rng([seed, _SIZES])
    if like is not None:
        row = np.arange(n) % like.n_cells
        z = model.embed(like)[row]
        depth = np.asarray(like.counts.sum(axis=1)).ravel().astype(np.int64)
        z_depth = depth[row].astype(np.float32)
        wanted_depth = depth[row] if n_umis is None else _filled(n_umis, n)
        sizes = DrawnSizes(
            n_genes=np.diff(like.counts.indptr)[row].astype(np.int64) if n_genes is None else _filled(n_genes, n),
            depth=wanted_depth,
            # genes outside the vocabulary keep their share of the library
            library_size=like.library_size[row] * wanted_depth / np.maximum(depth[row], 1),
            source=like.source_of_cell[row],
        )
        is_measured = like.is_measured
        latent_name = "given cells"
        _check_not_empty(sizes)
    else:
        if model.population is None:
            raise BundleError(
                f"{model.name} holds no sizes of training cells (population.npz)",
                expected="a bundle that was written by scdiva pretrain or finetune",
                fix="fine-tune it on cells of your own: scdiva finetune FILE --objective conditional --out DIR",
            )
        population = model.population.sizes
        sizes = population.draw(codes, rng, n_genes=n_genes, depth=n_umis)
        is_measured = population.is_measured
        notes += unmet(model.labels, model.population, codes)
        latent_name = latent if isinstance(latent, str) else str(getattr(latent, "name", type(latent).__name__))
        if latent == "prior":
            prior = model.population.prior
        elif not isinstance(latent, str):
            prior = latent
        elif latent not in ("visible", "null"):
            raise ConfigError(
                f"latent={latent!r}", expected="visible, prior, null, or an object that draws z", fix="name one"
            )
    n_possible = is_measured.sum(axis=1)[sizes.source]
    if (sizes.n_genes > n_possible).any():
        raise ConfigError(
            f"n_genes={int(sizes.n_genes.max())}",
            expected=f"at most {int(n_possible.min())}, the genes that were measured",
            fix="ask for fewer",
        )
    sizes = deep_enough(sizes)
    return Plan(codes, weights, sizes, is_measured, sampler, latent_name, prior, z, z_depth, seed, tuple(notes))


def draw_cells(model: ScDiVa, plan: Plan, first: int, last: int) -> sp.csr_matrix:
    """Draw cells ``first`` to ``last`` of a plan, CSR int32; ``first`` is a multiple of :data:`GROUP`."""
    parts = []
    for start in range(first, last, GROUP):
        rows = slice(start, min(start + GROUP, plan.n_cells))
        parts.append(_draw_group(model, plan, rows, start // GROUP)[: last - start])
    return sp.vstack(parts, format="csr")


def _draw_group(model: ScDiVa, plan: Plan, rows: slice, group: int) -> sp.csr_matrix:
    condition = plan.condition[rows]
    z, z_depth = (None, None) if plan.z is None or plan.z_depth is None else (plan.z[rows], plan.z_depth[rows])
    if plan.prior is not None:
        z = _drawn_latent(plan, rows, group, model.n_latent)
        z_depth = (plan.prior.view_share * plan.sizes.depth[rows]).astype(np.float32)
    state = np.random.SeedSequence([plan.seed, _DRAWS, group]).generate_state(1, np.uint64)[0]
    wish = Wish(
        depth=plan.sizes.depth[rows],
        library_size=plan.sizes.library_size[rows],
        condition=condition,
        is_measured=plan.is_measured[plan.sizes.source[rows]],
        weight=plan.weight,
        z=z,
        z_depth=z_depth,
        is_null=plan.latent == "null",
    )
    return model.draw(wish, plan.sizes.n_genes[rows], plan.sampler, seed=int(state >> np.uint64(1)))


def _drawn_latent(plan: Plan, rows: slice, group: int, n_latent: int) -> NDArray[np.float32]:
    assert plan.prior is not None
    sizes = np.stack([plan.sizes.depth[rows], plan.sizes.n_genes[rows]], axis=1)
    rng = np.random.default_rng([plan.seed, _LATENT, group])
    z = np.asarray(plan.prior.sample(plan.condition[rows], sizes, rng), dtype=np.float32)
    if z.shape != (sizes.shape[0], n_latent) or not np.isfinite(z).all():
        raise ConfigError(
            f"{plan.latent} drew z of shape {z.shape}" + ("" if np.isfinite(z).all() else " with NaN or infinities"),
            expected=f"finite numbers of shape {(sizes.shape[0], n_latent)}",
            fix="give an object whose sample(condition, sizes, rng) draws z of this model",
        )
    return z


def blocks_of(plan: Plan, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut a plan into blocks of whole groups."""
    step = max(GROUP, -(-block_size // GROUP) * GROUP)
    for first in range(0, plan.n_cells, step):
        yield first, min(first + step, plan.n_cells)


def generate(
    model: ScDiVa, plan: Plan, *, batch_size: int = 256, on_block: Callable[[int], None] | None = None
) -> AnnData:
    """Draw all cells of a plan into memory.

    Parameters
    ----------
    model
        The model of the plan.
    plan
        From :func:`plan_cells`.
    batch_size
        Cells between two calls of ``on_block``; no influence on the result.
    on_block
        Called with the number of cells done.
    """
    import anndata as ad

    parts = []
    for first, last in blocks_of(plan, batch_size):
        parts.append(draw_cells(model, plan, first, last))
        if on_block is not None:
            on_block(last)
    obs, var = annotation(model, plan)
    return ad.AnnData(
        X=sp.vstack(parts, format="csr"), obs=obs, var=var, uns={"scdiva": {"generate": record_of(model, plan)}}
    )


def generate_file(
    model: ScDiVa,
    plan: Plan,
    path: Path,
    *,
    batch_size: int = 256,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> int:
    """Draw all cells of a plan into a file, in flat memory; the same call goes on where the last one was interrupted.

    Finished blocks of 4,096 cells wait in a folder beside the file, whose name holds a fingerprint of model and plan,
    until the file is whole.

    Parameters
    ----------
    model, plan
        What to draw.
    path
        ``.h5ad`` or ``.zarr``.
    batch_size
        Cells between two calls of ``on_block``.
    overwrite
        Replace an existing output.
    on_block
        Called with the number of cells done.

    Returns
    -------
    int
        Cells that an earlier, interrupted call had drawn.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    check_output(path, overwrite=overwrite)
    n_resumed = 0
    if plan.n_cells <= BLOCK:
        adata = generate(model, plan, batch_size=batch_size, on_block=on_block)
        write_parts(path, [adata.X], adata.obs, adata.var, dict(adata.uns))
        return n_resumed
    work = path.with_name(f".{path.name}.parts-{fingerprint(model, plan)[:16]}")
    work.mkdir(exist_ok=True)
    pieces: list[Path] = []
    for number, (first, last) in enumerate(blocks_of(plan, BLOCK)):
        piece = work / f"block-{number:07d}.npz"
        pieces.append(piece)
        if piece.exists():
            n_resumed += last - first
        else:
            parts = []
            for start in range(first, last, max(GROUP, batch_size // GROUP * GROUP)):
                stop = min(start + max(GROUP, batch_size // GROUP * GROUP), last)
                parts.append(draw_cells(model, plan, start, stop))
                if on_block is not None:
                    on_block(stop)
            with replacing(piece) as partial:
                sp.save_npz(partial, sp.vstack(parts, format="csr"))
        if on_block is not None:
            on_block(last)
    obs, var = annotation(model, plan)
    write_parts(
        path, (sp.load_npz(piece) for piece in pieces), obs, var, {"scdiva": {"generate": record_of(model, plan)}}
    )
    shutil.rmtree(work)
    return n_resumed


def write_adata(path: Path, adata: AnnData) -> None:
    """Write an AnnData, whole or not at all; ``.h5ad`` or ``.zarr``."""
    with replacing(path) as partial:
        if path.suffix == ".h5ad":
            adata.write_h5ad(partial)
        else:
            adata.write_zarr(partial)


def write_parts(path: Path, parts: Any, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write an AnnData whose X comes in parts."""
    import anndata as ad
    import h5py
    import zarr
    from anndata.io import sparse_dataset, write_elem

    def fill(group: Any) -> None:
        # an AnnData without X gives the file its layout
        write_elem(group, "/", ad.AnnData(obs=obs, var=var, uns=uns))
        for i, part in enumerate(parts):
            part = sp.csr_matrix(part, shape=(part.shape[0], len(var)))
            # positions of a million cells do not fit into 32 bits
            part.indptr = part.indptr.astype(np.int64)
            if i == 0:
                if "X" in group:
                    del group["X"]
                write_elem(group, "X", part)
            else:
                sparse_dataset(group["X"]).append(part)

    with replacing(path) as partial:
        if path.suffix == ".h5ad":
            with h5py.File(partial, "w") as file:
                fill(file)
        else:
            fill(zarr.open_group(partial, mode="w", zarr_format=2))


def annotation(model: ScDiVa, plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return ``.obs`` (wanted labels, wanted sizes) and ``.var`` (vocabulary genes) of a plan's cells."""
    return annotate_cells(model.labels, model.vocabulary, plan.condition, plan.sizes, plan.is_measured)


def annotate_cells(
    labels: ConditionLabels,
    vocabulary: GeneVocabulary,
    condition: NDArray[np.int32],
    sizes: DrawnSizes,
    is_measured: NDArray[np.bool_],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return ``.obs`` and ``.var`` of generated cells.

    Parameters
    ----------
    labels, vocabulary
        Of the model.
    condition
        ``(n, n_fields)`` codes of what was wanted.
    sizes
        What was wanted of sizes.
    is_measured
        ``(n_sources, G)`` genes that cells may have, by ``sizes.source``.
    """
    import pandas as pd

    n_cells = condition.shape[0]
    digits = len(str(n_cells - 1))
    obs = pd.DataFrame(index=[f"scdiva_{i:0{digits}d}" for i in range(n_cells)])
    for i, field in enumerate(labels.fields):
        code = condition[:, i]
        if code.any():
            names = np.array([None, *labels.labels(field)], dtype=object)
            obs[field] = pd.Categorical(names[code])
    obs["scdiva_n_genes"] = sizes.n_genes
    obs["scdiva_n_umis"] = sizes.depth
    obs["scdiva_synthetic"] = True
    var = _named_by_symbol(vocabulary.annotation())
    n_of_source = np.bincount(sizes.source, minlength=is_measured.shape[0])
    var["scdiva_measured"] = (n_of_source @ is_measured.astype(np.int64)) / n_cells
    return obs, var


def _named_by_symbol(var: pd.DataFrame) -> pd.DataFrame:
    """Index genes by symbol, as most files do; a gene without a symbol, or with that of another, keeps its id."""
    symbol = var["symbol"].astype(str)
    is_unclear = symbol.duplicated(keep=False) | (symbol == "")
    named = var.reset_index().drop(columns="symbol")
    named.index = [
        gene_id if unclear else name for gene_id, name, unclear in zip(var.index, symbol, is_unclear, strict=True)
    ]
    return named


def record_of(model: ScDiVa, plan: Plan) -> dict[str, Any]:
    """Return what was asked of what, for ``.uns``."""
    weights = {
        field: float(plan.weight[i]) for i, field in enumerate(model.labels.fields) if plan.condition[:, i].any()
    }
    return {
        **model.provenance,
        "seed": plan.seed,
        "n_cells": plan.n_cells,
        "sampler": dataclasses.asdict(plan.sampler),
        "latent": plan.latent,
        "guidance_weights": weights,
        "notes": list(plan.notes),
    }


def fingerprint(model: ScDiVa, plan: Plan) -> str:
    """Name a plan of a model: what differs in anything that shows in the cells differs in this."""
    digest = hashlib.sha256(json.dumps(record_of(model, plan), sort_keys=True, default=str).encode())
    arrays = [plan.condition, plan.weight, plan.is_measured]
    arrays += [getattr(plan.sizes, field.name) for field in dataclasses.fields(plan.sizes)]
    arrays += [array for array in (plan.z, plan.z_depth) if array is not None]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    if not model.bundle_hash:  # models that were never saved may differ in nothing but their weights
        for name, tensor in sorted(model.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
    if plan.prior is not None:  # an object of another kind is known by what it draws
        digest.update(_drawn_latent(plan, slice(0, GROUP), 0, model.n_latent).tobytes())
    return digest.hexdigest()


def condition_codes_of(
    labels: ConditionLabels, condition: Mapping[str, Any] | pd.DataFrame | None, n_cells: int | None, n_given: int
) -> tuple[NDArray[np.int32], int]:
    """Return the codes of what is wanted, ``(n, n_fields)``, and n.

    Parameters
    ----------
    labels
        Fields and labels of the model.
    condition
        Label of each wanted field, for all cells; or one row per cell.
    n_cells
        Number of cells; left out where ``condition`` has rows, or for ``n_given``.
    n_given
        Number of real cells that are varied; 0 where there are none.

    Raises
    ------
    ConfigError
        Another number of cells than of rows.
    KeyNotFoundError
        A field or label that the model does not know.
    """
    import pandas as pd

    if isinstance(condition, pd.DataFrame):
        n = len(condition)
        if n_cells not in (None, n):
            raise ConfigError(
                f"n_cells={n_cells} and conditions of {n} cells", expected="one of the two", fix="leave n_cells out"
            )
        codes = np.zeros((n, labels.n_fields), dtype=np.int32)
        for field in condition.columns:
            values = condition[field]
            known = labels.labels(field)
            found = labels.codes(field, values)
            is_bad = np.asarray((found == 0) & values.notna().to_numpy())
            if is_bad.any():
                labels.encode({field: values[is_bad].iloc[0]})  # names the label and those there are
                raise KeyNotFoundError(
                    f"labels of {field} that are missing values", expected=", ".join(known), fix="leave them empty"
                )
            codes[:, labels.fields.index(field)] = found
        return codes, n
    n = n_cells if n_cells is not None else n_given
    wanted = {field: label_text(value) for field, value in (condition or {}).items()}
    return np.tile(labels.encode(wanted), (max(n, 0), 1)), n


def _weights(model: ScDiVa, weight: float | Mapping[str, float], codes: NDArray[np.int32]) -> NDArray[np.float64]:
    is_wanted = (codes > 0).sum(axis=0) > 0
    weights = np.ones(model.labels.n_fields)
    if isinstance(weight, Mapping):
        for field, value in weight.items():
            model.labels.labels(field)
            i = model.labels.fields.index(field)
            if not is_wanted[i]:
                raise ConfigError(
                    f"a guidance weight for {field}, which has no condition",
                    expected="weights of wanted fields",
                    fix=f"add a condition for {field}, or leave the weight out",
                )
            weights[i] = value
    else:
        weights[is_wanted] = weight
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError(f"guidance weights {weights.tolist()}", expected="0 or more", fix="1 is plain conditioning")
    return weights


def _check_sampler(sampler: Sampler) -> None:
    problems = [
        (sampler.n_steps < 1, f"n_steps={sampler.n_steps}", "at least 1"),
        (not 0 <= sampler.gibbs_share <= 1, f"gibbs_share={sampler.gibbs_share}", "0 to 1"),
        (sampler.gibbs_rounds < 0, f"gibbs_rounds={sampler.gibbs_rounds}", "0 or more"),
        (sampler.selection_noise < 0, f"selection_noise={sampler.selection_noise}", "0 or more"),
        (not 0 <= sampler.remask <= 1, f"remask={sampler.remask}", "0 to 1"),
        (sampler.remask > 0 and sampler.strategy != "ancestral", f"remask with {sampler.strategy}", "ancestral"),
        (
            sampler.strategy not in ("random", "confidence", "ancestral", "first-hitting"),
            sampler.strategy,
            "a strategy",
        ),
        (sampler.grid not in ("uniform", "cosine"), f"grid={sampler.grid!r}", "uniform or cosine"),
    ]
    for is_wrong, found, expected in problems:
        if is_wrong:
            raise ConfigError(f"sampler: {found}", expected=expected, fix="see scdiva generate --help")


def check_sizes(name: str, value: ArrayLike | None, n: int) -> None:
    """Refuse numbers of genes or UMIs that cannot be."""
    if value is None:
        return
    array = np.asarray(value)
    is_number = np.issubdtype(array.dtype, np.integer)
    if array.ndim > 1 or array.size not in (1, n) or not is_number or (array < 1).any():
        smallest = f", smallest {array.min()}" if is_number and array.size else ""
        raise ConfigError(
            f"{name} of shape {array.shape} and type {array.dtype}{smallest}",
            expected=f"one whole number of at least 1, or {n} of them",
            fix="give numbers of genes or UMIs",
        )


def _check_not_empty(sizes: DrawnSizes) -> None:
    if (sizes.n_genes < 1).any():
        raise ConfigError(
            f"{int((sizes.n_genes < 1).sum())} of the given cells have no count in the model's genes",
            expected="cells with counts",
            fix="leave them out",
        )


def deep_enough(sizes: DrawnSizes) -> DrawnSizes:
    """Raise depths below the number of genes: each gene has a count of at least 1."""
    depth = np.maximum(sizes.depth, sizes.n_genes)
    return dataclasses.replace(sizes, depth=depth, library_size=sizes.library_size * depth / np.maximum(sizes.depth, 1))


def _filled(value: ArrayLike, n: int) -> NDArray[np.int64]:
    return np.broadcast_to(np.asarray(value, dtype=np.int64), (n,)).copy()


def unmet(labels: ConditionLabels, population: Population, codes: NDArray[np.int32]) -> list[str]:
    """Say which wanted combinations no training cell has: sizes (and z) come from cells that have a part of it."""
    notes = []
    for wanted in np.unique(codes, axis=0):
        rows, is_met = population.sizes.matching(wanted)
        if not is_met.all():
            names = {
                field: labels.labels(field)[code - 1] for field, code in zip(labels.fields, wanted, strict=True) if code
            }
            given_up = [field for field, met in zip(labels.fields, is_met, strict=True) if not met]
            notes.append(
                f"no training cell was {' and '.join(f'{k}={v}' for k, v in names.items())}: sizes are drawn from "
                f"{rows.size:,} cells without regard to {', '.join(given_up)}"
            )
    return notes


def scdiva_generator(
    base: ScDiVa,
    labels_key: str,
    *,
    sampler: Sampler | None = None,
    latent: LatentName = DEFAULT_LATENT,
    n_training_steps: int = 0,
    folder: Path | None = None,
) -> Callable[[AnnData, Mapping[str, int], int], AnnData]:
    """Return what evaluations call: fine-tune a model on training cells, then generate cells of each label.

    Parameters
    ----------
    base
        The model to start from; it must not have seen the cells that are held out.
    labels_key
        Column of ``.obs`` with the labels.
    sampler, latent
        As in :func:`plan_cells`.
    n_training_steps
        Fine-tuning steps; 0: as many as ``scdiva finetune --objective conditional`` takes.
    folder
        Where the fine-tuned models go, one folder per seed; an interrupted training resumes from there. None: they are
        not kept.
    """

    def fit_and_generate(train: AnnData, wanted: Mapping[str, int], seed: int) -> AnnData:
        import pandas as pd

        model = fine_tuned(base, labels_key, train, seed, n_training_steps=n_training_steps, folder=folder)
        table = pd.DataFrame({labels_key: [label for label, n in wanted.items() for _ in range(n)]})
        cells = generate(model, plan_cells(model, table, None, sampler=sampler, latent=latent, seed=seed))
        return named_as(cells, train, model.vocabulary)

    return fit_and_generate


_MADE_FROM = "made_from.sha256"


def fine_tuned(
    base: ScDiVa,
    labels_key: str,
    train: AnnData,
    seed: int,
    *,
    n_training_steps: int = 0,
    folder: Path | None = None,
) -> ScDiVa:
    """Fine-tune a model on cells with their labels as conditions, or take up what an equal call has left.

    Parameters
    ----------
    base, labels_key, n_training_steps, folder
        See :func:`scdiva_generator`.
    train
        Raw counts, with labels.
    seed
        Seed of the run, which lies in the folder ``seed-SEED``.
    """
    # deferred: training takes seconds to load, which generation alone need not wait for
    import tempfile

    from scdiva.config import apply_overrides
    from scdiva.tasks.pretrain import BUNDLE, adapt, conditioning_config

    config = conditioning_config(seed=seed)
    if n_training_steps:
        config = apply_overrides(config, [f"training.max_steps={n_training_steps}"])
    made_from = hashlib.sha256(f"{base.weights_hash()} {labels_key} {config.model_dump_json()}".encode())
    counts = sp.csr_matrix(train.X)
    for array in (counts.indptr, counts.indices, counts.data):
        made_from.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    for names in (train.var_names, train.obs[labels_key]):
        made_from.update("\n".join(map(str, names)).encode())
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) if folder is None else folder / f"seed-{seed}"
        mark = run / _MADE_FROM
        if mark.exists() and mark.read_text(encoding="utf-8") == made_from.hexdigest():
            return ScDiVa.from_pretrained(run / BUNDLE, device="cpu")
        trained = adapt(
            train, base, run, config=config, conditions=[labels_key], only_measured_genes=True, progress=False
        )
        with replacing(mark) as partial:
            partial.write_text(made_from.hexdigest(), encoding="utf-8")
    return trained.model


def named_as(cells: AnnData, train: AnnData, vocabulary: GeneVocabulary) -> AnnData:
    """Give generated cells the gene names of the cells that were trained on, whatever the vocabulary calls them."""
    columns = open_counts(open_source(train), vocabulary, min_coverage=0.0).alignment.source_of_gene()
    cells.var_names = [str(train.var_names[columns[gene][0]]) for gene in range(vocabulary.n_genes)]
    return cells
