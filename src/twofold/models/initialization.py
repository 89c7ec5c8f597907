"""First weights that depend on a seed and a parameter's name, and on nothing else.

Two models of one seed share every tensor that has the same name and shape in both: (Q, K, V) and (Q, K=V) start from the same queries, keys,
embeddings and MLPs, in whatever order their layers are made and on whatever device and in whatever dtype they live. That is what pairs the
seeds of a study.
"""

from __future__ import annotations

from hashlib import sha256
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization


def drawn_normal(shape: torch.Size, *, std: float, seed: int, name: str) -> Tensor:
    """N(0, std²) in float32 on the CPU, from a generator that ``seed`` and ``name`` determine."""
    digest = sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def initialize(module: nn.Module, *, std: float, seed: int, name: str) -> None:
    """Give the module's own parameters their first values: matrices N(0, std²), biases 0, scales of norms 1.

    A parameter that Transformers has already loaded keeps its value, one on the meta device has none to set. Modules that own bare parameters
    say what they start from in a method ``first_values(name) -> float | None`` (a constant, or None for N(0, std²)).
    """
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            continue
        constant = _constant(module, parameter_name)
        if constant is not None:
            initialization.constant_(parameter, constant)
        else:
            whole_name = f"{name}.{parameter_name}"
            # Guarded like every function of that module: drawn again, but not written, where a checkpoint has the value.
            if not getattr(parameter, "_is_hf_initialized", False):
                initialization.copy_(parameter, drawn_normal(parameter.shape, std=std, seed=seed, name=whole_name))


def _constant(module: nn.Module, parameter_name: str) -> float | None:
    """The value a parameter starts from, or None if it is drawn."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return 1.0 if parameter_name == "weight" else 0.0
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return 0.0 if parameter_name == "bias" else None
    if hasattr(module, "first_values"):
        return cast("float | None", module.first_values(parameter_name))  # type: ignore[operator]
    return None
