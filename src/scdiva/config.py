"""Configuration of a run: frozen models, read from and written to TOML.

A configuration file names only what differs from the defaults; unknown keys, wrong types and impossible values raise a
:class:`~scdiva.errors.ConfigError` that names the key. Nothing here imports torch.

Build configurations with :func:`load_config`, :func:`parse_config` or :func:`apply_overrides`; these report errors as
``ConfigError``. Calling the classes from Python raises pydantic's ``ValidationError`` instead.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from scdiva.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

# TOML has no null: the empty string stands for "none" in a file.
OptionalName = Annotated[str | None, BeforeValidator(lambda value: None if value == "" else value)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NaturalFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all configuration sections: frozen, strictly typed, without room for unknown keys."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class FileConfig(Section):
    """One file of the training corpus."""

    path: str
    """Path of the file, or of a folder of files, absolute or relative to ``data.root``; ``bundled:pbmc3k`` names a data
    set that comes with the package."""
    layer: OptionalName = None
    """Layer that holds the raw counts; empty: find it."""
    batch_key: OptionalName = None
    """Column of ``.obs`` with the experimental batch (donor, lane); empty: the file is one batch."""
    exclude_batches: tuple[str, ...] = ()
    """Experimental batches that are left out, for example because they are kept for testing."""
    conditions: dict[str, str] = {}
    """Column of ``.obs`` for each field of ``data.conditions``; a field that is not named here is looked for under its
    own name, and is unknown in a file that has no such column."""
    licence: str = ""
    """Where the data come from and under which licence; goes to the model card."""


class DataConfig(Section):
    """Which cells are trained on, and how they are read."""

    root: str = "."
    """Folder that relative paths start from."""
    files: tuple[FileConfig, ...] = ()
    """The files of the corpus."""
    conditions: tuple[str, ...] = ()
    """Fields that the model may be conditioned on, for example ``["cell_type", "tissue"]``."""
    min_coverage: Fraction = 0.5
    """Smallest share of a file's UMIs that the vocabulary must cover."""
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the cells that are never trained on and judge the run."""
    block_size: PositiveInt = 16
    """Neighbouring cells that are read together; larger is faster on disk and shuffles less."""
    fetch_factor: PositiveInt = 16
    """Minibatches that are read at once and shuffled together."""
    num_workers: NaturalInt = 0
    """Processes that read and prepare minibatches; 0: the training process does it."""
    min_cells_per_gene: PositiveInt = 3
    """Genes detected in fewer cells of the corpus are left out of the bundle's vocabulary."""


class OptimConfig(Section):
    """AdamW, its learning rate over time, clipping, and the average of the weights."""

    lr: PositiveFloat = 3e-4
    """Highest learning rate."""
    gene_lr_ratio: PositiveFloat = 1.0
    """Learning rate of weights that hold one number per gene (offsets, dispersions, mean profile), as a multiple of
    ``lr``: each is seen by few cells, and a short run at ``lr`` would leave them where they started."""
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.99)
    """Decay of AdamW's first and second moment."""
    weight_decay: NaturalFloat = 0.01
    """Decoupled weight decay; not applied to norms, biases and embeddings."""
    warmup_steps: NaturalInt = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and line end at ``training.max_steps``."""
    final_lr_ratio: Fraction = 0.05
    """Learning rate at the end of the cosine or line, as a share of ``lr``."""
    clip_norm: NaturalFloat = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    ema_decay: OpenFraction = 0.999
    """Decay of the exponential moving average of the weights; 0: no average."""


class TrainingConfig(Section):
    """How long, on what, and what is kept."""

    max_steps: PositiveInt = 10_000
    """Optimiser steps of the whole run."""
    batch_size: PositiveInt = 128
    """Cells per minibatch and process."""
    accumulate: PositiveInt = 1
    """Minibatches per optimiser step and process: the gradient is the mean over them, the memory that of one."""
    validate_every: PositiveInt = 200
    """Steps between two evaluations on the held-out cells."""
    n_validation_cells: PositiveInt = 4096
    """Largest number of held-out cells that are evaluated."""
    patience: NaturalInt = 0
    """Evaluations without improvement after which the run stops; 0: never."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the network; auto: bf16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    n_devices: PositiveInt = 1
    """Devices (processes) per machine."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work. ddp: each holds the whole model; fsdp: each holds a share of the weights,
    of their average and of the optimiser's state; auto: ddp. Nothing is shared by one process."""
    log_every: PositiveInt = 10
    """Steps between two rows of the log."""
    max_minutes: NaturalFloat = 0.0
    """Minutes of the whole run, over all calls; 0: no limit."""


