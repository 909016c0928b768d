"""Which genes are attended to most, in cells with and without interferon, and whether expression explains it.

    python benchmarks/grn_hubs.py --data FOLDER [--out docs/results/grn_hubs.tsv]

For every gene that 20 cells of a group express: the attention that the other genes of a cell pay to it, in multiples of
an equal share, averaged over the cells that express it (scdiva-blood-tiny, all layers and heads, all genes of a cell
read). What expression explains of its logarithm is a fit of all genes of the group with the mean log1p(CP10K) where
expressed, its square, and the log share of cells that express the gene (least squares, ours); "excess" is the rest. The
change between the groups is set against the change in expression in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import spearmanr

from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.attention import attention_sums
from scdiva.serialization import log1p_cp10k

MIN_CELLS = 20
SHOWN = ("ISG15", "SERPING1", "IFI6", "ISG20", "IFIT3", "LY6E", "MX1", "B2M", "CXCL10", "STAT1")


def explained(y: np.ndarray, *features: np.ndarray) -> tuple[np.ndarray, float]:
    x = np.column_stack([np.ones(y.size), *features])
    fit = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return fit, 1 - float(np.var(y - fit) / np.var(y))


def hubs(model: ScDiVa, cells) -> pd.DataFrame:
    n = np.bincount(cells.counts.indices, minlength=cells.n_genes)
    genes = np.flatnonzero(n >= MIN_CELLS)
    sums = attention_sums(model, cells, genes, np.zeros(0, dtype=np.int64))
    values = sp.csr_matrix((log1p_cp10k(cells), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape)
    value = np.asarray(values.sum(axis=0)).ravel()[genes] / n[genes]
    frame = pd.DataFrame(
        {"received": sums.received_R / sums.n_cells_R, "value": value, "share": n[genes] / cells.n_cells},
        index=pd.Index(model.vocabulary.symbol[genes], name="gene"),
    )
    fit, r2 = explained(np.log(frame["received"]), frame["value"], frame["value"] ** 2, np.log(frame["share"]))
    frame["excess"] = np.exp(np.log(frame["received"]) - fit)
    print(
        f"{cells.n_cells} cells, {len(frame)} genes; {sums.special_share:.0%} of attention on tokens that are no genes;"
        f" expression explains {r2:.0%} of the variance of log attention received"
    )
    return frame[~frame.index.duplicated()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = ScDiVa.from_pretrained("scdiva-blood-tiny", device="cpu")
    source = open_source(arguments.data / "perturb_kang_ifnb.h5ad")
    cells = open_counts(source, model.vocabulary).read(np.arange(source.n_cells))
    group = source.column("perturbation").astype(str).to_numpy()
    frames = {name: hubs(model, cells.take(np.flatnonzero(group == name))) for name in ("IFNB", "control")}
    both = frames["IFNB"].join(frames["control"], how="inner", lsuffix="_IFNB", rsuffix="_control")
    change = np.log(both["received_IFNB"] / both["received_control"])
    fit, r2 = explained(
        change.to_numpy(),
        (both["value_IFNB"] - both["value_control"]).to_numpy(),
        np.log(both["share_IFNB"] / both["share_control"]).to_numpy(),
    )
    both["change"] = np.exp(change)
    both["change_beyond_expression"] = np.exp(change - fit)
    rho = spearmanr(both["received_IFNB"], both["received_control"])[0]
    print(
        f"{len(both)} genes in both; Spearman of attention received {rho:.3f}; expression explains {r2:.0%} of changes"
    )
    for name, frame in frames.items():
        for column in ("received", "excess"):
            top = frame[column].sort_values(ascending=False).head(15)
            print(f"{name}, by {column}:", ", ".join(f"{gene} {value:.2f}" for gene, value in top.items()))
    for column in ("change", "change_beyond_expression"):
        top = both[column].sort_values(ascending=False).head(15)
        print(f"{column}:", ", ".join(f"{gene} {value:.2f}" for gene, value in top.items()))
    for name, frame in frames.items():
        ranks = frame[["received", "excess"]].rank(ascending=False)
        for gene in SHOWN:
            if gene in frame.index:
                row = frame.loc[gene]
                print(
                    f"{name} {gene}: received {row['received']:.2f} (rank {ranks.loc[gene, 'received']:.0f} of "
                    f"{len(frame)}), in {row['share']:.0%} of cells, mean {row['value']:.2f}, excess "
                    f"{row['excess']:.2f} (rank {ranks.loc[gene, 'excess']:.0f})"
                )
    ranks = both[["change", "change_beyond_expression"]].rank(ascending=False)
    for gene in SHOWN:
        if gene in both.index:
            row = both.loc[gene]
            print(
                f"change {gene}: {row['change']:.2f} (rank {ranks.loc[gene, 'change']:.0f} of {len(both)}), beyond "
                f"expression {row['change_beyond_expression']:.2f} "
                f"(rank {ranks.loc[gene, 'change_beyond_expression']:.0f})"
            )
    if arguments.out:
        both.round(4).to_csv(arguments.out, sep="\t")


if __name__ == "__main__":
    main()
