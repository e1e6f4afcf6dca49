"""Windows of a source: of a text, tokenised once by the tokenizer's default call, of dialogues, or of a mixture.

Shapes: N = windows, L = tokens of a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llmprune.data.chat import chat_windows
from llmprune.data.documents import Form, form_of
from llmprune.data.rows import BUFFER
from llmprune.data.sources import TextSource, find_source
from llmprune.data.texts import Text, pieces, read_text
from llmprune.data.windows import Documents, Windows, bos_of, filled, places
from llmprune.errors import RequestError

WHOLE = 16 << 20  # bytes; a larger file is drawn from piece by piece
PIECE = 4 << 20  # characters


def read_windows(spec: str, purpose: str, tokenizer: Any, length: int, wanted: int | None, *, draw: int | None = None, bos: bool = False) -> Windows:
    """``windows_of`` what a spec names."""
    return windows_of(find_source(spec, purpose), tokenizer, length, wanted, draw=draw, bos=bos)


def windows_of(source: TextSource, tokenizer: Any, length: int, wanted: int | None, *, draw: int | None = None, bos: bool = False) -> Windows:
    """All windows of a source, or enough of a large one for ``wanted``. draw: a seed by which they are drawn from all of the source, of a stream
    through a buffer; else they are the first. bos: whether each begins with BOS.

    Raises RequestError when the source cannot be read, or is less than one window.
    """
    if source.parts:
        return mixed(source, tokenizer, length, wanted, draw=draw, bos=bos)
    form = form_of(source)
    if form.dialogues:
        return chat_windows(source, form, tokenizer, length, wanted, draw=draw, bos=bos)[0]
    return text_windows(source, form, tokenizer, length, wanted, draw, bos)


def cut(text: Text, tokenizer: Any, length: int, bos: bool = False) -> tuple[Windows, int]:
    """(windows of a whole text, its tokens)."""
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    first = bos_of(tokenizer) if bos else None
    ids_NL = filled(ids, places(ids, length, first), first)
    return Windows(ids_NL, text.dataset, text.split, bos=bos, skipped=text.skipped), len(ids)


def text_windows(source: TextSource, form: Form, tokenizer: Any, length: int, wanted: int | None, draw: int | None, bos: bool) -> Windows:
    """``windows_of`` texts."""
    if draw is not None and wanted is not None and source.bytes > WHOLE:
        return drawn(source, form, tokenizer, length, wanted, draw, bos)
    characters = 8 * length * wanted if wanted and (draw is None or not source.files) else None
    while True:
        text = read_text(source, form, characters, draw)
        windows, tokens = cut(text, tokenizer, length, bos)
        if text.complete or wanted is None or len(windows) >= wanted:
            break
        assert characters is not None
        characters *= 2
    if not len(windows):
        raise RequestError(f"{text.dataset}: {tokens} tokens, less than one window of {length}", "give more text, or a smaller --sequence-length")
    if draw is None:
        return windows
    windows = windows.shuffled(draw)
    return windows if source.files else replace(windows, drawn_from=f"a stream shuffled in a buffer of {BUFFER:,} rows, seed {draw}")


def drawn(source: TextSource, form: Form, tokenizer: Any, length: int, wanted: int, seed: int, bos: bool) -> Windows:
    """``wanted`` windows drawn uniformly from all of a large file, in random order: those with the smallest of random keys. Only they and one
    piece are in memory. An incomplete last window of every piece is dropped. Raises RequestError.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_NL, keys_N, count, skipped = torch.empty(0, length, dtype=torch.long), torch.empty(0, dtype=torch.float64), 0, 0
    for text in pieces(source, form, PIECE):
        new_NL = cut(text, tokenizer, length, bos)[0].ids_NL
        count += len(new_NL)
        skipped += text.skipped
        keys_N = torch.cat([keys_N, torch.rand(len(new_NL), generator=generator, dtype=torch.float64)])
        order_N = keys_N.argsort()[:wanted]
        ids_NL, keys_N = torch.cat([ids_NL, new_NL])[order_N], keys_N[order_N]
    if not count:
        raise RequestError(f"{source.dataset}: less than one window of {length}", "give a smaller --sequence-length")
    return Windows(ids_NL, source.dataset, source.split, f"{count:,} windows, seed {seed}", bos=bos, skipped=skipped)


def mixed(source: TextSource, tokenizer: Any, length: int, wanted: int | None, **how: Any) -> Windows:
    """Windows of a mixture by their shares, spread evenly: as many as ``wanted``, or as the part that has the least allows."""
    parts = [windows_of(part, tokenizer, length, part_of(wanted, share), **how) for share, part in source.parts]
    order = mixing(source, [len(part) for part in parts], wanted)
    said = "" if how["draw"] is None else f"each part by itself, seed {how['draw']}"
    ids_NL, skipped = torch.stack([parts[k].ids_NL[n] for k, n in order]), sum(part.skipped for part in parts)
    return Windows(ids_NL, source.dataset, source.split, said, bos=how["bos"], skipped=skipped, documents=_merged(parts, order))


def part_of(wanted: int | None, share: float) -> int | None:
    """Enough windows of one part of a mixture, whichever way its share is rounded."""
    return None if wanted is None else round(share * wanted) + 2


def mixing(source: TextSource, have: list[int], wanted: int | None) -> list[tuple[int, int]]:
    """(part, its window) of each window of a mixture. have: windows of each part. Raises RequestError where a part would have none."""
    shares = [share for share, _ in source.parts]
    total = min(int(count / share) for share, count in zip(shares, have, strict=True))
    total = total if wanted is None else min(total, wanted)
    until = [round(total * sum(shares[: k + 1])) for k in range(len(shares))]
    counts = [min(end - begin, count) for begin, end, count in zip([0, *until], until, have, strict=False)]
    if not all(counts):
        raise RequestError(f"{source.dataset}: {total} windows in all, none of one part", "give more text, or larger shares")
    return [(k, n) for _, k, n in sorted(((n + 0.5) / count, k, n) for k, count in enumerate(counts) for n in range(count))]


def _merged(found: list[Windows], order: list[tuple[int, int]]) -> Documents | None:
    """The documents of the parts that are dialogues."""
    every = [windows.documents for windows in found]
    forms = dict.fromkeys(one.form for one in every if one)
    if not forms:
        return None
    begun, cut = zip(*((one.begun[n], one.cut[n]) if (one := every[k]) else (0, 0) for k, n in order), strict=True)
    return Documents(", ".join(forms), begun, cut)
