"""``twofold generate`` and what is behind it: text in whole pieces, every cache, its measured bytes, Ctrl-C, and a sentence for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from twofold.cache_spec import CacheSpec
from twofold.cli import app
from twofold.cli import generate as cli
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.generation import CACHES, Sampling, generate
from twofold.generation.codec import ByteCodec, TokenizerCodec, codec_of
from twofold.models import TwofoldConfig, TwofoldForCausalLM, build_model
from twofold.presets import PRESETS
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.training.spec import RunSpec, TrainingSpec

TINY = PRESETS["tiny"].with_changes(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=20,
    tie="(Q, K=V)", initializer_range=0.3,
)  # fmt: skip
LEARNED = TINY.with_changes(positions={"kind": "learned", "length": 20})
GREEDY = Sampling(greedy=True)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


def model_of(spec: ModelSpec = TINY) -> TwofoldForCausalLM:
    model = build_model(spec, seed=0).eval()
    assert isinstance(model, TwofoldForCausalLM)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "model"
    model_of().save_pretrained(path)
    return path


def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], prog_name="twofold", input=stdin)


def told(*arguments: object, **options: Any) -> dict[str, Any]:
    done = invoke(*arguments, "--json", **options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def mistake(*arguments: object, **options: Any) -> str:
    done = invoke(*arguments, **options)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line


# Text in whole pieces


@cache
def byte_level() -> TokenizerCodec:
    """GPT-2's kind: every text is bytes, and some bytes are merged."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the cat sat on the mat, and the other cat sat there too: naïve 你好 🙂"] * 3, trainer
    )
    return TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"))


