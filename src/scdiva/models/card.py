"""The model card: what a bundle is and is not, generated from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scdiva.genes import GeneVocabulary


def model_card(
    config: Mapping[str, Any],
    vocabulary: GeneVocabulary,
    n_parameters: int,
    n_latent: int,
    *,
    use: Sequence[str] | None = None,
    caution: Sequence[str] | None = None,
) -> str:
    """Write the card of a bundle.

    Parameters
    ----------
    config
        Content of ``config.json``.
    vocabulary
        The bundle's genes.
    n_parameters
        Number of weights.
    n_latent
        Dimensions of the embedding.
    use
        Lines of Python that show how the model is used; those of an embedding if left out.
    caution
        What the card ends with; by ``use`` if left out.

    Returns
    -------
    str
        Markdown, with the YAML head that the Hugging Face Hub reads.
    """
    training = config.get("training", {})
    metrics = config.get("metrics", {})
    name = config.get("name") or "unnamed scDiVa model"
    complete = GeneVocabulary.default()
    trimmed = "" if vocabulary == complete else f" of {complete.n_genes:,}: the genes seen in its training corpus"
    lines = [
        "---",
        "library_name: scdiva",
        f"license: {config.get('license') or 'unknown'}",
        "tags: [single-cell, scRNA-seq, biology]",
        "---",
        f"# {name}",
        "",
        f"{n_parameters:,} parameters; embedding of {n_latent} dimensions; {vocabulary.n_genes:,} genes{trimmed}.",
        f"Trained parts: {', '.join(config.get('trained_heads', [])) or 'none'}; there are no others in this bundle.",
        "",
    ]
    if config.get("description"):
        lines += [str(config["description"]), ""]
    if training:
        lines += [
            "## Training",
            "",
            f"{training['n_cells']:,} cells for training, {training['n_heldout']:,} held out "
            f"({training['heldout']}); {training['n_cells_seen']:,} cell passes in {training['n_steps']:,} steps; "
            f"kept: step {training['best_step']:,}; seed {training['seed']}.",
            "",
            "| source | cells | genes matched | share of UMIs covered | licence |",
            "|---|---:|---:|---:|---|",
        ]
        lines += [
            f"| {s['name']} | {s['n_cells']:,} | {s['n_genes']:,} | {s['coverage']:.1%} "
            f"| {s['licence'] or 'not stated'} |"
            for s in training["sources"]
        ]
        if training.get("base_model"):
            lines += ["", f"Started from {training['base_model']}."]
        lines.append("")
    if labels := config.get("conditions"):
        lines += [
            "## Conditions",
            "",
            "What the model can be told of a cell; the labels are those of its training files.",
            "",
        ]
        lines += [f"- {field}: {', '.join(names)}" for field, names in labels.items()]
        lines.append("")
    if metrics:
        lines += ["## Measured on the held-out cells", "", "| metric | value | floor |", "|---|---:|---:|"]
        for key, value in metrics.items():
            if not key.endswith("_floor"):
                floor = metrics.get(f"{key}_floor")
                lines.append(f"| {key} | {value:.4f} | {'' if floor is None else f'{floor:.4f}'} |")
        lines.append("")
    shown = use or (
        "import scdiva as sd",
        f'model = sd.ScDiVa.from_pretrained("{config.get("name") or "PATH"}")',
        'sd.tl.embed(adata, model)  # raw counts in; .obsm["X_scdiva"] out',
    )
    lines += ["## Use", "", "```python", *shown, "```", ""]
    lines += [*(caution or (_OF_EMBEDDINGS if use is None else _OF_GENERATED_CELLS)), ""]
    return "\n".join(lines)


_OF_EMBEDDINGS = (
    "Human raw counts only. Embeddings of tissues and technologies that are far from the training corpus should be",
    "compared with a plain PCA of your own data before they are believed.",
)
_OF_GENERATED_CELLS = (
    "Human genes only. Generated cells are no data: they show nothing that the training cells did not.",
)
