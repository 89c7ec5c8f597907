"""The documentation is true: every block of every page runs, quoted results are the reports', links lead somewhere, the pages build."""

from __future__ import annotations

import csv
import doctest
import importlib
import json
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import twofold
from docs_pages import ROOT, Block, Reader, blocks, check_understood, command_block, commands, pages
from study_fixture import write_study
from twofold import report
from twofold.study import plan

PAGES = pages()
RECIPES = ROOT / "CONTRIBUTING.md"
QUOTE = runpy.run_path(str(ROOT / "docs" / "quote.py"))


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Blocks


@pytest.mark.parametrize("page", [page for page in PAGES if page != RECIPES], ids=relative)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(folder=tmp_path)
    for block in blocks(page):
        reader.read(block)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to which the recipes of CONTRIBUTING.md were applied, read from the top."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # An editable installation finds its own sources before all others.
    (folder / "src" / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [finder for finder in sys.meta_path if 'ScikitBuild' not in type(finder).__name__]\n"
    )
    reader = Reader(folder=folder, environment={"PYTHONPATH": str(folder / "src")}, own_package=False)
    for block in blocks(RECIPES):
        reader.read(block)
    return folder


RECIPES_WORK = """
import torch, twofold
from twofold.kernels import BACKENDS, Inputs, Mask, attend, choose
from twofold.positions import positions_from_dict, positions_to_dict
from twofold.tasks import load_task
from twofold.task_spec import TaskSpec

assert twofold.__file__.startswith({folder!r}), twofold.__file__

scheme = positions_from_dict({{"kind": "interpolated", "factor": 2.0}})
assert positions_from_dict(positions_to_dict(scheme)) == scheme
whole = positions_from_dict({{"kind": "rotary"}})
places = torch.arange(7)
assert torch.equal(scheme.angles(2 * places, head_dim=6)[0], whole.angles(places, head_dim=6)[0])

task = load_task(TaskSpec(name="parity", options={{"length": 5, "train_size": 11}}))
batch = task.train_batch(torch.arange(11))
for bits, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
    assert labels == [sum(bits[: i + 1]) % 2 for i in range(5)]

for queries, keys in ((1, 1), (63, 63), (65, 65), (130, 151)):
    key = torch.randn(2, 2, keys, 3, dtype=torch.float64)
    inputs = Inputs(
        query=torch.randn(2, 4, queries, 3, dtype=torch.float64), key=key, value=key, mask=Mask(causal=True, window_tokens=70), scale=0.5
    )
    torch.testing.assert_close(attend(inputs, "blockwise"), attend(inputs, "reference"))
assert "blockwise" in BACKENDS
assert choose(inputs.problem, "blockwise").name == "blockwise"
"""


def test_the_recipes_for_a_task_a_scheme_and_a_backend_work(extended: Path):
    assert (extended / "runs" / "parity" / "outcome.json").exists()
    environment = os.environ | {"PYTHONPATH": str(extended / "src")}
    check = RECIPES_WORK.format(folder=str(extended))
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipes_are_in_our_own_style(extended: Path):
    added = [str(extended / block.title) for block in blocks(RECIPES) if block.kind == "python"]
    assert len(added) == 3
    settings = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check", *settings], ["format", "--check", *settings]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *added], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_notices_what_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def read(*kinds_and_texts: tuple[str, str], title: str = "", mark: str = "") -> None:
        reader = Reader(folder=tmp_path)
        for kind, text in kinds_and_texts:
            reader.read(Block(kind=kind, text=text, title=title, mark=mark, what="", line=1))

    read(("bash", "twofold explain '(Q, K=V)'\n"), ("text", "(Q, K=V) Q and K have ... V = K.\n...\n"))
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    read(("diff", "-two\n+three\n"), title="a.txt")
    assert (tmp_path / "a.txt").read_text() == "one\nthree\n"
    for wrong in ([("bash", "twofold explain '(Q, K=V)'\n"), ("text", "V = 2K\n")], [("python", "assert 1 == 2")], [("bash", "false")],
                  [("bash", "twofold explain 'V = 0'")], [("sh", "true")], [("text", "out of nowhere")], [("toml", "a = 1")]):  # fmt: skip
        with pytest.raises(AssertionError):
            read(*wrong)
    with pytest.raises(AssertionError, match="does not hold"):
        read(("diff", "-two\n+four\n"), title="a.txt")
    for misspelt in ("twofold stuDy run smoke", "twofold train --stepz 3", "twofold train --steps many"):
        with pytest.raises(Exception, match=r"stuDy|stepz|integer"):
            read(("bash", misspelt), mark="not run")


