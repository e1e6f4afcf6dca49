"""Seconds and peak memory of pruning runs, part by part, against the floor of this machine and against llmcompressor.

    python scripts/bench_speed.py --shape 134m --repeat 3 --peer OTHER_ENVIRONMENT/bin/python

The model is a Llama with random weights, made for the purpose and deleted afterwards. Every run is a fresh process; the kinds of run take
turns, and the best of ``--repeat`` counts. Kinds of run:

folder  ``llmprune`` from a checkpoint to a checkpoint: each block is read, pruned, written, synced and hashed
live    ``llmprune`` on a model in memory, nothing is read or written: the counterpart of ``peer``
peer    ``llmcompressor.oneshot`` (sequential pipeline) on a model in memory, saving nothing: same ids, micro-batches, sparsity, threads

Seconds start where pruning starts: imports and preparation (which reads and hashes the checkpoint; shown apart) are not in them, nor is the
loading of a live model. Memory is the highest resident size less that after ``import torch, transformers``; on CUDA also the allocator's peak.
The parts are wall-clock seconds, which other processes stretch; llmprune and peer are compared by CPU seconds.

The floor of a part is the larger of its counted operations over the matrix-product rate, and its bytes over the copy rate; both rates are
measured in the same invocation at the same thread count, best of all rounds. Counted, for T tokens and matrices [R, C]:
forward     2 passes x (2 T x block parameters + causal attention)
statistics  Gram: T C^2 (lower triangle); squares: 4 T C bytes; once for each distinct input (qkv, o, gate and up, down)
solve       sparsegpt: Cholesky C^3/3 and inverse C^3/3 of each distinct input, sweep R C^2; wanda: each weight read and written once in float32
read, write bytes of the blocks, in the dtype that they are stored in; the disk is not counted
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # micro-batch of llmprune; the peer gets the same
SHARD = 2 << 30  # bytes of weights in one file
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. dtype is that of the stored weights."""

    width: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[R, C] of each matrix of a block."""
        d, kv = self.width, self.width // self.heads * self.kv_heads
        attention = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d)}
        return attention | {"mlp.gate_proj": (self.ffn, d), "mlp.up_proj": (self.ffn, d), "mlp.down_proj": (d, self.ffn)}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint, in the order in which it is written."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for i in range(self.blocks):
            for name, size in self.matrices().items():
                yield f"model.layers.{i}.{name}.weight", size
            yield f"model.layers.{i}.input_layernorm.weight", (self.width,)
            yield f"model.layers.{i}.post_attention_layernorm.weight", (self.width,)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)


SHAPES = {
    "134m": Shape(768, 2048, 12, 12, 12, 32_000, "float32"),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32_000, "bfloat16"),
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, "bfloat16"),
}


@dataclass(frozen=True)
class Task:
    """What one process does: ``make`` the model, measure the ``rates``, or one run of a kind."""

    kind: str
    model: str
    shape: dict[str, Any]
    method: str = "wanda"
    pattern: str = "unstructured"
    windows: int = 4
    length: int = 512
    threads: int = 1
    device: str = "cpu"


def child(task: Task, python: str = sys.executable) -> dict[str, Any]:
    """Run a task in its own process; what it found. This process loads no torch: a child's resident size begins with its parent's."""
    threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    found = subprocess.run(
        [python, str(Path(__file__).resolve()), "--task", json.dumps(asdict(task))],
        env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "THP_MEM_ALLOC_ENABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        sys.exit(f"{task.kind} {task.method} failed:\n{found.stderr[-3000:]}")
    return json.loads(found.stdout.strip().splitlines()[-1])


def make(task: Task) -> dict[str, Any]:
    """Write the random model, one shard at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shape, folder = Shape(**task.shape), Path(task.model)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, task.length),
        tie_word_embeddings=False,
        dtype=shape.dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    held: dict[str, Any] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for name, size in shape.tensors():
        values = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw) * (0.5 / size[1] ** 0.5)
        held[name] = values.to(getattr(torch, shape.dtype))
        if sum(t.nbytes for t in held.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {}


def rates(task: Task) -> dict[str, Any]:
    """Operations a second of matrix products, in float32 and in the dtype of the forward, and bytes a second copied; each the best of several."""
    import torch

    shape, cuda = Shape(**task.shape), task.device != "cpu"
    tokens = min(task.windows * task.length, BATCH_TOKENS["cuda" if cuda else "cpu"])
    out: dict[str, Any] = {}
    with torch.no_grad():
        dtypes = {"float32": torch.float32, "forward": getattr(torch, shape.dtype)} if cuda else {"float32": torch.float32}
        for key, dtype in dtypes.items():
            best = 0.0
            for m, k, n in ((tokens, shape.width, shape.ffn), (tokens, shape.ffn, shape.width), (shape.width, tokens, shape.ffn)):
                a, b = (torch.randn(size, device=task.device).to(dtype) for size in ((m, k), (k, n)))
                best = max(best, 2 * m * k * n / _best(lambda a=a, b=b: a @ b, task))
            out[key] = best
        data = torch.ones(256 * MIB // 4, device=task.device)
        target = torch.empty_like(data)
        out.setdefault("forward", out["float32"])  # on CPU the forward is in float32 too
        out["copy"] = 2 * data.nbytes / _best(lambda: target.copy_(data), task)
    return out


def _best(action: Callable[[], Any], task: Task, times: int = 12) -> float:
    """Seconds of the fastest of several; on CPU those of the processor, so that other processes do not lower the rates."""
    import torch

    action()
    cuda, taken = task.device != "cpu", []
    for _ in range(times):
        began = time.perf_counter() if cuda else time.process_time() / task.threads
        action()
        if cuda:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() if cuda else time.process_time() / task.threads) - began)
    return min(taken)


