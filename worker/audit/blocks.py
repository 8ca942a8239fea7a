"""I9: sealed ledger rows are what was sealed; worker.books.verification proves it, block by block.

The blocks are checked beside the walk over the ledger, in a thread: the server hashes, while this process checks draws.
An audit that goes on begins behind the last block of its mark. A chain that was made anew, with its head, holds in
itself. But the mark names the hash of a block, under the seed, and so does a checkpoint outside, against which
`tombola books verify --against` compares the chain.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from sqlalchemy import func, select

from tombola.producers.domain.books.blocks import Block
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage.schema import books_blocks
from tombola.worker.audit.parts import Parts
from tombola.worker.audit.report import Report, Violation
from tombola.worker.books import head
from tombola.worker.books.verification import check_blocks


class SealedBlocks:
    """Checks the blocks behind number `after`; `last` is the last one that was checked, and `last_hash` its hash.

    `known` are number and hash of a block that a former audit has checked.
    """

    def __init__(self, parts: Parts, after: int, known: tuple[int, str] = (0, "")) -> None:
        self.last, self.last_hash = known if after else (0, "")
        self._known = known
        self._parts = parts
        self._after = after
        self._found = Report()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sealed-blocks")
        self._checking: Future[None] = self._pool.submit(self._check)

    def finish(self, report: Report) -> None:
        """Wait until all blocks are checked, and report what was found."""
        try:
            self._checking.result()
        except DrawError as error:
            report.obstacles["I9"] = str(error)
        else:
            report.completed.add("I9")
        finally:
            self._pool.shutdown()
        for violation in self._found.violations:
            report.add(violation)
        report.counts["I9"] = self._found.counts["I9"]
        report.blocks = self.last - self._after

    def _check(self) -> None:
        for found in check_blocks(self._parts.engine, from_block=self._after + 1, on_block=self._see):
            self._found.add(Violation("I9", found.subject, found.what))
        with self._parts.part() as connection:
            number, known_hash = self._known
            query = select(books_blocks.c.hash).where(books_blocks.c.number == number)
            if number and connection.execute(query).scalar() != known_hash:
                what = "is not the one that the last clean audit has met: the chain was made anew"
                self._found.add(Violation("I9", f"block {number}", what))
            size = head.read(connection).peaks.size
            last = connection.execute(select(func.max(books_blocks.c.number))).scalar() or 0
        if last < size:
            self._found.add(Violation("I9", "the head", f"has seen {size} blocks, {last} are left"))

    def _see(self, block: Block) -> None:
        self.last, self.last_hash = block.number, block.hash
