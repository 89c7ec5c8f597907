"""What a folder's safetensors files hold, read from their headers: no tensor is loaded, however large the model is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

FLOAT_KINDS = ("F64", "F32", "F16", "BF16")
"""Kinds of floats that a model may be loaded in another dtype of; what is quantized stays as it is stored."""
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Floats that are loaded in a dtype of one's choice, bytes of what is not (quantized weights), and the bytes of both in the files."""

    floats: int
    other_bytes: int
    file_bytes: int

    def nbytes(self, width: int) -> int:
        """Bytes in memory with floats of ``width`` bytes."""
        return self.floats * width + self.other_bytes


def stored_weights(folder: Path) -> StoredWeights | None:
    """The weights in a folder; None where it holds no safetensors. Raises TwofoldError for a file that is damaged or missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _object(index.read_bytes(), index).get("weight_map")
        if not isinstance(parts, dict):
            raise TwofoldError(f"{index} names no files: the checkpoint is damaged, take another one.")
        paths = [folder / str(name) for name in sorted(set(map(str, parts.values())))]
    else:
        paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        return None
    floats = other = total = 0
    for path in paths:
        for name, tensor in _header(path).items():
            if name == "__metadata__":
                continue
            size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
            total += size
            if tensor["dtype"] in FLOAT_KINDS:
                floats += prod(tensor["shape"])
            else:
                other += size
    return StoredWeights(floats=floats, other_bytes=other, file_bytes=total)


def _header(path: Path) -> dict[str, Any]:
    """8 bytes of length, then as many of JSON: a name, dtype, shape and place for every tensor."""
    if not path.is_file():
        raise TwofoldError(f"{path.parent} lacks {path.name}, which its index names: the checkpoint is not whole.")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= MAX_HEADER_BYTES:
            raise TwofoldError(f"{path} does not begin as a safetensors file does: it is damaged, take another one.")
        header = _object(file.read(size), path)
    end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    if path.stat().st_size < 8 + size + end:
        raise TwofoldError(f"{path} is cut off: it ends before its tensors do, take another copy.")
    return header


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise TwofoldError(f"{path} cannot be read: it is damaged, take another copy.")
    return values