def run(task: Task) -> dict[str, Any]:
    """One measured run of a kind."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    before = _resident()
    torch.set_num_threads(task.threads)
    ids = random.Random(0).choices(range(task.shape["vocabulary"]), k=task.windows * task.length)
    runs = {"folder": _run_folder, "bare": _run_bare, "live": _run_live, "peer": _run_peer}
    found = runs[task.kind](task, torch.tensor(ids).view(task.windows, task.length))
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    found["total_memory"] = found["memory"] + before
    if task.device != "cpu":
        found["cuda_memory"] = torch.cuda.max_memory_allocated() / MIB
    return found


def _resident() -> float:
    """Resident MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


@contextmanager
def _measured(found: dict[str, Any], device: str) -> Iterator[None]:
    import torch

    found["memory_at_start"] = _resident()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    if device != "cpu":
        torch.cuda.synchronize()
    found |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _run_bare(task: Task, ids_NL: Any) -> dict[str, Any]:
    """A folder's run that no interruption could resume: no records, no hashes of what is written, nothing synced. Only this bench can ask for it."""
    import llmprune.run.job
    from llmprune.checkpoint import files, journal, sink
    from llmprune.checkpoint.manifest import Manifest

    files.os.fsync = lambda handle: None  # type: ignore[attr-defined]
    journal.Journal.write = lambda self, name, value: None  # type: ignore[method-assign]
    sink.hashlib = SimpleNamespace(sha256=lambda data: SimpleNamespace(hexdigest=lambda: ""))  # type: ignore[attr-defined]
    llmprune.run.job.manifest_of = lambda folder: Manifest({}, {})
    return _run_folder(task, ids_NL)


