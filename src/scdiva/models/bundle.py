"""Bundles: a model as a folder of plain files, checked by hash, read strictly.

====================== ====================================================================================
``config.json``        family, sizes, what was trained on what, which heads are trained, held-out metrics
``model.safetensors``  the weights
``vocabulary.tsv``     the genes, in the order of the weights
``gene_statistics.npz`` population statistics of the training corpus (no pickle)
``labels.json``        names of conditions and classes
``population.npz``     sizes of the training cells and a prior over z, for generation (not in every bundle)
``codec/``             a whole bundle: the model whose z a latent diffusion draws, or that a model of perturbations
                       stands on (not in every bundle)
``README.md``          model card, generated from ``config.json``
``manifest.json``      sha256 of each file above
====================== ====================================================================================

Nothing is ever filled in: a missing file, a wrong hash, a missing or additional tensor or a wrong shape raises a
BundleError that names it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import replacing
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, OutputError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import Population

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Version of the folder's layout."""

CONFIG, WEIGHTS, VOCABULARY, STATISTICS = "config.json", "model.safetensors", "vocabulary.tsv", "gene_statistics.npz"
LABELS, CARD, MANIFEST = "labels.json", "README.md", "manifest.json"
FILES = (CONFIG, WEIGHTS, VOCABULARY, STATISTICS, LABELS, CARD)
POPULATION = "population.npz"
"""In bundles that can generate; listed in the manifest where it is there."""
CODEC = "codec"
"""Bundle within a bundle; its manifest is listed in the manifest where it is there, and lists its own files."""
_CODEC_MANIFEST = f"{CODEC}/{MANIFEST}"

BUNDLED = ("scdiva-blood-tiny", "scdiva-blood-tiny-celltype")
"""Names of the models that come with the package."""


@dataclass(frozen=True, slots=True)
class BundleContent:
    """Everything in a bundle but the weights.

    Parameters
    ----------
    config
        Content of ``config.json``: ``family``, ``model``, ``vocabulary_fingerprint``, ``training``, ``metrics``,
        ``trained_heads``.
    vocabulary, statistics
        Genes and their statistics in the training corpus.
    labels
        Condition and class names.
    population
        What generation draws sizes and z from; None where the bundle has none.
    path
        The folder.
    hash
        sha256 over the manifest: names this very model in provenance.
    """

    config: Mapping[str, Any]
    vocabulary: GeneVocabulary
    statistics: GeneStatistics
    labels: Mapping[str, list[str]]
    population: Population | None
    path: Path
    hash: str

    @property
    def name(self) -> str:
        """The model's name, or that of its folder."""
        return str(self.config.get("name") or self.path.name)


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model; BundleError lists those there are."""
    if name not in BUNDLED:
        raise BundleError(
            f"no bundled model is called {name!r}", expected=f"one of {', '.join(BUNDLED)}", fix="correct the name"
        )
    return Path(str(importlib.resources.files("scdiva") / "presets" / name))


def find_bundle(name_or_path: str | Path) -> Path:
    """Find a bundle: a bundled name, a folder, or a Hugging Face Hub id ("owner/name", downloaded on request).

    Raises
    ------
    BundleError
        It is none of these, or the Hub has no such model.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    text = str(name_or_path)
    if text in BUNDLED:
        return bundled_path(text)
    # a Hub name may hold a dot ("owner/model-v1.5"): only what is plainly a file is kept from the network
    is_file_name = path.suffix.lower() in (".h5ad", ".h5", ".zarr", ".toml", ".json", ".safetensors", ".pt", ".ckpt")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and not is_file_name and not path.parent.is_dir():
        return _download(text)
    raise BundleError(
        f"{text!r} is no model",
        expected=f"a bundled name ({', '.join(BUNDLED)}), a bundle folder, or a Hugging Face Hub id owner/name",
        fix="check the spelling or the path",
    )


def _download(repo_id: str) -> Path:
    # deferred: the Hub is asked only when a Hub id is named
    from huggingface_hub import snapshot_download

    try:
        names = [*FILES, POPULATION, MANIFEST]
        return Path(snapshot_download(repo_id, allow_patterns=[*names, *(f"{CODEC}/{name}" for name in names)]))
    except Exception as error:  # network, authentication and name errors come in many classes
        raise BundleError(
            f"the Hugging Face Hub gave no model {repo_id!r} ({type(error).__name__})",
            expected="a public repository that holds a scdiva bundle, and a network connection",
            fix="check the id, or download the folder and give its path",
        ) from error


