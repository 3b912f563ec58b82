"""The command ``cbd``: parse, call, print."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from cbd_hub.commands import carry, chains, heal, hub, models, sizes, space, speed
from cbd_hub.commands.printing import err, out
from cbd_hub.errors import ArgumentError, CBDError


app = typer.Typer(
    name="cbd", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    help="A language model in any size you want: distil a chain of anchors once, then make every size in between in seconds.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version
        out.print(f"cbd_hub {version('cbd-hub')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Say nothing here: the app's help speaks."""


def _quiet() -> None:
    """No warnings of the libraries between the tables."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore")


def _end_bars() -> None:
    """End the line of a progress bar that an error has cut short."""
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    for bar in [bar for bar in bars if not bar.disable]:
        bar.close()


class _Lines(logging.Handler):
    """Shows what is logged as lines beside the output."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(("warning: " if record.levelno >= logging.WARNING else "") + escape(record.getMessage()))


def _tell() -> None:
    """Show warnings, and what is timed, which takes some seconds; so is a prediction that was checked."""
    told = logging.getLogger("cbd_hub")
    if not any(isinstance(handler, _Lines) for handler in told.handlers):
        told.addHandler(_Lines())
    logging.getLogger("cbd_hub.speed").setLevel(logging.INFO)


for module in (chains, sizes, models, heal, carry, hub, space, speed):
    app.add_typer(module.commands)


def main() -> NoReturn:
    """Run the command: exit code 0 for done, 1 for failed, 2 for a wrong call, 130 for stopped by Ctrl-C."""
    words = sys.argv[1:]
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    arguments = [word for word in options if word != "--debug"] + words[len(options) :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is half-written is removed
    _tell()
    if not debug:
        _quiet()
    try:
        app(args=arguments, prog_name="cbd")
    except Exception as error:
        if debug:
            raise
        _end_bars()
        err.print(f"error: {escape(_said(error))}")
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    sys.exit(0)


def _said(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, CBDError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the disk"
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])[:300]}; run with --debug for the traceback"


if __name__ == "__main__":
    main()
