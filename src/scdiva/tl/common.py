"""What the tools share: checks of the AnnData and of the names of slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_record
from scdiva.errors import OutputError, SourceError

if TYPE_CHECKING:
    pass


def check_key(key: str) -> None:
    """Refuse a name that no slot can have."""
    if not key or "/" in key:
        raise OutputError(f"key_added={key!r}", expected="a name without '/'", fix="for example X_scdiva")


def check_adata(adata: Any, *, copy: bool) -> None:
    """Refuse what cannot take a result."""
    # deferred: importing anndata takes a second that `--help` need not wait for
    import anndata as ad

    if not isinstance(adata, ad.AnnData):
        raise SourceError(
            f"a {type(adata).__name__} is no AnnData", expected="an AnnData", fix="sd.tl.embed_file takes paths"
        )
    if adata.isbacked and (adata.is_view or copy):
        raise SourceError(
            "a view or a copy of a backed AnnData cannot take the result",
            expected="an AnnData in memory, or a whole backed one",
            fix="adata = adata.to_memory(), or sd.tl.embed_file",
        )
    check_record(adata.uns.get("scdiva", {}))
