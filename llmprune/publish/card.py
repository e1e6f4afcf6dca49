"""The model card: README.md of an output, with metadata that the Hub reads. Equal runs write equal cards: no date, no path, no folder name.

Where it will be published is unknown, so ``PLACE`` stands for that until a push replaces it by the repository's name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

import llmprune
from llmprune.checkpoint.files import write_whole
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.checkpoint.source import MAX_JSON, Source, read_json
from llmprune.data.sources import KNOWN
from llmprune.methods import document, names
from llmprune.pruners.coarse import COARSE
from llmprune.recipe.named import DEFAULT_QUALITY
from llmprune.recipe.recipe import NAMED, Recipe
from llmprune.recipe.values import as_toml
from llmprune.report.result import Report
from llmprune.results import Evaluation, Perplexity

CARD = "README.md"
PLACE = "path/to/this/model"
LICENCE_KEYS = ("license", "license_name", "license_link")
UNITS = {"structured": "channels and heads", "hidden": "width"}  # where the pattern's name is not the word for what is removed


def write_card(folder: Path, report: Report, recipe: Recipe, source: Source) -> None:
    """Write the card of a finished checkpoint into its folder."""
    write_whole(folder / CARD, card(folder, report, recipe, source).encode())


def card(folder: Path, report: Report, recipe: Recipe, source: Source) -> str:
    """The text of the card. ``folder`` is the finished checkpoint, whose config.json says how it is loaded."""
    metadata = metadata_of(folder, report, recipe, source).to_yaml()
    parts = (
        title(recipe, report, source),
        loading(folder, report.source.towers is not None),
        figures(report),
        making(report, recipe),
        limits(recipe),
        licence_text(folder, source),
    )
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n"


def metadata_of(folder: Path, report: Report, recipe: Recipe, source: Source) -> ModelCardData:
    """What the Hub indexes: base model, licence, tags, and each perplexity with its definition."""
    named: dict[str, Any] = {"base_model": source.name, "base_model_relation": "finetune"} if on_hub(source) else {}
    return ModelCardData(
        **named,
        **licence_of(folder, source),
        language=language_of(source),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if report.source.towers else "text-generation",
        tags=["pruned", "llmprune", recipe.pattern, method_of(recipe)],
        model_name=recipe.default_output,
        eval_results=[result_of(pair) for pair in report.perplexity] or None,
    )


def on_hub(source: Source) -> bool:
    """Whether it was fetched by its Hub id; only then can others look up its name."""
    return source.revision is not None


def is_bundled(source: Source) -> bool:
    return source.folder.resolve().parent == BUNDLED.resolve()


def method_of(recipe: Recipe) -> str:
    """The name of what was done: a quality, a method, or a method's parts."""
    named = recipe.method or recipe.quality or "+".join(str(p) for p in (recipe.criterion_name, recipe.solver) if p)
    return named or (recipe.parts.criterion if recipe.pattern in COARSE else None) or DEFAULT_QUALITY


def result_of(pair: Evaluation) -> EvalResult:
    return result_of_one(pair.pruned, pair.dense)


def result_of_one(pruned: Perplexity, dense: Perplexity | None) -> EvalResult:
    """A perplexity as the Hub's metadata has it. The Hub distinguishes results by the data set's type, so every file needs a different one."""
    name, _, revision = pruned.dataset.partition("@")
    known = KNOWN.get(name)
    repo, _, config = (known.repo, "", known.config) if known else name.partition(":")
    return EvalResult(
        task_type="text-generation",
        dataset_type=repo.replace(" ", "-"),
        dataset_name=pruned.dataset,
        dataset_config=config or None,
        dataset_split=pruned.split,
        dataset_revision=revision or None,
        metric_type="perplexity",
        metric_name=f"perplexity ({pruned.definition})",
        metric_value=finite(pruned.value),
        metric_args={
            "window": pruned.window,
            "stride": pruned.window,
            "windows": pruned.windows,
            "targets": pruned.tokens,
            "dtype": pruned.dtype,
        }
        | ({"dense": finite(dense.value)} if dense else {}),
    )


