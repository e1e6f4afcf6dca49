"""The result of a pruning in memory as an ordinary result folder, all or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.checkpoint.manifest import manifest_of
from llmprune.errors import RequestError
from llmprune.export.check import compared
from llmprune.export.config import Export
from llmprune.export.live import write_sliced
from llmprune.model.skeleton import count_parameters
from llmprune.model.wrappers import auto_class
from llmprune.publish.live import write_live_card
from llmprune.recipe.recipe import Recipe
from llmprune.report.result import Report
from llmprune.results import Reloaded, Smaller
from llmprune.run.preflight import check_output
from llmprune.run.trained import named, published, write_model


@dataclass(frozen=True)
class Unsaved:
    """A model that was pruned in memory. model: as it is now, the smaller one of a structured pattern; exported: of that one, what its config has to
    say; patterns: what was cut. layers: the numbers of the kept blocks. ids_1L: a few tokens, on which the saved model is compared.
    """

    model: PreTrainedModel
    recipe: Recipe
    ids_1L: Tensor
    exported: Export | None = None
    patterns: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def write(self, folder: Path) -> None:
        if self.exported is None:
            self.model.save_pretrained(folder)
        else:
            write_sliced(self.model, self.exported, folder)


def save_live(report: Report, output: str | PathLike[str], tokenizer: Any = None, overwrite: bool = False) -> Report:
    """Save a model that was pruned in memory, as it is now: weights, llmprune.json, card, page. The report of the folder.

    tokenizer: saved beside it, or a processor. Raises RequestError for a report that is of no live model, and where the output cannot be written;
    PromiseError where the saved model predicts otherwise than the one in memory; then nothing is written.
    """
    unsaved: Unsaved | None = report.live
    if unsaved is None:
        where = f", which has written {report.output.name}" if report.output else ""
        raise RequestError(f"a report of no model in memory, but of a run{where}", "copy its output folder")
    folder = Path(output).expanduser()
    check_place(folder, unsaved.model, overwrite)

    def made(weights: Path) -> Report:
        write_model(unsaved.write, tokenizer, weights)
        manifest = manifest_of(weights)
        return replace(
            report,
            output=folder,
            files=manifest.files,
            tensors=manifest.tensors,
            reloaded=loaded_again(weights, unsaved),
            smaller=smaller_of(unsaved, weights),
            model=None,
            live=None,
        )

    return published(folder, report.recipe, made, partial(card_of, unsaved.recipe))


def check_place(folder: Path, model: PreTrainedModel, overwrite: bool) -> None:
    """Raises RequestError where the output cannot be written."""
    check_output(folder, named(model)[1], overwrite)


def card_of(recipe: Recipe, folder: Path, report: Report) -> None:
    write_live_card(folder, report, recipe)


def smaller_of(unsaved: Unsaved, folder: Path) -> Smaller | None:
    if unsaved.exported is None:
        return None
    size, exported = sum(path.stat().st_size for path in folder.glob("*.safetensors")), unsaved.exported
    about = (unsaved.recipe.pattern, unsaved.patterns, unsaved.layers, count_parameters(unsaved.model))
    return Smaller(*about, size, bool(exported.files), tuple(exported.notes))


@torch.no_grad()
def loaded_again(folder: Path, unsaved: Unsaved) -> Reloaded:
    """The saved model, loaded by plain transformers, beside the one in memory. Code beside the weights is llmprune's own here, and is run.

    Raises PromiseError where they predict otherwise.
    """
    model, ids_1L = unsaved.model, unsaved.ids_1L
    saved = auto_class(model.config.model_type).from_pretrained(folder, dtype=model.dtype, trust_remote_code=True).to(model.device).eval()
    training = model.training
    model.eval()
    wanted, found = (m(input_ids=ids_1L.to(model.device), use_cache=False).logits.float() for m in (model, saved))
    model.train(training)
    return Reloaded(compared(wanted, found, model.dtype, model.device), ids_1L.shape[1])
