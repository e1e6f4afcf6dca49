"""What an interrupted run has left, and the records that it goes on by."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.sink import Sink
from llmprune.report.result import block_from_json
from llmprune.results import BlockReport, Polished
from llmprune.stream.stream import Stream


def finished_parts(journal: Journal, sink: Sink, blocks: int, needed: tuple[str, ...]) -> tuple[dict[int, BlockReport], dict[str, Any] | None]:
    """(the leading blocks that an earlier process finished and whose tensors still have their hashes, what its distillation did if it came
    that far). needed: records that all blocks rest on.
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
            if polished:  # the blocks before this one are not as they were when they were finished: begin anew
                sink.forget()
                return {}, None
            break
        finished[index] = block_from_json(record["report"], record["seconds"])
    return finished, polished["report"] if polished else None


def polish_to_json(polished: Polished, stream: Stream) -> dict[str, Any]:
    value = asdict(polished)
    value["changed"] = [f"{stream.path_of(index)}.{name}" for index, names in polished.changed.items() for name in names]
    return value
