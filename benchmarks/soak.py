"""Thousands of generations in one process: memory does not grow, and answers are the recomputed ones.

    python benchmarks/soak.py                       # 10,000 generations, some three minutes of a core
    python benchmarks/soak.py --json --generations 1000

Small random models (ties, heads, positions, windows) come and go. Each generation draws a model, a prompt, lengths, a way (greedy, sampling, beams,
several answers, prompt look-up), a cache (growing, pre-allocated, offloaded, quantized, in few bits), and whether prompts are padded on the left,
read in pieces, or continued from the cache that a first answer returned.

One answer of ten is held against the same generation without a cache, from the same seed, in float64. Prompt look-up needs a cache: its answer
is the greedy one. A cache in few bits gives other floats than recomputation: its answer is replayed token by token, outside of ``generate``.

Memory is looked at forty times, after collecting garbage and giving back what is free. The growth is the median slope between all looks after
the first fifth, in which libraries and tables fill. A cache or two that stayed behind at each generation would be some kilobytes and several
tensors: the goals are a kilobyte, and a tensor in a thousand generations.
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from transformers.utils import logging

from processes import resident_bytes
from rows import Row, row, show
from twofold.cache import TiedCache
from twofold.cache_spec import CacheSpec
from twofold.errors import TwofoldError
from twofold.models import TwofoldForCausalLM, build_model
from twofold.models.causal_lm import CACHE_FIELD
from twofold.positions import (
    LearnedPositions,
    NoPositions,
    RelativeBiasPositions,
    RotaryPositions,
    SharedRotaryPositions,
)
from twofold.spec import ModelSpec

VOCABULARY, MAX_PROMPT, MAX_NEW = 37, 40, 20
POSITIONS = (
    NoPositions(),
    LearnedPositions(length=MAX_PROMPT + 2 * MAX_NEW),
    RotaryPositions(theta=100.0),
    RotaryPositions(theta=100.0, rotate="stream"),
    SharedRotaryPositions(dim=6, theta=100.0),
    RelativeBiasPositions(num_buckets=8, max_distance=11),
)
TIES = (
    "(Q, K, V)",
    "(Q, K=V)",
    "(Q=K, V)",
    "(Q=K=V)",
    "(Q=V, K)",
    "V = Q - K",
    "2V = -3K",
    "(Q, K, V) | (Q, K=V)",
)
WINDOWS = ((0,), (0,), (3,), (9, 0))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "look-up": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
HELD: dict[str, dict[str, Any]] = {
    "growing": {},
    "pre-allocated": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "pre-allocated, offloaded": {"cache_implementation": "offloaded_static"},
    # Its tail holds all that there will be, as computed.
    "quantized": {"cache_implementation": "quantized", "cache_config": {"q_group_size": 8}},
    "few bits": {
        "cache_implementation": "quantized",
        "cache_config": {"nbits": 8, "q_group_size": 8, "residual_length": 3},
    },
}
FEW_BITS = CacheSpec(bits=8, group_size=8, tail_tokens=3)
LOOKS, WARM_UP = 40, 0.2


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One generation. ``prompt`` [B, P]; ``mask`` [B, P] is 0 where a prompt is padded."""

    way: str
    held: str
    prompt: Tensor
    mask: Tensor
    new_tokens: int
    chunk: int
    continues: bool
    seed: int

    @property
    def modes(self) -> list[str]:
        """What it is counted under."""
        more = {
            "left padding": not bool(self.mask.all()),
            "prompt in pieces": self.chunk > 0,
            "continuation": self.continues,
        }
        return [self.way, f"cache {self.held}", *(name for name, is_so in more.items() if is_so)]


def drawn_spec(random: Random) -> ModelSpec:
    """Any small language model that there can be."""
    while True:
        kv_heads = random.choice([1, 2, 3])
        try:
            return ModelSpec(
                tie=random.choice(TIES),
                architecture="causal_lm",
                hidden_size=random.choice([5, 11]),
                num_hidden_layers=2,
                num_attention_heads=kv_heads * random.choice([1, 3]),
                num_key_value_heads=kv_heads,
                head_dim=random.choice([8, 16]),
                intermediate_size=19,
                vocab_size=VOCABULARY,
                positions=random.choice(POSITIONS),
                window_tokens=random.choice(WINDOWS),
                qk_norm=random.random() < 0.5,
                tie_word_embeddings=False,  # else a small model says one token again and again
            )
        except TwofoldError:
            continue  # impossible together


def drawn_model(random: Random) -> TwofoldForCausalLM:
    """In float64, with weights so large that attention matters."""
    model = build_model(drawn_spec(random), seed=0).double().eval()
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model


def drawn(random: Random) -> Draw:
    """Any generation that there can be."""
    way = random.choice(list(WAYS))
    # Candidates of a look-up are taken back, which Transformers does to caches that grow, one sequence at a time.
    held = "growing" if way == "look-up" else random.choice(list(HELD))
    if held == "few bits":
        way = "greedy"
    batch = 1 if way == "look-up" else random.randint(1, 3)
    seed, length = random.getrandbits(31), random.randint(1, MAX_PROMPT)
    prompt = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(prompt)
    is_plain = held == "few bits" or way == "look-up"
    if not is_plain and random.random() < 0.4:
        for line in mask:
            line[: random.randrange(length)] = 0
    return Draw(
        way=way,
        held=held,
        prompt=prompt,
        mask=mask,
        new_tokens=random.randint(1, MAX_NEW),
        chunk=random.randint(1, length) if not is_plain and random.random() < 0.2 else 0,
        continues=not is_plain and way in ("greedy", "sampling") and random.random() < 0.3,
        seed=seed,
    )


