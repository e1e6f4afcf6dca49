"""Commands that inspect models and results, or publish them. Interface only, as in cli/main.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmprune.checkpoint.files import output_folder
from llmprune.cli.console import AsJson, Bos, Count, Device, Text, announce, err, out
from llmprune.cli.progress import progress_shown
from llmprune.errors import PromiseError, RequestError, at_home
from llmprune.recipe.flags import MACHINE


def push(
    folder: Annotated[str, typer.Argument(help="output of a finished run", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="me/name, or a name of your own", metavar="REPO")],
    public: Annotated[bool, typer.Option("--public", help="public; private otherwise")] = False,
    existing: Annotated[bool, typer.Option("--existing", help="the repository may exist; its model is replaced")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the output, and the Hub if it can be reached; list what would be sent; stop")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Publish a finished output on the Hub in one commit.

    The token is that of `hf auth login` or HF_TOKEN. If interrupted, the same command resumes.
    """
    from dataclasses import asdict

    path = output_folder(folder)
    from llmprune.publish.hub import push as publish

    pushed = publish(path, repo, public=public, existing=existing, dry_run=dry_run)
    print(json.dumps(asdict(pushed), indent=1)) if as_json else out.print(str(pushed), markup=False, soft_wrap=True)


def eval(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias", metavar="PATH|ID")],
    data: Annotated[
        Optional[list[str]],
        typer.Option(help="wikitext2, c4, a Hub data set, file, folder; may be repeated [default: bundled-evaluation for llama]", metavar="PATH|ID"),
    ] = None,
    tasks: Annotated[Text, typer.Option(help="tasks of lm-eval, such as piqa,arc_easy; needs pip install llmprune[eval]", metavar="NAME,...")] = None,
    task_dir: Annotated[Text, typer.Option(help="folder of your own task files, which are then the only ones", metavar="PATH")] = None,
    column: Annotated[Text, typer.Option(help="the data's column of texts or messages", metavar="NAME")] = None,
    split: Annotated[Text, typer.Option(help="split of the data set [default: test]", metavar="NAME")] = None,
    bos: Bos = None,
    window: Annotated[Count, typer.Option(help="tokens of a window [default: 2048, or the model's positions; llama: 256]", metavar="INT")] = None,
    samples: Annotated[Count, typer.Option(help="the first so many windows, and questions of a task [default: all]", metavar="INT")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="compute dtype: auto, float32, bfloat16, float16", metavar="NAME", rich_help_panel=MACHINE)] = "auto",
    revision: Annotated[Text, typer.Option(help="branch, tag or commit of a Hub model", metavar="NAME")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="for tasks: run the model code that comes with a checkpoint", rich_help_panel=MACHINE)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's perplexity, or tasks of lm-eval.

    The perplexity is measured with one block in memory at a time; tasks are with the whole model in memory, and are added to the llmprune.json of a
    result.
    """
    check_data(model, data, tasks, task_dir, column or split or (tasks and bos is not None))
    announce(model, as_json)
    from dataclasses import asdict

    from llmprune.api import evaluate, evaluate_tasks
    from llmprune.recipe.values import listed
    from llmprune.report.stored import add_tasks, result_of

    result = result_of(model) if tasks else None
    shared: dict[str, Any] = {"samples": samples, "device": device, "dtype": dtype, "revision": revision}
    # tasks come first: a name that lm-eval does not know is refused before any work
    answers = evaluate_tasks(model, listed(tasks), task_dir=task_dir, trust_remote_code=trust_remote_code, **shared) if tasks else []
    sets = data or ([] if tasks else ["bundled-evaluation"])
    with progress_shown() as progress:
        found = evaluate(model, sets, window=window, column=column, split=split, bos=bos, on_progress=progress, **shared) if sets else []
    if as_json:
        values = [asdict(p) for p in found]
        print(json.dumps({"perplexity": values, "tasks": [asdict(a) for a in answers]} if tasks else values, indent=1))
    else:
        show([*(f"perplexity: {value}" for value in found), *map(str, answers)])
    if result:
        add_tasks(result, answers)
        err.print(f"added to {model}/llmprune.json; llmprune report {model} adds it to the page", markup=False, soft_wrap=True)


def check_data(model: str, data: list[str] | None, tasks: str | None, task_dir: str | None, about_data: Any) -> None:
    """Raises RequestError where there is nothing to measure on, or an option is about data or tasks that are not there."""
    if task_dir and not tasks:
        raise RequestError("--task-dir without --tasks", "name the tasks: --tasks a,b")
    if not data and about_data:
        raise RequestError("--column, --split or --bos without --data", "add --data")
    if not data and not tasks and model != "llama":
        raise RequestError("no data", "add --data wikitext2, c4, or a file; or --tasks")


def show(lines: list[str]) -> None:
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def inspect(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias", metavar="PATH|ID")],
    verify: Annotated[Text, typer.Option(help="N:M that every group of every matrix must keep; exit 1 otherwise", metavar="N:M")] = None,
    skip: Annotated[Text, typer.Option(help="regular expression: matrices that are not counted", metavar="REGEX")] = None,
    only: Annotated[Text, typer.Option(help="regular expression: the only matrices counted", metavar="REGEX")] = None,
    manifest: Annotated[
        bool, typer.Option("--manifest", help="check an output against the hashes in its llmprune.json instead; exit 1 otherwise")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count the zeros of every matrix; check N:M, or hashes.

    An N:M pattern is checked group by group; with --manifest, the hashes of every file and tensor are.
    """
    if manifest:
        if verify or skip or only:
            raise RequestError("--manifest together with --verify, --skip or --only", "it checks everything; run them one after the other")
        return check_hashes(Path(model).expanduser(), as_json)
    from llmprune.recipe.named import n_of_m

    asked = n_of_m(verify) if verify else None
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


