"""Every causal-LM type of the installed transformers, or every wrapper type, made tiny, pruned, and checked by means that are not llmprune's own.

    python scripts/every_type.py                                     every type, every pattern: one line each, then the counts
    python scripts/every_type.py --types llama,dbrx --patterns 2:4   some of them
    python scripts/every_type.py --table docs/models.md              writes the table that the documentation shows
    python scripts/every_type.py --wrappers                          image-text models instead, whose text decoder is pruned

How a type is made tiny stands in tiny_types.py. A type runs in a forked process with a time limit, so that a crash costs a line. A run that ends is
checked like this:

- plain ``from_pretrained`` loads the result, with no tensor missing, left over, or of another shape;
- N:M: at most n of m columns are left in every group of every changed matrix; 50 %: half of the weights of the changed matrices are zeros;
- every other tensor has the bytes of the source;
- at most a tenth of the weights that multiply in the blocks is left dense, routers aside;
- the perplexity that llmprune measures block by block is that of a plain forward;
- 2:4 by Wanda: the masks of all nn.Linear are computed again from forward hooks on the plain model;
- layers: the tensors left are the source's; channels, heads, kv-groups, experts: fewer parameters than before;
- channels, heads, kv-groups (by magnitude): the result predicts what the plain source does when nothing reads the dropped units;
- experts: the result predicts what the plain source does when its routers' logits for the dropped experts are minus infinity.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from tiny_types import VOCABULARY, save_tiny
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.data.windows import Windows
from llmprune.errors import LlmpruneError
from llmprune.evaluation.perplexity import perplexity
from llmprune.export.reload import Loaded, Reloader, loaded, parts_of
from llmprune.run.prepare import open_stream
from llmprune.structured.spaces import WITHOUT

WRAPPERS = "## Vision-language wrappers"
SAID = """Of an image-text model the text decoder is pruned, calibrated and measured on text; towers and projectors are neither loaded nor changed.
The run's first line, `llmprune.json` and the card name them with their share of the weights. The result loads by `AutoModelForImageTextToText`."""
LENGTH = 32
LIMIT_S = 90
# what a pattern asks of llmprune.prune
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4", "method": "wanda"},
    "50%": {"sparsity": 0.5, "quality": "balanced"},
    "layers": {"pattern": "layers", "sparsity": 0.25, "target": "symmetric"},
    "channels": {"pattern": "channels", "sparsity": 0.25, "method": "magnitude", "round_to": 4},
    "heads": {"pattern": "heads", "sparsity": 0.5, "method": "magnitude"},
    "kv-groups": {"pattern": "kv-groups", "sparsity": 0.5, "method": "magnitude"},
    "experts": {"pattern": "experts", "sparsity": 0.25},
}


def windows(count: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))


# --- the checks: each yields what is wrong ------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    return found


