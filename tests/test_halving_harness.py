"""lm-evaluation-harness is told nothing: a halved model in its ``hf`` class has the log-likelihoods and the generations of the model as it was.

It runs where the harness is installed (``pip install -c constraints.txt -e ".[eval]"``).
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halving_models import MULTI_HEAD, cache_bytes, cache_of, gemma, randomized
from twofold.existing import halve, restore
from twofold.models.quiet import without_bars

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
instances = pytest.importorskip("lm_eval.api.instance", reason="lm-evaluation-harness lacks its requests")

TEXTS = ["It was the best of times", "it was", "the worst of times, it was the age of wisdom, it was", "o"]


def letters() -> transformers.PreTrainedTokenizerFast:
    """One token for each printable sign."""
    vocabulary = {chr(32 + index): index for index in range(95)} | {"\n": 95}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="\n"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ", eos_token="\n")


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [instances.Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def told(model: Any) -> dict[str, list[Any]]:
    """What it says to each kind of question, three at a time, so that texts of different lengths are padded."""
    wrapped = harness.HFLM(pretrained=model, tokenizer=letters(), device="cpu", batch_size=3)
    choices = [(text, ending) for text in TEXTS for ending in (" of", " light", "?")]
    asking = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    with without_bars():
        chosen = wrapped.loglikelihood(asked("loglikelihood", *choices), disable_tqdm=True)
        read = wrapped.loglikelihood_rolling(
            asked("loglikelihood_rolling", *((text * 4,) for text in TEXTS)), disable_tqdm=True
        )
        made = wrapped.generate_until(
            asked("generate_until", *((text, dict(asking)) for text in TEXTS)), disable_tqdm=True
        )
    return {"chosen": [pair[0] for pair in chosen], "greedy": [pair[1] for pair in chosen], "read": read, "made": made}


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
def test_the_harness_says_the_same_of_a_halved_model(name: str):
    model = gemma() if name == "gemma" else randomized(MULTI_HEAD[name](), std=0.15)
    held: list[int] = []
    original = model.generate

    def generate(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options | {"return_dict_in_generate": True})
        held.append(sum(cache_bytes(cache_of(found))))
        return found.sequences

    model.generate = generate
    before = told(model)
    halve(model)
    after = told(model)
    restore(model)
    assert after["made"] == before["made"]
    assert any(before["made"])
    assert after["greedy"] == before["greedy"]
    for kind in ("chosen", "read"):
        assert after[kind] == pytest.approx(before[kind], rel=1e-5, abs=1e-5)
        assert len({round(value, 3) for value in before[kind]}) > len(before[kind]) // 2
    whole, half = held[: len(held) // 2], held[len(held) // 2 :]
    assert len(whole) == len(half) >= 2
    assert all(b < a for a, b in zip(whole, half, strict=True))
