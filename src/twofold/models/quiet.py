"""Transformers draws a bar whenever weights are read or written, however few; where something else is being told, that is noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """Within the block Transformers draws no progress bars."""
    were_drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_drawn:
            logging.enable_progress_bar()
