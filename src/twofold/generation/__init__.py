"""Text from a language model, as it comes, with what it took: time to the first token, speed, and the bytes that the cache really holds.

A model reads and writes text through a :class:`~twofold.generation.codec.Codec`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes, cached_streams
from twofold.errors import TwofoldError
from twofold.estimate import cache_of
from twofold.generation.codec import Codec, Decoder
from twofold.models.causal_lm import CACHE_FIELD, TwofoldForCausalLM
from twofold.spec import ModelSpec

CACHES = ("dynamic", "static", "quantized", "offloaded")
DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# What is asked, and what comes of it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest (``greedy``), or one drawn.

    Drawn from softmax(logits / ``temperature``), cut down to the ``top_k`` likeliest (0: all) and to the likeliest that together have the
    probability ``top_p``. The same ``seed`` draws the same text.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise TwofoldError(
                f"temperature is {self.temperature}, but logits are divided by it: use more than 0, or greedy."
            )
        if not 0 < self.top_p <= 1:
            raise TwofoldError(f"top_p is {self.top_p}, but it is a probability: use more than 0, and at most 1.")
        if self.top_k < 0 or self.seed < 0:
            raise TwofoldError(f"top_k is {self.top_k} and seed {self.seed}, but both are whole numbers of at least 0.")


@dataclass(frozen=True, kw_only=True)
class HeldCache:
    """A cache after the text: bytes that its tensors occupy, and those that (Q, K, V) with the same heads would, held in the same way."""

    kind: str
    bits: int
    tokens: int
    nbytes: int
    reference_bytes: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A text and what it took. Tokens per second are those after the first, None where there is one alone.

    ``ended_by`` is "length" (as many tokens as were asked for), "end of text", "positions" (the model has no more), or "interruption".
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    ended_by: str
    seconds: float
    seconds_to_first_token: float
    tokens_per_second: float | None
    cache: HeldCache

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def never() -> bool:
    """No reason to stop."""
    return False


def generate(
    model: TwofoldForCausalLM,
    codec: Codec,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: Sampling = Sampling(),
    cache: str = "dynamic",
    bits: int = 0,
    say: Callable[[str], object] = len,
    stop: Callable[[], bool] = never,
) -> Generated:
    """Continue a prompt. ``say`` is called with each piece of text, and ``stop`` is asked after each token.

    ``cache`` is one of :data:`CACHES`, ``bits`` those of a quantized one (8 unless they are said) or of a static one, 8 of which are codes that kernels
    read. Raises TwofoldError for a prompt that has no tokens or more than
    the model has positions.
    """
    tokens = codec.encode(prompt)
    wanted = _room(model.config.spec, len(tokens), max_new_tokens)
    held = _cache_spec(model.config.spec, cache, bits, len(tokens) + wanted)
    kept = TiedCache(model.config.spec, held)
    listener = _Listener(codec.decoder(tokens), say)
    ends = _end_tokens(model, codec)
    settings = GenerationConfig(
        max_new_tokens=wanted,
        do_sample=not sampling.greedy,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **({} if sampling.greedy else {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}),
    )
    input_ids = torch.tensor([tokens], device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        listener.begin()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
            streamer=listener,
            stopping_criteria=StoppingCriteriaList([_Asking(stop)]),
            **{CACHE_FIELD: kept},
        )
    return Generated(
        prompt=prompt,
        text=listener.text,
        prompt_tokens=len(tokens),
        new_tokens=len(listener.tokens),
        ended_by=_ending(listener.tokens, ends, wanted, max_new_tokens),
        seconds=listener.seconds,
        seconds_to_first_token=listener.seconds_to_first_token,
        tokens_per_second=listener.tokens_per_second,
        cache=_held(kept, model, held, cache),
    )


def _room(spec: ModelSpec, prompt_tokens: int, wanted: int) -> int:
    """Tokens that may be made: the last one is never read, so it needs no position."""
    if not prompt_tokens:
        raise TwofoldError("The prompt is empty, and a model continues what it reads: give it at least one character.")
    if wanted < 1:
        raise TwofoldError(f"{wanted} new tokens were asked for: ask for at least 1.")
    limit = spec.positions.max_positions
    if 0 < limit < prompt_tokens:
        raise TwofoldError(
            f"The prompt has {prompt_tokens:,} tokens, but the model has learned {limit:,} positions: give a shorter one."
        )
    return min(wanted, limit - prompt_tokens + 1) if limit else wanted


def _cache_spec(spec: ModelSpec, cache: str, bits: int, tokens: int) -> CacheSpec:
    if cache not in CACHES:
        raise TwofoldError(f"There is no cache {cache!r}: use one of {', '.join(CACHES)}.")
    if cache == "static":
        room = min(tokens, spec.positions.max_positions or tokens)
        return CacheSpec(max_tokens=room, bits=bits, axis="head" if bits else "token")
    if cache == "quantized":
        bits = bits or 8
        dims = {dim for index in range(spec.num_hidden_layers) for _, dim in cached_streams(spec.attention(index))}
        held = cache_of(dims, CacheSpec(bits=bits).bits)
        if held is None:
            raise TwofoldError(
                f"Heads of {', '.join(map(str, sorted(dims)))} floats make no whole bytes of {bits} bits each: use 8 bits."
            )
        return held
    return CacheSpec(offload=cache == "offloaded")


def _end_tokens(model: TwofoldForCausalLM, codec: Codec) -> list[int]:
    """Tokens that end a text: the model's own, or else the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        return [codec.end_token] if codec.end_token >= 0 else []
    return [int(token) for token in (named if isinstance(named, (list, tuple)) else [named])]


def _ending(tokens: list[int], ends: list[int], wanted: int, asked: int) -> str:
    if tokens and tokens[-1] in ends:
        return "end of text"
    if len(tokens) < wanted:
        return "interruption"
    return "length" if wanted == asked else "positions"


def _held(cache: TiedCache, model: TwofoldForCausalLM, held: CacheSpec, kind: str) -> HeldCache:
    spec, tokens = model.config.spec, int(cache.get_seq_length())
    reference = cache_bytes(spec.ordinary, tokens, DTYPES[model.dtype], 1, held)
    return HeldCache(kind=kind, bits=held.bits, tokens=tokens, nbytes=cache.nbytes, reference_bytes=reference)


class _Asking(StoppingCriteria):
    """Stops where somebody wants it to."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 (the names that Transformers fixes)
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)


class _Listener(BaseStreamer):
    """What ``generate`` hands its tokens to: the prompt first, then one token at a time."""

    def __init__(self, decoder: Decoder, say: Callable[[str], object]) -> None:
        self._decoder, self._say = decoder, say
        self._times: list[float] = []
        self._has_prompt = False
        self.tokens: list[int] = []
        self.text = ""

    def begin(self) -> None:
        """The clock starts."""
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """The next token [1], on its way from the device."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        token = int(value)
        self._times.append(time.perf_counter())
        self.tokens.append(token)
        self._tell(self._decoder.push(token))

    def end(self) -> None:
        """No more tokens will come."""
        self._tell(self._decoder.end())

    def _tell(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._say(piece)

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return self._times[-1] - self._start

    @property
    def seconds_to_first_token(self) -> float:
        """From the start to the first token."""
        return self._times[0] - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first."""
        return (len(self._times) - 1) / (self._times[-1] - self._times[0]) if len(self._times) > 1 else None
