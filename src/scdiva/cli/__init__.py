"""The command line: one file per command, heavy imports inside the bodies."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import typer

from scdiva.cli import (
    annotate,
    augment,
    check,
    convert,
    demo,
    embed,
    evaluate_annotation,
    evaluate_generation,
    evaluate_grn,
    evaluate_integration,
    evaluate_perturbation,
    evaluate_protocol,
    generate,
    grn,
    impute,
    inspect,
    integrate,
    interpolate,
    perturb,
    reconstruct,
    scdiffusion,
    train,
)
from scdiva.errors import ScdivaError

app = typer.Typer(
    name="scdiva",
    help="Generative single-cell foundation models: from an .h5ad of raw counts to results one can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("check")(check.check)
app.command("embed")(embed.embed)
app.command("annotate")(annotate.annotate)
app.command("integrate")(integrate.integrate)
app.command("impute")(impute.impute)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("generate")(generate.generate)
app.command("perturb")(perturb.perturb)
app.command("interpolate")(interpolate.interpolate)
app.command("augment")(augment.augment)
app.command("grn")(grn.grn)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("pretrain")(train.pretrain)
app.command("finetune")(train.finetune)

latent = typer.Typer(
    help="Latent diffusion of cells: one file of raw counts to a model that generates under stated conditions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
latent.command("fit")(scdiffusion.fit)
latent.command("add-condition")(scdiffusion.add)
app.add_typer(latent, name="scdiffusion")

evaluate = typer.Typer(
    help="Judge results beside simple baselines, a null control and a ceiling, in one run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate.command("annotation")(evaluate_annotation.evaluate_annotation)
evaluate.command("generation")(evaluate_generation.evaluate_generation)
evaluate.command("generation-protocol")(evaluate_protocol.evaluate_protocol)
evaluate.command("integration")(evaluate_integration.evaluate_integration)
evaluate.command("perturbation")(evaluate_perturbation.evaluate_perturbation)
evaluate.command("embedding")(evaluate_integration.evaluate_embedding)
evaluate.command("grn")(evaluate_grn.evaluate_grn)
app.add_typer(evaluate, name="evaluate")


@app.callback(invoke_without_command=True)
def _common(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"scdiva {installed('scdiva')}")
        raise typer.Exit


_INTERRUPTED = 130


def main() -> None:
    """Run the command line; bad input gives one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # a polite kill must clean up temporary files like Ctrl-C does
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except ScdivaError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        typer.echo(f"error: {error.strerror or error}: {error.filename or 'no file named'}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C into exit code 130 without a word
        if isinstance(stop, SystemExit) and stop.code != _INTERRUPTED:
            raise
        typer.echo(
            "interrupted; no half-written result was left behind, and the same command resumes a training run", err=True
        )
        sys.exit(_INTERRUPTED)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
