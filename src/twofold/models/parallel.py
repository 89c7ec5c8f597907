"""Tensor parallelism: whole heads and parts of the MLP on each device, one sum over devices after attention and one after the MLP.

The plan is data for Transformers, which does the splitting (``from_pretrained(distributed_config=DistributedConfig(tp_size=2))``): the projections into
heads are split by columns, which are heads, so a tie holds on every device as it holds in the whole, and each caches the streams of its own heads; the
projections out of them are split by rows. Scales that all heads share stay whole, and their gradients are summed.
"""

from __future__ import annotations

from twofold.errors import TwofoldError
from twofold.spec import ModelSpec

COLUMNS, ROWS, SHARED = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""Transformers' names of the styles."""


def tensor_parallel_plan(spec: ModelSpec) -> dict[str, str]:
    """A style for each module of a layer that is not simply repeated, by its name within the trunk; empty where a model cannot be split."""
    if _why_whole(spec):
        return {}
    roles = sorted({role for tie in spec.tie.ties for role in tie.free_projections})
    styles = {f"attention.{role.lower()}_proj": COLUMNS for role in roles} | {"attention.o_proj": ROWS}
    if spec.qk_norm:
        styles |= {"attention.q_norm": SHARED, "attention.k_norm": SHARED}
    styles |= {"mlp.gate_proj": COLUMNS} if spec.gated_mlp else {}
    styles |= {"mlp.up_proj": COLUMNS, "mlp.down_proj": ROWS}
    return {f"layers.*.{name}": style for name, style in styles.items()}


def check_tensor_parallel(spec: ModelSpec, devices: int) -> None:
    """Raise TwofoldError unless every one of so many devices can have whole heads and an equal part of the MLP."""
    if reason := _why_whole(spec):
        raise TwofoldError(f"This model cannot be split over {devices} devices: {reason}; use tp_size=1.")
    for number, what in (
        (spec.num_attention_heads, "query heads"),
        (spec.num_key_value_heads, "KV heads"),
        (spec.intermediate_size, "columns of the MLP"),
    ):
        if number % devices:
            raise TwofoldError(
                f"{number} {what} cannot be split over {devices} devices: use a tp_size that divides "
                f"{spec.num_attention_heads} query heads, {spec.num_key_value_heads} KV heads and {spec.intermediate_size} columns of the MLP."
            )


def _why_whole(spec: ModelSpec) -> str:
    """What a model has that belongs to all heads at once; empty: nothing."""
    if spec.latent_dim:
        return "all of its heads read one latent"
    if spec.positions.key_extension_dim:
        return "all of its heads read one shared rotary key"
    if spec.positions.num_bias_buckets:
        return "the relative biases of all of its heads are one table"
    return "the 2-D positions of '+' are added to all of its heads" if any(tie.plus for tie in spec.tie.ties) else ""
