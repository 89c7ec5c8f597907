"""A cache on disk, to go on from a long prefix without computing it again: one safetensors file, read without running anything."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from twofold.cache.tied_cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.storage import writing

FORMAT = "twofold-cache-1"


def save_cache(cache: TiedCache, path: str | Path) -> None:
    """Write all that the cache holds to ``path``, whole or not at all. Raises TwofoldError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.state().items()
    }
    about = {
        "format": FORMAT,
        "model": json.dumps(cache.spec.to_dict()),
        "caches": json.dumps([held.to_dict() for held in cache.cache_specs]),
        "tokens_seen": json.dumps([int(layer.tokens_seen) for layer in cache.layers]),
    }
    with writing(path.parent):
        try:
            save_file(tensors, partial, metadata=about)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_cache(path: str | Path, spec: ModelSpec, *, device: str | torch.device = "cpu") -> TiedCache:
    """The cache that :func:`save_cache` wrote, for the model of ``spec``, held as it was.

    Raises TwofoldError where the file is missing, damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise TwofoldError(
            f"{path} cannot be read as a cache ({error}): it is missing, truncated or damaged."
        ) from None
    if about.get("format") != FORMAT:
        raise TwofoldError(f"{path} holds no cache of ours: save one with save_cache.")
    held = tuple(CacheSpec(**values) for values in json.loads(about["caches"]))
    cache = TiedCache(ModelSpec.from_dict(json.loads(about["model"])), held)
    cache.check_fits(tuple(spec.attention(index) for index in range(spec.num_hidden_layers)), 0)
    for index, (layer, tokens_seen) in enumerate(zip(cache.layers, json.loads(about["tokens_seen"]), strict=True)):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        layer.load_state(own, tokens_seen)
    return cache
