"""What an interrupted run has left, and the records by which it is resumed."""

from __future__ import annotations

from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.sink import Sink
from llmprune.report.fields import typed
from llmprune.results import BlockReport, Polished


def finished_parts(journal: Journal, sink: Sink, blocks: int, needed: tuple[str, ...]) -> tuple[dict[int, BlockReport], Polished | None]:
    """(the leading blocks that an earlier process finished and whose tensors still have their hashes, the result of its distillation if it got
    that far). needed: records that all blocks depend on.
    """
    if any(journal.read(name) is None for name in needed):
        return {}, None
    polished = journal.read("polished")
    if polished is not None and not sink.accept_again(polished["hashes"]):
        polished = None
    later = polished["hashes"] if polished else {}
    finished: dict[int, BlockReport] = {}
    for index in range(blocks):
        record = journal.read(f"block-{index:05d}")
        if record is None or not sink.accept({key: h for key, h in record["hashes"].items() if key not in later}):
            if polished:  # the blocks before this one have changed since they were finished: start over
                sink.forget()
                return {}, None
            break
        finished[index] = typed(BlockReport, record["report"])
    return finished, typed(Polished, polished["report"]) if polished else None
