"""Geometry of models: what is captured is what the model does, of ours and of Transformers'; measures beside random ones; the command."""

from __future__ import annotations

import inspect
import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from scipy.spatial import Delaunay
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner, Result

from docs_pages import ROOT
from twofold import TwofoldConfig, TwofoldForCausalLM, TwofoldForTokenClassification
from twofold.cli import COMMANDS, app
from twofold.errors import TwofoldError
from twofold.geometry import Question, others, ours, see
from twofold.geometry import open_model as open_it
from twofold.geometry.capture import capture
from twofold.geometry.page import first_view, html, picture
from twofold.geometry.paper import verdicts
from twofold.geometry.points import ALL, VALUES, head_points
from twofold.geometry.reading import Opened
from twofold.geometry.summary import MEASURES, Range, measure_layers

TEXT = "for word in words: count(word)"
QUICK = Question(text=TEXT * 3, tokens=80, context=40, shown=24, draws=8)


def model_of(**fields) -> TwofoldForCausalLM:
    """Weights as large as trained ones, so that attention is no mean of everything."""
    usual = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = TwofoldConfig(**(usual | {"initializer_range": 0.3} | fields))
    return TwofoldForCausalLM(config, initial_seed=3).eval()


def layers_of(model, rows, shown=20):
    indices = range(model.config.num_hidden_layers)
    return capture(lambda row: model(row, use_cache=False), ours.sources(model, indices), rows, shown=shown)


ROWS = [torch.arange(20) * 7 % 256, torch.arange(9) * 11 % 256]
SHARED = {"kind": "shared_rotary", "dim": 4}
KINDS = [
    {"tie": "(Q, K, V)"},
    {"tie": "(Q, K=V)", "positions": {"kind": "none"}},
    {"tie": "(Q=K=V)"},
    {"tie": "V = Q - K"},
    {"tie": "V = 2K"},
    {"tie": "(Q, K, V)", "num_key_value_heads": 2, "positions": {"kind": "rotary"}},
    {"tie": "(Q, K=V)", "num_key_value_heads": 2, "positions": {"kind": "rotary", "fraction": 0.5}, "qk_norm": True},
    {"tie": "(Q, K=V)", "num_key_value_heads": 1, "positions": {"kind": "rotary", "rotate": "stream"}},
    {"tie": "(Q, K=V)", "positions": {"kind": "rotary", "rotate": "stream"}, "qk_norm": True},
    {"tie": "(Q, K=V)", "positions": SHARED | {"key_dim": 4}},
    {"tie": "(Q, K=V)", "positions": SHARED, "window_tokens": [5], "use_bias": True},
    {"tie": "(Q, K=V)", "positions": {"kind": "relative_bias"}, "window_tokens": [0, 3]},
    {"tie": "(Q, K, V) | (Q, K=V)", "positions": {"kind": "learned", "length": 64}, "use_bias": True},
]


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_weights_and_output_are_the_models_own(fields):
    model = model_of(**fields)
    if "relative_bias" in str(fields):
        torch.nn.init.normal_(model.trunk.layers[0].attention.relative_bias)
    asked = model(ROWS[0][None], output_attentions=True, use_cache=False).attentions
    outputs = []
    for layer in model.trunk.layers:
        layer.attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0]))
    model(ROWS[0][None], use_cache=False)
    given = list(outputs)
    for index, layer in enumerate(layers_of(model, ROWS)):
        weights = asked[index][0].double()
        torch.testing.assert_close(layer.shown.weights[0], weights, atol=2e-5, rtol=1e-4)
        if not model.config.spec.positions.turns_stream:  # those outputs are turned back
            own = layer.shown.states[:, :, 1].transpose(0, 1).flatten(1)
            torch.testing.assert_close(own, given[index].double(), atol=2e-4, rtol=1e-3)
        expected = [-(w[t, : t + 1] * w[t, : t + 1].clamp(min=1e-30).log()).sum() for w in weights for t in range(20)]
        assert torch.isfinite(layer.entropy).all()
        if not any(model.config.spec.window_tokens):
            first = torch.stack(expected).view(len(weights), 20)[:, 1:] / (torch.arange(2, 21).double().log())
            shorter = layers_of(model, ROWS[:1])[index]
            torch.testing.assert_close(shorter.entropy, first.mean(dim=1), atol=1e-4, rtol=1e-3)


