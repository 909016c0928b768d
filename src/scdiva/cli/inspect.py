"""``scdiva inspect PATH | --preset NAME``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

_N_LISTED = 20


def inspect(
    path: Annotated[str | None, typer.Argument(metavar="PATH", help="Bundle folder or Hugging Face Hub id.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A bundled model, or a size: official, tiny, small, base.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Verify a model bundle and tell what it holds."""
    from scdiva.models.bundle import BUNDLED, WEIGHTS, bundled_path, find_bundle, read_bundle, read_weights

    if (path is None) == (preset is None):
        raise typer.BadParameter("give either PATH or --preset NAME")
    if preset is not None and preset not in BUNDLED:
        _tell_size(preset, as_json=as_json)
        return
    folder = bundled_path(preset) if preset is not None else find_bundle(str(path))
    content = read_bundle(folder)
    weights = read_weights(folder)
    facts = {
        "path": str(folder),
        "hash": content.hash,
        **content.config,
        "n_genes": content.vocabulary.n_genes,
        "weights_mb": round((folder / WEIGHTS).stat().st_size / 1e6, 2),
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in weights.items()
        },
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{facts.get('name') or folder.name}: every file verified against its hash")
    for key, value in facts.items():
        if key == "tensors":
            typer.echo("  tensors")
            for name, (dtype, *shape) in value.items():
                typer.echo(f"    {name:<32}{dtype:<10}{' x '.join(map(str, shape)) or 'scalar'}")
        elif isinstance(value, dict):
            typer.echo(f"  {key}")
            for name, item in value.items():
                if isinstance(item, list) and item and isinstance(item[0], dict):
                    typer.echo(f"    {name}")
                    for entry in item[:_N_LISTED]:
                        typer.echo("      " + ", ".join(f"{k} {v}" for k, v in entry.items()))
                    if len(item) > _N_LISTED:
                        typer.echo(f"      and {len(item) - _N_LISTED:,} more: --json shows all")
                else:
                    typer.echo(f"    {name:<28}{item}")
        else:
            typer.echo(f"  {key:<30}{value}")


def _tell_size(preset: str, *, as_json: bool) -> None:
    """Print a named size of the network and its number of parameters; there are no weights."""
    from scdiva.errors import BundleError
    from scdiva.genes import GeneVocabulary
    from scdiva.models.bundle import BUNDLED
    from scdiva.models.scdiva.presets import PRESETS, n_parameters

    if preset not in PRESETS:
        raise BundleError(
            f"there is no preset {preset!r}",
            expected=f"a bundled model ({', '.join(BUNDLED)}) or a size ({', '.join(PRESETS)})",
            fix="correct the name, or give the path of a bundle",
        )
    config, n_genes = PRESETS[preset], GeneVocabulary.default().n_genes
    facts = {
        "preset": preset,
        "n_parameters": n_parameters(config, n_genes),
        "n_genes": n_genes,
        "model": config.model_dump(mode="json"),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{preset}: {facts['n_parameters']:,} parameters over {n_genes:,} genes (a size, without weights)")
    typer.echo("\n".join(f"  {key:<30}{value}" for key, value in config.model_dump(mode="json").items()))
