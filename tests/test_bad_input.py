"""Whatever is given wrongly gets one sentence that names it and says what to do, exit code 2, and no traceback: all of it in one table."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from small_study import STUDY
from study_fixture import ask
from twofold import presets, storage
from twofold.cache import TiedCache, load_cache
from twofold.cache_spec import CacheSpec
from twofold.cli import app
from twofold.errors import TwofoldError
from twofold.lock import FolderLock
from twofold.models import TwofoldConfig, build_model, load_model
from twofold.spec import ModelSpec
from twofold.study.expansion import expand
from twofold.study.plan import parse_plan
from twofold.task_spec import TaskSpec
from twofold.tasks import load_task
from twofold.tie import Tie
from twofold.training.spec import RunSpec, TrainingSpec
from twofold.training.trainer import train

LM = presets.PRESETS["tiny"].with_changes(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=32
)
REVERSE = {"length": 5, "train_size": 16, "held_out_size": 8}
RUN = RunSpec(
    task=TaskSpec(name="reverse", options=REVERSE),
    model=ModelSpec.from_dict({**LM.to_dict(), "architecture": "token_classification", "vocab_size": 10, "num_labels": 10, "causal": False}),
    training=TrainingSpec(steps=2, batch_size=4, learning_rate=1e-3, checkpoint_every=1),
    seed=0,
)  # fmt: skip
TRAIN = [
    "train",
    "--task",
    "reverse",
    *(word for name in REVERSE for word in ("--option", f"{name}={REVERSE[name]}")),
    "--device",
    "cpu",
]


@dataclass(frozen=True)
class Place:
    """A folder of a test's own, with copies of a trained run and of a model to be spoilt."""

    path: Path
    original: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def run(self) -> Path:
        return self._copy("run")

    @property
    def model(self) -> Path:
        return self._copy("lm")

    def _copy(self, name: str) -> Path:
        if not (self.path / name).exists():
            shutil.copytree(self.original / name, self.path / name)
        return self.path / name

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    train(RUN, folder / "run")
    build_model(LM, seed=0).save_pretrained(folder / "lm")
    return folder


@pytest.fixture
def place(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, original, monkeypatch)


Told = Callable[[Place], str]


def command(*arguments: str, after: Callable[[Place], Any] = lambda place: None) -> Told:
    """What a command says on stderr; it must end with 2 and print nothing else. ``after`` prepares the place, and paths are relative to it."""

    def told(place: Place) -> str:
        after(place)
        done = CliRunner().invoke(app, list(arguments), prog_name="twofold")
        assert isinstance(done.exception, SystemExit), repr(done.exception)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: ")
        return done.stderr.removeprefix("Error: ").rstrip("\n")

    return told


def call(function: Callable[[Place], Any]) -> Told:
    """What the TwofoldError of a call says."""

    def told(place: Place) -> str:
        with pytest.raises(TwofoldError) as caught:
            function(place)
        return str(caught.value)

    return told


def check_sentence(told: str) -> None:
    """One sentence. A tie that cannot be read is shown under it, with a caret below the place."""
    sentence, *shown = told.split("\n")
    if shown:
        text, caret = shown
        assert text.startswith("  ")
        assert caret.strip() == "^"
        assert len(caret) <= len(text) + 1
    assert sentence.endswith((".", "?")), sentence
    assert not re.search(r"[.!?]['\")]* [A-Z][a-z]", sentence), sentence
    for trace in ("Traceback", "Error:", "Exception", "<class"):
        assert trace not in sentence