def generated(model: TwofoldForCausalLM, draw: Draw, tokens: Tensor, **options: Any) -> Any:
    """What ``generate`` makes of ``tokens``, of which the prompt is the beginning."""
    torch.manual_seed(draw.seed)
    mask = torch.ones_like(tokens)
    mask[:, : draw.mask.shape[1]] = draw.mask
    options = WAYS[draw.way] | {"max_new_tokens": draw.new_tokens, "return_dict_in_generate": True} | options
    return model.generate(tokens, attention_mask=mask, **options)


def answers(model: TwofoldForCausalLM, draw: Draw) -> list[Tensor]:
    """The answer, and that which continues it from its cache."""
    options = HELD[draw.held] | ({"prefill_chunk_size": draw.chunk} if draw.chunk else {})
    if not draw.continues:
        return [generated(model, draw, draw.prompt, **options).sequences]
    # Room that is taken at once is asked for as a whole.
    room = {"max_cache_len": draw.prompt.shape[1] + 2 * draw.new_tokens} if "pre-allocated" in draw.held else {}
    first = generated(model, draw, draw.prompt, **options, **room)
    more = generated(model, draw, first.sequences, **{CACHE_FIELD: first[CACHE_FIELD]})
    return [first.sequences, more.sequences]


def recomputed(model: TwofoldForCausalLM, draw: Draw, found: list[Tensor]) -> list[Tensor]:
    """What they should be."""
    if draw.held == "few bits":
        return [replayed(model, draw)]
    plain = {"use_cache": False}
    if draw.way == "look-up":
        plain["prompt_lookup_num_tokens"] = None
    return [generated(model, draw, tokens, **plain).sequences for tokens in (draw.prompt, *found[:-1])]


@torch.no_grad()
def replayed(model: TwofoldForCausalLM, draw: Draw) -> Tensor:
    """Greedily, with a cache in few bits that is filled by hand."""
    cache, tokens = TiedCache(model.config.spec, FEW_BITS), draw.prompt
    new = tokens
    for _ in range(draw.new_tokens):
        new = model(new, cache=cache).logits[:, -1:].argmax(dim=-1)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens


def live_tensors(models: list[TwofoldForCausalLM]) -> int:
    """Tensors in this process that are no model's weights."""
    own = sum(1 for model in models for _ in (*model.parameters(), *model.buffers()))
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects()) - own


def growth(looks: list[tuple[int, float]]) -> float:
    """Per generation: the median slope between all looks after the warm-up."""
    kept = [look for look in looks if look[0] >= WARM_UP * looks[-1][0]]
    return float(stats.theilslopes([value for _, value in kept], [index for index, _ in kept]).slope)


def generations(count: int, seed: int, num_models: int = 12) -> Iterator[tuple[int, TwofoldForCausalLM, Draw, list]]:
    """(number, model, draw, all models) of each generation; every hundredth brings a new model in place of an old one."""
    random = Random(seed)
    models = [drawn_model(random) for _ in range(num_models)]
    for index in range(count):
        if index % 100 == 99:
            models[random.randrange(num_models)] = drawn_model(random)
        yield index, random.choice(models), drawn(random), models


def soak(arguments: argparse.Namespace) -> list[Row]:
    gc.collect()
    gc.freeze()  # what is there before is not looked through forty times
    try:
        return _soaked(arguments)
    finally:
        gc.unfreeze()


def _soaked(arguments: argparse.Namespace) -> list[Row]:
    every, modes = max(1, arguments.generations // LOOKS), Counter[str]()
    bytes_, tensors, compared, different = [], [], 0, 0
    for index, model, draw, models in generations(arguments.generations, arguments.seed):
        found = answers(model, draw)
        modes.update(draw.modes)
        if index % arguments.recompute_every == 0:
            wanted = recomputed(model, draw, found)
            compared += 1
            different += not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        if index % every == every - 1:
            found = wanted = None  # these would be counted
            bytes_.append((index + 1, resident_bytes()))
            tensors.append((index + 1, live_tensors(models)))
    last = round(WARM_UP * len(bytes_))
    return [
        row("resident memory, growth per generation", growth(bytes_), "bytes", "<= 1024"),
        row("live tensors, growth per 1,000 generations", 1000 * growth(tensors), "tensors", "<= 1"),
        row("answers that are not the recomputed ones", different, "answers", "<= 0"),
        row("answers recomputed", compared, "answers"),
        row("generations", sum(modes[way] for way in WAYS), "generations"),
        row("resident memory after the warm-up", bytes_[last][1] / 2**20, "MiB"),
        row("resident memory at the end", bytes_[-1][1] / 2**20, "MiB"),
        *(row(f"generations, {mode}", count, "generations") for mode, count in sorted(modes.items())),
    ]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--generations", type=int, default=10_000, help="how many (10,000)")
    parser.add_argument("--recompute-every", type=int, default=10, metavar="N", help="recompute each Nth answer (10)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    arguments = parser.parse_args(given)
    if arguments.generations < LOOKS or arguments.recompute_every < 1:
        parser.error(
            f"memory is looked at {LOOKS} times: use at least {LOOKS} generations, and recompute every 1 or more"
        )
    logging.set_verbosity_error()
    show(soak(arguments), as_json=arguments.json)


if __name__ == "__main__":
    main()
