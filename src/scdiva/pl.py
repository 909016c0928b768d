"""Plots. ``sd.pl``."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.errors import KeyNotFoundError
from scdiva.pl_network import grn_heatmap, grn_network, regulon
from scdiva.pl_perturbation import perturbation

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

    from scdiva.metrics.generation_space import LabelledCells

__all__ = [
    "generation",
    "grn_heatmap",
    "grn_network",
    "marker_dots",
    "path",
    "perturbation",
    "regulon",
    "steps",
    "umap",
]

_MAX_TYPES_OF_DOTS = 12
_SHARES = (0.1, 0.5, 1.0)


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

    One panel of the UMAP for the real cells and one for each generator, coloured by type, over the real cells in grey.

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
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    from umap import UMAP

    from scdiva.data.output import replacing
    from scdiva.metrics.generation_genes import curve, curve_edges
    from scdiva.metrics.generation_space import ReferenceSpace, variable_genes

    everything = {"real": real, **generated}
    for name, cells in everything.items():
        _require_column(cells, name, color)
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
    n_columns = len(points) if len(points) <= 3 else -(-len(points) // 2)
    n_rows = -(-len(points) // n_columns)
    names = sorted({kind for found in types.values() for kind in found})
    n_legend = -(-len(names) // (2 * n_columns))
    upper_height, lower_height = 4.3 * n_rows + 0.2 * n_legend + 0.3, 3.5 + 0.2 * (len(points) > 3)
    figure = Figure(figsize=(max(4.0 * n_columns, 11.5), upper_height + lower_height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[upper_height, lower_height])
    upper, lower = parts
    palette = colormaps["tab20"] if len(names) > 10 else colormaps["tab10"]
    stacked = np.concatenate(list(points.values()))
    limits = [(stacked[:, i].min() - 1, stacked[:, i].max() + 1) for i in range(2)]
    panels = np.atleast_1d(upper.subplots(n_rows, n_columns, sharex=True, sharey=True)).ravel()
    for axes in panels[len(points) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(panels, points.items(), strict=False):
        if name != "real":  # where real cells are, so that what is not made shows
            axes.scatter(*points["real"].T, s=6, color="0.86", linewidths=0, rasterized=True)
        for i, kind in enumerate(names):
            chosen = found[types[name] == kind]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=5, color=palette(i % palette.N), linewidths=0)
        axes.set(xticks=[], yticks=[], xlim=limits[0], ylim=limits[1])
        axes.set_title(f"{name}\n{len(found):,} cells", fontsize=10)
    dots = [
        Line2D([], [], marker="o", linestyle="", markersize=6, color=palette(i % palette.N)) for i in range(len(names))
    ]
    if len(panels) > len(points) and len(names) <= 24:  # a place is free
        panels[-1].legend(dots, names, loc="center", fontsize=9, frameon=False, ncols=1 + (len(names) > 14))
    else:
        upper.legend(dots, names, loc="outside lower center", ncols=2 * n_columns, fontsize=8, frameon=False)
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
    handles, texts = curves[0].get_legend_handles_labels()
    lower.legend(handles, texts, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def marker_dots(
    real: AnnData,
    generated: Mapping[str, AnnData],
    path: str | Path,
    *,
    color: str = "cell_type",
    markers_of: AnnData | None = None,
    n_markers: int = 3,
    gene_symbols: str | None = None,
) -> None:
    """Draw a dot plot of marker genes, real cells and generated ones of each type under each other.

    Size is the share of the type's cells that have the gene, colour their mean log1p(CP10K) over the gene's largest
    mean among real types. Markers are the genes with the largest log fold change (mean CP10K in the type against all
    other cells, 0.1 added to both) among those in a quarter of the type's cells. Our decision. The twelve largest types
    are drawn.

    Parameters
    ----------
    real
        Real cells, raw counts in X.
    generated
        Name to generated cells; genes of ``real`` that they lack count as 0.
    path
        PNG to write.
    color
        Column of ``.obs`` with the types, in all of them.
    markers_of
        Cells that the markers are chosen by, best none of those that are drawn; ``real`` if left out.
    n_markers
        Genes of each type; a gene stands with the first type that it marks.
    gene_symbols
        Column of ``real.var`` with the names to show; ``var_names`` if left out.

    Raises
    ------
    KeyNotFoundError
        Somebody lacks the column, or the real cells that of ``gene_symbols``.
    SourceError
        Fewer than two types, or no markers.
    """
    import numpy as np
    import scipy.sparse as sp
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib needs it

    from scdiva.data.output import replacing
    from scdiva.errors import SourceError
    from scdiva.metrics.generation_space import LabelledCells, log_cp10k

    everything = {"real": real, **generated}
    chosen_by = real if markers_of is None else markers_of
    if gene_symbols is not None and gene_symbols not in real.var:
        raise KeyNotFoundError(
            f"the real cells have no .var[{gene_symbols!r}]",
            expected=f"one of {', '.join(map(str, real.var.columns)) or 'none'}",
            fix="leave gene_symbols out",
        )
    for name, cells in {**everything, "marker": chosen_by}.items():
        _require_column(cells, name, color)
    labels = {name: cells.obs[color].astype(str).to_numpy(dtype=str) for name, cells in everything.items()}
    kinds, sizes = np.unique(labels["real"], return_counts=True)
    drawn = sorted(kinds[np.argsort(-sizes, kind="stable")[:_MAX_TYPES_OF_DOTS]].tolist())
    counts = _counts_over(chosen_by, real.var_names)
    of_type = _markers_of_types(
        LabelledCells(counts, chosen_by.obs[color].astype(str).to_numpy(dtype=str)), drawn, n_markers
    )
    genes = np.array([gene for found in of_type.values() for gene in found], dtype=np.int64)
    if kinds.size < 2 or genes.size == 0:
        raise SourceError(
            f"{kinds.size} types and {genes.size} markers",
            expected="two types that differ",
            fix="name another column of .obs",
        )
    values = {name: log_cp10k(_counts_over(cells, real.var_names))[:, genes] for name, cells in everything.items()}
    mean, share = (np.full((len(drawn), len(everything), genes.size), np.nan) for _ in range(2))
    for j, name in enumerate(everything):
        for i, kind in enumerate(drawn):
            rows = sp.csr_matrix(values[name][labels[name] == kind])
            if rows.shape[0]:
                mean[i, j] = np.asarray(rows.mean(axis=0)).ravel()
                share[i, j] = np.asarray((rows > 0).mean(axis=0)).ravel()
    largest = np.maximum(mean[:, 0].max(axis=0), 1e-9)
    # one line of text for each row, a gap between types
    place = np.arange(len(drawn))[:, None] * (len(everything) + 0.8) + np.arange(len(everything))
    figure = Figure(
        figsize=(2.6 + 0.06 * max(map(len, everything)) + 0.27 * genes.size, 1.7 + 0.21 * place.max()),
        dpi=100,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = np.broadcast_to(np.arange(genes.size), mean.shape)
    y = np.broadcast_to(place[:, :, None], mean.shape)
    for i in range(0, len(drawn), 2):
        axes.axhspan(place[i, 0] - 0.9, place[i, -1] + 0.9, color="0.95", zorder=0)
    dots = axes.scatter(
        x.ravel(), y.ravel(), s=4 + 90 * share.ravel(), c=(mean / largest).ravel(), cmap="Reds", vmin=0, vmax=1.2,
        edgecolors="0.4", linewidths=0.4, zorder=2,
    )  # fmt: skip
    first = np.cumsum([0, *(len(found) for found in of_type.values())])
    for i, (a, b) in enumerate(pairwise(first.tolist())):
        if b > a:  # the type's own markers
            axes.plot([a - 0.5, b - 0.5, b - 0.5, a - 0.5, a - 0.5],
                      [place[i, 0] - 0.7] * 2 + [place[i, -1] + 0.7] * 2 + [place[i, 0] - 0.7],
                      color="0.3", linewidth=0.8, zorder=1)  # fmt: skip
    shown = real.var_names if gene_symbols is None else real.var[gene_symbols].astype(str)
    axes.set_xticks(range(genes.size), [str(name) for name in shown.to_numpy()[genes]], rotation=90, fontsize=8)
    axes.set_yticks(place.ravel(), list(everything) * len(drawn), fontsize=7)
    for i, kind in enumerate(drawn):
        axes.annotate(
            "\n".join(textwrap.wrap(kind, 18)), (1.01, place[i].mean()), xycoords=("axes fraction", "data"),
            va="center", fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(-0.9, genes.size - 0.1), ylim=(place.max() + 1.0, -1.0))
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(dots, ax=axes, orientation="horizontal", location="bottom", shrink=0.45, aspect=30, pad=0.01)
    bar.set_label("mean log1p(CP10K), over the gene's largest mean among real types", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    handles = [axes.scatter([], [], s=4 + 90 * part, color="0.6", edgecolors="0.4", linewidths=0.4) for part in _SHARES]
    figure.legend(
        handles, [f"{part:.0%}" for part in _SHARES], loc="outside lower right", ncols=len(_SHARES), fontsize=8,
        title="share of cells with the gene", title_fontsize=8, frameon=False,
    )  # fmt: skip
    if len(drawn) < kinds.size:
        figure.suptitle(f"the {len(drawn)} largest of {kinds.size} types", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with replacing(Path(path)) as partial, Image.open(buffer) as picture:
        # thousands of smooth dots: with a palette half as large a file, which nobody can tell apart
        picture.convert("RGB").quantize(128).save(partial, format="PNG", optimize=True)


def _markers_of_types(cells: LabelledCells, types: Sequence[str], n_markers: int) -> dict[str, list[int]]:
    """Return markers of each type: the genes with the largest log fold change, each under one type only."""
    import numpy as np

    from scdiva.metrics.generation_genes import log_fold_changes

    taken: set[int] = set()
    found: dict[str, list[int]] = {}
    for kind in types:
        is_type = cells.labels == kind
        found[kind] = []
        if not 0 < is_type.sum() < is_type.size:
            continue
        share = np.bincount(cells.counts[is_type].indices, minlength=cells.counts.shape[1]) / is_type.sum()
        fold = np.where(share >= 0.25, log_fold_changes(cells, kind), -np.inf)
        order = [int(gene) for gene in np.argsort(-fold, kind="stable")[: n_markers + len(taken)] if fold[gene] > 0]
        found[kind] = [gene for gene in order if gene not in taken][:n_markers]
        taken.update(found[kind])
    return found


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


def _require_column(cells: AnnData, name: str, color: str) -> None:
    if color not in cells.obs:
        raise KeyNotFoundError(
            f"the {name} cells have no .obs[{color!r}]",
            expected=f"one of {', '.join(map(str, cells.obs.columns)) or 'none'}",
            fix="write their types there",
        )


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
