"""A native scDiVa model as what a latent diffusion draws the z of (``scdiva.types.LatentCodec``)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from scdiva.data.statistics import CP10K
from scdiva.models.scdiva.imputation import require_profile_decoder
from scdiva.models.scdiva.model import ScDiVa
from scdiva.types import CellCounts

USUAL_VIEW_SHARE = 0.5
"""Share of a cell's molecules behind z where the model has no prior over z that would say."""


class ScDiVaCodec:
    """z and profile decoder of a native model.

    Parameters
    ----------
    model
        The model; it is not changed.

    Raises
    ------
    UnsupportedError
        The model is not native, or embeds states instead of z.
    UntrainedHeadError
        Its anchor or profile decoder was never trained.
    """

    def __init__(self, model: ScDiVa) -> None:
        model.check_embeds_z("a diffusion of z")
        model.native("a diffusion of z")
        require_profile_decoder(tuple(model.details.get("trained_heads", ())), model.name)
        self.model = model

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "auto") -> Self:
        """Load the model; see :meth:`ScDiVa.from_pretrained`."""
        return cls(ScDiVa.from_pretrained(name_or_path, device=device))

    @property
    def n_latent(self) -> int:
        """Z, dimensions of z."""
        return self.model.n_latent

    @property
    def view_share(self) -> float:
        """Share of a cell's molecules that z is to stand for: that of the model's own prior over z.

        The masked diffusion is told z of a part of the cell: z of a whole one would follow its noise, which the cells
        drawn from it would repeat.
        """
        population = self.model.population
        return USUAL_VIEW_SHARE if population is None else population.prior.view_share

    def encode(self, cells: CellCounts) -> NDArray[np.float32]:
        """Return z of cells as they are, ``(n_cells, Z)``."""
        return self.model.latent(cells)

    def expected_share(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the share of each gene among a cell's UMIs by the profile decoder, ``(n_cells, n_genes)``."""
        return self.model.expected_profile(z, np.arange(self.model.vocabulary.n_genes)) / np.float32(CP10K)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model as a bundle."""
        self.model.save_pretrained(path, overwrite=overwrite)

    def to(self, device: str) -> Self:
        """Move the weights."""
        self.model.to(device)
        return self

    def weights_hash(self) -> str:
        """Fingerprint the weights."""
        return self.model.weights_hash()
