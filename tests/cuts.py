"""Tiny models cut at random, the same models with zeros in those places, and which families can be cut how.

``python tests/cuts.py`` prints the table of families and patterns in Markdown.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, tiny_windows, uneven
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.model.blocks import find_blocks
from llmprune.structured.slicing import mask_block
from llmprune.structured.spaces import PATTERNS, Space, all_spaces, outer_space, refusal, spaces_of, tensors_of

NAMES = [
    "llama",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "cohere2",
    "starcoder2",
    "opt",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon_new",
    "bloom",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "mamba",
    "lfm2",
    "qwen3_next",
]
WINDOWS = tiny_windows(2, 12)
ROUNDING = 1e-5


def tiny(family: str, **values: Any) -> Any:
    """A tiny model with eight query heads in four KV groups where it has such, always the same one.

    Its logits are small (a standard deviation of about a third), so that rounding in float32 stays well below what a wrong place would do.
    """
    kind, own = FAMILIES[family]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8 if kind == "deepseek_v3" else 4} if "num_key_value_heads" in own else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(own | heads | values)))
        uneven(model)
    model.get_output_embeddings().weight.data.mul_(0.25)
    return model.eval()


def blocks_of(model: Any) -> nn.ModuleList:
    return model.get_submodule(find_blocks(model))


def half(space: Space, generator: torch.Generator) -> Tensor:
    """Half of the units at random, as many in each group."""
    each = space.units // space.groups
    count = max(space.least // space.groups, each // 2)
    picks = [torch.randperm(each, generator=generator)[:count] + group * each for group in range(space.groups)]
    return torch.cat(picks).sort().values


def random_keeps(model: Any, pattern: str, layers: tuple[int, ...] | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    keeps: list[dict[str, Tensor]] = []
    for i, block in enumerate(blocks_of(model)):
        spaces = spaces_of(model.config, i, block, pattern) if layers is None or i in layers else []
        keeps.append({space.name: half(space, generator) for space in spaces})
    return [keeps[0]] * len(keeps) if pattern == "hidden" else keeps


def masked(model: Any, keeps: list[dict[str, Tensor]]) -> Any:
    """A copy with zeros for the dropped units."""
    model = copy.deepcopy(model)
    for i, block in enumerate(blocks_of(model)):
        mask_block(block, all_spaces(model.config, i, block), keeps[i])
    if "hidden" in keeps[0]:
        mask_block(model, [outer_space(model)], keeps[0])
    return model


class _Unrouted(TorchFunctionMode):
    """Logits of some experts are minus infinity wherever one of these routers multiplies."""

    def __init__(self, dropped: dict[int, Tensor]) -> None:
        super().__init__()
        self.dropped = dropped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self.dropped:
            out = out.index_fill(-1, self.dropped[args[1].data_ptr()], float("-inf"))
        return out


@contextmanager
def without_experts(model: Any, keeps: list[dict[str, Tensor]], spaces: Any = None) -> Iterator[None]:
    """No token can choose the dropped experts; ``spaces`` of each block: those of the family's table when omitted. Vectors beside the routers are
    changed for good.
    """
    dropped = {}
    for i, block in enumerate(blocks_of(model)):
        tensors = tensors_of(block)
        for space in spaces_of(model.config, i, block, "experts") if spaces is None else spaces[i]:
            gone = torch.tensor([e for e in range(space.units) if e not in keeps[i][space.name].tolist()], dtype=torch.long)
            for axis in (a for a in space.axes if not a.parameter.startswith(f"{space.name}.")):
                tensor = tensors[axis.parameter]
                if tensor.dim() == 2 and len(tensor) > 1:
                    dropped[tensor.data_ptr()] = gone
                else:  # added to the scores of the choice
                    tensor.data.index_fill_(axis.dim, gone, float("-inf"))
    with _Unrouted(dropped):
        yield


@contextmanager
def passed_by(model: Any, kept: list[int]) -> Iterator[None]:
    """The other blocks hand on what they are given."""

    def hand_on(block: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hooks = [b.register_forward_hook(hand_on, with_kwargs=True) for i, b in enumerate(blocks_of(model)) if i not in kept]
    yield
    for hook in hooks:
        hook.remove()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits


def reloaded(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert {name: keys for name, keys in info.items() if keys} == {}
    return model.eval()


def generates_alike(model: Any) -> None:
    """With the cache as without."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(WINDOWS, use_cache=True, **options), model.generate(WINDOWS, use_cache=False, **options))


def cases(works: bool) -> list[Any]:
    return [
        pytest.param(name, pattern, id=f"{name}-{pattern}")
        for name in NAMES
        for pattern in PATTERNS
        if (refusal(CONFIG_MAPPING[FAMILIES[name][0]](**FAMILIES[name][1]), pattern) is None) == works
    ]


def table() -> str:
    """Families x patterns in Markdown: what works, and why the rest does not."""
    kinds: dict[str, Any] = {}
    for name in NAMES:
        kind, values = FAMILIES[name]
        kinds.setdefault(kind, CONFIG_MAPPING[kind](**values))
    notes: list[str] = []
    lines = [f"| family | {' | '.join(PATTERNS)} |", f"|---|{'---|' * len(PATTERNS)}"]
    for kind, config in kinds.items():
        cells = []
        for pattern in PATTERNS:
            reason = refusal(config, pattern)
            if reason is None:
                cells.append("yes")
                continue
            why = reason.partition(": ")[2].rpartition("; ")[0]
            notes += [why] if why not in notes else []
            cells.append(f"no ({notes.index(why) + 1})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


if __name__ == "__main__":
    print(table())
