"""lm-evaluation-harness through its ``hf`` model: a saved folder with its tokenizer, local tasks, and the same scores with and without a cache.

It runs where the harness is installed (``pip install -c constraints.txt -e ".[eval]"``): thirty packages that nothing else here needs, so the dev
extra leaves them out.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from docs_pages import ROOT, blocks
from model_strategies import GPT2, LLAMA
from twofold.cost import cache_bytes
from twofold.models import TwofoldForCausalLM, build_model
from twofold.models.quiet import without_bars
from twofold.positions import LearnedPositions
from twofold.spec import ModelSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness lacks its hf model")
lm_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness lacks its tasks")

WORDS = ["tie", "query", "key", "value", "head"]
TEXT = " ".join(WORDS * 3)
SPECS = {
    "tied": LLAMA.with_changes(hidden_size=32, vocab_size=256, intermediate_size=64),
    "pattern": GPT2.with_changes(
        hidden_size=32,
        vocab_size=256,
        window_tokens=(16, 0),
        tie_word_embeddings=False,
        positions=LearnedPositions(length=90),
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and no other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=alphabet[0], eos_token=alphabet[1])


def trained(spec: ModelSpec) -> TwofoldForCausalLM:
    """It has read one text, words that come in turn, until it knows which follows which."""
    model = build_model(spec, seed=0)
    tokens = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(600):
        loss = model(tokens, labels=tokens).loss
        if loss < 0.02:  # how soon depends on how the processor rounds
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def task(name: str, kind: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        **options,
    }


def tasks() -> list[dict[str, Any]]:
    pairs = [(word, following) for word, following in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)]
    asked = [
        {
            "text": f"{' '.join(WORDS)} "[: len(" ".join(WORDS)) + 1] if word == WORDS[-1] else _up_to(word),
            "next": following,
        }
        for word, following in pairs
    ]
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    return [
        task("choose", "multiple_choice", asked, doc_to_choice=WORDS, doc_to_target="{{next}}", metric_list=accuracy),
        task(
            "read",
            "loglikelihood_rolling",
            [{"text": TEXT}, {"text": " ".join(WORDS * 2)}],
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
        task(
            "continue",
            "generate_until",
            asked,
            doc_to_target="{{next}}",
            generation_kwargs={"until": [" "], "max_gen_toks": 8},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
    ]


def _up_to(word: str) -> str:
    return " ".join(WORDS[: WORDS.index(word) + 1]) + " "


def scores(model: Any, **options: Any) -> dict[str, dict[str, float]]:
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks(),
        task_manager=lm_tasks.TaskManager(include_defaults=False),  # its own thousands of tasks need not be read
        bootstrap_iters=0,
        batch_size=3,
        log_samples=False,
        **options,
    )
    return {
        name: {metric: value for metric, value in result.items() if isinstance(value, float)}
        for name, result in found["results"].items()
    }


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with without_bars():
        yield


class Uncached(TwofoldForCausalLM):
    """The harness asks ``generate`` for a cache; this one computes every token from the whole text."""

    def generate(self, *arguments: Any, **options: Any) -> Any:
        return super().generate(*arguments, **options | {"use_cache": False})


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_folder_is_evaluated_with_and_without_a_cache(name: str, tmp_path: Path):
    spec = SPECS[name]
    model = trained(spec)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    folder = f"pretrained={tmp_path},dtype=float32"
    cached = scores("hf", model_args=folder, device="cpu")
    assert cached["choose"]["acc,none"] == 1.0
    assert cached["continue"]["exact_match,none"] == 1.0
    # The harness reads a text behind a token of its own, which moves learned positions by one.
    assert 0 < cached["read"]["bits_per_byte,none"] < (1 if name == "tied" else 6)
    uncached = Uncached.from_pretrained(tmp_path, use_cache=False)
    wrapped = harness.HFLM(pretrained=uncached, tokenizer=byte_tokenizer(), device="cpu", batch_size=3)
    found = scores(wrapped)
    assert found["choose"] == cached["choose"]
    assert found["continue"] == cached["continue"]
    assert found["read"] == pytest.approx(cached["read"], rel=1e-5)


def test_what_is_scored_is_the_models_own_likelihood(tmp_path: Path):
    """And an untrained model, the liar, knows nothing."""
    model = trained(SPECS["tied"])
    wrapped = harness.HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu", batch_size=1)
    (told,) = wrapped.loglikelihood_rolling([_request(TEXT)], disable_tqdm=True)
    tokens = torch.tensor([byte_tokenizer()("".join((byte_tokenizer().eos_token, TEXT)))["input_ids"]])
    logits = model(tokens[:, :-1]).logits.log_softmax(dim=-1)
    wanted = logits.gather(2, tokens[:, 1:, None]).sum()
    assert told == pytest.approx(wanted.item(), rel=1e-4)
    untrained = harness.HFLM(
        pretrained=build_model(SPECS["tied"], seed=0).eval(), tokenizer=byte_tokenizer(), device="cpu"
    )
    assert scores(untrained)["read"]["bits_per_byte,none"] > 4


def _request(text: str) -> Any:
    return type("Request", (), {"args": (text,), "arguments": (text,)})()


def test_the_harness_knows_how_long_a_text_may_be(tmp_path: Path):
    model = build_model(SPECS["pattern"], seed=0).eval()
    wrapped = harness.HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu")
    assert wrapped.max_length == 90
    long = " ".join(WORDS * 6)  # read in windows of what the positions allow
    (told,) = wrapped.loglikelihood_rolling([_request(long)], disable_tqdm=True)
    assert told < 0


NEXT_WORD = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["query", "key", "value"]
doc_to_target: "{{next}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.long
def test_the_command_on_the_page(tmp_path: Path):
    """The harness's own command, to which an import is all that is added."""
    trained(SPECS["tied"]).save_pretrained(tmp_path / "tied")
    byte_tokenizer().save_pretrained(tmp_path / "tied")
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "tie ", "next": "query"}) + "\n")
    (tmp_path / "next_word.yaml").write_text(NEXT_WORD % (tmp_path / "words.jsonl"))
    (block,) = [block for block in blocks(ROOT / "docs" / "transformers.md") if "lm_eval" in block.text]
    words = shlex.split(block.text.replace("\\\n", " ").replace("lambada_openai", "next_word.yaml --device cpu"))
    command = [sys.executable, *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|next_word.*\|acc .*\|\s*1\|", done.stdout), done.stdout


def test_its_generation_holds_one_tensor_per_layer():
    model = trained(SPECS["tied"])
    held = []
    original = type(model).generate

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options | {"return_dict_in_generate": True})
        cache = found.get("cache") or found.past_key_values
        held.append(
            (
                cache.nbytes,
                cache_bytes(model.config.spec, cache.get_seq_length(), "fp32", batch=found.sequences.shape[0]),
            )
        )
        return found.sequences

    type(model).generate = generate
    try:
        wrapped = harness.HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu", batch_size=3)
        assert scores(wrapped)["continue"]["exact_match,none"] == 1.0
    finally:
        del type(model).generate
    assert held
    assert all(found == wanted for found, wanted in held)
    assert isinstance(model.generation_config, GenerationConfig)
