"""Transformers' ``Trainer``: it trains a tied model, counts what is scored, goes on from its checkpoints, and what it saves is a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from model_strategies import FAMILIES, GPT2, LLAMA, drawn_inputs
from twofold.models import TwofoldForCausalLM, TwofoldPreTrainedModel, build_model, load_model
from twofold.models.quiet import without_bars
from twofold.spec import ModelSpec

# PEFT asks a model for Transformers' old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH = 9
RECOMPUTES = next(  # by whichever name the installed Transformers has for it
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with without_bars():
        yield


def texts(count: int = 16, *, side: str = "right") -> list[dict[str, Tensor]]:
    """Texts of 3 to 9 tokens that count up, padded; every text has another number of scored tokens than its neighbours."""
    rows = []
    for index in range(count):
        length = 3 + (5 * index) % 7
        tokens, mask, labels = (torch.full((LENGTH,), fill) for fill in (0, 0, -100))
        place = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        tokens[place] = (torch.arange(length) + 3 * index) % 37
        mask[place], labels[place] = 1, tokens[place]
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return rows


def trainer(
    model: torch.nn.Module, folder: Path, rows: Sequence[Any], *, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 8, "logging_steps": 1, "save_strategy": "no",
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(settings | options))
    return kind(model=model, args=arguments, train_dataset=list(rows))


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def small(spec: ModelSpec = LLAMA) -> TwofoldPreTrainedModel:
    return build_model(spec, seed=0)


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


def test_the_loss_falls_and_what_is_saved_is_the_model(tmp_path: Path):
    of = trainer(small(), tmp_path, texts(), max_steps=40)
    of.train()
    found = losses(of)
    assert len(found) == 40
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    of.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved")
    tokens = texts(1)[0]["input_ids"][None]
    assert torch.equal(again(tokens).logits, of.model.eval()(tokens).logits)
    assert "`(Q, K=V)`" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_trains(family: str, tmp_path: Path):
    inputs = drawn_inputs(FAMILIES[family], dtype=torch.float32, batch=4)
    rows = [{name: tensor[index] for name, tensor in inputs.items()} for index in range(4)]
    of = trainer(small(FAMILIES[family]), tmp_path, rows, max_steps=25)
    of.train()
    assert losses(of)[-1] < 0.8 * losses(of)[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_are_accumulated_as_if_the_batch_were_one(side: str, tmp_path: Path):
    """Texts of different lengths: the mean is over all tokens that are scored, and not over batches of them."""
    runs = {}
    for name, batch in (("whole", 4), ("parts", 1)):
        of = trainer(
            small(),
            tmp_path,
            texts(side=side),
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
        )
        of.train()
        runs[name] = of
    assert difference(runs["whole"].model, runs["parts"].model) < 1e-5
    assert losses(runs["parts"]) == pytest.approx(losses(runs["whole"]), abs=2e-4)

    class Blind(Trainer):
        """Does not tell the model how many tokens are scored."""

        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
            return model(**inputs).loss / self.current_gradient_accumulation_steps

    blind = trainer(
        small(),
        tmp_path,
        texts(side=side),
        kind=Blind,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    blind.train()
    assert difference(runs["whole"].model, blind.model) > 1e-4


def test_the_loss_that_is_told_is_the_mean_over_the_tokens_that_are_scored(tmp_path: Path):
    rows = texts(4)
    of = trainer(small(), tmp_path, rows, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    of.train()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert losses(of) == pytest.approx([small()(**batch).loss.item()], abs=2e-4)


def test_layers_may_be_computed_again(tmp_path: Path):
    runs = []
    for recompute in (True, False):
        of = trainer(small(), tmp_path, texts(), max_steps=3, **{RECOMPUTES: recompute})
        of.train()
        runs.append(of)
    assert any(layer.gradient_checkpointing for layer in runs[0].model.trunk.layers)
    assert difference(runs[0].model, runs[1].model) < 1e-6


def test_training_goes_on_from_a_checkpoint(tmp_path: Path):
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = trainer(small(), tmp_path / "whole", texts(), **options)
    whole.train()
    resumed = trainer(build_model(LLAMA, seed=1), tmp_path / "resumed", texts(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert difference(whole.model, resumed.model) == 0.0
    assert losses(resumed) == losses(whole)
    from_folder = load_model(tmp_path / "whole" / "checkpoint-6")
    assert difference(whole.model, from_folder) == 0.0


def test_it_evaluates_and_predicts(tmp_path: Path):
    """Without labels a cache is made, which must not be gathered among the predictions."""
    of = trainer(small(), tmp_path, texts())
    rows = texts(5)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model = of.model.eval()
    assert of.evaluate(rows)["eval_loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    predictions = torch.from_numpy(of.predict(unlabelled).predictions)
    torch.testing.assert_close(predictions, model(batch["input_ids"]).logits.detach(), rtol=1e-5, atol=1e-5)


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path: Path):
    """Transformers shifts them for the language models that it knows by name, as it knows ours."""
    of = trainer(small(), tmp_path, texts(), label_smoothing_factor=0.2)
    rows = texts(4)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    logits = of.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.2
    )
    assert of.compute_loss(of.model, dict(batch)).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_an_adapter_is_trained_and_saved_alone(tmp_path: Path):
    base = small()
    settings = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    of = trainer(
        get_peft_model(base, settings),
        tmp_path,
        texts(),
        max_steps=20,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=20,
    )
    of.train()
    assert losses(of)[-1] < losses(of)[0]
    checkpoint = tmp_path / "checkpoint-20"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    again = PeftModel.from_pretrained(small(), checkpoint).eval()
    tokens = texts(1)[0]["input_ids"][None]
    torch.testing.assert_close(again(input_ids=tokens).logits, of.model.eval()(input_ids=tokens).logits)


def test_patterned_models_train_too(tmp_path: Path):
    of = trainer(small(GPT2.with_changes(window_tokens=(3, 0), dropout=0.1)), tmp_path, texts(), max_steps=10)
    of.train()
    assert losses(of)[-1] < losses(of)[0]
    assert isinstance(of.model, TwofoldForCausalLM)
