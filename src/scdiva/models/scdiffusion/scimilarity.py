"""Weights of a SCimilarity model as the start of the published autoencoder.

SCimilarity (Heimberg et al., Nature 2024) keeps a model as a folder; read here are ``encoder.ckpt`` and
``decoder.ckpt`` (``{"state_dict": ...}``, tensors ``network.LAYER.MODULE.NAME``) and ``gene_order.tsv`` (a symbol per
line, in the order of the encoder's columns and the decoder's rows). Its autoencoder is the published scDiffusion one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.errors import BundleError
from scdiva.genes import GeneVocabulary, align_genes
from scdiva.models.scdiffusion.published import N_HIDDEN_LAYERS, PublishedAutoencoder

_PARTS = ("encoder", "decoder")
_GENES = "gene_order.tsv"
_EXPECTED = "a SCimilarity model folder with encoder.ckpt, decoder.ckpt and gene_order.tsv"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScimilarityReport:
    """What was taken over from a SCimilarity model.

    Parameters
    ----------
    loaded
        Names of the tensors, such as ``encoder.network.1.1.weight``.
    skipped
        The other names, of the folder or of the network, and why.
    n_genes_loaded, n_genes
        Genes of the network that SCimilarity knows, and all its genes.
    content_hash
        sha256 of the three files.
    """

    loaded: tuple[str, ...]
    skipped: Mapping[str, str]
    n_genes_loaded: int
    n_genes: int
    content_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Return what a bundle's ``config.json`` holds."""
        return {
            "loaded": list(self.loaded),
            "skipped": dict(self.skipped),
            "n_genes_loaded": self.n_genes_loaded,
            "n_genes": self.n_genes,
            "content_hash": self.content_hash,
        }


def load_scimilarity(
    autoencoder: PublishedAutoencoder, vocabulary: GeneVocabulary, folder: str | Path
) -> ScimilarityReport:
    """Start an autoencoder at the weights of a SCimilarity model.

    Every tensor is taken over by name, if it has the shape of ours. In the first layer of the encoder and the last of
    the decoder, genes are found by name (:func:`scdiva.genes.align_genes`, aliases and former symbols included);
    genes that SCimilarity does not know keep their start. (The published code drops both layers.)

    Parameters
    ----------
    autoencoder
        It is changed.
    vocabulary
        Its genes.
    folder
        A SCimilarity model folder.

    Raises
    ------
    BundleError
        A file is missing or holds something else than named tensors, or no tensor fits. The autoencoder is unchanged.
    """
    folder = Path(folder)
    missing = [name for name in ("encoder.ckpt", "decoder.ckpt", _GENES) if not (folder / name).is_file()]
    if missing:
        raise BundleError(
            f"{folder} lacks {', '.join(missing)}", expected=_EXPECTED, fix="name the folder of the unpacked model"
        )
    try:
        names = [line.strip() for line in (folder / _GENES).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{folder / _GENES} cannot be read ({error})", expected=_EXPECTED, fix="fetch it again"
        ) from (error)
    while names and not names[-1]:
        names.pop()
    if not names:
        raise BundleError(f"{folder / _GENES} is empty", expected="a gene symbol per line", fix="fetch it again")
    ours, theirs = _genes_in_common(names, vocabulary)
    own = autoencoder.state_dict()
    loaded: list[str] = []
    skipped: dict[str, str] = {}
    new: dict[str, torch.Tensor] = {}
    for part in _PARTS:
        state = _read_state(folder / f"{part}.ckpt")
        wanted = _names_of(part)
        for name, tensor in state.items():
            target = wanted.pop(name, None)
            full = f"{part}.{name}"
            if target is None:
                skipped[full] = "not in the network"
                continue
            is_of_genes = (part, name) in _OF_GENES
            expected = list(own[target].shape)
            if is_of_genes:
                expected[_OF_GENES[part, name]] = len(names)
            if list(tensor.shape) != expected:
                skipped[full] = f"shape {tuple(tensor.shape)} instead of {tuple(expected)}"
            elif is_of_genes and not ours.size:
                skipped[full] = "no gene in common"
            else:
                loaded.append(full)
                new[target] = _aligned(own[target], tensor, _OF_GENES.get((part, name)), ours, theirs)
        skipped |= {f"{part}.{name}": f"not in {part}.ckpt" for name in wanted}
    if not loaded:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise BundleError(
            f"no tensor of {folder} fits ({why})",
            expected="three hidden layers of 1,024 and 128 dimensions of z, as in the published SCimilarity models",
            fix="name another model, or leave it out",
        )
    autoencoder.load_state_dict({**own, **new})
    is_of_shared = any(name in loaded for name in ("encoder.network.0.1.weight", f"decoder.{_LAST}.weight"))
    report = ScimilarityReport(
        tuple(loaded), skipped, int(ours.size) if is_of_shared else 0, vocabulary.n_genes, _hash_of(folder)
    )
    log.info(
        "SCimilarity: %d tensors taken over, %d not; %d of %d genes",
        len(loaded), len(skipped), report.n_genes_loaded, report.n_genes,
    )  # fmt: skip
    for name, reason in skipped.items():
        log.warning("SCimilarity: %s is not taken over: %s", name, reason)
    return report


