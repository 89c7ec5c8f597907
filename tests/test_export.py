"""Decoders as ONNX files: names, logits, bytes of the cache, generation, the example without PyTorch, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner

from attention_strategies import POSITIONS
from model_strategies import GPT2, SET, VOCABULARY, decoders, drawn_model, drawn_tokens
from twofold.cli import app
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.export import OnnxDecoder, Sampling, export_onnx, onnx_file
from twofold.export import decoder as onnx_decoder
from twofold.models import TwofoldForCausalLM, build_model
from twofold.positions import LearnedPositions
from twofold.spec import LLAMA_BLOCK, ModelSpec

ROOT = Path(__file__).parent.parent
# Of the largest logit. The file computes in float32, what it is compared with in float64.
TOLERANCE = 2e-5
ONE_LAYER = GPT2.with_changes(tie="(Q, K=V)", num_hidden_layers=1)
SPECS = {
    "rotary": ONE_LAYER.with_changes(
        tie="2V = -3K", positions=POSITIONS["proportional"], num_attention_heads=6, qk_norm=True, **LLAMA_BLOCK
    ),
    "shared": GPT2.with_changes(positions=POSITIONS["shared"], window_tokens=(3, 0)),
    "stream": ONE_LAYER.with_changes(positions=POSITIONS["partial stream"], qk_norm=True),
    "three": ONE_LAYER.with_changes(tie="(Q, K, V)"),
    "one": ONE_LAYER,
}
CHUNKS = {"whole": [9], "token by token": [1] * 9, "chunks": [2, 1, 5, 1]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model, exported; each is traced when it is first asked for."""
    return Exported(tmp_path_factory.mktemp("exported"))


class Exported(dict[str, Path]):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        export_onnx(model_of(name), self.root / name, max_tokens=200)
        self[name] = self.root / name
        return self[name]


def model_of(name: str, seed: int = 0) -> TwofoldForCausalLM:
    return drawn_model(SPECS[name], seed, std=0.3)


def decoder_of(folder: Path) -> OnnxDecoder:
    return OnnxDecoder(folder, threads=1)


def padded(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask that leaves text 0 whole and pads the others on the left."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : row + 1] = 0
    return drawn_tokens(batch, tokens), mask


def differs(model: TwofoldForCausalLM, decoder: OnnxDecoder, batch: int, chunks: list[int]) -> float:
    """The largest difference of a logit, as a share of the largest; the cache's bytes are checked on the way."""
    tokens, mask = padded(batch, sum(chunks))
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask, use_cache=False).logits
    decoder.reset()
    assert decoder.nbytes == 0
    found = []
    for count in chunks:
        start, end = decoder.tokens_seen, decoder.tokens_seen + count
        found.append(decoder(tokens[:, start:end].numpy(), mask[:, :end].numpy()))
        assert decoder.tokens_seen == end
        assert decoder.nbytes == cache_bytes(model.config.spec, end, "fp32", batch)
    difference = (torch.from_numpy(np.concatenate(found, axis=1)) - wanted)[mask.bool()].abs().max()
    return float(difference / wanted.abs().max())


# The file


def test_the_names_are_optimums_and_the_streams_own(folders: dict[str, Path]):
    session = onnxruntime.InferenceSession(folders["shared"] / "model.onnx")
    window, past, total = "past_window_3_length", "past_sequence_length", "past_sequence_length + sequence_length"
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        "past_key_values.0.key": ["batch_size", 2, window, 8],
        "past_key_values.0.value": ["batch_size", 2, window, 8],
        "past_key_values.0.shared_key": ["batch_size", 1, window, 6],
        "past_key_values.1.stream": ["batch_size", 2, past, 8],
        "past_key_values.1.shared_key": ["batch_size", 1, past, 6],
    }
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "logits": ["batch_size", "sequence_length", VOCABULARY],
        "present.0.key": ["batch_size", 2, "present_window_3_length", 8],
        "present.0.value": ["batch_size", 2, "present_window_3_length", 8],
        "present.0.shared_key": ["batch_size", 1, "present_window_3_length", 6],
        "present.1.stream": ["batch_size", 2, total, 8],
        "present.1.shared_key": ["batch_size", 1, total, 6],
    }


