"""``twofold explain``: what a tie means and what it costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from twofold.cache_spec import CacheSpec
from twofold.cli.examples import Example
from twofold.cli.groups import grouped
from twofold.cli.output import Json, show, show_json
from twofold.cli.sizes import Preset, Sizes, VocabSize
from twofold.cost import DTYPE_BYTES
from twofold.errors import TwofoldError
from twofold.explain import REFERENCE, Explanation
from twofold.explain import explain as explain_tie
from twofold.lazy import Lazy
from twofold.presets import preset as find_preset
from twofold.spec import ModelSpec
from twofold.tie import TiePattern

if TYPE_CHECKING:
    import torch

    from twofold import kernels, latent_attention, picture
else:
    torch, latent_attention, kernels = Lazy("torch"), Lazy("twofold.latent_attention"), Lazy("twofold.kernels")
    picture = Lazy("twofold.picture")

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


# torch's names of what a cache may be made of.
TORCH_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}


@grouped
def command(
    ties: Annotated[list[str], typer.Argument(help='Ties such as "(Q, K=V)" or "V = Q - K", or patterns of ties.')],
    *,
    preset: Preset = "paper-300m",
    sizes: Sizes,
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
    start = find_preset(preset)
    model = sizes.of(start.with_changes(tie=REFERENCE, vocab_size=vocab_size or start.vocab_size))
    reference = explain_tie(REFERENCE, model.with_changes(latent_dim=0), tokens=tokens, dtype=dtype)
    explanations = [explain_tie(text, model, tokens=tokens, dtype=dtype) for text in ties]
    if len(explanations) == 1 and explanations[0].refusal:
        raise TwofoldError(explanations[0].refusal)
    backends = [_backend(one, model, tokens=tokens, dtype=dtype) for one in explanations if backend]
    if as_json:
        show_json(_as_dict(explanations, reference, model, backends))
        return
    name = preset if not sizes.given() else f"a model like {preset}"
    caption = picture.caption(model, name, tokens=tokens, dtype=dtype)
    if len(explanations) == 1:
        show(picture.page(explanations[0], reference, model, caption))
    else:
        show(picture.comparison(explanations, reference, caption))
    show(*(_backend_line(one, told) for one, told in zip(explanations, backends, strict=False)))


def _as_dict(
    explanations: list[Explanation], reference: Explanation, model: ModelSpec, backends: list[dict[str, Any]]
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model": model.to_dict(),
        "reference": reference.to_dict(),
        "explanations": [explanation.to_dict() for explanation in explanations],
    }
    if backends:
        told["backend"] = backends[0]
        for explanation, backend in zip(told["explanations"], backends, strict=True):
            explanation["backend"] = backend
    return told


def _backend(explanation: Explanation, model: ModelSpec, *, tokens: int, dtype: str) -> dict[str, Any]:
    """What would decode one more token here, in the first layer; empty where the model cannot have the tie."""
    if explanation.cost is None:
        return {}
    tie = TiePattern.parse(explanation.pattern).ties[0]
    layer = model.with_changes(tie=tie.without_plus if model.causal else tie).attention(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = partial(latent_attention.decoding_problem, layer, device=device, dtype=TORCH_DTYPES[dtype], num_keys=tokens)
    codes = CacheSpec(bits=8, axis="head").holds_codes(layer.window_tokens)
    choice, of_codes = kernels.choose(asked()), kernels.choose(asked(codes=codes))
    told = {"name": choice.name, "why": choice.why, "refused": dict(choice.refused), "device": device, "dtype": dtype}
    return told | {"codes": {"name": of_codes.name, "refused": dict(of_codes.refused)}}


def _backend_line(explanation: Explanation, told: dict[str, Any]) -> Text:
    if not told:
        return Text()
    refused = "".join(f"; not {name}: {reason}" for name, reason in told["refused"].items())
    sentence = (
        f"{told['name']} decodes {explanation.pattern} in {told['dtype']} on {told['device']}, {told['why']}{refused}. "
        f"From a cache of 8-bit codes {told['codes']['name']} does."
    )
    return Text.assemble(("backend  ", picture.LABEL), sentence)