def check_hashes(folder: Path, as_json: bool) -> None:
    """Print whether an output is as its run left it. Raises PromiseError naming every file and tensor that differs."""
    from dataclasses import asdict

    from llmprune.checkpoint.manifest import check_manifest

    listed, checked = check_manifest(folder)
    if as_json:
        print(json.dumps(asdict(checked), indent=1))
    if str(checked):
        raise PromiseError(f"manifest of {folder.name}: {checked}", "prune again, or fetch the output again")
    err.print(f"manifest of {folder.name}: all {len(listed.files)} files and {len(listed.tensors)} tensors are as the run left them", soft_wrap=True)


def bench(
    model: Annotated[str, typer.Argument(help="folder, Hub id or alias", metavar="PATH|ID")],
    against: Annotated[Text, typer.Option(help="the dense model it came from, measured by turns with it", metavar="PATH|ID")] = None,
    prompt_length: Annotated[
        Count, typer.Option(help="tokens of the prompt [default: 512, or as many as the positions allow]", metavar="INT")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens decoded after the first one", metavar="INT")] = 64,
    batch: Annotated[int, typer.Option(help="sequences side by side", metavar="INT")] = 1,
    repeat: Annotated[int, typer.Option(help="measured rounds, after the warm-up", metavar="INT")] = 5,
    threads: Annotated[Count, typer.Option(help="CPU threads [default: torch's]", metavar="INT", rich_help_panel=MACHINE)] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16, float16", metavar="NAME", rich_help_panel=MACHINE)
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="with torch.compile and a cache of fixed size", rich_help_panel=MACHINE)] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the model code that comes with a checkpoint", rich_help_panel=MACHINE)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the speed, memory and size of a model.

    Prefill and decode are timed; on CUDA so are the 2:4 kernels. It measures and promises nothing.
    """
    announce(model, as_json)
    from llmprune.benchmark.run import bench as measure
    from llmprune.report.tables import print_bench

    with progress_shown() as progress:
        found = measure(
            model,
            against,
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            batch=batch,
            repeat=repeat,
            threads=threads,
            device=device,
            dtype=dtype,
            compile=compile,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print(json.dumps(found.to_json(), indent=1)) if as_json else print_bench(found, out)


def report(
    result: Annotated[str, typer.Argument(help="output folder of a run, or its llmprune.json", metavar="PATH")],
    bench: Annotated[Text, typer.Option(help="output of llmprune bench --json: its speeds are shown in the page", metavar="PATH")] = None,
    html: Annotated[Text, typer.Option(help="the page [default: report.html beside llmprune.json]", metavar="PATH")] = None,
) -> None:
    """Write report.html again, from llmprune.json alone."""
    from llmprune.checkpoint.files import write_whole
    from llmprune.report.page import page
    from llmprune.report.stored import read_bench, read_run

    path = Path(result).expanduser()
    made = page(read_run(path), read_bench(Path(bench).expanduser()) if bench else None)
    target = Path(html).expanduser() if html else (path if path.is_dir() else path.parent) / "report.html"
    write_whole(target, made.encode())
    out.print(f"saved: {at_home(target)}", markup=False, soft_wrap=True)


def compare(
    results: Annotated[list[str], typer.Argument(help="output folders of runs and sweeps", metavar="PATH")],
    html: Annotated[Text, typer.Option(help="also write a page with pictures into this file", metavar="PATH")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show several results side by side, and which of them are best."""
    from dataclasses import asdict, replace

    from llmprune.checkpoint.files import write_whole
    from llmprune.report.compare import results as read_results
    from llmprune.report.page import comparison
    from llmprune.report.tables import print_comparison

    found = read_results([Path(result).expanduser() for result in results])
    if html:
        write_whole(Path(html).expanduser(), comparison(found).encode())
    if as_json:
        print(json.dumps([{k: v for k, v in asdict(replace(result, report=None)).items() if k != "report"} for result in found], indent=1))
        return
    print_comparison(found, out)
    if html:
        out.print(f"saved: {at_home(html)}", markup=False, soft_wrap=True)


