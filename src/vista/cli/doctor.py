"""``vista doctor``: what this installation can do."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Show versions, device, threads, memory, CPU features, and which operators are active and why others are not.

    Each active operator is run once and compared with its definition; exit code 1 if one of them differs.
    """
    import json
    from dataclasses import asdict

    from vista.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(report.describe())
    if not report.is_healthy:
        raise typer.Exit(1)
