"""Observability for FLIP's server on NVIDIA FLARE: every run recorded, its status told, its results kept.

Importing this package imports nothing heavy; ``FLIP`` comes when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flip_observability.client import FLIP

__all__ = ["FLIP"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "FLIP":
            from flip_observability.client import FLIP

            return FLIP
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