def test_a_window_counts_as_many_keys_as_it_shows():
    layer = layers_of(model_of(tie="(Q, K=V)", window_tokens=[3]), ROWS[:1])[0]
    assert (layer.shown.weights[0, 0] > 0).sum(dim=-1).tolist() == [1, 2] + [3] * 18
    assert layer.entropy.max() <= 1


def test_the_pull_is_that_of_a_hopfield_network():
    """ξ ← X softmax(β Xᵀ ξ), written out, of a layer without positions."""
    layer = layers_of(model_of(tie="(Q, K=V)", positions={"kind": "none"}), ROWS)[1]
    beta, head, token = 8**-0.5, 2, 17
    stored = layer.key[head, : token + 1].double().T
    state = layer.query[head, token].double()
    for step in range(1, ours.PULLS + 1):
        state = stored @ torch.softmax(beta * stored.T @ state, dim=0)
        torch.testing.assert_close(layer.shown.states[head, token, step], state, atol=1e-5, rtol=1e-4)


def test_a_stored_pattern_that_stands_out_is_where_the_pull_ends():
    model = model_of(tie="(Q, K=V)", num_hidden_layers=1, num_attention_heads=1, head_dim=32)
    torch.nn.init.normal_(model.trunk.layers[0].attention.k_proj.weight, std=2.0)
    (layer,) = layers_of(model, ROWS)
    assert layer.shown.weights[-1, 0, -1].max() > 0.99
    nearest = int(layer.shown.weights[-1, 0, -1].argmax())
    torch.testing.assert_close(layer.shown.states[0, -1, -1], layer.shown.value[0, nearest], atol=0.1, rtol=0.1)


def test_only_where_v_is_k_there_is_more_than_one_step():
    steps = {
        tie: layers_of(model_of(tie=tie), ROWS)[0].shown.weights.shape[0]
        for tie in ("(Q, K, V)", "V = 2K", "(Q, K=V)", "(Q=K=V)")
    }
    assert steps == {"(Q, K, V)": 1, "V = 2K": 1, "(Q, K=V)": ours.PULLS, "(Q=K=V)": ours.PULLS}


# Points


@pytest.mark.parametrize("tie", ["(Q, K=V)", "(Q, K, V)"])
def test_every_output_lies_in_the_hull_that_is_drawn(tie):
    layer = layers_of(model_of(tie=tie), ROWS)[0]
    points = head_points(layer, 1)
    assert set(points.views) == {ALL, VALUES}
    for view in points.views.values():
        values = next(cloud for name, cloud in view.clouds.items() if "V" in name).numpy()
        drawn = [token for token, hull in enumerate(view.hull_of) if hull >= 0]
        assert len(drawn) >= 16
        for token in drawn:
            corners = sorted({corner for face in view.hulls[view.hull_of[token]] for corner in face})
            assert max(corners) <= token
            mesh = Delaunay(values[corners])
            assert mesh.find_simplex(view.states[token, 1].numpy(), tol=1e-6) >= 0
    # A liar: the hull does not hold what lies beyond it.
    assert mesh.find_simplex(values.max(axis=0) * 2 + 1) < 0


def test_numbers_on_the_page_are_the_points_on_a_grid():
    layer = layers_of(model_of(tie="(Q, K=V)"), ROWS)[0]
    points = head_points(layer, 0)
    packed = points.packed()
    assert packed["map"][5] == [round(1000 * w) for w in points.weights[0, 5, :6].tolist()]
    assert len(packed["later"]) == ours.PULLS - 1
    view, numbers = points.views[ALL], packed["views"][ALL]
    middle, size = view.frame()
    assert set(numbers["clouds"]) == {"Q", "K=V"}
    back = torch.tensor(numbers["clouds"]["K=V"]).view(-1, 3) / 2000 * size + middle
    torch.testing.assert_close(back, view.clouds["K=V"], atol=size / 2000, rtol=0)
    assert max(map(abs, numbers["states"])) <= 2000
    assert json.loads(json.dumps(packed)) == packed


# Measures


def test_random_heads_obey_the_tie():
    rows = {row.measure.key: row for row in measure_layers(layers_of(model_of(tie="(Q, K=V)"), ROWS), draws=6)}
    for key in ("cos_kv", "cka_kv", "overlap_kv", "cos_weights"):
        assert rows[key].is_given
        assert rows[key].mean == pytest.approx(1)
        assert rows[key].outside == 0
    assert not rows["cos_qk"].is_given
    rows = {row.measure.key: row for row in measure_layers(layers_of(model_of(tie="V = Q - K"), ROWS), draws=40)}
    # cos(K, Q - K) of unrelated Q and K of one size is -√½.
    assert rows["cos_weights"].pooled.mean == pytest.approx(-math.sqrt(0.5), abs=0.03)


