"""The page at `/`: a fixed table of files, read at import. No path from a client reaches the disk.

    /            index.html
    /web/NAME    the other files of dist_infer/openai/web

They hold no secret and need no key; what they call does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text ever becomes markup, whatever a script of ours does
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",  # kept, but asked about: the names of files do not change with what is in them
}


@dataclass(frozen=True, kw_only=True)
class WebFile:
    """One file of the page. etag: of its bytes, in quotes."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """200 with all of it, or 304 for who has it."""
        headers = {**_HEADERS, "etag": self.etag}
        if _names(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def _names(header: str, etag: str) -> bool:
    """Whether If-None-Match names it; a proxy that compresses makes a weak one of it."""
    return header.strip() == "*" or etag in (part.strip().removeprefix("W/") for part in header.split(","))


def _read() -> Mapping[str, WebFile]:
    found = {}
    for file in resources.files("dist_infer.openai").joinpath("web").iterdir():
        kind = _KINDS.get("." + file.name.rpartition(".")[2])
        if kind is None:
            continue  # an editor's backup
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        path = "/" if file.name == "index.html" else f"/web/{file.name}"
        found[path] = WebFile(content=content, media_type=kind, etag=etag)
    return MappingProxyType(found)


WEB_FILES: Final = _read()


def add_web_pages(app: FastAPI) -> None:
    """GET and HEAD of each file; they are no part of the API's document."""

    async def page(request: Request) -> Response:
        return WEB_FILES["/"].answer(request)

    async def file(request: Request) -> Response:
        found = WEB_FILES.get(f"/web/{request.path_params['name']}")
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    app.router.add_route("/", page, methods=["GET"], include_in_schema=False)
    app.router.add_route("/web/{name}", file, methods=["GET"], include_in_schema=False)
