"""Models in folders: saved and loaded bit for bit, and a folder that is damaged says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.logging import disable_progress_bar

from attention_strategies import POSITIONS
from model_strategies import FAMILIES, GPT2, IMAGE, LLAMA, SET, drawn_inputs, drawn_model, drawn_tokens
from twofold.errors import TwofoldError
from twofold.models import TwofoldForCausalLM, TwofoldPreTrainedModel, load_model
from twofold.spec import ModelSpec

AUTO = {
    "causal_lm": AutoModelForCausalLM,
    "token_classification": AutoModelForTokenClassification,
    "image_classification": AutoModelForImageClassification,
}
SAVED = {
    **FAMILIES,
    "untied": GPT2.with_changes(tie_word_embeddings=False),
    "bias": LLAMA.with_changes(positions=POSITIONS["bias"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"]),
    "plus": SET.with_changes(tie="(Q=K, V)+"),
}


@pytest.fixture(autouse=True, scope="module")
def _no_bars() -> None:
    disable_progress_bar()


def saved(spec: ModelSpec, folder: Path, **options: object) -> TwofoldPreTrainedModel:
    model = drawn_model(spec).float()
    model.save_pretrained(folder, **options)
    return model


def assert_same(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_is_loaded_bit_for_bit(name: str, tmp_path: Path):
    spec = SAVED[name]
    model = saved(spec, tmp_path)
    for load in (load_model, AUTO[spec.architecture].from_pretrained):
        again = load(tmp_path)
        assert type(again) is type(model)
        assert not again.training
        assert_same(again, model)
        assert again.config.spec == spec
        inputs = drawn_inputs(spec, dtype=torch.float32)
        assert torch.equal(again(**inputs).loss, model(**inputs).loss)


def test_a_matrix_that_is_used_twice_is_saved_once(tmp_path: Path):
    saved(GPT2, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.embedding.tokens.weight
    again.resize_token_embeddings(41, mean_resizing=False)
    again.save_pretrained(tmp_path / "larger")
    larger = load_model(tmp_path / "larger")
    assert larger.lm_head.weight is larger.embedding.tokens.weight
    assert larger.config.spec.vocab_size == 41
    assert_same(larger, again)


def test_weights_in_several_files(tmp_path: Path):
    model = saved(GPT2, tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load_model(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(dtype: torch.dtype, tmp_path: Path):
    model = saved(LLAMA, tmp_path)
    again = load_model(tmp_path, dtype=dtype)
    assert again.dtype == dtype
    assert_same(again, model.to(dtype))
    assert again.generate(drawn_tokens(1, 3), max_new_tokens=3, do_sample=False).shape == (1, 6)
    again.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again", dtype="auto").dtype == dtype


def test_a_device_map(tmp_path: Path):
    model = saved(GPT2, tmp_path)
    assert_same(load_model(tmp_path, device_map="cpu"), model)
    split = load_model(tmp_path, device_map={"embedding": "cpu", "lm_head": "cpu", "trunk": "cpu"})
    tokens = drawn_tokens(2, 5)
    assert torch.equal(split(tokens).logits, model(tokens).logits)


def test_a_backend_is_of_the_process_and_not_of_the_checkpoint(tmp_path: Path):
    saved(GPT2, tmp_path)
    again = load_model(tmp_path, backend="reference")
    assert {layer.attention.backend for layer in again.trunk.layers} == {"reference"}
    assert "backend" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(TwofoldError, match="backend 'fast'"):
        load_model(tmp_path, backend="fast")


def test_loading_draws_nothing_that_stays(tmp_path: Path):
    """Two processes with other random states load the same model."""
    saved(GPT2, tmp_path)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(TwofoldForCausalLM.from_pretrained(tmp_path))
    assert_same(*made)


# What can be wrong with a folder


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return save


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM = "trunk.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "half a config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "two'),
        "cannot be read as JSON",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no fields"),
    "another model": (change_config(model_type="gpt2"), "is of the model type 'gpt2', not of 'twofold'"),
    "another architecture": (
        change_config(architecture="bert"),
        "config.json describes no model. architecture is 'bert'",
    ),
    "another tie": (change_config(tie="(Q, K=V)"), r"hold trunk.layers.0.attention.v_proj.* does not ask for"),
    "a bad tie": (change_config(tie="(Q, K"), "bracket"),
    "another width": (change_config(hidden_size=16), r"has the shape \[.*12.*\] in the weights .* asks for \[.*16.*\]"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights .* holds no model.safetensors"),
    "truncated": (truncate, "not a whole safetensors file .* truncated or damaged"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle, which can run any code"),
    "less": (change_weights(lambda state: state.pop(NORM)), f"lack {NORM}, which config.json asks for"),
    "more": (
        change_weights(lambda state: state.update(extra=torch.zeros(1))),
        "hold extra, which config.json does not",
    ),
    "other shapes": (
        change_weights(lambda state: state.update({NORM: torch.zeros(3)})),
        rf"{NORM} has the shape \[3\] in the weights .* but config.json asks for \[12\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(damage: str, tmp_path: Path):
    saved(GPT2, tmp_path)
    load_model(tmp_path)
    harm, says = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(TwofoldError, match=f"(?s){says}") as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_part_is_missing(tmp_path: Path):
    saved(GPT2, tmp_path, max_shard_size="5KB")
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    part.unlink()
    with pytest.raises(TwofoldError, match=f"lacks {part.name}, which its index names"):
        load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(TwofoldError, match=r"index.json names no files: the checkpoint is damaged"):
        load_model(tmp_path)


def test_there_is_no_folder(tmp_path: Path):
    with pytest.raises(TwofoldError, match="nowhere: it is not a folder"):
        load_model(tmp_path / "nowhere")


def test_each_architecture_is_loaded_as_itself(tmp_path: Path):
    for spec in (GPT2, SET, IMAGE):
        model = saved(spec, tmp_path / spec.architecture)
        assert type(load_model(tmp_path / spec.architecture)) is type(model)
