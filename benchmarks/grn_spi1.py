"""The regulon of SPI1 in myeloid cells beside its known targets: a table and a picture.

    python benchmarks/grn_spi1.py KNOWN.tsv OUT FILE [FILE...]

Myeloid cells: those of the files that ``.obs["cell_type_pred"]`` (predicted labels) calls monocytes or dendritic cells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np

import scdiva as sd
from scdiva.baselines import network as baselines
from scdiva.data.known_network import read_truth
from scdiva.data.reader import open_corpus
from scdiva.metrics import network as metrics
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks.evaluate_grn import NetworkCells, model_networks
from scdiva.tasks.grn import GrnOptions

MYELOID = ("CD14 Mono", "FCGR3A Mono", "DC")
CLAIMED = {"MS4A3": 1, "HBG1": -1, "HBG2": -1}
"""Targets of SPI1 that scDiVa's authors name."""
N_SHOWN = 30


def main() -> None:
    known_path, out, files = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    model = ScDiVa.from_pretrained("scdiva-blood-tiny", device="cpu")
    known = read_truth(known_path, model.vocabulary, name="known targets")
    corpus = open_corpus(files, model.vocabulary)
    labels = np.concatenate([ad.read_h5ad(file, backed="r").obs["cell_type_pred"].astype(str) for file in files])
    cells = corpus.read(np.flatnonzero(np.isin(labels, MYELOID)))
    data = NetworkCells.of(cells, np.asarray(model.vocabulary.symbol, dtype=np.str_), name="myeloid cells")
    spi1 = model.vocabulary.find(["SPI1"])
    networks, titles, _ = model_networks(model, GrnOptions(max_cells=500))
    methods = {
        "co-expression (Spearman)": baselines.spearman,
        "variability of the two genes alone": baselines.variability,
        titles["response"]: networks["response"],
        titles["knockout"]: networks["knockout"],
    }
    signs = known.of("SPI1")
    symbols = data.symbols[data.expressed]
    is_candidate = symbols != "SPI1"
    truth = np.array([signs.get(symbol, 0) for symbol in symbols.tolist()])
    is_edge = np.isin(symbols, list(signs))
    lines = [
        "# The SPI1 regulon in myeloid cells",
        "",
        f"{cells.n_cells:,} cells (monocytes and dendritic cells by predicted labels) of "
        f"{', '.join(Path(file).stem for file in files)}; {symbols.size:,} expressed genes, of which "
        f"{np.count_nonzero(is_edge & is_candidate):,} are among the {len(signs):,} known targets "
        f"({np.count_nonzero(truth[is_candidate] < 0)} repressed).",
        "",
        "| method | AUPRC ratio | known among the first 50 / 100 / 200 (by chance) | activated known targets with the "
        "right sign | repressed known targets with the right sign |",
        "|---|---:|---:|---:|---:|",
    ]
    best = {}
    for title, infer in methods.items():
        found = infer(cells, data.symbols, spi1, data.expressed, seed=0)
        score = np.where(is_candidate, found.score[0], np.nan)
        best[title] = found
        order = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
        hits = [int(is_edge[order[:n]].sum()) for n in (50, 100, 200)]
        share = is_edge[is_candidate].mean()
        ratio = metrics.expected_average_precision(score[is_candidate], is_edge[is_candidate])
        ratio /= metrics.chance_average_precision(int(is_candidate.sum()), int(is_edge[is_candidate].sum()))
        cells_of = ["–", "–"]
        if found.sign is not None:
            for i, sign in enumerate((1, -1)):
                told = found.sign[0][(truth == sign) & is_candidate]
                cells_of[i] = f"{np.count_nonzero(told == sign)} of {np.count_nonzero(told)} told ({told.size} known)"
        expected = " / ".join(f"{share * n:.0f}" for n in (50, 100, 200))
        lines.append(
            f"| {title} | {ratio:.2f} | {' / '.join(map(str, hits))} ({expected}) | {cells_of[0]} | {cells_of[1]} |"
        )
    ours, rho = best[titles["response"]], best["co-expression (Spearman)"]
    place = {symbol: i for i, symbol in enumerate(symbols.tolist())}
    ranks = np.argsort(np.argsort(-np.nan_to_num(ours.score[0], nan=-np.inf), kind="stable")) + 1
    lines += ["", f"The first {N_SHOWN} activated and 15 repressed targets by the response:", ""]
    lines += ["| target | response (z) | sign | known | Spearman |", "|---|---:|---|---|---:|"]
    words = {1: "activated", -1: "repressed", 0: "not told"}
    for sign, n in ((1, N_SHOWN), (-1, 15)):
        rows = np.flatnonzero((ours.sign[0] == sign) & is_candidate)
        for i in rows[np.argsort(-ours.score[0][rows], kind="stable")][:n]:
            in_table = words[int(truth[i])] if is_edge[i] else ""
            correlation = rho.score[0][i] * rho.sign[0][i]
            z = ours.score[0][i] if sign > 0 else -2 * ours.score[0][i]  # repressions count half
            lines.append(f"| {symbols[i]} | {z:+.2f} | {words[sign]} | {in_table} | {correlation:+.2f} |")
    lines += ["", "Targets that scDiVa's authors name:", "", "| target | claimed | said | rank |", "|---|---|---|---:|"]
    for symbol, sign in CLAIMED.items():
        if symbol in place:
            i = place[symbol]
            lines.append(
                f"| {symbol} | {words[sign]} | {words[int(ours.sign[0][i])]} | {ranks[i]:,} of {symbols.size:,} |"
            )
        else:
            lines.append(f"| {symbol} | {words[sign]} | not expressed in enough of these cells | |")
    (out / "grn_spi1.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    adata = ad.concat([ad.read_h5ad(file) for file in files], join="inner")
    adata.obs_names_make_unique()
    adata = adata[np.isin(adata.obs["cell_type_pred"].astype(str), MYELOID)].copy()
    sd.tl.grn(adata, model, regulators=["SPI1"], method="response", n_top=200)
    sd.pl.regulon(adata, out / "grn_spi1.png", tf="SPI1", n_targets=30, known=list(signs))


if __name__ == "__main__":
    main()
