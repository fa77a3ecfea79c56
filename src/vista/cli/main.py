"""The command line: every command in plain sight, and what becomes of an error.

A ``VistaError`` is printed as ``error: ...`` without a traceback and ends with its exit code. Ctrl-C ends with 130 and
says what was kept: whoever knows raises ``KeyboardInterrupt("checkpoint of step 300 kept in RUN")``. A reader that goes
away (``| head``) ends it quietly. Anything else is a bug and shows its traceback.

Command modules import torch, polars and their own package inside the command, so that ``vista --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vista.cli.benchmark import app as benchmark
from vista.cli.data import app as data
from vista.cli.demo import demo
from vista.cli.doctor import doctor
from vista.cli.evaluate import evaluate
from vista.cli.export import export
from vista.cli.export_model import export_model
from vista.cli.forget import forget
from vista.cli.plan import plan
from vista.cli.prepare import prepare
from vista.cli.serve import serve
from vista.cli.store import app as store
from vista.cli.stream import app as stream
from vista.cli.summarize import rank, summarize
from vista.cli.train import train
from vista.errors import ConfigError, VistaError, VistaWarning

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
ENVIRONMENT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # the machine's, not ours
PLAIN_FORMAT = warnings.formatwarning
KEPT = "finished outputs are kept; an unfinished one is not used by any later step"


class VistaGroup(TyperGroup):
    """The group of all commands; turns what a command raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except VistaError as error:
            _report(str(error), debug)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            _report(f"{interrupt}" if interrupt.args else KEPT, debug, word="interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except OSError as error:
            if error.errno not in ENVIRONMENT_ERRORS:
                raise
            _report(f"{error.strerror}: {error.filename or 'an output'}; {KEPT}", debug)
            raise typer.Exit(VistaError.exit_code) from None


def _report(message: str, debug: bool, word: str = "error") -> None:
    """The message on stderr; before it the traceback where that was asked for. Called while an exception is handled."""
    if debug:
        traceback.print_exc()
    print(f"{word}: {message}", file=sys.stderr)


def _silence_stdout() -> None:
    """Send nowhere what is still buffered for a closed pipe, so that Python's own flush at the end can not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="vista",
    cls=VistaGroup,
    help="Lifelong user memory for recommenders: a user's whole history as a few hundred summary tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vista {version('vista-recsys')}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="VISTA_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Options of every command; VistaGroup reads ``debug``, the version is printed by its callback."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and "TORCHELASTIC_RUN_ID" in os.environ and context.invoked_subcommand != "train":
        raise ConfigError(
            f"torchrun has started {started} processes of vista {context.invoked_subcommand}; only vista train is made "
            "for that: start the others as they are"
        )


app.command()(demo)
app.add_typer(data)
app.add_typer(benchmark)
app.command()(prepare)
app.command()(train)
app.command()(evaluate)
app.command()(summarize)
app.add_typer(stream)
app.command()(rank)
app.command()(export)
app.command(name="export-model")(export_model)
app.command()(serve)
app.command()(forget)
app.add_typer(store)
app.command()(plan)
app.command()(doctor)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours are for users and have no use for a place in the code; all others look as ever."""
    if issubclass(category, VistaWarning):
        return f"warning: {message}\n"
    return PLAIN_FORMAT(message, category, filename, lineno, line)


def main() -> None:
    """Entry point of the ``vista`` console script."""
    warnings.formatwarning = _format_warning
    try:
        app(prog_name="vista")
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _silence_stdout()


if __name__ == "__main__":
    main()
