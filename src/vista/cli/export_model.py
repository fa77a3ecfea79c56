"""``vista export-model``: the ranking as a program that torch alone runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_model(
    run: Annotated[Path, typer.Argument(help="Run folder of a vista or recent model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
) -> None:
    """Write the ranking as a program for torch without vista: model.pt2, metadata.json, items.json (docs/serving.md).

    It takes summary tokens, recent events and candidates as tensors and gives a probability per task. It is compared
    with the model before it is kept.
    """
    from vista import api

    path = api.export_model(run, out)
    typer.echo(f"wrote {path}, with metadata.json and items.json beside it; its scores are those of the model")
