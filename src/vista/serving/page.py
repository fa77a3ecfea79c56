"""The files of the page at ``/ui``: a few, of this package, without any from another host.

The page asks the same endpoints as everybody, with the token that the person at the browser gives.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from starlette.responses import Response

from vista.errors import RequestError
from vista.serving.requests import shown

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # nothing but this server's own files and answers; no inline script or style; not inside another page
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for anew each time, and not sent anew where it is the same
}


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Content, media type and tag by name."""
    found = {}
    for file in resources.files("vista.serving").joinpath("static").iterdir():
        kind = KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            content = file.read_bytes()
            found[file.name] = content, kind, f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return found


def page_file(name: str, tag_given: str) -> Response:
    """A file of the page, or 304 where the browser has it. Raises RequestError for one that is not there."""
    if name not in files():
        raise RequestError(f"the page has no file {shown(name)}; it begins at /ui", 404)
    content, kind, tag = files()[name]
    headers = HEADERS | {"etag": tag}
    if tag_given == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)