class LoopConfig(Section):
    """What the training loop needs to know, whatever it trains."""

    seed: NaturalInt = 0
    """Seed of everything random in training; what initial weights do not start at the corpus is equal for all seeds."""
    data: DataConfig = DataConfig()
    """Section ``[data]``."""
    optim: OptimConfig = OptimConfig()
    """Section ``[optim]``."""
    training: TrainingConfig = TrainingConfig()
    """Section ``[training]``."""


def load_config(path: str | Path, model: type[ConfigT] | None = None) -> ConfigT:
    """Read a configuration file.

    Parameters
    ----------
    path
        A TOML file.
    model
        Class of the configuration; :class:`RunConfig` when left out.

    Raises
    ------
    ConfigError
        The file cannot be read, is not TOML, or holds unknown keys, wrong types or impossible values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}",
            expected="a readable TOML file",
            fix="check the path; the folder configs/ of the repository holds examples",
        ) from error
    return parse_config(text, model, source=str(path))


def parse_config(text: str, model: type[ConfigT] | None = None, *, source: str = "the configuration") -> ConfigT:
    """Turn TOML text into a configuration; see :func:`load_config`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{source} is not TOML: {error}",
            expected='lines such as lr = 3e-4 under a section such as [optim]; text in "quotes"',
            fix="correct that line",
        ) from error
    return _validate(values, model or RunConfig, source)  # type: ignore[return-value]


def dump_config(config: BaseModel) -> str:
    """Write a configuration as TOML text, all keys included."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")), multiline_strings=False)


def save_config(config: BaseModel, path: str | Path) -> None:
    """Write a configuration to a TOML file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")


