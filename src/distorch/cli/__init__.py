"""The command line: ``distorch run``, ``plan``, ``inspect``, ``bench``, ``convert``, ``probe``.

torch is imported by those that run, measure or profile, and only once what was asked has been read
without a mistake.
"""

from __future__ import annotations

from typing import Annotated

import typer

from distorch import __version__
from distorch.cli import bench, convert, inspect, plan, probe, run
from distorch.cli.endings import Command

__all__ = ["main"]

_HELP = """
Run models that do not fit the memory of the device that computes.

Weights rest in several memories, and each visits the compute device just before it is needed.

\b
Examples:
  distorch run demo --allocation "cpu,64mb;disk,*" --prompt "The capital of France is"
  distorch plan wan-14b --machine rtx4070-12gb --format fp8
  distorch plan model.gguf --virtual-vram 8 --donor disk
  distorch bench demo --sweep
  distorch convert flux1-dev.safetensors flux1-dev-Q4_K.gguf --format Q4_K
  distorch probe
  distorch inspect model.gguf
"""

app = typer.Typer(
    help=_HELP,
    add_completion=False,
    rich_markup_mode=None,  # brackets in a help text are brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", cls=Command, help=run.HELP)(run.run)
app.command("plan", cls=Command, help=plan.HELP)(plan.plan)
app.command("inspect", cls=Command, help=inspect.HELP)(inspect.inspect)
app.command("bench", cls=Command, help=bench.HELP)(bench.bench)
app.command("convert", cls=Command, help=convert.HELP)(convert.convert)
app.command("probe", cls=Command, help=probe.HELP)(probe.probe)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"distorch {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command that the arguments of this process name, and exit."""
    app(prog_name="distorch")
