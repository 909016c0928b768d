"""``augment``: fill up rare types of a data set with generated cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.conditions import column_text, is_missing
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, KeyNotFoundError, SourceError, UnsupportedError
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.tasks.latent_generation import generate_latent, plan_latent_cells
from scdiva.tasks.scdiffusion import fit_scdiffusion

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from scdiva.data.source import DataLike

MIN_CELLS = 10
"""Real cells that a type needs if the model is fitted here; of fewer, generated cells are copies of a few."""
Target = int | Literal["max", "median"] | Mapping[str, int]
_UMIS = 21  # tag of the random stream


def augment(
    data: DataLike,
    label_key: str,
    *,
    target: Target,
    model: ScDiffusion | None = None,
    weight: float = 1.0,
    layer: str | None = None,
    out_dir: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> AnnData:
    """Add generated cells to every type of fewer than ``target`` cells.

    Only genes that both the model and the data know are in the result: a zero would say that a generated cell lacks a
    gene that nothing is known of (our decision). How many genes, and which share of the real cells' UMIs, are left out
    is noted. The UMIs that a generated cell is asked to have are those of a real cell of its type.

    Parameters
    ----------
    data
        Raw counts of human genes.
    label_key
        Column of ``.obs`` with the types. Cells without a type stay as they are, and belong to none.
    target
        Cells that each type is to have: a number, ``"max"`` or ``"median"`` of the types' sizes, or a number by type
        (types that are left out stay as they are).
    model
        A latent diffusion that takes ``label_key`` as a condition; None: one is fitted to these cells, with the
        settings of :func:`~scdiva.tasks.scdiffusion.fit_scdiffusion`.
    weight
        Classifier-free guidance weight of the type; 1 is plain conditioning.
    layer
        Where the counts are; found if left out.
    out_dir
        Where a model that is fitted here is kept, and resumed from; None: it is not kept.
    seed
        Seed of everything random.
    device
        Where to fit: "auto", "cpu" or "cuda".

    Returns
    -------
    AnnData
        The real cells in their order, then generated ones, named ``scdiva_synthetic_0`` and so on, type by type. X:
        int32 raw counts over the genes of the data that the model knows, under their names in the data.
        ``.obs["scdiva_synthetic"]`` tells which are generated; these have a type and are NaN in every other column.
        ``.uns["scdiva"]["augment"]``: model, hash, notes, and lists in the same order: ``types``, ``n_real``,
        ``target`` and ``n_generated``. Layers, embeddings and graphs of the data are left out, because generated cells
        have none.

    Raises
    ------
    KeyNotFoundError
        No such column, or a type in ``target`` that no cell has.
    ConfigError
        A target below 1 or of a kind that is not known; nothing to fill up; types of fewer than :data:`MIN_CELLS` cells
        where a model would be fitted; cells that are generated already; an impossible weight or seed; both ``model``
        and ``out_dir``.
    UnsupportedError
        The model does not take ``label_key`` as a condition, or does not know a type that is to be filled up.
    SourceError, ScaleError, GeneError, OutputError, TrainingError, NonFiniteLossError
        As for :func:`~scdiva.tasks.scdiffusion.fit_scdiffusion`.
    """
    import anndata as ad
    import pandas as pd

    source = open_source(data)
    label = column_text(source.column(label_key))
    if "scdiva_synthetic" in source.obs and source.obs["scdiva_synthetic"].fillna(False).astype(bool).any():
        raise ConfigError(
            f"{source.name} holds generated cells (scdiva_synthetic)",
            expected="real cells: a model of generated cells learns its own mistakes",
            fix="leave them out, or augment the file they were added to",
        )
    if not (np.isfinite(weight) and weight >= 0):
        raise ConfigError(f"guidance weight {weight} of {label_key}", expected="0 or more", fix="1 is plain")
    if model is not None and out_dir is not None:
        raise ConfigError(
            f"a model, and a folder to keep a model in ({out_dir})",
            expected="one of the two: only a model that is fitted here is kept",
            fix="leave the folder out (--keep-model)",
        )
    if seed < 0:
        raise ConfigError(f"seed={seed}", expected="0 or more", fix="name another seed")
    names, sizes = np.unique(label[[not is_missing(text) for text in label]], return_counts=True)
    n_real = {str(name): int(n) for name, n in zip(names, sizes, strict=True)}
    goal = _goal(n_real, target, source.name, label_key)
    wanted = _missing_cells(n_real, goal, source.name, label_key)
    if model is None:
        scarce = [f"{name!r} ({n_real[name]})" for name in wanted if n_real[name] < MIN_CELLS]
        if scarce:
            raise ConfigError(
                f"{source.name}: types of {label_key} with fewer than {MIN_CELLS} cells: {', '.join(scarce)}",
                expected=f"at least {MIN_CELLS} real cells of a type that is to be filled up",
                fix="merge or leave out these types, name the others (target by type), or give a model of more cells",
            )
        model = fit_scdiffusion(
            data, [label_key], out_dir, with_classifiers=False, layer=layer, min_cells=1, seed=seed, device=device
        ).model
        is_fitted_here = True
    else:
        is_fitted_here = False
        _check_model(model, label_key, wanted)
    reader = open_counts(source, model.vocabulary, layer=layer)
    columns = reader.alignment.source_of_gene()
    genes = np.array(sorted(columns), dtype=np.int64)
    first = np.array([columns[int(gene)][0] for gene in genes])
    order = np.argsort(first)
    genes, first = genes[order], first[order]
    cells = reader.read(np.arange(len(reader)))
    real = cells.counts
    depth = np.asarray(real.sum(axis=1)).ravel()
    # of a generated cell's UMIs, those in genes that the data lack are dropped
    profile = np.exp(model.statistics.log_mean_profile())
    kept_share = float(profile[genes].sum() / profile.sum())
    rng = np.random.default_rng([seed, _UMIS])
    n_umis = []
    for name, n in wanted.items():
        of_type = depth[(label == name) & (depth > 0)]
        if not of_type.size:
            raise SourceError(
                f"{source.name}: no cell of {name} has counts in the model's genes",
                expected="real cells to take UMIs from",
                fix="check the labels, or the genes (scdiva check)",
            )
        n_umis.append(np.rint(rng.choice(of_type, n) / kept_share))
    table = pd.DataFrame({label_key: [name for name, n in wanted.items() for _ in range(n)]})
    plan = plan_latent_cells(
        model, table, None, weight=weight, n_umis=np.concatenate(n_umis).astype(np.int64), seed=seed
    )
    made = generate_latent(model, plan)
    raw = reader.found.matrix.var
    n_left_out = int(reader.is_gene.sum()) - sum(len(found) for found in columns.values())
    notes = [
        *_gene_notes(n_left_out, float(real.sum()), float(cells.library_size.sum())),
        *(
            [f"{model.vocabulary.n_genes - genes.size:,} genes of the model are not in the data and are left out"]
            if genes.size < model.vocabulary.n_genes
            else []
        ),
        *plan.notes,
    ]
    obs = _joined_obs(source.obs, table[label_key].to_numpy(), label_key)
    var = raw.iloc[first].copy()
    record = {
        **model.provenance,
        "model": model.name,
        "fitted_here": is_fitted_here,
        "weights_hash": model.weights_hash(),
        "label_key": label_key,
        "seed": seed,
        "weight": float(weight),
        # lists and no mapping by type: a "/" in a key would be a group in the file
        "types": list(n_real),
        "n_real": list(n_real.values()),
        "target": [goal.get(name, n) for name, n in n_real.items()],
        "n_generated": [wanted.get(name, 0) for name in n_real],
        "notes": notes,
    }
    x = sp.csr_matrix(sp.vstack([real[:, genes], sp.csr_matrix(made.X)[:, genes]], format="csr"), dtype=np.int32)
    return ad.AnnData(X=x, obs=obs, var=var, uns={"scdiva": {"augment": record}})


def _goal(n_real: Mapping[str, int], target: Target, name: str, label_key: str) -> dict[str, int]:
    """Return how many cells each type is to have; types that stay as they are may be left out."""
    if not n_real:
        raise KeyNotFoundError(
            f"no cell of {name} has a {label_key}", expected="a column of types", fix="name another column"
        )
    goal: dict[str, int]
    if isinstance(target, Mapping):
        unknown = [str(key) for key in target if str(key) not in n_real]
        if unknown:
            raise KeyNotFoundError(
                f"no cell of {name} has {label_key} {unknown[0]!r}",
                expected=f"one of {', '.join(n_real)}",
                fix="correct the name",
            )
        goal = {str(key): value for key, value in target.items()}
    elif target in ("max", "median"):
        sizes = list(n_real.values())
        goal = dict.fromkeys(n_real, max(sizes) if target == "max" else int(np.median(sizes)))
    elif isinstance(target, (int, np.integer)) and not isinstance(target, bool):
        goal = dict.fromkeys(n_real, int(target))
    else:
        raise ConfigError(f"target={target!r}", expected="a number, 'max', 'median', or a number by type", fix="200")
    low = [value for value in goal.values() if isinstance(value, bool) or int(value) != value or value < 1]
    if low:
        raise ConfigError(f"target={low[0]}", expected="whole numbers of at least 1", fix="name another target")
    return {key: int(value) for key, value in goal.items()}


def _missing_cells(n_real: Mapping[str, int], goal: Mapping[str, int], name: str, label_key: str) -> dict[str, int]:
    """Return how many cells each type lacks; only types that lack some."""
    wanted = {key: goal[key] - n for key, n in n_real.items() if goal.get(key, 0) > n}
    if not wanted:
        rarest = min(n_real, key=lambda key: n_real[key])
        raise ConfigError(
            f"{name}: no type of {label_key} is below the target; the rarest is {rarest} with {n_real[rarest]} cells",
            expected="a type to fill up",
            fix="name a larger target; nothing was done",
        )
    return wanted


def _check_model(model: ScDiffusion, label_key: str, wanted: Mapping[str, int]) -> None:
    if not isinstance(model, ScDiffusion):
        raise UnsupportedError(
            f"a model of type {type(model).__name__}", expected="a latent diffusion", fix="leave the model out"
        )
    if label_key not in model.labels.fields:
        raise UnsupportedError(
            f"{model.name} takes no condition {label_key}",
            expected=f"one of {', '.join(model.labels.fields) or 'no field'}",
            fix="leave the model out, or fit one with this condition",
        )
    unknown = [name for name in wanted if name not in model.labels.labels(label_key)]
    if unknown:
        raise UnsupportedError(
            f"{model.name} does not know {label_key} {', '.join(unknown)}",
            expected=f"labels among {', '.join(model.labels.labels(label_key))}",
            fix="leave the model out, or name the types to fill up (target by type)",
        )


def _gene_notes(n_left_out: int, kept: float, total: float) -> list[str]:
    if not n_left_out:
        return []
    return [
        f"{n_left_out:,} genes of the data ({1 - kept / max(total, 1.0):.2%} of the UMIs) are not in the model and are "
        "left out, of real cells too"
    ]


def _joined_obs(obs: pd.DataFrame, labels: NDArray[np.object_], label_key: str) -> pd.DataFrame:
    """Return the columns of real cells, with rows for generated ones that know their type only."""
    import pandas as pd

    digits = len(str(len(labels) - 1))
    stem, taken = "scdiva_synthetic", {str(name) for name in obs.index}
    while any(name.startswith(f"{stem}_") for name in taken):
        stem += "_x"
    names = [f"{stem}_{i:0{digits}d}" for i in range(len(labels))]
    real = obs.drop(columns="scdiva_synthetic", errors="ignore").copy()
    real.index = real.index.astype(str)
    for column in real.columns:
        if real[column].dtype == bool:  # has no NaN
            real[column] = real[column].astype("boolean")
    joined = pd.concat([real, pd.DataFrame(index=names)])
    types = np.concatenate([column_text(obs[label_key]).astype(object), labels])
    is_unknown = np.array([is_missing(str(text)) for text in types])
    original = np.concatenate([obs[label_key].astype(object).to_numpy(), labels])
    types[is_unknown] = original[is_unknown]  # "unassigned" stays what it was
    joined[label_key] = pd.Categorical(types)
    joined["scdiva_synthetic"] = np.arange(len(joined)) >= len(obs)
    return joined
