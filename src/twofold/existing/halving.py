"""Half the cache of a model that others trained, in place, and back again.

    import twofold
    report = twofold.halve(model)     # its own generate, caches and files go on to work
    twofold.restore(model)

A layer is halved by doing another forward in place of its own; no weight is changed, so a saved model is the one that it was. All layers are looked at
before the first is touched: a model that is refused is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import nn

from twofold.errors import TwofoldError
from twofold.existing import multi_head, refusals, shared_norm
from twofold.existing.fold import Fold, Kept, Projection, fold, measured_error
from twofold.existing.key_rotations import KeyRotations

Keep = Literal["auto", "keys", "values"]
DEFAULT_MAX_ERROR = 0.02
"""The error of values (or keys) made from rounded ones, relative to their size, up to which a layer is halved."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one attention layer.

    ``kept`` is what its cache holds now: the "stream" that is key and value, "keys", "values", or "both" where it is as it was, with the ``reason``.
    ``cached_floats`` counts those of a token, before and after; ``window_tokens`` is how many tokens are held at most, 0: all. For multi-head layers
    ``condition`` is that of the kept projection, ``predicted_error`` and ``measured_error`` are what rounding in the cache does to the other,
    ``arithmetic`` is how many times the operations of a token's attention are what they were, and ``map_bytes`` what makes the other, held beside the weights.
    """

    name: str
    kept: Literal["stream", "keys", "values", "both"]
    reason: str
    cached_floats: tuple[int, int]
    window_tokens: int = 0
    condition: float = 1.0
    predicted_error: float = 0.0
    measured_error: float = 0.0
    arithmetic: float = 1.0
    map_bytes: int = 0

    @property
    def is_halved(self) -> bool:
        """Whether it holds one tensor."""
        return self.kept != "both"

    def cache_bytes(self, tokens: int, width: int, *, halved: bool = True) -> int:
        """Bytes of its cache for one text of ``tokens`` in floats of ``width`` bytes, after or before."""
        return min(tokens, self.window_tokens or tokens) * self.cached_floats[halved] * width


@dataclass(frozen=True)
class HalvingReport:
    """What became of every attention layer that has a cache of its own."""

    model: str
    dtype: torch.dtype
    layers: tuple[LayerReport, ...]

    def cache_bytes(self, tokens: int, *, halved: bool = True) -> int:
        """Bytes of the cache of one text of ``tokens``, after or before."""
        return sum(layer.cache_bytes(tokens, self.dtype.itemsize, halved=halved) for layer in self.layers)

    @property
    def map_bytes(self) -> int:
        """Bytes of all maps, held beside the weights."""
        return sum(layer.map_bytes for layer in self.layers)

    @property
    def num_halved(self) -> int:
        """Layers that hold one tensor now."""
        return sum(layer.is_halved for layer in self.layers)


@dataclass(frozen=True)
class _Plan:
    """A layer, its new forward (None: it keeps its own), and what will be said of it (None: it has no cache of its own)."""

    layer: Any
    report: LayerReport | None
    forward: Any = None


def halve(model: nn.Module, *, keep: Keep = "auto", max_error: float = DEFAULT_MAX_ERROR) -> HalvingReport:
    """Let every layer of a Transformers model whose keys and values are one tensor keep that one tensor, and say what became of each.

    ``keep`` is for multi-head models: keep keys, values, or whichever the other is better made from. Layers beyond ``max_error`` are left as they are.
    Raises TwofoldError, one sentence, and changes nothing, for a model that cannot be halved at all.
    """
    _check_arguments(model, keep, max_error)
    if any(is_halved(module) for module in model.modules()):
        raise TwofoldError(f"This {type(model).__name__} is halved already: call twofold.restore(model) first.")
    refusals.check_model(model)
    with torch.inference_mode(False), torch.no_grad():  # what is made now may be used with gradients later
        plans = list(_plans(model, keep, max_error))
    reports = tuple(plan.report for plan in plans if plan.report is not None)
    if not any(report.is_halved for report in reports):
        reasons = dict.fromkeys(report.reason for report in reports) or ["they have no cache of their own"]
        errors = [report.measured_error for report in reports if report.measured_error]
        least = f" (the least of these errors is {min(errors):.2g})" if errors else ""
        raise TwofoldError(f"No layer of {type(model).__name__} can be halved: {'; '.join(reasons)}{least}.")
    shared_norm.check_pairs(model)
    for plan in plans:
        if plan.forward is not None:
            _set_forward(plan.layer, plan.forward)
    return HalvingReport(model=type(model).__name__, dtype=_dtype(model), layers=reports)


def restore(model: nn.Module) -> None:
    """Undo :func:`halve`; a model that is not halved stays as it is."""
    for layer in model.modules():
        if is_halved(layer):
            _restore_forward(layer)


def is_halved(module: nn.Module) -> bool:
    """Whether a module is a layer that was halved."""
    return "_twofold_forward" in vars(module)


def _check_arguments(model: Any, keep: Any, max_error: float) -> None:
    if not isinstance(model, nn.Module):
        raise TwofoldError(f"halve takes a model, and was given a {type(model).__name__}: load it first.")
    if keep not in get_args(Keep):
        raise TwofoldError(f"keep is {keep!r}, but must be one of {', '.join(get_args(Keep))}.")
    if not max_error >= 0:
        raise TwofoldError(f"max_error is {max_error}, but must be a number of at least 0.")


def _set_forward(layer: Any, forward: Any) -> None:
    """Put ``forward`` in the place of the layer's own; under Accelerate's hooks, which move tensors between devices, below those."""
    name = _forward_name(layer)
    layer._twofold_forward = vars(layer).get(name)
    setattr(layer, name, forward)


def _restore_forward(layer: Any) -> None:
    """Hooks may have come, or gone, since."""
    name, own = _forward_name(layer), layer._twofold_forward
    del layer._twofold_forward
    if own is not None or name != "forward":
        setattr(layer, name, MethodType(type(layer).forward, layer) if own is None else own)
    else:
        del layer.forward


def _forward_name(layer: Any) -> str:
    """Where a layer's own forward is."""
    return "_old_forward" if hasattr(layer, "_old_forward") else "forward"


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _plans(model: nn.Module, keep: Keep, max_error: float) -> Iterator[_Plan]:
    found = False
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        family = multi_head.family_of(layer)
        if kind == "DeepseekV4Attention":
            raise TwofoldError(
                f"{type(model).__name__} already caches one tensor that is key and value: there is nothing to halve."
            )
        found = found or kind in shared_norm.CLASSES or family is not None
        if kind in shared_norm.CLASSES:
            yield _shared_norm_plan(model, name, layer)
        elif family is not None and multi_head.has_cache(layer):
            yield _multi_head_plan(model, name, layer, family, (keep, max_error))
    if not found:
        classes = (*shared_norm.CLASSES, *multi_head.FAMILIES)
        known = ", ".join(sorted(known.removesuffix("Attention") for known in classes))
        raise TwofoldError(f"{type(model).__name__} has no attention that is known here: known are {known}.")