def methods(name: Annotated[Text, typer.Argument(help="one method; without it, all are listed", metavar="NAME")] = None) -> None:
    """List the methods, or explain one of them.

    Of one method, its equation, paper and options are shown.
    """
    from llmprune.checkpoint.aliases import ALIASES
    from llmprune.methods import KINDS, check_name, document, find, names, packages, sentence
    from llmprune.recipe.named import DEFAULT_QUALITY, METHODS, QUALITIES, STRUCTURED_PATTERNS
    from llmprune.recipe.options import options_of

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
                said += [f"{parts.allocation} ratios"] if parts.allocation != "uniform" else []
                said += [f"then distilled for {parts.polish_steps} steps"] if parts.polish_steps else []
                said += ["the default"] if method == DEFAULT_QUALITY else []
                out.print(f"--{flag} {method}: {', '.join(said)}", markup=False, soft_wrap=True)
    for pattern, text in STRUCTURED_PATTERNS.items():
        if name in (None, pattern):
            out.print(f"--pattern {pattern}: {text}", markup=False, soft_wrap=True)
    for kind, ns in everything.items():
        for one in ns:
            origin = " ".join(f"from {package} {version}" for package, version in packages(kind, one).items())
            if name is None:
                out.print(f"{kind}/{one}: {origin or sentence(kind, one)}", markup=False, soft_wrap=True)
            elif name == one:
                out.print("\n" + "\n".join(line for line in (f"{kind}/{one}", origin, document(kind, one)) if line), markup=False)
                for option in options_of(find(kind, one)).values():
                    out.print(f"  --option {option}", markup=False, soft_wrap=True)
    if name is None:
        out.print("aliases: " + ", ".join(f"{a} = {i or 'bundled'}" for a, i in ALIASES.items()), markup=False, soft_wrap=True)
