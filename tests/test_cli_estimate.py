"""``twofold estimate``: presets, models of ours, any Transformers model; tables, JSON, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from engine_models import FAMILIES, LLAMA, folder_of, measured_bytes, random_model
from twofold.cli import app
from twofold.cost import cache_bytes, parameters
from twofold.models import TwofoldConfig, build_model
from twofold.presets import PRESETS
from twofold.task_spec import TaskSpec
from twofold.training.spec import RunSpec, TrainingSpec

TINY = PRESETS["tiny"].with_changes(
    hidden_size=24, num_hidden_layers=2, head_dim=6, intermediate_size=20, tie="(Q, K=V)"
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], prog_name="twofold")


def told(*arguments: object) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def mistake(*arguments: object) -> str:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line


def test_a_preset_is_a_table_of_ties_and_quantizations():
    done = invoke("paper-300m", "--tokens", 2048, "--batch", 64)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "305.5M parameters; 64 sequences of 2,048 tokens, bf16" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "%" in line or "same" in line]
    assert [row[-5:-3] for row in rows if "bf16" in row] == [["same", "10.6"], ["-50.0%", "5.53"]]
    assert ["codes" in row for row in rows] == [False, True, False, False] * 2
    assert len(rows) == 8
    assert "longest" not in done.stdout


def test_memory_adds_what_fits():
    done = invoke("paper-300m", "--memory", "24GiB", "--batch", 8)
    assert "2,048 (all)" in done.stdout
    assert "32,768 tokens are more than the 2,048 positions" in " ".join(done.stdout.split())
    holding = told("small", "--memory", "24GB", "--batch", 8, "--tokens", 1000)["holdings"][0]
    model = PRESETS["small"]
    room = 24 * 10**9 - 2 * parameters(model)
    longest = holding["longest_context"]
    assert cache_bytes(model, longest, batch=8) <= room < cache_bytes(model, longest + 1, batch=8)
    assert holding["largest_batch"] == room // cache_bytes(model, 1000)


def test_ties_may_be_chosen():
    names = [row["name"] for row in told("tiny", "--tie", "V = Q - K", "--tie", "(Q=K=V)")["holdings"]]
    assert list(dict.fromkeys(names)) == ["V = Q - K", "(Q=K=V)"]


def test_a_model_of_ours_is_found_in_each_of_its_places(tmp_path: Path):
    build_model(TINY, seed=0).save_pretrained(tmp_path / "model")
    wanted = told(tmp_path / "model")
    assert wanted["parameters"] == parameters(TINY)
    assert wanted["holdings"][0]["name"] == "(Q, K=V)"
    run = RunSpec(
        task=TaskSpec(name="text"), model=TINY, training=TrainingSpec(steps=1, batch_size=1, learning_rate=1e-3), seed=0
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(run.to_dict()))
    for place in (tmp_path / "model" / "config.json", tmp_path / "run"):
        assert told(place)["holdings"] == wanted["holdings"]


def test_a_configuration_written_by_hand_has_the_models_own_defaults(tmp_path: Path):
    values = {"model_type": "twofold", "tie": "(Q, K=V)", "hidden_size": 24, "num_attention_heads": 3, "vocab_size": 67}
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = TwofoldConfig(**{name: value for name, value in values.items() if name != "model_type"}).spec
    assert told(tmp_path)["holdings"][0]["cache_bytes"] == cache_bytes(spec, 32768)


@pytest.mark.parametrize("name", ["llama GQA", "gpt2", "gemma 4 K=V", "falcon MQA"])
def test_any_transformers_model_is_counted_as_it_is_stored(name: str, tmp_path: Path):
    folder, model = folder_of(FAMILIES[name], tmp_path), random_model(FAMILIES[name])
    estimate = told(folder, "--tokens", 9, "--batch", 2, "--dtype", "fp32")
    first = estimate["holdings"][0]
    assert (first["name"], first["bits"]) == ("as stored", 0)
    assert first["cache_bytes"] == measured_bytes(model, batch=2, prompt=7, further=2)
    assert estimate["parameters"] * 4 == first["weight_bytes"]
    assert estimate["model"] == type(model).__name__
    assert told(folder / "config.json", "--tokens", 9, "--batch", 2, "--dtype", "fp32") == estimate


def test_weights_beside_a_configuration_are_what_is_counted(tmp_path: Path):
    model = random_model(FAMILIES["llama"], torch.bfloat16)
    model.save_pretrained(tmp_path)
    floats = sum(parameter.numel() for parameter in model.parameters())
    assert told(tmp_path)["holdings"][0]["weight_bytes"] == 2 * floats
    assert told(tmp_path, "--dtype", "fp32")["holdings"][0]["weight_bytes"] == 4 * floats


def test_a_table_of_gemma_4_says_what_its_rows_are(tmp_path: Path):
    done = invoke(folder_of(FAMILIES["gemma 4 K=V"], tmp_path), "--tokens", 20, "--memory", "1MB")
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "As stored: by Transformers' own cache." in text
    assert "One tensor where K=V: the same model; keys are turned when they are read." in text
    assert "Just after a prompt of 20 tokens is read at once, the windows still hold all of it" in text


def test_mistakes_are_sentences(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    damaged, other, unknown, torn = (tmp_path / name for name in ("damaged.json", "other.json", "unknown.json", "torn"))
    damaged.write_text('{"model_type": "llama"')
    other.write_text('{"name": "llama"}')
    unknown.write_text('{"model_type": "llama9000"}')
    torn.mkdir()
    (torn / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama"}))
    (torn / "model.safetensors").write_bytes(b"\x40" + b"\0" * 7 + b"{")
    unfitting = tmp_path / "unfitting.json"
    unfitting.write_text(json.dumps({**LLAMA, "model_type": "llama", "hidden_size": "wide"}))
    hidden = tmp_path / "hidden"
    TwofoldConfig(architecture="token_classification", num_labels=2).save_pretrained(hidden)
    for arguments, part in (
        (["tny"], "did you mean tiny?"),
        ([tmp_path / "absent"], "There is no"),
        ([tmp_path / "empty"], "holds no config.json"),
        ([damaged], "cannot be read as the JSON"),
        ([torn / "model.safetensors"], "cannot be read as the JSON"),
        ([other], "does not say its model_type"),
        ([unknown], "knows no model type 'llama9000'"),
        ([unfitting], "it describes no llama model"),
        ([torn], "damaged"),
        ([hidden], "only a causal_lm keeps a cache"),
        (["tiny", "--memory", "24"], "24GiB"),
        (["tiny", "--dtype", "int3"], "dtype"),
        (["tiny", "--memory", "0B"], "no memory"),
        ([folder_of(FAMILIES["gpt2"], tmp_path / "gpt2"), "--tie", "(Q, K=V)"], "leave --tie out"),
    ):
        assert part in mistake(*arguments)


def test_a_preset_needs_no_torch():
    script = (
        "import sys; sys.argv = ['twofold', 'estimate', 'tiny', '--memory', '1GiB']; import twofold.cli\n"
        "try: twofold.cli.main()\nexcept SystemExit: pass\n"
        "sys.exit(','.join({'torch', 'transformers', 'pandas', 'numpy'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
