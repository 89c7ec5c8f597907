"""Reasoning questions: every answer against a reader who works it out from the prompt, what is held out, and that exact match is greedy decoding."""

from __future__ import annotations

import doctest
import random
import re
from collections import Counter
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from task_fixture import load, totals_of
from twofold.errors import TwofoldError
from twofold.models import build_model
from twofold.spec import ModelSpec
from twofold.task_spec import TaskSpec
from twofold.tasks import IGNORED, TASKS, arithmetic, deduction, list_functions, load_task, questions, word_problems
from twofold.tasks.questions import Draws, Question, QuestionTask, constant_guess, text
from twofold.tasks.task import generator

NAMES = ("arithmetic", "list-functions", "deduction", "word-problems")
OPTIONS = {
    "arithmetic": [{"digits": 2}, {"digits": 3, "terms": 3, "reverse_answer": False}, {"digits": 2, "padded": True}],
    "list-functions": [{"max_length": 4}, {"min_depth": 2, "max_depth": 3, "min_length": 4, "max_length": 6}],
    "deduction": [{}, {"chain": 5, "letters": 12, "min_steps": 2, "max_steps": 4}],
    "word-problems": [{}, {"max_steps": 4, "working": True}, {"largest": 900}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS[name]]
SIZES = {"train_size": 300, "held_out_size": 40}


def made(name: str, **options) -> QuestionTask:
    task = load_task(TaskSpec(name=name, options=SIZES | options))
    assert isinstance(task, QuestionTask)
    return task


def drawn(name: str, seed: int, count: int = 60, **options) -> list[Question]:
    draws, values = Draws(generator(seed, "any")), TASKS[name].options(**options)
    return [values.draw(draws) for _ in range(count)]


# Readers: each works out the answer and the kind from the prompt alone.


def added(prompt: str, options: dict) -> tuple[str, str]:
    terms = [[int(digit) for digit in reversed(term)] for term in prompt.removesuffix("=").split("+")]
    deepest, total = 0, [0]
    for number, term in enumerate(terms):
        carry, run, sums = 0, 0, []
        for place in range(max(len(total), len(term))):
            digit = carry + sum(digits[place] for digits in (total, term) if place < len(digits))
            carry = digit // 10
            run = run + 1 if carry else 0
            deepest = max(deepest, run if number else 0)
            sums.append(digit % 10)
        total = sums + [1] * carry
    while len(total) > 1 and total[-1] == 0:
        total.pop()
    written = "".join(map(str, total))
    return (written if options.get("reverse_answer", True) else written[::-1]), f"depth_{deepest}"


def applied(prompt: str, options: dict) -> tuple[str, str]:
    *names, digits = prompt.removesuffix("=").split(" ")
    steps = {
        "reverse": lambda s: s[::-1],
        "sort": lambda s: "".join(sorted(s)),
        "tail": lambda s: s[1:],
        "swap": lambda s: s[-1] + s[1:-1] + s[0],
        "max": lambda s: sorted(s)[-1],
        "min": lambda s: sorted(s)[0],
        "first": lambda s: s[0],
        "last": lambda s: s[-1],
        "count": lambda s: str(sum(1 for _ in s)),
    }
    return reduce(lambda value, name: steps[name](value), reversed(names), digits), f"depth_{len(names)}"


def followed(prompt: str, options: dict) -> tuple[str, str]:
    *facts, asked = prompt.split(" ")
    leads = dict(fact.split(">") for fact in facts)
    assert len(leads) == len(facts)
    assert asked[0] == "?"
    last, found = asked[1:], ""
    while last in leads:
        last = leads[last]
        found += last
    return found, f"steps_{len(found)}"


def solved(prompt: str, options: dict) -> tuple[str, str]:
    story, _, rest = prompt.partition("\n")
    assert rest == ("" if options.get("working") else "#### ")
    opening, *changes = re.findall(r"(\w+) (\w+) (\d+)", story)
    assert opening[1] == "has"
    has, working = int(opening[2]), ""
    for name, verb, number in changes:
        assert name == opening[0]
        sign = {**dict.fromkeys(("buys", "gets", "wins", "adds"), "+"), **dict.fromkeys(("eats", "uses", "sells", "loses"), "-")}[verb]  # fmt: skip
        after = has + int(number) if sign == "+" else has - int(number)
        working += f"{has}{sign}{number}={after} "
        has = after
        assert 0 <= has <= options.get("largest", 20)
    return f"{working}#### {has}" if options.get("working") else str(has), f"steps_{len(changes)}"


READERS = {"arithmetic": added, "list-functions": applied, "deduction": followed, "word-problems": solved}


@pytest.mark.parametrize(("name", "options"), CASES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_answer_is_what_a_reader_finds(name, options, seed):
    for question in drawn(name, seed, **options):
        assert READERS[name](question.prompt, options) == (question.answer, question.kind)


def test_the_comparison_with_a_reader_can_fail():
    (question,) = drawn("arithmetic", 0, 1, reverse_answer=False)
    assert READERS["arithmetic"]("17+5=", {"reverse_answer": False}) == ("22", "depth_1")
    assert READERS["arithmetic"](question.prompt + "", {})[0] == question.answer[::-1]


# What is read and what is scored


@pytest.mark.parametrize(("name", "options"), CASES)
def test_rows_are_the_texts_and_only_answers_are_scored(name, options):
    task = made(name, **options)
    rows = [row for batch in task.held_out_batches(16) for row in zip(*(batch[c].tolist() for c in ("input_ids", "labels")), strict=True)]  # fmt: skip
    assert len(rows) == len(task.questions) == 40
    for (tokens, labels), question in zip(rows, task.questions, strict=True):
        written = bytes(tokens).rstrip(b"\0").decode()
        assert written == text(question) == question.prompt + question.answer + "\n"
        scored = [place for place, label in enumerate(labels) if label != IGNORED]
        assert scored == list(range(len(question.prompt), len(written)))
        assert all(labels[place] == tokens[place] for place in scored)


def same(name: str, prompt: str) -> object:
    """What is asked, whatever the order in which it is said, by other means than the key."""
    if name == "arithmetic":
        return Counter(int(term) for term in prompt.removesuffix("=").split("+"))
    if name == "deduction":
        return frozenset(prompt.split(" "))
    if name == "word-problems":
        return re.sub(r"\w+ (has|\w+) (\d+)[^.]*\.", lambda m: ("-" if m[1] in ("eats", "uses", "sells", "loses") else "+") + m[2], prompt)  # fmt: skip
    return prompt


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_question_of_training_is_held_out_in_any_words(name, options):
    task = load_task(TaskSpec(name=name, options={"train_size": 800, "held_out_size": 60} | options))
    assert isinstance(task, QuestionTask)
    held_out = [same(name, question.prompt) for question in task.questions]
    assert all(held_out.count(one) == 1 for one in held_out)
    for tokens, labels in zip(task.train["input_ids"].tolist(), task.train["labels"].tolist(), strict=True):
        prompt = bytes(tokens[: next(place for place, label in enumerate(labels) if label != IGNORED)]).decode()
        assert same(name, prompt) not in held_out


def test_training_does_meet_what_is_held_out_if_nothing_forbids_it():
    """The liar: sums of one digit, of which there are 55, drawn freely."""
    free = {question.key for question in drawn("arithmetic", 1, 300, digits=1)}
    assert free & {question.key for question in drawn("arithmetic", 2, 40, digits=1)}


@pytest.mark.parametrize("name", NAMES)
def test_data_are_made_again_and_another_seed_gives_others(name):
    assert made(name).data_hash == made(name).data_hash
    assert made(name, data_seed=1).data_hash != made(name).data_hash


# Chance


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "deduction"])
def test_chance_is_what_the_best_constant_answer_gets(name, options):
    """Against the exact match of somebody who knows the training part and gives each form its commonest answer."""
    task = load_task(TaskSpec(name=name, options={"train_size": 4_000, "held_out_size": 400} | options))
    assert isinstance(task, QuestionTask)
    counts: dict[str, Counter[str]] = {}
    for tokens, labels in zip(task.train["input_ids"].tolist(), task.train["labels"].tolist(), strict=True):
        answer = bytes(label for label in labels if label != IGNORED).decode().removesuffix("\n")
        form = bytes(tokens).decode().rpartition(" ")[0] if name == "list-functions" else ""
        counts.setdefault(form, Counter())[answer] += 1
    assert task.chance == pytest.approx(sum(max(c.values()) for c in counts.values()) / 4_000)
    best = {form: c.most_common(1)[0][0] for form, c in counts.items()}
    guesses = [best.get(q.form, "") == q.answer for q in task.questions]
    error = (task.chance * (1 - task.chance) / 400) ** 0.5
    # What is commonest in 4,000 is not quite what is likeliest, where forms and answers are many.
    assert sum(guesses) / 400 == pytest.approx(task.chance, abs=4 * error + 0.03)