@cache
def byte_fallback() -> TokenizerCodec:
    """Llama's kind: words begin with a blank of their own, which the first one of a text loses; what is not known is bytes."""
    words = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((f"<0x{byte:02X}>", -10.0) for byte in range(256)),
        ("▁the", -2.0),
        ("▁cat", -2.5),
        ("▁", -3.0),
    ]
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(tokenizer_models.Unigram([*words, *letters], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


@given(TEXTS)
def test_bytes_become_text_as_soon_as_a_character_is_whole(text: str):
    codec = ByteCodec()
    decoder = codec.decoder([])
    pieces = [decoder.push(token) for token in codec.encode(text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.end() == ""


def test_bytes_that_are_no_text_are_shown_as_such():
    decoder = ByteCodec().decoder([])
    assert [decoder.push(token) for token in b"\xffa\xe2\x82"] == ["\ufffd", "a", "", ""]
    assert decoder.end() == "\ufffd"


@pytest.mark.parametrize("codec", [byte_level, byte_fallback])
@given(prompt=TEXTS.filter(str.strip), text=TEXTS)
def test_tokens_become_the_text_that_they_are(codec: Any, prompt: str, text: str):
    """Piece by piece, after any prompt, what a tokenizer says of all tokens at once."""
    codec = codec()
    tokens, decode = codec.encode(prompt), codec.tokenizer.decode
    more = codec.encode(text)
    decoder = codec.decoder(tokens)
    pieces = [decoder.push(token) for token in more]
    whole = decode(tokens + more, clean_up_tokenization_spaces=False)
    before = decode(tokens, clean_up_tokenization_spaces=False)
    if "\ufffd" not in before + whole:
        assert "".join(pieces) + decoder.end() == whole[len(before) :]
        assert not [piece for piece in pieces if "\ufffd" in piece]


@pytest.mark.parametrize("codec", [byte_level, byte_fallback])
@given(tokens=st.lists(st.integers(2, 250), max_size=40))
def test_tokens_that_are_no_text_do_not_hold_it_up(codec: Any, tokens: list[int]):
    decoder = codec().decoder(codec().encode("the cat"))
    waiting = 0
    for token in tokens:
        waiting = 0 if decoder.push(token) else waiting + 1
        assert waiting <= 5
    decoder.end()


# A text and what it took


def by_hand(model: TwofoldForCausalLM, prompt: str, count: int) -> str:
    """The likeliest tokens, each from the whole text again."""
    tokens = list(prompt.encode())
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return bytes(tokens[len(prompt.encode()) :]).decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_cache_makes_the_text_that_recomputing_makes(kind: str):
    model = model_of()
    made = generate(model, ByteCodec(), "héllo", max_new_tokens=12, sampling=GREEDY, cache=kind)
    assert made.text == by_hand(model, "héllo", 12)
    assert (made.prompt_tokens, made.new_tokens, made.ended_by) == (6, 12, "length")
    assert made.cache.kind == kind
    assert made.cache.tokens == 17  # the last token is not read any more


HELD = {
    ("dynamic", 0): CacheSpec(),
    ("static", 0): CacheSpec(max_tokens=14),
    ("static", 8): CacheSpec(max_tokens=14, bits=8, axis="head"),
    ("quantized", 0): CacheSpec(bits=8),
    ("quantized", 8): CacheSpec(bits=8),
    ("quantized", 4): CacheSpec(bits=4),
    ("offloaded", 0): CacheSpec(),
}


@pytest.mark.parametrize(("kind", "bits"), HELD)
@pytest.mark.parametrize("tie", ["(Q, K=V)", "(Q, K, V)", "V = Q - K"])
def test_the_bytes_are_measured_and_half_of_ordinary_attention_s(tie: str, kind: str, bits: int):
    spec, held = TINY.with_changes(tie=tie), HELD[kind, bits]
    made = generate(model_of(spec), ByteCodec(), "hello", max_new_tokens=9, cache=kind, bits=bits)
    assert made.cache.nbytes == cache_bytes(spec, 13, "fp32", 1, held)
    assert made.cache.reference_bytes == cache_bytes(TINY.with_changes(tie="(Q, K, V)"), 13, "fp32", 1, held)
    assert made.cache.reference_bytes == made.cache.nbytes * (2 if tie == "(Q, K=V)" else 1)
    assert made.cache.bits == held.bits


@pytest.mark.parametrize(
    "spec",
    [
        TINY.with_changes(positions={"kind": "rotary", "rotate": "stream"}),
        TINY.with_changes(window_tokens=[3, 0]),
        TINY.with_changes(head_dim=10),  # no whole group of 32 floats
        TINY.with_changes(positions={"kind": "shared_rotary", "dim": 4}),
    ],
    ids=["stream", "window", "odd", "shared"],
)
def test_other_models_are_measured_too(spec: ModelSpec):
    dynamic = generate(model_of(spec), ByteCodec(), "hello", max_new_tokens=4, sampling=GREEDY)
    assert dynamic.cache.nbytes == cache_bytes(spec, 8, "fp32")
    assert dynamic.cache.nbytes < dynamic.cache.reference_bytes
    assert generate(model_of(spec), ByteCodec(), "hello", max_new_tokens=4, cache="quantized").cache.bits == 8


def test_half_precision_is_counted_as_such():
    made = generate(model_of().to(torch.bfloat16), ByteCodec(), "hello", max_new_tokens=2)
    assert made.cache.nbytes == cache_bytes(TINY, 6, "bf16")


def test_a_seed_draws_the_same_text_and_disturbs_nobody():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (
        generate(model_of(), ByteCodec(), "a", max_new_tokens=20, sampling=Sampling(seed=seed)).text
        for seed in (1, 1, 2)
    )
    assert first == again != other
    torch.random.set_rng_state(before)
    expected = torch.rand(3)
    torch.random.set_rng_state(before)
    generate(model_of(), ByteCodec(), "a", max_new_tokens=2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), expected)


def test_the_choice_of_tokens_follows_the_options():
    likeliest = generate(model_of(), ByteCodec(), "a", max_new_tokens=9, sampling=GREEDY).text
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)):
        assert generate(model_of(), ByteCodec(), "a", max_new_tokens=9, sampling=sampling).text == likeliest
    assert generate(model_of(), ByteCodec(), "a", max_new_tokens=9).text != likeliest


def test_pieces_come_one_by_one():
    pieces: list[str] = []
    made = generate(model_of(), ByteCodec(), "a", max_new_tokens=15, say=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces) == made.text
    assert 0 < made.seconds_to_first_token < made.seconds
    assert made.tokens_per_second == pytest.approx(14 / (made.seconds - made.seconds_to_first_token))
    assert generate(model_of(), ByteCodec(), "a", max_new_tokens=1).tokens_per_second is None


def test_a_text_ends_where_it_is_stopped():
    said = iter([False, False, True])
    made = generate(model_of(), ByteCodec(), "a", max_new_tokens=15, stop=lambda: next(said))
    assert (made.new_tokens, made.ended_by, made.cache.tokens) == (3, "interruption", 3)


def test_a_text_ends_at_the_end_token():
    model = model_of()
    text = generate(model, ByteCodec(), "a", max_new_tokens=9, sampling=GREEDY).text
    model.generation_config.eos_token_id = text.encode("utf-8", "replace")[0] if text[0] < "\x80" else None
    tokens = [int(model(torch.tensor([[97]])).logits[0, -1].argmax())]
    model.generation_config.eos_token_id = tokens
    made = generate(model, ByteCodec(), "a", max_new_tokens=9, sampling=GREEDY)
    assert (made.new_tokens, made.ended_by) == (1, "end of text")


@pytest.mark.parametrize("kind", CACHES)
def test_a_text_ends_where_the_positions_do(kind: str):
    """The last token is not read, so it needs no position."""
    made = generate(model_of(LEARNED), ByteCodec(), "x" * 15, max_new_tokens=50, cache=kind)
    assert (made.new_tokens, made.ended_by, made.cache.tokens) == (6, "positions", 20)
    assert generate(model_of(LEARNED), ByteCodec(), "x" * 20, max_new_tokens=50, cache=kind).new_tokens == 1
    with pytest.raises(TwofoldError, match="21 tokens, but the model has learned 20 positions"):
        generate(model_of(LEARNED), ByteCodec(), "x" * 21, cache=kind)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""},
        {"max_new_tokens": 0},
        {"cache": "elastic"},
        {"cache": "quantized", "bits": 3},
        {"cache": "static", "bits": 4},
    ],
)
def test_what_cannot_be_made_is_refused(wrong: dict[str, Any]):
    with pytest.raises(TwofoldError):
        generate(model_of(), ByteCodec(), **{"prompt": "a", **wrong})


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}],
)
def test_an_impossible_choice_is_refused(wrong: dict[str, Any]):
    with pytest.raises(TwofoldError):
        Sampling(**wrong)


