"""The house: imports go down, never up, never in a circle, never hidden in a function; the low floors know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "twofold"

# From the ground up. A module may import from its own floor and from lower ones.
FLOORS = [
    ("_version", "errors", "lazy", "lock", "storage"),
    ("notation", "tie", "plane"),
    ("positions",),
    ("spec", "cache_spec", "task_spec"),
    ("cost", "presets"),
    ("explain", "estimate", "picture"),
    ("kernels",),
    ("attention", "latent_attention", "layouts", "oracle", "rotations"),
    ("cache",),
    ("models",),
    ("existing", "export", "generation"),
    ("tasks",),
    ("training",),
    ("study",),
    ("report",),
    ("geometry", "harness"),
    ("claims",),
    ("doctor",),
    ("cli",),
    ("__init__", "__main__"),
]
# Values of these modules are data about runs; they must load without torch, wherever their package stands.
TORCH_FREE = [
    "twofold",
    "twofold.tie",
    "twofold.plane",
    "twofold.positions",
    "twofold.spec",
    "twofold.cache_spec",
    "twofold.task_spec",
    "twofold.cost",
    "twofold.presets",
    "twofold.explain",
    "twofold.estimate",
    "twofold.training.spec",
    "twofold.study.plan",
    "twofold.study.results",
    "twofold.study.statistics",
    "twofold.report",
    "twofold.claims",
    "twofold.cli",
]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
# The module, the reference kernel and codes, its positions, its spec, and the algebra down to the reading of text.
MAX_ATTENTION_CLOSURE_LINES = 2150


def modules(root: Path = SOURCE) -> dict[str, Path]:
    """Dotted name (without the package's own) of every module."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


class Imports(ast.NodeVisitor):
    """First-party modules that a file imports when it is run (annotation-only imports are not run)."""

    def __init__(self, known: set[str], *, into_functions: bool) -> None:
        self.known, self.into_functions, self.found = known, into_functions, set[str]()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        top, _, stem = (node.module or "").partition(".")
        if top == "twofold":
            wholes = [f"{stem}.{alias.name}".removeprefix(".") for alias in node.names]
            self.found |= {whole if whole in self.known else stem or "__init__" for whole in wholes}

    def visit_Import(self, node: ast.Import) -> None:
        names = [alias.name.partition(".") for alias in node.names]
        self.found |= {stem or "__init__" for top, _, stem in names if top == "twofold"}

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self.into_functions:
            self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef


def imports(path: Path, known: set[str], *, into_functions: bool = False) -> set[str]:
    visitor = Imports(known, into_functions=into_functions)
    visitor.visit(ast.parse(path.read_text()))
    return visitor.found


def graph(root: Path = SOURCE) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imports(path, set(known)) - {name} for name, path in known.items()}


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next(level for level, names in enumerate(FLOORS) if top in names)


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [f"{a} imports {b}" for a, targets in edges.items() for b in targets if floor(b) > floor(a)]


def test_every_module_stands_on_a_floor():
    homeless = [name for name in modules() if not any(name.split(".")[0] in names for names in FLOORS)]
    assert not homeless


def test_imports_go_down():
    assert not upward(graph())


def test_there_is_no_circle():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_hides_in_a_function():
    known = modules()
    hidden = {
        name: inside
        for name, path in known.items()
        if (inside := imports(path, set(known), into_functions=True) - imports(path, set(known)))
    }
    assert not hidden


def test_kernels_import_nothing_of_ours_but_errors():
    """And the way to name a module that is imported when it is used: Triton's."""
    for name, targets in graph().items():
        if name.split(".")[0] == "kernels":
            assert {target for target in targets if target.split(".")[0] != "kernels"} <= {"errors", "lazy"}, name


def test_the_torch_free_floors_load_no_torch():
    lines = [f"import {name}" for name in TORCH_FREE]
    check = "import sys; loaded = {'torch', 'transformers', 'accelerate'} & set(sys.modules); sys.exit(', '.join(loaded) or 0)"
    done = subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def closure(start: str, edges: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        if (module := waiting.pop()) not in reached:
            reached.add(module)
            waiting += edges[module]
    return reached


def test_attention_can_be_read_in_one_sitting():
    """Fast backends are left out: each computes what the reference does, and who reads attention need open none of them."""
    fast = {name for name in graph()["kernels"] if name not in ("errors", "kernels.inputs", "kernels.reference")}
    edges = {name: targets - fast for name, targets in graph().items()}
    assert fast
    reached = closure("attention", edges)
    assert sum(len(modules()[name].read_text().splitlines()) for name in reached) <= MAX_ATTENTION_CLOSURE_LINES, (
        reached
    )


def test_files_functions_and_signatures_stay_small():
    too_large = []
    for name, path in modules().items():
        text = path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            too_large.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                too_large.append(f"{name}.{node.name}: {length} lines")
            positional = len(node.args.posonlyargs) + len(node.args.args)
            # A command's options and a kernel's keywords are its interface: only what must be remembered in order counts.
            if positional > MAX_PARAMETERS:
                too_large.append(f"{name}.{node.name}: {positional} parameters")
    assert not too_large


def test_the_checks_can_fail(tmp_path):
    """Liars: an upward import, a circle and a hidden import are found."""
    (tmp_path / "tie.py").write_text("from twofold.attention import x\n")
    (tmp_path / "attention.py").write_text("from twofold import tie\n\ndef f():\n    from twofold.errors import y\n")
    (tmp_path / "errors.py").write_text("")
    edges = graph(tmp_path)
    assert upward(edges) == ["tie imports attention"]
    with pytest.raises(CycleError):
        list(TopologicalSorter(edges).static_order())
    known = set(modules(tmp_path))
    assert imports(tmp_path / "attention.py", known, into_functions=True) == {"tie", "errors"}
