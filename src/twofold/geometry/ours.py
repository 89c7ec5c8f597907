"""The layers of our own models, of any tie.

Where V = K one step of attention is one step of a modern Hopfield network whose stored patterns are the keys, and it can be repeated:

    ξ ← X softmax(β Xᵀ ξ),   with X the keys a query may see, β the scale of the logits, and ξ at first the query.

Source: Ramsauer et al. 2020 (2008.02217), equation 3. Rotary positions enter as they do in the layer: the state is turned at the query's
place and patterns at theirs, so the first step is the layer's attention exactly; norms, a shared rotary key and bias likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.geometry.capture import Group, Projection, Shown, Source, one_step
from twofold.kernels import Rotation
from twofold.layouts import convert
from twofold.models import TwofoldForCausalLM
from twofold.spec import AttentionSpec
from twofold.tie import ROLES, Tie

PULLS = 8
"""Steps of the pull where it can be repeated."""


def sources(model: TwofoldForCausalLM, layers: Sequence[int]) -> list[Source]:
    """The layers that were asked for. Raises TwofoldError for one whose keys and values are not linear in its input."""
    return [OwnLayer(index, model.get_submodule(f"trunk.layers.{index}.attention")) for index in layers]


def clouds(tie: Tie) -> tuple[Group, ...]:
    """Roles that are equal, in groups: ``(("Q",), ("K", "V"))``."""
    groups: dict[object, list[str]] = {}
    for role in ROLES:
        groups.setdefault(tie.row(role), []).append(role)
    return tuple(tuple(group) for group in groups.values())


class OwnLayer(Source):
    """One layer; the weights of roles that follow from others are the tie's combinations of the free ones."""

    def __init__(self, index: int, attention: nn.Module) -> None:
        if not isinstance(attention, Attention) or attention.spec.latent_dim:
            raise TwofoldError(
                f"Layer {index} attends by {type(attention).__name__}, whose keys and values are not linear in the layer's input: "
                "its geometry is not shown."
            )
        self._attention, self._spec = attention, attention.spec
        self.index, self.tie = index, str(attention.spec.tie)
        self.matrix = tuple(tuple(map(float, row)) for row in attention.spec.tie.matrix)
        self.scale = attention.spec.scale
        self.clouds = clouds(attention.spec.tie)
        self.reads = self.attends = attention
        self.projections = _projections(attention)
        self.remark = _remark(attention.spec)

    def weights(self, inputs: Tensor, output: Any) -> Tensor:
        """Asked again of the layer, which keeps no weights unless it is asked to."""
        del output
        kept: list[Tensor] = []
        # The module's own forward: a call of the module would come back here through its hook.
        self._attention.forward(inputs[None], weights=kept)
        return kept[0][0]

    def visible(self, tokens: int) -> Tensor:
        """All keys up to the query, or those in the window."""
        return (torch.arange(tokens) + 1).clamp(max=self._spec.window_tokens or tokens)

    def shown(self, inputs: Tensor, weights: Tensor) -> Shown:
        """The pull step by step where V = K, else the one step that there is."""
        query, key, value = (projection(inputs) for projection in self.projections)
        if self._spec.positions.turns_stream:
            turn = _rotation(self._spec, len(inputs), inputs).turn
            if self._spec.qk_norm:
                query, key, value = (
                    _normed(norm, x)
                    for norm, x in (
                        (self._attention.q_norm, query),
                        (self._attention.k_norm, key),
                        (self._attention.k_norm, value),
                    )
                )
            query, key, value = turn(query), turn(key), turn(value)
        shown = one_step(query, key, value, weights)
        if self._spec.tie.value_over_key != 1:
            return shown
        states, all_weights = pull(self._attention, inputs, query, value)
        return Shown(query=shown.query, key=shown.key, value=shown.value, states=states, weights=all_weights)


