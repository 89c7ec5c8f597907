"""Models whose layers are elsewhere, or were put there by Accelerate: hooks before and after, one device or several, files in parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, hooks
from torch import Tensor, nn

from halving_models import MULTI_HEAD, cache_bytes, cache_of, gemma, randomized, tokens
from twofold.errors import TwofoldError
from twofold.existing import halve, is_halved, restore

NAMES = ("gemma", "gpt2", "llama")


def small(name: str) -> Any:
    return (gemma() if name == "gemma" else randomized(MULTI_HEAD[name]())).float()


def stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The layers and their name."""
    name = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    return name, model.get_submodule(name)


class Counting(hooks.ModelHook):  # type: ignore[misc]
    """Does nothing, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        del module
        self.calls += 1
        return args, kwargs


def attentions(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def said(model: Any) -> tuple[Tensor, int]:
    """A greedy answer and the bytes of its cache."""
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    answer = model.generate(tokens(2, 14), **asked)
    return answer.sequences, sum(cache_bytes(cache_of(answer)))


@pytest.mark.parametrize("order", ["hooks, halve, restore", "halve, hooks, restore", "hooks, halve, no hooks, restore"])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_stay_where_they_are(name: str, order: str):
    model = small(name)
    before, whole = said(model)
    counting: list[Counting] = []
    for step in order.split(", "):
        if step == "halve":
            halve(model)
        elif step == "restore":
            restore(model)
        elif step == "hooks":
            for attention in attentions(model):
                counting.append(Counting())
                hooks.add_hook_to_module(attention, counting[-1])
        else:
            hooks.remove_hook_from_module(model, recurse=True)
        calls = [one.calls for one in counting]
        answer, held = said(model)
        assert torch.equal(answer, before)
        assert (held < whole) == any(is_halved(part) for part in model.modules())
        has_hooks = step != "no hooks" and "no hooks" not in order.split(", ")[: order.split(", ").index(step)]
        assert all((one.calls > past) == has_hooks for one, past in zip(counting, calls, strict=True))
    assert not any(is_halved(part) for part in model.modules())


def test_a_forward_that_somebody_else_put_there_stays():
    model = small("llama")
    calls = []
    for attention in attentions(model):
        attention.forward = lambda *args, own=attention.forward, **kwargs: calls.append(1) or own(*args, **kwargs)
    halve(model)
    said(model)
    assert not calls
    restore(model)
    said(model)
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_layers_dispatched_one_by_one(name: str):
    """As device_map="auto" spreads a model over several devices, with hooks on every part; here all of them are the CPU."""
    model = small(name)
    before, whole = said(model)
    for _, part in model.named_modules():
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook("cpu", io_same_device=True), append=True)
    halve(model)
    after, half = said(model)
    assert torch.equal(before, after)
    assert half < whole
    copied = copy.deepcopy(model)
    restore(model)
    again, held = said(model)
    assert torch.equal(before, again)
    assert held == whole
    assert torch.equal(said(copied)[0], before)


@pytest.mark.filterwarnings("ignore:.*on a device type different:UserWarning")  # of Transformers 5.17
@pytest.mark.parametrize("offloaded", ["all", "disk", "one layer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_offloaded(name: str, offloaded: str, tmp_path: Path):
    model = small(name)
    where, layers = stack(model)
    before, _ = said(model)
    if offloaded == "all":
        cpu_offload(model, torch.device("cpu"))
    elif offloaded == "disk":
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        hooks.attach_align_device_hook(
            layers[1],
            torch.device("cpu"),
            offload=True,
            weights_map={k: v.clone() for k, v in layers[1].state_dict().items()},
        )
    with pytest.raises(
        TwofoldError, match=f"{'' if offloaded != 'one layer' else where + '.1'}.* is offloaded.*device_map"
    ) as caught:
        halve(model)
    assert str(caught.value).endswith(".")
    assert not any(is_halved(part) for part in model.modules())
    assert torch.equal(said(model)[0], before)


@pytest.mark.filterwarnings("ignore:.*on a device type different:UserWarning")  # of Transformers 5.17
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_offloaded_once_it_is_halved(name: str):
    model = small(name)
    before, _ = said(model)
    halve(model)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(TwofoldError, match=r"have been offloaded since.*\.$"):
        said(model)
    restore(model)
    assert torch.equal(said(model)[0], before)


def test_a_device_map_that_keeps_all_of_it(tmp_path: Path):
    for name in NAMES:
        model = small(name)
        before, whole = said(model)
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name, device_map={"": "cpu"}, dtype=torch.float32).eval()
        halve(loaded)
        after, half = said(loaded)
        assert torch.equal(before, after)
        assert half < whole
        dispatched = dispatch_model(model, {"": "cpu"}, force_hooks=True)
        halve(dispatched)
        assert torch.equal(said(dispatched)[0], before)