def cut(path: Path, *, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def spoil(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def model(**fields: Any) -> Any:
    return build_model(LM.with_changes(**fields), seed=0)


def tokens(*shape: int, **fields: Any) -> Callable[[Place], Any]:
    """A forward pass of the language model with tokens of that shape and other arguments (shapes, or values)."""
    given = {
        name: torch.zeros(value, dtype=torch.long) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }
    return lambda place: model()(input_ids=torch.zeros(shape, dtype=torch.long), **given)


def task(name: str, **options: Any) -> Told:
    return call(lambda place: load_task(TaskSpec(name=name, options=options)))


def study(change: Callable[[str], str], *options: str) -> Told:
    return command("study", "run", "mini.toml", *options, after=lambda place: place.file("mini.toml", change(STUDY)))


def swapped(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


def full_disk(place: Place) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.monkeypatch.setattr(storage.os, "fsync", refuse)


def no_gpu(place: Place) -> None:
    place.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def locked_twice(place: Place) -> None:
    with FolderLock(place.path), FolderLock(place.path):
        pass


def other_cache(place: Place) -> None:
    first = model(num_attention_heads=4, num_key_value_heads=4, head_dim=4)
    cache, text = TiedCache(first.config.spec), torch.zeros(1, 3, dtype=torch.long)
    first.eval()(input_ids=text, cache=cache)
    model().eval()(input_ids=text, cache=cache)


def continued(
    *, tokens: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float32, max_tokens: int = 0
) -> Callable[[Place], object]:
    """Three tokens in a cache, and then something that does not follow them."""

    def go_on(_: Place) -> None:
        lm = model().eval()
        cache = TiedCache(lm.config.spec, CacheSpec(max_tokens=max_tokens))
        lm(input_ids=torch.zeros(1, 3, dtype=torch.long), cache=cache)
        lm.to(dtype)(input_ids=torch.zeros(tokens, dtype=torch.long), cache=cache)

    return go_on


def generated(_: Place, *, prompt: int = 4, positions: object = None, **options: object) -> None:
    lm = model(**({} if positions is None else {"positions": positions})).eval()
    text = torch.zeros(1, prompt, dtype=torch.long)
    lm.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=8, do_sample=False, **options)


# what is wrong: (how it is told, what names the culprit, what names the remedy)
CASES: dict[str, tuple[Told, str, str]] = {
    # Ties
    "tie: empty": (command("explain", ""), "empty", "(Q, K=V)"),
    "tie: unknown symbol": (command("explain", "(Q, X=V)"), "'X'", "use Q, K, V"),
    "tie: constant term": (command("explain", "V = Q + 1"), "constant", "Q, K or V"),
    "tie: bracket left open": (command("explain", "(Q, K=V"), "bracket", "add ')'"),
    "tie: bracket too many": (command("explain", "(Q, K=V))"), "closing bracket", "remove it"),
    "tie: a role is missing": (command("explain", "(Q, K)"), "V", "Q, K and V"),
    "tie: a role is zero": (command("explain", "V = 0"), "make V zero", "change them"),
    "tie: a role is its own opposite": (command("explain", "K = -K"), "make K zero", "change them"),
    "tie: huge coefficient": (command("explain", "V = 10000000000000000000000Q"), "coefficient", "up to a million"),
    "tie: not a number": (command("explain", "V = 1e999Q"), "1e999", "up to a million"),
    "tie: not text": (call(lambda place: Tie.parse(3)), "int", "'(Q, K=V)'"),
    "tie: Q tied with fewer KV heads": (command("explain", "V = Q - K", "--kv-heads", "4"), "4", "16"),
    "tie: a pattern that does not divide the layers": (command("explain", "6*(Q, K, V) | (Q, K=V)"), "7", "20"),
    "tie: 2-D positions in a causal model": (command("train", "--task", "recall", "--tie", "(Q, K=V)+"), "2-D positions", "drop the +"),
    # Sizes that do not fit one another
    "size: heads that do not split the width": (command("explain", "(Q, K=V)", "--hidden-size", "100", "--heads", "3"), "100", "--head-dim"),
    "size: KV heads that do not divide the heads": (command("explain", "(Q, K=V)", "--heads", "4", "--kv-heads", "3"), "3", "4"),
    "size: zero": (command("explain", "(Q, K=V)", "--layers", "0"), "--layers", "--help"),
    "size: no number": (command("explain", "(Q, K=V)", "--layers", "many"), "--layers", "--help"),
    "size: an odd number turns in no pairs": (call(lambda place: model(head_dim=7)), "7", "even"),
    "size: dropout is no probability": (call(lambda place: model(dropout=1.5)), "1.5", "from 0"),
    "field: misspelt in a configuration": (call(lambda place: TwofoldConfig(hiden_size=8)), "hiden_size", "'hidden_size'"),
    "field: unknown in a model": (call(lambda place: model(colour="red")), "colour", "hidden_size"),
    "field: out of range in a training": (command(*TRAIN, "--learning-rate", "-1"), "learning_rate", "positive"),
    "field: a batch that does not split": (command(*TRAIN, "--batch-size", "8", "--accumulation-steps", "3"), "3", "accumulation_steps"),
    # Shapes
    "shape: tokens": (call(tokens(3)), "(3,)", "(batch, tokens)"),
    "shape: a token outside the vocabulary": (call(lambda place: model()(input_ids=torch.tensor([[256]]))), "256", "255"),
    "shape: labels": (call(tokens(2, 3, labels=(2, 4))), "labels", "(2, 3)"),
    "shape: mask": (call(tokens(2, 3, attention_mask=(2, 4))), "attention_mask", "(2, 3)"),
    "shape: documents": (call(tokens(2, 3, document_ids=(3, 3))), "document_ids", "(2, 3)"),
    "shape: longer than the learned positions": (
        call(lambda place: model(positions={"kind": "learned", "length": 4})(input_ids=torch.zeros(1, 5, dtype=torch.long))), "5", "4"),
    # Caches and generation
    "cache: another model's": (call(other_cache), "num_attention_heads", "TiedCache(model.config.spec)"),
    "cache: another batch's": (call(continued(tokens=(2, 1))), "(1, 2, 8)", "one cache for one batch"),
    "cache: another dtype's": (call(continued(dtype=torch.float64)), "float32", "one cache for one model"),
    "cache: more tokens than it has room for": (call(continued(tokens=(1, 4), max_tokens=6)), "6 tokens", "more room"),
    "cache: bits that nobody has": (call(lambda place: generated(place, cache_implementation="quantized", cache_config={"nbits": 2})), "2 bits", "use 8 or 4"),
    "cache: a quantizer of keys and values": (
        call(lambda place: generated(place, cache_implementation="quantized", cache_config={"backend": "hqq"})), "'hqq'", "leave backend out"),
    "cache: Transformers' own": (call(lambda place: model()(input_ids=torch.zeros(1, 3, dtype=torch.long), cache=DynamicCache())), "DynamicCache", "TiedCache"),
    "cache: a file that is none": (call(lambda place: load_cache(place.model / "config.json", model().config.spec)), "config.json", "missing, truncated or damaged"),
    "generate: an empty prompt": (call(lambda place: generated(place, prompt=0)), "(1, 0)", "one token at least"),
    "generate: beyond the positions": (call(lambda place: generated(place, positions={"kind": "learned", "length": 4})), "5 tokens", "4 positions"),
    "generate: room beyond the positions": (
        call(lambda place: generated(place, positions={"kind": "learned", "length": 4}, cache_implementation="static")), "room for 11", "at most 4"),
    "shape: features": (
        call(lambda place: model(architecture="token_classification", vocab_size=0, feature_size=3, num_labels=2, causal=False)(features=torch.zeros(1, 2, 4))),
        "(1, 2, 4)", "3"),
    "argument: unknown": (call(tokens(1, 2, head_mask=1)), "head_mask", "argument"),
    # Checkpoints
    "checkpoint: truncated": (call(lambda place: (cut(place.model / "model.safetensors"), load_model(place.model))), "model.safetensors", "take another one"),
    "checkpoint: empty": (call(lambda place: (cut(place.model / "model.safetensors", keep=0), load_model(place.model))), "model.safetensors", "take another one"),
    "checkpoint: a pickle": (
        call(lambda place: ((place.model / "model.safetensors").rename(place.model / "pytorch_model.bin"), load_model(place.model))), "pytorch_model.bin", "convert it"),
    "checkpoint: no weights": (call(lambda place: ((place.model / "model.safetensors").unlink(), load_model(place.model))), "lm", "model.safetensors"),
    "checkpoint: no folder": (call(lambda place: load_model(place.path / "nowhere")), "nowhere", "not a folder"),
    "checkpoint: no configuration": (call(lambda place: ((place.model / "config.json").unlink(), load_model(place.model))), "lm", "config.json"),
    "checkpoint: damaged configuration": (call(lambda place: (cut(place.model / "config.json"), load_model(place.model))), "config.json", "take another one"),
    "checkpoint: another model's": (call(lambda place: (spoil(place.model / "config.json", model_type="llama"), load_model(place.model))), "'llama'", "'twofold'"),
    "checkpoint: weights of another shape": (
        call(lambda place: (spoil(place.model / "config.json", intermediate_size=64), load_model(place.model))), "mlp", "do not belong together"),
    "checkpoint: a tie that the weights do not have": (
        call(lambda place: (spoil(place.model / "config.json", tie="(Q, K=V)"), load_model(place.model))), "v_proj", "do not belong together"),
    # Tasks and data
    "task: unknown": (command("train", "--task", "reverze"), "reverze", "'reverse'"),
    "task: none named": (command("train"), "--task", "reverse"),
    "task: unknown option": (command("train", "--task", "reverse", "--option", "lenght=4"), "lenght", "'length'"),
    "task: option of another type": (command("train", "--task", "reverse", "--option", "length=four"), "length", "a whole number"),
    "task: option out of range": (task("reverse", length=0), "length", "at least"),
    "task: option without a value": (command("train", "--task", "reverse", "--option", "length"), "'length'", "name=value"),
    "task: option given twice": (command(*TRAIN, "--option", "length=4"), "length", "keep one"),
    "data: no such file": (task("text", path="nowhere.txt"), "nowhere.txt", "check the option path"),
    "data: empty": (call(lambda place: (place.file("a.txt", ""), load_task(TaskSpec(name="text", options={"path": "a.txt"})))), "a.txt", "empty"),
    "data: too short": (call(lambda place: (place.file("b.txt", "short"), load_task(TaskSpec(name="text", options={"path": "b.txt"})))), "b.txt", "lower context"),
    "data: truncated gzip": (
        call(lambda place: (place.file("c.gz", b"\x1f\x8b\x08\x00"), load_task(TaskSpec(name="text", options={"path": "c.gz"})))), "c.gz", "fetch it again"),
    "data: no JSON": (
        call(lambda place: (place.file("d.jsonl", "{"), load_task(TaskSpec(name="text", options={"path": "d.jsonl"})))), "d.jsonl", "JSON"),
    "data: no such field": (
        call(lambda place: (place.file("e.jsonl", '{"body": "x"}\n'), load_task(TaskSpec(name="text", options={"path": "e.jsonl"})))), "'text'", "the option field"),
    "data: no such folder of images": (task("images", path="nowhere"), "nowhere", "give the folder"),
    "data: neither folder nor data set": (task("images"), "path and dataset", "exactly one"),
    "data: a data set that cannot be fetched": (task("images", dataset="no-such/data-set"), "no-such/data-set", "check its name"),
    "data: no such features": (task("anomaly", path="nowhere.npz"), "nowhere.npz", ".npz"),
    "data: damaged features": (
        call(lambda place: (place.file("f.npz", b"PK"), load_task(TaskSpec(name="anomaly", options={"path": "f.npz"})))), "f.npz", "features and labels"),
    # Training
    "train: no GPU": (command(*TRAIN, "--device", "cuda", after=no_gpu), "GPU", "--device cpu"),
    "train: unknown device": (command(*TRAIN, "--device", "tpu"), "--device", "--help"),
    "train: unknown backend": (command(*TRAIN, "--steps", "1", "--backend", "magic"), "magic", "auto"),
    "train: unknown preset": (command(*TRAIN, "--preset", "tini"), "tini", "tiny"),
    "train: unknown schedule": (command(*TRAIN, "--schedule", "linear"), "--schedule", "--help"),
    "train: unknown field of a training": (command(*TRAIN, "--training-field", "momentum=1"), "momentum", "betas"),
    "train: a field that has an option": (command(*TRAIN, "--training-field", "steps=1"), "steps", "--steps"),
    "train: unknown field of a model": (command(*TRAIN, "--model-field", "colour=red"), "colour", "hidden_size"),
    "train: a field that contradicts the task": (command(*TRAIN, "--model-field", "vocab_size=7"), "vocab_size=7", "leave it out"),
    "train: a field that is no number": (command(*TRAIN, "--model-field", "dropout=much"), "much", "number"),
    "train: a field of a training that is no number": (command(*TRAIN, "--training-field", "clip_norm=much"), "clip_norm", "must be a number"),
    "train: unwritable folder": (command(*TRAIN, "--steps", "1", "--folder", "file/run", after=lambda place: place.file("file", "")), "file/run", "another folder"),
    "train: full disk": (command(*TRAIN, "--steps", "1", "--folder", "new", after=full_disk), "No space left on device", "make room"),
    "train: the folder holds another run": (command(*TRAIN, "--steps", "3", "--folder", "run", after=lambda place: place.run), "run", "choose another folder"),
    "train: no run in the folder": (command("train", "--folder", "nowhere"), "nowhere", "twofold train"),
    "train: a folder and other settings": (command("train", "--folder", "run", "--steps", "3", after=lambda place: place.run), "--steps", "leave --steps out"),
    "train: a damaged run.json": (command("train", "--folder", "run", after=lambda place: cut(place.run / "run.json")), "run.json", "new folder"),
    "train: a run.json that lacks a field": (
        command("train", "--folder", "run", after=lambda place: place.run.joinpath("run.json").write_text("{}")), "task", "a run holds"),
    "train: every checkpoint truncated": (
        command("train", "--folder", "run", "--device", "cpu",
                after=lambda place: ((place.run / "outcome.json").unlink(), [cut(path) for path in place.run.glob("checkpoints/*/*.safetensors")])),
        "checkpoints", "begin again"),
    "train: a loss that is not finite": (command(*TRAIN, "--learning-rate", "1e30", "--steps", "5", "--training-field", "clip_norm=0"), "step", "lower learning_rate"),
    "train: fp16 on a CPU": (command(*TRAIN, "--steps", "1", "--precision", "fp16"), "fp16", "bf16"),
    # Evaluation
    "eval: no run": (command("eval", "nowhere"), "nowhere", "twofold train"),
    "eval: not yet trained": (command("eval", "run", after=lambda place: shutil.rmtree(place.run / "model")), "run", "twofold train --folder run"),
    "eval: a truncated model": (command("eval", "run", after=lambda place: cut(place.run / "model" / "model.safetensors")), "model.safetensors", "take another one"),
    "eval: on what the model cannot read": (command("eval", "run", "--task", "recall", after=lambda place: place.run), "architecture", "what it was trained for"),
    "eval: no GPU": (command("eval", "run", "--device", "cuda", after=lambda place: (place.run, no_gpu(place))), "GPU", "--device cpu"),
    # Studies
    "study: no such study": (command("study", "run", "smoky"), "smoky", "path of a file"),
    "study: no such file": (command("study", "run", "nowhere.toml"), "nowhere.toml", "No such file"),
    "study: no TOML": (study(swapped('name = "mini"', "name = mini")), "mini.toml", "TOML"),
    "study: empty": (study(lambda text: ""), "mini.toml", "name"),
    "study: a field is missing": (study(swapped('question = "Does it run?"\n', "")), "question", "add it"),
    "study: an unknown field": (study(swapped("seeds =", "seedz = 1\nseeds =")), "seedz", "seeds"),
    "study: an unknown field of a model": (study(swapped("{ tie =", "{ tye =")), "'tye'", "'tie'"),
    "study: a tie that cannot be read": (
        call(lambda place: expand(parse_plan(swapped('"(Q, K=V)"', '"(Q, K)"')(STUDY), "mini.toml"), ask)), "variant tied", "Q, K and V"),
    "study: a control that does not match": (
        call(lambda place: expand(parse_plan(swapped('name = "tied"', 'name = "tied"\nmatches = [{ variant = "free", in = "cache" }]')(STUDY), "mini.toml"), ask)),
        "tied has 16", "drop the claim"),
    "study: a reference that is no variant": (study(swapped('reference = "free"', 'reference = "fre"')), "fre", "free, tied"),
    "study: a control without a note": (study(swapped('name = "tied"', 'name = "tied"\nkind = "control"')), "tied", "say in note"),
    "study: a seed twice": (study(swapped("[0, 1]", "[0, 0]")), "0", "each its own"),
    "study: no such task to run": (study(lambda text: text, "--only", "reverze"), "reverze", "'reverse'"),
    "study: another runner is at work": (
        call(locked_twice),
        "process", "choose another folder"),
    "report: no study": (command("study", "report", "nowhere"), "nowhere", "twofold study run"),
    "report: a damaged study": (
        command("study", "report", "s", after=lambda place: (place.path.joinpath("s").mkdir(), place.file("s/study.json", "{"))), "study.json", "new folder"),
    # The command line itself
    "command: unknown": (command("trian"), "trian", "--help"),
    "command: unknown option": (command("explain", "(Q, K=V)", "--bogus"), "--bogus", "--help"),
    "command: unknown dtype": (command("explain", "(Q, K=V)", "--dtype", "bf17"), "bf17", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_its_sentence(case: str, place: Place):
    told, culprit, remedy = CASES[case]
    sentence = told(place)
    check_sentence(sentence)
    assert culprit in sentence
    assert remedy in sentence


@pytest.mark.parametrize(
    "liar",
    [
        "One sentence. And another.",
        "No full stop",
        "Traceback (most recent call last).",
        "ValueError: that is wrong.",
        "A tie.\n  (Q, K\n      ^^",
        "Two\nlines.",
    ],
)
def test_the_check_can_fail(liar: str):
    with pytest.raises((AssertionError, ValueError)):
        check_sentence(liar)


def test_the_last_good_checkpoint_is_intact_when_the_disk_is_full(place: Place):
    """A run that was stopped after step 1 and goes on with a full disk; with room again it ends as the whole run did."""
    whole = json.loads((place.run / "outcome.json").read_text())
    shutil.rmtree(place.run / "checkpoints" / "step-00000002")
    (place.run / "outcome.json").unlink()
    before = {path: path.read_bytes() for path in (place.run / "checkpoints").rglob("*") if path.is_file()}
    assert before
    with pytest.MonkeyPatch.context() as patch:
        full_disk(replace(place, monkeypatch=patch))
        with pytest.raises(TwofoldError, match="No space left"):
            train(RUN, place.run)
    assert {path: path.read_bytes() for path in (place.run / "checkpoints").rglob("*") if path.is_file()} == before
    assert train(RUN, place.run).scores == whole["scores"]
