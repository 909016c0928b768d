"""Plots. ``sd.pl``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scdiva.errors import KeyNotFoundError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["umap"]


def umap(adata: AnnData, path: str | Path, *, color: str, basis: str = "X_umap", title: str | None = None) -> None:
    """Draw a two-dimensional embedding coloured by a column of ``.obs``, with the labels on the plot.

    Parameters
    ----------
    adata
        With ``.obsm[basis]``.
    path
        PNG to write.
    color
        Column of ``.obs`` with categories.
    basis
        Slot in ``.obsm`` with two columns.
    title
        Title of the picture.

    Raises
    ------
    KeyNotFoundError
        The slot or the column does not exist.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from scdiva.data.output import replacing

    for kind, key, there in ((".obsm", basis, adata.obsm.keys()), (".obs", color, adata.obs.columns)):
        if key not in there:
            raise KeyNotFoundError(
                f"no {kind}[{key!r}]", expected=f"one of {', '.join(map(str, there)) or 'none'}", fix="compute it first"
            )
    points = np.asarray(adata.obsm[basis])[:, :2]
    labels = adata.obs[color].astype(str).to_numpy()
    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted(set(labels))
    palette = colormaps["tab20"] if len(names) > 10 else colormaps["tab10"]
    for i, name in enumerate(names):
        chosen = points[labels == name]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=4, color=palette(i % palette.N), linewidths=0)
        centre = np.median(chosen, axis=0)
        axes.annotate(
            name,
            centre,
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.7},
        )
    axes.set(xticks=[], yticks=[], xlabel=basis.removeprefix("X_") + " 1", ylabel=basis.removeprefix("X_") + " 2")
    axes.set_title(title or f"{adata.n_obs:,} cells by {color}")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")
