"""Published weights into bundles: the token model and the dense model of the first published version.

Conversion is strict: the file is recognised by its tensor names, its sizes are read off its tensors, and every tensor
must be there, once, of the right shape. The only way around is ``trunk_only``, for fine-tuned files: it takes the
tensors that such a file shares with the published model and reports every tensor that it leaves behind.

Which gene has which row of the published weights was never published, so the user must say it: a vocabulary file is
required. A bundle's vocabulary may have any order, so the rows of the weights stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.config import DenseConfig, OfficialConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError
from scdiva.genes import GeneVocabulary
from scdiva.models.bundle import find_bundle, read_bundle, write_bundle
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.model import FAMILY
from scdiva.models.scdiva.official import OfficialNetwork
from scdiva.models.scdiva.row_vocabulary import N_SPECIAL_ROWS, listed, read_row_vocabulary

HEAD_WIDTH = 64
"""Width of an attention head in both published models; their number cannot be read off the tensors otherwise."""

_LAYER = re.compile(r"(?:encoder\.)?layers\.(\d+)\.")

# our name to the published names whose tensors it holds, one above the other
_FUSED = {
    "attention.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "attention.out.weight": ("attn.o_proj.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Tensor names of a published model.

    ``marker`` tells it from the other one; ``renamed`` maps the start of our names to the start of the published ones;
    ``heads`` maps a head's name to the start of the names of its tensors, ours and published alike.
    """

    title: str
    marker: str
    renamed: Mapping[str, str]
    heads: Mapping[str, str]

    def published_names(self, name: str) -> tuple[str, ...]:
        """Return the published names of one of our tensors."""
        for ours, published in self.renamed.items():
            if name.startswith(ours):
                name = published + name.removeprefix(ours)
                break
        for ours, parts in _FUSED.items():
            if name.endswith(ours):
                return tuple(name.removesuffix(ours) + part for part in parts)
        return (name,)


