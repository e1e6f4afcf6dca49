"""The command line: words only. Nothing heavy is imported until a command has its arguments."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from llmprune.errors import LlmpruneError, PromiseError, RequestError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="One-shot pruning of Hugging Face language models.\n\nWithout a command, options mean prune: llmprune --model llama --pattern 2:4",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Text = Optional[str]
Count = Optional[int]


@app.command()
def prune(
    model: Annotated[Text, typer.Option(help="folder, Hub id or alias; llama is the small bundled one")] = None,
    sparsity: Annotated[Text, typer.Option(help="share of the weights that goes, such as 0.5 or 50%")] = None,
    target_params: Annotated[Text, typer.Option(help="instead: non-zero parameters that may remain in the whole model, such as 900M")] = None,
    target_size: Annotated[Text, typer.Option(help="instead, of structured patterns: bytes on disk that may remain, such as 1.2GB")] = None,
    target_latency_ratio: Annotated[
        Text, typer.Option(help="instead, of structured patterns: time of a prefill to the dense model's on this machine, such as 0.7")
    ] = None,
    max_ppl_increase: Annotated[Text, typer.Option(help="instead: the sparsest model within this increase of the perplexity, such as 5%")] = None,
    pattern: Annotated[
        Text,
        typer.Option(
            help="unstructured, N:M such as 2:4, block:RxC such as block:4x4, row, column, or a smaller model: "
            "channels, heads, kv-groups, kernel, layers, experts, structured (channels and KV groups)"
        ),
    ] = None,
    round_to: Annotated[Count, typer.Option(help="structured: sizes are multiples of this; 8 for channels and kernel by default")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="structured: the same sizes in every layer")] = False,
    pad: Annotated[bool, typer.Option("--pad", help="structured: zeros up to the widest layer, so that it loads without code of its own")] = False,
    quality: Annotated[Text, typer.Option(help="one of our own recipes: fast, balanced (the default) or max")] = None,
    method: Annotated[Text, typer.Option(help="a paper's own recipe, unimproved, for comparison; see llmprune methods")] = None,
    criterion: Annotated[Text, typer.Option(help="what scores the weights")] = None,
    solver: Annotated[Text, typer.Option(help="what chooses the mask and repairs the rest")] = None,
    target: Annotated[Text, typer.Option(help="what a repair aims at: symmetric (the matrix's own outputs) or asymmetric (the dense path's)")] = None,
    polish: Annotated[Text, typer.Option(help="kd: distillation of the whole pruned model at the end, which has to fit in memory; none")] = None,
    polish_steps: Annotated[Count, typer.Option(help="steps of the polish")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="N:M: reorder inner channels so that the groups hold more")] = False,
    group: Annotated[Text, typer.Option(help="where unstructured weights compete: row or matrix")] = None,
    allocation: Annotated[Text, typer.Option(help="how the ratio is shared out over the matrices; see llmprune methods")] = None,
    calibration: Annotated[
        Text, typer.Option(help="c4, wikitext2, a Hub data set (org/name[:config][@revision]), or a .txt, .jsonl, .parquet file")
    ] = None,
    samples: Annotated[Count, typer.Option(help="calibration windows")] = None,
    sequence_length: Annotated[Count, typer.Option(help="tokens of a window")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="draw the windows at random instead of taking the first")] = False,
    recipe: Annotated[Text, typer.Option(help="TOML file; flags go on top of it")] = None,
    output: Annotated[Text, typer.Option(help="folder of the result")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted run has left")] = False,
    seed: Annotated[Count, typer.Option(help="of everything drawn at random")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda ...")] = None,
    dtype: Annotated[Text, typer.Option(help="compute dtype: auto, float32, bfloat16, float16")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are left alone")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices that are pruned")] = None,
    eval: Annotated[Optional[list[str]], typer.Option(help="data to measure the perplexity on; may be repeated")] = None,
    accept_damage: Annotated[bool, typer.Option("--accept-damage", help="go on when a block's output is destroyed")] = False,
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model")] = None,
    push: Annotated[Text, typer.Option(help="Hub repository that the result goes to at the end, private, such as me/my-model")] = None,
    public: Annotated[bool, typer.Option("--public", help="with --push: a public repository")] = False,
    existing: Annotated[bool, typer.Option("--existing", help="with --push: the repository may be there, and its model is replaced")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Prune a model into a folder that plain transformers loads."""
    from llmprune.recipe import Recipe, read_recipe

    given = {k: v for k, v in locals().items() if k in Recipe.model_fields and not (v is None or v is False or v == [])}
    request = read_recipe(Path(recipe) if recipe else None, given)
    if (public or existing) and not request.push:
        raise RequestError("--public or --existing without --push", "add --push me/my-model")
    _announce(request.model, as_json)
    from llmprune.hub import check_destination
    from llmprune.job import prepare, run
    from llmprune.report.tables import print_report

    if request.push:
        check_destination(request.push, public, existing)
    job = prepare(request, overwrite=overwrite, restart=restart)
    if not as_json:
        out.print(str(job), soft_wrap=True, markup=False)
    if dry_run:
        if as_json:
            print(json.dumps({"recipe": job.recipe.resolved(), "matrices": sum(map(len, job.matrices.values()))}))
        return
    with _progress() as progress:
        report = run(job, progress)
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_report(report, out)
    if request.push:
        pushed = report.push(request.push, public=public, existing=existing)
        (err if as_json else out).print(str(pushed), markup=False, soft_wrap=True)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="output of a finished run", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="me/name, or a name of your own", metavar="REPO")],
    public: Annotated[bool, typer.Option("--public", help="everybody may see it; private otherwise")] = False,
    existing: Annotated[bool, typer.Option("--existing", help="the repository may be there, and its model is replaced")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, say what would be sent, stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Publish a finished output on the Hub in one commit, by the token of `hf auth login` or HF_TOKEN. Cut off, the same command goes on."""
    from dataclasses import asdict

    from llmprune.hub import push as publish

    pushed = publish(Path(folder).expanduser(), repo, public=public, existing=existing, dry_run=dry_run)
    print(json.dumps(asdict(pushed), indent=1)) if as_json else out.print(str(pushed), markup=False, soft_wrap=True)


@app.command()
def sweep(
    methods: Annotated[str, typer.Option(help="methods and qualities, such as wanda,sparsegpt,balanced")],
    output: Annotated[str, typer.Option(help="folder of the table and the plot")],
    model: Annotated[Text, typer.Option(help="folder, Hub id or alias; llama is the small bundled one")] = None,
    sparsities: Annotated[str, typer.Option(help="such as 0.4,0.5,60%; of unstructured sparsity and blocks")] = "",
    patterns: Annotated[str, typer.Option(help="such as unstructured,2:4,block:4x4")] = "unstructured",
    allocation: Annotated[Text, typer.Option(help="how the ratios are shared out over the matrices; else each method's own choice")] = None,
    calibration: Annotated[
        Text, typer.Option(help="c4, wikitext2, a Hub data set (org/name[:config][@revision]), or a .txt, .jsonl, .parquet file")
    ] = None,
    samples: Annotated[Count, typer.Option(help="calibration windows")] = None,
    sequence_length: Annotated[Count, typer.Option(help="tokens of a window")] = None,
    eval: Annotated[Optional[list[str]], typer.Option(help="data to measure the perplexity on; may be repeated")] = None,
    recipe: Annotated[Text, typer.Option(help="TOML file with what all rows have in common")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="all rows in one pass by the dense model's statistics: faster, a little worse")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output, at the end")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard what an interrupted sweep has left")] = False,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda ...")] = None,
    dtype: Annotated[Text, typer.Option(help="compute dtype: auto, float32, bfloat16, float16")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are left alone")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices that are pruned")] = None,
    accept_damage: Annotated[bool, typer.Option("--accept-damage", help="go on when a block's output is destroyed")] = False,
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Prune by many methods, patterns and sparsities under one calibration: a table and a plot of perplexity against sparsity."""
    from llmprune.reading import listed
    from llmprune.recipe import Recipe, recipes

    base = {k: v for k, v in locals().items() if k in Recipe.model_fields and k != "output" and not (v is None or v is False or v == [])}
    asked = recipes(Path(recipe) if recipe else None, base, listed(methods), listed(sparsities), listed(patterns))
    _announce(asked[0].model, as_json)
    from llmprune.report.tables import print_sweep
    from llmprune.sweep import prepare_sweep, run_sweep

    prepared = prepare_sweep(asked, Path(output).expanduser(), overwrite, restart, quick=quick)
    if not as_json:
        out.print(str(prepared), soft_wrap=True, markup=False)
    with _progress() as progress:
        report = run_sweep(prepared, progress)
    print(json.dumps(report.to_json(), indent=1)) if as_json else print_sweep(report, out)


@app.command()
def eval(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias")],
    data: Annotated[Optional[list[str]], typer.Option(help="wikitext2, c4, a Hub data set or a file; may be repeated")] = None,
    tasks: Annotated[Text, typer.Option(help="tasks of lm-eval, such as piqa,arc_easy; needs pip install llmprune[eval]")] = None,
    task_dir: Annotated[Text, typer.Option(help="folder of task files of your own, which are then the only ones")] = None,
    window: Annotated[Count, typer.Option(help="tokens of a window")] = None,
    samples: Annotated[Count, typer.Option(help="the first so many windows, and questions of a task, instead of all")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="compute dtype: auto, float32, bfloat16, float16")] = "auto",
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="for tasks: run the model code that a checkpoint brings")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure a model's perplexity, one block in memory at a time; or tasks of lm-eval, with the whole model in memory."""
    if task_dir and not tasks:
        raise RequestError("--task-dir without --tasks", "name the tasks: --tasks a,b")
    if not data and not tasks and model != "llama":
        raise RequestError("no data", "add --data wikitext2, c4, or a file; or --tasks")
    _announce(model, as_json)
    from dataclasses import asdict

    from llmprune.api import evaluate, evaluate_tasks
    from llmprune.reading import listed

    shared: dict[str, Any] = {"samples": samples, "device": device, "dtype": dtype, "revision": revision}
    # tasks go first: a name that lm-eval does not know is refused before any work
    answers = evaluate_tasks(model, listed(tasks), task_dir=task_dir, trust_remote_code=trust_remote_code, **shared) if tasks else []
    sets = data or ([] if tasks else ["bundled-evaluation"])
    with _progress() as progress:
        found = evaluate(model, sets, window=window, progress=progress, **shared) if sets else []
    if as_json:
        values = [asdict(p) for p in found]
        print(json.dumps({"perplexity": values, "tasks": [asdict(a) for a in answers]} if tasks else values, indent=1))
        return
    for value in found:
        out.print(f"perplexity: {value}", soft_wrap=True)
    for answer in answers:
        out.print(str(answer), markup=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias")],
    verify: Annotated[Text, typer.Option(help="N:M that every group of every matrix must keep; exit 1 otherwise")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are left out")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices looked at")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count the zeros of every block matrix, and check an N:M pattern group by group."""
    from llmprune.methods import parse_nm

    asked = parse_nm(verify) if verify else None
    from dataclasses import asdict

    from llmprune.checkpoint.resolve import open_source
    from llmprune.model.matrices import Selection
    from llmprune.report.inspection import inspect as inspect_source
    from llmprune.report.tables import print_inspection

    found = inspect_source(open_source(model), Selection(skip, only), asked)
    print(json.dumps([asdict(i) for i in found], indent=1)) if as_json else print_inspection(found, out)
    if asked and verify:
        broken = [i for i in found if i.broken]
        if broken:
            groups = sum(i.broken or 0 for i in broken)
            raise PromiseError(
                f"{verify}: broken in {groups:,} groups of {len(broken)} matrices, first {broken[0].matrix}", "prune with --pattern " + verify
            )
        err.print(f"{verify}: kept by every group of all {len(found)} matrices")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias")],
    against: Annotated[Text, typer.Option(help="the dense model it came from, measured by turns with it")] = None,
    prompt_length: Annotated[Count, typer.Option(help="tokens of the prompt; 512, or what the positions leave, by default")] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens decoded after the first one")] = 64,
    batch: Annotated[int, typer.Option(help="sequences side by side")] = 1,
    repeat: Annotated[int, typer.Option(help="rounds that count, after those that warm up")] = 5,
    threads: Annotated[Count, typer.Option(help="CPU threads; as torch has it by default")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16, float16")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="through torch.compile, with a cache of fixed size")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the model code that a checkpoint brings along")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure prefill and decode speed, memory and size; on CUDA also the 2:4 kernels. It measures and promises nothing."""
    options = {k: v for k, v in locals().items() if k not in ("model", "as_json")}
    _announce(model, as_json)
    from llmprune.benchmark import bench as measure
    from llmprune.report.tables import print_bench

    with _progress() as progress:
        found = measure(model, progress=progress, **options)
    print(json.dumps(found.to_json(), indent=1)) if as_json else print_bench(found, out)


@app.command()
def report(
    result: Annotated[str, typer.Argument(help="output folder of a run, or its llmprune.json")],
    bench: Annotated[Text, typer.Option(help="file with what llmprune bench --json printed: measured speeds go into the page")] = None,
    html: Annotated[Text, typer.Option(help="the page; report.html beside llmprune.json by default")] = None,
) -> None:
    """Make report.html of a result again, from its llmprune.json alone."""
    from llmprune.checkpoint.files import write_whole
    from llmprune.report.page import page
    from llmprune.report.stored import read_bench, read_run

    path = Path(result).expanduser()
    made = page(read_run(path), read_bench(Path(bench).expanduser()) if bench else None)
    target = Path(html).expanduser() if html else (path if path.is_dir() else path.parent) / "report.html"
    write_whole(target, made.encode())
    out.print(f"saved: {target}", markup=False, soft_wrap=True)


@app.command()
def compare(
    results: Annotated[list[str], typer.Argument(help="output folders of runs and sweeps")],
    html: Annotated[Text, typer.Option(help="also write a page with pictures into this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Several results side by side, and which of them nothing beats."""
    from dataclasses import asdict

    from llmprune.checkpoint.files import write_whole
    from llmprune.report.compare import entries
    from llmprune.report.page import comparison
    from llmprune.report.tables import print_comparison

    found = entries([Path(result).expanduser() for result in results])
    if html:
        write_whole(Path(html).expanduser(), comparison(found).encode())
    if as_json:
        print(json.dumps([{k: v for k, v in asdict(entry).items() if k != "report"} for entry in found], indent=1))
        return
    print_comparison(found, out)
    if html:
        out.print(f"saved: {html}", markup=False, soft_wrap=True)


@app.command()
def methods(name: Annotated[Text, typer.Argument(help="one method; all are listed without")] = None) -> None:
    """List what can be asked for, or show one method's equation and paper."""
    from llmprune.checkpoint.aliases import ALIASES
    from llmprune.methods import DEFAULT_QUALITY, KINDS, METHODS, QUALITIES, STRUCTURED_PATTERNS, check_name, document, names

    everything = {kind: names(kind) for kind in KINDS}
    if name is not None:
        check_name(
            "method",
            name,
            sorted({n for ns in everything.values() for n in ns} | METHODS.keys() | QUALITIES.keys() | STRUCTURED_PATTERNS.keys() | {"flap"}),
        )
    for flag, named in (("quality", QUALITIES), ("method", METHODS)):
        for method, parts in named.items():
            if name in (None, method):
                said = [" + ".join(p for p in (parts.criterion, parts.solver) if p), f"unstructured weights compete per {parts.group}"]
                said += ["towards the dense path's outputs"] if parts.asymmetric else []
                said += ["rows weighed by their Fisher information"] if parts.fisher_rows else []
                said += [f"{parts.allocation} ratios"] if parts.allocation != "uniform" else []
                said += [f"then distilled for {parts.polish_steps} steps"] if parts.polish_steps else []
                said += ["the default"] if method == DEFAULT_QUALITY else []
                out.print(f"--{flag} {method}: {', '.join(said)}", markup=False, soft_wrap=True)
    for pattern, text in STRUCTURED_PATTERNS.items():
        if name in (None, pattern):
            out.print(f"--pattern {pattern}: {text}", markup=False, soft_wrap=True)
    for kind, ns in everything.items():
        for one in ns:
            text = document(kind, one)
            if name is None:
                out.print(f"{kind}/{one}: {text.splitlines()[0]}", markup=False)
            elif name == one:
                out.print(f"\n{kind}/{one}\n{text}", markup=False)
    if name is None:
        out.print("aliases: " + ", ".join(f"{a} = {i or 'bundled'}" for a, i in ALIASES.items()), markup=False)


def _announce(model: str, as_json: bool) -> None:
    """The first line of output, when the bundled model is used."""
    if model == "llama":
        (err if as_json else out).print(
            "llama: the small bundled Llama (1.8M parameters, a demonstration, not a useful language model); "
            "for another give --model FOLDER, a Hub id such as org/name, or an alias (llmprune methods)",
            soft_wrap=True,
        )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a step, with the time left, on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks or (bars.tasks[tasks[step]].finished and done < total):
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield progress


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1, 2, 3, 130 or 143 and never shows a traceback for what can be expected."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors; torch reads it when it is loaded
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("-") and words[0] not in ("--help", "--version"):
        words = ["prune", *words]
    if words == ["--version"]:
        import llmprune

        print(llmprune.__version__)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line that counts
    try:
        code = app(words, prog_name="llmprune", standalone_mode=False) or 0
    except LlmpruneError as error:
        code = _say(error.message, error.hint, error.exit_code)
    except typer.Exit as error:
        code = error.exit_code
    except _Interrupted as error:
        code = _say(f"interrupted by {error.signal.name}", "the same command goes on where it stopped", 128 + error.signal)
    except typer.TyperException as error:
        code = _say(error.format_message(), "see llmprune COMMAND --help", 2)
    except (MemoryError, OSError, RuntimeError) as error:
        code = _broken(error)
    sys.exit(code)


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted(number)


def _say(message: str, hint: str, code: int) -> int:
    err.print(f"error: {message}", markup=False, soft_wrap=True)
    if hint:
        err.print(f"hint: {hint}", markup=False, soft_wrap=True)
    return code


def _broken(error: BaseException) -> int:
    """The machine ran short of something: one line, and the run can go on. Anything else is a fault of ours and keeps its traceback."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return _say(f"{text[:200]}", "once that is mended, the same command goes on from the last finished block", 3)
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return _say(f"out of memory ({text[:120]})", "use fewer --samples or a shorter --sequence-length; nothing is lost", 3)
    raise error
