"""Which runs are alike: those that one program trains together, because they differ in numbers and not in what is computed. No torch.

Seeds, learning rates, schedules, AdamW's betas, weight decay, clipping and the scale of the first weights are numbers. So are the coefficients
of a tie, among ties with the same free projections: a role's weight is a combination of the free weights, W_V = 2 W_Q - 3 W_K say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from twofold.cost import parameters
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.tie import Tie, TiePattern
from twofold.training.spec import RunSpec

MAX_MODELS = 256
"""The most models of a population: each keeps two files open."""

MEMORY_SHARE = 0.5
"""The part of the free memory that a population may be counted to need; the count is rough."""

# Learning rates and the like: a row for each model.
NUMBERS_OF_TRAINING = frozenset(
    {"learning_rate", "schedule", "warmup_steps", "min_learning_rate_ratio", "decay_fraction", "betas", "weight_decay", "clip_norm"}
)  # fmt: skip
NUMBERS_OF_MODEL = frozenset({"initializer_range"})

# Floats per parameter: the weight, its gradient before and after clipping, AdamW's two moments, and room for one more.
_FLOATS_PER_PARAMETER = 6


def why_alone(run: RunSpec) -> str:
    """Why a run cannot be trained together with others; empty: it can."""
    if run.model.dropout:
        return "dropout draws from one generator, in the order of one model's layers"
    if run.training.precision == "fp16":
        return "in fp16 every run has a loss scale of its own, which skips steps: train in bf16"
    return ""


def shape_of(run: RunSpec) -> str:
    """What is computed, as text: runs that agree in it form a population. Raises TwofoldError for a run that must be trained alone."""
    if reason := why_alone(run):
        raise TwofoldError(f"This run cannot be trained together with others: {reason}.")
    values = run.to_dict()
    model: dict[str, Any] = {name: value for name, value in values["model"].items() if name not in NUMBERS_OF_MODEL}
    training = {name: value for name, value in values["training"].items() if name not in NUMBERS_OF_TRAINING}
    return json.dumps([values["task"], model | {"tie": _tie_shape(run.model)}, training], sort_keys=True)


def program_of(models: Sequence[ModelSpec]) -> ModelSpec:
    """The model whose program computes all of these, which must be of one shape: their own, or that of free roles if their ties differ."""
    first = models[0]
    if all(model.tie == first.tie for model in models):
        return first
    return first.with_changes(tie=_all_free(first))


def models_in(memory_bytes: int, run: RunSpec, tokens_per_example: int) -> int:
    """How many such models are trained at once in so much free memory: as many as are counted to need half of it, from 1 up to 256.

    Counted are six floats per parameter, and what the way back needs of the examples that are computed at once: per token and layer 12
    hidden states, 4 rows of the MLP and 4 rows of attention weights for each head, and per token 4 rows of logits; all of 4 bytes.
    """
    model, training = run.model, run.training
    tokens = training.batch_size // training.accumulation_steps * tokens_per_example
    inner = model.intermediate_size * (2 if model.gated_mlp else 1)
    of_layer = 12 * model.hidden_size + 4 * inner + 4 * model.num_attention_heads * tokens_per_example
    per_token = model.num_hidden_layers * of_layer + 4 * max(model.vocab_size, model.num_labels)
    floats = _FLOATS_PER_PARAMETER * parameters(model) + tokens * per_token
    return max(1, min(MAX_MODELS, int(MEMORY_SHARE * memory_bytes) // (4 * floats)))


def _tie_shape(model: ModelSpec) -> Any:
    ties = [model.tie.tie(layer) for layer in range(model.num_hidden_layers)]
    # Where the cached stream is turned, or is longer than a key, K and V are one tensor, and code says so.
    has_coefficients = all(
        not attention.positions.turns_stream and attention.query_dim == attention.head_dim
        for attention in map(model.attention, range(model.num_hidden_layers))
    )
    if not has_coefficients:
        return str(model.tie)
    return [["".join(tie.free_projections), tie.plus] for tie in ties]


def _all_free(model: ModelSpec) -> TiePattern:
    free = Tie.parse("(Q, K, V)")
    return TiePattern(tuple(Tie(free.matrix, model.tie.tie(layer).plus) for layer in range(model.num_hidden_layers)))
