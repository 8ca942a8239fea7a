"""Serving static files: each is read once and kept in memory, so that a request costs no more than sending the file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Final

from litestar import Response
from litestar.response import Stream

PIECE_BYTES: Final = 32 * 1024
MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
HEADERS: Final = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def serve_file(path: Path, headers: dict[str, str], turns: asyncio.Lock) -> Response[bytes] | Stream:
    """The file as a response; `turns` is shared by all responses of an application (see `_pieces`)."""
    return serve_content(_content(path), MEDIA_TYPES[path.suffix], headers, turns)


def serve_content(
    content: bytes, media_type: str, headers: dict[str, str], turns: asyncio.Lock
) -> Response[bytes] | Stream:
    """The content of a file as a response, as `serve_file`."""
    if len(content) <= PIECE_BYTES:
        return Response(content, media_type=media_type, headers=headers)
    headers = headers | {"Content-Length": str(len(content))}
    return Stream(_pieces(content, turns), media_type=media_type, headers=headers)


async def _pieces(content: bytes, turns: asyncio.Lock) -> AsyncIterator[bytes]:
    """The content in pieces: one per round of the event loop, for all files together, so that draws do not wait."""
    for start in range(0, len(content), PIECE_BYTES):
        async with turns:
            await asyncio.sleep(0)
        yield content[start : start + PIECE_BYTES]


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()
