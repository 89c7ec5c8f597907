"""``twofold halve``: tables, JSON, a text through both, and one sentence for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from typer.testing import CliRunner, Result

from halving_models import ENCODER_DECODER, MULTI_HEAD, gemma, randomized
from twofold.cli import app
from twofold.existing import halve, loading


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["halve", *map(str, arguments)], prog_name="twofold")


def told(*arguments: object) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def mistake(*arguments: object) -> str:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line


def folder(path: Path, model: nn.Module, *, tokenizer: bool = True) -> Path:
    saved: Any = model
    saved.save_pretrained(path)
    if tokenizer:
        signs = {chr(32 + index): index for index in range(95)} | {"?": 95}
        letters = Tokenizer(models.WordLevel(vocab=signs, unk_token="?"))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=" ").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("gemma"), gemma().float())


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("gpt2"), randomized(MULTI_HEAD["gpt2"]()).float(), tokenizer=False)


def test_gemma_is_told_layer_by_layer_and_at_lengths(gemma_folder: Path):
    done = invoke(gemma_folder, "--tokens", 100, "--tokens", 4000)
    assert done.exit_code == 0, done.output
    assert "one tensor is key and value" in done.stdout
    assert "64 → 32" in done.stdout
    values = told(gemma_folder, "--tokens", 100)
    kept = [layer["kept"] for layer in values["layers"]]
    assert kept == ["both", "both", "stream"] * 2
    assert values["cache_bytes"] == [
        {"tokens": 100, "before": 4 * (2 * 64 * 100 + 4 * 64 * 8), "after": 4 * (2 * 32 * 100 + 4 * 64 * 8)}
    ]


def test_the_layers_are_drawn(gemma_folder: Path, gpt2_folder: Path, tmp_path: Path):
    for home, words in (
        (gemma_folder, "2 of 6 layers of Gemma4ForCausalLM"),
        (gpt2_folder, "2 of 2 layers of GPT2LMHeadModel"),
    ):
        picture = tmp_path / "layers.svg"
        done = invoke(home, "--picture", picture, "--tokens", 100)
        assert done.exit_code == 0, done.output
        drawn = ET.fromstring(picture.read_text(encoding="utf-8"))
        assert words in drawn.attrib["aria-label"]
        bars = [bar for bar in drawn.iter("{http://www.w3.org/2000/svg}rect") if bar.attrib.get("class") == "dot"]
        assert len(bars) == {gemma_folder: 4 + 2 * 2, gpt2_folder: 2 * 2}[home] + 3  # and the legend
        assert ("rounding in the cache" in picture.read_text(encoding="utf-8")) == (home == gpt2_folder)


def test_a_text_goes_through_both(gemma_folder: Path):
    trial = told(gemma_folder, "--text", "the best of times", "--new-tokens", 9)["trial"]
    assert trial["same_tokens"] == trial["new_tokens"] >= 1
    assert trial["logit_error"] < 1e-5
    before, after = trial["cache_bytes"]
    assert before - after == 2 * 32 * 4 * trial["tokens"]
    said = f"the same {trial['new_tokens']} of {trial['new_tokens']} tokens"
    assert said in invoke(gemma_folder, "--text", "the best of times", "--new-tokens", 9).stdout


def test_a_text_goes_through_few_bits(gemma_folder: Path):
    asked = (gemma_folder, "--text", "the best of times, the worst", "--new-tokens", 9)
    trials = {bits: told(*asked, "--bits", bits)["trial"] for bits in (8, 4)}
    for bits, trial in trials.items():
        assert trial["bits"] == bits
        before, after = trial["cache_bytes"]
        # One head of 32 in two layers: codes, and a scale and a zero point; and the layers with windows, as they were.
        assert before - after == 2 * trial["tokens"] * (2 * 32 * 4 - 32 * bits // 8 - 2 * 4)
    assert 1e-5 < trials[8]["logit_error"] < trials[4]["logit_error"] / 4 < 0.5
    assert told(*asked)["trial"]["bits"] == 0
    assert "after, one tensor in 4 bits, measured" in " ".join(invoke(*asked, "--bits", 4).stdout.split())
    assert "give --text too" in mistake(gemma_folder, "--bits", 8)


def test_maps_are_counted_with_the_weights(gpt2_folder: Path, gemma_folder: Path):
    values = told(gpt2_folder)
    assert values["map_bytes"] == sum(layer["map_bytes"] for layer in values["layers"]) == 2 * 4 * (32 * 32 + 32)
    assert "add 8.25 KiB to the weights: as much as the cache saves with its first 33 tokens." in " ".join(
        invoke(gpt2_folder).stdout.split()
    )
    assert told(gemma_folder)["map_bytes"] == 0
    assert "Maps" not in invoke(gemma_folder).stdout


def test_a_multi_head_model_is_told_with_its_errors(gpt2_folder: Path):
    done = invoke(gpt2_folder)
    assert " ".join(done.stdout.splitlines()[1].split()) == "layers its cache holds floats per token error arithmetic"
    assert "follow" in done.stdout
    layers = told(gpt2_folder, "--keep", "keys", "--dtype", "bf16", "--max-error", 1)["layers"]
    assert {layer["kept"] for layer in layers} == {"keys"}
    for layer in layers:
        assert 0.5 < layer["measured_error"] / layer["predicted_error"] < 2
        assert layer["condition"] > 1


def test_a_decoder_that_reads_an_encoder_is_told_with_both_attentions(tmp_path: Path):
    home = folder(tmp_path, randomized(ENCODER_DECODER["t5"]()).float())
    layers = told(home)["layers"]
    assert [layer["name"].rsplit(".", 1)[1] for layer in layers] == ["SelfAttention", "EncDecAttention"] * 2
    assert {layer["kept"] for layer in layers} <= {"keys", "values"}
    assert "does not go on with a text" in mistake(home, "--text", "abc")
    thin = folder(tmp_path / "thin", randomized(ENCODER_DECODER["t5"](d_kv=4)).float())
    assert "make 16 floats of 32" in mistake(thin)


def test_mistakes(tmp_path: Path, gpt2_folder: Path):
    assert "--tokens" in invoke(gpt2_folder, "--tokens", 0, "--picture", tmp_path / "none.svg").stderr
    assert "cannot be written to" in mistake(gpt2_folder, "--picture", tmp_path / "nowhere" / "layers.svg")
    assert "is no folder" in mistake(tmp_path / "nothing")
    assert "no tokenizer" in mistake(gpt2_folder, "--text", "abc")
    assert "max_error" in mistake(gpt2_folder, "--max-error", 0)
    short = folder(tmp_path / "short", randomized(MULTI_HEAD["gpt2"]()).float())
    assert "shorter than two tokens" in mistake(short, "--text", "a")
    assert "has 120 tokens, 9 more are asked for, and GPT2LMHeadModel reads 128 at most" in mistake(
        short, "--text", "a" * 120, "--new-tokens", 9
    )
    assert invoke(short, "--text", "a" * 119, "--new-tokens", 9).exit_code == 0
    model: Any = randomized(MULTI_HEAD["gpt2"]()).float()
    model.resize_token_embeddings(40)
    assert "makes token 65 of the text, and GPT2LMHeadModel knows 40" in mistake(
        folder(tmp_path / "other", model), "--text", "aaa"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    assert "holds no model.safetensors" in mistake(empty)
    torch.save({}, empty / "pytorch_model.bin")
    assert "pickle" in mistake(empty)
    save_file({"x": torch.zeros(2)}, empty / "model.safetensors")
    whole = (empty / "model.safetensors").read_bytes()
    (empty / "model.safetensors").write_bytes(whole[:-3])
    assert "model.safetensors is not a whole safetensors file" in mistake(empty)
    (empty / "model.safetensors").write_bytes(whole)
    assert "more weights, which its config asks for" in mistake(empty)
    (empty / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["Invented"]}))
    assert "names no architecture" in mistake(empty)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of many files and an index."""
    home = tmp_path_factory.mktemp("sharded")
    model: Any = randomized(MULTI_HEAD["gpt2"]()).float()
    model.save_pretrained(home, max_shard_size="20KB")
    assert len([*home.glob("model-*.safetensors")]) > 3
    assert not (home / "model.safetensors").exists()
    return home


