"""The head goes outside: signed checkpoints in a folder that the database's owner does not control.

A chain that was rebuilt as a whole holds, and so does one whose end was cut off. Only a copy of an earlier head tells
them from the real one. A checkpoint is a new file each time: the folder may be a mounted bucket that keeps what was
written, or a git work tree that a timer pushes (worker/docs/books.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.books import checkpoints
from tombola.producers.domain.books.checkpoints import NOTE_BYTES_MAX, Head, PrivateKey, PublicKey, WrongKey
from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.domain.errors import ConfigurationError, DrawError, InvalidRequest
from tombola.producers.storage import books, clock
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.worker.books import head as heads

SUFFIX: Final = ".checkpoint"
BLOCKS_AT_ONCE: Final = 1000

_is_name = re.compile(rf"(\d{{1,19}}){re.escape(SUFFIX)}", re.ASCII).fullmatch


class AnchorConflict(DrawError):
    """The folder has a checkpoint that does not go with these books."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def sign_once(engine: Engine, key: PrivateKey, *, every_s: float) -> str | None:
    """Sign the head if blocks were sealed since the last checkpoint, and that is `every_s` old; return what was signed.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if not _is_due(heads.read(connection), clock.now(connection) - timedelta(seconds=every_s)):
                return None
        with engine.begin() as connection:
            head, now = heads.lock(connection), clock.now(connection)
            if head is None or not _is_due(head, now - timedelta(seconds=every_s)):
                return None
            note = key.sign(head.peaks.size, head.peaks.root)
            heads.write(connection, head._replace(checkpoint=note, checkpoint_at=now))
            return note
    except SQLAlchemyError as error:
        if fault_of(error) is Fault.CONFLICT:
            return None
        raise explain(error) from error


def _is_due(head: heads.Head, signed_before: object) -> bool:
    if not head.peaks.size:
        return False
    if head.checkpoint is None or head.checkpoint_at is None:
        return True
    is_new = checkpoints.read_unverified(head.checkpoint).size < head.peaks.size
    return is_new and head.checkpoint_at <= signed_before  # type: ignore[operator]


def write(folder: Path, note: str) -> bool:
    """Write a checkpoint to the folder, as a file of its own; whether it was not there yet.

    Raises AnchorConflict where the folder has another checkpoint of as many blocks, or one of more blocks: then the
    database was rolled back, or its chain was rebuilt. Raises ConfigurationError where the folder cannot be used.
    """
    size = checkpoints.read_unverified(note).size
    path = folder / f"{size:012}{SUFFIX}"
    try:
        latest = max((int(found[1]) for it in folder.iterdir() if (found := _is_name(it.name))), default=0)
        if latest > size:
            raise AnchorConflict(
                f"the books have {size:,} blocks, and a checkpoint of {latest:,} is in {folder}: the database was "
                "rolled back, or blocks were cut off. `tombola books verify --against` tells which"
            )
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(note)
            return True
        except FileExistsError:
            if path.read_text(encoding="utf-8") != note:
                raise AnchorConflict(
                    f"{path.name} in {folder} is another checkpoint than the books have: run `tombola books verify`"
                ) from None
            return False
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"TOMBOLA_BOOKS_ANCHOR cannot be used: {error}") from None


def remember_anchored(engine: Engine) -> None:
    """Record that a checkpoint was written outside just now. Raises as `sign_once` does."""
    try:
        with engine.begin() as connection:
            head = heads.lock(connection)
            if head is not None:
                heads.write(connection, head._replace(anchored_at=clock.now(connection)))
    except SQLAlchemyError as error:
        raise explain(error) from error


# ---- verifying -------------------------------------------------------------------------------------------------------


class Anchored(NamedTuple):
    """What the checkpoints in a folder say of the blocks.

    `blocks` is the number of blocks, `upto` the number of the last one that a checkpoint covers, with all before it.
    `wrong` says in sentences what does not go together.
    """

    blocks: int
    upto: int
    checkpoints: int
    wrong: Sequence[str]


class _Anchor(NamedTuple):
    name: str
    head: Head


def check_anchors(engine: Engine, folder: Path, keys: Sequence[PublicKey]) -> Anchored:
    """Compare every checkpoint in the folder, signed by one of `keys`, with the blocks as they are now.

    Raises InvalidRequest where the folder cannot be read; ServiceUnavailable or ConfigurationError when the database
    cannot be read.
    """
    wrong: list[str] = []
    anchors = sorted(_read(folder, keys, wrong), key=lambda it: (it.head.size, it.name))
    if not anchors:
        wrong.append(f"no checkpoint in {folder} is signed by a key that was given: nothing is anchored")
    try:
        blocks, upto = _compare(engine, anchors, wrong)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return Anchored(blocks, upto, len(anchors), wrong)


def _read(folder: Path, keys: Sequence[PublicKey], wrong: list[str]) -> Iterator[_Anchor]:
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder")
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                note = file.read(NOTE_BYTES_MAX + 1)
            yield _Anchor(path.name, _verified(note, keys))
        except (OSError, UnicodeDecodeError, InvalidRequest) as error:
            wrong.append(f"{path.name}: {error}")


def _verified(note: str, keys: Sequence[PublicKey]) -> Head:
    refusal = WrongKey()
    for key in keys:
        try:
            return checkpoints.read(note, key)
        except WrongKey as error:
            refusal = error
    raise refusal


def _compare(engine: Engine, anchors: Sequence[_Anchor], wrong: list[str]) -> tuple[int, int]:
    """The number of blocks, and of the last one that is anchored; adds what is wrong to `wrong`."""
    waiting, peaks, upto, is_broken = list(anchors), Peaks(), 0, False
    for hash in _hashes(engine):
        peaks = peaks.append(hash)
        while waiting and waiting[0].head.size <= peaks.size:
            anchor = waiting.pop(0)
            if anchor.head.root == peaks.root:
                upto = upto if is_broken else anchor.head.size
            else:
                is_broken = True
                wrong.append(
                    f"{anchor.name}: blocks {upto + 1} to {anchor.head.size} are not the ones that were signed: the "
                    "chain was rebuilt"
                )
    for anchor in waiting:
        if anchor.head.size > peaks.size:
            wrong.append(
                f"{anchor.name}: {anchor.head.size} blocks were signed, {peaks.size} are left: blocks were cut off, or "
                "the database was rolled back"
            )
    return peaks.size, upto


def _hashes(engine: Engine) -> Iterator[bytes]:
    """The hash of every block in its order, from what the block says."""
    number = 1
    while True:
        with engine.connect().execution_options(read_only=True) as connection:
            some = books.sealed_from(connection, number, rows_max=BLOCKS_AT_ONCE)
        if not some:
            return
        yield from (bytes.fromhex(it.block.hash) for it in some)
        number = some[-1].block.number + 1