def finite(value: float) -> float | str:
    """YAML has infinity, JSON has not, and the Hub converts the one to the other."""
    return value if math.isfinite(value) else str(value)


def licence_of(folder: Path, source: Source) -> dict[str, Any]:
    """The source's licence, as its card states it, or by its licence file; empty where neither exists. Nothing is guessed from a licence's text."""
    if is_bundled(source):
        return {"license": "apache-2.0"}
    stated = front_matter(source)
    found = {key: stated[key] for key in LICENCE_KEYS if is_text(stated.get(key))}
    if "license" not in found:
        files = sorted(path.name for path in folder.glob("LICENSE*"))
        return {"license": "other", "license_name": "as-the-base-model", "license_link": files[0]} if files else {}
    link = found.get("license_link")
    if isinstance(link, str) and "://" not in link and not (folder / link).is_file():
        del found["license_link"]
        found |= {"license_link": f"https://huggingface.co/{source.name}/blob/{source.revision}/{link}"} if on_hub(source) else {}
    return found


def language_of(source: Source) -> Any:
    language = front_matter(source).get("language")
    return language if is_text(language) else None


def is_text(value: Any) -> bool:
    """A string or a list of them; YAML reads some words, such as `no`, as other types."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def front_matter(source: Source) -> dict[str, Any]:
    """The metadata of the source's own card; empty where it has none that can be read."""
    path = source.folder / CARD
    try:
        return (metadata_load(path) or {}) if path.stat().st_size <= MAX_JSON else {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}


def title(recipe: Recipe, report: Report, source: Source) -> str:
    if on_hub(source):
        base = f"[{source.name}](https://huggingface.co/{source.name}) at revision `{source.revision}`"
    elif is_bundled(source):
        base = "the small Llama that llmprune bundles, a demonstration, not a useful language model"
    else:
        base = f"a checkpoint called `{source.name}`, whose hashes are in `llmprune.json`"
    return f"# {recipe.default_output}\n\nPruned from {base}, by llmprune {llmprune.__version__}: {what_is_left(report, recipe)}"


def what_is_left(report: Report, recipe: Recipe) -> str:
    share = f"{report.zeros:,} of the {report.weights:,}"
    if report.smaller:
        now, units = report.smaller.parameters, UNITS.get(recipe.pattern, recipe.pattern)
        what = f"{share} parameters of its {units} were removed ({report.sparsity:.2%}), {now:,} of {report.parameters:,} remain."
    else:
        what = f"{share} weights in the pruned matrices are zero ({report.sparsity:.2%}), of {report.parameters:,} parameters in all."
    return f"{what} Of these, {report.source.towers}." if report.source.towers else what


