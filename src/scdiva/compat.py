"""The quick start of the published model cards, with the same calls, on models that load or raise.

>>> from scdiva.compat import ScDiVaModel
>>> model = ScDiVaModel.from_pretrained("scdiva-blood-tiny")
>>> latent = model.encode(values)["latent"]  # (n_cells, 41818) log1p(CP10K) in, (n_cells, 128) out

What differs from the published code: a model that cannot be loaded raises instead of being filled with
random weights; the latent is the mean, the same at every call; a task without a trained head raises; input that cannot
be log-normalised expression raises.

Shape letters: B cells, V vocabulary rows, Z latent, C classes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.data.statistics import CP10K
from scdiva.errors import ConfigError, GeneError, ScaleError, UnsupportedError, UntrainedHeadError
from scdiva.genes import FIRST_GENE_ROW, N_ROWS_AFTER_GENES, GeneVocabulary
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.native import NativeNetwork

TASKS = ("annotation", "batch_integration")
"""What :meth:`ScDiVaModel.predict` knows by name."""

LARGEST_VALUE = 50.0
"""Larger values are taken for counts: log1p(CP10K) cannot exceed 9.22."""


class ScDiVaModel:
    """A model behind the calls of the published quick start.

    Native models and converted dense models can be served; the published token model has neither the 128-dimensional
    latent nor the classifier that the quick start asks for.

    Parameters
    ----------
    model
        A loaded model.

    Raises
    ------
    UnsupportedError
        It is a token model.
    """

    def __init__(self, model: ScDiVa) -> None:
        network = model.network
        if not isinstance(network, NativeNetwork | DenseNetwork):
            raise UnsupportedError(
                f"{model.name} is the published token model, which has neither a 128-dimensional latent nor a "
                "classifier",
                expected="a native model or a converted dense model",
                fix="embed counts with scdiva.ScDiVa and scdiva.tl.embed (its latent token has as many dimensions as "
                "the model is wide)",
            )
        if isinstance(network, DenseNetwork):
            network.mark_trained(model.details.get("trained_heads", ()))
        self.model = model
        self._network: NativeNetwork | DenseNetwork = network
        # native models may know fewer genes; their columns are still those of the whole vocabulary
        self._columns = GeneVocabulary.default() if isinstance(network, NativeNetwork) else model.vocabulary

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "cpu") -> Self:
        """Load a model.

        Parameters
        ----------
        name_or_path
            Bundled name, bundle folder, or Hugging Face Hub id of a bundle. A published file of weights is turned into
            a bundle by ``scdiva convert``.
        device
            "cpu", "cuda" or "auto".

        Raises
        ------
        BundleError
            There is no such model, or it is damaged; nothing is filled in.
        UnsupportedError
            It is a token model.
        """
        return cls(ScDiVa.from_pretrained(name_or_path, device=device))

    def eval(self) -> Self:
        """Return the model; it is always in evaluation mode."""
        return self

    def encode(self, x: torch.Tensor | NDArray[Any]) -> dict[str, torch.Tensor]:
        """Encode cells.

        Parameters
        ----------
        x
            ``(n_cells, n_rows)`` log1p(CP10K); column r is row r of the vocabulary (41,818 in all: PAD, MASK, the
            genes, three reserved rows). The columns of the special rows must be zero.

        Returns
        -------
        dict
            ``"latent"``, ``(n_cells, n_latent)`` float32, deterministic; a dense model also has ``"mu"``, the same, and
            ``"logvar"``.

        Raises
        ------
        GeneError
            Another number of columns, or values in the columns of special rows.
        ScaleError
            Values that are negative, not finite, or no log1p(CP10K).

        Warns
        -----
        UserWarning
            Genes with values that the model does not know: they are ignored, and counted. Values above log1p(10,000).
        """
        value_BV = self._checked(x)
        with torch.inference_mode():
            if isinstance(self._network, DenseNetwork):
                mu, logvar = (part.cpu() for part in self._network(torch.from_numpy(value_BV).to(self.model.device)))
                return {"latent": mu, "mu": mu, "logvar": logvar}
            packed = self._packed(value_BV).to(self.model.device)
            return {"latent": self._network.anchor.encode(self._network.pooled(packed)).float().cpu()}

    def predict(self, x: torch.Tensor | NDArray[Any], task: str = "annotation") -> torch.Tensor:
        """Predict from cells.

        Parameters
        ----------
        x
            As in :meth:`encode`.
        task
            "annotation": class logits ``(n_cells, n_classes)``; "batch_integration": reconstructed expression
            ``(n_cells, n_rows)``.

        Raises
        ------
        ConfigError
            There is no such task.
        UntrainedHeadError
            The model has no trained head for it; native models have none.
        GeneError, ScaleError
            As in :meth:`encode`.
        """
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}", expected=f"one of {', '.join(TASKS)}", fix="correct the name")
        if not isinstance(self._network, DenseNetwork):
            raise UntrainedHeadError(
                f"{self.model.name} has no {task} head",
                expected="a model that was trained for this task",
                fix="train a classifier on the latent of labelled cells, or convert a published dense file",
            )
        head = self._network.annotation_logits if task == "annotation" else self._network.reconstruct
        value_BV = torch.from_numpy(self._checked(x)).to(self.model.device)
        with torch.inference_mode():
            return head(self._network(value_BV)[0]).cpu()

    def _checked(self, x: torch.Tensor | NDArray[Any]) -> NDArray[np.float32]:
        """Return the values as float32, or say what is wrong with them."""
        value_BV = np.asarray(x.detach().cpu().float() if isinstance(x, torch.Tensor) else x)
        n_rows = self._columns.n_rows
        if value_BV.ndim != 2 or value_BV.shape[1] != n_rows:
            raise GeneError(
                f"input of shape {value_BV.shape}",
                expected=f"(n_cells, {n_rows}): one column per row of the vocabulary",
                fix="put each gene into the column of its row, or embed an AnnData with scdiva.tl.embed",
            )
        value_BV = value_BV.astype(np.float32)
        _check_values(value_BV)
        special = np.r_[0:FIRST_GENE_ROW, n_rows - N_ROWS_AFTER_GENES : n_rows]
        used = special[(value_BV[:, special] != 0).any(axis=0)]
        if used.size:
            raise GeneError(
                f"values in column {', '.join(map(str, used))}",
                expected="zeros: these rows stand for PAD, MASK, PAD-FILL, BOS and EOS, not for genes",
                fix=f"genes are in columns {FIRST_GENE_ROW} to {n_rows - N_ROWS_AFTER_GENES - 1}",
            )
        return value_BV

    def _packed(self, value_BV: NDArray[np.float32]) -> PackedCells:
        """Pack the values of the genes that the native model knows."""
        gene_of_id = {ensembl_id: gene for gene, ensembl_id in enumerate(self.model.vocabulary.ensembl_id.tolist())}
        gene_of_column = np.array([gene_of_id.get(name, -1) for name in self._columns.ensembl_id.tolist()])
        gene_BG = value_BV[:, FIRST_GENE_ROW:-N_ROWS_AFTER_GENES]
        is_lost = (gene_of_column < 0) & (gene_BG != 0).any(axis=0)
        if is_lost.any():
            warnings.warn(
                f"{int(is_lost.sum()):,} genes with values are unknown to {self.model.name} and ignored; it knows "
                f"{self.model.vocabulary.n_genes:,} of {self._columns.n_genes:,}",
                stacklevel=3,
            )
        known = np.flatnonzero(gene_of_column >= 0)
        own_BG = gene_BG[:, known]
        cell, at = np.nonzero(own_BG)
        n_stored = np.bincount(cell, minlength=len(own_BG))
        return PackedCells(
            gene_N=torch.from_numpy(gene_of_column[known][at]),
            value_N=torch.from_numpy(own_BG[cell, at]),
            offset_B=torch.from_numpy(np.cumsum(n_stored) - n_stored),
        )


def _check_values(value_BV: NDArray[np.float32]) -> None:
    """Refuse what cannot be log1p(CP10K)."""
    how = "log1p(CP10K): scanpy's normalize_total(target_sum=1e4), then log1p"
    if not np.isfinite(value_BV).all():
        raise ScaleError("input with NaN or infinite values", expected=how, fix="remove or replace them")
    smallest, largest = float(value_BV.min(initial=0.0)), float(value_BV.max(initial=0.0))
    if smallest < 0:
        raise ScaleError(
            f"negative values (down to {smallest:.3g})",
            expected=f"{how}; expression cannot be negative",
            fix="give real cells (random numbers such as torch.randn are none), before scaling or centring",
        )
    if largest > LARGEST_VALUE or (largest > 0 and bool((value_BV == np.rint(value_BV)).all())):
        what = f"values up to {largest:g}" if largest > LARGEST_VALUE else "whole numbers only"
        raise ScaleError(f"{what}, which look like raw counts", expected=how, fix="normalise and log-transform them")
    if largest > np.log1p(CP10K) + 1e-3:
        warnings.warn(
            f"values up to {largest:.2f}, but log1p(CP10K) cannot exceed {np.log1p(CP10K):.2f}: is this another scale?",
            stacklevel=4,
        )