def test_blocks_are_found_as_they_are_written(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        'a\n<!-- not run: slow -->\n```bash\nx\n```\n\n```toml title="b.toml"\ny = 1\n```\n<!-- command: run -->\n\n```bash\nz\n```\n'
    )
    assert [(b.kind, b.text, b.title, b.mark, b.what) for b in blocks(page)] == [
        ("bash", "x\n", "", "not run", "slow"), ("toml", "y = 1\n", "b.toml", "", ""), ("bash", "z\n", "", "command", "run"),
    ]  # fmt: skip
    fences = sum(len(re.findall(r"^```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * sum(len(blocks(page)) for page in PAGES)


# The README's two commands


def test_the_two_commands_need_nothing_but_python_and_a_clone():
    for name in ("run", "tests"):
        lines = command_block(ROOT / "README.md", name).splitlines()
        assert lines[0] == "python3 -m venv .venv"
        assert lines[1].startswith(".venv/bin/pip install -c constraints.txt -e ")
        assert all(line.startswith(".venv/bin/") for line in lines[1:])
    (study,) = commands(command_block(ROOT / "README.md", "run"))
    check_understood(study)
    assert study == ["study", "run", "smoke"]
    smoke = plan.builtin("smoke")
    assert f"trains {smoke.run_count} small\nmodels" in (ROOT / "README.md").read_text()


def test_every_built_in_study_is_described():
    described = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "results" / "index.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(plan.names())


def test_continuous_integration_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (extraction,) = re.findall(r"^command=\$\((awk .*)\)$", script, re.MULTILINE)
    found = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found == command_block(ROOT / "README.md", "tests")
    assert ".venv/bin/pytest\n" in found
    assert "pre-commit run --all-files" in script


def test_pre_commit_is_the_linter_the_formatter_and_the_type_checker():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"], ["mypy"]]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_main_command_works_in_a_fresh_clone(tmp_path: Path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    script = command_block(clone / "README.md", "run")
    done = subprocess.run(["bash", "-euc", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (clone / "studies" / "smoke" / "report" / "index.html").exists()


# Quoted results


def test_quotes_are_what_the_reports_say():
    for page in QUOTE["pages"]():
        assert page.read_text() == QUOTE["quoted"](page), f"{relative(page)}: run `python docs/quote.py`."


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one kept result and two pages that quote it."""
    root = tmp_path_factory.mktemp("house")
    study = root / "studies" / "synthetic"
    write_study(study)
    report.write(study)
    (root / "docs" / "results").mkdir(parents=True)
    (root / "README.md").write_text("a\n<!-- result: synthetic -->\nold\n<!-- end -->\nb\n")
    (root / "docs" / "results" / "index.md").write_text("<!-- results -->\n<!-- end -->\n")
    QUOTE["take"](study, root)
    return root


def test_a_result_is_taken_and_quoted(house: Path):
    assert (house / "docs" / "results" / "synthetic" / "index.html").exists()
    readme, index = QUOTE["pages"](house)
    text = QUOTE["quoted"](readme, house)
    assert text.startswith("a\n<!-- result: synthetic -->\n[![")
    assert text.endswith("<!-- end -->\nb\n")
    assert "\nold\n" not in text
    assert "(docs/results/synthetic/frontier.svg)" in text
    assert "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}" in text
    listed = QUOTE["quoted"](index, house)
    assert "(synthetic/report.md)" in listed
    assert "Which way should these cache bytes be spent?" in listed
    with (house / "docs" / "results" / "synthetic" / "runs.csv").open() as file:
        minutes = sum(float(run["seconds"]) for run in csv.DictReader(file) if run["status"] == "done") / 60
    assert minutes > 0.5
    assert f" | {minutes:.0f} | " in listed
    assert f"took {minutes:.0f} minutes of one core, which is {minutes / 120:.1f} hours of two." in listed
    readme.write_text(text)
    assert QUOTE["quoted"](readme, house) == text
    readme.write_text(re.sub(r"0\.\d", "0.9", text, count=1))
    assert QUOTE["quoted"](readme, house) == text != readme.read_text()


def test_a_result_that_is_not_there_is_not_quoted(house: Path):
    page = house / "docs" / "other.md"
    page.write_text("<!-- result: nowhere -->\n1.23\n<!-- end -->\n")
    assert QUOTE["quoted"](page, house) == "<!-- result: nowhere -->\n<!-- end -->\n"


def test_choices_and_pairs_are_quoted_from_the_report(house: Path):
    """The pages' choice is the one with the least loss that needs no more; a pair's difference has the report's sign."""
    page = house / "docs" / "other.md"
    page.write_text("<!-- choice: kept -->\nold\n<!-- end -->\n<!-- pairs: kept -->\nold\n<!-- end -->\n")
    variants = [
        {"variant": "a", "cost": 96, "loss": 2.5, "low": 2.4, "high": 2.6, "n": 3, "best_in_resamples": 0.75},
        {"variant": "b|", "cost": 48, "loss": 2.75, "low": None, "high": None, "n": 1, "best_in_resamples": None},
    ]
    difference = {"mean": -0.25, "low": -0.45, "high": -0.05, "n": 3}
    section = {
        "variants": [{"name": "a", "label": "(Q, K, V)"}, {"name": "b|", "label": "x | y"}],
        "budgets": [
            {"share_of_reference": 1.0, "cost": 96, "variants": variants},
            {"share_of_reference": 0.5, "cost": 48, "variants": variants[1:]},
            {"share_of_reference": 0.125, "cost": 12, "variants": []},
        ],
        "comparisons": [
            {"within": "flops", "variant": "a", "other": "b|", "difference": difference},
            {"within": "flops", "variant": "b|", "other": "a", "difference": {**difference, "n": 0}},
        ],
    }
    (house / "docs" / "results" / "kept").mkdir()
    (house / "docs" / "results" / "kept" / "report.json").write_text(json.dumps({"sections": [section]}))
    lines = QUOTE["quoted"](page, house).splitlines()
    (house / "docs" / "results" / "kept" / "report.json").unlink()
    assert lines[3:6] == [
        r"| 100% | (Q, K, V) | 100% | 2.50 \[2.40, 2.60\] | 75% | x \| y | 50% | 2.750 | – |",
        r"| 50% | x \| y | 50% | 2.750 | – | – | – | – | – |",
        "| 12.5% | – | – | – | – | – | – | – | – |",
    ]
    assert lines[8:11] == [
        "| equal operations of training | against | difference | n |",
        "|---|---|--:|--:|",
        r"| (Q, K, V) | x \| y | −0.25 \[−0.45, −0.05\] | 3 |",
    ]
    assert lines[11:] == ["<!-- end -->"]
    untold = QUOTE["quoted"](page, house).splitlines()
    assert untold == [
        "<!-- choice: kept -->",
        "No result of the study `kept` has been kept yet.",
        "<!-- end -->",
        "<!-- pairs: kept -->",
        "<!-- end -->",
    ]


def test_parts_and_answers_are_quoted_and_what_was_not_run_says_so(house: Path):
    page = house / "docs" / "other.md"
    page.write_text("".join(f"<!-- {kind}: {name} -->\nstale\n<!-- end -->\n" for kind in ("parts", "answers") for name in ("synthetic", "nowhere")))  # fmt: skip
    path = house / "docs" / "results" / "synthetic" / "report.json"
    kept = path.read_text()
    path.write_text(
        json.dumps(json.loads(kept) | {"parts": [{"name": "law", "title": "A law", "sentences": ["It is [0, 1]."]}]})
    )
    of_parts, no_parts, answers, no_answers = QUOTE["quoted"](page, house).split("<!-- end -->\n")[:4]
    path.write_text(kept)
    assert "[![A law](results/synthetic/law.svg)](results/synthetic/report.md)\n\n- It is \\[0, 1\\].\n" in of_parts
    assert "- **Bytes of source text.** " in answers
    assert "- **Associative recall.** " in answers
    for text in (no_parts, no_answers):
        assert text.endswith("-->\n*Not run yet: no result of this study is kept.*\n")
    assert not any("stale" in text for text in (of_parts, no_parts, answers, no_answers))
    page.unlink()


def test_a_benchmark_is_quoted_with_what_was_not_met(house: Path):
    page = house / "docs" / "other.md"
    page.write_text("<!-- benchmark: step -->\nold\n<!-- end -->\n")
    rows = [
        {"name": "time, a / b", "value": 1.0412, "unit": "ratio", "goal": "<= 1.03", "met": False},
        {"name": "speed, a", "value": 1234.5, "unit": "tokens/s", "goal": None, "met": None},
    ]
    (house / "docs" / "results" / "step.json").write_text(json.dumps(rows))
    lines = QUOTE["quoted"](page, house).splitlines()
    assert lines[3:5] == ["| time, a / b | 1.041 | <= 1.03 | **not met** |", "| speed, a | 1,234 tokens/s |  |  |"]
    assert "old" not in lines
    page.write_text("<!-- goals: step -->\nold\n<!-- end -->\n")
    assert QUOTE["quoted"](page, house).splitlines()[3:] == [lines[3], "<!-- end -->"]


def test_cases_of_a_benchmark_are_rows_and_measures_columns(house: Path):
    page = house / "docs" / "other.md"
    page.write_text("<!-- goals: cases -->\nold\n<!-- end -->\n")
    cells = {"8 heads: a / b": (0.5, True), "16 heads: a / b": (1.25, False), "16 heads: a / c": (2.0, True)}
    rows = [
        {"name": name, "value": value, "unit": "ratio", "goal": ">= 4" if name.endswith("c") else "<= 1", "met": met}
        for name, (value, met) in cells.items()
    ]
    rows.append({"name": "8 heads: a", "value": 3.0, "unit": "ms", "goal": None, "met": None})
    (house / "docs" / "results" / "cases.json").write_text(json.dumps(rows))
    assert QUOTE["quoted"](page, house).splitlines()[1:-1] == [
        "| | a / b (<= 1) | a / c (>= 4) |",
        "|---|--:|--:|",
        "| 8 heads | 0.500 |  |",
        "| 16 heads | **1.250** | 2.000 |",
    ]
    page.write_text("<!-- goals: nowhere -->\nold\n<!-- end -->\n")
    assert QUOTE["quoted"](page, house) == "<!-- goals: nowhere -->\n<!-- end -->\n"


def test_the_first_screen_has_its_picture():
    quoted = re.search(r"<!-- result: frontier -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert quoted
    if not (ROOT / "docs" / "results" / "frontier" / "report.json").exists():
        pytest.skip("no result of the frontier study is kept in docs/results yet")
    assert "(docs/results/frontier/frontier.svg)" in quoted[1]


# Pages and links


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{relative(page)} links to {target}"


def test_the_pages_build_and_ask_no_other_server(tmp_path: Path):
    # Material's author announces a successor on stderr; --strict is about our pages.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "404.html"} < {path.relative_to(tmp_path / "site").as_posix() for path in built}
    for path in built:
        assert not foreign(path.read_text()), path
    # Reports of studies are whole pages of their own, and are kept as they are.
    for kept in (ROOT / "docs" / "results").glob("*/index.html"):
        assert (tmp_path / "site" / kept.relative_to(ROOT / "docs")).read_bytes() == kept.read_bytes()


def foreign(html: str) -> list[str]:
    """Scripts, styles and pictures that a browser would fetch from elsewhere."""
    fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"?(https?:[^\"\s>]*)", html)
    links = re.findall(r"<link\b[^>]*>", html)
    styles = [
        link for link in links if re.search(r"rel=\"?(stylesheet|icon|preconnect|preload)", link) and "http" in link
    ]
    return fetched + styles


def test_a_page_that_asks_another_server_is_noticed():
    assert foreign('<script defer src="https://cdn.example/x.js"></script>')
    assert foreign('<link rel="stylesheet" href="https://fonts.example/x.css">')
    assert not foreign(
        '<a href="https://arxiv.org">paper</a><script src="../x.js"></script><link rel="canonical" href="https://x">'
    )


def test_the_reference_describes_every_public_name():
    described = set(re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    for name in twofold.__all__:
        value = getattr(twofold, name)
        home = f"twofold.{twofold._HOMES[name]}" if name in twofold._HOMES else "twofold"
        defined = getattr(value, "__module__", home)
        assert name == "__version__" or {home, defined} & described, f"docs/api.md does not describe {defined}"
    for module in described:
        importlib.import_module(module)


# Docstrings


def test_docstrings_become_markdown():
    as_markdown = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["as_markdown"]
    text = "See :class:`~twofold.tie.Tie` and :mod:`twofold.kernels`, [q ; p][k ; r].\n\n    x[0][1]\n\n>>> x[0][1]\n1\n\nEnd."
    assert as_markdown(text) == (
        "See `Tie` and `twofold.kernels`, [q ; p]\\[k ; r].\n\n    x[0][1]\n\n```pycon\n>>> x[0][1]\n1\n```\n\nEnd."
    )


def modules() -> list[str]:
    found = pkgutil.walk_packages(twofold.__path__, "twofold.")
    return ["twofold", *(module.name for module in found if not module.name.endswith("__main__"))]


def test_examples_in_docstrings_are_true():
    results = {name: doctest.testmod(importlib.import_module(name)) for name in modules()}
    assert not [name for name, result in results.items() if result.failed]
    assert sum(result.attempted for result in results.values()) >= 10


# The project's own files


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required() -> dict[str, Requirement]:
    extras = project()["optional-dependencies"].values()
    lines = [*project()["dependencies"], *(line for extra in extras for line in extra)]
    return {
        requirement.name.lower(): requirement
        for requirement in map(Requirement, lines)
        if requirement.name != "twofold"
    }


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {pin.name.lower(): pin for pin in map(Requirement, (line for line in lines if line and line[0] != "#"))}


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    # Which Triton goes with a PyTorch is PyTorch's to say.
    assert list(pinned()) == sorted(required().keys() - {"triton"})
    for name, pin in pinned().items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert required()[name].specifier.contains(exact.version), name


def test_version_and_license_are_said_once_and_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == twofold.__version__
    assert citation["license"] == project()["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_every_supported_python_is_said():
    supported = [name.rpartition(" ")[2] for name in project()["classifiers"] if "Python :: 3." in name]
    assert supported == ["3.11", "3.12", "3.13"]
    assert project()["requires-python"] == ">=3.11,<3.14"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in supported


@pytest.mark.long
def test_the_wheel_holds_what_is_not_python(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("twofold-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"twofold/py.typed", "twofold/study/builtin/smoke.toml", "twofold/report/page.js"} <= held
    assert wanted <= held
