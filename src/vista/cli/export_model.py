"""``vista export-model``: the ranking as a program that torch alone runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_model(
    run: Annotated[Path, typer.Argument(help="Run folder of a vista or recent model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    is_compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile it, too, for this kind of processor; takes minutes, and a C++ compiler."
        ),
    ] = False,
) -> None:
    """Write the ranking as a program for torch without vista: model.pt2, metadata.json, items.json (docs/serving.md).

    It takes summary tokens, recent events and candidates as tensors and gives a probability per task. It is compared
    with the model before it is kept.
    """
    from vista import api

    path = api.export_model(run, out, is_compiled)
    beside = "compiled.pt2, metadata.json" if is_compiled else "metadata.json"
    typer.echo(f"wrote {path}, with {beside} and items.json beside it; its scores are those of the model")
