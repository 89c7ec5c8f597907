"""A model that others trained, from a folder or from the hub, and what halving does to its answers."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from twofold.cache import StreamLayer
from twofold.errors import TwofoldError
from twofold.existing import low_bits
from twofold.existing.halving import HalvingReport, Keep, halve, is_halved
from twofold.existing.multi_head import head_dim
from twofold.models.causal_lm import CACHE_FIELD
from twofold.models.checkpoint import tensor_shapes


def load(name: str, kind: Any = None, **options: Any) -> PreTrainedModel:
    """The model that a folder or a name on the hub holds, ready for inference, of the class that its config names or of another ``kind``.

    ``options`` are those of ``from_pretrained``.

    Only safetensors are read, and no code comes with them: a pickle, and code, can run anything. Raises TwofoldError for what cannot be read, and for
    files that lack weights of the model that their config names, which would be drawn at random.
    """
    if Path(name).is_dir():
        dict(tensor_shapes(Path(name)))  # refuses pickles, and says which file is missing or truncated
    elif Path(name).exists() or name.startswith((".", "/", "~")):
        raise TwofoldError(
            f"{name} is no folder: give the folder that save_pretrained wrote, or a model's name on the hub."
        )
    try:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=False, local_files_only=options.get("local_files_only", False)
        )
        named = kind or getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        if named is None:
            raise TwofoldError(
                f"The config of {name} names no architecture that Transformers {transformers.__version__} has."
            )
        chosen = {"dtype": "auto", "config": config, "trust_remote_code": False} | options
        model, found = named.from_pretrained(name, use_safetensors=True, output_loading_info=True, **chosen)
        if kind is None and (missing := sorted(found["missing_keys"])):
            more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
            raise TwofoldError(f"{name} lacks {missing[0]}{more}, which its config asks for: take another copy of it.")
    except TwofoldError:
        raise
    except Exception as error:  # noqa: BLE001 (a model's own classes may raise anything)
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TwofoldError(f"{name} cannot be read by Transformers ({reason}).") from None
    loaded: PreTrainedModel = model.eval()
    return loaded


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 64
"""Tokens at the end of a text whose logits are compared: each is a step of its own."""


@dataclass(frozen=True)
class Trial:
    """One text through the model before and after: bytes of its cache, and what came of it.

    ``logit_error`` is the root mean square of the logits' differences over that of the logits. ``same_tokens`` of the ``new_tokens`` greedy ones agree
    before the first that differs. ``bits`` 8 or 4: every token of the one tensor was held in as many; 0: as computed.
    """

    tokens: int
    cache_bytes: tuple[int, int]
    logit_error: float
    new_tokens: int
    same_tokens: int
    bits: int


@torch.no_grad()
def attempt(
    model: Any, name: str, text: str, *, new_tokens: int, keep: Keep, max_error: float, bits: int = 0
) -> tuple[HalvingReport, Trial]:
    """Halve ``model`` and compare it with what it was on ``text``, its one tensor held in ``bits`` (0: as computed).

    Raises TwofoldError for a model that makes no text of text, or has no tokenizer.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise TwofoldError(f"{type(model).__name__} does not go on with a text: leave the text out.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (a tokenizer's own code may raise anything)
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TwofoldError(f"The tokenizer of {name} cannot be read ({reason}): leave the text out.") from None
    if len(tokenizer) < 2:
        raise TwofoldError(f"{name} has no tokenizer: leave the text out.")
    tokens: Tensor = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    _check_text(model, tokens, new_tokens)
    before = _answer(model, tokens, new_tokens)
    report = halve(model, keep=keep, max_error=max_error)
    after = _answer(model, tokens, new_tokens, bits)
    made = [answer[1][0, tokens.shape[1] :].tolist() for answer in (before, after)]
    differing = (at for at, pair in enumerate(zip(*made, strict=False)) if pair[0] != pair[1])
    scale = before[0].square().mean().sqrt()
    return report, Trial(
        tokens=tokens.shape[1] + len(made[0]) - 1,
        cache_bytes=(before[2], after[2]),
        logit_error=float((after[0] - before[0]).square().mean().sqrt() / scale),
        new_tokens=len(made[0]),
        same_tokens=next(differing, min(map(len, made))),
        bits=bits,
    )


def _check_text(model: Any, tokens: Tensor, new_tokens: int) -> None:
    """Raise TwofoldError for tokens that the model cannot read."""
    count = tokens.shape[1]
    if count < 2:
        raise TwofoldError("The text is shorter than two tokens: nothing would be read from a cache.")
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or count + new_tokens
    if count + new_tokens > room:
        raise TwofoldError(
            f"The text has {count:,} tokens, {new_tokens:,} more are asked for, and {type(model).__name__} reads {room:,} at most: give a shorter text."
        )
    if int(tokens.max()) >= (known := model.get_input_embeddings().num_embeddings):
        raise TwofoldError(
            f"The tokenizer makes token {int(tokens.max()):,} of the text, and {type(model).__name__} knows {known:,}: they are not of one model."
        )


def _answer(model: Any, tokens: Tensor, new_tokens: int, bits: int = 0) -> tuple[Tensor, Tensor, int]:
    """Logits of the last tokens, read from a cache one token at a time; a greedy answer; and the bytes of its cache."""

    def given() -> dict[str, Any]:
        return (
            {CACHE_FIELD: low_bits.quantized_cache(model, bits=bits, group_size=group, tail_tokens=0)} if bits else {}
        )

    group = gcd(32, *(head_dim(layer) for layer in model.modules() if is_halved(layer)))
    first = max(1, tokens.shape[1] - STEPS)
    output = model(tokens[:, :first], use_cache=True, **given())
    logits = []
    for at in range(first, tokens.shape[1]):
        output = model(tokens[:, [at]], use_cache=True, **{CACHE_FIELD: output[CACHE_FIELD]})
        logits.append(output.logits[:, -1].float())
    answer = model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **given())
    return torch.stack(logits), answer.sequences, cache_bytes(answer[CACHE_FIELD])


def cache_bytes(cache: Any) -> int:
    """Bytes of what the layers of one of Transformers' caches hold."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(
        layer.nbytes if isinstance(layer, StreamLayer) else layer.keys.nbytes + layer.values.nbytes for layer in layers
    )
