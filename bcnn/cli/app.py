"""The command `bcnn`. Commands import torch when they run, so that `--help` is quick."""

import sys
from inspect import cleandoc
from typing import Annotated

import typer

from bcnn.cli.cache import cache
from bcnn.cli.check import check
from bcnn.cli.compare import compare
from bcnn.cli.demo import demo
from bcnn.cli.errors import exit_code_of
from bcnn.cli.evaluate import evaluate
from bcnn.cli.explain import explain
from bcnn.cli.export import export
from bcnn.cli.predict import predict
from bcnn.cli.push import push

HELP = {"help_option_names": ["-h", "--help"]}
# Hydra reads every word after `train`, --help and -m among them.
UNPARSED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(pretty_exceptions_enable=False, context_settings=HELP)


def _print_version(asked: bool) -> None:
    if asked:
        from bcnn import __version__  # reads the package's metadata

        print(__version__)
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")


@app.callback()
def bcnn(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Fine-grained image recognition with bilinear CNNs."""


@app.command(context_settings=UNPARSED, options_metavar="", rich_help_panel="Train")
def train(context: typer.Context) -> int:
    """Train on labelled images; see train --help for Hydra's OPTION=VALUE words."""
    from bcnn.cli.train import main as train_main

    return train_main(context.args)


for command in (check, evaluate, compare, predict, explain, export, push, demo, cache):
    # typer keeps the line breaks of a docstring, which are not those of the terminal.
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(each.replace("\n", " ") for each in paragraphs))(command)


def main(words: list[str] | None = None) -> int:
    """Run the command that the words name, by default those of this process; return its exit code."""
    given = sys.argv[1:] if words is None else words
    parsed = [word for word in given if word != "--debug"]  # `exit_code_of` reads it anywhere
    return exit_code_of(lambda: app(parsed or ["--help"], prog_name="bcnn", standalone_mode=False))
