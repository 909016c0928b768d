"""Preprocessing: look before you leap. ``sd.pp.check``."""

from __future__ import annotations

from scdiva.tasks.check import CheckReport, check

__all__ = ["CheckReport", "check"]