def test_one_cached_tensor_per_layer_where_the_value_is_the_key(folders: dict[str, Path]):
    for name in ("rotary", "stream", "one"):
        session = onnxruntime.InferenceSession(folders[name] / "model.onnx")
        cached = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
        assert cached == [f"past_key_values.{layer}.stream" for layer in range(SPECS[name].num_hidden_layers)]


def test_the_cache_of_one_stream_is_half_of_its_peers(folders: dict[str, Path]):
    """The same heads; the bytes are those that the two files are fed with."""
    fed = {}
    for name in ("one", "three"):
        decoder = decoder_of(folders[name])
        decoder(drawn_tokens(2, 7).numpy())
        fed[name] = sum(value.numpy().nbytes for value in decoder._past.values())
        assert fed[name] == decoder.nbytes == cache_bytes(SPECS[name], 7, "fp32", 2)
    assert 2 * fed["one"] == fed["three"]


def test_the_folder_says_what_the_tie_is_and_what_it_costs(folders: dict[str, Path]):
    folder = folders["shared"]
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "cache.json"}
    assert json.loads((folder / "config.json").read_text())["tie"] == "(Q, K, V) | (Q, K=V)"
    told = json.loads((folder / "cache.json").read_text())
    assert told["bytes_per_token"] == sum(layer["bytes_per_token"] for layer in told["layers"])
    assert told["bytes_per_token"] == cache_bytes(SPECS["shared"], 1, "fp32")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tensors = [tensor for layer in told["layers"] for tensor in layer["tensors"]]
    assert [tensor["input"] for tensor in tensors] == [value.name for value in session.get_inputs()[2:]]
    assert [tensor["output"] for tensor in tensors] == [value.name for value in session.get_outputs()[1:]]
    assert [(tensor["heads"], tensor["dim"]) for tensor in tensors] == [
        (value.shape[1], value.shape[3]) for value in session.get_inputs()[2:]
    ]


def test_the_file_knows_nothing_of_the_machine_that_wrote_it(folders: dict[str, Path]):
    written = (folders["rotary"] / "model.onnx").read_bytes()
    assert b"twofold" in written
    assert str(ROOT).encode() not in written
    assert b"stack_trace" not in written


def test_the_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]):
    monkeypatch.setattr(onnx_file, "_graph", lambda *_: onnx_ir.load(folders["one"] / "model.onnx"))
    model = model_of("one").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export_onnx(model, tmp_path / "onnx").largest_difference <= TOLERANCE
    assert model.training
    assert {layer.attention.backend for layer in model.trunk.layers} == {"auto"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_large_weights_get_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
):
    monkeypatch.setattr(onnx_file, "_graph", lambda *_: onnx_ir.load(folders["one"] / "model.onnx"))
    with monkeypatch.context() as small:
        small.setattr(onnx_file, "MAX_INLINE_BYTES", 100)
        files = export_onnx(model_of("one"), tmp_path / "onnx").files
    assert [*files] == ["model.onnx", "model.onnx.data", "config.json", "cache.json"]
    assert files["model.onnx.data"] > 100
    shutil.move(tmp_path / "onnx", tmp_path / "moved")
    assert differs(model_of("one"), decoder_of(tmp_path / "moved"), 2, [3, 1]) <= TOLERANCE
    # Written again in one file, nothing of the two is left.
    assert "model.onnx.data" not in export_onnx(model_of("one"), tmp_path / "moved").files
    assert not (tmp_path / "moved" / "model.onnx.data").exists()


# What it computes


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_the_logits_are_the_models(folders: dict[str, Path], name: str, batch: int, chunks: list[int]):
    assert differs(model_of(name), decoder_of(folders[name]), batch, chunks) <= TOLERANCE


def test_another_models_logits_are_noticed(folders: dict[str, Path]):
    """The liar."""
    assert differs(model_of("rotary", seed=1), decoder_of(folders["rotary"]), 2, [5, 1]) > 1000 * TOLERANCE


