"""Plots of gene networks; ``sd.pl`` has them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.errors import ConfigError, GeneError, KeyNotFoundError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_SIGN_COLOURS = {1: "#c0392b", -1: "#2166ac", 0: "0.6"}
_MOST_LABELS = 110


def grn_network(
    adata: AnnData,
    path: str | Path,
    *,
    key: str = "scdiva_grn",
    group: str | None = None,
    n_edges: int = 120,
    seed: int = 0,
    title: str | None = None,
) -> None:
    """Draw the best edges of a network, by community.

    Communities are found and named as in :func:`scdiva.tasks.regulons.communities`: by the hallmark gene set that is
    most enriched in them, or, where none is, by their hub. Regulators are squares, targets dots; an edge is red where
    it activates, blue where it represses, grey where no sign is known; edges between communities are pale.

    Parameters
    ----------
    adata
        After ``sd.tl.grn``.
    path
        PNG to write.
    key
        Slot in ``.uns``.
    group
        Which group; may be left out where there is one.
    n_edges
        The best so many are drawn.
    seed
        Of communities and places.
    title
        Title of the picture.

    Raises
    ------
    KeyNotFoundError
        There is no such slot.
    ConfigError
        There is no such group, or several and none is named.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    from scdiva.tasks.regulons import communities, network_graph

    edges = _edges(adata, key, group)
    graph = network_graph(edges, n_edges)
    found = communities(graph, [str(gene) for gene in adata.uns[key].get("targets", ())], seed=seed)
    of_gene = {gene: i for i, community in enumerate(found) for gene in community.genes}
    place = _places(graph, found, seed)
    figure, axes = _figure(12, 9)
    shades = [colormaps["tab20"](i) for i in range(20)]  # strong and pale ones take turns
    colours = [*shades[::2], *shades[1::2]]
    for source, target, data in graph.edges(data=True):
        axes.annotate(
            "", place[target], place[source],
            arrowprops={
                "arrowstyle": "-|>" if data["sign"] >= 0 else "|-|,widthA=0,widthB=0.25",
                "color": _SIGN_COLOURS[data["sign"]], "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5,
                "mutation_scale": 7, "alpha": 0.7 if of_gene[source] == of_gene[target] else 0.22,
            },
        )  # fmt: skip
    sources = [gene for gene in graph if graph.out_degree(gene)]
    for genes, marker, size in ((sources, "s", 55), ([g for g in graph if not graph.out_degree(g)], "o", 26)):
        points = np.array([place[gene] for gene in genes]).reshape(-1, 2)
        axes.scatter(
            *points.T, marker=marker, s=size, color=[colours[of_gene[gene] % 20] for gene in genes],
            edgecolors="0.3", linewidths=0.5, zorder=3,
        )  # fmt: skip
    labelled = list(graph) if len(graph) <= _MOST_LABELS else sources
    for gene in labelled:
        is_source = graph.out_degree(gene) > 0
        axes.annotate(
            gene, place[gene], xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8 if is_source else 6.5,
            fontweight="bold" if is_source else "normal", zorder=4,
            bbox={"boxstyle": "round,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.6},
        )  # fmt: skip
    shown = found[:12]
    handles = [Line2D([], [], marker="o", linestyle="", color=colours[i % 20], markersize=7) for i in range(len(shown))]
    names = [_community_label(community) for community in shown]
    signs = sorted({data["sign"] for _, _, data in graph.edges(data=True)}, reverse=True)
    said = {1: "activates", -1: "represses", 0: "no sign known"}
    handles += [Line2D([], [], color=_SIGN_COLOURS[sign]) for sign in signs]
    names += [said[sign] for sign in signs]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.set_axis_off()
    axes.margins(0.06)
    name = _name(edges)
    axes.set_title(title or f"{graph.number_of_edges():,} best edges of {graph.number_of_nodes():,} genes{name}")
    _save(figure, path)


def grn_heatmap(
    adata: AnnData,
    path: str | Path,
    *,
    key: str = "scdiva_grn",
    group: str | None = None,
    regulators: Sequence[str] | None = None,
    n_regulators: int = 25,
    n_targets: int = 60,
    title: str | None = None,
) -> None:
    """Draw scores of regulators and targets as a heat map, both clustered (average linkage of correlations).

    Edges that ``sd.tl.grn`` did not keep are grey: for a full map run it with a large ``n_top``. Scores of methods with
    signs are shown with them.

    Parameters
    ----------
    adata
        After ``sd.tl.grn``.
    path
        PNG to write.
    key
        Slot in ``.uns``.
    group
        Which group; may be left out where there is one.
    regulators
        Rows; those of the best edges if left out.
    n_regulators
        How many, where they are not named.
    n_targets
        Columns: the best two targets of every row, then those with the largest summed scores over the rows.
    title
        Title of the picture.

    Raises
    ------
    KeyNotFoundError, ConfigError
        See :func:`grn_network`.
    GeneError
        A regulator has no edge.
    """
    import numpy as np

    edges = _edges(adata, key, group)
    wide = edges.assign(source=edges["source"].astype(str), target=edges["target"].astype(str))
    if regulators is None:
        best = wide.groupby("source")["score"].apply(lambda s: s.nlargest(10).mean()).sort_values(ascending=False)
        regulators = best.index[:n_regulators].tolist()
    _require_genes(regulators, wide["source"], "edge")
    wide = wide[wide["source"].isin(list(regulators))]
    table = wide.pivot_table(index="source", columns="target", values="score")
    # the best two of every row, so that none is empty, and then those with the largest sums
    first = dict.fromkeys(name for _, row in table.iterrows() for name in row.nlargest(2).index)
    by_sum = table.sum().sort_values(ascending=False, kind="stable").index
    chosen = list(dict.fromkeys([*first, *by_sum]))[: max(n_targets, len(first))]
    sign = wide.pivot_table(index="source", columns="target", values="sign") if "sign" in wide else None
    table = table[chosen]
    values = table.to_numpy() * (1 if sign is None else sign[chosen].to_numpy())
    filled = np.nan_to_num(values)
    rows, columns = _clustered(filled), _clustered(filled.T)
    values = values[rows][:, columns]
    figure, axes = _figure(max(6.0, 2.4 + 0.17 * len(columns)), max(3.6, 1.9 + 0.2 * len(rows)))
    options: dict[str, Any] = {"cmap": "magma_r"}
    if sign is not None:
        largest = float(np.nanmax(np.abs(values)))
        options = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    axes.set_facecolor("0.9")
    picture = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.set_xticks(range(len(columns)), table.columns.to_numpy()[columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), table.index.to_numpy()[rows], fontsize=8)
    axes.tick_params(length=0)
    axes.set(xlabel="target", ylabel="regulator", title=title or f"{len(rows)} regulators{_name(edges)}")
    method = str(adata.uns.get("scdiva", {}).get("grn", {}).get(key, {}).get("method", ""))
    figure.colorbar(picture, ax=axes, shrink=0.7, label=f"{method} score" + (" x sign" if sign is not None else ""))
    _save(figure, path)


def regulon(
    adata: AnnData,
    path: str | Path,
    *,
    tf: str,
    key: str = "scdiva_grn",
    group: str | None = None,
    n_targets: int = 30,
    known: Iterable[str] = (),
    title: str | None = None,
) -> None:
    """Draw the best targets of one regulator as bars: to the right what it activates, to the left what it represses.

    Parameters
    ----------
    adata
        After ``sd.tl.grn``.
    path
        PNG to write.
    tf
        The regulator, as the edges call it.
    key
        Slot in ``.uns``.
    group
        Which group; may be left out where there is one.
    n_targets
        The best so many.
    known
        Targets that are known from elsewhere: they get a star.
    title
        Title of the picture.

    Raises
    ------
    KeyNotFoundError, ConfigError
        See :func:`grn_network`.
    GeneError
        The regulator has no edge.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    edges = _edges(adata, key, group)
    _require_genes([tf], edges["source"].astype(str), "edge")
    best = edges[edges["source"].astype(str) == tf].sort_values("score", ascending=False, kind="stable")
    best = best.head(n_targets)
    sign = best["sign"].to_numpy() if "sign" in best else 0 * best["score"].to_numpy().astype(int)
    value = best["score"].to_numpy() * (sign + (sign == 0))
    is_known = best["target"].astype(str).isin(set(known)).to_numpy()
    figure, axes = _figure(6.4, 1.5 + 0.21 * len(best))
    place = range(len(best))
    axes.barh(place, value, color=[_SIGN_COLOURS[int(s)] for s in sign], height=0.75)
    for at in [i for i in place if is_known[i]]:
        axes.annotate(
            "★", (value[at], at), xytext=(5 if value[at] >= 0 else -5, 0), textcoords="offset points", va="center",
            ha="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(place, best["target"].astype(str), fontsize=8)
    axes.set(ylim=(len(best) - 0.4, -0.6), xlabel="score" + (" x sign" if "sign" in best else ""))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    said = {1: "activated", -1: "repressed", 0: "no sign known"}
    handles: list[Any] = [Patch(color=_SIGN_COLOURS[s], label=said[s]) for s in (1, -1, 0) if (sign == s).any()]
    if is_known.any():
        handles.append(Line2D([], [], marker="*", color="black", linestyle="", label="known target"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_title(title or f"{tf}: {len(best)} best targets{_name(edges)}", fontsize=11)
    _save(figure, path)


def _places(graph: Any, found: Sequence[Any], seed: int) -> dict[str, Any]:
    """Place the genes of each community around its own centre, and communities on a grid by size."""
    import networkx as nx
    import numpy as np

    radius = [0.65 * np.sqrt(len(community.genes)) + 0.2 for community in found]
    width = 1.4 * np.sqrt(sum((2 * r) ** 2 for r in radius))
    place: dict[str, Any] = {}
    x = y = height = 0.0
    for community, r in zip(found, radius, strict=True):  # the largest first: rows of a page
        if x > 0 and x + 1.5 * r > width:
            x, y, height = 0.0, y - height, 0.0
        # built anew: the order of the nodes decides the places, and that of a subgraph differs between processes
        part = nx.Graph()
        part.add_nodes_from(community.genes)
        part.add_edges_from(edge for edge in graph.edges if set(edge) <= set(community.genes))
        if len(part) == 2:  # above each other, so that names do not meet those of the next pair
            local = dict(zip(community.genes, np.array([[0.0, 0.45], [0.0, -0.45]]), strict=True))
        elif len(part) < 60:
            local = nx.kamada_kawai_layout(part, weight=None)
        else:
            local = nx.spring_layout(part, seed=seed)
        if len(part) > 5:
            local = _spread(local)
        for gene, at in local.items():
            place[gene] = np.array([x + r, y - r]) + 0.85 * r * np.asarray(at)
        x, height = x + 2 * r, max(height, 2 * r)
    return place


def _spread(place: dict[str, Any]) -> dict[str, Any]:
    """Give points of a disc more equal room: angles stay, distances from the middle go half way to an even disc's."""
    import numpy as np

    points = np.array(list(place.values()))
    points = points - points.mean(axis=0)
    distance = np.linalg.norm(points, axis=1)
    even = np.empty(len(points))
    even[np.argsort(distance, kind="stable")] = np.sqrt((np.arange(len(points)) + 0.2) / len(points))
    radius = (even + distance / max(float(distance.max()), 1e-9)) / 2
    return dict(zip(place, points / np.maximum(distance, 1e-9)[:, None] * radius[:, None], strict=True))


def _community_label(community: Any) -> str:
    n = len(community.genes)
    if community.n_overlap:
        name = community.name.replace("_", " ")
        return "\n".join(textwrap.wrap(f"{name} ({community.n_overlap} of {n} genes, q = {community.q_value:.1g})", 44))
    return f"{community.name} and its neighbours ({n} genes)"


def _clustered(values: Any) -> Any:
    """Return the order of rows by average linkage of correlation distances."""
    import numpy as np
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(values) < 3:
        return np.arange(len(values))
    centred = values - values.mean(axis=1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return leaves_list(linkage(unit, method="average", metric="euclidean"))


def _edges(adata: AnnData, key: str, group: str | None) -> pd.DataFrame:
    from scdiva.tasks.regulons import one_group

    slot = adata.uns.get(key)
    if slot is None or "edges" not in slot:
        raise KeyNotFoundError(
            f"no .uns[{key!r}]['edges']",
            expected=f"one of {', '.join(map(str, adata.uns.keys())) or 'none'}",
            fix="sd.tl.grn(adata, model) first",
        )
    return one_group(slot["edges"], group)


def _require_genes(names: Sequence[str], there: pd.Series, what: str) -> None:
    known = set(there.astype(str))
    absent = [name for name in names if name not in known]
    if absent:
        raise GeneError(
            f"no {what} from {', '.join(absent[:10])}",
            expected=f"regulators of the network, such as {', '.join(sorted(known)[:5])}",
            fix="name others, or run sd.tl.grn with regulators=[...]",
        )


def _name(edges: pd.DataFrame) -> str:
    group = str(edges["group"].iloc[0])
    return f", {group}" if group else ""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if width > 60 or height > 60:
        raise ConfigError(f"a picture of {width:.0f} x {height:.0f} inches", expected="fewer genes", fix="draw fewer")
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: str | Path) -> None:
    from scdiva.data.output import replacing

    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")