@pytest.mark.parametrize("options", OPTIONS["deduction"])
def test_the_chance_of_a_deduction_is_that_of_somebody_who_does_not_read_the_question(options):
    task = made("deduction", **options | {"held_out_size": 800})
    draws, right = random.Random(0), 0
    for question in task.questions:
        *facts, _ = question.prompt.split(" ")
        told = [followed(" ".join([*facts, f"?{fact[0]}"]), {})[0] for fact in facts]
        possible = [a for a in told if options.get("min_steps", 1) <= len(a) <= options.get("max_steps", 2)]
        right += draws.choice(possible) == question.answer
    assert task.chance is not None
    assert right / 800 == pytest.approx(task.chance, abs=5 * (task.chance * (1 - task.chance) / 800) ** 0.5)


def test_a_constant_guess_is_by_form():
    def asked(form: str, answer: str) -> Question:
        return Question(prompt="", answer=answer, key="", kind="", form=form)

    found = [asked("a", "1"), asked("a", "1"), asked("a", "2"), asked("b", "2"), asked("b", "3")]
    assert constant_guess(found) == pytest.approx(3 / 5)


# Exact match


def trained(task: QuestionTask, steps: int) -> torch.nn.Module:
    fields = {
        "tie": "(Q, K=V)", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "positions": {"kind": "rotary", "rotate": "read"}, "initializer_range": 0.1,
    } | dict(task.model_fields)  # fmt: skip
    model = build_model(ModelSpec.from_dict(fields), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model(**task.train_batch(torch.randint(0, task.train_size, (32,), generator=order))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def decoded(model: torch.nn.Module, prompt: str, most: int) -> str:
    """Byte by byte, the likeliest next one, up to a line break."""
    tokens = list(prompt.encode())
    with torch.no_grad():
        for _ in range(most):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == ord("\n"):
                break
    return bytes(tokens[len(prompt) :]).decode(errors="replace")


def test_exact_match_is_the_share_that_greedy_decoding_gets_right():
    task = made("list-functions", max_depth=1, min_length=2, max_length=3, train_size=2_000, held_out_size=80)
    model = trained(task, 70)
    answers = [decoded(model, q.prompt, len(q.answer) + 1) == q.answer + "\n" for q in task.questions]
    with torch.no_grad():
        scores = task.scores(totals_of(task, task.held_out_batches(16), lambda batch: model(batch["input_ids"]).logits))
    assert 0.05 < sum(answers) / 80 < 0.95  # some are right and some are wrong, or nothing is compared
    assert scores["exact_match"] == sum(answers) / 80
    assert scores["accuracy"] > scores["exact_match"]
    assert scores["exact_match_depth_1"] == scores["exact_match"]


def test_scores_by_kind_add_up():
    task = made("word-problems", held_out_size=60)

    def right_in_one_step(batch):
        logits = torch.zeros(*batch["labels"].shape, 256)
        following = batch["input_ids"].roll(-1, dims=1)
        logits.scatter_(2, following[..., None], 9.0)
        for index, row in enumerate(batch["input_ids"].tolist()):
            if bytes(row).count(b".") > 2:
                logits[index, bytes(row).rstrip(b"\0").rindex(b" ")] = 0.0
        return logits

    scores = task.scores(totals_of(task, task.held_out_batches(16), right_in_one_step))
    share = sum(q.kind == "steps_1" for q in task.questions) / 60
    assert scores["exact_match_steps_1"] == 1.0
    assert scores["exact_match_steps_2"] == 0.0
    assert scores["exact_match"] == pytest.approx(share)


# Mistakes


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("arithmetic", {"digits": 0}, "digits is 0, but it must be from 1 to 9"),
        ("arithmetic", {"terms": 1}, "terms is 1, but it must be from 2 to 9"),
        ("arithmetic", {"digits": 1, "held_out_size": 55}, "after 0 questions for the train part no new ones are found: ask for fewer"),
        ("arithmetic", {"digits": 1, "held_out_size": 56}, "after 55 questions for the held-out part no new ones are found"),
        ("list-functions", {"min_depth": 3}, "min_depth is 3, but it must be from 1 to max_depth = 2"),
        ("list-functions", {"min_length": 2}, "min_length is 2, but it must be more than max_depth = 2"),
        ("list-functions", {"max_length": 10}, "max_length is 10, but it must be from min_length = 3 to 9"),
        ("list-functions", {"max_depth": 5}, "max_depth is 5, but it must be at most 4"),
        ("deduction", {"chain": 9}, "letters is 16, but it must be from 18, for two chains, to 26"),
        ("deduction", {"max_steps": 3}, "max_steps is 3, but it must be less than chain = 3"),
        ("word-problems", {"max_steps": 0}, "min_steps is 1, but it must be from 1 to max_steps = 0"),
        ("word-problems", {"largest": 1}, "largest is 1, but it must be from 2 to 9999"),
        ("word-problems", {"train_size": 0}, "train_size is 0, but it must be at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_gets_its_sentence(name, options, sentence):
    with pytest.raises(TwofoldError) as caught:
        made(name, **options)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"Task {name}: ")
    assert "\n" not in str(caught.value)


def test_small_tasks_of_the_fixture_are_these():
    assert [load(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("module", [arithmetic, list_functions, deduction, word_problems, questions])
def test_documented_examples_run(module):
    assert doctest.testmod(module).failed == 0


def test_numbers_at_random_are_fair():
    draws = Draws(generator(0, "fair"))
    counts = Counter(draws.between(3, 7) for _ in range(10_000))
    assert set(counts) == {3, 4, 5, 6, 7}
    assert all(abs(count - 2_000) < 5 * 40 for count in counts.values())
    orders = Counter("".join(draws.some_of("abc", 3)) for _ in range(6_000))
    assert len(orders) == 6
    assert all(abs(count - 1_000) < 5 * 29 for count in orders.values())
