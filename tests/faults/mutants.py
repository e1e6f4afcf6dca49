"""Checkpoints damaged one way each, always the same ones: every run on one ends in a refusal of one line, or in a result that is right.

Three kinds of source take turns: a plain folder, whose data nobody has hashed; the output of a run, with its manifest; a snapshot of the
Hub's cache. Of the last two a wrong result without a word is a failure, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import save_tiny, tiny_windows
from faults.forks import forked

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.checkpoint.source import INDEX
from llmprune.errors import LlmpruneError

SECONDS = 10
KINDS = ("plain", "output", "snapshot")
ABSURD: tuple[Any, ...] = (-1, 0, 1, 3, 7, 10**5, 10**9, 2**63, 10**30, 0.5, -0.5, math.nan, math.inf, "", "x", "../x", None, True, False)
ABSURD += ([], [1], [[]], {}, {"a": 1}, ["x"] * 1000)
NAMES = ("../x.safetensors", "/etc/passwd", "pytorch_model.bin", "x\n.safetensors", "", "absent.safetensors", 7, None, [], {})
Damage = Callable[[Path, random.Random], object]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edited(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def header_end(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def flip(data: bytearray, at: int, r: random.Random) -> None:
    data[at] ^= 1 << r.randrange(8)


def flip_data(folder: Path, r: random.Random) -> None:
    path = r.choice(shards(folder))
    edited(path, lambda data: flip(data, r.randrange(header_end(path), len(data)), r))


def flip_header(folder: Path, r: random.Random) -> None:
    path = r.choice(shards(folder))
    edited(path, lambda data: flip(data, r.randrange(header_end(path)), r))


def flip_length(folder: Path, r: random.Random) -> None:
    edited(r.choice(shards(folder)), lambda data: flip(data, r.randrange(8), r))


def truncate(folder: Path, r: random.Random) -> None:
    path = r.choice([p for p in folder.iterdir() if p.stat().st_size])
    edited(path, lambda data: data.__delitem__(slice(r.randrange(len(data)), None)))


def extend(folder: Path, r: random.Random) -> None:
    edited(r.choice(shards(folder)), lambda data: data.extend(r.randbytes(r.choice((1, 4, 4096)))))


def delete_bytes(folder: Path, r: random.Random) -> None:
    def cut(data: bytearray) -> None:
        at = r.randrange(len(data))
        del data[at : at + r.choice((1, 4, 1000))]

    edited(r.choice(shards(folder)), cut)


def zero_bytes(folder: Path, r: random.Random) -> None:
    def zero(data: bytearray) -> None:
        at = r.randrange(len(data) - 4)
        data[at : at + 4] = bytes(4)

    edited(r.choice(shards(folder)), zero)


def not_a_number(folder: Path, r: random.Random) -> None:
    path = r.choice(shards(folder))
    start = header_end(path)
    at = start + 4 * r.randrange((path.stat().st_size - start) // 4)
    edited(path, lambda data: data.__setitem__(slice(at, at + 4), struct.pack("<f", r.choice((math.nan, math.inf, -math.inf)))))


def edit_entry(folder: Path, r: random.Random) -> None:
    """A header that is well-formed and says something else."""
    path = r.choice(shards(folder))
    data, end = path.read_bytes(), header_end(path)
    header = json.loads(data[8:end])
    name = r.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    change = r.randrange(6)
    if change == 0:
        entry["dtype"] = r.choice(("F16", "BF16", "I32", "U32", "F64", "I8", "F8_E4M3", "F12", 3, None))
    elif change == 1:
        entry["shape"] = r.choice((entry["shape"][::-1], [1, *entry["shape"]], [math.prod(entry["shape"])], [-1, -1], [2**40, 2**40], ["x"], None))
    elif change == 2:
        entry["data_offsets"] = r.choice(([0, 4], entry["data_offsets"][::-1], [2**63, 2**63], [-4, 0], [0.0, 1.0], None, []))
    elif change == 3:
        header[r.choice((name + "x", "x", "", "../x", name.replace(".0.", f".{10**30}."), name.replace("layers", "layer")))] = header.pop(name)
    elif change == 4:
        header["__metadata__"] = r.choice((5, [], {"format": 5}, {"format": "tf"}, None))
    else:
        del header[name]
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[end:])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_index(folder: Path, r: random.Random) -> None:
    def change(index: dict[str, Any]) -> None:
        names = index["weight_map"]
        key = r.choice(sorted(names))
        what = r.randrange(4)
        if what == 0:
            names[key] = r.choice(NAMES)
        elif what == 1:
            del names[key]
        elif what == 2:
            names[r.choice(("x", "", key + "x"))] = r.choice(list(names.values()))
        else:
            index["weight_map"] = r.choice(ABSURD)

    edit_json(folder / INDEX, change)


def edit_config(folder: Path, r: random.Random) -> None:
    edit_json(folder / "config.json", lambda config: config.__setitem__(r.choice(sorted(config)), r.choice(ABSURD)))


def forget_config(folder: Path, r: random.Random) -> None:
    edit_json(folder / "config.json", lambda config: config.__delitem__(r.choice(sorted(config))))


def extend_config(folder: Path, r: random.Random) -> None:
    named = (
        "quantization_config",
        "auto_map",
        "per_layer_config",
        "text_config",
        "layer_types",
        "num_nextn_predict_layers",
        "head_dim",
        "rope_scaling",
    )
    named += ("rope_parameters", "attn_implementation", "n_layer", "num_experts", "sliding_window", "torch_dtype", "dtype", "id2label", "use_cache")
    edit_json(folder / "config.json", lambda config: config.__setitem__(r.choice(named), r.choice(ABSURD)))


def another_kind(folder: Path, r: random.Random) -> None:
    kinds = ("gpt2", "mistral", "mixtral", "bert", "t5", "mamba", "qwen3_moe", "clip", "whisper", "lama", "deepseek_v3", "gemma3")
    edit_json(folder / "config.json", lambda config: config.__setitem__("model_type", r.choice(kinds)))


def garbage(folder: Path, r: random.Random) -> None:
    path = r.choice([p for p in folder.iterdir() if p.suffix == ".json"])
    path.write_bytes(r.choice((b"", b"{", b"[" * 100_000, b"\xff" * 99, b"null", b"[]", b"7", r.randbytes(999))))


def flip_json(folder: Path, r: random.Random) -> None:
    path = r.choice([p for p in folder.iterdir() if p.suffix == ".json" and p.name != "llmprune.json"])
    edited(path, lambda data: flip(data, r.randrange(len(data)), r))


def missing(folder: Path, r: random.Random) -> None:
    r.choice(sorted(folder.iterdir())).unlink()


def swap(folder: Path, r: random.Random) -> None:
    one, two = r.sample(shards(folder), 2)
    one.rename(folder / "between")
    two.rename(one)
    (folder / "between").rename(two)


def link_out(folder: Path, r: random.Random) -> None:
    path = r.choice(sorted(folder.iterdir()))
    path.unlink()
    path.symlink_to(r.choice(("/etc/passwd", "/dev/zero", "/absent", path.name, "/", "/proc/self/mem")))


def not_a_file(folder: Path, r: random.Random) -> None:
    path = r.choice(sorted(folder.iterdir()))
    path.unlink()
    r.choice((os.mkfifo, os.mkdir))(path)


def huge(folder: Path, r: random.Random) -> None:
    os.truncate(r.choice(sorted(folder.iterdir())), r.choice((500 << 20, 1 << 40)))  # sparse: takes no disk


DAMAGES: tuple[Damage, ...] = (
    *(flip_data, flip_header, flip_length, truncate, extend, delete_bytes, zero_bytes, not_a_number, edit_entry, edit_entry),
    *(
        edit_index,
        edit_config,
        edit_config,
        forget_config,
        extend_config,
        another_kind,
        garbage,
        flip_json,
        missing,
        swap,
        link_out,
        not_a_file,
        huge,
    ),
)


def bases(folder: Path) -> dict[str, Path]:
    """A source of each kind, with the same weights in several files."""
    plain = save_tiny("llama", folder / "plain", max_shard_size="20KB")
    for path in (BUNDLED / "llama").glob("tokenizer*"):
        shutil.copy(path, plain)
    llmprune.prune(plain, 0.0, method="magnitude", calibration=tiny_windows(), output=str(folder / "output"))
    snapshot = folder / "hub/snapshots/main"
    snapshot.mkdir(parents=True)
    (folder / "hub/blobs").mkdir()
    for path in plain.iterdir():
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (folder / "hub/blobs" / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return {"plain": plain, "output": folder / "output", "snapshot": snapshot}


def copied(base: Path, folder: Path) -> Path:
    """A copy to damage; a snapshot takes its blobs along."""
    if base.parent.name == "snapshots":
        shutil.copytree(base.parent.parent, folder / "hub", symlinks=True)
        return folder / "hub/snapshots" / base.name
    return Path(shutil.copytree(base, folder / "m"))


def result_of(source: Path, output: Path) -> str:
    """What a run makes of a source: the hashes of its tensors and of its config; "refused: ..." when it is refused."""
    try:
        report = llmprune.prune(source, 0.5, method="wanda", calibration=tiny_windows(), output=str(output))
    except LlmpruneError as error:
        return f"refused: {error.message}\n{error.hint}"
    return json.dumps([report.tensors, report.files["config.json"]])


def mutants(count: int, seed: int = 0) -> tuple[str, str]:
    """(the figure: how many of so many mutants ended as they must; what became of all of them, and the first ones that failed)."""
    torch.set_num_threads(1)  # a child cannot use the threads of its parent
    ends: Counter[str] = Counter()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        sources = bases(Path(place) / "bases")
        wanted = {kind: result_of(sources[kind], Path(place) / f"wanted-{kind}") for kind in KINDS}
        for number in range(count):
            kind, damage = KINDS[number % len(KINDS)], DAMAGES[number // len(KINDS) % len(DAMAGES)]
            folder = Path(place) / "mutant"
            folder.mkdir()
            source = copied(sources[kind], folder)
            damage(source, random.Random(f"{seed} {number}"))
            end, said = forked(lambda source=source, folder=folder: result_of(source, folder / "out"), SECONDS)
            end = judged(end, said, wanted[kind], kind)
            ends[end] += 1
            if end not in GOOD:
                failed.append(f"{number} ({kind}, {damage.__name__}): {end}: {said}")
            shutil.rmtree(folder)
    bad = sum(number for end, number in ends.items() if end not in GOOD)
    listing = ", ".join(f"{number} {end}" for end, number in ends.most_common())
    return f"{count - bad}/{count}", "\n".join([listing, *failed[:20]])


GOOD = ("refused", "right", "changed where no hash is known")


def judged(end: str, said: str, wanted: str, kind: str) -> str:
    if end != "ended":
        return end
    if said.startswith("refused: "):
        return "refused" if said.count("\n") == 1 and not said.endswith("\n") else "not one line"
    if said == wanted:
        return "right"
    return "changed where no hash is known" if kind == "plain" else "silently wrong"


if __name__ == "__main__":
    import sys

    print("\n".join(mutants(int(sys.argv[1]) if len(sys.argv) > 1 else 69)))
