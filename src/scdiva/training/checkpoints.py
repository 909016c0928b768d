"""Checkpoints that survive a kill at any moment.

A checkpoint is ``step-00001234.ckpt`` with its SHA-256 beside it (``.sha256``, the format of ``sha256sum``). Both are
written whole or not at all, the checksum first: a checkpoint without a matching checksum is damaged and is not used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from scdiva.config import atomic_path

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk: atomic and checksummed writes, and no pickled objects on reading."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint and its checksum."""
        path = Path(path)
        with atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                hashing = _HashingWriter(file)
                torch.save(checkpoint, cast(IO[bytes], hashing))
            with atomic_path(_checksum_path(path)) as checksum:
                checksum.write_text(f"{hashing.sha256.hexdigest()}  {path.name}\n", encoding="ascii")

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Read a checkpoint: tensors and plain values only, whatever ``weights_only`` says."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its checksum."""
        # The checkpoint first: a checksum without a checkpoint is harmless.
        Path(path).unlink(missing_ok=True)
        _checksum_path(Path(path)).unlink(missing_ok=True)


class CheckpointFolder:
    """The checkpoints of one run.

    Parameters
    ----------
    folder
        Where they are.
    keep
        How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self.io = AtomicCheckpointIO()

    def path(self, step: int) -> Path:
        """Return where the checkpoint after this many steps belongs."""
        return self.folder / f"step-{step:08d}.ckpt"

    def newest_good(self) -> tuple[int, Path] | None:
        """Return (step, path) of the newest undamaged checkpoint, or None; warn about damaged ones in the log."""
        for step, path in reversed(self._all()):
            if _is_good(path):
                return step, path
            log.warning("checkpoint %s is damaged (checksum missing or wrong); trying the one before", path)
        return None

    def prune(self) -> None:
        """Delete all but the newest checkpoints."""
        for _, path in self._all()[: -self.keep]:
            self.io.remove_checkpoint(path)

    def discard_after(self, step: int) -> None:
        """Delete checkpoints after a step (damaged ones), and what interrupted writes have left."""
        for later, path in self._all():
            if later > step:
                self.io.remove_checkpoint(path)
        for left_over in self.folder.glob(".tmp-*"):
            left_over.unlink(missing_ok=True)

    def _all(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem.removeprefix("step-")), path) for path in self.folder.glob("step-*.ckpt"))


class _HashingWriter:
    """Computes the checksum while the file is written: a checkpoint is neither held in memory nor read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_good(path: Path) -> bool:
    try:
        expected = _checksum_path(path).read_text(encoding="ascii").split()[0]
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    except (OSError, IndexError, UnicodeDecodeError):
        return False
