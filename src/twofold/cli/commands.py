"""How every command ends: a sentence and an exit code, never a traceback for a mistake that the user can mend.

0 is success; 1 means that a run failed; 2 is a mistake in what was asked; 130 is an interruption (Ctrl-C).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from twofold.errors import TwofoldError

RUN_FAILED = 1
MISTAKE = 2
INTERRUPTED = 130


class Commands(TyperGroup):
    """A group of commands whose errors are one sentence on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with its code."""
        del standalone_mode  # the code below is what standalone means here
        try:
            code = super().main(
                args=args,
                prog_name=prog_name,
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
            sys.stdout.flush()
        except TwofoldError as error:
            _end(str(error), MISTAKE)
        except typer.TyperException as error:
            _end(_usage(error), error.exit_code)
        except typer.Abort:
            _end("Stopped.", INTERRUPTED)
        except BrokenPipeError:
            # The reader (`| head`) has left. Python flushes stdout once more when it exits; give that flush somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            _end(f"{error.strerror or type(error).__name__}{place}.", MISTAKE)
        if code == INTERRUPTED:
            _end("Interrupted.", INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _usage(error: typer.TyperException) -> str:
    message = error.format_message().replace(". Did you mean", "; did you mean").rstrip(".?")
    context = getattr(error, "ctx", None)
    return f"{message} (see '{context.command_path} --help')." if context else f"{message}."


def _end(sentence: str, code: int) -> NoReturn:
    typer.secho("Error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(sentence, err=True)
    sys.exit(code)
