"""The layers of Transformers' own models: where each keeps its projections is one table, and what is not in it is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.geometry.capture import Projection, Shown, Source, one_step

Three = tuple[Projection, Projection, Projection]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """H query heads and G KV heads of D dimensions."""

    query: int
    kv: int
    dim: int


def _separate(attention: Any, heads: Heads) -> Three:
    """Three modules, [H·D, C] and twice [G·D, C]."""
    q, k, v = (
        Projection.of(_matrix(part), part.bias, heads.dim)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, k, v


def _joined(name: str) -> Callable[[Any, Heads], Three]:
    """One module, the rows of Q, then K, then V."""

    def split(attention: Any, heads: Heads) -> Three:
        part = attention.get_submodule(name)
        sizes = [heads.query * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim]
        weights = _matrix(part).split(sizes)
        biases = (None, None, None) if part.bias is None else part.bias.split(sizes)
        q, k, v = (Projection.of(w, b, heads.dim) for w, b in zip(weights, biases, strict=True))
        return q, k, v

    return split


def _by_head(name: str) -> Callable[[Any, Heads], Three]:
    """One module, for each head in turn the rows of its Q, K and V."""

    def split(attention: Any, heads: Heads) -> Three:
        part = attention.get_submodule(name)
        weights = part.weight.detach().unflatten(0, (heads.query, 3, heads.dim)).unbind(dim=1)
        bias = part.bias
        biases = (
            (None, None, None) if bias is None else bias.detach().unflatten(0, (heads.query, 3, heads.dim)).unbind(1)
        )
        q, k, v = (Projection(weight=w, bias=b) for w, b in zip(weights, biases, strict=True))
        return q, k, v

    return split


def _matrix(part: Any) -> Tensor:
    """[outputs, inputs]; GPT-2's Conv1D holds the transpose."""
    weight: Tensor = part.weight
    return weight.T if isinstance(part, Conv1D) else weight


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a family of models names its projections; ``reads`` is the one whose input is taken. ``types``: model types, none for any."""

    name: str
    reads: str
    parts: tuple[str, ...]
    split: Callable[[Any, Heads], Three]
    types: tuple[str, ...] = ()

    def fits(self, module: nn.Module, model_type: str) -> bool:
        """Whether a module is such an attention."""
        names = {name for name, _ in module.named_children()}
        return set(self.parts) <= names and (not self.types or model_type in self.types)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="three projections (Llama, Mistral, Qwen, Gemma, OPT, GPT-J and others)",
        reads="q_proj",
        parts=("q_proj", "k_proj", "v_proj"),
        split=_separate,
    ),
    Architecture(name="GPT-2's c_attn", reads="c_attn", parts=("c_attn",), split=_joined("c_attn"), types=("gpt2",)),
    Architecture(
        name="Phi-3's qkv_proj",
        reads="qkv_proj",
        parts=("qkv_proj",),
        split=_joined("qkv_proj"),
        types=("phi3",),
    ),
    Architecture(
        name="GPT-NeoX's and BLOOM's query_key_value",
        reads="query_key_value",
        parts=("query_key_value",),
        split=_by_head("query_key_value"),
        types=("gpt_neox", "bloom"),
    ),
)
"""Every way to keep projections that is known here; the first that fits a module is taken."""


def sources(model: PreTrainedModel, layers: Sequence[int]) -> list[Source]:
    """The layers that were asked for, counted among those that attend. Raises TwofoldError for a model that is not in the table."""
    found = attentions(model)
    return [OtherLayer(index, *found[index], model) for index in layers]


def attentions(model: PreTrainedModel) -> list[tuple[nn.Module, Architecture]]:
    """The model's attention modules in order."""
    kind = model.config.get_text_config(decoder=True).model_type
    body = model.base_model
    found = [
        (module, architecture)
        for _, module in body.named_modules()
        for architecture in ARCHITECTURES
        if architecture.fits(module, kind)
    ]
    if not found:
        known = "; ".join(architecture.name for architecture in ARCHITECTURES)
        raise TwofoldError(f"It is not known where a {kind} model keeps its projections: known are {known}.")
    return found


class OtherLayer(Source):
    """One layer. Its weights are those that the model's eager attention gives."""

    tie = "(Q, K, V)"
    clouds = (("Q",), ("K",), ("V",))
    matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    def __init__(self, index: int, attention: nn.Module, architecture: Architecture, model: PreTrainedModel) -> None:
        self.index, self.attends = index, attention
        self.reads = attention.get_submodule(architecture.reads)
        heads = _heads(attention, model)
        scaling = getattr(attention, "scaling", None)
        self.scale = float(scaling) if isinstance(scaling, float) else heads.dim**-0.5
        try:
            self.projections = architecture.split(attention, heads)
        except RuntimeError as error:  # shapes that do not come out
            raise TwofoldError(_other_shape(index, model)) from error
        counts = [projection.weight.shape[0] for projection in self.projections]
        if counts != [heads.query, heads.kv, heads.kv]:
            raise TwofoldError(_other_shape(index, model))
        self._window = int(getattr(attention, "sliding_window", None) or 0)
        self.remark = (
            "Queries and keys are shown as they leave their projections, before positions or a norm change them; the weights are "
            "those of the model, after it."
        )

    def weights(self, inputs: Tensor, output: Any) -> Tensor:
        """What the module gives beside its output."""
        given = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[-1] != len(inputs):
            raise TwofoldError(
                f"{type(self.attends).__name__} does not give its attention weights: its geometry is not shown."
            )
        sums = given[0].sum(dim=-1).float()
        if float((sums - 1).abs().max()) > 0.05:
            raise TwofoldError(
                f"The attention weights of {type(self.attends).__name__} do not add up to 1 (a sink takes the rest): its geometry is not shown."
            )
        return given[0]

    def visible(self, tokens: int) -> Tensor:
        """All keys up to the query, or those in the window."""
        return (torch.arange(tokens) + 1).clamp(max=self._window or tokens)

    def shown(self, inputs: Tensor, weights: Tensor) -> Shown:
        """One step: keys and values are of different spaces."""
        query, key, value = (projection(inputs) for projection in self.projections)
        return one_step(query, key, value, weights)


def _heads(attention: nn.Module, model: PreTrainedModel) -> Heads:
    """As the module says itself, or the configuration."""
    config = model.config.get_text_config(decoder=True)
    fields: Mapping[str, Any] = {
        name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    }
    query = int(fields["num_attention_heads"])
    own = [getattr(attention, name, None) for name in ("head_dim", "head_size")]
    dim = next((int(value) for value in own if isinstance(value, int)), int(fields["hidden_size"]) // query)
    # Where layers differ in their KV heads, the number of rows says how many there are.
    kv = int(fields["num_key_value_heads"] or query)
    rows = getattr(getattr(attention, "k_proj", None), "out_features", None)
    return Heads(query=query, kv=int(rows) // dim if isinstance(rows, int) else kv, dim=dim)


def _other_shape(index: int, model: PreTrainedModel) -> str:
    return (
        f"The projections of layer {index} of {type(model).__name__} have other shapes than its heads ask for: "
        "its geometry is not shown."
    )
