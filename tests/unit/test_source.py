"""Opening checkpoints: what is malformed is refused in one line, and what is read is what safetensors reads."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llmprune.checkpoint import files
from llmprune.checkpoint.source import DTYPES, INDEX, MAX_HEADER, MAX_JSON, MAX_TENSORS, Source, open_folder
from llmprune.errors import RequestError, StoppedError

CONFIG = {"model_type": "llama"}


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def folder(path: Path, contents: dict[str, bytes], config: Any = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    for name, data in contents.items():
        (path / name).write_bytes(data)
    return path


def refused(path: Path, message: str) -> RequestError:
    with pytest.raises(RequestError, match=message) as caught:
        open_folder(path, "model")
    assert "\n" not in caught.value.message
    assert "\n" not in caught.value.hint
    assert caught.value.hint
    assert str(path) not in caught.value.message, "no message shows where the user keeps things"
    assert len(caught.value.message) < 300
    assert caught.value.__cause__ is None
    return caught.value


GOOD = pack({"a": entry(0, 8), "b": entry(8, 24)}, bytes(24))

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, too short"),
    "seven-bytes": (b"1234567", "7 bytes, too short"),
    "truncated-in-header": (GOOD[:20], "header of"),
    "truncated-in-data": (GOOD[:-1], "header describes"),
    "bytes-after-the-end": (GOOD + b"\0", "header describes"),
    "huge-header": (pack({}, length=2**63), "header of 9223372036854775808 bytes"),
    "header-over-the-limit": (pack({}, length=MAX_HEADER + 1), "header of"),
    "header-past-the-end": (pack({}, length=3), "header of 3 bytes in a file of 10"),
    "no-header": (pack(b""), "header is not JSON"),
    "not-json": (pack(b"{'a': 1}"), "header is not JSON"),
    "not-utf-8": (pack(b'{"\xff\xfe": 1}'), "header is not JSON"),
    "deep-json": (pack(b"[" * 200_000), "header is not JSON"),
    "a-list": (pack([]), "header is not a JSON object"),
    "hole-at-the-start": (pack({"a": entry(4, 8)}, bytes(8)), "hole or overlap"),
    "hole-in-the-middle": (pack({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "hole or overlap"),
    "overlap": (pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "hole or overlap"),
    "twice-the-same-bytes": (pack({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "hole or overlap"),
    "past-the-end": (pack({"a": entry(0, 8)}, bytes(4)), "header describes"),
    "wrong-size-for-dtype": (pack({"a": entry(0, 8, "F16")}, bytes(8)), "malformed entry 'a'"),
    "wrong-size-for-shape": (pack({"a": entry(0, 8, shape=[3])}, bytes(8)), "malformed entry 'a'"),
    "overflowing-shape": (pack({"a": entry(0, 8, shape=[2**32, 2**32])}, bytes(8)), "malformed entry 'a'"),
    "unknown-dtype": (pack({"a": entry(0, 8, "F12")}, bytes(8)), "malformed entry 'a'"),
    "dtype-is-a-list": (pack({"a": entry(0, 8, ["F32"])}, bytes(8)), "malformed entry 'a'"),
    "negative-shape": (pack({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)), "malformed entry 'a'"),
    "shape-is-a-map": (pack({"a": entry(0, 4, shape={})}, bytes(4)), "malformed entry 'a'"),
    "shape-is-a-text": (pack({"a": entry(0, 4, shape="")}, bytes(4)), "malformed entry 'a'"),
    "half-of-a-pair": (pack(b'{"__metadata__": {"x": "\\ud800 y"}}'), "header is not JSON"),
    "no-number": (pack(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": NaN}}', bytes(4)), "header is not JSON"),
    "negative-offset": (pack({"a": entry(-8, 0)}, bytes(0)), "malformed entry 'a'"),
    "backwards": (pack({"a": entry(8, 0)}, bytes(8)), "malformed entry 'a'"),
    "true-is-no-number": (pack({"a": entry(0, 4, shape=[True])}, bytes(4)), "malformed entry 'a'"),
    "float-offset": (pack({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)), "malformed entry 'a'"),
    "three-offsets": (pack({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)), "malformed entry 'a'"),
    "no-offsets": (pack({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "malformed entry 'a'"),
    "entry-is-a-string": (pack({"a": "F32"}, bytes(4)), "malformed entry 'a'"),
    "entry-is-null": (pack({"a": None}, bytes(4)), "malformed entry 'a'"),
    "metadata-is-a-number": (pack({"__metadata__": 5}), "__metadata__ does not map names to texts"),
    "metadata-of-numbers": (pack({"__metadata__": {"step": 5}}), "__metadata__ does not map names to texts"),
    "line-break-in-a-name": (pack({"a\nerror: b": None}, bytes(4)), "malformed entry"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_weight_file_is_refused(tmp_path: Path, which: str) -> None:
    data, message = BROKEN[which]
    error = refused(folder(tmp_path / "m", {"model.safetensors": data}), message)
    assert error.message.startswith("model.safetensors: ")


def test_the_good_file_of_these_tests_is_good(tmp_path: Path) -> None:
    source = open_folder(folder(tmp_path / "m", {"model.safetensors": GOOD}), "shown", "main")
    assert (source.name, source.revision, source.config, source.bytes) == ("shown", "main", CONFIG, len(GOOD))
    assert {name: e.shape for name, e in source.tensors.items()} == {"a": (2,), "b": (4,)}
    assert source.headers["model.safetensors"] == GOOD[:-24]


def shards(path: Path, weight_map: Any, **extra: bytes) -> Path:
    one, two = pack({"a": entry(0, 8)}, bytes(8)), pack({"b": entry(0, 4), "c": entry(4, 8)}, bytes(8))
    index = json.dumps({"weight_map": weight_map}).encode()
    return folder(path, {"one.safetensors": one, "two.safetensors": two, INDEX: index, **extra})


MAP = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}

INDICES: dict[str, tuple[Any, str]] = {
    "names-too-many": (MAP | {"d": "two.safetensors"}, "out of step .* 1 tensors, first 'd'"),
    "names-too-few": ({k: v for k, v in MAP.items() if k != "c"}, "out of step .* 1 tensors, first 'c'"),
    "names-the-wrong-file": (MAP | {"a": "two.safetensors", "b": "one.safetensors"}, "out of step .* 2 tensors, first 'a'"),
    "missing-shard": (MAP | {"d": "three.safetensors"}, "1 of 3 weight files missing: three.safetensors"),
    "parent-folder": (MAP | {"c": "../x.safetensors"}, "'../x.safetensors' is not a safetensors file of this folder"),
    "sub-folder": (MAP | {"c": "sub/x.safetensors"}, "is not a safetensors file of this folder"),
    "absolute": (MAP | {"c": "/etc/passwd"}, "is not a safetensors file of this folder"),
    "hidden": (MAP | {"c": ".safetensors"}, "is not a safetensors file of this folder"),
    "pickle": (MAP | {"c": "pytorch_model.bin"}, "is not a safetensors file of this folder"),
    "line-break": (MAP | {"c": "x.safetensors\n"}, "is not a safetensors file of this folder"),
    "not-a-name": (MAP | {"c": 7}, "7 is not a safetensors file of this folder"),
    "empty": ({}, "has no weight_map"),
    "a-list": (["one.safetensors"], "has no weight_map"),
    "null": (None, "has no weight_map"),
}


@pytest.mark.parametrize("which", INDICES)
def test_a_broken_index_is_refused(tmp_path: Path, which: str) -> None:
    weight_map, message = INDICES[which]
    refused(shards(tmp_path / "m", weight_map), message)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    source = open_folder(shards(tmp_path / "m", MAP), "m")
    assert {name: e.file for name, e in source.tensors.items()} == MAP


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    twice = pack({"a": entry(0, 8)}, bytes(8))
    path = shards(tmp_path / "m", MAP | {"x": "three.safetensors"}, **{"three.safetensors": twice})
    refused(path, "'a' is in another file too")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unread(tmp_path: Path, pickle: str) -> None:
    error = refused(folder(tmp_path / "m", {pickle: b"cos\nsystem\n(S'touch /tmp/gotcha'\ntR."}), f"only pickles .{pickle}.")
    assert "convert" in error.hint


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    error = refused(folder(tmp_path / "m", {"notes.txt": b""}), "m: no safetensors weights\n")
    assert "convert" not in error.hint
    refused(tmp_path / "absent", "model: no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "model: no such folder")


CONFIGS: dict[str, tuple[Any, str]] = {
    "absent": (None, "m/config.json: No such file"),
    "empty": (b"", "config.json: not valid JSON"),
    "cut": (b'{"model_type": "lla', "config.json: not valid JSON"),
    "deep": (b"[" * 200_000, "config.json: not valid JSON"),
    "not-utf-8": (b'{"a": "\xff"}', "config.json: not valid JSON"),
    "a-list": (b"[1]", "config.json: is not a JSON object"),
    "line-breaks": (b"{\n\n\nx", "config.json: not valid JSON"),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_broken_config_is_refused(tmp_path: Path, which: str) -> None:
    config, message = CONFIGS[which]
    refused(folder(tmp_path / "m", {"model.safetensors": GOOD}, config), message)


def test_a_config_of_insane_size_is_refused_unread(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"model.safetensors": GOOD})
    os.truncate(path / "config.json", MAX_JSON + 1)  # sparse: takes no disk
    refused(path, f"{MAX_JSON + 1} bytes, more than {MAX_JSON}")


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"model.safetensors": GOOD}, None)
    (path / "config.json").mkdir()
    refused(path, "m/config.json: Is a directory")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A clone can bring links along; what they lead to would be copied into the output, and published with it."""
    path = folder(tmp_path / "m", {"model.safetensors": GOOD})
    (tmp_path / "secret").write_text("key")
    (path / "tokenizer-extra").symlink_to(tmp_path / "secret")
    refused(path, "m/tokenizer-extra: a link that leads out of the folder")
    (path / "tokenizer-extra").unlink()
    (path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(path, "m/model.safetensors: a link that leads out of the folder")


def test_links_inside_the_folder_and_into_the_hubs_blobs_are_followed(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {"real": GOOD})
    (path / "model.safetensors").symlink_to("real")
    assert open_folder(path, "m").tensors.keys() == {"a", "b"}
    (tmp_path / "hub/blobs").mkdir(parents=True)
    (tmp_path / "hub/snapshots").mkdir()
    (tmp_path / "hub/blobs/weights").write_bytes(GOOD)
    snapshot = folder(tmp_path / "hub/snapshots/main", {})
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    assert open_folder(snapshot, "m").tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "generation_config.json", "vocab.txt", "chat_template.jinja"])
def test_other_files_of_insane_size_are_refused_unread(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "m", {"model.safetensors": GOOD, name: b"", "log.json": b""})
    os.truncate(path / "log.json", 500 << 20)  # nobody reads it
    open_folder(path, "m")
    os.truncate(path / name, 500 << 20)
    refused(path, f"{name}: {500 << 20} bytes, more than {MAX_JSON}")