def load(folder: Path) -> tuple[Any, list[str]]:
    """(the model as any user gets it, what plain loading complains of)."""
    auto: Any = AutoModelForCausalLM
    if AutoConfig.from_pretrained(folder).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        auto = AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    said = [f"{kind}: {sorted(map(str, info[kind]))[:2]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    return model.eval().requires_grad_(False), said


def plain_perplexity(model: Any, ids_NL: Tensor) -> float:
    losses = [F.cross_entropy(model(input_ids=ids_L[None], use_cache=False).logits[0, :-1].double(), ids_L[1:]) for ids_L in ids_NL]
    return math.exp(float(torch.stack(losses).mean()))


def own_perplexity(folder: Path, ids_NL: Tensor) -> float:
    return perplexity(open_stream(open_folder(folder, folder.name), torch.float32, torch.device("cpu")), Windows(ids_NL, "random", "all")).value


def check_any(source: Path, output: Path, report: Any) -> Iterator[str]:
    before, complaints_before = load(source)
    after, complaints = load(output)
    yield from (f"reload, {c}" for c in complaints if c not in complaints_before)
    with torch.no_grad():
        for what, folder, model in (("dense", source, before), ("pruned", output, after)):
            ours, true = own_perplexity(folder, windows()), plain_perplexity(model, windows())
            if not abs(ours / true - 1) < 1e-4:
                yield f"perplexity of the {what} model is {true:.3f}, we say {ours:.3f}"


def crowded(matrix: Tensor) -> int:
    """Groups of four columns with more than two weights, in the better of the two orientations."""
    found = [int((m.reshape(-1, 4) != 0).sum(-1).gt(2).sum()) for m in (matrix, matrix.mT) if m.shape[-1] % 4 == 0]
    return min(found, default=matrix.numel())


def check_zeros(source: Path, output: Path, report: Any, pattern: str) -> Iterator[str]:
    dense, pruned = stored(source), stored(output)
    if dense.keys() != pruned.keys():
        yield f"other tensors: {sorted(dense.keys() ^ pruned.keys())[:2]}"
        return
    repaired = {name.rpartition(".")[2] for block in report.blocks for name in block.changed}
    changed = [k for k in dense if not torch.equal(dense[k], pruned[k])]
    matrices = [k for k in changed if pruned[k].dim() > 1]
    yield from (f"{k} has changed" for k in changed if pruned[k].dim() < 2 and k.rpartition(".")[2] not in repaired)
    if pattern == "2:4":
        yield from (f"{k}: {bad} groups hold more than 2 of 4" for k in matrices if (bad := crowded(pruned[k])))
    zeros, total = sum(int((pruned[k] == 0).sum()) for k in matrices), sum(pruned[k].numel() for k in matrices)
    if zeros != report.zeros:
        yield f"{zeros} zeros, the report says {report.zeros}"
    if not 0.495 < zeros / max(total, 1) < 0.505:
        yield f"{zeros} of {total} weights are zero"


def check_dense(source: Path, output: Path, report: Any) -> Iterator[str]:
    """Weights of the blocks with two axes or more that are what they were; routers, convolutions, norms and embeddings aside."""
    before, after = load(source)[0], load(output)[0]
    path = report.blocks[0].block.rpartition(".")[0]
    aside = tuple(
        n for n, m in before.named_modules() if isinstance(m, nn.Embedding | nn.Conv1d) or n.endswith(("gate", "router", "x_proj", "dt_proj"))
    )
    weights = {n: p for n, p in before.named_parameters() if n.startswith(f"{path}.") and p.dim() > 1 and min(p.shape[-2:]) > 1 and "bias" not in n}
    weights = {n: p for n, p in weights.items() if not n.startswith(tuple(f"{a}." for a in aside))}
    now = dict(after.named_parameters())
    dense = {n: p.numel() for n, p in weights.items() if torch.equal(p, now[n])}
    share = sum(dense.values()) / max(1, sum(p.numel() for p in weights.values()))
    if share > 0.1:
        yield f"{share:.0%} of the weights stay dense, such as {max(dense, key=lambda n: dense[n])}"


@torch.no_grad()
def check_wanda(source: Path, output: Path, report: Any) -> Iterator[str]:
    """The 2:4 masks of all nn.Linear by forward hooks, block by block on the outputs of the pruned blocks."""
    model, pruned = load(source)[0], load(output)[0]
    model.set_experts_implementation("eager")
    done = {f"{b.block}.{r.matrix}" for b in report.blocks for r in b.rows}
    for block in dict.fromkeys(b.block for b in report.blocks):
        squares: dict[str, Tensor] = {}

        def see(name: str, module: nn.Module, args: tuple[Tensor, ...], squares: dict[str, Tensor] = squares) -> None:
            squares[name] = squares.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        inside = {n: m for n, m in model.named_modules() if n.startswith(f"{block}.") and isinstance(m, nn.Linear) and f"{n}.weight" in done}
        hooks = [m.register_forward_pre_hook(partial(see, n)) for n, m in inside.items()]
        for ids_L in windows():
            model(input_ids=ids_L[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, module in inside.items():
            if name in squares:
                score = (module.weight.abs() * squares[name].sqrt()).reshape(-1, 4)
                keep = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(2, dim=1).indices, True)
                kept = (pruned.get_submodule(name).weight != 0).reshape(-1, 4)
                other = int((keep != kept).any(1).sum())
                if other > 0.002 * len(kept) + 1:
                    yield f"{name}: {other} of {len(kept)} groups differ from Wanda's by hooks"
        model.get_submodule(block).load_state_dict(pruned.get_submodule(block).state_dict())


def check_layers(source: Path, output: Path, report: Any) -> Iterator[str]:
    before = {(tuple(t.shape), t.numpy().tobytes()) for t in stored(source).values()}
    yield from (f"{k} is not a tensor of the source" for k, t in stored(output).items() if (tuple(t.shape), t.numpy().tobytes()) not in before)


def check_smaller(source: Path, output: Path, report: Any) -> Iterator[str]:
    if sum(t.numel() for t in stored(output).values()) >= sum(t.numel() for t in stored(source).values()):
        yield "no smaller than before"


@torch.no_grad()
def check_units(source: Path, output: Path, report: Any) -> Iterator[str]:
    """The logits are those of the source with zeros in the columns that read the dropped units, which lie one after the other there."""
    dense, cut = load(source)[0], load(output)[0]
    parameters, dropped = dict(dense.named_parameters()), 0
    for row in (r for block in report.blocks for r in block.rows if r.kept is not None):
        name, _, expert = row.matrix.removesuffix("]").partition("[")
        weight = parameters[name][int(expert)] if expert else parameters[name]
        before = dict(cut.named_parameters())[name]
        dim = next(d for d in range(2) if weight.shape[d] != before.shape[d - 2])
        runs = weight.unflatten(dim, (row.units, -1)).transpose(0, dim)
        gone = [unit for unit in range(row.units) if unit not in row.kept]
        runs[gone] = 0
        dropped += len(gone)
        for part in ("q", "k"):  # what a norm over all heads normalises is zero too
            norm, proj = (f"{name.removesuffix('.weight').rpartition('.')[0]}.{part}_{kind}.weight" for kind in ("norm", "proj"))
            if norm in parameters and cut.get_parameter(norm).shape != parameters[norm].shape:
                parameters[proj].unflatten(0, (row.units, -1))[gone] = 0
    if not dropped:
        yield "no unit is dropped"
    for ids_L in windows():
        wanted, found = (model(input_ids=ids_L[None], use_cache=False).logits for model in (dense, cut))
        apart = float((wanted - found).abs().max() / wanted.abs().max())
        if not apart < 1e-4:
            yield f"logits differ by {apart:.2g} of the largest from the source's without these units"


class Unchosen(TorchFunctionMode):
    """The logits of some experts are minus infinity, by the address of the router's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: dict[int, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        gone = self.dropped.get(args[1].data_ptr()) if func is F.linear else None
        return out if gone is None else out.index_fill(-1, torch.tensor(gone), -math.inf)


@torch.no_grad()
def check_experts(source: Path, output: Path, report: Any) -> Iterator[str]:
    """The logits are those of the source when no token can choose the dropped experts."""
    dense, cut = load(source)[0], load(output)[0]
    mine, its, unchosen = dense.state_dict(), cut.state_dict(), Unchosen()
    for block, row in ((b.block, row) for b in report.blocks for row in b.rows if row.kept is not None):
        gone = [e for e in range(row.units) if e not in row.kept]
        shrunk = [n for n in mine if n.startswith(f"{block}.") and mine[n].shape != its[n].shape]
        for name in (n for n in shrunk if not n.startswith(f"{row.matrix}.")):
            if mine[name].dim() == 2 and len(mine[name]) > 1:
                unchosen.dropped[mine[name].data_ptr()] = gone
            else:
                mine[name][..., gone] = -math.inf
        if not gone or not shrunk:
            yield f"{block}: no expert is dropped"
    for ids_L in windows():
        with unchosen:
            wanted = dense(input_ids=ids_L[None], use_cache=False).logits
        found = cut(input_ids=ids_L[None], use_cache=False).logits
        apart = float((wanted - found).abs().max() / wanted.abs().max())
        if not apart < 1e-4:
            yield f"logits differ by {apart:.2g} of the largest from the source's without these experts"


def checks(pattern: str) -> list[Callable[[Path, Path, Any], Iterator[str]]]:
    if pattern in ("2:4", "50%"):
        return [check_any, partial(check_zeros, pattern=pattern), check_dense, *([check_wanda] if pattern == "2:4" else [])]
    return [check_any, check_smaller, {"layers": check_layers, "experts": check_experts}.get(pattern, check_units)]


# --- one type -----------------------------------------------------------------------------------------------------------------------------------


def place_of(error: BaseException) -> str:
    """Where an unexpected error came from: the last line of llmprune's own."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "llmprune" in f.filename and "scripts" not in f.filename]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def outcome(source: Path, output: Path, pattern: str) -> str:
    try:
        report = llmprune.prune(source, calibration=windows(), output=str(output), accept_damage=True, **PATTERNS[pattern])
    except LlmpruneError as error:
        return "none" if error.message.endswith(WITHOUT["experts"]) else f"refused: {error.message}"
    except Exception as error:
        return f"traceback: {place_of(error)}"
    try:
        wrong = list(itertools.chain.from_iterable(check(source, output, report) for check in checks(pattern)))
    except Exception as error:
        return f"wrong: the check fails, {place_of(error)}"
    return f"wrong: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "") if wrong else "works"


def load_here(reloader: Reloader, folder: Path, ids_1L: Tensor) -> Loaded:
    """In place of the fresh process in which a run loads its result, which takes seconds: this one is a fork of its own already."""
    return loaded(parts_of(reloader.source), folder, reloader.dtype, ids_1L)


def try_type(model_type: str, patterns: list[str], wrapper: bool, answers: Any) -> None:
    """Runs in a process of its own."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    Reloader.start, Reloader.load = (lambda self: None), load_here  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / model_type
        try:
            save_tiny(model_type, source, wrapper)
            model, said = load(source)
            if wrong := [complaint for complaint in said if complaint.startswith("missing")]:
                raise ValueError(f"saved and loaded again, it lacks tensors, {wrong[0]}")
            with torch.no_grad():
                plain_perplexity(model, windows(1))
        except Exception as error:
            answers.send(("-", f"not made: {place_of(error)}"))
            return
        for pattern in patterns:
            answers.send((pattern, outcome(source, Path(scratch) / pattern.replace(":", "").replace("%", ""), pattern)))


def judge(model_type: str, patterns: list[str], wrapper: bool = False) -> dict[str, str]:
    """Pattern -> works, refused: why, wrong: what, or traceback: where; or "-" -> why the type could not be tried."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=try_type, args=(model_type, patterns, wrapper, theirs))
    process.start()
    theirs.close()
    found: dict[str, str] = {}
    try:
        while len(found) < len(patterns):
            if not ours.poll(LIMIT_S):
                process.terminate()
                return found | dict.fromkeys([p for p in patterns if p not in found][:1], f"traceback: no answer in {LIMIT_S} s")
            pattern, answer = ours.recv()
            found[pattern] = answer
            if pattern == "-":
                break
    except EOFError:
        process.join()
        found |= dict.fromkeys([p for p in patterns if p not in found][:1], f"traceback: the process ended with {process.exitcode}")
    process.join()
    return found


def counts(results: dict[str, dict[str, str]], patterns: list[str]) -> list[str]:
    tried = [found for found in results.values() if "-" not in found]
    lines = [f"{len(results)} types, {len(tried)} could be made tiny (transformers {transformers.__version__})"]
    for pattern in patterns:
        kinds = Counter(found.get(pattern, "traceback").partition(":")[0] for found in tried)
        said = ", ".join(f"{kinds[kind]} {kind}" for kind in ("works", "refused", "wrong", "traceback"))
        lines.append(f"{pattern}: {said}" + (f" ({kinds['none']} have no {pattern})" if kinds["none"] else ""))
    return lines


def table(results: dict[str, dict[str, str]], patterns: list[str], wrappers: bool = False) -> str:
    rows = [[f"`{t}`", *(found.get(p, found.get("-", "")).partition(":")[0] for p in patterns)] for t, found in results.items()]
    why = [f"- `{t}`, {p}: {said}" for t, found in results.items() for p, said in found.items() if said not in ("works", "none")]
    made = f"`python scripts/every_type.py {'--wrappers ' * wrappers}--patterns {','.join(patterns)} --table docs/models.md`"
    lines = [f"{WRAPPERS}\n\n{SAID}" if wrappers else "# Models", ""]
    lines += [f"Every {'wrapper' if wrappers else 'causal-LM'} type of transformers, tiny, random, pruned and checked; made by {made}.", ""]
    lines += [f"- {line}" for line in counts(results, patterns)]
    lines += ["", "| type | " + " | ".join(patterns) + " |", "|" + "---|" * (len(patterns) + 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join([*lines, "", f"{'#' * (2 + wrappers)} What does not work, and why", "", *why, ""])


def write_table(page: Path, made: str, wrappers: bool) -> None:
    """Puts a table on its page; the other kind's stays."""
    before, found, after = page.read_text().partition(f"\n{WRAPPERS}\n")
    page.write_text(f"{before}\n{made}" if wrappers else made + found + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="names separated by commas; all when omitted")
    parser.add_argument(
        "--patterns",
        default=",".join(PATTERNS),
        help="separated by commas: %(default)s".replace("%(default)s", ", ".join(PATTERNS).replace("%", "%%")),
    )
    parser.add_argument("--wrappers", action="store_true", help="image-text models, instead of causal language models")
    parser.add_argument("--table", type=Path, help="markdown page to renew")
    asked = parser.parse_args()
    if asked.table and not asked.table.is_file():
        parser.error(f"--table {asked.table}: no such page; give docs/models.md, or a copy of it")
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    patterns = asked.patterns.split(",")
    results = {}
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if asked.wrappers else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for model_type in asked.types.split(",") if asked.types else sorted(names):
        results[model_type] = judge(model_type, patterns, asked.wrappers)
        print(f"{model_type}: " + "; ".join(f"{p} {said}" for p, said in results[model_type].items()), flush=True)
    print("\n".join(counts(results, patterns)))
    if asked.table:
        write_table(asked.table, table(results, patterns, asked.wrappers), asked.wrappers)


if __name__ == "__main__":
    main()