_TOKEN = _Layout(
    title="token model",
    marker="gene_embedding.weight",
    renamed={
        "trunk.layers.": "layers.",
        "trunk.norm.": "final_norm.",
        "latent_encoder.": "latent_encoder.mlp.",
        "gene_mask": "gene_mask_emb",
        "value_mask": "value_mask_emb",
    },
    heads={"gene": "gene_head.", "value": "value_head."},
)
_DENSE = _Layout(
    title="dense model",
    marker="gene_embedding.gene_projection.weight",
    renamed={
        "layers.": "encoder.layers.",
        "gene_projection.": "gene_embedding.gene_projection.",
        "gene_norm.": "gene_embedding.layer_norm.",
        "mu.": "variational_layer.mu_projection.",
        "logvar.": "variational_layer.logvar_projection.",
        "annotation_head.0.": "annotation_head.dense.",
        "annotation_head.2.": "annotation_head.classifier.",
        "batch_integration_head.0.": "batch_integration_head.dense.",
        "batch_integration_head.2.": "batch_integration_head.decoder.",
    },
    heads={"annotation": "annotation_head.", "batch_integration": "batch_integration_head."},
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Parameters
    ----------
    path
        The new bundle.
    architecture
        "official" (token model) or "official-dense".
    n_parameters
        Weights of the network, untrained heads included.
    n_genes
        Genes of the vocabulary.
    prefix
        What was stripped from the tensor names; empty if nothing was.
    ignored
        Tensors of the file that were left behind (``trunk_only``), under their names in the file.
    untrained_heads
        Heads that the file did not have; they hold start values, and using them raises ``UntrainedHeadError``.
    unknown_ids
        Ensembl ids of the vocabulary file that scdiva's gene tables do not list as current; kept as they are.
    statistics
        Where the gene statistics, which order the tokens, come from.
    """

    path: Path
    architecture: str
    n_parameters: int
    n_genes: int
    prefix: str
    ignored: tuple[str, ...]
    untrained_heads: tuple[str, ...]
    unknown_ids: tuple[str, ...]
    statistics: str


def convert(
    path: str | Path,
    out: str | Path,
    *,
    vocabulary: str | Path | None,
    trunk_only: bool = False,
    statistics: str | Path | None = None,
    name: str = "",
    overwrite: bool = False,
) -> Conversion:
    """Turn a file of published weights into a bundle.

    Parameters
    ----------
    path
        ``.safetensors``, or a PyTorch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) of plain tensors, which may be
        wrapped in ``{"state_dict": ...}``.
    out
        The bundle's folder, which must not exist.
    vocabulary
        Which gene has which row: one gene per line in row order, Ensembl id or symbol or both, tab-separated, with or
        without a header and a column of row numbers; either the genes alone or all rows with the five special ones.
    trunk_only
        Take what a fine-tuned file shares with the published model and leave the rest behind. Without it, a tensor
        too many is an error, as is a tensor too few.
    statistics
        Bundle whose gene statistics order the tokens. The published release has none; without them all genes weigh
        alike, and tokens are ordered by expression.
    name
        Name of the model.
    overwrite
        Replace an existing bundle.

    Raises
    ------
    BundleError
        The file cannot be read, is neither of the two models, or lacks, adds or misshapes tensors (named); there is
        no vocabulary file, or it has another number of rows.
    GeneError
        The vocabulary file names unknown or ambiguous genes, or a gene twice.
    OutputError
        ``out`` exists.
    """
    path = Path(path)
    if vocabulary is None:
        raise BundleError(
            f"no vocabulary file for {path.name}",
            expected="a file that says which gene has which row of the weights",
            fix="pass --vocabulary FILE; the published weights come without one, so it must be asked of their authors: "
            "with wrong rows every result would be wrong without a word",
        )
    in_file = _read_tensors(path)
    layout = _recognise(in_file, path)
    tensors, prefix = _strip_prefix(in_file, layout.marker, path)
    config, n_genes = _sizes(tensors, layout, path)
    ours = _names_and_shapes(config, n_genes, layout)
    heads, ignored = _check(tensors, ours, layout, path, trunk_only=trunk_only)
    rows = read_row_vocabulary(vocabulary, n_genes)
    gene_statistics, origin = _statistics_for(rows.vocabulary, statistics)
    weights = _weights(tensors, ours, config, n_genes, layout, heads)
    untrained = tuple(head for head in layout.heads if head not in heads)
    n_parameters = sum(tensor.numel() for tensor in weights.values())
    result = Conversion(
        path=Path(out),
        architecture=config.architecture,
        n_parameters=n_parameters,
        n_genes=n_genes,
        prefix=prefix,
        ignored=tuple(prefix + tensor if prefix + tensor in in_file else tensor for tensor in ignored),
        untrained_heads=untrained,
        unknown_ids=rows.unknown_ids,
        statistics=origin,
    )
    details = {
        "family": FAMILY,
        "model": config.model_dump(mode="json"),
        "name": name,
        "description": f"Converted from a published file of the scDiVa {layout.title}.",
        "license": "",
        "trained_heads": list(heads),
        "metrics": {},
        "conversion": {
            "file": path.name,
            "trunk_only": trunk_only,
            "ignored_tensors": list(result.ignored),
            "untrained_heads": list(untrained),
            "unknown_ensembl_ids": len(rows.unknown_ids),
            "statistics": origin,
        },
        "n_parameters": n_parameters,
    }
    write_bundle(
        Path(out),
        config=details,
        weights=weights,
        vocabulary=rows.vocabulary,
        statistics=gene_statistics,
        labels={},
        card=_card(details, result, layout),
        overwrite=overwrite,
    )
    return result


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the named tensors of a file; nothing but tensors is ever unpacked."""
    kinds = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    if not path.is_file() or path.suffix not in kinds:
        raise BundleError(
            f"{path} is {'a folder' if path.is_dir() else 'no file of weights' if path.exists() else 'not there'}",
            expected=f"a file ending in {', '.join(kinds)}",
            fix="give the file itself",
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many classes for damage, and for what is not plain tensors
        raise BundleError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0][:160]})",
            expected="an undamaged file of plain tensors",
            fix="fetch it again; a file that holds Python objects is refused because reading it could run code",
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise BundleError(
            f"{path} holds a {type(content).__name__}", expected="named tensors", fix="save its state_dict()"
        )
    odd = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise BundleError(
            f"{path} holds {listed(odd)}, which are no tensors",
            expected='named tensors, or {"state_dict": named tensors}',
            fix="save the state_dict() alone",
        )
    return {str(key): value for key, value in content.items()}


def _recognise(tensors: Mapping[str, torch.Tensor], path: Path) -> _Layout:
    def has(marker: str) -> bool:
        return any(name == marker or name.endswith("." + marker) for name in tensors)

    found = [layout for layout in (_TOKEN, _DENSE) if has(layout.marker)]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise BundleError(
            f"{path.name} has the tensors of {what} of the two published models: {listed(sorted(tensors))}",
            expected=f"{_TOKEN.marker} (token model) or {_DENSE.marker} (dense model)",
            fix="give a file of published scDiVa weights, or one that was fine-tuned from them",
        )
    return found[0]


