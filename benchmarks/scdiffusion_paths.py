"""Cells on the way from one label to another: gradient interpolation, slerp and linear mixing, beside a null.

    python benchmarks/scdiffusion_paths.py --kang KANG.h5ad --models DIR --out docs/results/scdiffusion_path

Two known ways: naive to memory CD4+ T cells (the sorted blood set, bundled), and monocytes without and with interferon
beta (Kang et al. 2018). 70 % of the cells are trained on: by the model, by a classifier of its own (logistic regression
on log1p(CP10K) of 2,000 variable genes, never the one that guides), and by the principal components. Paths start and
end at the other 30 %, which also give the levels of real cells. Rows are printed as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from page import write_page
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

import scdiva as sd
from scdiva.data.output import replacing
from scdiva.metrics.generation_space import ReferenceSpace, log_cp10k
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.tasks.evaluate_generation import split_cells
from scdiva.tasks.scdiffusion import fit_scdiffusion

N_PATHS, STEPS = 100, 11
METHODS = ("gradient", "slerp", "linear")
N_EXCLUSIVE = 5


@dataclass(frozen=True)
class Way:
    name: str
    picture: str
    field: str
    source: str
    target: str
    falling: tuple[str, ...]
    rising: tuple[str, ...]
    shown: tuple[str, ...]


T_CELLS = Way(
    "naive to memory CD4+ T cells",
    "",
    "cell_type",
    "CD4+ naive T cell",
    "CD4+ memory T cell",
    ("CCR7", "SELL", "LEF1"),
    ("S100A4", "IL32", "B2M", "S100A10"),
    ("CCR7", "S100A4", "IL32", "S100A10"),
)
IFNB = Way(
    "CD14+ monocytes, control to interferon beta",
    "_ifnb",
    "perturbation",
    "control",
    "IFNB",
    (),
    ("ISG15", "IFI6", "IFIT1", "IFIT3", "MX1", "ISG20"),
    ("ISG15", "IFIT3", "MX1", "ISG20"),
)


def values(cells: ad.AnnData, genes: Any) -> np.ndarray:
    return log_cp10k(sp.csr_matrix(cells.X))[:, cells.var_names.get_indexer(genes)].toarray()


def monotone(y: np.ndarray, rises: bool) -> dict[str, float]:
    """Spearman of position with the mean, in the expected direction, and steps against it."""
    sign = 1 if rises else -1
    rho = sign * float(spearmanr(np.arange(len(y)), y).statistic) if np.ptp(y) else 0.0
    return {"spearman": rho, "reversed": int((sign * np.diff(y) < 0).sum())}


class Judge:
    """What real training cells teach, and the levels of real held-out cells."""

    def __init__(self, way: Way, train: ad.AnnData, held: ad.AnnData, seed: int) -> None:
        self.way, self.seed = way, seed
        self.genes = train.var_names
        self.train = train[train.obs[way.field].isin([way.source, way.target])].copy()
        self.held = held[held.obs[way.field].isin([way.source, way.target])].copy()
        self.space = ReferenceSpace.fit(sp.csr_matrix(train.X), seed=seed)
        labels = train.obs[way.field].astype(str).to_numpy()
        self.classifier = LogisticRegression(C=0.1, max_iter=2000).fit(
            self.space.values(sp.csr_matrix(train.X)), labels
        )
        of_train = self.train.obs[way.field].astype(str).to_numpy()
        self.pca = ReferenceSpace.fit(sp.csr_matrix(self.train.X), seed=seed, n_components=20, genes=self.space.genes)
        self.nearest = NearestNeighbors(n_neighbors=1).fit(self.points(self.train))
        self.real_distance = float(np.median(self.nearest.kneighbors(self.points(self.held))[0]))
        detected = [
            np.asarray((self.train.X[of_train == end] > 0).mean(axis=0)).ravel() for end in (way.source, way.target)
        ]
        gap = detected[0] - detected[1]
        self.exclusive = [np.argsort(-gap)[:N_EXCLUSIVE], np.argsort(gap)[:N_EXCLUSIVE]]
        self.real = {
            end: self.levels(self.held[(self.held.obs[way.field] == end).to_numpy()])
            for end in (way.source, way.target)
        }

    def points(self, cells: ad.AnnData) -> np.ndarray:
        return self.pca.project(self.pca.values(sp.csr_matrix(cells.X)))

    def probabilities(self, cells: ad.AnnData) -> np.ndarray:
        """Of source and target, ``(n, 2)``."""
        found = self.classifier.predict_proba(self.space.values(sp.csr_matrix(cells.X)))
        order = list(self.classifier.classes_)
        return found[:, [order.index(self.way.source), order.index(self.way.target)]]

    def levels(self, cells: ad.AnnData) -> dict[str, float]:
        """Of one group of cells."""
        x = sp.csr_matrix(cells.X)
        p = self.probabilities(cells)
        has = [np.asarray((x[:, genes] > 0).sum(axis=1)).ravel() for genes in self.exclusive]
        markers = (*self.way.falling, *self.way.rising)
        # half of the genes of each end and more: a doublet, or a cell in between
        share = float(((has[0] * 2 >= N_EXCLUSIVE) & (has[1] * 2 >= N_EXCLUSIVE)).mean())
        return {
            "p_source": float(p[:, 0].mean()),
            "p_target": float(p[:, 1].mean()),
            "undecided": float(((p.max(axis=1) < 0.8 * p.sum(axis=1)) & (p.sum(axis=1) > 0.5)).mean()),
            "n_umis": float(np.median(np.asarray(x.sum(axis=1)))),
            "n_genes": float(np.median(np.diff(x.indptr))),
            "distance": float(np.median(self.nearest.kneighbors(self.points(cells))[0])) / self.real_distance,
            "both": share,
            **{gene: float(value) for gene, value in zip(markers, values(cells, markers).mean(axis=0), strict=True)},
        }

    def path(self, cells: ad.AnnData) -> dict[str, Any]:
        position = cells.obs["scdiva_position"].to_numpy()
        at = [self.levels(cells[position == p]) for p in np.unique(position)]
        markers = [(gene, False) for gene in self.way.falling] + [(gene, True) for gene in self.way.rising]
        tracks = {"p_source": False, "p_target": True, **dict(markers)}
        order = {key: monotone(np.array([level[key] for level in at]), rises) for key, rises in tracks.items()}
        pseudotime = self.pseudotime(cells)
        by_path = cells.obs["scdiva_path"].to_numpy()
        within = [spearmanr(position[by_path == i], pseudotime[by_path == i]).statistic for i in np.unique(by_path)]
        shuffled = np.random.default_rng([self.seed, 9]).permutation(position)
        return {
            "levels": at,
            "order": order,
            "dpt": float(spearmanr(position, pseudotime).statistic),
            "dpt_within_paths": float(np.nanmedian(within)),
            "dpt_shuffled": float(spearmanr(shuffled, pseudotime).statistic),
        }

    def pseudotime(self, cells: ad.AnnData) -> np.ndarray:
        """Diffusion pseudotime of path cells among real held-out ones, from the most typical real source cell."""
        import scanpy as sc

        points = np.concatenate([self.points(self.held), self.points(cells)])
        both = ad.AnnData(np.zeros((len(points), 1), dtype=np.float32), obsm={"X_pca": points})
        is_source = np.flatnonzero((self.held.obs[self.way.field] == self.way.source).to_numpy())
        is_target = np.flatnonzero((self.held.obs[self.way.field] == self.way.target).to_numpy())
        axis = points[is_target].mean(axis=0) - points[is_source].mean(axis=0)
        # the source cell at the far end of the way: what lies behind the root would be put on the way
        both.uns["iroot"] = int(is_source[np.argsort(points[is_source] @ axis)[len(is_source) // 20]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.pp.neighbors(both, n_neighbors=15, use_rep="X_pca", random_state=self.seed)
            sc.tl.diffmap(both, n_comps=10, random_state=self.seed)
            sc.tl.dpt(both, n_dcs=5)
        found = both.obs["dpt_pseudotime"].to_numpy(dtype=float)
        worst = found[np.isfinite(found)].max()
        return np.where(np.isfinite(found), found, worst)[self.held.n_obs :]


def studied(way: Way, cells: ad.AnnData, seed: int, models: Path, options: dict[str, Any]) -> tuple[Judge, dict, dict]:
    labels = cells.obs[way.field].astype(str).to_numpy()
    split = split_cells(labels, 0.7, seed)
    train, held = cells[np.sort(split.train)].copy(), cells[np.sort(split.heldout)].copy()
    folder = models / f"path{way.picture}-{seed}"
    if (folder / "bundle").exists():
        model = ScDiffusion.from_pretrained(folder / "bundle", device="cpu")
    else:
        model = fit_scdiffusion(train, [way.field], folder, seed=seed, device="cpu", progress=False).model
    judge = Judge(way, train, held, seed)
    made, found = {}, {}
    for method in METHODS:
        started = time.perf_counter()
        path = sd.tl.interpolate(
            model, held, source=way.source, target=way.target, field=way.field, steps=STEPS, n_cells=N_PATHS,
            method=method, seed=seed, **options.get(method, {}),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        path = over_genes(path, cells, model)
        made[method] = path
        found[method] = {**judge.path(path), "seconds": seconds}
        print(seed, line(way, method, [found[method]]), flush=True)
    return judge, made, found


def over_genes(path: ad.AnnData, cells: ad.AnnData, model: ScDiffusion) -> ad.AnnData:
    """Name genes as the file does; genes that the model leaves out are 0."""
    from scdiva.data.reader import open_counts
    from scdiva.data.source import open_source

    columns = open_counts(open_source(cells), model.vocabulary, min_coverage=0.0).alignment.source_of_gene()
    x = sp.lil_matrix((path.n_obs, cells.n_vars), dtype=np.int32).tocsc()
    genes = [columns[gene][0] for gene in range(model.vocabulary.n_genes)]
    found = sp.coo_matrix(path.X)
    x = sp.csr_matrix((found.data, (found.row, np.array(genes)[found.col])), shape=(path.n_obs, cells.n_vars))
    x.sort_indices()
    return ad.AnnData(x, obs=path.obs, var=cells.var[[]])


def mean(rows: list[Any], key: Any) -> float:
    return float(np.mean([key(row) for row in rows]))


HEADER = (
    "| method | P(source) at 0, ¼, ½, ¾, 1 | P(target) at 0, ¼, ½, ¾, 1 | Spearman P(target) (steps back of 10) "
    "| Spearman of markers, mean (steps back) | pseudotime ~ position (shuffled) | the same within paths "
    "| undecided cells at ½ | both ends' genes at ½ | distance to real cells at 0, ½, 1 | genes at 0, ½, 1 | seconds |"
    "\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|---|---|---:|"
)


def line(way: Way, method: str, rows: list[dict[str, Any]]) -> str:
    fifths = [round(i * (STEPS - 1) / 4) for i in range(5)]
    track = {
        key: ", ".join(f"{mean(rows, lambda r, i=i, key=key: r['levels'][i][key]):.2f}" for i in fifths)
        for key in ("p_source", "p_target")
    }
    markers = (*way.falling, *way.rising)
    spearman = mean(rows, lambda r: np.mean([r["order"][gene]["spearman"] for gene in markers]))
    back = mean(rows, lambda r: np.mean([r["order"][gene]["reversed"] for gene in markers]))
    ends = [0, STEPS // 2, STEPS - 1]
    distance = ", ".join(f"{mean(rows, lambda r, i=i: r['levels'][i]['distance']):.2f}" for i in ends)
    n_genes = ", ".join(f"{mean(rows, lambda r, i=i: r['levels'][i]['n_genes']):.0f}" for i in ends)
    half = STEPS // 2
    return (
        f"| {method} | {track['p_source']} | {track['p_target']} "
        f"| {mean(rows, lambda r: r['order']['p_target']['spearman']):.2f} "
        f"({mean(rows, lambda r: r['order']['p_target']['reversed']):.1f}) | {spearman:.2f} ({back:.1f}) "
        f"| {mean(rows, lambda r: r['dpt']):.2f} ({mean(rows, lambda r: r['dpt_shuffled']):.2f}) "
        f"| {mean(rows, lambda r: r['dpt_within_paths']):.2f} "
        f"| {mean(rows, lambda r: r['levels'][half]['undecided']):.2f} "
        f"| {mean(rows, lambda r: r['levels'][half]['both']):.2f} | {distance} | {n_genes} "
        f"| {mean(rows, lambda r: r['seconds']):.0f} |"
    )


def real_line(judges: list[Judge], end: str) -> str:
    def at(key: str) -> float:
        return float(np.mean([judge.real[end][key] for judge in judges]))

    return (
        f"| real cells, {end} | {at('p_source'):.2f} | {at('p_target'):.2f} | | | | | {at('undecided'):.2f} "
        f"| {at('both'):.2f} | {at('distance'):.2f} | {at('n_genes'):.0f} | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kang", type=Path, required=True, help="the interferon set")
    parser.add_argument("--models", type=Path, required=True, help="folder of the fitted models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["t_cells", "ifnb"], choices=["t_cells", "ifnb"])
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: method to options of sd.tl.interpolate")
    parser.add_argument("--out", type=Path, required=True, help="result without suffix; pictures, s.md and s.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, kept = [], {}
    for way in [{"t_cells": T_CELLS, "ifnb": IFNB}[name] for name in arguments.ways]:
        if way is T_CELLS:
            cells = sd.datasets.zheng_sorted7_3500()
        else:
            cells = ad.read_h5ad(arguments.kang)
            cells = cells[(cells.obs["cell_type"] == "CD14 Mono").to_numpy()].copy()
        print(f"\n{way.name}\n{HEADER}", flush=True)
        judges, rows = [], []
        for seed in range(arguments.seeds):
            judge, made, found = studied(way, cells, seed, arguments.models, arguments.options)
            judges.append(judge)
            rows.append(found)
            if seed == 0:
                draw(way, judge, made, arguments.out.with_name(arguments.out.name + way.picture + ".png"))
        lines = [line(way, method, [found[method] for found in rows]) for method in METHODS]
        lines += [real_line(judges, end) for end in (way.source, way.target)]
        text.append(f"### {way.name}\n\n{HEADER}\n" + "\n".join(lines) + "\n\n" + markers_table(way, judges, rows))
        kept[way.name] = {"paths": rows, "real": [judge.real for judge in judges]}
        print(text[-1], flush=True)
    out = arguments.out.with_name(arguments.out.name + "s.md")
    head = f"{arguments.seeds} seed{'s' if arguments.seeds > 1 else ''}, {N_PATHS} paths of {STEPS} positions each.\n\n"
    write_page(out, "On the way from one label to another", "## Tables\n\n" + head + "\n".join(text))
    with replacing(out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def markers_table(way: Way, judges: list[Judge], rows: list[dict[str, Any]]) -> str:
    head = "| marker | direction | real source, target |" + "".join(f" {m}: 0, ½, 1 (steps back) |" for m in METHODS)
    lines = [head, "|---|---|---|" + "---|" * len(METHODS)]
    for gene in (*way.falling, *way.rising):
        real = ", ".join(f"{np.mean([j.real[end][gene] for j in judges]):.2f}" for end in (way.source, way.target))
        cells = []
        for method in METHODS:
            of = [found[method] for found in rows]
            at = ", ".join(
                f"{mean(of, lambda r, i=i, g=gene: r['levels'][i][g]):.2f}" for i in (0, STEPS // 2, STEPS - 1)
            )
            cells.append(f" {at} ({mean(of, lambda r, g=gene: r['order'][g]['reversed']):.1f}) |")
        lines.append(f"| {gene} | {'falls' if gene in way.falling else 'rises'} | {real} |" + "".join(cells))
    return "\n".join(lines) + "\n"


def draw(way: Way, judge: Judge, made: dict[str, ad.AnnData], out: Path) -> None:
    real = judge.held.copy()
    for cells in (real, *made.values()):
        cells.obs["P(source)"], cells.obs["P(target)"] = judge.probabilities(cells).T
    sd.pl.path(
        real,
        made,
        out,
        color=way.field,
        source=way.source,
        target=way.target,
        keys=("P(source)", "P(target)", *way.shown),
    )


if __name__ == "__main__":
    main()