def test_a_million_tensors_are_refused_within_two_seconds(tmp_path: Path) -> None:
    names = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    path = folder(tmp_path / "m", {"model.safetensors": pack(f"{{{names}}}".encode())})
    refused(path, f"more than {MAX_TENSORS} tensors")


def test_blocks_are_counted_by_name(tmp_path: Path) -> None:
    names = ["model.embed.weight", *(f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(9)), "head.0", f"x.{'9' * 5000}.y"]
    header = {name: entry(4 * i, 4 * i + 4) for i, name in enumerate(names)}
    source = open_folder(folder(tmp_path / "m", {"model.safetensors": pack(header, bytes(4 * len(names)))}), "m")
    assert source.blocks == 3


# --- reading


def of_every_dtype() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        value = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5), generator=g)
        tensors[f"{name}.matrix"] = (torch.randn(3, 5, generator=g) if dtype.is_floating_point else value).to(dtype)
        tensors[f"{name}.scalar"] = tensors[f"{name}.matrix"][1, 2].clone()
        tensors[f"{name}.empty"] = torch.empty(0, 4, dtype=dtype)
        tensors[f"{name}.cube"] = tensors[f"{name}.matrix"].expand(2, 3, 5).contiguous()
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = folder(tmp_path / "m", {})
    safetensors.torch.save_file(of_every_dtype(), path / "model.safetensors", metadata={"format": "pt"})
    return open_folder(path, "m")


