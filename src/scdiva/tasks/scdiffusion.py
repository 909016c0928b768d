"""``scdiffusion``: from one file of raw counts to a latent diffusion that generates cells under stated conditions.

Autoencoder, denoiser and classifiers are trained one after the other by the same loop, each in a folder of its own
that the same call resumes. Folders of a run: ``autoencoder``, ``denoiser``, ``classifier-FIELD`` and, at the end,
``bundle``.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.config import LoopConfig, ScDiffusionConfig, apply_overrides, changed_keys, load_config
from scdiva.data.conditions import ConditionLabels, collect_labels
from scdiva.data.outliers import cap_isolated
from scdiva.data.population import CellSizes
from scdiva.data.reader import CountsReader, NamedCells, open_counts
from scdiva.data.source import open_source
from scdiva.data.splits import hold_out
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import ConfigError, OutputError, SourceError, TrainingError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import MixturePrior, Population
from scdiva.models.scdiffusion import PRESETS, LatentSampler, ScDiffusion
from scdiva.models.scdiffusion.autoencoder import Autoencoder, SparseCells, calibrate_dispersions
from scdiva.models.scdiffusion.model import Networks, build_networks
from scdiva.models.scdiffusion.objectives import (
    AutoencoderObjective,
    ClassifierObjective,
    DenoiserObjective,
    LatentTable,
)
from scdiva.models.scdiffusion.published import AnyAutoencoder, AnyClassifier, PublishedAutoencoderObjective
from scdiva.models.scdiffusion.scimilarity import load_scimilarity
from scdiva.serialization import log1p_cp10k
from scdiva.tasks.generate import named_as
from scdiva.tasks.scdiva_latent import fit_codec_head, open_codec, open_with_codec, view_latents
from scdiva.types import CellCounts, LatentCodec, Objective

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.models.scdiva import ScDiVa
    from scdiva.training import FitResult

BUNDLE = "bundle"
"""Folder of the model within the folder of a run."""
MIN_CELLS = 20
"""Cells that each label needs: of fewer, neither denoiser nor classifier learns more than the cells themselves."""
MIN_CELLS_PER_GENE = 3
"""Genes detected in fewer cells are left out of the model."""
MIN_CELLS_IN_ALL = 50
PARTS = ("autoencoder", "denoiser", "classifier")
"""What is trained, in this order."""
_BLOCK = 512
# tags of the random streams that this file draws from a seed
_SPLIT_STREAM, _POPULATION_STREAM, _CALIBRATION_STREAM = 160, 161, 162
_CALIBRATION_CELLS = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FittedScDiffusion:
    """The result of :func:`fit_scdiffusion`.

    Parameters
    ----------
    model
        The model, on the CPU.
    path
        Its bundle; None where no folder was named.
    metrics
        Held-out figures, by name.
    seconds
        Wall-clock seconds of each part over all calls, by name.
    """

    model: ScDiffusion
    path: Path | None
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


def fit_scdiffusion(
    data: DataLike,
    conditions: Sequence[str] = (),
    out_dir: str | Path | None = None,
    *,
    codec: ScDiVa | str | Path | None = None,
    config: ScDiffusionConfig | None = None,
    settings: Sequence[str] = (),
    with_classifiers: bool = True,
    scimilarity: str | Path | None = None,
    layer: str | None = None,
    min_cells: int = MIN_CELLS,
    name: str = "",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> FittedScDiffusion:
    """Fit a latent diffusion to the cells of one file or AnnData.

    Parameters
    ----------
    data
        Raw counts of human genes.
    conditions
        Columns of ``.obs`` that the model can be asked for. Cells without a label take part, as cells of which nothing
        is known. None: the model generates cells of all kinds.
    out_dir
        Folder of the run, which the same call resumes; None: a temporary one.
    codec
        A native scDiVa model, or the name or path of its bundle: no autoencoder is trained, and the diffusion is one of
        this model's z, over the genes that it knows and the data measure. It is not changed, and a copy goes into the
        bundle.
    config
        Networks and their sizes, such as ``PRESETS["parity"]`` of :mod:`scdiva.models.scdiffusion`; ``fields``,
        ``classified`` and ``codec`` are set here, and with a codec ``n_latent``.
    settings
        What is to differ from :func:`loop_config`, such as ``"denoiser.training.max_steps=2000"``: a part
        ("autoencoder", "denoiser" or "classifier") that is trained, then a key of its loop. The share of held-out cells
        is fixed.
    with_classifiers
        Whether each condition gets a classifier for classifier guidance; they can be added later
        (:func:`add_classifier`). The published denoiser knows of no conditions: there they are needed.
    scimilarity
        Folder of a SCimilarity model at whose weights the published autoencoder starts.
    layer
        Where the counts are; found if left out.
    min_cells
        Cells that each label needs.
    name
        Of the model; made from the data's name if left out.
    seed
        Seed of everything random.
    device
        Where to train: "auto", "cpu" or "cuda".
    progress
        Show progress bars on a terminal.

    Raises
    ------
    SourceError, ScaleError, GeneError
        The data cannot be used, or holds too few cells.
    KeyNotFoundError
        There is no such column, or no cell has a label.
    ConfigError
        A label of too few cells; names all of them. So few labelled cells that none is held out for the classifier. The
        same condition twice, a setting that does not exist or that nothing would follow; or what the published or the
        native networks cannot do.
    BundleError
        ``scimilarity`` cannot be used.
    OutputError, TrainingError, NonFiniteLossError
        See :func:`scdiva.training.fit`.
    BundleError, UnsupportedError, UntrainedHeadError
        There is no such codec, or it has no z or no trained profile decoder.
    """
    _refuse_foreign_bundle(out_dir, "denoiser/config.toml")
    by_part = _settings_by_part(settings)
    config = config or ScDiffusionConfig()
    is_published = config.architecture == "published"
    _refuse_impossible(is_published, conditions, with_classifiers, scimilarity, codec, by_part)
    whole = part_of_whole = None
    if codec is None:
        reader, labels = _opened(data, conditions, layer, min_cells)
    else:
        whole = open_codec(codec)
        reader, part_of_whole = open_with_codec(data, whole, layer)
        labels = _labels_of(reader, conditions, min_cells)
        reader = reader.with_conditions(labels)
    cells, n_capped = _trainable(reader), 0
    if not is_published:
        cells, n_capped = _without_isolated(cells, reader.source.name)
    sizes = config.model_copy(
        update={
            "fields": () if is_published else tuple(labels.fields),
            "classified": tuple(labels.fields) if with_classifiers else (),
            **({} if whole is None else {"codec": "scdiva", "n_latent": whole.n_latent}),
        }
    )
    train, heldout = hold_out(
        np.zeros(cells.n_cells, dtype=str), _HELDOUT_SHARE, np.random.default_rng([seed, _SPLIT_STREAM])
    )
    _refuse_few_labelled(cells, train, heldout, labels, sizes.classified)
    trained = cells.take(train)
    statistics = GeneStatistics.from_cells(trained)
    networks = build_networks(cells.n_genes, sizes, labels, seed=seed)
    start, start_from = None, ""
    if part_of_whole is not None:
        start_from = part_of_whole.weights_hash()
    elif isinstance(networks.autoencoder, Autoencoder):
        mean_value = np.bincount(trained.counts.indices, weights=log1p_cp10k(trained), minlength=cells.n_genes)
        networks.autoencoder.start_at(statistics.log_mean_profile(), mean_value / trained.n_cells)
    elif scimilarity is None:
        start_from = "random weights"
    else:
        start = load_scimilarity(networks.autoencoder, reader.alignment.vocabulary, scimilarity)
        start_from = start.content_hash
    networks.set_depths(_depth(trained))
    source = reader.source.name
    folder = nullcontext(str(out_dir)) if out_dir is not None else tempfile.TemporaryDirectory(prefix="scdiva-")
    fits: dict[str, FitResult] = {}
    # a caller's inference mode would take the gradients away
    with torch.inference_mode(False), folder as out:
        run = _Run(
            cells, _content_hash(cells), train, heldout, source, Path(out), by_part, seed, device, progress, start_from
        )
        if part_of_whole is not None:
            views = view_latents(part_of_whole, trained, seed)
            fit_codec_head(networks.codec_head, part_of_whole, trained, views, seed)
        elif isinstance(networks.autoencoder, Autoencoder):
            n_labels = [len(labels.labels(field)) for field in labels.fields]
            objective = AutoencoderObjective(networks.autoencoder, float(trained.counts.sum()), n_labels)
            fits["autoencoder"] = run.fit("autoencoder", objective, sizes)
            calibrate_dispersions(networks.autoencoder, _some_blocks(trained, seed))
            networks.autoencoder.standardise_by(_raw_latents(networks.autoencoder, trained))
        else:
            fits["autoencoder"] = run.fit("autoencoder", PublishedAutoencoderObjective(networks.autoencoder), sizes)
        table = _table(networks, part_of_whole, cells, seed)
        denoising = DenoiserObjective(
            networks.denoiser,
            table,
            sizes.n_times,
            schedule=sizes.schedule,
            prediction=sizes.prediction,
            is_weighted=not is_published,
        )
        fits["denoiser"] = run.fit("denoiser", denoising, sizes, identity=_trained_on(table))
        for i, field in enumerate(sizes.classified):
            classifier = networks.classifiers[i]
            assert isinstance(classifier, AnyClassifier)
            fits[f"classifier-{field}"] = _fit_classifier(run, classifier, table, labels, field, sizes)
    metrics = {
        f"heldout_{part}_loss": float(fit.best_value) for part, fit in fits.items() if fit.best_value is not None
    }
    details = {
        "name": name or ("scdiffusion" if reader.source.path is None else f"scdiffusion-{Path(source).stem}"),
        "description": f"Latent diffusion of the cells of {source}"
        + ("" if whole is None else f", on the z of {whole.model.name}")
        + (f", conditioned on {', '.join(labels.fields)}." if labels.n_fields else "."),
        "trained_heads": [
            *(["autoencoder"] if whole is None else []),
            "denoiser",
            *(f"classifier of {field}" for field in sizes.classified),
        ],
        **({} if whole is None else {"codec": {**whole.model.provenance, "weights_hash": whole.weights_hash()}}),
        "training": {**_record(reader, trained, heldout.size, fits, seed), "n_isolated_counts_capped": n_capped},
        "metrics": metrics,
        **({"scimilarity": start.to_dict()} if start is not None else {}),
    }
    population = _population(table.z[train], trained, seed, part_of_whole)
    model = ScDiffusion(
        networks,
        sizes,
        reader.alignment.vocabulary,
        statistics,
        labels=labels,
        population=population,
        codec=part_of_whole,
        details=details,
    )
    path = None
    if out_dir is not None:
        path = Path(out_dir) / BUNDLE
        model.save_pretrained(path, overwrite=True)
        model = ScDiffusion.from_pretrained(path, device="cpu")
    return FittedScDiffusion(model.to("cpu"), path, metrics, {part: 60 * fit.minutes for part, fit in fits.items()})


def _refuse_impossible(
    is_published: bool,
    conditions: Sequence[str],
    with_classifiers: bool,
    scimilarity: str | Path | None,
    codec: object,
    settings: Mapping[str, Sequence[str]],
) -> None:
    """Refuse what does not go together, before anything is read."""
    problems = [
        (
            is_published and bool(conditions) and not with_classifiers,
            "conditions without classifiers, of the published networks",
            "classifiers: the published denoiser is unconditional, and guided by them alone",
            "leave --no-classifiers out",
        ),
        (
            scimilarity is not None and not is_published,
            "SCimilarity weights for the native autoencoder",
            "the published one, which has SCimilarity's layers",
            "add --preset parity, or leave --scimilarity out",
        ),
        (
            codec is not None and is_published,
            "a codec with the published networks",
            "the native denoiser: the published one is made for z of its own autoencoder",
            "leave --preset parity or --codec out",
        ),
        (
            codec is not None and "autoencoder" in settings,
            "settings of the autoencoder with a codec, in whose place none is trained",
            "settings of denoiser or classifier",
            "leave them out",
        ),
        (
            not (conditions and with_classifiers) and "classifier" in settings,
            "settings of the classifier where none is trained",
            "settings of autoencoder or denoiser",
            "leave them out, or train classifiers: name conditions, and leave --no-classifiers out",
        ),
    ]
    for is_wrong, found, expected, fix in problems:
        if is_wrong:
            raise ConfigError(found, expected=expected, fix=fix)


def add_classifier(
    model: ScDiffusion,
    data: DataLike,
    field: str,
    out_dir: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    layer: str | None = None,
    min_cells: int = MIN_CELLS,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> FittedScDiffusion:
    """Add a condition to a model without training autoencoder or denoiser again: a classifier guides towards it.

    Parameters
    ----------
    model
        It is not changed.
    data
        Cells with a column ``field``; those the model was fitted to, or others like them. Sizes of cells are taken from
        them.
    field
        Column of ``.obs`` that the model has no classifier for.
    out_dir
        Folder of the run, the new model in its ``bundle``; None: a temporary one.
    settings
        What is to differ from :func:`loop_config`: ``"classifier.training.max_steps=500"``.
    layer, min_cells, seed, device, progress
        As for :func:`fit_scdiffusion`.

    Raises
    ------
    ConfigError
        The model has a classifier for the field, a label has too few cells, no labelled cell is held out, or settings
        are of what is not trained.
    OutputError
        The folder holds the run of a fit, or a model that is not of this run; or see :func:`scdiva.training.fit`.
    SourceError, ScaleError, GeneError, KeyNotFoundError, TrainingError, NonFiniteLossError
        As for :func:`fit_scdiffusion`.
    """
    if out_dir is not None and (Path(out_dir) / "denoiser").exists():
        raise OutputError(
            f"{out_dir} holds the run of a fit, whose model the larger one would replace",
            expected="a folder of its own",
            fix="name another one",
        )
    _refuse_foreign_bundle(out_dir, "classifier-*/config.toml")
    by_part = _settings_by_part(settings)
    for part in sorted(by_part.keys() - {"classifier"}):
        raise ConfigError(
            f"settings of the {part}, which is not trained again",
            expected="settings of the classifier",
            fix="leave them out",
        )
    if field in model.config.classified:
        raise ConfigError(
            f"{model.name} has a classifier of {field}", expected="a field without one", fix="guide by it as it is"
        )
    source = open_source(data)
    reader = open_counts(source, model.vocabulary, layer=layer)
    found = _labels_of(reader, [field], min_cells)
    labels = model.labels if field in model.labels.fields else model.labels.merged(found)
    unknown = [label for label in found.labels(field) if label not in labels.labels(field)]
    if unknown:
        raise ConfigError(
            f"{source.name}: {field} has labels that the model does not know: {', '.join(unknown)}",
            expected=f"labels of {', '.join(labels.labels(field))}",
            fix="leave these cells out, or fit a model to them",
        )
    cells = _trainable(reader.with_conditions(labels, {}))
    if model.config.architecture != "published":
        cells = _without_isolated(cells, source.name)[0]
    sizes = model.config.model_copy(update={"classified": (*model.config.classified, field)})
    networks = build_networks(model.vocabulary.n_genes, sizes, labels, seed=seed)
    old = {name: tensor.cpu() for name, tensor in model.networks.state_dict().items()}
    networks.load_state_dict({**networks.state_dict(), **old}, strict=True)
    if model.codec is None:
        # it is not trained, and batch norms must not see other cells
        networks.autoencoder.eval()
    train, heldout = hold_out(
        np.zeros(cells.n_cells, dtype=str), _HELDOUT_SHARE, np.random.default_rng([seed, _SPLIT_STREAM])
    )
    _refuse_few_labelled(cells, train, heldout, labels, (field,))
    folder = nullcontext(str(out_dir)) if out_dir is not None else tempfile.TemporaryDirectory(prefix="scdiva-")
    part = f"classifier-{field}"
    with torch.inference_mode(False), folder as out:
        start_from = model.weights_hash()
        run = _Run(
            cells, _content_hash(cells), train, heldout, source.name, Path(out), by_part, seed, device, progress,
            start_from,
        )  # fmt: skip
        table = _table(networks, model.codec, cells, seed)
        classifier = networks.classifiers[len(sizes.classified) - 1]
        assert isinstance(classifier, AnyClassifier)
        fit = _fit_classifier(run, classifier, table, labels, field, sizes)
    metrics = dict(model.details.get("metrics", {}))
    if fit.best_value is not None:
        metrics[f"heldout_{part}_loss"] = float(fit.best_value)
    details = {
        **model.details,
        "trained_heads": [*model.details.get("trained_heads", []), f"classifier of {field}"],
        "metrics": metrics,
    }
    population = _population(table.z[train], cells.take(train), seed, model.codec)
    larger = ScDiffusion(
        networks,
        sizes,
        model.vocabulary,
        model.statistics,
        labels=labels,
        population=population,
        codec=model.codec,
        details=details,
    )
    path = None
    if out_dir is not None:
        path = Path(out_dir) / BUNDLE
        larger.save_pretrained(path, overwrite=True)
        larger = ScDiffusion.from_pretrained(path, device="cpu")
    return FittedScDiffusion(larger.to("cpu"), path, metrics, {part: 60 * fit.minutes})


def scdiffusion_generator(
    labels_key: str,
    *,
    sampler: LatentSampler | None = None,
    settings: Sequence[str] = (),
    preset: str = "native",
    folder: Path | None = None,
) -> Callable[[AnnData, Mapping[str, int], int], AnnData]:
    """Return what evaluations call: fit a model to training cells, then generate cells of each label.

    Parameters
    ----------
    labels_key
        Column of ``.obs`` with the labels.
    sampler
        How z is drawn.
    settings
        As for :func:`fit_scdiffusion`.
    preset
        Name among the ``PRESETS`` of :mod:`scdiva.models.scdiffusion`.
    folder
        Where the models go, one folder per seed; an interrupted training resumes from there. None: they are not kept.
    """

    def fit_and_generate(train: AnnData, wanted: Mapping[str, int], seed: int) -> AnnData:
        import pandas as pd

        from scdiva.tasks.latent_generation import generate_latent, plan_latent_cells

        config = PRESETS[preset]
        family = "scdiffusion" if preset == "native" else f"scdiffusion_{preset}"
        out = None if folder is None else folder / f"{family}-seed-{seed}"
        model = fit_scdiffusion(
            train,
            [labels_key],
            out,
            config=config,
            settings=settings,
            # ours is told the label; the published denoiser has to be guided to it
            with_classifiers=config.architecture == "published",
            min_cells=1,
            seed=seed,
            device="cpu",
            progress=False,
        ).model
        table = pd.DataFrame({labels_key: [label for label, n in wanted.items() for _ in range(n)]})
        cells = generate_latent(model, plan_latent_cells(model, table, None, sampler=sampler, seed=seed))
        return named_as(cells, train, model.vocabulary)

    return fit_and_generate


def scdiffusion_parity_generator(
    labels_key: str, **options: Any
) -> Callable[[AnnData, Mapping[str, int], int], AnnData]:
    """Return what evaluations call, with the published networks; see :func:`scdiffusion_generator`."""
    return scdiffusion_generator(labels_key, preset="parity", **options)


_HELDOUT_SHARE = 0.1


def loop_config(
    part: str, n_cells: int, *, architecture: str = "latent-diffusion", seed: int = 0, device: str = "auto"
) -> LoopConfig:
    """Return the settings of the training loop of one part for so many cells.

    Chosen on two sets of 2,600 and 3,500 cells (docs/scdiffusion.md). Every part stops when its held-out loss no longer
    gains, and keeps the weights that were best: a denoiser that trains on learns the training cells by heart.

    Parameters
    ----------
    part
        "autoencoder", "denoiser" or "classifier".
    n_cells
        Cells that are trained on.
    architecture
        "latent-diffusion", or "published": optimisers, rates and averages as published, but steps for a
        laptop; published are 150,000 of the autoencoder, 600,000 of the denoiser and 200,000 of a classifier. With its
        fewer steps the denoiser has ten times the published rate (our decision).
    seed, device
        Go into the settings.
    """
    if architecture == "published":
        return _published_loop(part, n_cells, seed=seed, device=device)
    steps, batch, lr, ema, every, patience = {
        "autoencoder": (1500, 128, 1e-3, 0.99, 50, 6),
        "denoiser": (6000, 256, 1e-3, 0.995, 250, 5),
        "classifier": (1500, 256, 1e-3, 0.99, 100, 5),
    }[part]
    batch = int(np.clip(n_cells // 4, 8, batch))
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "data": {"heldout_fraction": _HELDOUT_SHARE, "block_size": 1},
            "optim": {"lr": lr, "warmup_steps": 50, "ema_decay": ema, "gene_lr_ratio": 10.0},
            "training": {
                "max_steps": steps,
                "batch_size": batch,
                "validate_every": every,
                "patience": patience,
                "checkpoint_every": 500,
                "log_every": 50,
                "device": device,
            },
        }
    )


def _published_loop(part: str, n_cells: int, *, seed: int, device: str) -> LoopConfig:
    steps, lr, decay, schedule, ema, every = {
        "autoencoder": (600, 5e-4, 0.01, "constant", 0.0, 50),
        # published is 1e-4, at which these steps learn no more of z than its variance
        "denoiser": (6000, 1e-3, 1e-4, "linear", 0.9999, 250),
        "classifier": (2000, 3e-4, 0.0, "constant", 0.0, 100),
    }[part]
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "data": {"heldout_fraction": _HELDOUT_SHARE, "block_size": 1},
            "optim": {
                "lr": lr, "weight_decay": decay, "betas": (0.9, 0.999), "schedule": schedule, "final_lr_ratio": 0.0,
                "warmup_steps": 0, "clip_norm": 0.0, "ema_decay": ema,
            },
            "training": {
                "max_steps": steps, "batch_size": int(np.clip(n_cells // 4, 8, 128)), "validate_every": every,
                "checkpoint_every": 500, "log_every": 50, "device": device,
            },
        }
    )  # fmt: skip


def _settings_by_part(settings: Sequence[str]) -> dict[str, list[str]]:
    """Sort settings by the part that they begin with; keys are checked before anything is read."""
    by_part: dict[str, list[str]] = {}
    for entry in settings:
        part, _, rest = entry.partition(".")
        if part not in PARTS or rest.startswith(("data.files", "data.conditions", "data.root", "seed")):
            raise ConfigError(
                f"the setting {entry!r}",
                expected=f"one that begins with {' or '.join(PARTS)}, then a key of optim, training or data",
                fix="for example denoiser.training.max_steps=2000",
            )
        if rest.partition("=")[0].replace(" ", "") == "data.heldout_fraction":
            raise ConfigError(
                f"the setting {entry!r}",
                expected=f"none: all parts hold out the same {_HELDOUT_SHARE:.0%} of the cells",
                fix="leave it out",
            )
        by_part.setdefault(part, []).append(rest)
    for part, entries in by_part.items():
        apply_overrides(loop_config(part, 1000), entries)
    return by_part


@dataclass(frozen=True, slots=True)
class _Run:
    """What all parts of a run share."""

    cells: CellCounts
    cells_hash: str
    train: NDArray[np.int64]
    heldout: NDArray[np.int64]
    name: str
    out: Path
    settings: Mapping[str, Sequence[str]]
    seed: int
    device: str
    progress: bool
    start_from: str = ""

    def fit(
        self,
        part: str,
        objective: Objective,
        sizes: ScDiffusionConfig,
        *,
        kind: str | None = None,
        train: NDArray[np.int64] | None = None,
        heldout: NDArray[np.int64] | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> FitResult:
        """Train one part; the objective holds the best weights afterwards."""
        # deferred: Lightning takes a second
        from scdiva.training import fit

        train = self.train if train is None else train
        heldout = self.heldout if heldout is None else heldout
        usual = loop_config(
            kind or part, train.size, architecture=sizes.architecture, seed=self.seed, device=self.device
        )
        loop = apply_overrides(usual, self.settings.get(kind or part, ()))
        if part == "autoencoder":
            self._refuse_another_z(loop)
        began = time.monotonic()
        result = fit(
            objective,
            NamedCells(self.cells, self.name),
            train_indices=train,
            heldout_indices=heldout,
            config=loop,
            out_dir=self.out / part,
            identity={
                "content_of_the_cells": self.cells_hash,
                "sizes": sizes.model_dump_json(),
                **({"model_to_start_from": self.start_from} if self.start_from else {}),
                **(identity or {}),
            },
            progress=self.progress,
        )
        log.info("%s: kept step %d of %d; %.0f s", part, result.best_step, result.last_step, time.monotonic() - began)
        return result

    def _refuse_another_z(self, loop: LoopConfig) -> None:
        """Refuse to train the autoencoder on where the other parts have begun: they are of its z as it was."""
        path = self.out / "autoencoder" / "config.toml"
        if not ((self.out / "denoiser" / "config.toml").exists() and path.exists()):
            return
        saved = load_config(path, LoopConfig)
        changed = {"training.max_steps", "training.max_minutes"} & set(changed_keys(saved, loop))
        if changed:
            raise TrainingError(
                f"{self.out} holds a denoiser, and the autoencoder would get another {' and '.join(sorted(changed))}",
                expected="the autoencoder that the denoiser was trained with",
                fix="choose another folder for a new run, or set the old values to go on with this one",
            )


def _fit_classifier(
    run: _Run,
    classifier: AnyClassifier,
    table: LatentTable,
    labels: ConditionLabels,
    field: str,
    sizes: ScDiffusionConfig,
) -> FitResult:
    column = labels.fields.index(field)
    code = run.cells.condition[:, column]
    n_cells = np.bincount(code[code > 0] - 1, minlength=len(labels.labels(field)))
    # every label weighs alike, and the mean weight of a cell is 1
    weight = (n_cells.sum() / np.maximum(n_cells, 1) / n_cells.size).astype(np.float32)
    if sizes.architecture == "published":
        weight = np.ones_like(weight)
    objective = ClassifierObjective(
        classifier,
        table,
        column,
        sizes.n_times,
        weight,
        schedule=sizes.schedule,
        guided_times=sizes.guided_times,
    )
    return run.fit(
        f"classifier-{_folder_name(field)}",
        objective,
        sizes,
        kind="classifier",
        train=run.train[code[run.train] > 0],
        heldout=run.heldout[code[run.heldout] > 0],
        identity={"condition": field, **_trained_on(table)},
    )


def _trained_on(table: LatentTable) -> dict[str, str]:
    return {"latents_of_the_autoencoder_or_codec": _hash_of(table.z)}


def _folder_name(field: str) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in field)
    # "cell type" and "cell/type" are two fields
    return name if name == field else f"{name}-{hashlib.sha256(field.encode()).hexdigest()[:8]}"


def _opened(
    data: DataLike, conditions: Sequence[str], layer: str | None, min_cells: int
) -> tuple[CountsReader, ConditionLabels]:
    """Open the counts over the genes that enough cells express, with the labels of the conditions."""
    source = open_source(data)
    reader = open_counts(source, GeneVocabulary.default(), layer=layer)
    labels = _labels_of(reader, conditions, min_cells)
    n_detected = np.zeros(reader.alignment.vocabulary.n_genes, dtype=np.int64)
    for first in range(0, source.n_cells, _BLOCK):
        block = reader.read(np.arange(first, min(first + _BLOCK, source.n_cells)))
        n_detected += np.bincount(block.counts.indices, minlength=n_detected.size)
    is_seen = n_detected >= MIN_CELLS_PER_GENE
    if not is_seen.any():
        raise SourceError(
            f"{source.name}: no gene is detected in {MIN_CELLS_PER_GENE} cells",
            expected="raw counts of whole transcriptomes",
            fix="check that this is the right file (scdiva check)",
        )
    vocabulary = reader.alignment.vocabulary.subset(is_seen)
    # how much of the file the whole vocabulary covers was looked at above
    return open_counts(source, vocabulary, layer=layer, min_coverage=0.0, conditions=labels), labels


def _labels_of(reader: CountsReader, conditions: Sequence[str], min_cells: int) -> ConditionLabels:
    """Collect labels; refuse those of too few cells."""
    if not conditions:
        return ConditionLabels.none()
    named = {field: field for field in conditions}
    labels, report = collect_labels([(reader, None)], conditions, [named])
    for line in report.lines():
        log.info("%s", line)
    for field in labels.fields:
        code = labels.codes(field, reader.source.column(field))
        n_cells = np.bincount(code, minlength=len(labels.labels(field)) + 1)[1:]
        rare = [f"{label!r} ({n})" for label, n in zip(labels.labels(field), n_cells, strict=True) if n < min_cells]
        if rare:
            raise ConfigError(
                f"{reader.source.name}: {len(rare)} label{'s' if len(rare) > 1 else ''} of {field} with too few cells: "
                f"{', '.join(rare[:10])}{' ...' if len(rare) > 10 else ''}",
                expected=f"at least {min_cells} cells of each label",
                fix="merge labels, empty them (such cells count as unknown), leave the cells out, or lower the minimum "
                "(--min-cells)",
            )
    return labels


def _refuse_few_labelled(
    cells: CellCounts,
    train: NDArray[np.int64],
    heldout: NDArray[np.int64],
    labels: ConditionLabels,
    classified: Sequence[str],
) -> None:
    """Refuse fields whose classifier nothing could be held out for, before anything is trained."""
    for field in classified:
        is_labelled = cells.condition[:, labels.fields.index(field)] > 0
        n_train, n_heldout = int(is_labelled[train].sum()), int(is_labelled[heldout].sum())
        if not (n_train and n_heldout):
            raise ConfigError(
                f"{n_train + n_heldout} of {cells.n_cells} cells have a label of {field}: {n_train} of the "
                f"{train.size} to train on, {n_heldout} of the {heldout.size} held-out ones",
                expected="some of both, for its classifier",
                fix="label more cells, take another seed (--seed), or fit without classifiers (--no-classifiers)",
            )


def _trainable(reader: CountsReader) -> CellCounts:
    """Read all cells that have counts; positions in the result are their ``cell_index``."""
    cells = reader.read(np.arange(len(reader)))
    kept = np.flatnonzero(np.diff(cells.counts.indptr) > 0)
    if kept.size < cells.n_cells:
        log.warning("%s: %d cells without counts are left out", reader.source.name, cells.n_cells - kept.size)
    if kept.size < MIN_CELLS_IN_ALL:
        raise SourceError(
            f"{reader.source.name} has {kept.size} cells with counts",
            expected=f"at least {MIN_CELLS_IN_ALL}; thousands are usual",
            fix="give a file with more cells",
        )
    return replace(cells.take(kept), cell_index=np.arange(kept.size, dtype=np.int64))


def _without_isolated(cells: CellCounts, name: str) -> tuple[CellCounts, int]:
    cells, n_capped = cap_isolated(cells)
    log.info("%s: %d counts far beyond all others of their gene are set back", name, n_capped)
    return cells, n_capped


def _depth(cells: CellCounts) -> NDArray[np.int64]:
    return np.asarray(cells.counts.sum(axis=1)).ravel().astype(np.int64)


def _table(networks: Networks, codec: LatentCodec | None, cells: CellCounts, seed: int) -> LatentTable:
    """Look-up of z of all cells, standardised; of a codec several views of each."""
    if codec is None:
        z = _latents(networks.autoencoder, cells)
    else:
        z = networks.codec_head.standardised(view_latents(codec, cells, seed))
    return LatentTable(z, networks.told_depth(_depth(cells)))


def _raw_latents(autoencoder: Autoencoder, cells: CellCounts) -> NDArray[np.float32]:
    return _in_blocks(cells, autoencoder.raw_latent)


def _latents(autoencoder: AnyAutoencoder, cells: CellCounts) -> NDArray[np.float32]:
    return _in_blocks(cells, autoencoder.encode)


@torch.no_grad()
def _in_blocks(cells: CellCounts, encode: Any) -> NDArray[np.float32]:
    blocks = (np.arange(i, min(i + _BLOCK, cells.n_cells)) for i in range(0, cells.n_cells, _BLOCK))
    return np.concatenate([encode(SparseCells.pack(cells.take(rows))).float().numpy() for rows in blocks])


def _some_blocks(cells: CellCounts, seed: int) -> Iterator[SparseCells]:
    rng = np.random.default_rng([seed, _CALIBRATION_STREAM])
    chosen = np.sort(rng.permutation(cells.n_cells)[:_CALIBRATION_CELLS])
    for first in range(0, chosen.size, _BLOCK):
        yield SparseCells.pack(cells.take(chosen[first : first + _BLOCK]))


def _population(z: NDArray[np.float32], cells: CellCounts, seed: int, codec: LatentCodec | None) -> Population:
    """Sizes of the training cells; a Gaussian mixture of z beside them, as in every bundle that generates."""
    rng = np.random.default_rng([seed, _POPULATION_STREAM])
    sizes = np.stack([_depth(cells), np.diff(cells.counts.indptr)], axis=1)
    view_share = 1.0 if codec is None else codec.view_share
    return Population(
        CellSizes.of([cells], rng), MixturePrior.fit(z, sizes, cells.condition, seed, view_share=view_share)
    )


def _record(
    reader: CountsReader, trained: CellCounts, n_heldout: int, fits: Mapping[str, FitResult], seed: int
) -> dict[str, Any]:
    return {
        "n_cells": trained.n_cells,
        "n_heldout": int(n_heldout),
        "heldout": "cells at random",
        "n_cells_seen": sum(fit.n_cells for fit in fits.values()),
        "n_steps": sum(fit.last_step for fit in fits.values()),
        "best_step": sum(fit.best_step for fit in fits.values()),
        "kept_steps": {part: fit.best_step for part, fit in fits.items()},
        "seed": seed,
        "sources": [
            {
                "name": reader.source.name,
                "n_cells": reader.source.n_cells,
                "n_genes": reader.alignment.n_vocabulary_genes_present,
                "coverage": float(_depth(trained).sum() / max(float(trained.library_size.sum()), 1.0)),
                "licence": "the user's own data",
            }
        ],
    }


def _refuse_foreign_bundle(out_dir: str | Path | None, mark: str) -> None:
    """Refuse a bundle that no such run of the folder has made: it is somebody's model, and is not replaced.

    ``mark`` is the pattern of a file that such runs leave.
    """
    if out_dir is None:
        return
    out = Path(out_dir)
    if (out / BUNDLE).exists() and not any(out.glob(mark)):
        raise OutputError(
            f"{out / BUNDLE} exists, and no run of {out} has made it", expected="a new folder", fix="name another one"
        )


def _content_hash(cells: CellCounts) -> str:
    return _hash_of(cells.counts.indptr, cells.counts.indices, cells.counts.data, cells.condition)


def _hash_of(*arrays: NDArray[Any]) -> str:
    """Return a sha256 of types, shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        # of contiguous arrays both are views: nothing is copied
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()
