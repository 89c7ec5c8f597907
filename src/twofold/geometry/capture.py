"""What attention is made of while a model reads a text: projections, what they are applied to, and where each query looks.

A :class:`Source` is one layer of a model, of ours (:mod:`~twofold.geometry.ours`) or of Transformers (:mod:`~twofold.geometry.others`).
:func:`capture` has the model read rows of tokens and keeps, of the layers that were asked for, what the measures need of all tokens
and what the page needs of the first ones. Attention weights of other layers, and of later tokens, are never held.

Shapes: N all tokens, L tokens of a row, S the first tokens of the first row, H query heads, G KV heads, D and E dimensions of a head, C
width of the model, n steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.geometry.measures import relative_entropy

Group = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A role's weights head by head, [heads, D, C], and its bias [heads, D], if it has one."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, head_dim: int) -> Projection:
        """From weights [heads · D, C] and a bias [heads · D]."""
        split = None if bias is None else bias.detach().unflatten(0, (-1, head_dim))
        return cls(weight=weight.detach().unflatten(0, (-1, head_dim)), bias=split)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[N, C] -> [heads, N, D], in the dtype of the inputs."""
        made = inputs @ self.weight.to(inputs).transpose(-1, -2)
        return made if self.bias is None else made + self.bias.to(inputs)[:, None]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The first S tokens as points of one space, and where each query is drawn.

    ``query`` [H, S, D], ``key`` and ``value`` [G, S, D]. ``states`` [H, S, n + 1, D] begin with the query; the next one is the head's output,
    and any later ones are what attention gives when the one before is asked. ``weights`` [n, H, S, S] lead from each state to the next.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    states: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer that read a text. ``clouds`` groups the roles that are one and the same; ``inputs`` [N, C] is what the projections read.

    ``matrix`` has the roles Q, K, V as combinations of the tie's free projections; logits are multiplied by ``scale``. ``query``, ``key`` and ``value`` [heads, N, D] are projections as they leave the weights: not yet normalised, not yet turned.
    ``entropy`` [H] is :func:`~twofold.geometry.measures.relative_entropy` over all rows, the first of which has ``row`` tokens.
    """

    index: int
    tie: str
    clouds: tuple[Group, ...]
    matrix: tuple[tuple[float, ...], ...]
    scale: float
    projections: tuple[Projection, Projection, Projection]
    inputs: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    entropy: Tensor
    row: int
    shown: Shown
    remark: str = ""

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.query.shape[0] // self.key.shape[0]


class Source(ABC):
    """One attention layer of a model."""

    index: int
    tie: str
    clouds: tuple[Group, ...]
    matrix: tuple[tuple[float, ...], ...]
    scale: float
    projections: tuple[Projection, Projection, Projection]
    reads: nn.Module
    """The module whose first argument is what the projections are applied to."""
    attends: nn.Module
    remark: str = ""

    @abstractmethod
    def weights(self, inputs: Tensor, output: Any) -> Tensor:
        """The model's own attention weights [H, L, L] of a row, from the inputs [L, C] and what ``attends`` gave."""

    @abstractmethod
    def visible(self, tokens: int) -> Tensor:
        """How many keys each query of a row sees, [L]."""

    @abstractmethod
    def shown(self, inputs: Tensor, weights: Tensor) -> Shown:
        """The points of the first S tokens, from their inputs [S, C] and weights [H, S, S]."""


def capture(
    read: Callable[[Tensor], object], sources: Sequence[Source], rows: Sequence[Tensor], *, shown: int
) -> list[Layer]:
    """The layers after ``read``, which takes tokens [1, L], has read each of the ``rows`` [L]; of the first row ``shown`` tokens are kept."""
    kept = [_Kept(source, min(shown, len(rows[0]))) for source in sources]
    with torch.no_grad(), ExitStack() as stack:
        for one in kept:
            for handle in one.hooks():
                stack.callback(handle.remove)
        for row in rows:
            read(row[None])
    return [one.layer() for one in kept]


class _Kept:
    """What one layer has shown so far."""

    def __init__(self, source: Source, shown: int) -> None:
        self.source, self._shown_tokens = source, shown
        self._inputs: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._shown: Shown | None = None

    def hooks(self) -> list[Any]:
        return [
            self.source.reads.register_forward_pre_hook(self._reads, with_kwargs=True),
            self.source.attends.register_forward_hook(self._attends),
        ]

    def _reads(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        given = args[0] if args else next(iter(kwargs.values()))
        self._inputs.append(given.detach()[0])

    def _attends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args
        inputs = self._inputs[-1]
        weights = self.source.weights(inputs, output).double()
        self._entropies.append(relative_entropy(weights, self.source.visible(len(inputs)).to(weights.device)).cpu())
        if self._shown is None:
            first = self._shown_tokens
            self._shown = self.source.shown(inputs[:first].double(), weights[:, :first, :first])

    def layer(self) -> Layer:
        source = self.source
        if not self._inputs or self._shown is None:
            raise TwofoldError(f"Layer {source.index} was not used while the model read the text: choose other layers.")
        inputs = torch.cat(self._inputs).float()
        query, key, value = (projection(inputs) for projection in source.projections)
        return Layer(
            index=source.index,
            tie=source.tie,
            clouds=source.clouds,
            matrix=source.matrix,
            scale=source.scale,
            projections=source.projections,
            inputs=inputs,
            query=query,
            key=key,
            value=value,
            entropy=torch.stack(self._entropies).nanmean(dim=0),
            row=len(self._inputs[0]),
            shown=self._shown,
            remark=source.remark,
        )


def one_step(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Shown:
    """Queries, and the output that each is drawn to: what can be said of any attention. Shorter heads are filled up with zeros."""
    longest = max(tensor.shape[-1] for tensor in (query, key, value))
    query, key, value = (nn.functional.pad(tensor, (0, longest - tensor.shape[-1])) for tensor in (query, key, value))
    output = weights @ value.repeat_interleave(query.shape[0] // value.shape[0], dim=0)
    states = torch.stack([query, output], dim=2)
    return Shown(query=query, key=key, value=value, states=states, weights=weights[None])