def test_a_model_of_many_files(sharded: Path, gpt2_folder: Path):
    one, many = (told(home, "--tokens", 100) for home in (gpt2_folder, sharded))
    assert many["layers"] == one["layers"]
    text = torch.arange(3, 20)[None]
    models_of = [loading.load(str(home)) for home in (gpt2_folder, sharded)]
    assert torch.equal(*(model(text).logits for model in models_of))
    halve(models_of[1])
    assert torch.allclose(*(model(text).logits for model in models_of), atol=1e-3)


@pytest.mark.parametrize("cut", [1, 5, "half", "all but 4", "all"])
def test_one_of_many_files_is_truncated(sharded: Path, cut: int | str, tmp_path: Path):
    home = Path(shutil.copytree(sharded, tmp_path / "copy"))
    part = sorted(home.glob("model-*.safetensors"))[1]
    whole = part.read_bytes()
    length = (
        {"half": len(whole) // 2, "all but 4": 4, "all": 0}.get(str(cut)) if isinstance(cut, str) else len(whole) - cut
    )
    part.write_bytes(whole[:length])
    assert f"{part.name} is not a whole safetensors file" in mistake(home)


def test_one_of_many_files_is_something_else(sharded: Path, tmp_path: Path):
    home = Path(shutil.copytree(sharded, tmp_path / "copy"))
    part = sorted(home.glob("model-*.safetensors"))[1]
    held = load_file(part)
    part.unlink()
    assert f"lacks {part.name}, which its index names" in mistake(home)
    torch.save(held, home / "part.bin")
    index = home / "model.safetensors.index.json"
    said = index.read_text()
    index.write_text(said.replace(part.name, "part.bin"))
    assert "part.bin is not a whole safetensors file" in mistake(home)  # a pickle that an index names is not opened
    index.write_text(said)
    name = min(held)
    save_file({key: value for key, value in held.items() if key != name}, part, metadata={"format": "pt"})
    assert f"lacks {name}, which its config asks for" in mistake(home)
    index.write_text("{")
    assert "cannot be read as JSON" in mistake(home)
