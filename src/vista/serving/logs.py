"""One line of JSON per request and per thing that happens, on stderr."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any


def say(event: str, **facts: Any) -> None:
    """Write one line. Facts that are None or empty are left out."""
    told = {name: value for name, value in facts.items() if value not in (None, "")}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event} | told
    sys.stderr.write(json.dumps(line) + "\n")
