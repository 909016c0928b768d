"""How an integrated model maps a batch that it has not seen.

    python benchmarks/unseen_batch.py FILE.h5ad --batch-key batch --label-key cell_type --out RESULT.json

Each batch in turn is left out of the integration and embedded by the resulting model. Measured: labels carried over to
it by its 15 nearest neighbours among the other batches (accuracy, macro-F1), and the mixing of all batches (iLISI).
Beside it: the same model trained with that batch (what leaving it out costs), the principal components of the other
batches, and the model's z as it comes.
"""

import argparse
import json
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from scdiva.data.components import components_of, fit_components, log_cp10k, variable_genes
from scdiva.data.reader import open_counts
from scdiva.metrics.annotation import annotation_scores
from scdiva.metrics.integration import Neighbours, ilisi
from scdiva.models.scdiva import ScDiVa
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.integrate import integrate

WAYS = ("integrated without the batch", "integrated with it", "PCA-50 of the others", "z as it is")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adata = ad.read_h5ad(args.file)
    model = ScDiVa.from_pretrained(args.model, device="cpu")
    batch, label = (adata.obs[key].astype(str).to_numpy() for key in (args.batch_key, args.label_key))
    rows = []
    for seed in range(args.seeds):
        whole = integrate(adata, model, args.batch_key, seed=seed, progress=False).z
        for left_out in np.unique(batch):
            is_new = batch == left_out
            points = {WAYS[1]: whole}
            known = integrate(adata[~is_new].copy(), model, args.batch_key, seed=seed, progress=False).model
            for name, used in ((WAYS[0], known), (WAYS[3], model)):
                reader = open_counts(adata, used.vocabulary)
                points[name] = embed_cells(used, reader.read(np.arange(len(reader))))
            values = log_cp10k(adata.X)
            values = values[:, variable_genes(values[~is_new], batches=batch[~is_new])]
            points[WAYS[2]] = components_of(fit_components(values[~is_new], seed=seed), values)
            for name in WAYS:
                z = points[name]
                said = KNeighborsClassifier(15).fit(z[~is_new], label[~is_new]).predict(z[is_new])
                scored = annotation_scores(label[is_new], said)
                rows.append(
                    {
                        "seed": seed,
                        "batch": left_out,
                        "way": name,
                        "accuracy": scored.accuracy,
                        "macro_f1": scored.macro_f1,
                        "ilisi": ilisi(Neighbours.fit(z), batch),
                    }
                )
                print(rows[-1], flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| way | accuracy | macro-F1 | iLISI |\n|---|---:|---:|---:|")
    for name in WAYS:
        found = [[row[key] for key in ("accuracy", "macro_f1", "ilisi")] for row in rows if row["way"] == name]
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in np.mean(found, axis=0))} |")


if __name__ == "__main__":
    main()