def _strip_prefix(tensors: Mapping[str, torch.Tensor], marker: str, path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Strip what wrappers such as ``module.`` put before every name; it is what stands before the marker."""
    prefixes = sorted({name.removesuffix(marker) for name in tensors if f".{name}".endswith("." + marker)})
    if len(prefixes) > 1:
        raise BundleError(
            f"{path.name} holds {marker} {len(prefixes)} times, under {listed(prefixes)}",
            expected="one model",
            fix="save the state_dict() of the model alone",
        )
    prefix = prefixes[0]
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise BundleError(
            f"{path.name} holds tensors with and without {prefix} that are otherwise named alike",
            expected="one model",
            fix="save the state_dict() of the model alone",
        )
    return stripped, prefix


def _sizes(
    tensors: Mapping[str, torch.Tensor], layout: _Layout, path: Path
) -> tuple[OfficialConfig | DenseConfig, int]:
    """Read the sizes off the tensors; where the tensor is missing, any size does, for that is an error later on."""
    shape = tuple(tensors[layout.marker].shape)
    n_rows, width = (shape if layout is _TOKEN else shape[::-1]) if len(shape) == 2 else (0, 0)
    if n_rows <= N_SPECIAL_ROWS or width == 0 or width % HEAD_WIDTH:
        sizes = f"more than {N_SPECIAL_ROWS} rows, and a width that is a multiple of {HEAD_WIDTH}"
        raise BundleError(
            f"{layout.marker} of {path.name} has shape {shape}",
            expected=f"(rows, width) with {sizes}" if layout is _TOKEN else f"(width, rows) with {sizes}",
            fix="give a file of published scDiVa weights",
        )

    def rows_of(name: str, otherwise: int) -> int:
        return tensors[name].shape[0] if name in tensors and tensors[name].ndim else otherwise

    layers = {int(match.group(1)) for match in map(_LAYER.match, tensors) if match}
    # an absurd number in a name must not make us build as many layers
    n_layers = min(max(layers, default=0) + 1, len(tensors))
    start = "layers.0" if layout is _TOKEN else "encoder.layers.0"
    n_heads = width // HEAD_WIDTH
    n_hidden = rows_of(f"{start}.mlp.gate_proj.weight", 4 * width)
    if layout is _TOKEN:
        token = OfficialConfig(
            architecture="official", n_layers=n_layers, width=width, n_heads=n_heads, n_hidden=n_hidden
        )
        return token, n_rows - N_SPECIAL_ROWS
    dense = DenseConfig(
        architecture="official-dense",
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        n_hidden=n_hidden,
        n_latent=rows_of("variational_layer.mu_projection.weight", 128),
        n_classes=rows_of("annotation_head.classifier.weight", 100),
    )
    return dense, n_rows - N_SPECIAL_ROWS


def _network(config: OfficialConfig | DenseConfig, n_genes: int) -> OfficialNetwork | DenseNetwork:
    return OfficialNetwork(n_genes, config) if isinstance(config, OfficialConfig) else DenseNetwork(n_genes, config)


def _names_and_shapes(
    config: OfficialConfig | DenseConfig, n_genes: int, layout: _Layout
) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each of our tensors, the published tensors that it is made of, with the shapes that these must have."""
    with torch.device("meta"):
        network = _network(config, n_genes)
    result = {}
    for name, tensor in network.state_dict().items():
        parts = layout.published_names(name)
        shape = (tensor.shape[0] // len(parts), *tensor.shape[1:])
        result[name] = dict.fromkeys(parts, shape)
    return result


def _check(
    tensors: Mapping[str, torch.Tensor],
    ours: Mapping[str, Mapping[str, tuple[int, ...]]],
    layout: _Layout,
    path: Path,
    *,
    trunk_only: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare a file with a layout; return the heads that it has and the tensors that are left behind."""
    expected = {name: shape for parts in ours.values() for name, shape in parts.items()}
    misfit = {
        name: f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    }
    absent = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected]
    heads = tuple(layout.heads)
    if trunk_only:
        incomplete = (*absent, *misfit)
        heads = tuple(h for h in heads if not any(name.startswith(layout.heads[h]) for name in incomplete))
        dropped = tuple(start for head, start in layout.heads.items() if head not in heads)
        surplus += [name for name in expected if name in tensors and name.startswith(dropped)]
        absent = [name for name in absent if not name.startswith(dropped)]
        misfit = {name: text for name, text in misfit.items() if not name.startswith(dropped)}
    used = [name for name in expected if name in tensors and name not in surplus and name not in misfit]
    odd = [name for name in used if not tensors[name].is_floating_point() or not tensors[name].isfinite().all()]
    problems = {
        "missing": absent,
        "not in the model": [] if trunk_only else surplus,
        "of another shape": list(misfit.values()),
        "not finite numbers": odd,
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in problems.items() if names)
        fix = "fetch the file again" if trunk_only else "a fine-tuned file needs --trunk-only; else fetch it again"
        raise BundleError(
            f"{path.name} is not the published {layout.title} ({found})",
            expected=f"exactly its {len(expected)} tensors" if not trunk_only else "every tensor of its trunk",
            fix=fix,
        )
    return heads, tuple(surplus)


def _weights(
    tensors: Mapping[str, torch.Tensor],
    ours: Mapping[str, Mapping[str, tuple[int, ...]]],
    config: OfficialConfig | DenseConfig,
    n_genes: int,
    layout: _Layout,
    heads: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Return our tensors, float32; heads that the file lacks keep the start values of the network."""
    lacking = tuple(start for head, start in layout.heads.items() if head not in heads)
    start_values = _network(config, n_genes).state_dict() if lacking else {}
    return {
        # a copy: tensors of a file may share memory, which safetensors does not store
        name: start_values[name]
        if name.startswith(lacking)
        else torch.cat([tensors[part].detach().float() for part in parts]).clone()
        for name, parts in ours.items()
    }


def _statistics_for(vocabulary: GeneVocabulary, source: str | Path | None) -> tuple[GeneStatistics, str]:
    """Return the gene statistics of a bundle in the order of a vocabulary, or those of no cells at all."""
    if source is None:
        return (
            GeneStatistics.empty(vocabulary.n_genes),
            "none: all genes weigh alike, so tokens are ordered by expression",
        )
    content = read_bundle(find_bundle(source))
    index_of = {ensembl_id: index for index, ensembl_id in enumerate(content.vocabulary.ensembl_id.tolist())}
    index = np.array([index_of.get(ensembl_id, -1) for ensembl_id in vocabulary.ensembl_id.tolist()])
    n_found = int((index >= 0).sum())
    if n_found == 0:
        raise BundleError(
            f"{source} shares no gene with the vocabulary file",
            expected="statistics of the same genes",
            fix="check the vocabulary file, or leave --statistics out",
        )

    def ordered(values: NDArray[Any]) -> NDArray[Any]:
        return np.where(index >= 0, values[index], 0).astype(values.dtype)

    own = content.statistics
    arrays = {field.name: ordered(getattr(own, field.name)) for field in fields(own) if field.name != "n_cells"}
    origin = f"{content.name}: {own.n_cells:,} cells, {n_found:,} of {vocabulary.n_genes:,} genes"
    return GeneStatistics(n_cells=own.n_cells, **arrays), origin


def _card(details: Mapping[str, Any], result: Conversion, layout: _Layout) -> str:
    """Write the model card of a converted model."""
    is_dense = layout is _DENSE
    lines = [
        "---",
        "library_name: scdiva",
        "license: unknown",
        "tags: [single-cell, scRNA-seq, biology]",
        "---",
        f"# {details['name'] or f'converted scDiVa {layout.title}'}",
        "",
        f"Weights of the published scDiVa {layout.title}, converted from `{details['conversion']['file']}`; not "
        "trained by scdiva. Their licence is that of the file.",
        "",
        f"{result.n_parameters:,} parameters; {result.n_genes:,} genes, in the rows that the user's vocabulary file "
        "gave them: the published weights come without one.",
        f"Trained heads: {', '.join(details['trained_heads']) or 'none'}."
        + (f" Untrained, and refused: {', '.join(result.untrained_heads)}." if result.untrained_heads else ""),
        f"Gene statistics: {result.statistics}.",
    ]
    if result.ignored:
        lines += ["", f"Tensors of the file that were left behind: {', '.join(result.ignored)}."]
    lines += [
        "",
        "A cell is one token here: no masks, no diffusion, no gene tokens. Use it through `scdiva.compat`."
        if is_dense
        else "The latent token pools the clean tokens: what this model reconstructs, it has seen in summary. Its "
        "embedding is the final state of that token, not a trained 128-dimensional latent.",
        "",
    ]
    return "\n".join(lines)
