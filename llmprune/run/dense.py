"""The dense model that a result was pruned from, found again, and whether a pruned model can be trained towards it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.checkpoint.resolve import cached_source, is_bundled, open_source
from llmprune.checkpoint.source import Source
from llmprune.errors import RequestError
from llmprune.report.result import Report
from llmprune.stream.checkpoint import CheckpointStream

PROBE = "The first thing to know about a river: 3 × 7 is twenty-one, “quoted”, naïve.\n\n\tend"


def find_dense(report: Report, folder: Path) -> Source | None:
    """The source of a result, recognised by its hashes: bundled, in the Hub's cache, or a folder of its name here or beside the result. Nothing is
    downloaded.
    """
    for source in _candidates(report, folder):
        if source.states.keys() == report.source.files.keys() or source.decoder is not None:
            source.scan()
            if source.hashes == report.source.files:
                return source
    return None


def _candidates(report: Report, folder: Path) -> Iterator[Source]:
    name, revision = str(report.recipe.get("model") or report.source.name), report.source.revision
    if is_bundled(name):
        yield open_source(name)
    elif revision is not None:
        source = cached_source(report.source.name, revision)
        yield from () if source is None else (source,)
    for place in (Path(name), folder.parent / name):
        if place.is_dir() and place.resolve() != folder.resolve():
            try:
                yield open_source(str(place))
            except RequestError:  # another folder of that name
                continue


def check_dense(dense: CheckpointStream, tokenizer: Any, dense_tokenizer: Any, pruned: CheckpointStream, same_shape: bool) -> None:
    """Check that both models read and predict the same tokens and, unless units were cut out, have the same tensors. Raises RequestError."""
    name, hint = dense.source.name, "give the model that was pruned, or --loss ce"
    vocabularies = [vocabulary(stream) for stream in (dense, pruned)]
    if vocabularies[0] != vocabularies[1]:
        raise RequestError(f"dense model {name}: a vocabulary of {vocabularies[0]:,}, the pruned model's has {vocabularies[1]:,}", hint)
    if dense_tokenizer.get_vocab() != tokenizer.get_vocab() or dense_tokenizer(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise RequestError(f"dense model {name}: its tokenizer differs from the pruned model's", hint)
    if not same_shape:
        return
    theirs, ours = ({key: list(p.shape) for key, p in stream.skeleton.named_parameters()} for stream in (dense, pruned))
    odd = next((key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key)), None)
    if odd is not None:
        raise RequestError(f"dense model {name}: {odd} is {theirs.get(odd, 'missing')}, in the pruned model {ours.get(odd, 'missing')}", hint)


def vocabulary(stream: CheckpointStream) -> int:
    """Rows of the embeddings."""
    return stream.skeleton.get_parameter(f"{stream.walk.embeddings_path}.weight").shape[0]


def check_blocks(dense: CheckpointStream, pruned: CheckpointStream) -> None:
    """Raises RequestError where outputs of blocks cannot be compared."""
    ours, theirs = ((len(s.names), s.skeleton.config.get_text_config(decoder=True).hidden_size) for s in (pruned, dense))
    if ours != theirs:
        raise RequestError(
            f"loss blocks: {ours[0]} blocks of width {ours[1]}, in the dense model {theirs[0]} of width {theirs[1]}", "choose --loss kd"
        )