def test_a_file_that_differs_from_the_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
):
    monkeypatch.setattr(onnx_file, "_graph", lambda *_: onnx_ir.load(folders["one"] / "model.onnx"))
    with pytest.raises(TwofoldError, match=r"differ from the model's by .* nothing was written"):
        export_onnx(model_of("one", seed=1), tmp_path / "onnx")
    assert not [*(tmp_path / "onnx").iterdir()]


@pytest.mark.long
@pytest.mark.timeout(3600)  # each example is traced, which takes seconds
@given(spec=decoders())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_decoder_can_be_exported(tmp_path: Path, spec: ModelSpec):
    model = drawn_model(spec, std=0.3)
    export_onnx(model, tmp_path / "onnx", max_tokens=64)
    for chunks in CHUNKS.values():
        assert differs(model, decoder_of(tmp_path / "onnx"), 3, chunks) <= 10 * TOLERANCE


@pytest.mark.long
def test_a_model_with_few_positions_can_be_exported(tmp_path: Path):
    model = drawn_model(ONE_LAYER.with_changes(positions=LearnedPositions(length=5)), std=0.3)
    assert export_onnx(model, tmp_path).max_tokens == 5
    assert differs(model, decoder_of(tmp_path), 2, [3, 1, 1]) <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_scheme_of_positions_in_every_operator_set(tmp_path: Path, positions: str, opset: int):
    """With a window in every layer, none of which holds the whole text."""
    model = drawn_model(ONE_LAYER.with_changes(positions=POSITIONS[positions], window_tokens=(4,)), std=0.3)
    export_onnx(model, tmp_path, opset=opset, max_tokens=64)
    assert onnx_ir.load(tmp_path / "model.onnx").opset_imports[""] == opset
    assert differs(model, decoder_of(tmp_path), 2, [4, 1, 1]) <= TOLERANCE


# Generation


@pytest.mark.parametrize("prefill_tokens", [512, 4])
@pytest.mark.parametrize("name", ["rotary", "shared"])
def test_greedy_generation_is_transformers_own(
    folders: dict[str, Path], name: str, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx_decoder, "PREFILL_TOKENS", prefill_tokens)
    tokens, mask = padded(3, 6)
    wanted = model_of(name).generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False)
    found = decoder_of(folders[name]).generate(tokens.numpy(), mask.numpy(), max_new_tokens=9)
    assert found.tolist() == wanted.tolist()


def test_generation_begins_anew_and_ends_with_the_last_text(folders: dict[str, Path]):
    decoder, tokens = decoder_of(folders["one"]), drawn_tokens(2, 4).numpy()
    whole = decoder.generate(tokens, max_new_tokens=8)
    assert decoder.generate(tokens, max_new_tokens=8).tolist() == whole.tolist()
    assert decoder.tokens_seen == 4 + 8 - 1
    assert decoder.generate(tokens, max_new_tokens=0).tolist() == tokens.tolist()
    # Both texts end with the token that the first gives second, so all ends where the later of the two has it.
    end = int(whole[0, 5])
    decoder.config.eos_token_id, decoder.config.pad_token_id = [end], 7
    ended = decoder.generate(tokens, max_new_tokens=8)
    for row, full in zip(ended[:, 4:].tolist(), whole[:, 4:].tolist(), strict=True):
        length = full.index(end) + 1 if end in full else len(row)
        assert row == (full[:length] + [7] * len(row))[: len(row)]
    assert ended.shape[1] == 4 + max(row.index(end) + 1 if end in row else 8 for row in whole[:, 4:].tolist())


def test_sampled_generation_is_the_seeds(folders: dict[str, Path]):
    decoder, tokens = decoder_of(folders["one"]), drawn_tokens(2, 4).numpy()

    def drawn(**options: float) -> list[list[int]]:
        return decoder.generate(tokens, max_new_tokens=9, sampling=Sampling(do_sample=True, **options)).tolist()

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    greedy = decoder.generate(tokens, max_new_tokens=9).tolist()
    assert drawn(seed=1) != greedy
    assert drawn(seed=1, top_k=1) == drawn(seed=1, temperature=1e-6) == greedy


