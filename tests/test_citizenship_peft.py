"""PEFT: low-rank changes of the tied projections stay within the tie, before and after they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.integrations import peft as peft_integration
from transformers.utils.peft_utils import check_peft_version

from attention_strategies import POSITIONS
from model_strategies import GPT2, LLAMA, drawn_inputs, drawn_model, drawn_tokens
from twofold.cache import TiedCache
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.models import TwofoldPreTrainedModel, load_model
from twofold.models.quiet import without_bars
from twofold.spec import ModelSpec

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SPECS = {
    "tied": LLAMA,
    "pattern": GPT2,
    "stream": LLAMA.with_changes(positions=POSITIONS["stream"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"], num_key_value_heads=1),
    "one projection": GPT2.with_changes(tie="(Q=K=V)"),
    "combination": GPT2.with_changes(tie="V = Q - K"),
}


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    with without_bars():
        yield


def adapted(spec: ModelSpec, targets: Any = PROJECTIONS, *, std: float = 0.3) -> PeftModel:
    """A model with an adapter of rank 2 whose matrices are drawn, in float64: at first PEFT's change nothing."""
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(drawn_model(spec), settings).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def adapted_names(model: nn.Module) -> set[str]:
    return {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name
    }


def merged(model: PeftModel) -> TwofoldPreTrainedModel:
    return model.merge_and_unload()


@torch.no_grad()
def cache_of(model: nn.Module, tokens: Tensor) -> TiedCache:
    output = model(input_ids=tokens, use_cache=True)
    return output["cache" if "cache" in output else "past_key_values"]


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_names_of_the_projections():
    """A projection that the tie does not have has no adapter; the one that serves as key and value has one, and not two."""
    assert adapted_names(adapted(LLAMA)) == {*PROJECTIONS} - {"v_proj"}
    assert adapted_names(adapted(LLAMA, "all-linear")) == {*PROJECTIONS, "gate_proj"} - {"v_proj"}
    assert adapted_names(adapted(SPECS["one projection"], ["q_proj", "k_proj"])) == {"q_proj"}
    pattern = [name for name, _ in adapted(GPT2).named_parameters() if "v_proj.lora_A" in name]
    assert len(pattern) == 1
    assert ".layers.0." in pattern[0]
    with pytest.raises(ValueError, match="v_proj"):
        adapted(LLAMA, ["v_proj"])


def test_one_change_of_k_is_the_same_change_of_v():
    """Tied, one adapter does what two equal ones do untied, and its gradient is the sum of theirs."""
    untied_spec = LLAMA.with_changes(tie="(Q, K, V)", qk_norm=False)
    tied, untied = adapted(LLAMA.with_changes(qk_norm=False)), adapted(untied_spec)
    state = tied.state_dict()
    copied = {name: state[name.replace("v_proj", "k_proj")] for name in untied.state_dict()}
    untied.load_state_dict(copied)
    inputs = drawn_inputs(LLAMA)
    found, wanted = tied(**inputs), untied(**inputs)
    assert_near(found.logits, wanted.logits)
    found.loss.backward()
    wanted.loss.backward()
    gradients = {name: parameter.grad for name, parameter in untied.named_parameters() if parameter.grad is not None}
    for name, parameter in tied.named_parameters():
        if "k_proj.lora" in name:
            both = gradients[name] + gradients[name.replace("k_proj", "v_proj")]
            assert both.abs().max() > 1e-3
            assert_near(parameter.grad, both)


@pytest.mark.parametrize("name", SPECS)
def test_merging_keeps_the_tie(name: str):
    spec, tokens = SPECS[name], drawn_tokens(2, 7)
    model = adapted(spec)
    plain = drawn_model(spec)
    wanted = model(input_ids=tokens).logits
    assert (wanted - plain(tokens).logits).abs().max() > 0.1
    bytes_held = cache_bytes(spec, 7, "fp64", batch=2)
    before = cache_of(model, tokens)
    assert before.nbytes == bytes_held
    one = merged(model)
    assert type(one) is type(plain)
    assert one.state_dict().keys() == plain.state_dict().keys()
    assert one.config.spec == spec
    assert_near(one(tokens).logits, wanted)
    cache = cache_of(one, tokens)
    assert cache.nbytes == bytes_held
    assert [len(layer.streams) for layer in cache.layers] == [
        spec.tie.tie(index).cached_tensors + bool(spec.positions.key_extension_dim) for index in range(2)
    ]


@pytest.mark.parametrize("name", ["tied", "pattern", "stream"])
def test_generation_with_an_adapter(name: str):
    model, tokens = adapted(SPECS[name]), drawn_tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    found = model.generate(input_ids=tokens, **options)
    assert torch.equal(found, model.generate(input_ids=tokens, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(found, model.generate(input_ids=tokens, **options))
    assert torch.equal(found, merged(model).generate(tokens, **options))


def test_only_the_adapter_is_trained():
    model = adapted(LLAMA, std=0.1).train()
    inputs = drawn_inputs(LLAMA)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


def test_an_adapter_in_a_folder(tmp_path: Path):
    base = drawn_model(LLAMA)
    base.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", dtype=torch.float64)
    settings = LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, settings).double().eval()
    tokens = drawn_tokens(2, 7)
    wanted = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for again in (
        PeftModel.from_pretrained(load_model(tmp_path / "base", dtype=torch.float64), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64),
    ):
        assert_near(again(input_ids=tokens).logits, wanted)
    whole = merged(model)
    whole.save_pretrained(tmp_path / "whole")
    assert_near(load_model(tmp_path / "whole", dtype=torch.float64)(tokens).logits, wanted)


def test_transformers_own_adapters(tmp_path: Path):
    """``add_adapter`` of the model itself; what is saved is the adapter alone, and loads onto the base."""
    try:
        check_peft_version(peft_integration.MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"The installed Transformers wants another PEFT for its own adapters: {error}.")
    base, tokens = drawn_model(LLAMA), drawn_tokens(2, 7)
    plain = base(tokens).logits
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    base.double()
    wanted = base(tokens).logits
    assert (wanted - plain).abs().max() > 0.01
    base.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = drawn_model(LLAMA)
    again.load_adapter(str(tmp_path))
    again.double()
    torch.testing.assert_close(again(tokens).logits, wanted)


def test_prefix_tuning_is_refused():
    """It makes keys and values of its own and hands them over as a cache of two tensors, which is not what a tied layer reads."""
    model = get_peft_model(drawn_model(LLAMA).float(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(TwofoldError, match="keeps keys and values apart"):
        model(input_ids=drawn_tokens(1, 5))
