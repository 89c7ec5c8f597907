"""Tensor parallelism: two processes with half of the heads each are one model, and each caches the streams of its own heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from attention_strategies import POSITIONS
from citizenship_parallel_worker import facts
from model_strategies import GPT2, IMAGE, LLAMA, SET, VOCABULARY, drawn_model
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.models import load_model
from twofold.models.parallel import check_tensor_parallel, tensor_parallel_plan
from twofold.models.quiet import without_bars
from twofold.spec import ModelSpec

# Sizes that two devices can share, odd ones elsewhere.
EVEN_GPT2 = GPT2.with_changes(intermediate_size=38)
EVEN_LLAMA = LLAMA.with_changes(intermediate_size=38)
SPLIT: dict[str, ModelSpec] = {
    "llama": EVEN_LLAMA,
    "pattern": EVEN_GPT2,
    "untied": EVEN_LLAMA.with_changes(tie="(Q, K, V)", tie_word_embeddings=False),
    "one projection": EVEN_GPT2.with_changes(tie="(Q=K=V)"),
    "combination": EVEN_GPT2.with_changes(tie="V = Q - K"),
    "stream": EVEN_LLAMA.with_changes(positions=POSITIONS["stream"], window_tokens=(0, 4)),
}
REFUSED: dict[str, tuple[ModelSpec, str]] = {
    "one KV head": (EVEN_LLAMA.with_changes(num_key_value_heads=1), "1 KV heads cannot be split over 2 devices"),
    "odd heads": (
        EVEN_GPT2.with_changes(num_attention_heads=3, num_key_value_heads=3),
        "3 query heads cannot be split",
    ),
    "odd MLP": (LLAMA, "19 columns of the MLP cannot be split over 2 devices"),
    "shared": (
        EVEN_LLAMA.with_changes(positions=POSITIONS["shared"]),
        "cannot be split over 2 devices: all of its heads read one shared rotary key",
    ),
    "bias": (EVEN_LLAMA.with_changes(positions=POSITIONS["bias"]), "relative biases of all of its heads are one table"),
}


@pytest.mark.parametrize("name", SPLIT)
def test_the_plan_names_what_the_model_has(name: str):
    model = drawn_model(SPLIT[name])
    found = {module.replace(".0.", ".*.").replace(".1.", ".*.") for module, _ in model.named_modules()}
    assert model.tp_plan
    assert set(model.tp_plan) <= found
    split = {name.split(".")[-1] for name, style in model.tp_plan.items() if style in ("colwise", "rowwise")}
    linear = {
        name.split(".")[-1] for name, module in model.trunk.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert split == linear
    for spec in (SET.with_changes(intermediate_size=38), IMAGE.with_changes(intermediate_size=38)):
        assert tensor_parallel_plan(spec)


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_cannot_be_split_are_refused(name: str):
    spec, says = REFUSED[name]
    with pytest.raises(TwofoldError, match=says):
        check_tensor_parallel(spec, 2)
    check_tensor_parallel(EVEN_LLAMA, 2)
    with pytest.raises(
        TwofoldError, match=r"4 devices: use a tp_size that divides 4 query heads, 2 KV heads and 38 columns"
    ):
        check_tensor_parallel(EVEN_LLAMA, 4)


def test_positions_of_sets_belong_to_all_heads():
    spec = SET.with_changes(tie="(Q=K, V)+")
    assert not tensor_parallel_plan(spec)
    with pytest.raises(TwofoldError, match=r"2-D positions of '\+' are added to all of its heads"):
        check_tensor_parallel(spec, 2)


def test_the_plan_is_of_the_process_and_not_of_the_checkpoint(tmp_path: Path):
    with without_bars():
        drawn_model(EVEN_LLAMA).save_pretrained(tmp_path)
    assert "plan" not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).spec == EVEN_LLAMA


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_processes_are_one_model(tmp_path: Path):
    models = {name: drawn_model(spec, std=0.3) for name, spec in SPLIT.items()}
    with without_bars():
        for name, model in models.items():
            model.save_pretrained(tmp_path / "models" / name)
        for name, (spec, _) in REFUSED.items():
            drawn_model(spec).save_pretrained(tmp_path / "models" / name)
    worker = Path(__file__).with_name("citizenship_parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(tmp_path / "models")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name, (_, says) in REFUSED.items():
        assert all(says in rank[name]["refused"] for rank in ranks)
    for name, model in models.items():
        wanted = facts(model)
        for rank in ranks:
            compare(rank[name], wanted, model)
        saved = load_model(tmp_path / "saved" / name, dtype=torch.float64)
        for key, tensor in model.state_dict().items():
            assert torch.equal(saved.state_dict()[key], tensor), key


def compare(found: dict[str, Any], wanted: dict[str, Any], model: torch.nn.Module) -> None:
    spec = model.config.spec
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(wanted["logits"]), rtol=1e-9, atol=1e-9)
    assert found["generated"] == wanted["generated"]
    assert len(set(wanted["generated"]["dynamic"][0])) > 3
    assert wanted["cache_bytes"] == cache_bytes(spec, 7, "fp64", batch=2)
    assert 2 * found["cache_bytes"] == wanted["cache_bytes"]
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-9)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        torch.testing.assert_close(
            torch.tensor(found["gradients"][name]), torch.tensor(gradient), rtol=1e-7, atol=1e-9, msg=name
        )
    whole = sum(parameter.numel() for parameter in model.parameters())
    repeated = (1 if spec.tie_word_embeddings else 2) * VOCABULARY * spec.hidden_size + 100 * spec.hidden_size
    assert found["parameters_here"] < (whole - repeated) // 2 + repeated + 20 * spec.hidden_size