def loading(folder: Path, whole: bool) -> str:
    """whole: a vision-language model, with all of its parts."""
    auto = "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM"
    own = read_json(folder / "config.json").keys() >= {"auto_map", "per_layer_config"}  # else transformers knows the class
    trust = ", trust_remote_code=True" if own else ""
    said = "\n\nThe model's class is a file in this folder, and `trust_remote_code=True` runs it: read it first." if own else ""
    return (
        f"## Loading\n\n```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{PLACE}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}"{trust})\n```{said}'
    )


def figures(report: Report) -> str:
    if not report.perplexity:
        return "## Figures\n\nNo perplexity was measured."
    rows = ["| perplexity on | dense | pruned | definition |", "|---|---:|---:|---|"]
    for pair in report.perplexity:
        name = f"{pair.pruned.dataset}, {pair.pruned.split}".replace("|", "\\|")
        rows.append(f"| {name} | {pair.dense.value:.4g} | {pair.pruned.value:.4g} | {pair.pruned.definition} |")
    said = "Exp of the mean negative log-likelihood over the targets of windows that do not overlap; comparable only if all of this is equal."
    return "## Figures\n\n" + "\n".join(rows) + f"\n\n{said}"


def making(report: Report, recipe: Recipe) -> str:
    """What was done, in words and as a recipe that does it again."""
    resolved, data = report.recipe, report.calibration
    lines = [f"- pattern {recipe.pattern}, {report.asked:.4g} asked for, allocated by `{resolved['allocation']}`"]
    lines += [f"- criterion {said('criteria', resolved['criterion'])}"] if resolved["criterion"] else []
    if recipe.pattern not in COARSE:
        lines.append(f"- solver {said('solvers', resolved['solver'].partition('+')[0])}")
    if resolved["solver"] != "mask_only":
        lines.append(f"- the repair aims at {'the outputs of the dense path' if resolved['target'] == 'asymmetric' else 'its original outputs'}")
    if report.polish:
        lines.append(f"- {report.polish.steps} steps of distillation of the whole pruned model from the dense one")
    if report.rounds:
        shares = ", ".join(f"{one.sparsity:.4g}" for one in report.rounds)
        lines.append(f"- in {len(report.rounds)} rounds of pruning and recovery, at sparsities {shares}")
    lines += [f"- calibration: {data.windows} windows of {data.window} tokens{data.seen} of {data.dataset}, {data.split}{data.aside}"] if data else []
    lines += [f"- {note}" for note in (report.smaller.notes if report.smaller else ())]
    toml = "\n".join(as_toml(given(recipe, report)))
    fold = f"<details><summary>Recipe</summary>\n\n````toml\n{toml}\n````\n\n</details>"
    return "## How it was made\n\n" + "\n".join(lines) + f"\n\nEvery matrix has a row in `llmprune.json`.\n\n{fold}"


def said(kind: str, name: str) -> str:
    """The name of a method and the first sentence of its description, where it has a file of its own."""
    first = document(kind, name).split("\n\n")[0].replace("\n", " ") if name in names(kind) else ""
    return f"`{name}`: {first.split('. ')[0].rstrip('.')}" if first else f"`{name}`"


def given(recipe: Recipe, report: Report) -> dict[str, Any]:
    """What was asked for, without paths and with the source's revision pinned; read as a recipe, it asks for the same again."""
    chosen = recipe.model_dump(exclude_unset=True, exclude_none=True, exclude={"output", "push"})
    shown = ("model", "criterion", "solver", "calibration", "eval", "recover_data", "rewind")  # paths are their last names there
    chosen |= {key: report.recipe[key] for key in shown if key in chosen}
    if report.source.revision:
        chosen["revision"] = report.source.revision
    return chosen if chosen.keys() & set(NAMED) or recipe.pattern in COARSE else chosen | {"quality": DEFAULT_QUALITY}


def limits(recipe: Recipe) -> str:
    """What it is not good for, plainly."""
    lines = []
    if not recipe.structured:
        lines.append("Speed or size as it is: the zeros are stored explicitly, so the files are no smaller, and dense kernels are no faster.")
        if recipe.pattern == "2:4":
            lines.append("2:4 kernels exist for NVIDIA GPUs since Ampere, and need a conversion after loading; measure before you rely on them.")
        lines.append("Ordinary fine-tuning: it fills the zeros again unless the mask is enforced.")
    else:
        lines.append("Adapters and merges made for the base model: shapes differ.")
        lines.append("Speed: none was measured; `llmprune bench` compares it with its base model on your machine.")
    lines.append("Anything that was not measured: perplexity on the texts above says little about tasks, other languages, long contexts or safety.")
    lines.append("Fixing errors of the base model: its limits and biases are all still here.")
    return "## What it is not good for\n\n" + "\n".join(f"- {line}" for line in lines)


def licence_text(folder: Path, source: Source) -> str:
    found = licence_of(folder, source)
    if not found:
        return "## Licence\n\nThe base model's folder states none. Find out which it is before you share this model."
    name = found.get("license_name") or found["license"]
    link = f", {found['license_link']}" if "license_link" in found else ""
    return f"## Licence\n\nThe licence of the base model: {name if isinstance(name, str) else ', '.join(map(str, name))}{link}."