_LAST = f"network.{N_HIDDEN_LAYERS}"
# tensors with one slice per gene, and the axis of the genes
_OF_GENES = {
    ("encoder", "network.0.1.weight"): 1,
    ("decoder", f"{_LAST}.weight"): 0,
    ("decoder", f"{_LAST}.bias"): 0,
}


def _names_of(part: str) -> dict[str, str]:
    """Return SCimilarity's name of each tensor of a part to ours: its hidden layers begin with a dropout layer.

    The decoder's first one has none.
    """
    tensors = [(0, "weight"), (0, "bias"), (2, "weight")]
    tensors += [(1, name) for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    names = {}
    for layer in range(N_HIDDEN_LAYERS):
        shift = 0 if part == "decoder" and layer == 0 else 1
        for module, name in tensors:
            names[f"network.{layer}.{module + shift}.{name}"] = f"{part}.{layer}.{module}.{name}"
    for name in ("weight", "bias"):
        names[f"{_LAST}.{name}"] = f"{part}.{N_HIDDEN_LAYERS}.{name}"
    return names


def _genes_in_common(names: list[str], vocabulary: GeneVocabulary) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return genes of the vocabulary and their positions among the names; of several positions the best resolved."""
    alignment = align_genes(names, vocabulary)
    columns = {
        gene: min(found, key=lambda column: int(alignment.status[column]))
        for gene, found in alignment.source_of_gene().items()
    }
    return np.array(list(columns), dtype=np.int64), np.array(list(columns.values()), dtype=np.int64)


def _aligned(
    own: torch.Tensor, found: torch.Tensor, axis: int | None, ours: NDArray[np.int64], theirs: NDArray[np.int64]
) -> torch.Tensor:
    found = found.to(own.dtype)
    if axis is None:
        return found
    return own.clone().index_copy_(axis, torch.from_numpy(ours), found.index_select(axis, torch.from_numpy(theirs)))


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes for damage, and for what is not plain tensors
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise BundleError(
            f"{path} cannot be read without running code from it ({why})",
            expected='a torch file of {"state_dict": named tensors}',
            fix='save it anew: torch.save({"state_dict": model.state_dict()}, path)',
        ) from error
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise BundleError(
            f"{path} holds no named tensors under 'state_dict'",
            expected='a torch file of {"state_dict": named tensors}',
            fix='save it anew: torch.save({"state_dict": model.state_dict()}, path)',
        )
    return {str(name): tensor for name, tensor in state.items()}


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("encoder.ckpt", "decoder.ckpt", _GENES):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
