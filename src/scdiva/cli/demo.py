"""``scdiva demo``: the main job on bundled data with the bundled model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scdiva.cli.common import DEFAULT_MODEL, ModelOption, OverwriteOption

if TYPE_CHECKING:
    from scdiva.models.base import Embedder


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("scdiva_demo"),
    model: ModelOption = DEFAULT_MODEL,
    overwrite: OverwriteOption = False,
) -> None:
    """Check, embed, draw and annotate 2,700 blood cells that come with the package, and generate new ones."""
    from scdiva.errors import OutputError

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not empty", expected="a new folder", fix="use --out or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    typer.echo("1  check: what is in the file?")
    from scdiva.data.bundled import dataset_path
    from scdiva.models.scdiva import ScDiVa
    from scdiva.pp import check as run_check

    source = dataset_path("pbmc3k")
    loaded = ScDiVa.from_pretrained(model)
    report = run_check(source, loaded)
    typer.echo(str(report))

    typer.echo(f"2  embed: every cell to {loaded.n_latent} numbers, by {loaded.name}")
    from scdiva.tl import embed_file

    target = out / "pbmc3k_scdiva.h5ad"
    embed_file(source, target, loaded, overwrite=True)
    typer.echo(f'   {target}: .obsm["X_scdiva"]')

    typer.echo("3  judge and draw: do neighbours share their cell type?")
    lines = _judge_and_draw(target, out / "umap.png")
    for line in lines:
        typer.echo(f"   {line}")
    typer.echo(f"   {out / 'umap.png'}")

    typer.echo("4  annotate: the same cells, with the types of sorted cells (zheng_sorted7_3500) as the reference")
    found = _annotate(target, loaded)
    for line in found:
        typer.echo(f"   {line}")
    typer.echo(f'   {target}: .obs["scdiva_cell_type"]')

    typer.echo(f"5  generate: {_PER_TYPE} new cells of each type, as counts, by {_GENERATOR}")
    made = _generate(out / "generated.h5ad")
    for line in made:
        typer.echo(f"   {line}")
    summary = out / "summary.txt"
    summary.write_text("\n".join([str(report), "", *lines, "", *found, "", *made, ""]), encoding="utf-8")
    typer.echo(f"   {out / 'generated.h5ad'}, {summary}")
    typer.echo(f"done in {time.perf_counter() - started:.0f} s. Try next, on your own file:")
    typer.echo("   scdiva check YOUR.h5ad")
    typer.echo("   scdiva embed YOUR.h5ad YOUR_scdiva.h5ad")
    typer.echo("   scdiva annotate YOUR.h5ad OUT.h5ad --reference REFERENCE.h5ad --label-key cell_type")
    typer.echo("   scdiva finetune YOUR.h5ad --out adapted     # adapt the model to your cells, without labels")
    typer.echo("   scdiva finetune YOUR.h5ad --objective conditional --condition cell_type --out mine")
    typer.echo("   scdiva generate NEW.h5ad --model mine/bundle --each cell_type -n 200")


_GENERATOR = "scdiva-blood-tiny-celltype"
_PER_TYPE = 12
_MARKERS = {"B cell": "MS4A1", "CD14+ monocyte": "S100A8", "NK cell": "GNLY", "CD4+ naive T cell": "CD3D"}


def _annotate(path: Path, model: Embedder) -> list[str]:
    """Annotate cells by sorted ones; what each of their own labels was called most often."""
    import anndata as ad

    from scdiva.data.bundled import dataset_path
    from scdiva.tl import annotate

    adata = ad.read_h5ad(path)
    annotate(adata, model, dataset_path("zheng_sorted7_3500"), "cell_type")
    adata.write_h5ad(path)
    lines = [f"{'own label':<20}{'cells':>6}   {'called most often':<32}{'share':>6}{'unlike the reference':>22}"]
    for label, cells in adata.obs.groupby("cell_type", observed=True):
        if label == "unassigned":
            continue
        called = cells["scdiva_cell_type"].value_counts()
        lines.append(
            f"{label:<20}{len(cells):>6,}   {called.index[0]:<32}{called.iloc[0] / len(cells):>6.0%}"
            f"{cells['scdiva_unknown'].mean():>22.0%}"
        )
    return lines


def _generate(path: Path) -> list[str]:
    """Generate cells of every type; share of cells with a count of known markers, beside that of real sorted cells."""
    import numpy as np
    import pandas as pd

    from scdiva.data.bundled import load
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tl import generate

    model = ScDiVa.from_pretrained(_GENERATOR)
    started = time.perf_counter()
    types = model.labels.labels("cell_type")
    cells = generate(model, condition=pd.DataFrame({"cell_type": np.repeat(types, _PER_TYPE)}), seed=0)
    seconds = time.perf_counter() - started
    cells.write_h5ad(path)
    real = load("zheng_sorted7_3500")
    lines = [
        f"{cells.n_obs} cells, {cells.n_obs / seconds:.0f} cells/s; median "
        f"{np.median(np.diff(cells.X.indptr)):.0f} genes and "
        f"{np.median(np.asarray(cells.X.sum(axis=1))):.0f} UMIs per cell",
        f"{'share of cells with a count, generated (real)':<46}" + "".join(f"{gene:>16}" for gene in _MARKERS.values()),
    ]
    for name in _MARKERS:
        shares = []
        for gene in _MARKERS.values():
            column = cells.X[(cells.obs["cell_type"] == name).to_numpy()][:, cells.var_names.get_loc(gene)]
            truth = real.X[(real.obs["cell_type"] == name).to_numpy()][:, real.var_names.get_loc(gene)]
            shares.append(f"{column.nnz / column.shape[0]:>9.0%} ({truth.nnz / truth.shape[0]:>4.0%})")
        lines.append(f"{name:<46}" + "".join(shares))
    return lines


def _judge_and_draw(path: Path, picture: Path) -> list[str]:
    import anndata as ad
    import numpy as np
    import scanpy as sc

    from scdiva.baselines import pca_of_hvg, random_projection
    from scdiva.data.reader import open_counts
    from scdiva.genes import GeneVocabulary
    from scdiva.metrics import knn_scores
    from scdiva.pl import umap

    adata = ad.read_h5ad(path)
    is_labelled = (adata.obs["cell_type"] != "unassigned").to_numpy()
    labels = adata.obs["cell_type"].to_numpy()[is_labelled]
    cells = open_counts(path, GeneVocabulary.default()).read(np.arange(adata.n_obs))
    rows = {
        "scdiva": adata.obsm["X_scdiva"],
        "PCA-50 of the set's own 2,000 variable genes": pca_of_hvg(adata, seed=0),
        "random projection (null control)": random_projection(cells, seed=0),
    }
    lines = [
        f"15 nearest neighbours, 5 folds, {is_labelled.sum():,} labelled cells of {len(set(labels))} types:",
        f"{'':<46}accuracy  macro-F1",
    ]
    for name, z in rows.items():
        scores = knn_scores(np.asarray(z)[is_labelled], labels, seed=0)
        lines.append(f"{name:<46}{scores.accuracy:8.3f}{scores.macro_f1:10.3f}")
    majority = max(np.unique(labels, return_counts=True)[1]) / labels.size
    lines.append(f"{'always the most frequent type':<46}{majority:8.3f}")
    sc.pp.neighbors(adata, use_rep="X_scdiva", n_neighbors=15)
    sc.tl.umap(adata, random_state=0)
    umap(adata, picture, color="cell_type", title="pbmc3k: UMAP of the scdiva embedding, author labels")
    adata.write_h5ad(path)
    return lines
