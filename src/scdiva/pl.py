"""Plots. ``sd.pl``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.errors import KeyNotFoundError

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

__all__ = ["generation", "path", "steps", "umap"]


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


def generation(
    real: AnnData, generated: Mapping[str, AnnData], path: str | Path, *, color: str = "cell_type", seed: int = 0
) -> None:
    """Draw real cells beside generated ones: UMAP by type, mean-variance and mean-dropout curves, depth.

    Principal components (of the real cells' 2,000 variable genes, log1p(CP10K)) and UMAP are fitted to all cells
    together: fitted to the real ones alone they would show their noise, which nobody else can have, and put every
    generated cell at the rim. It is a picture, not a test.

    Parameters
    ----------
    real
        Real cells, raw counts in X; best cells that no generator was trained on.
    generated
        Name to generated cells; genes of ``real`` that they lack count as 0. Values that are no whole numbers are
        taken for CP10K.
    path
        PNG to write.
    color
        Column of ``.obs`` with the types, in all of them.
    seed
        Seed of PCA and UMAP.

    Raises
    ------
    KeyNotFoundError
        Somebody lacks the column.
    """
    import numpy as np
    import scipy.sparse as sp
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    from umap import UMAP

    from scdiva.data.output import replacing
    from scdiva.metrics.generation_genes import curve, curve_edges
    from scdiva.metrics.generation_space import ReferenceSpace, variable_genes

    everything = {"real": real, **generated}
    for name, cells in everything.items():
        if color not in cells.obs:
            raise KeyNotFoundError(
                f"the {name} cells have no .obs[{color!r}]",
                expected=f"one of {', '.join(map(str, cells.obs.columns)) or 'none'}",
                fix="write their types there",
            )
    counts = {name: _counts_over(cells, real.var_names) for name, cells in everything.items()}
    types = {name: cells.obs[color].astype(str).to_numpy() for name, cells in everything.items()}
    together = sp.csr_matrix(sp.vstack(list(counts.values())))
    space = ReferenceSpace.fit(together, seed=seed, genes=variable_genes(counts["real"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed leaves it one thread, which it says
        placed = UMAP(n_neighbors=min(15, together.shape[0] - 1), random_state=seed).fit_transform(
            space.project(space.values(together))
        )
    last = np.cumsum([x.shape[0] for x in counts.values()])
    points = dict(zip(counts, np.split(np.asarray(placed), last[:-1]), strict=True))
    figure = Figure(figsize=(4.2 * max(len(points), 3), 8.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    upper, lower = parts
    names = sorted({kind for found in types.values() for kind in found})
    palette = colormaps["tab20"] if len(names) > 10 else colormaps["tab10"]
    stacked = np.concatenate(list(points.values()))
    limits = [(stacked[:, i].min() - 1, stacked[:, i].max() + 1) for i in range(2)]
    panels = np.atleast_1d(upper.subplots(1, len(points), sharex=True, sharey=True))
    for axes, (name, found) in zip(panels, points.items(), strict=True):
        for i, kind in enumerate(names):
            chosen = found[types[name] == kind]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=5, color=palette(i % palette.N), linewidths=0, label=kind)
        axes.set(xticks=[], yticks=[], xlim=limits[0], ylim=limits[1], title=f"{name}: {len(found):,} cells")
    handles, texts = panels[0].get_legend_handles_labels()
    upper.legend(handles, texts, loc="outside lower center", ncols=5, markerscale=3, fontsize=8, frameon=False)
    line = colormaps["Dark2"]
    styles = {name: {"color": "black" if i == 0 else line(i - 1), "label": name} for i, name in enumerate(counts)}
    curves = lower.subplots(1, 4)
    edges = curve_edges(counts["real"], n_bins=min(20, real.n_vars // 20 + 1))
    middle = (edges[1:] + edges[:-1]) / 2
    for name, x in counts.items():
        curves[0].plot(middle, curve(x, "variance", edges), **styles[name])
        curves[1].plot(middle, curve(x, "dropout", edges), **styles[name])
        if np.array_equal(x.data, np.rint(x.data)):  # what knows no counts has no library sizes
            total = np.sort(np.asarray(x.sum(axis=1)).ravel())
            curves[2].plot(total, np.linspace(0, 1, total.size), **styles[name])
        n_genes = np.sort(np.diff(sp.csr_matrix(x).indptr))
        curves[3].plot(n_genes, np.linspace(0, 1, n_genes.size), **styles[name])
    curves[0].set(xlabel="log10 mean CP10K", ylabel="log10 variance", title="mean and variance")
    curves[1].set(xlabel="log10 mean CP10K", ylabel="share of zeros", title="mean and dropout")
    curves[2].set(xlabel="UMIs per cell", ylabel="share of cells", title="library sizes", xscale="log")
    curves[3].set(xlabel="genes per cell", title="genes per cell", xscale="log")
    for axes in curves[2:]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=45)
    for axes in curves:
        axes.spines[["top", "right"]].set_visible(False)
    curves[0].legend(frameon=False, fontsize=8)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def path(
    real: AnnData,
    paths: Mapping[str, AnnData],
    path: str | Path,
    *,
    color: str,
    source: str,
    target: str,
    keys: Sequence[str],
    seed: int = 0,
) -> None:
    """Draw cells on the way from one label to another: where they lie among real ones, and what changes along the way.

    Above, for every method, real cells of the two ends in grey and blue-grey and the path's cells by position, in
    principal components of the real cells (2,000 variable genes, log1p(CP10K)): of the first ten the one along which
    the two ends differ most, and the first of the others. Below, the mean of every key by position (with the standard
    error of the mean), and its level in real cells of both ends.

    Parameters
    ----------
    real
        Real cells, raw counts in X; those of other labels are not drawn.
    paths
        Name of the method to the cells of :func:`scdiva.tl.interpolate`; genes of ``real`` that they lack count as 0.
    path
        PNG to write.
    color
        Column of ``.obs`` of ``real`` with the labels.
    source, target
        Labels of the two ends.
    keys
        What to follow: numeric columns of ``.obs``, in all of them, or genes, as log1p(CP10K).
    seed
        Seed of PCA.

    Raises
    ------
    KeyNotFoundError
        Somebody lacks a column or a gene, or there is no real cell of an end.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from scdiva.data.output import replacing
    from scdiva.metrics.generation_space import ReferenceSpace, log_cp10k

    for name, cells, key in (("real cells", real, color), *((n, c, "scdiva_position") for n, c in paths.items())):
        if key not in cells.obs:
            raise KeyNotFoundError(
                f"the {name} have no .obs[{key!r}]",
                expected=f"one of {', '.join(map(str, cells.obs.columns)) or 'none'}",
                fix="name the column of the labels, and give cells of sd.tl.interpolate",
            )
    labels = real.obs[color].astype(str).to_numpy()
    ends = {end: labels == end for end in (source, target)}
    for end, is_end in ends.items():
        if not is_end.any():
            raise KeyNotFoundError(
                f"no real cell has {color} {end!r}", expected="real cells of both ends", fix="name another label"
            )
    counts = {name: _counts_over(cells, real.var_names) for name, cells in (("real", real), *paths.items())}
    everything = {"real": real, **paths}

    def followed(name: str, key: str) -> Any:
        if key in everything[name].obs:
            return everything[name].obs[key].to_numpy(dtype=float)
        if key not in real.var_names:
            raise KeyNotFoundError(
                f"{key!r} is neither a column of .obs of {name} nor a gene",
                expected="numeric columns or gene names",
                fix="correct the name",
            )
        gene = int(np.flatnonzero(real.var_names == key)[0])
        return np.asarray(log_cp10k(counts[name])[:, [gene]].todense()).ravel()

    values = {key: {name: followed(name, key) for name in everything} for key in keys}
    both = ends[source] | ends[target]
    space = ReferenceSpace.fit(counts["real"][both], seed=seed, n_components=10)
    points = {name: space.project(space.values(x)) for name, x in counts.items()}
    apart = points["real"][ends[target]].mean(axis=0) - points["real"][ends[source]].mean(axis=0)
    along = int(np.argmax(np.abs(apart) / points["real"][both].std(axis=0)))
    shown = [along, 0 if along else 1]
    n_columns = max(len(paths), -(-len(keys) // (1 if len(keys) <= 4 else 2)))
    n_rows = -(-len(keys) // n_columns)
    figure = Figure(figsize=(3.3 * n_columns, 3.4 + 2.4 * n_rows), dpi=95, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.4, 2.4 * n_rows])
    panels = np.atleast_1d(parts[0].subplots(1, len(paths), sharex=True, sharey=True))
    for axes, name in zip(panels, paths, strict=True):
        for is_end, grey in zip(ends.values(), ("0.65", "#b9c9de"), strict=True):
            axes.scatter(*points["real"][is_end][:, shown].T, s=9, color=grey, linewidths=0)
        dots = axes.scatter(
            *points[name][:, shown].T, s=4, c=paths[name].obs["scdiva_position"], cmap="plasma", vmin=0, vmax=1, lw=0
        )
        axes.set(xticks=[], yticks=[], title=name, xlabel=f"component {shown[0] + 1}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"component {shown[1] + 1}")
    bar = parts[0].colorbar(dots, ax=panels, shrink=0.8, ticks=[0, 1])
    bar.ax.set_yticklabels([source, target], fontsize=8, rotation=90, va="center")
    parts[0].suptitle(f"real cells: {source} grey, {target} blue; cells of the path by position", fontsize=9)
    lower = np.atleast_1d(parts[1].subplots(n_rows, n_columns, squeeze=False)).ravel()
    line = colormaps["Dark2"]
    for axes, key in zip(lower, keys, strict=False):
        for i, name in enumerate(paths):
            position = paths[name].obs["scdiva_position"].to_numpy()
            found = [values[key][name][position == p] for p in np.unique(position)]
            mean = np.array([x.mean() for x in found])
            error = np.array([x.std() / np.sqrt(x.size) for x in found])
            axes.plot(np.unique(position), mean, color=line(i), label=name)
            axes.fill_between(np.unique(position), mean - error, mean + error, color=line(i), alpha=0.2, lw=0)
        for is_end, style in zip(ends.values(), (":", "--"), strict=True):
            axes.axhline(values[key]["real"][is_end].mean(), color="black", linewidth=0.9, linestyle=style)
        axes.set_title(key, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in lower[len(keys) :]:
        axes.set_visible(False)
    lower[0].legend(frameon=False, fontsize=8)
    parts[1].supxlabel(f"position; black: mean of real cells, dotted {source}, dashed {target}", fontsize=9)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def steps(
    n_steps: Sequence[int],
    auc: Sequence[float] | Sequence[Sequence[float]],
    cells_per_s: Sequence[float],
    path: str | Path,
    *,
    baselines: Mapping[str, float] | None = None,
    title: str = "what more steps of the sampler buy",
) -> None:
    """Draw the quality of generated cells and the speed against the number of steps.

    Parameters
    ----------
    n_steps
        Steps of the sampler.
    auc
        C2ST AUC for each number of steps, or several (seeds), drawn with their range. 0.5 is ideal.
    cells_per_s
        Cells per second for each number of steps.
    path
        PNG to write.
    baselines
        Name to C2ST AUC of what does not depend on steps (the ceiling, other generators): dotted lines.
    title
        Title of the picture.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    from scdiva.data.output import replacing

    order = np.argsort(n_steps)
    x = np.asarray(n_steps)[order]
    quality = [np.atleast_1d(np.asarray(auc[i], dtype=float)) for i in order]
    mean = np.array([values.mean() for values in quality])
    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ours, speed = colormaps["Dark2"](0), colormaps["Dark2"](1)
    axes.plot(x, mean, "o-", color=ours)
    axes.fill_between(x, [v.min() for v in quality], [v.max() for v in quality], color=ours, alpha=0.2, linewidth=0)
    for name, value in (baselines or {}).items():
        axes.axhline(value, color="grey", linestyle=":", linewidth=1)
        axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="steps", title=title, ylim=(0.45, 1.0))
    axes.set_ylabel("C2ST AUC (0.5 is ideal)", color=ours)
    axes.xaxis.set_major_locator(FixedLocator(x.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(n) for n in x])
    right = axes.twinx()
    right.plot(x, np.asarray(cells_per_s, dtype=float)[order], "s--", color=speed)
    right.set(yscale="log")
    right.set_ylabel("cells per second", color=speed)
    for side in (axes, right):
        side.spines["top"].set_visible(False)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _counts_over(cells: AnnData, genes: pd.Index) -> sp.csr_matrix:
    """Return X over given genes, CSR with sorted indices; absent genes are 0."""
    import numpy as np
    import scipy.sparse as sp

    position = genes.get_indexer(cells.var_names)
    found = sp.coo_matrix(cells.X)
    is_known = position[found.col] >= 0
    counts = sp.csr_matrix(
        (found.data[is_known], (found.row[is_known], position[found.col[is_known]])), shape=(cells.n_obs, len(genes))
    )
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts if counts.nnz else sp.csr_matrix(np.zeros((cells.n_obs, len(genes)), dtype=np.float32))