def test_reading_equals_safetensors(source: Source) -> None:
    wanted = safetensors.torch.load_file(source.folder / "model.safetensors")
    assert source.tensors.keys() == wanted.keys() == of_every_dtype().keys()
    for name, value in wanted.items():
        got = source.read(name)
        assert got.dtype == value.dtype
        assert got.shape == value.shape
        assert got.equal(value), name
        assert DTYPES[source.tensors[name].dtype] == value.dtype


def test_reading_keeps_every_bit(tmp_path: Path) -> None:
    """NaN payloads, infinities, -0.0 and subnormals come through as they are stored."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    path = folder(tmp_path / "m", {})
    safetensors.torch.save_file({"h": bits.view(torch.float16), "b": bits.clone().view(torch.bfloat16)}, path / "model.safetensors")
    source = open_folder(path, "m")
    assert source.read("h").view(torch.int16).equal(bits)
    assert source.read("b").view(torch.int16).equal(bits)


def test_each_reading_has_memory_of_its_own(source: Source) -> None:
    before = (source.folder / "model.safetensors").read_bytes()
    first = source.read("F32.matrix")
    wanted = first.clone()
    first.zero_()
    assert source.read("F32.matrix").equal(wanted)
    assert (source.folder / "model.safetensors").read_bytes() == before


def test_reading_many_keeps_names_across_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {})
    tensors = {f"t{i}": torch.full((2, 2), float(i)) for i in range(6)}
    weight_map = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    got = open_folder(path, "m").read_many(["t3", "t0", "t4"])
    assert got.keys() == {"t3", "t0", "t4"}
    assert all(value.equal(tensors[name]) for name, value in got.items())


CHANGES: dict[str, Callable[[Path], None]] = {
    "shorter": lambda p: os.truncate(p, p.stat().st_size - 8),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "touched": lambda p: os.utime(p, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_the_run_stops_it(source: Source, change: str) -> None:
    CHANGES[change](source.folder / "model.safetensors")
    with pytest.raises(StoppedError, match=r"model\.safetensors: changed during the run"):
        source.read("F32.matrix")


def test_a_file_that_ends_early_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    handle = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        assert files.read_range(handle, 90, 10, "f") == bytes(10)
        with pytest.raises(StoppedError, match="f: ends at byte 100, 5 bytes early"):
            files.read_range(handle, 95, 10, "f")
    finally:
        os.close(handle)


# --- scanning


def test_scan_hashes_whole_files(tmp_path: Path) -> None:
    path = shards(tmp_path / "m", MAP)
    source = open_folder(path, "m")
    assert source.hashes == {}
    source.scan()
    assert source.hashes == {f: hashlib.sha256((path / f).read_bytes()).hexdigest() for f in ("one.safetensors", "two.safetensors")}


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_floating_point], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scan_names_and_counts_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    spoiled = torch.ones(4, 6, dtype=dtype)
    spoiled[1, :3] = bad
    path = folder(tmp_path / "m", {})
    tensors = {"fine": torch.ones(5, dtype=dtype), "spoiled.weight": spoiled, "whole": torch.arange(5)}
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(RequestError, match=r"^m: NaN or infinite weights in spoiled.weight \(3\)\n"):
        open_folder(path, "m").scan()


def test_scan_does_not_let_infinities_cancel_or_sums_overflow(tmp_path: Path) -> None:
    """+inf and -inf in one tensor; finite values whose sum is not."""
    path = folder(tmp_path / "m", {})
    safetensors.torch.save_file({"large": torch.full((8,), 3e38), "half": torch.full((9999,), 6e4).half()}, path / "model.safetensors")
    open_folder(path, "m").scan()
    safetensors.torch.save_file({"a": torch.tensor([float("inf"), -float("inf"), 1.0])}, path / "model.safetensors")
    with pytest.raises(RequestError, match=r"in a \(2\)\n"):
        open_folder(path, "m").scan()


def test_scan_names_the_first_three(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {})
    safetensors.torch.save_file({f"t{i}": torch.full((i + 1,), float("nan")) for i in range(5)}, path / "model.safetensors")
    with pytest.raises(RequestError, match=r"in t\d \(\d\), t\d \(\d\), t\d \(\d\) and 2 more tensors\n"):
        open_folder(path, "m").scan()


def test_scan_sees_the_ends_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.checkpoint.source.CHUNK", 64)
    value = torch.ones(1000, dtype=torch.bfloat16)
    value[[0, 31, 32, 500, 999]] = float("nan")
    path = folder(tmp_path / "m", {})
    safetensors.torch.save_file({"a": value, "b": torch.ones(77)}, path / "model.safetensors")
    source = open_folder(path, "m")
    with pytest.raises(RequestError, match=r"in a \(5\)\n"):
        source.scan()
    assert source.hashes["model.safetensors"] == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