def test_draws_follow_the_logits():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], dtype=np.float32)).repeat(20_000, axis=0)
    for sampling, wanted in (
        (Sampling(do_sample=True), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(do_sample=True, temperature=0.5), [0.725, 0.181, 0.065, 0.029]),
        (Sampling(do_sample=True, top_k=2), [2 / 3, 1 / 3, 0, 0]),
    ):
        chosen = sampling.choose(logits, sampling.generator())
        np.testing.assert_allclose(np.bincount(chosen, minlength=4) / len(chosen), wanted, atol=0.015)


# The command, and the example that needs no PyTorch


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A model of bytes as a run leaves it, exported by the command: the place, and what the command told."""
    place = tmp_path_factory.mktemp("command")
    spec = GPT2.with_changes(num_hidden_layers=1, tie="(Q, K=V)", vocab_size=256, positions=POSITIONS["rotary"])
    build_model(spec, seed=0).save_pretrained(place / "run" / "model")
    (place / "run" / "run.json").write_text("{}")
    arguments = ["export", str(place / "run"), str(place / "half"), "--dtype", "fp16", "--max-tokens", "300"]
    assert not list(place.glob("half*"))
    done = CliRunner().invoke(app, [*arguments, "--json"], prog_name="twofold")
    assert done.exit_code == 0, done.output
    return place, json.loads(done.stdout)


def test_the_command_tells_what_it_wrote(command: tuple[Path, dict]):
    place, told = command
    assert told["files"] == {name: (place / "half" / name).stat().st_size for name in told["files"]}
    assert told["largest_difference"] <= onnx_file.TOLERANCES["fp16"]
    assert (told["tie"], told["dtype"], told["max_tokens"], told["cached_tensors"]) == ("(Q, K=V)", "fp16", 300, 1)
    decoder = decoder_of(place / "half")
    decoder(np.full((2, 5), 65))
    assert told["cache_bytes_per_token"] * 2 * 5 == decoder.nbytes == cache_bytes(decoder.spec, 5, "fp16", 2)


def example(folder: Path, tokens: int) -> subprocess.CompletedProcess[bytes]:
    """The example run where torch and Twofold cannot be imported."""
    script = str(ROOT / "examples" / "onnx_generate.py")
    hide = "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'twofold'])); "
    run = f"sys.argv = sys.argv[1:]; runpy.run_path({script!r}, run_name='__main__')"
    arguments = [str(folder), "--prompt", "né", "--tokens", str(tokens), "--threads", "1"]
    return subprocess.run([sys.executable, "-X", "utf8", "-c", hide + run, "generate", *arguments], capture_output=True)


def test_the_example_generates_without_torch_or_twofold(command: tuple[Path, dict]):
    folder = command[0] / "half"
    done = example(folder, 20)
    assert done.returncode == 0, done.stderr.decode()
    decoder = decoder_of(folder)
    wanted = decoder.generate([list("né".encode())], max_new_tokens=20)[0]
    text, _, facts = done.stdout.decode().rpartition("\n\n")
    assert text == bytes(wanted.tolist()).decode(errors="replace")
    told = dict(line.split(maxsplit=1) for line in facts.replace("cache bytes", "cache").splitlines())
    assert told["tie"] == "(Q, K=V)"
    assert float(told["tokens/s"]) > 0
    assert told["cache"] == f"{decoder.nbytes:,} for {decoder.tokens_seen} tokens"
    assert decoder.nbytes == cache_bytes(decoder.spec, decoder.tokens_seen, "fp16")
    too_long = example(folder, 298)
    assert (too_long.returncode, too_long.stdout) == (2, b"")
    assert b"exported for texts of up to 300 bytes" in too_long.stderr


# What is refused


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["export", *arguments], prog_name="twofold")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    return line


def test_the_command_refuses_in_one_sentence(tmp_path: Path):
    build_model(SET, seed=0).save_pretrained(tmp_path / "set")
    build_model(ONE_LAYER, seed=0).save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    model, target = str(tmp_path / "model"), str(tmp_path / "onnx")
    assert "There is no model in" in refused(str(tmp_path / "nothing"), target)
    assert "holds no trained model yet" in refused(str(tmp_path / "run"), target)
    assert "only a causal_lm can be exported" in refused(str(tmp_path / "set"), target)
    assert "'int8' cannot be exported: use one of fp32, fp16" in refused(model, target, "--dtype", "int8")
    assert "opset is 7, but must be from 18" in refused(model, target, "--opset", "7")
    assert "holds another model" in refused(model, model)
    assert not (tmp_path / "onnx").exists()


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
):
    monkeypatch.setattr(onnx_file, "_graph", lambda *_: onnx_ir.load(folders["one"] / "model.onnx"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(TwofoldError, match=r"file cannot be written to \(File exists\)"):
        export_onnx(model_of("one"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(TwofoldError, match="max_tokens is 0, but it counts"):
        export_onnx(model_of("one"), tmp_path / "onnx", max_tokens=0)


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_a_sentence_says_what_to_install(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
):
    folder = folders["one"]
    monkeypatch.setitem(sys.modules, library, None)
    wanted = rf'{library} is needed to export a model, and is not installed: pip install "twofold\[onnx\]"\.'
    with pytest.raises(TwofoldError, match=wanted):
        export_onnx(model_of("one"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    if library == "onnxruntime":
        with pytest.raises(TwofoldError, match="onnxruntime is needed to run an exported model"):
            OnnxDecoder(folder)


def test_what_is_fed_wrongly_is_refused_and_the_cache_is_as_it_was(folders: dict[str, Path]):
    decoder, tokens = decoder_of(folders["one"]), drawn_tokens(2, 5).numpy()
    decoder(tokens)
    held = (decoder.nbytes, decoder.tokens_seen)
    for wrong, mask, sentence in (
        (tokens[0], None, r"must be whole numbers \(batch, tokens\)"),
        (tokens.astype(float), None, "are float64"),
        (tokens[:, :0], None, "at least one"),
        (tokens + VOCABULARY, None, "but the vocabulary ends at 36"),
        (-1 - tokens, None, "but the vocabulary ends at 36"),
        (tokens[:1], None, "a batch of 2, and the new tokens one of 1"),
        (tokens, np.ones((2, 5)), r"must be \(batch, tokens, those held included\) = \(2, 10\)"),
        (drawn_tokens(2, 96).numpy(), None, "would have 101 tokens, but this file was exported for up to 100"),
    ):
        with pytest.raises(TwofoldError, match=sentence):
            decoder(wrong, mask)
        assert (decoder.nbytes, decoder.tokens_seen) == held


def test_what_cannot_be_generated_is_refused(folders: dict[str, Path]):
    decoder, tokens = decoder_of(folders["one"]), drawn_tokens(2, 5).numpy()
    with pytest.raises(TwofoldError, match="pad prompts on the left"):
        decoder.generate(tokens, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], max_new_tokens=1)
    with pytest.raises(TwofoldError, match=r"96 tokens cannot follow a prompt of 5: .* up to 100 tokens"):
        decoder.generate(tokens, max_new_tokens=96)
    with pytest.raises(TwofoldError, match="temperature is 0, but logits are divided by it"):
        Sampling(do_sample=True, temperature=0)
    with pytest.raises(TwofoldError, match="top_k is -1"):
        Sampling(top_k=-1)


def test_a_damaged_folder_is_refused(tmp_path: Path, folders: dict[str, Path]):
    def spoilt(name: str, content: bytes | None) -> Path:
        folder = tmp_path / f"{len([*tmp_path.iterdir()])}"
        shutil.copytree(folders["one"], folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    whole = (folders["one"] / "model.onnx").read_bytes()
    for name, content, sentence in (
        ("model.onnx", None, "it holds no model.onnx"),
        ("model.onnx", whole[: len(whole) // 2], "cannot be run .* export it again"),
        ("model.onnx", (folders["three"] / "model.onnx").read_bytes(), "do not belong together"),
        ("config.json", None, "no whole config.json"),
        ("config.json", b'{"model_type": "gpt2"}', "no whole config.json"),
        ("config.json", b'{"model_type": "twofold", "tie": "(Q, K"}', "describes no model. This bracket"),
        ("cache.json", None, "no whole cache.json"),
        ("cache.json", b'{"max_tokens": 0}', "no whole cache.json"),
    ):
        with pytest.raises(TwofoldError, match=sentence):
            OnnxDecoder(spoilt(name, content))
