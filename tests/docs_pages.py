"""The pages of the documentation as programs: which blocks they hold, and how each kind is carried out in a folder.

    bash                          run; lines that begin with ``twofold`` in this process, so that torch is loaded once
    python                        run, all of a page in one namespace
    any kind with a title="path"  a file of that content is written
    diff with a title="path"      its lines are exchanged in that file
    text, after a block that ran  what that block printed, "..." standing for anything

A block after ``<!-- not run: reason -->``, or after ``<!-- command: name -->`` (which the README's readers run), is only read: its commands must be
understood by the parser, its Python must compile.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from twofold.cli import app

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"bash", "python", "toml", "diff", "text"}
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|command): (?P<what>[^\n]+) -->\n\n?)?"
    r"^```(?P<kind>[^\s`]*)(?P<attributes>[^\n`]*)\n(?P<text>.*?)^```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block; ``mark`` is "not run", "command" or nothing."""

    kind: str
    text: str
    title: str
    mark: str
    what: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            kind=found["kind"],
            text=found["text"],
            title=title[1] if (title := _TITLE.search(found["attributes"])) else "",
            mark=found["mark"] or "",
            what=found["what"] or "",
            line=text.count("\n", 0, found.start()) + 1,
        )
        for found in _FENCE.finditer(text)
    ]


def pages() -> list[Path]:
    """Every page that people read, the reports of studies left out: those are made, not written."""
    written = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "report.md"]
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *written])


def command_block(page: Path, name: str) -> str:
    """The one block after ``<!-- command: name -->``."""
    (found,) = [block.text for block in blocks(page) if (block.mark, block.what) == ("command", name)]
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each ``twofold`` that a shell script calls, as far as a reader sees: one per line, none behind a pipe."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.split(" | ")[0], comments=True)
        if words and Path(words[0]).name == "twofold":
            yield words[1:]


def check_understood(arguments: list[str]) -> None:
    """Raise an error of the command line if it does not know the command, an option or a value's form; nothing is run."""
    command, rest = get_command(app), arguments
    context = command.make_context("twofold", list(arguments))
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, list(rest))
        if not hasattr(command, "resolve_command"):
            command.make_context("twofold", list(rest), parent=context)


@dataclass
class Reader:
    """Carries out a page's blocks in ``folder``, as somebody who reads it from the top does. Run it with ``folder`` as the working directory."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    own_package: bool = True
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: str | None = None

    def read(self, block: Block) -> None:
        if block.kind not in KINDS:
            raise AssertionError(f"A block is {block.kind!r}: say one of {', '.join(sorted(KINDS))}.")
        if block.kind == "text":
            self._compare(block.text)
        elif block.kind == "diff":
            self._exchange(block)
        elif block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.mark:
            self._only_understand(block)
        elif block.kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block.text, f"line {block.line}", "exec"), self.namespace)
            self.printed = output.getvalue()
        elif block.kind == "bash":
            self.printed = "".join(self._shell(part) for part in _parts(block.text))
        else:
            raise AssertionError(f"A block of {block.kind} needs a title, the file that it stands for.")

    def _only_understand(self, block: Block) -> None:
        self.printed = None
        if block.kind == "python":
            compile(block.text, f"line {block.line}", "exec")
        for arguments in commands(block.text):
            check_understood(arguments)

    def _shell(self, script: str) -> str:
        if self.own_package and _is_one_call(script):
            done = CliRunner().invoke(app, shlex.split(script, comments=True)[1:], prog_name="twofold")
            if done.exception and not isinstance(done.exception, SystemExit):
                raise done.exception
            assert done.exit_code == 0, f"{script}: {done.output}"
            return done.stdout
        bin_folder = Path(sys.executable).parent
        environment = os.environ | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONIOENCODING": "utf-8",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment | self.environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout

    def _compare(self, wanted: str) -> None:
        assert self.printed is not None, "Nothing ran before this output."
        # The checker reads "..." and forgives runs of blanks; an empty line has no special spelling here.
        is_so = doctest.OutputChecker().check_output(
            wanted, self.printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        assert is_so, f"The page says:\n{wanted}\nbut it is:\n{self.printed}"

    def _exchange(self, block: Block) -> None:
        path = self.folder / block.title
        text = path.read_text(encoding="utf-8")
        lines = block.text.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " ")) for sign in "-+")
        assert text.count(old) == 1, f"{block.title} does not hold, once:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def _parts(script: str) -> Iterator[str]:
    """A script whose lines are all simple calls of ``twofold`` is carried out line by line, any other one whole."""
    joined = script.replace("\\\n", " ").strip()
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    yield from lines if all(line.startswith("twofold ") for line in lines) else (joined,)


def _is_one_call(script: str) -> bool:
    """Whether a shell would do nothing but start ``twofold``: no pipe, no redirection, no second command, no variable."""
    words = list(shlex.shlex(script, posix=True, punctuation_chars=True))
    return words[0] == "twofold" and "$" not in script and not any(set(word) <= set("();<>|&") for word in words)