def pull(attention: Attention, inputs: Tensor, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The states [H, S, n + 1, D] and weights [n, H, S, S] of a layer in which V = K, asked again and again.

    ``inputs`` [S, C], ``query`` [H, S, D] and ``value`` [G, S, D] in float64, the last two normalised and turned already where the stream is.
    """
    spec = attention.spec
    norms = spec.qk_norm and not spec.positions.turns_stream
    logits = _logits(attention, inputs, value)
    value = value.repeat_interleave(query.shape[0] // value.shape[0], dim=0)
    state = nn.functional.pad(query, (0, value.shape[-1] - query.shape[-1]))
    states, weights = [state], []
    for step in range(PULLS):
        compared = state[..., : spec.query_dim]
        if norms:
            compared = (
                _normed(attention.k_norm, state)[..., : spec.query_dim] if step else _normed(attention.q_norm, compared)
            )
        weights.append(torch.softmax(logits(compared), dim=-1))
        state = weights[-1] @ value
        states.append(state)
    return torch.stack(states, dim=2), torch.stack(weights)


def _logits(attention: Attention, inputs: Tensor, stream: Tensor) -> Callable[[Tensor], Tensor]:
    """The logits [H, S, S] of states [H, S, query_dim], -∞ where a key is not seen."""
    spec, tokens = attention.spec, len(inputs)
    group = spec.num_attention_heads // spec.num_key_value_heads
    norms = spec.qk_norm and not spec.positions.turns_stream
    keys = _normed(attention.k_norm, stream) if norms else stream
    keys = keys[..., : spec.query_dim]
    turn: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731 (nothing turns, or has been turned)
    if not spec.positions.turns_stream and spec.positions.angles(torch.zeros(1), head_dim=spec.head_dim) is not None:
        turn = _rotation(spec, tokens, inputs).turn
    keys = turn(keys).repeat_interleave(group, dim=0)
    place = torch.arange(tokens, device=inputs.device)
    behind = place[:, None] - place
    hidden = (behind < 0) | (behind >= (spec.window_tokens or tokens))
    added = torch.zeros(spec.num_attention_heads, tokens, tokens, dtype=inputs.dtype, device=inputs.device)
    added = added + _shared_key_logits(attention, inputs) + _bias(attention, place)
    added = added.masked_fill(hidden, -torch.inf)
    return lambda states: spec.scale * turn(states) @ keys.transpose(-1, -2) + added


def _shared_key_logits(attention: Attention, inputs: Tensor) -> Tensor:
    """What the rotary key that all heads share adds to the logits, [H, S, S]; 0 without one."""
    spec, dim = attention.spec, attention.spec.positions.key_extension_dim
    if not dim:
        return inputs.new_zeros(())
    angles, distance = spec.positions.extension_angles(torch.arange(len(inputs), device=inputs.device))
    turn = Rotation(cosine=angles.cos(), sine=angles.sin(), distance=distance).turn
    query, key = (
        turn(Projection.of(part.weight, part.bias, dim)(inputs))
        for part in (attention.q_rotary_proj, attention.k_rotary_proj)
    )
    return spec.scale * query @ key.transpose(-1, -2)


def _bias(attention: Attention, place: Tensor) -> Tensor:
    if not attention.spec.positions.num_bias_buckets:
        return place.new_zeros((), dtype=torch.float64)
    buckets = attention.spec.positions.buckets(place, place, causal=attention.spec.causal)
    return attention.relative_bias.detach().double()[buckets].permute(2, 0, 1)


def _rotation(spec: AttentionSpec, tokens: int, like: Tensor) -> Rotation:
    found = spec.positions.angles(torch.arange(tokens, device=like.device), head_dim=spec.head_dim)
    assert found is not None
    return Rotation(cosine=found[0].cos(), sine=found[0].sin(), distance=found[1])


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in float64."""
    eps, weight = norm.eps, norm.weight
    assert isinstance(eps, float)
    assert isinstance(weight, Tensor)
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.detach().double()


def _projections(attention: Attention) -> tuple[Projection, Projection, Projection]:
    spec = attention.spec
    roles = convert(attention.state_dict(), spec, source="free", target="roles")
    q, k, v = (
        Projection.of(
            roles[f"{role}_proj.weight"],
            roles.get(f"{role}_proj.bias"),
            spec.query_dim if role == "q" else spec.head_dim,
        )
        for role in ("q", "k", "v")
    )
    return q, k, v


def _remark(spec: AttentionSpec) -> str:
    if spec.positions.turns_stream:
        return "Keys, which are the values too, are shown as they are cached, turned at their places; the query is turned at its own."
    parts = []
    if spec.positions.angles(torch.zeros(1), head_dim=spec.head_dim) is not None:
        parts.append("turned by their positions")
    if spec.qk_norm:
        parts.append("normalised")
    if parts:
        return f"Queries and keys are shown before they are {' and '.join(parts)}; the weights are those of the model, after it."
    if spec.positions.key_extension_dim:
        return "The rotary key that all heads share is not in the picture; the weights are those of the model, with it."
    return ""