def test_a_model_that_was_never_trained_is_not_told_from_random():
    layers = layers_of(model_of(tie="(Q, K, V)", hidden_size=64, num_attention_heads=8), ROWS)
    rows = measure_layers(layers, draws=80)
    told = {row.measure.key: (row.outside, len(row.all_values)) for row in rows if row.measure.per != "layer"}
    for key in ("cos_weights", "cos_kv", "cos_qk", "cka_kv", "overlap_kv", "symmetry_qk"):
        outside, of = told[key]
        assert of == 16
        assert outside <= 5, key
    for row in rows:  # effective ranks of weights hardly vary: near, not necessarily within
        if row.measure.key.startswith("rank_w"):
            assert row.mean == pytest.approx(row.pooled.mean, abs=0.02)


def test_a_mean_over_heads_is_held_against_means_over_random_heads():
    """Over 16 heads it varies a quarter as much as one head: 0.05 lies within what a random head has, and far beyond what their mean has."""
    model = model_of(tie="(Q, K, V)", hidden_size=64, num_attention_heads=8)
    layers = layers_of(model, ROWS)
    rows = {row.measure.key: row for row in measure_layers(layers, draws=200)}
    for key in ("cos_weights", "symmetry_qk"):
        single, mean = rows[key].pooled, rows[key].of_mean
        assert mean.mean == pytest.approx(single.mean, abs=0.01)
        assert (mean.high - mean.low) / (single.high - single.low) == pytest.approx(1 / 4, abs=0.06)
    with torch.no_grad():
        for layer in model.trunk.layers:
            part = layer.attention
            part.v_proj.weight.add_(0.05 * part.k_proj.weight)
    row = {row.measure.key: row for row in measure_layers(layers_of(model, ROWS), draws=200)}["cos_weights"]
    assert row.pooled.holds(row.mean)
    assert not row.of_mean.holds(row.mean)


def test_what_training_made_alike_is_told_from_random():
    model = model_of(tie="(Q, K, V)", hidden_size=64)
    with torch.no_grad():
        for layer in model.trunk.layers:
            layer.attention.v_proj.weight.copy_(layer.attention.k_proj.weight)
    rows = {row.measure.key: row for row in measure_layers(layers_of(model, ROWS), draws=30)}
    for key in ("cos_weights", "cos_kv", "cka_kv", "overlap_kv"):
        assert rows[key].mean == pytest.approx(1)
        assert rows[key].outside == len(rows[key].all_values) == 8
        assert not rows[key].is_given


def test_draws_are_those_of_their_seed():
    layers = layers_of(model_of(tie="(Q, K, V)"), ROWS)
    pooled = [
        [row.pooled for row in measure_layers(layers, draws=4, seed=seed) if row.pooled.draws] for seed in (1, 1, 2)
    ]
    assert pooled[0] == pooled[1] != pooled[2]


def test_grouped_queries_are_measured_with_their_own_keys():
    layer = layers_of(model_of(tie="(Q, K, V)", num_key_value_heads=2), ROWS)[0]
    rows = {row.measure.key: row for row in measure_layers([layer], draws=2)}
    assert {key: len(row.values[0]) for key, row in rows.items() if not key.startswith(("rank", "peak"))} == {
        "cos_weights": 2, "cos_kv": 2, "cka_kv": 2, "overlap_kv": 2, "cos_qk": 4, "cos_qv": 4, "symmetry_qk": 4, "entropy": 4,
    }  # fmt: skip
    by_hand = torch.nn.functional.cosine_similarity(layer.query[3], layer.key[1], dim=-1).mean()
    assert rows["cos_qk"].values[0][3] == pytest.approx(float(by_hand), abs=1e-5)


# Published figures


class Said:
    """A row with a mean and the range of random means."""

    def __init__(self, key: str, mean: float, low: float, high: float, *, is_given: bool = False) -> None:
        self.measure = next(measure for measure in MEASURES if measure.key == key)
        self.mean, self.is_given = mean, is_given
        self.of_mean = Range(mean=(low + high) / 2, low=low, high=high, draws=9)


