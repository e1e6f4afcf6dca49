"""Writes the pruned checkpoint: the source's own shards, names and byte layout, with pruned tensors written in place as they arrive.

Every file is laid out (and its space reserved) at the start, so a full disk is noticed before any computing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, uint8

from llmprune.checkpoint.files import CHUNK, lay_out, make_folder, opened, read_range, sync_file, sync_folder, to_json, write_range, write_whole
from llmprune.checkpoint.named_code import copy_beside
from llmprune.checkpoint.source import INDEX, Source, read_json, read_tensor


class Sink:
    """The output folder in the making. ``written`` holds the keys whose pruned tensors are on disk, with their hashes.

    What is on disk is never overwritten before the end: its new values are kept in the folder ``again``, so that a crash damages neither.
    """

    def __init__(self, folder: Path, source: Source, again: Path | None = None) -> None:
        self.folder = folder
        self.source = source
        self.written: dict[str, str] = {}
        self._again = Sink(again, source) if again else None

    def lay_out(self) -> None:
        """Create every shard with its header and reserve its space. Repeating it changes nothing."""
        if self._again:
            self._again.lay_out()
        make_folder(self.folder)
        for file, header in self.source.headers.items():
            lay_out(self.folder / file, header, self.source.states[file][0])
        sync_folder(self.folder)

    def write(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write tensors in place, durably; their sha256 by key."""
        hashes = {}
        for file, keys in self._by_file(tensors).items():
            with opened(self.folder / file, os.O_RDWR) as handle:
                for key in keys:
                    data = memoryview(tensors[key].contiguous().view(-1).view(uint8).numpy())  # type: ignore[arg-type]
                    hashes[key] = hashlib.sha256(data).hexdigest()
                    write_range(handle, self.source.tensors[key].start, data)
                sync_file(handle)
        self.written |= hashes
        return hashes

    def write_again(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write new values of tensors beside those that were written before; their sha256 by key."""
        assert self._again is not None
        hashes = self._again.write(tensors)
        self.written |= hashes
        return hashes

    def accept_again(self, hashes: dict[str, str]) -> bool:
        """Reuse new values that an earlier process wrote, if every one still has its hash."""
        if self._again is None or not self._again.accept(hashes):
            return False
        self.written |= hashes
        return True

    def forget(self) -> None:
        """Reuse nothing that an earlier process wrote."""
        self.written = {}
        if self._again:
            self._again.written = {}

    def accept(self, hashes: dict[str, str]) -> bool:
        """Reuse tensors that an earlier process finished, if every one still has its hash."""
        for file, keys in self._by_file(hashes).items():
            with opened(self.folder / file, os.O_RDONLY) as handle:
                for key in keys:
                    entry = self.source.tensors[key]
                    digest = hashlib.sha256(read_range(handle, entry.start, entry.end - entry.start, file)).hexdigest()
                    if digest != hashes[key]:
                        return False
        self.written |= hashes
        return True

    def read_many(self, keys: list[str]) -> dict[str, Tensor]:
        again = [key for key in keys if self._again and key in self._again.written]
        out = self._again.read_many(again) if self._again and again else {}
        for file, wanted in self._by_file(key for key in keys if key not in out).items():
            with opened(self.folder / file, os.O_RDONLY) as handle:
                out |= {key: read_tensor(handle, self.source.tensors[key]) for key in wanted}
        return out

    def finish(self) -> None:
        """Write new values in place, copy every other tensor byte for byte, and the files that belong to the weights."""
        if self._again:
            for key in list(self._again.written):
                self.write(self._again.read_many([key]))
            self._again.written = {}
        if self.source.decoder is not None:
            return self._finish_decoded()
        for file in self.source.headers:
            with opened(self.source.folder / file, os.O_RDONLY) as source, opened(self.folder / file, os.O_RDWR) as target:
                for key, entry in self.source.tensors.items():
                    if entry.file != file or key in self.written:
                        continue
                    for start in range(entry.start, entry.end, CHUNK):
                        write_range(target, start, read_range(source, start, min(CHUNK, entry.end - start), file))
                sync_file(target)
        write_whole(self.folder / "config.json", (self.source.folder / "config.json").read_bytes())
        if self.source.indexed:
            self._write_index()
        copy_beside(self.source.folder, self.folder)

    def _finish_decoded(self) -> None:
        """The same for a quantised source: config and index are those of the plain weights."""
        for key in self.source.tensors.keys() - self.written.keys():
            self.write(self.source.read_many([key]))
        write_whole(self.folder / "config.json", to_json(self.source.config))
        if self.source.headers.keys() != {"model.safetensors"}:
            write_whole(self.folder / INDEX, to_json(self.source.index))
        copy_beside(self.source.folder, self.folder)

    def _write_index(self) -> None:
        """The source's own, byte for byte; one without the metadata that transformers asks for is written again."""
        path = self.source.folder / INDEX
        whole = isinstance(read_json(path).get("metadata"), dict)
        write_whole(self.folder / INDEX, path.read_bytes() if whole else to_json(self.source.index))

    def _by_file(self, keys: Iterable[str]) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for key in keys:
            files.setdefault(self.source.tensors[key].file, []).append(key)
        return files