def _run_folder(task: Task, ids_NL: Any) -> dict[str, Any]:
    from llmprune.recipe.reading import read_recipe
    from llmprune.run.job import run as run_job
    from llmprune.run.prepare import prepare
    from llmprune.stream import heap

    heap.steady()  # as the command line does
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path(task.model).parent) as output:
        flags = {"model": task.model, "output": f"{output}/out", "device": task.device} | _request(task)
        began = time.perf_counter()
        job = prepare(read_recipe(None, flags), ids_NL)
        found["prepare"] = time.perf_counter() - began
        reads: list[float] = []
        load = job.stream.loader.load_block

        def timed_load(*args: Any) -> Any:
            began = time.perf_counter()
            block = load(*args)
            reads.append(time.perf_counter() - began)
            return block

        job.stream.loader.load_block = timed_load  # type: ignore[method-assign]
        with _measured(found, task.device):
            report = run_job(job)
    return found | _outcome(report, {"read": sum(reads)})


def _run_live(task: Task, ids_NL: Any) -> dict[str, Any]:
    import llmprune

    found: dict[str, Any] = {}
    model = _load(task)
    with _measured(found, task.device):
        report = llmprune.prune(model, calibration=ids_NL, **_request(task))
    return found | _outcome(report, {})


def _run_peer(task: Task, ids_NL: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    found: dict[str, Any] = {}
    model = _load(task)
    structure = "0:0" if task.pattern == "unstructured" else task.pattern
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[task.method]
    recipe = modifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    data = Dataset.from_dict({"input_ids": ids_NL.tolist(), "attention_mask": torch.ones_like(ids_NL).tolist()})
    with _measured(found, task.device):
        oneshot(
            model=model,
            processor=object(),  # the ids are given: none is needed, and none is then looked for
            recipe=recipe,
            dataset=data,
            pipeline="sequential",
            batch_size=max(1, BATCH_TOKENS["cpu" if task.device == "cpu" else "cuda"] // task.length),
            num_calibration_samples=task.windows,
            max_seq_length=task.length,
            shuffle_calibration_samples=False,
        )
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    return found | {"sparsity": sum(int((w == 0).sum()) for w in linear) / sum(w.numel() for w in linear)}


def _request(task: Task) -> dict[str, Any]:
    from llmprune.recipe.named import QUALITIES

    kind = "quality" if task.method in QUALITIES else "method"
    return {"sparsity": 0.5, "pattern": task.pattern, kind: task.method, "accept_damage": True}


def _load(task: Task) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").to(task.device)


def _outcome(report: Any, parts: dict[str, float]) -> dict[str, Any]:
    rows = [row for block in report.blocks for row in block.rows]
    names = dict.fromkeys(name for block in report.blocks for name in block.seconds)
    parts |= {name: sum(block.seconds.get(name, 0.0) for block in report.blocks) for name in names}
    return {"parts": parts, "sparsity": sum(r.zeros for r in rows) / sum(r.rows * r.columns for r in rows)}


def floors(task: Task, rate: dict[str, float]) -> dict[str, float]:
    """Seconds that each part needs at least, by the names that reports give to parts."""
    shape, tokens = Shape(**task.shape), task.windows * task.length
    matrices = shape.matrices().values()
    weights = sum(r * c for r, c in matrices)
    inputs = [shape.width] * 3 + [shape.ffn]  # columns of the distinct inputs
    attention = 2 * shape.width * (task.length + 1)  # a token: 2 products, 2 operations a multiply-add, half of the positions
    forward = tokens * (2 * weights + attention) / rate["forward"]  # one pass
    if task.method == "sparsegpt":
        statistics = sum(tokens * c**2 for c in inputs) / rate["float32"]
        solve = (sum(2 * c**3 / 3 for c in inputs) + sum(r * c**2 for r, c in matrices)) / rate["float32"]
    else:
        statistics = sum(4 * tokens * c for c in inputs) / rate["copy"]
        solve = 8 * weights / rate["copy"]
    moved = (4 if shape.dtype == "float32" else 2) * weights / rate["copy"]
    parts = {"forward": 2 * forward, "statistics": statistics, "solve": solve, "read": moved, "write": moved}
    parts |= {"forward and statistics": forward + statistics, "forward again": forward}  # engines that time these together
    return {part: shape.blocks * seconds for part, seconds in parts.items()}


def print_parts(run: dict[str, Any], floor: dict[str, float], threads: int) -> None:
    """One run, part by part, against its floor."""
    parts = [(part, seconds, floor.get(part, 0.0)) for part, seconds in run["parts"].items() if seconds > 1e-3]
    known, total = (sum(numbers) for numbers in list(zip(*parts, strict=True))[1:])
    print(f"  {'part':<24}{'seconds':>10}{'floor':>10}{'ratio':>8}")
    sums = [("rest", run["wall"] - known, 0.0), ("total", run["wall"], total), ("total of a processor", run["cpu"] / threads, total)]
    for part, seconds, least in parts + sums:
        print(f"  {part:<24}{seconds:>10.2f}" + (f"{least:>10.3f}{seconds / least:>8.2f}" if least else ""))


def summary(run: dict[str, Any]) -> str:
    cuda = f", {run['cuda_memory']:,.0f} MiB on the device" if "cuda_memory" in run else ""
    prepared = f"; prepared in {run['prepare']:.2f} s" if "prepare" in run else ""
    return f"{run['wall']:.2f} s, {run['cpu']:.2f} CPU s, {run['memory']:,.0f} MiB{cuda}, sparsity {run['sparsity']:.4f}{prepared}"


def compare(args: argparse.Namespace, folder: str, shape: Shape) -> None:
    """All runs, the kinds taking turns, then the tables."""
    base = {"model": folder, "shape": asdict(shape), "windows": args.windows, "length": args.length, "threads": args.threads, "device": args.device}
    child(Task("make", **base))
    kinds = ["folder", "live", "peer"] if args.peer else ["folder", "bare"] if args.journal else ["folder"]
    rate: dict[str, float] = {}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(args.repeat):
        rate = {k: max(v, rate.get(k, 0.0)) for k, v in child(Task("rates", **base)).items()}
        for method in args.method:
            for kind in kinds:
                task = Task(kind, method=method, pattern=args.pattern, **base)
                run = child(task, args.peer if kind == "peer" else sys.executable)
                best[method, kind] = min(run, best.get((method, kind), run), key=lambda r: r["cpu"])
    print(f"{args.shape}, {args.pattern} 50 %, {args.windows} x {args.length} tokens, {args.threads} threads, {args.device}, best of {args.repeat}")
    single, half = rate["float32"] / 1e9, rate["forward"] / 1e9
    print(f"products {single:,.1f} G/s in float32, {half:,.1f} G/s in the forward's dtype; copy {rate['copy'] / 1e9:.1f} GB/s")
    for method in args.method:
        floor = floors(Task("rates", method=method, **base), rate)
        for kind in kinds:
            print(f"\n{method}, {kind}: {summary(best[method, kind])}")
            if kind != "peer":
                print_parts(best[method, kind], floor, args.threads)
        if args.peer:
            peer = best[method, "peer"]
            ratios = [f"{kind} {best[method, kind]['cpu'] / peer['cpu']:.2f} x" for kind in ("live", "folder")]
            print(f"\n{method}: CPU seconds of llmprune / peer: {', '.join(ratios)}")
        if args.journal:
            with_it, without = best[method, "folder"], best[method, "bare"]
            print(
                f"\n{method}: with the journal / without: wall {with_it['wall'] / without['wall']:.3f} x, CPU {with_it['cpu'] / without['cpu']:.3f} x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="134m")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--method", action="append", choices=("wanda", "sparsegpt"), help="repeatable; both by default")
    parser.add_argument("--pattern", choices=("unstructured", "2:4"), default="unstructured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--journal", action="store_true", help="beside it the same without records, hashes and syncing: what safety costs")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", help="where the model is made for the time of the run; the system's temporary folder by default")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = Task(**json.loads(args.task))
        return print(json.dumps({"make": make, "rates": rates}.get(task.kind, run)(task)))
    args.method = args.method or ["sparsegpt", "wanda"]
    folder = tempfile.mkdtemp(prefix="llmprune-bench-", dir=args.folder)
    try:
        compare(args, f"{folder}/model", SHAPES[args.shape])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