def _shared_norm_plan(model: nn.Module, name: str, layer: Any) -> _Plan:
    if getattr(layer, "is_kv_shared_layer", False):
        return _Plan(layer, None)  # it reads what an earlier layer has cached
    reads_only = shared_norm.reads_only(layer)
    reason = shared_norm.why_not(layer)
    heads = layer.config.num_attention_heads
    kv_heads = heads // layer.num_key_value_groups
    floats = kv_heads * layer.head_dim
    window = (layer.sliding_window or 0) if layer.is_sliding else 0
    forward = None
    if not reason:
        with _reason(model, name):
            refusals.check_layer(layer)
            forward = shared_norm.SharedNormForward(layer, shared_norm.rotary_of(model, name))
    if reads_only:
        return _Plan(layer, None, forward)
    counts = (2 * floats, floats if forward else 2 * floats)
    # Dimensions that turn are multiplied apart, and turned: 6 operations for each of them and KV head.
    turning = 2 * forward.rotations.pairs if forward else 0
    arithmetic = 1 + turning * (2 * heads + 6 * kv_heads) / (4 * heads * layer.head_dim)
    report = LayerReport(
        name, "stream" if forward else "both", reason, counts, window_tokens=window, arithmetic=arithmetic
    )
    return _Plan(layer, report, forward)


def _multi_head_plan(
    model: nn.Module, name: str, layer: Any, family: multi_head.Family, choice: tuple[Keep, float]
) -> _Plan:
    floats = multi_head.num_heads(layer)[1] * multi_head.head_dim(layer)
    both = LayerReport(
        name,
        "both",
        multi_head.why_not(layer, family),
        (2 * floats, 2 * floats),
        window_tokens=multi_head.window_tokens(layer),
    )
    if both.reason:
        return _Plan(layer, both)
    keep, max_error = choice
    with _reason(model, name):
        refusals.check_layer(layer)
        found, error = _best_fold(layer, family, keep)
        rotations = None
        if family.rotary:
            dims = getattr(layer, "rotary_ndims", multi_head.head_dim(layer))
            rotations = KeyRotations.of(shared_norm.rotary_of(model, name), None, dims)
    if isinstance(found, str):
        return _Plan(layer, replace(both, reason=found))
    said = replace(both, condition=found.condition, predicted_error=found.error, measured_error=error)
    if not error <= max_error:
        reason = f"rounding in the cache would move the other by more than max_error = {max_error:g} of its size"
        return _Plan(layer, replace(said, reason=reason))
    rounding = multi_head.Rounding(multi_head.weight_dtype(layer, family), error, max_error)
    forward = multi_head.MultiHeadForward(layer, family, found, rotations, rounding)
    # One of two products over the cache becomes one over the rows of all heads.
    arithmetic = (1 + multi_head.num_heads(layer)[0]) / 2
    map_bytes = sum(part.nbytes for part in forward.map)
    halved = replace(
        said, kept=found.kept, cached_floats=(2 * floats, floats), arithmetic=arithmetic, map_bytes=map_bytes
    )
    return _Plan(layer, halved, forward)


def _best_fold(layer: Any, family: multi_head.Family, keep: Keep) -> tuple[Fold | str, float]:
    """The way to make one from the other that rounding harms least, and by how much, measured; or why there is none."""
    key, value = multi_head.projections(layer, family)
    if keep == "values" and family.rotary:
        raise TwofoldError("its keys turn with their positions, so they are made from no values: keep keys")
    dtype = multi_head.weight_dtype(layer, family)
    ways: dict[Kept, tuple[Projection, Projection]] = {"keys": (key, value), "values": (value, key)}
    best: Fold | str = ""
    least = math.inf
    for kept, (source, target) in ways.items():
        if keep not in ("auto", kept) or (kept == "values" and family.rotary):
            continue
        found = fold(kept, source, target, torch.finfo(dtype).eps)
        if isinstance(found, str):
            best = best or found
            continue
        error = measured_error(found, source, target, dtype)
        if isinstance(best, str) or error < least:
            best, least = found, error
    return best, least


@contextmanager
def _reason(model: nn.Module, name: str) -> Iterator[None]:
    """An error about one layer becomes one about the model, which says where."""
    try:
        yield
    except TwofoldError as error:
        raise TwofoldError(f"{name} of {type(model).__name__} cannot be halved: {error}.") from None
