"""Write the data sets that come with the package: ``python scripts/build_bundled_data.py --data DIR``.

Only sets whose licence permits it (10x Genomics, CC BY 4.0). Counts, gene names and labels stay as they are; the file
gets its attribution.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import h5py
from anndata.io import write_elem

ATTRIBUTION = {
    "pbmc3k": (
        "3k PBMCs from a Healthy Donor, Cell Ranger 1.1.0, by 10x Genomics, CC BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/); cell types as in clustifyr (MIT), after the Seurat tutorial. "
        "Changes: genes without counts dropped, labels added."
    ),
    "zheng_sorted7_3500": (
        "FACS-sorted PBMC of Zheng et al., Nature Communications 8, 14049 (2017), by 10x Genomics, CC BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/); subset of 500 cells of each of 7 types as in scMINER "
        "(Apache-2.0). Changes: subset of genes and cells, values turned back into the original UMI counts."
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the original .h5ad files")
    parser.add_argument("--out", type=Path, default=Path("src/scdiva/data/files"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, attribution in ATTRIBUTION.items():
        path = arguments.out / f"{name}.h5ad"
        shutil.copyfile(arguments.data / f"{name}.h5ad", path)
        with h5py.File(path, "r+") as file:
            write_elem(file, "uns/attribution", attribution)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
