"""Saved models among other tools: found by Transformers' Auto classes, with a card that says what the tie costs, and pushed as such."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import hub

from attention_strategies import POSITIONS
from model_strategies import FAMILIES, GPT2, LLAMA, drawn_model, drawn_tokens
from twofold.cost import cached_bytes_per_token
from twofold.models import TwofoldConfig, TwofoldForCausalLM, card
from twofold.models.quiet import without_bars
from twofold.picture import count_text

SPECS = {
    **FAMILIES,
    "stream": LLAMA.with_changes(positions=POSITIONS["stream"]),
    "shared": LLAMA.with_changes(positions=POSITIONS["shared"]),
    "untied": LLAMA.with_changes(tie="(Q, K, V)"),
    "windows": GPT2.with_changes(window_tokens=(3, 0)),
}
OWN = "---\nlicense: mit\n---\n# Mine\r\n\nWritten by hand, with a stray byte: \xff\n".encode("latin-1")


def readme(folder: Path) -> str:
    return (folder / card.FILE).read_text(encoding="utf-8")


def saved(folder: Path, spec: Any = LLAMA, **options: Any) -> TwofoldForCausalLM:
    model = drawn_model(spec).float()
    with without_bars():
        model.save_pretrained(folder, **options)
    return model


# Loading without remote code


def test_a_new_process_loads_it_once_the_package_is_imported(tmp_path: Path):
    model = saved(tmp_path)
    tokens = drawn_tokens(1, 5)
    script = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained(".")
except ValueError as error:
    assert "`twofold`" in str(error), error  # unknown before ...
else:
    raise AssertionError("Transformers has found a way of its own: say so in docs/transformers.md.")
exec(Path("loading.py").read_text())  # ... and known after
import torch
print(model.generate(torch.tensor(json.loads(sys.argv[1])), max_new_tokens=4, do_sample=False).tolist())
"""
    (tmp_path / "loading.py").write_text(code_of(readme(tmp_path)))
    command = [sys.executable, "-c", script, json.dumps(tokens.tolist())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate(tokens, max_new_tokens=4, do_sample=False).tolist()


def code_of(text: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_on_the_card_loads_the_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = saved(tmp_path, FAMILIES[family])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code_of(readme(tmp_path)), namespace)
    found = namespace["model"]
    assert type(found) is type(model)
    assert found.config.spec == model.config.spec


# The card


@pytest.mark.parametrize("name", SPECS)
def test_the_card_says_what_the_tie_costs(name: str, tmp_path: Path):
    spec = SPECS[name]
    model = saved(tmp_path, spec)
    text = readme(tmp_path)
    for tie in spec.tie.ties:
        assert f"`{tie}`" in text
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    assert rows["parameters"][1] == count_text(sum(parameter.numel() for parameter in model.parameters()))
    if not spec.causal:
        assert not [row for row in rows if "cache" in row]
        return
    here, there = (int(number.replace(",", "")) for number in reversed(rows["cached bytes per token, fp32"][:2]))
    assert here == cached_bytes_per_token(spec, "fp32")
    if name != "windows":  # which keep no more than they may see
        cache = model(drawn_tokens(1, 5), use_cache=True).get("cache") or model(drawn_tokens(1, 5)).past_key_values
        assert cache.nbytes == 5 * here
    assert there == cached_bytes_per_token(spec.with_changes(tie="(Q, K, V)", positions=POSITIONS["none"]), "fp32") + (
        4 * spec.num_hidden_layers * spec.positions.key_extension_dim
    )
    assert rows["parameters"][2] == ("same" if name == "untied" else rows["parameters"][2])
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "twofold" in data.tags


@pytest.mark.parametrize("scheme", POSITIONS)
def test_a_tied_model_of_any_positions_is_saved_with_its_card(scheme: str, tmp_path: Path):
    spec = LLAMA.with_changes(tie="(Q, K=V)", positions=POSITIONS[scheme])
    saved(tmp_path, spec)
    assert f"| {spec.ordinary.tie}, the same heads | this model |" in readme(tmp_path)


def test_the_cards_cache_is_in_the_models_own_dtype(tmp_path: Path):
    with without_bars():
        drawn_model(LLAMA).to(torch.bfloat16).save_pretrained(tmp_path)
    assert f"| cached bytes per token, bf16 | {2 * cached_bytes_per_token(LLAMA, 'bf16'):,} |" in readme(tmp_path)


def test_a_card_follows_its_model_until_somebody_edits_it(tmp_path: Path):
    saved(tmp_path)
    first = readme(tmp_path)
    saved(tmp_path, SPECS["untied"])
    assert readme(tmp_path) != first
    assert "`(Q, K, V)`" in readme(tmp_path)
    saved(tmp_path)
    assert readme(tmp_path) == first
    for edit in (
        lambda text: text.replace("# A language", "# The language"),
        lambda text: text.replace("library_name", "license: mit\nlibrary_name"),
        lambda text: text + "\nMore.\n",
        lambda text: text.replace("library_name:", "library_name: [", 1),
        lambda text: "",
    ):
        (tmp_path / card.FILE).write_text(edited := edit(first), encoding="utf-8")
        saved(tmp_path, SPECS["untied"])
        assert readme(tmp_path) == edited
    (tmp_path / card.FILE).write_bytes(OWN)
    saved(tmp_path)
    assert (tmp_path / card.FILE).read_bytes() == OWN


def test_only_one_process_of_many_writes_the_card(tmp_path: Path):
    saved(tmp_path, is_main_process=False)
    assert not (tmp_path / card.FILE).exists()


def test_no_card_where_nothing_could_be_saved(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    saved(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


# Pushing


class FakeHub:
    """Stands for huggingface.co: one repository, whose files are bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id.split('/')[-1]}")

    def create_commit(self, operations: list[CommitOperationAdd], **_: Any) -> str:
        for operation in operations:
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
        return "done"

    def load_card(self, repo_id: str, **_: Any) -> ModelCard:
        assert repo_id == "someone/tied"
        if card.FILE not in self.files:
            raise EntryNotFoundError("no card")
        return ModelCard(self.files[card.FILE].decode())


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda _, *given, **named: fake.create_repo(*given, **named)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", lambda _, **named: fake.create_commit(**named))
    original = ModelCard.load

    def load(found: Any, **options: Any) -> ModelCard:
        return original(found, **options) if Path(found).exists() else fake.load_card(found, **options)

    monkeypatch.setattr(hub.ModelCard, "load", load)
    return fake


PUSHES: dict[str, Callable[[TwofoldForCausalLM, Path], object]] = {
    "push_to_hub": lambda model, folder: model.push_to_hub("tied", tags=["study"]),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder, push_to_hub=True, repo_id="tied"),
}


@pytest.mark.parametrize("push", PUSHES)
def test_what_is_pushed_has_the_card_and_loads(push: str, fake_hub: FakeHub, tmp_path: Path):
    model = drawn_model(LLAMA).float()
    for tie in ("first", "second"):
        with without_bars():
            PUSHES[push](model, tmp_path / tie)
        text = fake_hub.files[card.FILE].decode()
        assert card.is_made(text)
        assert f"`{model.config.tie}`" in text
        assert 'from_pretrained("someone/tied")' in text
        assert ModelCard(text).data.tags == ["twofold", "study"][: 2 if push == "push_to_hub" else 1]
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for name, content in fake_hub.files.items():
            (copy / name).write_bytes(content)
        again = TwofoldForCausalLM.from_pretrained(copy)
        tokens = drawn_tokens(1, 5)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        model = drawn_model(SPECS["untied"]).float()  # another model to the same place: the card follows it


@pytest.mark.parametrize("push", PUSHES)
def test_somebodys_card_on_the_hub_stays(push: str, fake_hub: FakeHub, tmp_path: Path):
    fake_hub.files[card.FILE] = b"---\nlicense: mit\n---\n# Mine\n"
    with without_bars():
        PUSHES[push](drawn_model(LLAMA), tmp_path)
    kept = ModelCard(fake_hub.files[card.FILE].decode())
    assert kept.text.strip() == "# Mine"
    assert kept.data.license == "mit"


@pytest.mark.parametrize("there", ["nothing", "somebody's", "made here"])
def test_somebodys_card_in_the_folder_stays(there: str, fake_hub: FakeHub, tmp_path: Path):
    (tmp_path / card.FILE).write_bytes(OWN)
    if there == "somebody's":
        fake_hub.files[card.FILE] = b"---\nlicense: mit\n---\n# Theirs\n"
    elif there == "made here":
        fake_hub.files[card.FILE] = card.card_text(GPT2, dtype="bf16").encode()
    with without_bars():
        PUSHES["save_pretrained"](drawn_model(LLAMA), tmp_path)
    assert (tmp_path / card.FILE).read_bytes() == OWN
    pushed = fake_hub.files[card.FILE]
    assert b"# Theirs" in pushed if there == "somebody's" else pushed == OWN


def test_what_transformers_writes_for_want_of_a_card_is_known():
    """If Transformers or the hub's library words it anew, cards would no longer be pushed in its place."""
    generic = ModelCard.from_template(
        huggingface_hub.ModelCardData(tags=["a"], library_name="transformers"), model_description=card._GENERIC
    )
    assert card.is_made(str(generic))
    assert not card.is_made(str(generic).replace("[More Information Needed]", "A model of mine.", 1))
    assert card._GENERIC in Path(hub.__file__).read_text(encoding="utf-8")


def test_a_configuration_without_a_model_is_pushed_as_ever(fake_hub: FakeHub):
    TwofoldConfig.from_spec(LLAMA).push_to_hub("tied")
    assert "config.json" in fake_hub.files