def write_bundle(
    path: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    vocabulary: GeneVocabulary,
    statistics: GeneStatistics,
    labels: Mapping[str, list[str]],
    card: str,
    population: Population | None = None,
    codec: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bundle, whole or not at all.

    ``codec`` writes the bundle within it; all else is what the files hold.

    Raises
    ------
    OutputError
        The folder exists and ``overwrite`` is False, or is something else than a bundle.
    """
    from safetensors.torch import save_file

    if path.exists() and not (overwrite and (path / MANIFEST).exists()):
        raise OutputError(
            f"{path} exists{'' if (path / MANIFEST).exists() else ' and is no bundle'}",
            expected="a new folder",
            fix="name another folder, or remove it" + (" or pass overwrite" if (path / MANIFEST).exists() else ""),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.mkdir()
        full = {"format": FORMAT, **config, "vocabulary_fingerprint": vocabulary.fingerprint}
        (partial / CONFIG).write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / WEIGHTS)
        vocabulary.write_tsv(partial / VOCABULARY)
        statistics.save(partial / STATISTICS)
        (partial / LABELS).write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        names = [*FILES]
        if population is not None:
            population.save(partial / POPULATION)
            names.append(POPULATION)
        if codec is not None:
            codec(partial / CODEC)
            names.append(_CODEC_MANIFEST)
        hashes = {name: _sha256(partial / name) for name in names}
        (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            if file.is_dir():  # wrote its own files in the same way
                continue
            file.chmod(0o644)  # safetensors writes private files
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def read_bundle(path: Path) -> BundleContent:
    """Read and verify a bundle, without its weights.

    Raises
    ------
    BundleError
        A file is missing, a hash differs, the layout is of another version, or the parts do not fit each other.
    """
    _verify(path)
    config, labels = _read_object(path / CONFIG), _read_object(path / LABELS)
    if config.get("format") != FORMAT:
        raise BundleError(
            f"{path} has bundle format {config.get('format')!r}",
            expected=f"format {FORMAT}",
            fix="use the scdiva version that wrote it, or a newer one",
        )
    absent = [key for key in ("family", "model", "vocabulary_fingerprint") if key not in config]
    if absent:
        raise BundleError(f"{path / CONFIG} lacks {', '.join(absent)}", expected="a bundle", fix="fetch it again")
    vocabulary = GeneVocabulary.read_tsv(path / VOCABULARY)
    if vocabulary.fingerprint != config["vocabulary_fingerprint"]:
        raise BundleError(
            f"the vocabulary of {path} has fingerprint {vocabulary.fingerprint[:12]}",
            expected=f"{config['vocabulary_fingerprint'][:12]}, which the model was trained with",
            fix="vocabulary and weights belong together: fetch the bundle again",
        )
    statistics = GeneStatistics.load(path / STATISTICS)
    if statistics.n_genes != vocabulary.n_genes:
        raise BundleError(
            f"{path}: statistics of {statistics.n_genes} genes",
            expected=f"{vocabulary.n_genes}, one per gene of the vocabulary",
            fix="fetch the bundle again",
        )
    population = None
    if POPULATION in _read_object(path / MANIFEST):
        population = Population.load(path / POPULATION)
        n_genes, n_fields = population.sizes.is_measured.shape[1], population.sizes.condition.shape[1]
        if (n_genes, n_fields) != (vocabulary.n_genes, len(labels)):
            raise BundleError(
                f"{path / POPULATION} is of {n_genes} genes and {n_fields} condition fields",
                expected=f"{vocabulary.n_genes} genes and {len(labels)} fields",
                fix="fetch the bundle again",
            )
    return BundleContent(config, vocabulary, statistics, labels, population, path, bundle_hash(path))


def read_codec(path: Path) -> BundleContent:
    """Read and verify the bundle within a bundle.

    Raises
    ------
    BundleError
        The manifest lists none, or it is damaged.
    """
    if _CODEC_MANIFEST not in _read_object(path / MANIFEST):
        raise BundleError(
            f"the manifest of {path} lists no {_CODEC_MANIFEST}", expected="a codec", fix="fetch the bundle again"
        )
    return read_bundle(path / CODEC)


def family_of(path: Path) -> str:
    """Return the family that a bundle says it is of, unverified; empty where nothing says so."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # who reads the bundle in earnest says what is wrong with it
        return ""
    return str(config.get("family", "")) if isinstance(config, dict) else ""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a verified bundle."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(
            f"{path / WEIGHTS} is damaged ({error})", expected="a safetensors file", fix="fetch the bundle again"
        ) from error


def load_strictly(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load weights into a module; every tensor of both sides must find its partner of the same shape.

    Raises
    ------
    BundleError
        Names the tensors that are missing, left over or of another shape. The module stays as it was.
    """
    own = module.state_dict()
    missing, left_over = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    misfit = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or left_over or misfit:
        parts = [
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not in the model", left_over), ("of another shape", misfit))
            if names
        ]
        raise BundleError(
            f"the weights of {path} do not fit ({'; '.join(parts)})",
            expected="the tensors of the configuration in the bundle",
            fix="the bundle belongs to another version or is damaged: fetch it again",
        )
    # bundles may be stored in bfloat16; arithmetic is float32 unless autocast says otherwise
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in weights.items()}, strict=True)


def bundle_hash(path: Path) -> str:
    """Return the sha256 over the manifest of a bundle."""
    return _sha256(path / MANIFEST)


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        raise BundleError(f"{file} is no JSON ({error})", expected="a bundle", fix="fetch it again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file} holds a {type(value).__name__}", expected="a JSON object", fix="fetch it again")
    return value


def _verify(path: Path) -> None:
    if not (path / MANIFEST).exists():
        raise BundleError(
            f"{path} is no bundle (no {MANIFEST})",
            expected=f"a folder with {', '.join(FILES)} and {MANIFEST}",
            fix=f"did you mean {path / 'bundle'}?"
            if (path / "bundle" / MANIFEST).exists()
            else "give the folder that training or save_pretrained wrote",
        )
    hashes = _read_object(path / MANIFEST)
    for name in (*FILES, *(name for name in (POPULATION, _CODEC_MANIFEST) if name in hashes)):
        file = path / name
        if not file.exists():
            raise BundleError(f"{file} is missing", expected="a complete bundle", fix="fetch the bundle again")
        if name not in hashes or _sha256(file) != hashes[name]:
            raise BundleError(
                f"{file} is not the file that the manifest describes (sha256 differs)",
                expected="unchanged files",
                fix="fetch the bundle again; to change a model, save it as a new bundle",
            )
    if _CODEC_MANIFEST in hashes:
        _verify(path / CODEC)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
