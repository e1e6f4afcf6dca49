"""The matrices of a stream that are pruned."""

from __future__ import annotations

from llmprune.model.matrices import Matrix, Selection, block_matrices
from llmprune.stream.stream import Stream


def selected(stream: Stream, selection: Selection) -> dict[int, list[Matrix]]:
    """The matrices that are pruned, block by block; the head comes after the last block, if ``only`` names it."""
    blocks = enumerate(zip(stream.names, stream.walk.blocks, strict=True))
    found = {i: [m for m in block_matrices(block) if selection.takes(f"{name}.{m.name}")] for i, (name, block) in blocks}
    if stream.walk.head_free and selection.names(f"{stream.walk.head_path}.weight"):
        found[len(stream.names)] = block_matrices(stream.walk.head)
    return found