# The command


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(folder: Path):
    done = invoke(folder, "--prompt", "hello", "--greedy", "--max-new-tokens", 12)
    assert done.exit_code == 0, done.output
    assert done.stdout == by_hand(model_of(), "hello", 12) + "\n"
    assert "5 read, 12 made; ended by length" in done.stderr
    assert f"{cache_bytes(TINY, 16, 'fp32') / 1024:.2f} KiB for 16 tokens ((Q, K=V), dynamic)" in done.stderr
    assert "with the same heads (this model: -50.0%)" in done.stderr
    assert "tokens per second" in done.stderr


def test_json_is_one_object(folder: Path):
    made = told(
        folder, "--prompt", "hello", "--max-new-tokens", 5, "--cache", "quantized", "--bits", 4, "--temperature", 0.5
    )
    assert made["sampling"] == {"greedy": False, "temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert (made["prompt"], made["new_tokens"], made["tie"]) == ("hello", 5, "(Q, K=V)")
    assert made["cache"]["bits"] == 4
    assert made["cache"]["nbytes"] * 2 == made["cache"]["reference_bytes"]
    coded = told(folder, "--prompt", "hello", "--max-new-tokens", 5, "--cache", "static", "--bits", 8)["cache"]
    assert (coded["kind"], coded["bits"]) == ("static", 8)
    assert coded["nbytes"] == cache_bytes(TINY, 9, "fp32", 1, CacheSpec(max_tokens=10, bits=8, axis="head"))


def test_a_prompt_comes_from_anywhere(folder: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes("naïve\n".encode())
    plain = told(folder, "--prompt", "naïve\n", "--max-new-tokens", 3)
    assert plain["prompt_tokens"] == 7
    for made in (
        told(folder, "--prompt", f"@{tmp_path / 'prompt.txt'}", "--max-new-tokens", 3),
        told(folder, "--prompt", "-", "--max-new-tokens", 3, stdin="naïve\n".encode()),
    ):
        assert (made["prompt"], made["text"]) == (plain["prompt"], plain["text"])


def test_a_run_is_a_model_too(folder: Path, tmp_path: Path):
    run = RunSpec(
        task=TaskSpec(name="text"), model=TINY, training=TrainingSpec(steps=1, batch_size=1, learning_rate=1e-3), seed=0
    )
    (tmp_path / "run.json").write_text(json.dumps(run.to_dict()))
    assert "holds no trained model yet" in mistake(tmp_path, "--prompt", "a")
    model_of().save_pretrained(tmp_path / "model")
    made = told(tmp_path, "--prompt", "hello", "--max-new-tokens", 3)
    assert made["text"] == told(folder, "--prompt", "hello", "--max-new-tokens", 3)["text"]
    assert made["model"] == str(tmp_path / "model")


@pytest.mark.parametrize("alone", [False, True], ids=["with settings", "tokenizer.json alone"])
def test_a_tokenizer_beside_the_model_is_used(alone: bool, tmp_path: Path):
    codec = byte_level()
    spec = TINY.with_changes(vocab_size=len(codec.tokenizer))
    model_of(spec).save_pretrained(tmp_path)
    codec.tokenizer.save_pretrained(tmp_path)
    if alone:
        (tmp_path / "tokenizer_config.json").unlink()
    made = told(tmp_path, "--prompt", "the cat", "--max-new-tokens", 8)
    assert made["prompt_tokens"] == len(codec.encode("the cat")) < 7
    assert made["new_tokens"] == 8 or made["ended_by"] == "end of text"
    assert isinstance(codec_of(tmp_path, spec), TokenizerCodec)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_with_what_was_made(folder: Path):
    command = ["generate", str(folder), "--prompt", "hello", "--max-new-tokens", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twofold", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    first = process.stdout.read(1)  # text comes before there is an end to it
    process.send_signal(signal.SIGINT)
    stdout, stderr = (stream.decode() for stream in process.communicate())
    assert (process.returncode, len(first)) == (130, 1), stderr
    assert stdout.endswith("\n")
    assert "ended by interruption" in stderr
    assert stderr.endswith("Error: Interrupted.\n")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_ends_with_what_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool):
    asked: list[int] = []

    def press(interruption: cli._Interruption) -> bool:
        asked.append(1)
        if len(asked) == 4:
            signal.raise_signal(signal.SIGINT)
        return interruption._asked

    monkeypatch.setattr(cli._Interruption, "asked", press)
    before = signal.getsignal(signal.SIGINT)
    done = invoke(folder, "--prompt", "hello", "--max-new-tokens", 30, "--greedy", *["--json"] * as_json)
    assert done.exit_code == 130
    assert done.stderr.endswith("Error: Interrupted.\n")
    if as_json:
        made = json.loads(done.stdout)
        assert (made["ended_by"], made["new_tokens"], made["cache"]["tokens"]) == ("interruption", 4, 8)
    else:
        assert done.stdout == by_hand(model_of(), "hello", 4) + "\n"
        assert "5 read, 4 made; ended by interruption" in done.stderr
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_leaves_ends_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def say(_: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_say", say)
    done = invoke(folder, "--prompt", "hello")
    assert (done.exit_code, done.output) == (0, "")


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_is_no_error(folder: Path):
    command = f"{sys.executable} -m twofold generate {folder} --prompt hello --max-new-tokens 100000 | head -c 3"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout) == 3


def test_a_terminal_is_not_moved_by_what_a_model_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli._say("a\x1b[2J\x00\x7f\x9b\tb\n")
    assert capsys.readouterr().out == "a␛[2J␀␡\ufffd\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    cli._say("\x1b")
    assert capsys.readouterr().out == "\x1b"


def test_mistakes_are_sentences(folder: Path, tmp_path: Path):
    def copy(name: str, spec: ModelSpec = TINY) -> Path:
        model_of(spec).save_pretrained(tmp_path / name)
        return tmp_path / name

    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-9])
    garbled = copy("garbled")
    (garbled / "tokenizer.json").write_text("{}")
    classifier = {
        **TINY.to_dict(),
        "architecture": "token_classification",
        "num_labels": 2,
        "causal": False,
        "tie_word_embeddings": False,
    }
    build_model(ModelSpec.from_dict(classifier), seed=0).save_pretrained(tmp_path / "classifier")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    prompt = ["--prompt", "hello"]
    for arguments, part in (
        ([folder, "--prompt", ""], "The prompt is empty"),
        ([copy("learned", LEARNED), "--prompt", "x" * 21], "learned 20 positions"),
        ([tmp_path / "absent", *prompt], "There is no model in"),
        ([tmp_path / "classifier", *prompt], "only a causal_lm makes text"),
        ([tmp_path / "llama", *prompt], "'llama'"),
        ([torn, *prompt], "torn"),
        ([garbled, *prompt], "tokenizer in"),
        ([copy("words", TINY.with_changes(vocab_size=67)), *prompt], "67 tokens are no bytes"),
        ([folder, "--prompt", f"@{tmp_path / 'nowhere'}"], "There is no file"),
        ([folder, "--prompt", f"@{tmp_path / 'latin'}"], "not UTF-8 text (byte 2)"),
        ([folder, "--prompt", "na\udcefve"], "from the command line is not UTF-8 text (byte 2)"),
        ([folder, *prompt, "--greedy", "--top-k", 5], "--top-k has no effect"),
        ([folder, *prompt, "--bits", 4], "leave --bits out"),
        ([folder, *prompt, "--cache", "static", "--bits", 4], "holds codes of 8 bits, and 4 were asked for"),
        ([folder, *prompt, "--temperature", 0], "temperature is 0.0"),
        ([folder, *prompt, "--top-p", 2], "top_p is 2.0"),
        ([folder, *prompt, "--cache", "elastic"], "elastic"),
        ([folder, *prompt, "--max-new-tokens", 0], "max-new-tokens"),
    ):
        assert part in mistake(*arguments)
    assert "The prompt is empty" in mistake(folder, "--prompt", "-", stdin="")


def test_a_configuration_of_bytes_is_what_train_makes():
    assert TwofoldConfig().spec.vocab_size == 256
    assert isinstance(codec_of(Path("nowhere"), TwofoldConfig().spec), ByteCodec)