@pytest.mark.parametrize(
    ("mean", "low", "high", "is_given", "comes_out", "words"),
    [
        (0.75, -0.1, 0.1, False, True, "Comes out, and random projections do not give it."),
        (0.75, 0.6, 0.9, False, True, "Comes out, and so it does for random projections: it says nothing of training."),
        (
            0.75,
            0.66,
            0.70,
            False,
            True,
            "Comes out, and so it does for random projections: it says nothing of training.",
        ),
        (0.02, -0.1, 0.1, False, False, "Does not come out: what is here is what random projections give."),
        (
            0.40,
            -0.1,
            0.1,
            False,
            False,
            "Does not come out: it is more than random projections give, and not what was published.",
        ),
        (
            -0.4,
            -0.1,
            0.1,
            False,
            False,
            "Does not come out: it is less than random projections give, and not what was published.",
        ),
        (
            0.56,
            0.66,
            0.85,
            False,
            False,
            "Does not come out: it is less than random projections give, which give what was published.",
        ),
        (1.00, 1.0, 1.0, True, None, "Not asked: this model's tie makes it 1.00."),
    ],
)
def test_a_published_figure_comes_out_or_not_and_is_held_against_random(mean, low, high, is_given, comes_out, words):
    (verdict,) = verdicts([Said("cos_kv", mean, low, high, is_given=is_given)])
    assert verdict.figure.value == 0.73
    assert (verdict.comes_out, verdict.sentence) == (comes_out, words)


# Transformers' models

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "intermediate_size": 48,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
FOREIGN = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 256},
    "llama": GROUPED | {"head_dim": 8},
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 6},
    "phi3": GROUPED | {"pad_token_id": 0},
    "gpt_neox": SMALL,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 256},
    "opt": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 256, "word_embed_proj_dim": 32},
}  # fmt: skip


