"""Weights of one attention layer in the layouts that people keep them in, and the exact way from one to another.

``free``   what :class:`~twofold.attention.Attention` has: a projection for each free projection of the tie.
``roles``  a projection for each of Q, K and V, as an untied model has: derived roles are the tie's combinations of the free ones.
``fused``  the ``roles`` as one matrix ``qkv_proj``, rows of Q, then K, then V, as GPT-2's ``c_attn`` (transposed) and many engines have.

From ``roles`` back to ``free`` the tie must hold: the derived roles are compared and refused where they differ. All other weights of the layer
pass unchanged. A copied tensor is the same numbers bit for bit; a derived role with other coefficients than 0 and 1 is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.spec import AttentionSpec
from twofold.tie import ROLES

__all__ = ["Layout", "convert"]

Layout = Literal["free", "roles", "fused"]
FUSED = "qkv_proj"


def convert(
    weights: Mapping[str, Tensor], spec: AttentionSpec, *, source: Layout, target: Layout, prefix: str = ""
) -> dict[str, Tensor]:
    """The weights of a layer in another layout; names begin with ``prefix``, and those that do not are passed on.

    Raises TwofoldError for an unknown layout, a weight that is missing or has another shape, and, towards ``free``, for roles that do not
    obey the tie to 16 units in the last place of their dtype.
    """
    for layout in (source, target):
        if layout not in get_args(Layout):
            raise TwofoldError(f"There is no layout {layout!r}: use one of {', '.join(get_args(Layout))}.")
    if spec.latent_dim:
        raise TwofoldError(
            "A layer with a latent has no other layout: its keys and values are not linear in the layer's input, for the latent is normalised."
        )
    result = dict(weights)
    for kind in _kinds(spec):
        roles = _roles_from(result, spec, source, prefix, kind)
        if target == "fused":
            result[f"{prefix}{FUSED}.{kind}"] = torch.cat([roles[role] for role in ROLES])
        else:
            kept = ROLES if target == "roles" else spec.tie.free_projections
            if target == "free":
                _check_tie(roles, spec, kind)
            result |= {_name(prefix, role, kind): roles[role] for role in kept}
    return result


def _kinds(spec: AttentionSpec) -> Iterator[str]:
    yield "weight"
    if spec.use_bias:
        yield "bias"


def _name(prefix: str, role: str, kind: str) -> str:
    return f"{prefix}{role.lower()}_proj.{kind}"


def _roles_from(
    weights: dict[str, Tensor], spec: AttentionSpec, source: Layout, prefix: str, kind: str
) -> dict[str, Tensor]:
    """Q, K and V out of ``weights``, from which they are taken away."""
    rows = {role: spec.columns_of(role) for role in ROLES}
    if source == "fused":
        fused = _take(weights, f"{prefix}{FUSED}.{kind}", sum(rows.values()), spec, kind)
        return dict(zip(ROLES, fused.split(list(rows.values())), strict=True))
    names = ROLES if source == "roles" else spec.tie.free_projections
    given = {role: _take(weights, _name(prefix, role, kind), rows[role], spec, kind) for role in names}
    return given if source == "roles" else {role: _derived(given, spec, role) for role in ROLES}


def _take(weights: dict[str, Tensor], name: str, rows: int, spec: AttentionSpec, kind: str) -> Tensor:
    if name not in weights:
        raise TwofoldError(f"The weights lack {name}: this is not the layout that was named as their source.")
    wanted = (rows, spec.hidden_size) if kind == "weight" else (rows,)
    if tuple(weights[name].shape) != wanted:
        raise TwofoldError(f"{name} has the shape {tuple(weights[name].shape)}, but this layer needs {wanted}.")
    return weights.pop(name)


def _derived(free: Mapping[str, Tensor], spec: AttentionSpec, role: str) -> Tensor:
    """A role as the tie's combination of free projections; itself where it is one of them."""
    terms = [(c, free[name]) for c, name in zip(spec.tie.row(role), spec.tie.free_projections, strict=True) if c]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    total = sum(float(c) * tensor.double() for c, tensor in terms)
    assert isinstance(total, Tensor)
    return total.to(terms[0][1].dtype)


def _check_tie(roles: Mapping[str, Tensor], spec: AttentionSpec, kind: str) -> None:
    free = {role: roles[role] for role in spec.tie.free_projections}
    for role in ROLES:
        wanted = _derived(free, spec, role).double()
        size = max(float(tensor.abs().max()) for tensor in (*free.values(), roles[role]))
        error = float((roles[role].double() - wanted).abs().max())
        if error > 16 * torch.finfo(roles[role].dtype).eps * size:
            raise TwofoldError(
                f"These weights do not obey {spec.tie}: {role}'s {kind} is off by {error:.3g}. An untied layer needs retraining, not a change of layout."
            )
