"""The pre-norm block, x + attention(norm(x)) then x + MLP(norm(x)), and the stack of them that all three architectures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from twofold.cache import LayerView
from twofold.latent_attention import attention_layer
from twofold.models.parallel import tensor_parallel_plan
from twofold.models.sequence import Sequence
from twofold.spec import ModelSpec

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def dropout(probability: float) -> nn.Module:
    """Dropout, or nothing at all: even a probability of 0 would cost a pass over the tensor."""
    return nn.Dropout(probability) if probability else nn.Identity()


def norm(spec: ModelSpec) -> nn.Module:
    """LayerNorm or RMSNorm over C."""
    kind = nn.LayerNorm if spec.norm == "layernorm" else nn.RMSNorm
    return kind(spec.hidden_size, eps=spec.norm_eps)


class MLP(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) ⊙ up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, inner, bias = spec.hidden_size, spec.intermediate_size, spec.use_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if spec.gated_mlp else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden_states)))
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Block(GradientCheckpointingLayer):
    """One layer of a model. Under gradient checkpointing it keeps its input only and is computed again on the way back."""

    def __init__(self, spec: ModelSpec, layer_index: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = norm(spec)
        self.attention = attention_layer(spec.attention(layer_index), backend=backend)
        self.mlp_norm = norm(spec)
        self.mlp = MLP(spec)
        self.dropout = dropout(spec.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: LayerView | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; ``key_mask`` [B, P] covers the tokens before the T new ones too; ``weights`` is given those of attention."""
        attended = self.attention(
            self.attention_norm(hidden_states), key_mask=key_mask, segments=segments, cache=cache, weights=weights
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


@dataclass(frozen=True)
class Record:
    """What was asked to be kept on the way, layer by layer; None: not asked."""

    hidden_states: list[Tensor] | None
    attentions: list[Tensor] | None


class Trunk(nn.Module):
    """All layers and the last norm."""

    def __init__(self, spec: ModelSpec, backend: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(spec, index, backend) for index in range(spec.num_hidden_layers))
        self.norm = norm(spec)
        self._tp_plan = tensor_parallel_plan(spec)  # where Transformers looks for it

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        *,
        cache: Cache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]. ``record`` is given the hidden states before each layer and those that are returned, and attention's weights."""
        states, attentions = (None, None) if record is None else (record.hidden_states, record.attentions)
        for index, layer in enumerate(self.layers):
            _record(states, hidden_states)
            view = None if cache is None else LayerView(cache, index)
            of_layer: list[Tensor] | None = None if attentions is None else []
            hidden_states = layer(
                hidden_states, key_mask=sequence.key_mask, segments=sequence.segments, cache=view, weights=of_layer
            )
            if attentions is not None and of_layer:  # computed again on the way back, a layer gives them twice
                attentions.append(of_layer[0])
        hidden_states = self.norm(hidden_states)
        _record(states, hidden_states)
        return hidden_states


def _record(states: list[Tensor] | None, hidden_states: Tensor) -> None:
    if states is not None:
        states.append(hidden_states)
