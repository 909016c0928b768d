"""``tl.integrate``: an embedding without batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_output, check_recorded_in, write_with_slots
from scdiva.data.source import open_source
from scdiva.errors import OutputError
from scdiva.tasks.integrate import BUNDLE, Integrated
from scdiva.tasks.integrate import integrate as _integrate
from scdiva.tl.common import check_adata, check_key

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.config import IntegrationConfig
    from scdiva.models.scdiva.model import ScDiVa


def integrate(
    adata: AnnData,
    model: ScDiVa,
    batch_key: str,
    *,
    label_key: str | None = None,
    layer: str | None = None,
    key_added: str = "X_scdiva_integrated",
    config: IntegrationConfig | None = None,
    save: str | Path | None = None,
    seed: int = 0,
    copy: bool = False,
) -> ScDiVa | tuple[ScDiVa, AnnData]:
    """Embed cells so that they lie together by what they are, not by the batch they come from.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``; it is not changed.
    batch_key
        Column of ``.obs`` with the batch of every cell.
    label_key
        Column of ``.obs`` with cell types, if the embedding may be trained on them; cells without one take part, too.
        Such an embedding must not be judged by these labels as if it had not seen them: compare it with scANVI, not
        with methods that were not shown any.
    layer
        Layer with the counts; ``"raw"`` for ``adata.raw``.
    key_added
        Slot in ``.obsm``.
    config
        The loss; ``IntegrationConfig.published()`` is the protocol of the paper, which fine-tunes the whole of a model
        with a trunk; what is then written is LayerNorm([z; h_LAT]).
    save
        New folder for the run: log, curve, and the model, whose bundle is ``save/bundle``. The same call resumes.
    seed
        Seed.
    copy
        Return a copy with the result instead of writing into ``adata``.

    Returns
    -------
    ScDiVa or (ScDiVa, AnnData)
        The integrated model: ``sd.tl.embed(more_cells, integrated)`` maps further cells, of these or of other batches,
        without training. ``adata`` (or its copy) gets ``.obsm[key_added]`` ``(n_obs, n_latent)`` float32 and
        ``.uns["scdiva"]["integrate"][key_added]``.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, UnsupportedError
        The data or the model cannot be used; nothing is written.
    TrainingError, NonFiniteLossError
        See :func:`scdiva.training.fit`.
    """
    check_key(key_added)
    check_adata(adata, copy=copy)
    found = _integrate(
        adata, model, batch_key, label_key=label_key, layer=layer, config=config, out_dir=save, seed=seed
    )
    target = adata.copy() if copy else adata
    target.obsm[key_added] = found.z
    earlier = target.uns.get("scdiva", {})
    records = {**earlier.get("integrate", {}), key_added: dict(found.record)}
    target.uns["scdiva"] = {**earlier, "integrate": records}
    return (found.model, target) if copy else found.model


def integrate_file(
    path_in: str | Path,
    path_out: str | Path,
    model: ScDiVa,
    batch_key: str,
    *,
    label_key: str | None = None,
    layer: str | None = None,
    key_added: str = "X_scdiva_integrated",
    config: IntegrationConfig | None = None,
    save: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Integrated:
    """Integrate the cells of a file and write a copy of it with the result; everything as in :func:`integrate`.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; or ``save`` is a file. Raised before any
        work is done.
    """
    check_key(key_added)
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    check_recorded_in(Path(path_in))
    if save is not None and Path(save).exists() and not Path(save).is_dir():
        raise OutputError(f"{save} is a file", expected="a folder", fix="name another one")
    found = _integrate(
        path_in, model, batch_key, label_key=label_key, layer=layer, config=config, out_dir=save, seed=seed
    )
    slots: dict[str, Any] = {f"obsm/{key_added}": found.z, f"uns/scdiva/integrate/{key_added}": dict(found.record)}
    write_with_slots(open_source(path_in), target, slots)
    return found


__all__ = ["BUNDLE", "integrate", "integrate_file"]