def apply_overrides(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Return the configuration with some values replaced.

    Parameters
    ----------
    config
        Any configuration.
    overrides
        Entries such as ``"optim.lr=3e-4"``: a dotted key and a TOML value; what is not a TOML value is taken as text.
        Items of lists are named by number (``data.files.0.layer=counts``).

    Raises
    ------
    ConfigError
        An entry without ``=``, an unknown key, a wrong type or an impossible value.
    """
    values = _without_none(config.model_dump(mode="json"))
    for entry in overrides:
        key, separator, text = entry.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not separator or not all(parts):
            raise ConfigError(
                f"cannot understand the setting {entry!r}", expected="KEY=VALUE", fix="for example optim.lr=3e-4"
            )
        target: Any = values
        for part in parts[:-1]:
            target = _child(target, part, key)
        if isinstance(target, list):
            _child(target, parts[-1], key)
            target[int(parts[-1])] = _parse_value(text)
        elif isinstance(target, dict):
            target[parts[-1]] = _parse_value(text)
        else:
            raise _no_such_key(key, ())
    return _validate(values, type(config), "the settings")


def changed_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    old_values, new_values = dict(_flatten(old.model_dump(mode="json"))), dict(_flatten(new.model_dump(mode="json")))
    return sorted(
        key
        for key in old_values.keys() | new_values.keys()
        if old_values.get(key, "absent") != new_values.get(key, "absent")
    )


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; put it in place when the block ends without an error.

    Readers see the old file or the whole new one, also after a crash or power failure: the file is flushed to disk
    before the rename, and the folder after it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give back the permissions a plain open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _validate(values: Mapping[str, Any], model: type[ConfigT], source: str) -> ConfigT:
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only there.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key explains other errors, and is the easiest to correct.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        # pydantic names the member of a union on the way; the file does not
        key = ".".join(str(part) for part in first["loc"] if part not in _ARCHITECTURES)
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        if first["type"] == "extra_forbidden":
            known = _keys_at(model, first["loc"][:-1])
            raise _no_such_key(key, known, f" in {source}{more}") from error
        found = "nothing" if first["type"] == "missing" else json.dumps(first["input"], default=str)
        raise ConfigError(
            f"{key or 'the configuration'} = {found} in {source}{more}",
            expected=first["msg"][0].lower() + first["msg"][1:],
            fix=f"correct {key or 'it'}",
        ) from error


def _no_such_key(key: str, known: Sequence[str], where: str = "") -> ConfigError:
    close = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    prefix = key.rpartition(".")[0]
    return ConfigError(
        f"unknown key {key}{where}",
        expected="one of " + ", ".join(known) if known else "a key of the configuration",
        fix=f"did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else "remove it or correct its name",
    )


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the keys of the section at a location of pydantic's error report."""
    section: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        if part in _ARCHITECTURES:
            section = _ARCHITECTURES[part]
            continue
        section = section.model_fields[part].annotation
        # tuple[FileConfig, ...]: the items are the section.
        section = next((a for a in getattr(section, "__args__", ()) if isinstance(a, type)), section)
    return list(section.model_fields)


def _child(target: Any, part: str, key: str) -> Any:
    if isinstance(target, list):
        if not part.isdigit() or int(part) >= len(target):
            raise ConfigError(
                f"unknown key {key}: {part} is not an item of a list of {len(target)}",
                expected=f"a number from 0 to {len(target) - 1}" if target else "a list with items",
                fix="correct the number, or set the whole list",
            )
        return target[int(part)]
    if not isinstance(target, dict) or part not in target:
        raise _no_such_key(key, list(target) if isinstance(target, dict) else ())
    return target[part]


def _parse_value(text: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    # A line break in the text could smuggle in further keys: then it is text.
    return values["value"] if len(values) == 1 else text


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return "" if value is None else value


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _check_heads(width: int, n_heads: int) -> None:
    """Rotary positions turn pairs of dimensions within each head."""
    if width % (2 * n_heads):
        raise ValueError(f"width ({width}) must be a multiple of twice n_heads ({n_heads})")


class TrunkConfig(Section):
    """The transformer of the native model."""

    n_layers: NaturalInt = 0
    """Transformer layers; 0: no trunk, the model is anchor and profile decoder (the simple model)."""
    width: PositiveInt = 192
    """D, width of the tokens; a multiple of twice ``n_heads``."""
    n_heads: PositiveInt = 3
    """Attention heads."""
    n_hidden: PositiveInt = 512
    """Width of the gated feed-forward layers."""
    max_tokens: PositiveInt = 1200
    """L, largest number of gene tokens of a cell that the trunk reads."""
    layout: Literal["set", "sequence"] = "set"
    """set: no positions, one query stands for all hidden genes; sequence: hidden tokens in their places, with RoPE."""
    order: Literal["entropy", "expression", "random"] = "entropy"
    """Which tokens a cell keeps when it has more than L, and their positions in the sequence layout."""
    value_likelihood: Literal["ztnb", "mse"] = "ztnb"
    """ztnb: zero-truncated negative binomial on counts; mse: squared error on log1p(CP10K)."""
    dispersion: Literal["gene", "state"] = "gene"
    """gene: each gene has one dispersion; state: the trunk corrects it by what it knows of the cell. A gene whose
    level depends on the cell type varies much where the type is unknown, and little where it is known."""
    label_offsets: str = ""
    """Condition field of which each label has numbers of its own for every gene (detection; level, slope and dispersion
    of counts), set by calibration; empty: none. With them the simple model of a cell of known type starts at the
    type's own profile."""
    dropout: OpenFraction = 0.0
    """Dropout in the trunk."""

    @model_validator(mode="after")
    def _check(self) -> TrunkConfig:
        _check_heads(self.width, self.n_heads)
        return self


class NativeConfig(Section):
    """The native scDiVa network: anchor, profile decoder and, with layers, the masked-diffusion trunk."""

    architecture: Literal["native"] = "native"
    """Which of the two configurations this is."""
    n_latent: PositiveInt = 128
    """Z, dimensions of the embedding z."""
    n_embedding: PositiveInt = 128
    """E, dimensions of the gene embeddings."""
    n_hidden: PositiveInt = 512
    """Width of the hidden layers of anchor and profile decoder."""
    init: Literal["svd", "random"] = "svd"
    """Start of the gene embeddings: truncated SVD of the corpus, or noise."""
    pooling: Literal["cosine", "centred"] = "cosine"
    """cosine: the encoder reads sums over genes of v_g E_g / |v|; centred: without the norm, minus their mean, as a
    principal component analysis does (models that integration makes)."""
    embedding_std: NaturalFloat = 0.01
    """Standard deviation of the noise in the dimensions that the SVD does not fill."""
    embeds: Literal["latent", "state"] = "latent"
    """What ``embed`` returns. latent: z; state: LayerNorm([z; h_LAT]) of the unmasked cell, ``n_latent + trunk.width``
    numbers (models that the published integration makes; they do not generate from an embedding)."""
    trunk: TrunkConfig = TrunkConfig()
    """Section ``[model.trunk]``."""

    @model_validator(mode="after")
    def _check(self) -> NativeConfig:
        if self.embeds == "state" and not self.trunk.n_layers:
            raise ValueError("embeds = 'state' needs a trunk (trunk.n_layers > 0)")
        return self


class OfficialConfig(Section):
    """The published token model (defaults: exactly its sizes, 94,482,433 parameters)."""

    architecture: Literal["official"]
    """Which of the two configurations this is."""
    n_layers: PositiveInt = 12
    """Transformer layers."""
    width: PositiveInt = 512
    """D, width of tokens and gene embeddings."""
    n_heads: PositiveInt = 8
    """Attention heads."""
    n_hidden: PositiveInt = 2048
    """Width of the gated feed-forward layers."""
    max_tokens: PositiveInt = 1200
    """L, tokens that a cell keeps."""
    dropout: OpenFraction = 0.1
    """Dropout in the trunk."""
    is_head_tied: bool = False
    """Use the gene embeddings as the gene head (the published model does not)."""
    order: Literal["entropy", "expression", "random"] = "entropy"
    """How the tokens of a cell are ranked."""

    @model_validator(mode="after")
    def _check(self) -> OfficialConfig:
        _check_heads(self.width, self.n_heads)
        return self


class DenseConfig(Section):
    """The dense model of the first published version (defaults: exactly its sizes, 93,523,134 parameters)."""

    architecture: Literal["official-dense"]
    """Names this architecture; it cannot be trained here."""
    n_layers: PositiveInt = 12
    """Layers."""
    width: PositiveInt = 512
    """D, width of a cell's one token."""
    n_heads: PositiveInt = 8
    """Attention heads, without effect on a single token."""
    n_hidden: PositiveInt = 2048
    """Width of the gated feed-forward layers."""
    n_latent: PositiveInt = 128
    """Z, dimensions of the latent mean."""
    n_classes: PositiveInt = 100
    """C, classes of the annotation head."""


ModelConfig = NativeConfig | OfficialConfig | DenseConfig
"""Any network that a bundle may hold."""


def _architecture(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "architecture", "native"))
    return str(value.get("architecture", "native")) if isinstance(value, dict) else "native"


TrainableConfig = Annotated[
    Annotated[NativeConfig, Tag("native")] | Annotated[OfficialConfig, Tag("official")],
    Discriminator(_architecture),
]


_ARCHITECTURES: dict[str | int, type[Section]] = {"native": NativeConfig, "official": OfficialConfig}


class NativeObjectiveConfig(Section):
    """The loss of the native model."""

    rho_min: OpenFraction = 0.05
    """Smallest share of the counts that view A holds."""
    rho_max: OpenFraction = 0.95
    """Largest share of the counts that view A holds."""
    kl_weight: NaturalFloat = 0.0
    """Weight of the KL divergence of z from a standard normal."""
    latent_noise: NaturalFloat = 0.0
    """Standard deviation of the noise on z in training."""
    p_split: Fraction = 0.5
    """Share of cells whose z comes from view A while view B is denoised."""
    p_visible: Fraction = 0.3
    """Share of cells that are denoised whole, with z from their visible tokens; the rest has the learned null z."""
    p_whole: Fraction = 0.0
    """Share of cells that are denoised whole, with z from view A of the same cell: for generation from a prior over z,
    which must tell what a cell of full depth looks like. Such cells do not train the profile decoder, and no figure is
    measured on them: their z has seen part of the answer."""
    p_joint: Fraction = 0.4
    """Share of masks that hide genes with their values."""
    p_values: Fraction = 0.3
    """Share of masks that hide values only (imputation)."""
    p_staged: Fraction = 0.2
    """Share of masks that hide genes and, of the visible genes, some values; the rest hides everything."""
    freeze_anchor: bool = False
    """Keep anchor, profile decoder and gene embeddings as they are, and with them every embedding; train the rest."""
    condition_dropout: Fraction = 0.1
    """Probability that a condition field is left out, and, once more, that all are."""
    identity_weight: NaturalFloat = 1.0
    """Weight of the identity term. With ``identity_weight = value_weight = 0`` only anchor and profile decoder are
    trained, on split views."""
    value_weight: NaturalFloat = 1.0
    """Weight of the value term (10 is usual for ``value_likelihood = "mse"``)."""
    profile_weight: NaturalFloat = 1.0
    """Weight of the profile term."""

    @model_validator(mode="after")
    def _check(self) -> NativeObjectiveConfig:
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min ({self.rho_min}) must not be above rho_max ({self.rho_max})")
        if self.freeze_anchor and self.identity_weight == 0 and self.value_weight == 0:
            raise ValueError("freeze_anchor with identity_weight = value_weight = 0 leaves nothing to train")
        if self.p_split + self.p_visible + self.p_whole > 1 + 1e-9:
            raise ValueError("p_split, p_visible and p_whole must not add up to more than 1")
        if self.p_joint + self.p_values + self.p_staged > 1 + 1e-9:
            raise ValueError("p_joint, p_values and p_staged must not add up to more than 1")
        return self


class IntegrationConfig(Section):
    """The loss that takes batches out of an embedding (docs/integration.md)."""

    n_latent: PositiveInt = 24
    """Dimensions of the integrated embedding."""
    n_components: PositiveInt = 50
    """Principal components of the data's own variable genes that the encoder reads."""
    n_hidden: PositiveInt = 256
    """Width of the encoder's hidden layer."""
    temperature: PositiveFloat = 0.3
    """Of the contrastive loss: the smaller, the finer the differences between cells that are kept."""
    n_within: PositiveInt = 15
    """Neighbours of a cell within its batch, one of which may be its partner."""
    n_across: PositiveInt = 20
    """Cells of different batches are mutual nearest neighbours if each is among so many nearest of the other."""
    p_self: Fraction = 0.2
    """Share of cells whose partner is another count-split view of the same cell."""
    p_across: Fraction = 0.5
    """Share of cells whose partner is a mutual nearest neighbour of another batch; the rest has one of its own."""
    n_views: PositiveInt = 4
    """Count-split views of each cell, drawn once, with 40 to 80 % of its molecules."""
    n_kinds: PositiveInt = 40
    """Kinds of cells, found without labels, that are seen equally often; 1: cells are seen as often as they are."""
    contrastive_weight: NaturalFloat = 1.0
    """Weight of the contrastive loss between partners."""
    alignment_weight: NaturalFloat = 3.0
    """Weight of the distances between batches within each cluster of a minibatch."""
    chance_share: Fraction = 0.6
    """Share of those distances that chance explains (centres of few cells lie apart) which is not counted: 1 brings
    batches together and leaves clusters as wide as they are, 0 presses them together as well."""
    n_aligned: PositiveInt = 1024
    """Cells of a minibatch, drawn at random, among which batches are brought together."""
    n_clusters: PositiveInt = 40
    """Clusters of these cells."""
    adversarial_weight: NaturalFloat = 0.0
    """Weight of the batch discriminator with gradient reversal."""
    supcon_weight: NaturalFloat = 1.0
    """Weight of the supervised contrastive loss, where labels are given."""
    has_projection: bool = False
    """Whether contrastive losses read a projection of the embedding (as published), not the embedding itself."""
    stops_early: bool = False
    """Whether held-out labelled cells choose the step, by AvgBIO (as published); else the last one is kept."""
    reconstruction_weight: NaturalFloat = 0.0
    """Weight of reconstruction. Of a whole encoder: the loss that the model is pretrained on (hidden genes, their
    counts, profile); else: the counts of one view given the embedding of the other (profile decoder with an offset per
    batch)."""
    whole_encoder: bool = False
    """Whether the whole network of the model is fine-tuned (as published), read at LayerNorm([z; h_LAT]) of unmasked
    cells, which is then the embedding; else new layers of an anchor are trained. Sizes, components, views, partners and
    kinds above are of the latter."""
    max_tokens: PositiveInt = 64
    """Best-ranked genes of a cell that the trunk of a whole encoder reads; z pools all of them."""
    denoised_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Share of a minibatch that a whole encoder reconstructs: each such cell is a second pass."""

    @model_validator(mode="after")
    def _check(self) -> IntegrationConfig:
        if self.p_self + self.p_across > 1 + 1e-9:
            raise ValueError("p_self and p_across must not add up to more than 1")
        if self.whole_encoder and (self.contrastive_weight > 0 or self.alignment_weight > 0 or self.n_kinds > 1):
            raise ValueError("whole_encoder has no partners: contrastive_weight = alignment_weight = 0 and n_kinds = 1")
        return self

    @classmethod
    def published(cls) -> IntegrationConfig:
        """Return the published protocol: reconstruction, batch adversary, supervised contrast on a projection.

        The whole encoder is trained, which takes a model with a trunk; with ``whole_encoder`` set to False, the same
        loss trains layers of an anchor alone. Weights and sizes that the paper does not state are those of
        docs/integration.md.
        """
        return cls(
            temperature=0.1,
            n_kinds=1,
            contrastive_weight=0.0,
            alignment_weight=0.0,
            adversarial_weight=0.1,
            supcon_weight=0.5,
            has_projection=True,
            stops_early=True,
            reconstruction_weight=0.1,
            whole_encoder=True,
        )


class RunConfig(LoopConfig):
    """A whole pretraining run."""

    name: str = ""
    """Name of the model; written into the bundle."""
    description: str = ""
    """What the model is and is not; goes to the model card."""
    licence: str = ""
    """Licence of the weights (an SPDX name such as apache-2.0)."""
    start_from: str = ""
    """Model to start from (bundled name or folder); empty: start from the corpus. Its genes are kept."""
    model: TrainableConfig = NativeConfig()
    """Section ``[model]``; ``architecture`` says which."""
    objective: NativeObjectiveConfig = NativeObjectiveConfig()
    """Section ``[objective]`` (of the native model; the official one has no settings)."""


class ScDiffusionConfig(Section):
    """The networks of a latent diffusion: autoencoder, denoiser, classifiers (docs/scdiffusion.md)."""

    architecture: Literal["latent-diffusion", "published"] = "latent-diffusion"
    """Whose networks: ours, or those of the publication, which are unconditional (guided by classifiers alone)."""
    codec: Literal["autoencoder", "scdiva"] = "autoencoder"
    """Whose z is drawn: that of an autoencoder of its own, or that of a native scDiVa model, which lies in the
    bundle."""
    n_latent: PositiveInt = 32
    """Z, dimensions of z."""
    n_hidden: PositiveInt = 256
    """Width of the hidden layers of encoder and decoder."""
    width: PositiveInt = 256
    """D, width of the denoiser; even."""
    n_blocks: PositiveInt = 4
    """Residual blocks of the denoiser."""
    classifier_width: PositiveInt = 128
    """Width of each classifier; even."""
    n_times: Annotated[int, Field(ge=2)] = 1000
    """T, steps of the forward process."""
    prediction: Literal["v", "epsilon"] = "v"
    """What the denoiser predicts: the velocity, or the noise."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the signal falls over the times: by a cosine, or by betas from 1e-4 to 0.02 (at T = 1,000)."""
    guided_times: PositiveInt | None = None
    """Classifiers are trained and asked at times below this one; none: at all."""
    guidance: NaturalFloat = 1.0
    """Usual scale of classifier guidance towards a wanted label that the denoiser is not told."""
    fields: tuple[str, ...] = ()
    """Condition fields that the denoiser was trained with, in the order of its tables."""
    classified: tuple[str, ...] = ()
    """Condition fields that have a classifier on noised z."""

    @model_validator(mode="after")
    def _check(self) -> ScDiffusionConfig:
        if self.width % 2 or self.classifier_width % 2:
            raise ValueError("width and classifier_width must be even: half of each time embedding are sines")
        if self.schedule == "linear" and self.n_times <= 20:
            raise ValueError("the linear schedule needs more than 20 times: betas are scaled by 1,000 / T")
        if self.architecture == "published":
            if self.width % 4 or self.n_blocks != 4:
                raise ValueError("the published denoiser has 4 levels, the last of width / 4")
            if self.fields:
                raise ValueError("the published denoiser takes no conditions: fields must be empty")
        return self
