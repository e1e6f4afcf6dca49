"""What Python users have in memory, as a source of texts and dialogues, or as token ids: lists, arrays, tensors, data sets, loaders, iterators.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llmprune.data.sources import GIVEN, TextSource
from llmprune.data.specs import is_path, mixture
from llmprune.errors import RequestError

TAKEN = "a name or path, a list of texts or of dialogues, a datasets.Dataset, a DataLoader of input_ids, or token ids [windows, length]"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
IDS, MASK = "input_ids", "attention_mask"
LOOKED_AT = 1000  # elements, for the first one that is not empty


class Replayed:
    """An iterator that can be iterated again, and is consumed only as far as needed."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._seen = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        at = 0
        while True:
            if at == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[at]
            at += 1


class Rows:
    """Elements as rows, made one by one."""

    def __init__(self, elements: Iterable[Any], row: Callable[[Any], Any]) -> None:
        self._elements, self._row = elements, row

    def __iter__(self) -> Iterator[Any]:
        return map(self._row, self._elements)


def in_memory(data: Any) -> list[Any]:
    """The data sets of ``eval`` or ``data``, each by its name or in memory. A list of names, of data sets, or of both is several; a list of texts, of
    which none is a name, or of dialogues is one.
    """
    if data is None:
        return []
    if not isinstance(data, list):
        return [data]
    if data and all(isinstance(one, str) for one in data):
        return [data] if all(is_text(one) for one in data) else data
    return [data] if any(isinstance(one, Mapping) or is_dialogue(one) for one in data) else data


def is_text(value: str) -> bool:
    """Whether a string is a text rather than a name: names that do not exist as paths have no blanks."""
    return bool(re.search(r"\s", value.strip())) and not is_path(value) and not mixture(value)


def is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and not {"role", "from"}.isdisjoint(value[0])


def taken(value: Any, name: str, wanted: int | None, shuffle: bool = False) -> TextSource | Tensor:
    """An object in memory as a source of documents, or as token ids [N, L], of which a stream gives about ``wanted`` (None: all). name: of the
    argument. Raises RequestError for anything else, with its type.
    """
    if isinstance(value, Tensor):
        return check_token_ids(value, name)
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        return _of_array(value, name)
    elements, again = _elements(value, name)
    first = next((one for one in islice(elements, LOOKED_AT) if one is not None), None)
    streamed = not isinstance(elements, list)
    if _is_ids(first):
        if shuffle and streamed:
            raise RequestError(
                f"{name}: shuffle with {_kind(value)}, which gives its windows in its own order", "shuffle it itself, or give a tensor"
            )
        return batched(elements, name, wanted)
    if shuffle and not again:
        raise RequestError(f"{name}: shuffle with {_kind(value)}, which is read once", "shuffle it itself, or give a list")
    return _documents(elements, first, value, name)


def _of_array(value: Any, name: str) -> TextSource | Tensor:
    if value.dtype.kind in "UO":
        return taken(value.tolist(), name, None)
    if value.dtype.kind not in "iu":
        raise RequestError(f"{name}: {_kind(value)} of {value.dtype}", "give whole numbers of shape [windows, length]")
    return check_token_ids(torch.from_numpy(value.astype("int64")), name)


def _elements(value: Any, name: str) -> tuple[Iterable[Any], bool]:
    """(the elements, whether they can be drawn from in any order)."""
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(value, DatasetDict | IterableDatasetDict):
        raise RequestError(f"{name}: {_kind(value)} with splits {', '.join(value)}", f"give one of them, such as data[{next(iter(value), '')!r}]")
    if isinstance(value, Dataset | IterableDataset):
        return value, True
    if isinstance(value, DataLoader):
        return value, False
    if isinstance(value, list | tuple):
        if not value:
            raise RequestError(f"{name}: an empty {_kind(value)}", f"give {TAKEN}")
        return list(value), True
    if isinstance(value, Iterator):
        return Replayed(value), False
    raise RequestError(f"{name}: {_kind(value)}", f"give {TAKEN}")


def _documents(elements: Iterable[Any], first: Any, value: Any, name: str) -> TextSource:
    """The source of texts, dialogues, or rows with columns."""
    row: Callable[[Any], dict[str, Any]]
    if isinstance(first, str):
        said, row = "given texts", _text_row
    elif isinstance(first, list) and first and isinstance(first[0], Mapping):
        said, row = "given dialogues", _dialogue_row
    elif isinstance(first, Mapping) and isinstance(elements, list) and ("role" in first or "from" in first):
        return _source("given dialogues", ({"messages": elements},))
    elif isinstance(first, Mapping):
        said, row = "given rows", _row
    else:
        inside = "nothing" if first is None else _kind(first)
        raise RequestError(f"{name}: {_kind(value)} of {inside}", f"give {TAKEN}")
    if not isinstance(elements, list | Replayed):
        return _source(said, elements)  # of ``datasets``, which shuffles them itself
    return _source(said, tuple(row(one) for one in elements) if isinstance(elements, list) else Rows(elements, row))


def _source(said: str, rows: Any) -> TextSource:
    return TextSource(said, "all", GIVEN, "\n\n", given=rows)


def _text_row(value: Any) -> dict[str, Any]:
    return {"text": value}


def _dialogue_row(value: Any) -> dict[str, Any]:
    return {"messages": value}


def _row(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _is_ids(value: Any) -> bool:
    """Whether an element holds token ids: a tensor or an array, alone or in a list, or a mapping with input_ids."""
    if isinstance(value, Mapping):
        return IDS in value
    if isinstance(value, list | tuple):
        return len(value) == 1 and isinstance(value[0], Tensor)
    return isinstance(value, Tensor) or type(value).__module__ == "numpy"


def batched(batches: Iterable[Any], name: str, wanted: int | None) -> Tensor:
    """Token ids [N, L] of batches of windows, or of single ones, until there are ``wanted``. Raises RequestError for padding and other lengths."""
    found: list[Tensor] = []
    for number, batch in enumerate(batches, 1):
        place = f"{name}, batch {number}"
        ids = check_token_ids(torch.atleast_2d(_tensor(batch, IDS, place)), place)
        if isinstance(batch, Mapping) and MASK in batch and not torch.atleast_2d(_tensor(batch, MASK, place)).all():
            raise RequestError(f"{place}: is padded ({MASK} has zeros)", "pack texts into windows of one length, or give the texts themselves")
        if found and ids.shape[1] != found[0].shape[1]:
            raise RequestError(f"{place}: windows of {ids.shape[1]} tokens, those before of {found[0].shape[1]}", "cut them to one length")
        found.append(ids)
        if wanted is not None and sum(map(len, found)) >= wanted:
            break
    return torch.cat(found)


def _tensor(batch: Any, key: str, place: str) -> Tensor:
    value = batch.get(key) if isinstance(batch, Mapping) else batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"{place}: {_kind(value)} is no tensor of token ids", "cut all windows to one length, as whole numbers") from None


def check_token_ids(ids: Tensor, name: str) -> Tensor:
    """As they are. Raises RequestError for what is not [windows, length] of whole numbers."""
    if ids.dim() != 2 or ids.dtype not in INTEGERS or not ids.numel():
        kind = f"{str(ids.dtype).removeprefix('torch.')} of shape {list(ids.shape)}"
        raise RequestError(f"{name} token ids: {kind}", "give whole numbers of shape [windows, length]")
    return ids


def _kind(value: Any) -> str:
    return type(value).__name__
