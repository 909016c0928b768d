"""``tl.augment``: rare types filled up with generated cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scdiva.tasks.augment import Target
from scdiva.tasks.augment import augment as _augment

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.models.scdiffusion import ScDiffusion


def augment(
    adata: DataLike,
    label_key: str,
    *,
    target: Target,
    model: ScDiffusion | None = None,
    weight: float = 1.0,
    layer: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> AnnData:
    """Add generated cells to every type of fewer than ``target`` cells.

    Parameters
    ----------
    adata
        Raw counts of human genes.
    label_key
        Column of ``.obs`` with the types.
    target
        Cells that each type is to have: a number, ``"max"`` or ``"median"`` of the types' sizes, or a number by type.
    model
        A latent diffusion that takes ``label_key`` as a condition; None: one is fitted to these cells.
    weight
        Classifier-free guidance weight of the type; 1 is plain conditioning.
    layer
        Where the counts are; found if left out.
    seed
        Equal seeds give equal cells.
    device
        Where to fit: "auto", "cpu" or "cuda".

    Returns
    -------
    AnnData
        A new one: the real cells, then generated ones (``.obs["scdiva_synthetic"]``), over the genes that data and
        model share. See :func:`scdiva.tasks.augment.augment`.

    Raises
    ------
    KeyNotFoundError, ConfigError, UnsupportedError, SourceError, ScaleError, GeneError
        An unknown column or type, an impossible target, nothing to fill up, types of fewer than ten cells without a
        model, a model that does not know the types, or data that cannot be used.
    """
    return _augment(adata, label_key, target=target, model=model, weight=weight, layer=layer, seed=seed, device=device)
