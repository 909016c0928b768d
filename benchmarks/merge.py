"""Several files as one, over the genes that all of them measure: what integration is judged on.

    python benchmarks/merge.py OUT.h5ad DONOR1.h5ad:donor DONORS.h5ad:batch

After each file the column of .obs that tells its batches apart; without one the file is one batch, under its own name.
Genes are matched by scdiva's vocabulary, so that symbols of different years meet. Labels stay where they are, in
``.obs["cell_type"]``; ``--label-key`` names another column.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.genes import GeneVocabulary


def main() -> None:
    """Merge the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", help="FILE or FILE:BATCH_COLUMN")
    parser.add_argument("--label-key", default="cell_type")
    args = parser.parse_args()
    vocabulary = GeneVocabulary.default()
    counts, tables, measured = [], [], []
    for entry in args.files:
        path, _, key = entry.rpartition(":") if ":" in entry else (entry, "", "")
        reader = open_counts(open_source(Path(path)), vocabulary)
        cells = reader.read(np.arange(len(reader)))
        obs = reader.source.obs
        batch = obs[key].astype(str).to_numpy() if key else np.full(len(reader), Path(path).stem)
        label = obs[args.label_key].astype(str).to_numpy()
        names = [f"{Path(path).stem}:{name}" for name in obs.index.astype(str)]
        tables.append(pd.DataFrame({"cell_type": label, "batch": batch}, index=names))
        counts.append(cells.counts)
        measured.append(cells.is_measured.all(axis=0))
    genes = np.flatnonzero(np.all(measured, axis=0))
    merged = ad.AnnData(sp.csr_matrix(sp.vstack(counts)[:, genes]), obs=pd.concat(tables))
    merged.var_names = vocabulary.ensembl_id[genes]
    merged.var["symbol"] = vocabulary.symbol[genes]
    merged.write_h5ad(args.out, compression="gzip")
    print(merged)
    print(pd.crosstab(merged.obs["cell_type"], merged.obs["batch"]))


if __name__ == "__main__":
    main()
