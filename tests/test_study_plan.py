"""Plans: what is refused and in which words, grids, what a plan expands to, and that the built-in studies hold what they claim."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from study_fixture import PLAN, ask
from twofold.cost import cached_floats_per_token, parameters, training_flops_per_token
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec
from twofold.study import plan as plans
from twofold.study.expansion import TaskAnswer, expand
from twofold.study.plan import StudyPlan, load_plan, parse_plan
from twofold.study.record import Entry, PlannedRun, TaskFacts
from twofold.task_spec import TaskSpec
from twofold.training.spec import RunSpec

RESULTS = Path(__file__).parent.parent / "docs" / "results"
TUNED = {"name": "rate", "tune": True, "points": [{"name": "a"}, {"name": "b"}]}
NAMED = {"name": "T", "points": [{"name": "b"}]}

Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> str:
    values = copy.deepcopy(PLAN)
    change(values)
    return yaml.safe_dump(values, sort_keys=False)


MISTAKES: list[tuple[Change, str]] = [
    (lambda v: v.pop("seeds"), "study.yaml: seeds is missing; add it."),
    (lambda v: v["variants"][1].pop("name"), "study.yaml: variants[1].name is missing; add it."),
    (lambda v: v.update(varients=[]), "study.yaml: varients is not known; the fields there are name, title, question,"),
    (lambda v: v["variants"][2].update(knid="tie"), "study.yaml: variants[2] (qk-tied).knid is not known; the fields there are name, label,"),
    (lambda v: v["variants"][4]["matches"][0].update(on="cache"), "variants[4] (gqa-2).matches[0].on is not known; the fields there are variant, in."),
    (lambda v: v["variants"][1].update(kind="rival"), "variants[1] (kv-tied).kind is 'rival', but it should be 'tie' or 'control'."),
    (lambda v: v["variants"][4].pop("note"), "variants[4] (gqa-2) is a control without a note: say in note what it controls for."),
    (lambda v: v["variants"][1]["model"].update(hiden_size=4), "model holds 'hiden_size', but a model has no such field: did you mean 'hidden_size'?"),
    (lambda v: v["training"].update(setps=4), "training holds 'setps', but training has no such field: did you mean 'steps'?"),
    (lambda v: v["tasks"][0].update(training={"zzz": 1}), "holds 'zzz', but training has no such field: its fields are steps,"),
    (lambda v: v.update(seeds=[]), "seeds is [], but"),
    (lambda v: v.update(seeds=[0, 1.5]), "seeds[1] is 1.5, but"),
    (lambda v: v.update(seeds=[0, 0]), "study.yaml: seeds holds 0 twice: give each its own."),
    (lambda v: v.update(seeds=[-1]), "seeds[0] is -1, but it should be greater than or equal to 0."),
    (lambda v: v["variants"].append(v["variants"][0]), "variants holds 'mha' twice: give each its own."),
    (lambda v: v["tasks"].append(v["tasks"][0]), "tasks holds 'bytes' twice: give each its own."),
    (lambda v: v.update(reference="mah"), "reference names 'mah', which is no variant: use one of mha, kv-tied,"),
    (lambda v: v["variants"][4]["matches"][0].update(variant="kv"), "gqa-2's matches names 'kv', which is no variant:"),
    (lambda v: v["tasks"][0].update(variants=["mha", "nope"]), "task bytes names 'nope', which is no variant:"),
    (lambda v: v["tasks"][0].update(variants=["kv-tied"]), "task bytes leaves out mha, the reference: add it to the task's variants."),
    (lambda v: v["tasks"][0].update(variant_models={"nope": {}}), "task bytes names 'nope', which is no variant:"),
    (lambda v: v["tasks"][0].update(variant_models={"mha": {"a": 1}}), "holds 'a', but a model has no such field"),
    (lambda v: v["tasks"][0].update(name="../up"), "tasks[0] (../up).name is '../up', but"),
    (lambda v: v.update(grid=[{"name": "T", "points": []}]), "grid[0] (T).points is [], but"),
    (lambda v: v.update(grid=[{"name": "T", "points": [{"name": "a"}]}] * 2), "the grid of task bytes holds 'T' twice"),
    (lambda v: v.update(grid=[{"name": "T", "points": [{"name": "a"}, {"name": "a"}]}]), "tasks holds 'bytes-a' twice"),
    (lambda v: v.update(grid=[{"name": "T", "tune": "yes", "points": [{"name": "a"}]}]), "grid[0] (T).tune is 'yes', but it should be a valid boolean."),
    (lambda v: v.update(tuning_seeds=[0]), "has tuning_seeds, but no axis of a grid with tune = true: add one or leave them out."),
    (lambda v: v.update(tuning_seeds=[3, 3], grid=[TUNED]), "tuning_seeds holds 3 twice: give each its own."),
    (lambda v: v.update(tasks=[v["tasks"][0] | {"grid": [TUNED]}, v["tasks"][0] | {"name": "bytes-b"}, v["tasks"][0] | {"grid": [NAMED]}]), "tasks holds 'bytes' twice"),
    (lambda v: v.update(tasks=[v["tasks"][0] | {"grid": [TUNED, NAMED]}, v["tasks"][0] | {"name": "bytes-b"}]), "tasks holds 'bytes-b' twice, once as a task without its tuned axes: rename one."),
    (lambda v: v["variants"][4].update(ties=["(Q, K, V)"]), "(gqa-2) has ties, and matches or expect: what a control claims is of one model"),
    (lambda v: v["variants"][1].update(ties=["(Q, K, V)"]), "variants[1] (kv-tied) has ties and model.tie: leave one of them out."),
    (lambda v: v["variants"][0].update(ties=["(Q, K"]), "variants[0] (mha) holds '(Q, K', which is no tie: "),
    (lambda v: v["variants"][0].update(ties=["K = V", "(Q, K=V)"]), "holds the tie 'K = V' twice, perhaps in other words: leave one out."),
    (lambda v: v["variants"][0].update(ties=["(Q, K=V) | " * 9 + "(Q, K, V)", "(Q, K=V) | (Q=K, V) | " * 9 + "(Q, K, V)"]), "which is too long to be part of a name"),
    (lambda v: v["variants"].append({"name": "many", "ties": ["(Q, K=V)"]}) or v["variants"].append({"name": "many-Q.KV"}), "variants holds 'many-Q.KV' twice"),
    (lambda v: v["variants"].append({"name": "many", "ties": ["(Q, K=V)"]}) or v["variants"].append({"name": "many"}), "variants holds 'many' twice"),
    (lambda v: v["variants"][1].update(expect={"variant": "mha", "outcome": "worse"}), "(kv-tied) promises an outcome in expect, so it is a control: add kind"),
    (lambda v: v["variants"][4].update(expect={"variant": "mah", "outcome": "worse"}), "gqa-2's expect names 'mah', which is no variant:"),
    (lambda v: v["variants"][4].update(expect={"variant": "mha", "outcome": "better"}), "variants[4] (gqa-2).expect.outcome is 'better', but it should be 'same' or 'worse'."),
    (lambda v: v["variants"][4].update(expect={"variant": "mha", "is": "same"}), "variants[4] (gqa-2).expect.outcome is missing; add it."),
    (lambda v: v["variants"][4].update(expect={"variant": "mha", "outcome": "same", "is": 1}), "(gqa-2).expect.is is not known; the fields there are variant, outcome."),
    (lambda v: v["variants"][1].update(seed_shift=1), "kv-tied's seed_shift of 1 makes 0 into 1, which is a seed of the study already: shift further."),
    (lambda v: v["variants"][1].update(seed_shift=-1), "(kv-tied).seed_shift is -1, but it should be greater than or equal to 0."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), MISTAKES, ids=[sentence[:60] for _, sentence in MISTAKES])
def test_a_mistake_in_a_plan_is_one_sentence_that_names_file_and_place(change: Change, sentence: str):
    with pytest.raises(TwofoldError) as caught:
        parse_plan(changed(change), "study.yaml")
    told = str(caught.value)
    assert sentence in told
    assert told.startswith("study.yaml: ")
    assert told.endswith(".")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "name = ", "a.toml is not TOML: "),
        ("a.yaml", "name: [", "a.yaml is not YAML: "),
        ("a.yaml", "- 1", "a.yaml holds no study: it must hold name, title,"),
        ("a.yaml", "", "a.yaml holds no study"),
        ("a.txt", "name: x", "is neither TOML nor YAML by its name: a study's file ends in .toml, .yaml or .yml."),
    ],
)
def test_a_file_that_holds_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, sentence: str
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(TwofoldError) as caught:
        load_plan(name)
    assert sentence in str(caught.value)


def test_a_study_that_is_not_there(tmp_path: Path):
    with pytest.raises(TwofoldError, match=r"no built-in study 'smkoe': use one of .*capability, .*laptop,"):
        load_plan("smkoe")
    with pytest.raises(TwofoldError, match=r"gone\.toml cannot be read: No such file or directory\."):
        load_plan(tmp_path / "gone.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TwofoldError, match=r"bytes\.toml cannot be read: "):
        load_plan(tmp_path / "bytes.toml")


def test_toml_and_yaml_say_the_same_and_a_plan_survives_json(tmp_path: Path):
    written = plans.builtin("laptop")
    path = tmp_path / "laptop.yaml"
    path.write_text(yaml.safe_dump(written.to_dict()))
    read = load_plan(path)
    assert read == written
    assert read.plan_hash == written.plan_hash
    assert StudyPlan.model_validate({**written.to_dict(), "seeds": [0, 1]}).plan_hash != written.plan_hash


# Expansion


def plan(**changes: Any) -> StudyPlan:
    return StudyPlan.model_validate({**copy.deepcopy(PLAN), **changes})


def test_fields_of_a_model_come_from_plan_task_entry_grid_and_variant_the_later_winning():
    grid = [
        {
            "name": "depth",
            "points": [
                {"name": "L1", "model": {"num_hidden_layers": 1}, "options": {"context": 32}, "training": {"steps": 7}},
                {"name": "L4", "model": {"num_hidden_layers": 4}, "variant_models": {"mqa": {"intermediate_size": 7}}},
            ],
        }
    ]
    facts, entries = expand(plan(grid=grid), ask)
    assert list(facts) == ["bytes-L1", "bytes-L4", "recall-L1", "recall-L4"]
    assert facts["recall-L4"].points == {"depth": "L4"}
    assert (facts["recall-L4"].group, facts["recall-L4"].title) == ("recall", "Associative recall, L4")
    by_name = {(entry.task, entry.variant): entry for entry in entries}
    assert len(by_name) == len(entries) == 4 * 6
    mqa = by_name["recall-L4", "mqa"].run
    assert mqa["model"]["num_hidden_layers"] == 4
    assert mqa["model"]["hidden_size"] == 64
    assert mqa["model"]["vocab_size"] == 64
    assert mqa["model"]["num_key_value_heads"] == 1
    assert mqa["model"]["intermediate_size"] == 7
    small = by_name["bytes-L1", "mha"].run
    assert small["task"]["options"] == {"context": 32}
    assert small["training"]["steps"] == 7
    assert small["model"]["intermediate_size"] == 128
    for entry in entries:
        for seed, fingerprint in entry.fingerprints.items():
            assert RunSpec.from_dict({**entry.run, "seed": seed}).fingerprint == fingerprint
        spec = ModelSpec.from_dict(entry.run["model"])
        assert entry.parameters == parameters(spec)
        assert entry.cached_floats_per_token == cached_floats_per_token(spec)
        assert entry.cached_bytes_per_token == 2 * entry.cached_floats_per_token


def test_a_task_is_asked_once_for_each_of_its_options():
    asked: list[TaskSpec] = []

    def note(spec: TaskSpec) -> TaskAnswer:
        asked.append(spec)
        return ask(spec)

    depth = {"name": "depth", "points": [{"name": "L1", "model": {"num_hidden_layers": 1}}, {"name": "L2"}]}
    length = {
        "name": "length",
        "points": [{"name": "T8", "options": {"length": 8}}, {"name": "T9", "options": {"length": 9}}],
    }
    expand(plan(grid=[depth, length], tasks=[PLAN["tasks"][1]]), note)
    assert [spec.options for spec in asked] == [{"length": 8}, {"length": 9}]


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ({"model": {"num_key_value_heads": 1}, "matches": [{"variant": "kv-tied", "in": "cache"}]},
         "On task bytes, liar has 32 cached floats per token and kv-tied, which it says it matches, has 64: change its heads or sizes"),
        ({"model": {"tie": "(Q, K=V)"}, "matches": [{"variant": "mha", "in": "parameters"}]},
         "which it says it matches, has"),
        ({"model": {"tie": "(Q, K=V)"}, "matches": [{"variant": "mha", "in": "flops"}]},
         "operations of training per token and mha, which it says it matches, has"),
        ({"expect": {"variant": "mha", "outcome": "same"}},
         "On task bytes, liar is mha again, with the same seeds, so what it expects cannot fail: give it a seed_shift"),
        ({"model": {"num_key_value_heads": 3}}, "In task bytes, variant liar: "),
        ({"model": {"tie": "(Q=K, V)", "num_key_value_heads": 2}}, "In task bytes, variant liar: "),
        ({"model": {"tie": "(Q, K"}}, "In task bytes, variant liar: "),
        ({"model": {"hidden_size": "wide"}}, "In task bytes, variant liar: "),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_or_is_not_what_it_claims_is_refused(variant: dict[str, Any], sentence: str):
    liar = {"name": "liar", "kind": "control", "note": "for the test", **variant}
    with pytest.raises(TwofoldError) as caught:
        expand(plan(variants=[*PLAN["variants"], liar]), ask)
    assert sentence in str(caught.value)


def test_a_claim_of_equal_parameters_allows_one_per_cent_and_of_equal_cache_nothing():
    mha = parameters(ModelSpec.from_dict({**PLAN["model"], "vocab_size": 256}))

    def spent_on_mlp(intermediate_size: int) -> dict[str, Any]:
        model = {"tie": "(Q, K=V)", "intermediate_size": intermediate_size}
        return {
            "name": "wide",
            "kind": "control",
            "note": "n",
            "model": model,
            "matches": [{"variant": "mha", "in": "parameters"}],
        }

    only_bytes = [PLAN["tasks"][0]]
    accepted = []
    for size in range(130, 160):
        study_plan = plan(variants=[*PLAN["variants"], spent_on_mlp(size)], tasks=only_bytes)
        own = parameters(
            ModelSpec.from_dict({**PLAN["model"], "vocab_size": 256, "tie": "(Q, K=V)", "intermediate_size": size})
        )
        try:
            expand(study_plan, ask)
        except TwofoldError:
            assert abs(own - mha) > 0.01 * mha
        else:
            assert abs(own - mha) <= 0.01 * mha
            accepted.append(size)
    assert 0 < len(accepted) < 30


@pytest.mark.parametrize(
    "training",
    [{"steps": 0, "batch_size": 1, "learning_rate": 1.0}, {"steps": 1}, {**PLAN["training"], "steps": "many"}],
)
def test_training_that_cannot_be_is_refused_with_its_task(training: dict[str, Any]):
    with pytest.raises(TwofoldError, match=r"^In task bytes: "):
        expand(plan(training=training), ask)


def test_a_variant_that_a_task_leaves_out_need_not_fit_it():
    plus = {"name": "plus", "model": {"tie": "(Q=K, V)+"}}  # a causal model cannot have it
    causal = {**PLAN["tasks"][0], "variants": ["mha", "kv-tied"]}
    _, entries = expand(plan(variants=[*PLAN["variants"], plus], tasks=[causal]), ask)
    assert [entry.variant for entry in entries] == ["mha", "kv-tied"]
    with pytest.raises(TwofoldError, match="variant plus: "):
        expand(plan(variants=[*PLAN["variants"], plus]), ask)


def test_a_claim_of_equal_operations_counts_what_training_costs():
    per_token = training_flops_per_token(ModelSpec.from_dict({**PLAN["model"], "vocab_size": 256}), 64)
    accepted = []
    for size in range(128, 160):
        model = {"tie": "(Q, K=V)", "intermediate_size": size}
        claim = {
            "name": "wide",
            "kind": "control",
            "note": "n",
            "model": model,
            "matches": [{"variant": "mha", "in": "flops"}],
        }
        own = training_flops_per_token(ModelSpec.from_dict({**PLAN["model"], "vocab_size": 256, **model}), 64)
        is_near = abs(own / per_token - 1) <= 0.01
        with nullcontext() if is_near else pytest.raises(TwofoldError, match="operations of training"):
            expand(plan(variants=[*PLAN["variants"], claim], tasks=[PLAN["tasks"][0]]), ask)
        accepted += [size] * is_near
    assert 0 < len(accepted) < 32


# Families, shifted seeds, tuned axes


def test_a_family_is_one_variant_for_each_tie():
    family = {
        "name": "plane", "ties": ["(Q,K,V)", "V = Q - K", "2 V = K + Q", "(Q=K,V) | (Q,K=V)", "K = 2Q; V = -Q"],
        "kind": "control", "note": "n", "model": {"hidden_size": 48},
    }  # fmt: skip
    only = {**PLAN["tasks"][0], "variants": ["mha", "plane"], "variant_models": {"plane": {"intermediate_size": 7}}}
    study_plan = plan(variants=[*PLAN["variants"], family], tasks=[only])
    made = {variant.name: variant for variant in study_plan.variants if variant.family == "plane"}
    assert {name: variant.label for name, variant in made.items()} == {
        "plane-Q.K.V": "(Q, K, V)", "plane-V.is.Q-K": "V = Q - K", "plane-2V.is.Q+K": "2V = Q + K",
        "plane-QK.V-then-Q.KV": "(Q=K, V) | (Q, K=V)", "plane-K.is.2Q-and-V.is.-Q": "K = 2Q; V = -Q",
    }  # fmt: skip
    assert StudyPlan.model_validate(study_plan.to_dict()) == study_plan
    _, entries = expand(study_plan, ask)
    assert [entry.variant for entry in entries] == ["mha", *made]
    for entry in entries[1:]:
        assert (entry.kind, entry.run["model"]["hidden_size"], entry.run["model"]["intermediate_size"]) == (
            "control",
            48,
            7,
        )
        assert entry.tie == entry.label == made[entry.variant].label
    labelled = plan(variants=[*PLAN["variants"], family | {"label": "narrow"}], tasks=[only])
    assert labelled.variant("plane-V.is.Q-K").label == "V = Q - K, narrow"


def test_a_shifted_seed_trains_another_run_under_the_same_name():
    again = {
        "name": "again", "kind": "control", "note": "n", "seed_shift": 1000,
        "expect": {"variant": "mha", "outcome": "same"},
    }  # fmt: skip
    study_plan = plan(variants=[*PLAN["variants"], again])
    _, entries = expand(study_plan, ask)
    by_variant = {entry.variant: entry for entry in entries if entry.task == "bytes"}
    shifted, plain = (PlannedRun(entry=by_variant[name], seed=1) for name in ("again", "mha"))
    assert shifted.path == "bytes/again/seed-1"
    assert (shifted.run.seed, plain.run.seed) == (1001, 1)
    assert shifted.run.to_dict() | {"seed": 1} == plain.run.to_dict()
    assert shifted.fingerprint == shifted.run.fingerprint != plain.fingerprint


def test_a_tuned_plan_counts_its_runs_and_names_its_settings():
    tuned = plan(grid=[NAMED, TUNED], tuning_seeds=[1, 9])
    assert [task.setting for task in tuned.planned_tasks] == ["bytes-b", "bytes-b", "recall-b", "recall-b"]
    assert tuned.planned_tasks[0].setting_title == "Bytes of source text"  # the only point of its axis tells nothing
    both = plan(grid=[NAMED | {"points": [{"name": "b"}, {"name": "c"}]}, TUNED])
    assert [task.setting_title for task in both.planned_tasks[::2]] == [
        f"{title}, {point}" for title in ("Bytes of source text", "Associative recall") for point in "bc"
    ]
    assert (tuned.choosing_seeds, tuned.all_seeds) == ((1, 9), (1, 9, 0, 2))
    assert tuned.run_count == 2 * 6 * (2 * 2 + 2)
    untuned = plan()
    assert (untuned.choosing_seeds, untuned.all_seeds, untuned.run_count) == ((), (0, 1, 2), 36)
    assert plan(grid=[TUNED]).choosing_seeds == (0,)


@pytest.mark.parametrize("name", [name for name in plans.names() if (RESULTS / name / "report.json").exists()])
def test_a_plan_that_uses_nothing_new_keeps_the_hash_of_its_results(name: str):
    assert plans.builtin(name).plan_hash == json.loads((RESULTS / name / "report.json").read_text())["plan_hash"]


# The built-in studies


ENCODER = {"reverse", "sort", "sub", "swap", "copy"}
_IMAGE = {
    "architecture": "image_classification",
    "num_labels": 10,
    "causal": False,
    "positions": {"kind": "learned", "length": 17},
}
VISION: dict[str, dict[str, Any]] = {
    "digits": {**_IMAGE, "image_size": 8, "patch_size": 2, "num_channels": 1},
    "images": {**_IMAGE, "image_size": 28, "patch_size": 7, "num_channels": 3},
    "anomaly": {"architecture": "token_classification", "feature_size": 64, "num_labels": 2, "causal": False},
}


def answer_like_the_tasks(spec: TaskSpec) -> TaskAnswer:
    """What the real tasks dictate, without loading their data."""
    if spec.name in ENCODER:
        length = spec.options.get("length", 64)
        fields: dict[str, Any] = {
            "architecture": "token_classification", "vocab_size": 10, "num_labels": 10, "causal": False,
            "positions": {"kind": "learned", "length": length},
        }  # fmt: skip
    elif spec.name in VISION:
        fields = VISION[spec.name]
    else:
        fields = {"architecture": "causal_lm", "vocab_size": spec.options.get("vocab_size", 256), "causal": True}
    return TaskAnswer(
        model_fields=fields, description="", loss_metric="loss", score="accuracy", higher_is_better=True,
        train_size=10_000, tokens_per_example=spec.options.get("context", 64), data_hash="0" * 64,
    )  # fmt: skip


def kinds(study_plan: StudyPlan) -> dict[str, int]:
    return {kind: sum(variant.kind == kind for variant in study_plan.variants) for kind in ("tie", "control")}


@cache
def expanded(name: str) -> tuple[StudyPlan, dict[str, TaskFacts], tuple[Entry, ...]]:
    """The plan of all sizes is large: expanded once for all tests."""
    study_plan = plans.builtin(name)
    return study_plan, *expand(study_plan, answer_like_the_tasks)


@pytest.mark.parametrize("name", plans.names())
def test_every_built_in_study_expands_and_its_claims_hold(name: str):
    study_plan, facts, entries = expanded(name)
    assert study_plan.name == name
    assert len(facts) == len(study_plan.planned_tasks)
    assert len(entries) == sum(len(task.variants) for task in study_plan.planned_tasks)
    for variant in study_plan.variants:
        assert variant.kind == "tie" or variant.note.endswith(".")
    training = [task.training for task in study_plan.planned_tasks]
    assert all(0 < values["checkpoint_every"] < max(values["steps"], 251) for values in training), (
        "a kill must not cost a whole run"
    )


@pytest.mark.parametrize("name", plans.names())
def test_every_built_in_study_holds_controls_at_equal_cache_and_at_equal_parameters(name: str):
    study_plan, _, entries = expanded(name)
    first = study_plan.planned_tasks[0].name
    ties = [entry for entry in entries if entry.task == first and entry.kind == "tie"]
    controls = [entry for entry in entries if entry.task == first and entry.kind == "control"]
    equal_cache = [
        c for c in controls for t in ties if c.cached_floats_per_token == t.cached_floats_per_token and c.tie != t.tie
    ]
    equal_size = [
        c
        for c in controls
        for t in ties
        if abs(c.parameters / t.parameters - 1) <= 0.01 and c.run["model"] != t.run["model"]
    ]
    assert equal_cache
    assert equal_size


def lacking(study_plan: StudyPlan) -> set[str]:
    """The kinds of control with a known outcome that no task of a study holds: negative ("same") and positive ("worse")."""
    planned = {name for task in study_plan.planned_tasks for name in task.variants}
    promised = {v.expect.outcome for v in study_plan.variants if v.expect and v.name in planned}
    again = {v.name for v in study_plan.variants if v.expect and v.expect.outcome == "same"}
    assert all(study_plan.variant(name).seed_shift for name in again), "the same model is told apart by its seeds"
    return {"same", "worse"} - promised


def test_every_built_in_study_holds_a_negative_and_a_positive_control():
    without = {name: sorted(lacking(plans.builtin(name))) for name in plans.names()}
    assert {name: kinds for name, kinds in without.items() if kinds} == {}


def test_there_are_the_studies_that_were_promised():
    assert plans.names() == (
        "budget",
        "budget-gpu",
        "capability",
        "frontier",
        "laptop",
        "length",
        "length-gpu",
        "paper-synthetic",
        "paper-vision",
        "plane",
        "reasoning",
        "recall-heads",
        "rotary",
        "separate",
        "smoke",
        "width",
    )


def test_laptop_holds_eight_ties_and_controls_of_every_kind():
    laptop = plans.builtin("laptop")
    assert kinds(laptop)["tie"] >= 8
    assert kinds(laptop)["control"] >= 4
    assert len(laptop.seeds) >= 3
    assert {task.task for task in laptop.tasks} == {"text", "recall"}
    _, entries = expand(laptop, answer_like_the_tasks)
    entry = {entry.variant: entry for entry in entries if entry.task == "text"}
    ties = {entry[variant.name].tie for variant in laptop.variants if variant.kind == "tie"}
    assert len(ties) >= 8
    kv, mha = entry["kv"], entry["mha"]
    for control in ("gqa-2", "mqa-wide", "kv-wide"):
        assert entry[control].cached_floats_per_token == kv.cached_floats_per_token
    assert entry["kv-gqa-2"].cached_floats_per_token == entry["mqa"].cached_floats_per_token
    assert entry["kv-wide"].parameters == kv.parameters
    assert entry["kv-full"].cached_floats_per_token == mha.cached_floats_per_token
    assert abs(entry["kv-mlp"].parameters / mha.parameters - 1) <= 0.01
    assert abs(kv.parameters / mha.parameters - 1) > 0.01


def test_the_frontier_holds_every_rival_at_equal_cache():
    study_plan, _, entries = expanded("frontier")
    tuned = [axis for axis in study_plan.tasks[0].grid if axis.tune]
    assert [len(axis.points) for axis in tuned] == [3]
    assert len(study_plan.seeds) >= 3
    first = study_plan.planned_tasks[0].name
    entry = {entry.variant: entry for entry in entries if entry.task == first}
    whole = entry["mha"].cached_floats_per_token
    parts = {name: found.cached_floats_per_token / whole for name, found in entry.items()}
    rivals = ("gqa-2", "mqa-wide", "kv-wide", "kv-shared", "mla-40", "windows", "gqa-2-mlp")
    assert {parts[name] for name in ("kv", *rivals)} == {0.5}
    assert {parts[name] for name in ("kv-2", "mqa", "kv-1-wide", "gta-1", "mla-16", "kv-windows")} == {0.25}
    assert {parts[name] for name in ("kv-1", "mla-8", "mqa-windows", "kv-2-windows")} == {0.125}
    assert parts["kv-full"] == parts["difference"] == 1
    quantities = {match.quantity for variant in study_plan.variants for match in variant.matches}
    assert quantities == {"cache", "parameters", "flops"}
    outcomes = {variant.expect.outcome for variant in study_plan.variants if variant.expect}
    assert outcomes == {"same", "worse"}


def test_a_window_is_counted_by_what_it_holds_of_a_whole_example():
    windowed = plan(model={**PLAN["model"], "window_tokens": [16, 0]})
    whole, half = (expand(one, answer_like_the_tasks)[1][0] for one in (plan(), windowed))
    assert half.cached_floats_per_token == whole.cached_floats_per_token * (16 + 64) / (2 * 64)
    assert half.cached_bytes_per_token == 2 * half.cached_floats_per_token


def test_smoke_and_capability_are_what_they_say():
    smoke = plans.builtin("smoke")
    assert kinds(smoke)["control"] >= 1
    assert len(smoke.seeds) == 2
    capability = plans.builtin("capability")
    _, entries = expand(capability, answer_like_the_tasks)
    assert {(entry.task, entry.tie) for entry in entries} == {
        (task, tie) for task in ("reverse", "sort") for tie in ("(Q, K, V)", "(Q, K=V)")
    }
    for task in ("reverse", "sort"):
        entry = {entry.variant: entry for entry in entries if entry.task == task}
        assert entry["gqa-2"].parameters == entry["kv"].parameters
    for entry in entries:
        model, training, options = entry.run["model"], entry.run["training"], entry.run["task"]["options"]
        assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]) == (256, 2, 4)
        assert (options["length"], options["train_size"]) == (64, 10_000)
        assert training["steps"] * training["batch_size"] == {"reverse": 2, "sort": 6}[entry.task] * 10_000


def test_paper_synthetic_is_the_papers_whole_grid():
    paper, facts, entries = expanded("paper-synthetic")
    assert len(paper.seeds) == 3
    shapes = set()
    for entry in entries:
        model, training, options = entry.run["model"], entry.run["training"], entry.run["task"]["options"]
        epochs = training["steps"] * training["batch_size"] / options["train_size"]
        shapes.add(
            (
                entry.run["task"]["name"], entry.variant, model["hidden_size"], model["num_hidden_layers"],
                model["num_attention_heads"], options["length"], epochs,
            )
        )  # fmt: skip
        assert model["head_dim"] * model["num_attention_heads"] == model["hidden_size"]
        assert (training["learning_rate"], training["clip_norm"], training["schedule"]) == (1e-3, 5.0, "cosine")
        assert training["warmup_steps"] == 0.05 * training["steps"]
    ties = {variant.name: entry_tie(entries, variant.name) for variant in paper.variants if variant.kind == "tie"}
    assert sorted(ties.values()) == sorted(["(Q, K, V)", "(Q=K, V)", "(Q=K, V)+", "(Q, K=V)", "(Q=K=V)", "(Q=K=V)+"])
    wanted = {
        (task, variant.name, width, layers, heads, length, epochs)
        for task in ENCODER for variant in paper.variants if variant.name != "no-positions" or task not in ("sub", "copy")
        for width in (32, 64, 256) for layers in (2, 4)
        for heads in (2, 4) for length in (16, 64, 128) for epochs in (2.0, 10.0)
    }  # fmt: skip
    assert shapes == wanted
    assert set(next(iter(facts.values())).points) == {"width and heads", "layers", "length", "epochs"}
    assert not paper.keep_models


def test_paper_vision_holds_the_papers_ties_and_one_point_of_its_grid():
    paper, _, entries = expanded("paper-vision")
    assert {task.task for task in paper.tasks} == set(VISION)
    ties = {variant.name: entry_tie(entries, variant.name) for variant in paper.variants if variant.kind == "tie"}
    assert sorted(ties.values()) == sorted(["(Q, K, V)", "(Q=K, V)", "(Q=K, V)+", "(Q, K=V)", "(Q=K=V)", "(Q=K=V)+"])
    for entry in entries:
        model = entry.run["model"]
        assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"]) == (64, 2, 4)
        assert model["plus_channels"] == 50
    # Only CIFAR-10 has to be brought along.
    assert [task.name for task in paper.tasks if "path" in task.options] == ["cifar-10"]


def entry_tie(entries: Any, variant: str) -> str:
    return next(entry.tie for entry in entries if entry.variant == variant)
