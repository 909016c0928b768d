"""``scdiva evaluate generation FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scdiva.cli.common import DeviceOption, FileArgument, LayerOption, ModelOption

_DEFAULT = "scdiva-blood-tiny"


def evaluate_generation(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for report, rows, cells and picture; resumes from it.")],
    labels_key: Annotated[str, typer.Option("--labels-key", help=".obs column with the cell types.")] = "cell_type",
    model: ModelOption = _DEFAULT,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            help="Run only this method (repeatable); 'scdiva' is the model, 'scdiffusion' a latent diffusion of FILE, "
            "'scdiffusion_parity' the published one, 'scdiffusion_scdiva' and 'scdiffusion_scdiva_masked' one on the z "
            "of the model, with either decoder.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, each with a split of its own.")] = 3,
    train_fraction: Annotated[
        float, typer.Option("--train-fraction", min=0.05, max=0.95, help="Share of each type that is trained on.")
    ] = 0.7,
    generated: Annotated[
        Path | None,
        typer.Option("--generated", help="Judge these cells instead of a model; needs --heldout. FILE: trained on."),
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option("--heldout", help="Real cells that --generated was not trained on.")
    ] = None,
    unit: Annotated[
        str, typer.Option("--unit", help="What --generated holds: counts, cp10k or log1p_cp10k.")
    ] = "counts",
    n_trees: Annotated[int, typer.Option("--trees", min=1, help="Trees of the random forest.")] = 300,
    layer: LayerOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Judge generated cells by held-out real ones, beside simple generators, a null control and a ceiling."""
    if unit not in ("counts", "cp10k", "log1p_cp10k"):
        raise typer.BadParameter(f"{unit!r} is none of counts, cp10k, log1p_cp10k", param_hint="--unit")
    from scdiva.errors import ConfigError, OutputError

    if (generated is None) != (heldout is None):
        raise ConfigError(
            "--generated without --heldout" if heldout is None else "--heldout without --generated",
            expected="both, and FILE with the cells that the generator was trained on",
            fix="give both: cells that were trained on say nothing about a generator",
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")
    from scdiva.data.source import open_source
    from scdiva.tasks import evaluate_generation as task

    # before there is a folder: known_cells keeps no other column that an error could name
    for cells in (file, heldout, generated):
        if cells is not None:
            open_source(cells).column(labels_key)
    if generated is not None:
        task.chosen_methods(["generated"], methods)
    else:
        task.chosen_methods(["scdiva"] if methods is None else task.GENERATORS, methods)

    shared: dict[str, Any] = {
        "labels_key": labels_key,
        "methods": methods,
        "seeds": tuple(range(seeds)),
        "layer": layer,
        "n_trees": n_trees,
        "rows_path": out / "rows.jsonl",
        "cells_folder": out / "cells",
        "on_row": lambda run: typer.echo(str(run)),
    }
    symbols: dict[str, str] = {}
    if generated is not None and heldout is not None:
        out.mkdir(parents=True, exist_ok=True)
        report = task.evaluate_generated(file, heldout, generated, unit=unit, **shared)  # type: ignore[arg-type]
    else:
        from scdiva.models.scdiva import ScDiVa

        loaded = ScDiVa.from_pretrained(model, device=device)
        generators = {}
        if methods is None or "scdiva" in methods:
            generators["scdiva"] = task.generator_of("scdiva", loaded, labels_key, folder=out / "models")
            # rows of another model, or of another version of it, are not its rows
            generators["scdiva"].fingerprint = loaded.bundle_hash  # type: ignore[attr-defined]
        for name in ("scdiffusion", "scdiffusion_parity"):
            if methods is not None and name in methods:
                generators[name] = task.generator_of(name, labels_key, folder=out / "models")
        for name in ("scdiffusion_scdiva", "scdiffusion_scdiva_masked"):
            if methods is not None and name in methods:
                generators[name] = task.generator_of(name, loaded, labels_key, folder=out / "models")
                generators[name].fingerprint = loaded.bundle_hash  # type: ignore[attr-defined]
        # whichever methods are asked for: rows of one folder are of the same genes
        data, what = task.known_cells(file, loaded.vocabulary, labels_key, layer=layer)
        typer.echo(what)
        out.mkdir(parents=True, exist_ok=True)
        report = task.evaluate_generation(data, generators, train_fraction=train_fraction, **shared)
        symbols = dict(zip(data.var_names, data.var["symbol"], strict=True))
    _draw(out, report.ours, labels_key, symbols)
    for path in report.write(out):
        typer.echo(str(path))


def _draw(out: Path, ours: tuple[str, ...], labels_key: str, symbols: dict[str, str]) -> None:
    """Draw the cells of the first seed: held out and ours, at most four methods; a baseline if none is ours."""
    import anndata as ad

    from scdiva import pl
    from scdiva.tasks.evaluate_generation import IS_SAMPLE
    from scdiva.tasks.generation_report import BASELINES, TITLES

    folder = out / "cells" / "seed-0"
    there = [name for name in ours if (folder / f"{name}.h5ad").exists()][:4]
    there = there or [name for name in BASELINES if (folder / f"{name}.h5ad").exists()][:1]
    if not there:
        return
    made = {TITLES.get(name, name): ad.read_h5ad(folder / f"{name}.h5ad") for name in there}
    real, train = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("heldout", "train"))
    # markers are chosen by cells that are neither drawn nor compared with
    third = train[~train.obs[IS_SAMPLE].to_numpy(dtype=bool)].copy()
    pl.generation(real, made, out / "generation.png", color=labels_key)
    typer.echo(str(out / "generation.png"))
    if real.obs[labels_key].nunique() > 1:
        real.var["symbol"] = [symbols.get(name) or name for name in real.var_names]
        path = out / "markers.png"
        pl.marker_dots(real, made, path, color=labels_key, markers_of=third, gene_symbols="symbol")
        typer.echo(str(out / "markers.png"))