def foreign(kind: str):
    torch.manual_seed(5)
    config = CONFIG_MAPPING[kind](**FOREIGN[kind], initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", FOREIGN)
def test_projections_of_transformers_models_are_found(kind):
    """From the projections that were found, and the model's weights, follows what the model adds to its stream."""
    model = foreign(kind)
    sources = others.sources(model, range(3))
    given = {}
    names = ("o_proj", "c_proj", "dense", "out_proj")
    for source in sources:
        out = next(part for name, part in source.attends.named_children() if name in names)
        out.register_forward_pre_hook(lambda _, args, index=source.index: given.update({index: args[0][0]}))
    layers = capture(lambda row: model.base_model(row, use_cache=False), sources, ROWS[:1], shown=20)
    for layer in layers:
        own = layer.shown.states[:, :, 1].transpose(0, 1).flatten(1)
        torch.testing.assert_close(own, given[layer.index].double(), atol=1e-4, rtol=1e-3)
        assert layer.query.shape[0] == 4
        assert layer.entropy.max() <= 1
    # The queries and keys themselves: for a model without positions in attention, weights follow from them.
    if kind in ("gpt2", "opt"):
        logits = layers[1].query @ layers[1].key.transpose(-1, -2) / math.sqrt(8)
        weights = torch.softmax(logits.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf), dim=-1)
        torch.testing.assert_close(weights.double(), layers[1].shown.weights[0], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders of models: ours, GPT-2's, one with unknown attention."""
    base = tmp_path_factory.mktemp("models")
    model_of(tie="(Q, K=V)", positions={"kind": "rotary"}).save_pretrained(base / "tied")
    model_of(tie="(Q, K, V)", hidden_size=64).save_pretrained(base / "untied")
    foreign("gpt2").save_pretrained(base / "gpt2")
    falcon = CONFIG_MAPPING["falcon"](hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=256)
    AutoModelForCausalLM.from_config(falcon).save_pretrained(base / "falcon")
    return base


def test_a_transformers_model_is_opened_and_measured_with_an_untrained_one(saved):
    found = see(open_it(saved / "gpt2"), QUICK)
    told = found.to_dict()
    assert told["model"]["class"] == "GPT2LMHeadModel"
    assert told["untrained"]
    assert [layer.tie for layer in found.layers] == ["(Q, K, V)"] * 3
    for row in told["measures"]:
        assert math.isfinite(row["untrained"])
    assert "gpt2" in html(found, "twofold geometry gpt2")


def test_layers_are_chosen_and_spread():
    class Deep:
        num_layers = 40

    assert Opened.layers(Deep(), ()) == [0, 6, 11, 17, 22, 28, 33, 39]
    assert Opened.layers(Deep(), (7, 3, 7)) == [3, 7]


# The command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["geometry", *arguments], prog_name="twofold")


FAST = ["--draws", "4", "--tokens", "64", "--context", "32", "--shown", "16"]


def test_the_command_writes_a_page_and_prints_the_measures(saved, tmp_path):
    page, drawn = tmp_path / "new" / "page.html", tmp_path / "picture.svg"
    done = invoke(str(saved / "tied"), *FAST, "--output", str(page), "--picture", str(drawn), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {row["key"] for row in told["measures"]} >= {
        "cos_kv",
        "cka_kv",
        "overlap_kv",
        "entropy",
        "peak_last",
        "rank_v",
    }
    assert told["text"] == told["text"] | {"tokens": 64, "context": 32, "shown": 16}
    assert told["draws"] == 4
    assert re.match(r"twofold geometry \S+tied --shown 16 --tokens 64 --context 32 --draws 4 --output", told["command"])
    text = page.read_text()
    assert not re.search(r"""(?:src|href)=["']?https?:(?!//arxiv\.org/abs/)""", text)
    assert drawn.read_text().startswith("<svg")
    again = tmp_path / "again.html"
    assert invoke(str(saved / "tied"), *FAST, "--output", str(again)).exit_code == 0
    assert again.read_text().replace("again.html", "") == text.replace("new/page.html", "")
    shown = invoke(str(saved / "untied"), *FAST, "--output", str(again), "--layer", "1", "--head", "2").stdout
    assert "CKA(K, V)" in shown
    assert str(again) in shown.replace("\n", "")


def test_the_text_of_a_page_cannot_end_its_script(saved):
    hostile = "</script><script>alert(1)</script> & <b>"
    found = see(open_it(saved / "tied"), Question(text=hostile, tokens=64, shown=48, draws=2))
    text = html(found, f"twofold geometry tied --text '{hostile}'")
    assert "alert(1)</script>" not in text
    data = json.loads(re.search(r'id="geometry-data">(.*?)</script>', text)[1])
    assert "".join(data["pieces"]) == hostile


def test_bytes_that_are_no_letter_are_shown_as_numbers(saved):
    assert open_it(saved / "tied").pieces(list("aé".encode())) == ["a", "\\xc3", "\\xa9"]


def test_the_page_opens_with_a_query_that_looks_at_something(saved):
    found = see(open_it(saved / "untied"), QUICK)
    layer, head, token = first_view(found)
    assert (layer, head) in found.heads
    assert token >= 12
    assert "query" in picture(found)


def test_a_page_of_a_run_says_how_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(TEXT * 100)
    training = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--option",
        "path=words.txt",
        "--option",
        "context=32",
        "--layers",
        "1",
    ]
    done = CliRunner().invoke(app, ["train", "--task", "text", *training, "--folder", "runs/words", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    told = json.loads(invoke("runs/words", *FAST, "--json").stdout)
    assert told["model"]["name"] == "words"
    assert told["run"]["training"]["steps"] == 2
    outcome = json.loads(Path("runs/words/outcome.json").read_text())
    assert told["run"]["data_hash"] == outcome["data_hash"]
    assert told["command"].startswith("twofold geometry runs/words --shown 16")
    page = Path("geometry.html").read_text()
    assert outcome["data_hash"] in page
    assert "2 steps of 2 examples of text, seed 0" in page


def test_measures_are_quoted_as_they_were_printed(saved, tmp_path):
    quote = runpy.run_path(str(ROOT / "docs" / "quote.py"))
    page, kept = tmp_path / "docs" / "geometry.md", tmp_path / "docs" / "results" / "geometry"
    kept.mkdir(parents=True)
    page.write_text(
        "<!-- geometry: tied -->\nold\n<!-- end -->\n<!-- published: tied -->\nold\n<!-- end -->\n<!-- geometry: none -->\n<!-- end -->\n"
    )
    told = invoke(str(saved / "tied"), *FAST, "--output", str(tmp_path / "page.html"), "--json").stdout
    (kept / "tied.json").write_text(told)
    text = quote["quoted"](page, tmp_path)
    assert "old" not in text
    assert text.endswith(f"<!-- geometry: none -->\n{quote['NOT_RUN']}\n<!-- end -->\n")
    assert "| cos(K, V) | 1.00 | 1.00 to 1.00 | the same, by the tie |  | 1.00 |" in text
    assert "| cos(K, V) | 0.73 (0.73) | 1.00 | " in text
    entropy = next(row for row in json.loads(told)["measures"] if row["key"] == "entropy")
    assert f"| attention entropy | {entropy['mean']:.2f} | {entropy['low']:.2f} to {entropy['high']:.2f} |" in text


def test_what_is_usual_is_said_in_one_place():
    """The options' defaults are the question's: a page's command leaves out what is as usual."""
    options, usual = inspect.signature(COMMANDS["geometry"].command).parameters, Question(text="")
    for name in ("shown", "tokens", "context", "draws", "seed"):
        assert options[name].default == getattr(usual, name), name


def mistakes(base: Path) -> dict[str, tuple[list[str], str]]:
    (base / "empty.txt").write_text("")
    (base / "latin.txt").write_bytes("é".encode("latin-1"))
    (base / "none").mkdir(exist_ok=True)
    (base / "pickle").mkdir(exist_ok=True)
    (base / "pickle" / "config.json").write_text((base / "gpt2" / "config.json").read_text())
    (base / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    (base / "strange").mkdir(exist_ok=True)
    (base / "strange" / "config.json").write_text('{"model_type": "strange"}')
    (base / "strange" / "model.safetensors").write_bytes((base / "gpt2" / "model.safetensors").read_bytes())
    return {
        "two texts": (["tied", "--text", "a", "--file", "empty.txt"], "--text and --file both give a text"),
        "no file": (["tied", "--file", "nowhere.txt"], "There is no file nowhere.txt to read"),
        "empty file": (["tied", "--file", "empty.txt"], "empty.txt is empty"),
        "not utf-8": (["tied", "--file", "latin.txt"], "latin.txt is not UTF-8 text"),
        "short": (
            ["tied", "--text", "abc"],
            "The text has 3 tokens, too few to see anything in: give one of at least 8.",
        ),
        "layer": (
            ["tied", "--layer", "2"],
            "There is no layer 2: the model's 2 attention layers are counted from 0 to 1.",
        ),
        "head": (["tied", "--head", "9"], "There is no head 9: the 4 query heads are counted from 0 to 3."),
        "no model": (["none"], "There is no model in none"),
        "no folder": (["nowhere"], "There is no model in nowhere: it is not a folder."),
        "pickle": (["pickle"], "is a pickle, which can run any code"),
        "unknown": (
            ["falcon"],
            "It is not known where a falcon model keeps its projections: known are three projections",
        ),
        "strange": (["strange"], "cannot be read by Transformers"),
    }


def test_mistakes_are_one_sentence(saved, monkeypatch):
    monkeypatch.chdir(saved)
    for name, (arguments, sentence) in mistakes(saved).items():
        done = invoke(*arguments, *FAST)
        assert (done.exit_code, done.stdout) == (2, ""), (name, done.output)
        assert sentence in " ".join(done.stderr.split()), (name, done.stderr)
        assert len(done.stderr.splitlines()) == 1, (name, done.stderr)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_loaded(saved, monkeypatch):
    class Memory:
        available = 100

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    with pytest.raises(TwofoldError, match="GiB of memory are free: free some"):
        open_it(saved / "gpt2")


def test_a_layer_without_weights_to_show_is_refused(saved):
    model = foreign("gpt2")
    model.set_attn_implementation("sdpa")
    with pytest.raises(TwofoldError, match="GPT2Attention does not give its attention weights"):
        capture(lambda row: model.base_model(row), others.sources(model, [0]), ROWS, shown=4)


def test_an_unused_layer_is_refused():
    model = foreign("gpt2")
    with pytest.raises(TwofoldError, match="Layer 1 was not used"):
        capture(lambda row: None, others.sources(model, [1]), ROWS, shown=4)


def test_a_latent_is_not_shown():
    with pytest.raises(TwofoldError, match="Layer 4 attends by Linear, whose keys and values are not linear"):
        ours.OwnLayer(4, torch.nn.Linear(2, 2))


def test_a_classifier_reads_no_text(tmp_path):
    config = TwofoldConfig(architecture="token_classification", vocab_size=11, num_labels=3, hidden_size=8, num_attention_heads=2, causal=False)  # fmt: skip
    TwofoldForTokenClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(
        TwofoldError, match="is a token_classification: the page is made from a text, so it needs a causal_lm"
    ):
        open_it(tmp_path / "classifier")
