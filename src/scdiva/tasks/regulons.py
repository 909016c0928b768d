"""From a gene network to tables that people read: edges, regulons, communities with a name, and files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scdiva.data.network import GeneNetwork
from scdiva.data.output import replacing
from scdiva.errors import ConfigError, GeneError, OutputError
from scdiva.genes.gene_sets import hallmark_sets

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

EDGE_SUFFIXES = (".tsv", ".csv", ".gmt")
"""Files that hold edges, or, for .gmt, regulons."""


def edge_table(networks: Sequence[GeneNetwork], n_top: int) -> pd.DataFrame:
    """Return the best edges of every regulator.

    Parameters
    ----------
    networks
        Networks of one method, each of its own group.
    n_top
        Targets of each regulator; fewer where fewer have a score.

    Returns
    -------
    pandas.DataFrame
        Columns ``group``, ``source`` (regulator), ``target``, ``score`` and, where the method has signs, ``sign``; the
        best first, group after group. Ties go by name.
    """
    import pandas as pd

    parts = []
    for network in networks:
        # NaN are last; equal scores stay in the order of names
        by_name = np.argsort(network.targets, kind="stable")
        for i, regulator in enumerate(network.regulators):
            score = network.score[i, by_name]
            best = np.argsort(-score, kind="stable")[:n_top]
            best = best[np.isfinite(score[best])]
            part = {
                "group": network.group,
                "source": str(regulator),
                "target": network.targets[by_name[best]].astype(object),
                "score": score[best],
            }
            if network.sign is not None:
                part["sign"] = network.sign[i, by_name[best]]
            parts.append(pd.DataFrame(part))
    table = pd.concat(parts, ignore_index=True)
    table["rank"] = -table["score"]
    table["at"] = table["group"].map({network.group: i for i, network in enumerate(networks)})
    table = table.sort_values(["at", "rank", "source", "target"], ignore_index=True).drop(columns=["at", "rank"])
    table.index = table.index.astype(str)
    return table


@dataclass(frozen=True, slots=True)
class Regulon:
    """Targets of one regulator, the best first.

    Parameters
    ----------
    regulator
        Its symbol.
    activated, repressed
        Targets by sign; for a method without signs both are empty.
    unsigned
        Targets of which no sign is known.
    group
        The group of cells.
    """

    regulator: str
    activated: tuple[str, ...]
    repressed: tuple[str, ...]
    unsigned: tuple[str, ...]
    group: str = ""


def regulons(edges: pd.DataFrame | GeneNetwork, n_top: int = 50) -> list[Regulon]:
    """Return the regulons of a network.

    Parameters
    ----------
    edges
        ``adata.uns["scdiva_grn"]["edges"]``, or a network.
    n_top
        Targets of each regulator.

    Returns
    -------
    list of Regulon
        By group and regulator, in the order of their best edges.
    """
    table = edge_table([edges], n_top) if isinstance(edges, GeneNetwork) else edges
    _require_edges(table)
    found = []
    for (group, regulator), rows in table.groupby(["group", "source"], sort=False, observed=True):
        best = rows.sort_values("score", ascending=False, kind="stable").head(n_top)
        names = best["target"].astype(str).to_numpy()
        sign = best["sign"].to_numpy() if "sign" in best else np.zeros(len(best), dtype=np.int8)
        activated, repressed, unsigned = (tuple(names[sign == s].tolist()) for s in (1, -1, 0))
        found.append(Regulon(str(regulator), activated, repressed, unsigned, str(group)))
    return found


def write_edges(edges: pd.DataFrame, path: Path) -> None:
    """Write edges as a table (.tsv, .csv) or as regulons (.gmt), whole or not at all.

    In a .gmt file a regulon has a line for each sign, named as pySCENIC names them: ``SPI1(+)``, ``SPI1(-)``; without
    signs ``SPI1``. The second column is the group.

    Raises
    ------
    OutputError
        The file has another suffix.
    """
    with replacing(path) as partial:
        if path.suffix in (".tsv", ".csv"):
            edges.to_csv(partial, sep="\t" if path.suffix == ".tsv" else ",", index=False)
        elif path.suffix == ".gmt":
            lines = [
                "\t".join([regulon.regulator + ending, regulon.group or "all cells", *targets])
                for regulon in regulons(edges, n_top=len(edges))
                for ending, targets in (("(+)", regulon.activated), ("(-)", regulon.repressed), ("", regulon.unsigned))
                if targets
            ]
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            raise OutputError(
                f"output {path.name!r}", expected=f"a name ending in {', '.join(EDGE_SUFFIXES)}", fix="rename it"
            )


@dataclass(frozen=True, slots=True)
class Community:
    """Genes of a network that have many edges among themselves.

    Parameters
    ----------
    name
        The most significant hallmark gene set, or, where none is significant, the gene with the most edges.
    genes
        The one with the most edges first.
    q_value
        Of the gene set after Benjamini-Hochberg; NaN for a community that is named by its hub.
    n_overlap
        Genes that are in the set; 0 for a community that is named by its hub.
    """

    name: str
    genes: tuple[str, ...]
    q_value: float
    n_overlap: int


def network_graph(edges: pd.DataFrame, n_edges: int | None = None) -> nx.DiGraph:
    """Return the best edges as a graph; attributes ``score`` and, where there are signs, ``sign``.

    Parameters
    ----------
    edges
        A table of edges of one group.
    n_edges
        The best so many; None: all.
    """
    import networkx as nx

    _require_edges(edges)
    best = edges.sort_values("score", ascending=False, kind="stable")
    best = best if n_edges is None else best.head(n_edges)
    graph = nx.DiGraph()
    for row in best.to_dict("records"):
        graph.add_edge(str(row["source"]), str(row["target"]), score=float(row["score"]), sign=int(row.get("sign", 0)))
    return graph


def communities(
    graph: nx.DiGraph,
    background: Sequence[str],
    *,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    max_q: float = 0.05,
    seed: int = 0,
) -> list[Community]:
    """Find the communities of a graph and name them.

    Communities are those of Louvain's method on the undirected graph, every edge alike (Blondel et al. 2008, in
    networkx). A gene set is tested by the hypergeometric distribution against the background, p-values of all
    communities and sets are corrected together (Benjamini-Hochberg).

    Parameters
    ----------
    graph
        See :func:`network_graph`.
    background
        Genes that could have been in the network, such as all targets.
    gene_sets
        Name to genes; None: the hallmark sets (:func:`hallmark_sets`).
    max_q
        Largest q-value of a gene set that gives its name.
    seed
        Of Louvain's method.

    Returns
    -------
    list of Community
        The largest first.
    """
    import networkx as nx
    from scipy.stats import false_discovery_control, hypergeom

    undirected = graph.to_undirected()
    # by number: sets of strings have another order in every process
    names = sorted(undirected)
    numbered = nx.relabel_nodes(undirected, {name: i for i, name in enumerate(names)})
    ordered_graph = nx.Graph()
    ordered_graph.add_nodes_from(range(len(names)))
    ordered_graph.add_edges_from(sorted(tuple(sorted(edge)) for edge in numbered.edges))
    found = [
        {names[i] for i in members}
        for members in nx.community.louvain_communities(ordered_graph, weight=None, seed=seed)
    ]
    ordered = [sorted(genes, key=lambda gene: (-undirected.degree(gene), gene)) for genes in found]
    ordered.sort(key=lambda genes: (-len(genes), genes[0]))
    universe = set(background) | set(graph)
    sets = {name: universe & set(genes) for name, genes in (gene_sets or hallmark_sets()).items()}
    sets = {name: genes for name, genes in sets.items() if genes}
    overlap = np.array([[len(genes & set(members)) for genes in sets.values()] for members in ordered])
    sizes = np.array([len(genes) for genes in sets.values()])
    drawn = np.array([[len(members)] for members in ordered])
    p = np.asarray(hypergeom.sf(overlap - 1, len(universe), sizes, drawn))
    q = false_discovery_control(p.ravel()).reshape(p.shape) if p.size else p
    named = []
    for members, q_of, n_of in zip(ordered, q, overlap, strict=True):
        at = int(np.argmin(q_of)) if q_of.size else -1
        if at >= 0 and q_of[at] <= max_q and n_of[at] > 1:
            named.append(Community(list(sets)[at], tuple(members), float(q_of[at]), int(n_of[at])))
        else:
            named.append(Community(members[0], tuple(members), float("nan"), 0))
    return named


def one_group(edges: pd.DataFrame, group: str | None) -> pd.DataFrame:
    """Return the edges of one group.

    Raises
    ------
    ConfigError
        There are several and none is named, or there is no such group.
    """
    _require_edges(edges)
    groups = edges["group"].astype(str).unique().tolist()
    if group is None and len(groups) == 1:
        return edges
    if group not in groups:
        raise ConfigError(
            f"group {group!r}" if group is not None else f"edges of {len(groups)} groups",
            expected=f"one of {', '.join(map(repr, groups))}",
            fix="name one of these: group=...",
        )
    return edges[edges["group"].astype(str) == group]


def _require_edges(edges: pd.DataFrame) -> None:
    missing = [column for column in ("group", "source", "target", "score") if column not in edges]
    if missing or not len(edges):
        raise GeneError(
            f"a table without {', '.join(missing) or 'any edge'} is no gene network",
            expected="columns group, source, target, score",
            fix="use adata.uns['scdiva_grn']['edges'] after sd.tl.grn",
        )
