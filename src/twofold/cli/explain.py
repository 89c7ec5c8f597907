"""``twofold explain``: what a tie means and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofold.cli.examples import Example
from twofold.cli.output import Json, show, show_json
from twofold.cli.sizes import HeadDim, Heads, HiddenSize, KvHeads, Layers, MlpSize, Preset, Sizes, VocabSize
from twofold.cost import DTYPE_BYTES
from twofold.errors import TwofoldError
from twofold.explain import REFERENCE, Explanation
from twofold.explain import explain as explain_tie
from twofold.lazy import Lazy
from twofold.presets import preset as find_preset
from twofold.spec import ModelSpec

if TYPE_CHECKING:
    from twofold import kernels, picture
else:
    kernels, picture = Lazy("twofold.kernels"), Lazy("twofold.picture")

EXAMPLES = (
    Example(
        command='twofold explain "(Q, K=V)"',
        purpose="What does it mean, and what does it save in a model of 300M parameters?",
        is_cheap=True,
    ),
    Example(
        command='twofold explain "V = Q - K" --preset 1.2b --dtype fp32',
        purpose="Any linear relation, in a larger model, with a cache in float32.",
        is_cheap=True,
    ),
    Example(
        command='twofold explain "(Q, K, V)" "(Q, K=V)" "(Q=K, V)" "3*(Q, K, V) | (Q, K=V)"',
        purpose="Several ties side by side; the last one changes from layer to layer.",
        is_cheap=True,
    ),
    Example(
        command='twofold explain "(Q, K=V)" --hidden-size 512 --heads 4 --kv-heads 2 --layers 8 --tokens 4096',
        purpose="A model of any other size.",
        is_cheap=True,
    ),
    Example(
        command='twofold explain "(Q, K=V)" --json | jq .explanations[0].cost.cache_bytes',
        purpose="For programs.",
    ),
)


def command(
    ties: Annotated[list[str], typer.Argument(help='Ties such as "(Q, K=V)" or "V = Q - K", or patterns of ties.')],
    *,
    preset: Preset = "paper-300m",
    hidden_size: HiddenSize = None,
    layers: Layers = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    mlp_size: MlpSize = None,
    vocab_size: VocabSize = None,
    tokens: Annotated[int, typer.Option(help="Tokens in the cache.", min=1)] = 32768,
    dtype: Annotated[
        str, typer.Option(help="Type of the cached floats.", autocompletion=lambda: list(DTYPE_BYTES))
    ] = "bf16",
    backend: Annotated[
        bool, typer.Option("--backend", help="Say which attention backend would run here, and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a tie means and what it costs: equations, weights, cached tensors, symmetry, parameters, cache."""
    sizes = Sizes(
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=mlp_size,
        vocab_size=vocab_size,
    )
    model = sizes.of(find_preset(preset).with_changes(tie=REFERENCE))
    reference = explain_tie(REFERENCE, model, tokens=tokens, dtype=dtype)
    explanations = [explain_tie(text, model, tokens=tokens, dtype=dtype) for text in ties]
    if len(explanations) == 1 and explanations[0].refusal:
        raise TwofoldError(explanations[0].refusal)
    if as_json:
        show_json(_as_dict(explanations, reference, model, backend=backend))
        return
    name = preset if not sizes.given() else f"a model like {preset}"
    caption = picture.caption(model, name, tokens=tokens, dtype=dtype)
    if len(explanations) == 1:
        show(picture.page(explanations[0], reference, model, caption))
    else:
        show(picture.comparison(explanations, reference, caption))


def _as_dict(
    explanations: list[Explanation], reference: Explanation, model: ModelSpec, *, backend: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model": model.to_dict(),
        "reference": reference.to_dict(),
        "explanations": [explanation.to_dict() for explanation in explanations],
    }
    return told
