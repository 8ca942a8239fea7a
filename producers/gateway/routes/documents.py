"""Documents for integrators: the OpenAPI document, Swagger UI, and the page of all kinds of problems."""

from __future__ import annotations

import html
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Final

from litestar import Response, get
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.response import Stream

from tombola.producers.gateway.files import HEADERS, serve_file
from tombola.producers.gateway.problems import KINDS
from tombola.producers.web.problems import KINDS_PATH

DOCS: Final = Path(__file__).parents[1] / "docs"
SWAGGER_FILES: Final = frozenset({"swagger-ui-bundle.js", "swagger-ui-standalone-preset.js", "swagger-ui.css"})
# Swagger UI sets styles from scripts, and its style sheet contains its icons.
DOCS_HEADERS: Final = HEADERS | {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


def document_routes(openapi_document: bytes) -> list[Any]:
    """The routes of all documents; `openapi_document` is served as it is."""

    @get("/openapi.json", media_type="application/json")
    async def openapi() -> Response[bytes]:
        return Response(openapi_document, media_type="application/json")

    return [openapi, show_kinds, show_docs, show_docs_file]


@get("/docs", include_in_schema=False)
async def show_docs(state: State) -> Response[bytes] | Stream:
    return serve_file(DOCS / "index.html", DOCS_HEADERS, state.file_turns)


@get("/docs/files/{name:str}", include_in_schema=False)
async def show_docs_file(name: str, state: State) -> Response[bytes] | Stream:
    folder = _swagger_folder() if name in SWAGGER_FILES else DOCS
    if folder is None or name not in SWAGGER_FILES | {"docs.js"}:
        raise NotFoundException("no such file")
    return serve_file(folder / name, DOCS_HEADERS, state.file_turns)


@cache
def _swagger_folder() -> Path | None:
    """The folder of Swagger UI's files in the package that contains them; None where it is not installed."""
    try:
        # By the distribution's own list: a second distribution, with version 4 of Swagger UI, has the same import name.
        found = files("swagger-ui-bundle-v2") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(it.locate())).parent for it in found if it.name == "swagger-ui-bundle.js"), None)


def _kinds_page() -> bytes:
    """All kinds of problems as HTML, each with its code as the anchor that `type` links to."""
    rows = "".join(
        f'<tr id="{it.code}"><td><code>{it.code}</code><td>{it.status}<td>{html.escape(it.means)}'
        f"<td>{html.escape(it.remedy)}"
        for it in KINDS
    )
    head = "<tr><th>code<th>status<th>what it means<th>what to do"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Errors · tombola</title>'
        f"<h1>Errors</h1><table><thead>{head}</thead><tbody>{rows}</tbody></table></html>"
    ).encode()


_KINDS_PAGE: Final = _kinds_page()


@get(KINDS_PATH, include_in_schema=False)
async def show_kinds() -> Response[bytes]:
    return Response(_KINDS_PAGE, media_type="text/html; charset=utf-8")
