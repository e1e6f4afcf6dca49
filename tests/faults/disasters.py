"""Models and calibration on which the numbers go wrong: a run stops in one line, or recovers, says so, and leaves a model that works."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import save_tiny, tiny_windows
from faults.forks import forked
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import LlmpruneError

SECONDS = 60
Weights = dict[str, Tensor]
BLOCK = "model.layers.1."


def whole(weights: Weights) -> None:
    """Nothing: what is wrong is the calibration, or the dtype that is computed in."""


def nan_weight(weights: Weights) -> None:
    weights[f"{BLOCK}mlp.up_proj.weight"][3, 5] = torch.nan


def infinite_weight(weights: Weights) -> None:
    weights["model.norm.weight"][3] = -torch.inf


def nan_activations(weights: Weights) -> None:
    """Scores of attention overflow, and infinity less infinity is no number."""
    for name in ("q_proj", "k_proj"):
        weights[f"{BLOCK}self_attn.{name}.weight"] *= 1e30


def infinite_activations(weights: Weights) -> None:
    weights[f"{BLOCK}mlp.up_proj.weight"] *= 1e38
    weights[f"{BLOCK}mlp.gate_proj.weight"] *= 1e38


def zero_embeddings(weights: Weights) -> None:
    weights["model.embed_tokens.weight"].zero_()


def zero_norm(weights: Weights) -> None:
    weights[f"{BLOCK}post_attention_layernorm.weight"].zero_()


def dead_channels(weights: Weights) -> None:
    weights[f"{BLOCK}post_attention_layernorm.weight"][:9] = 0


def large(weights: Weights) -> None:
    """Finite in float32; products and sums pass the largest number of float16."""
    weights[f"{BLOCK}mlp.up_proj.weight"] *= 3e4


def cancelling(weights: Weights) -> None:
    """Two large columns that cancel as long as both are there."""
    for name in ("gate_proj", "up_proj"):
        weights[f"{BLOCK}mlp.{name}.weight"][1] = weights[f"{BLOCK}mlp.{name}.weight"][0]
    down = weights[f"{BLOCK}mlp.down_proj.weight"]
    down[:, 0], down[:, 1] = 1e4, -1e4


ONE_TOKEN = torch.full((6, 16), 7)
# name -> (what is wrong with the weights, token ids, options, what has to come of it)
DISASTERS: dict[str, tuple[Callable[[Weights], None], Tensor | None, dict[str, Any], str]] = {
    "NaN weight": (nan_weight, None, {}, "refused"),
    "infinite weight": (infinite_weight, None, {}, "refused"),
    "NaN activations": (nan_activations, None, {}, "stopped"),
    "infinite activations": (infinite_activations, None, {}, "stopped"),
    "overflow in float16": (large, None, {"dtype": "float16"}, "stopped"),
    "zero calibration": (zero_embeddings, None, {}, "stopped"),
    "a block without input": (zero_norm, None, {}, "stopped"),
    "dead channels": (dead_channels, None, {}, "recovered"),
    "singular Gram matrix": (whole, ONE_TOKEN, {}, "finished"),  # each method's own damping makes it definite
    "ids beyond the vocabulary": (whole, torch.full((6, 16), 96), {}, "refused"),
    "output destroyed": (cancelling, None, {"criterion": "random", "method": None, "only": "down_proj"}, "stopped"),
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},  # watches nothing
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "alps 2:4": {"method": "alps", "pattern": "2:4", "sparsity": None},
    "balanced": {"quality": "balanced", "allocation": "uniform"},
    "fast channels": {"quality": "fast", "pattern": "channels", "round_to": 4},
}


def planted(folder: Path, spoil: Callable[[Weights], None]) -> Path:
    save_tiny("llama", folder, torch.float32)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outcome(source: Path, output: Path, ids_NL: Tensor, options: dict[str, Any]) -> str:
    """ "refused" or "stopped" in one line, "recovered" with the notes that say so; else what is wrong with the result."""
    asked = {key: value for key, value in ({"sparsity": 0.5} | options).items() if value is not None}
    try:
        report = llmprune.prune(source, calibration=ids_NL, output=str(output), **asked)
    except LlmpruneError as error:
        if output.exists() or not error.hint or not (error.message + error.hint).isprintable():
            return f"stopped badly: {error.message!r}, {error.hint!r}"
        if error.exit_code == 3 and "model.layers." not in error.message:
            return f"stopped without a place: {error.message!r}"
        return {2: "refused", 3: "stopped"}.get(error.exit_code, f"exit code {error.exit_code}")
    finite = all(bool(torch.isfinite(value).all()) for value in load_file(output / "model.safetensors").values())
    logits = AutoModelForCausalLM.from_pretrained(output)(tiny_windows(1)).logits
    if not finite or not bool(torch.isfinite(logits).all()):
        return "finished with numbers that are not finite"
    said = [note for note in report.notes if "dead inputs" in note or "damping" in note or "ranked by magnitude" in note]
    return "recovered" if said else "finished"


def cases() -> list[tuple[str, str]]:
    """(disaster, method) of all that go together: what destroys the output is one criterion's doing, units are read behind dead channels, and
    magnitude sees no inputs.
    """
    watching = [m for m in METHODS if m != "magnitude"]
    methods = {"output destroyed": ["wanda"], "a block without input": watching, "dead channels": [m for m in watching if "channels" not in m]}
    return [(name, method) for name in DISASTERS for method in methods.get(name, METHODS)]


def ended(name: str, method: str, place: Path) -> tuple[str, str]:
    """(what has come of it, what had to)."""
    spoil, ids_NL, options, wanted = DISASTERS[name]
    source = planted(place / "m", spoil)
    return outcome(source, place / "out", tiny_windows() if ids_NL is None else ids_NL, METHODS[method] | options), wanted


def disasters(step: int = 1) -> tuple[str, str]:
    """Of every ``step``th case: (how many were stopped, or recovered and recorded; what came of them, and those that ended otherwise)."""
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    failed = []
    tried = cases()[::step]
    for name, method in tried:
        with tempfile.TemporaryDirectory() as place:
            end, said = forked(lambda name=name, method=method, place=place: json.dumps(ended(name, method, Path(place))), SECONDS)
        found, wanted = json.loads(said) if end == "ended" else (f"{end}: {said}", "")
        ends[found] += 1
        if found != wanted and (found, wanted) != ("recovered", "finished"):
            failed.append(f"{name}, {method}: {found}, not {wanted}")
    return f"{len(tried) - len(failed)}/{len(tried)}", "\n".join([str(dict(ends)), *failed])


if __name__ == "__main__":
    print("\n".join(disasters()))
