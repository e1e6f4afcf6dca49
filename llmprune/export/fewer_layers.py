"""Fields of a config that count layer by layer, for a model with fewer layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.families.lookup import family_of
from llmprune.structured.derived import AFTER_LAST, without_layers
from llmprune.structured.structure import attends

EACH = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")  # one entry per layer
SOME = ("mlp_only_layers", "full_attn_idxs")  # numbers of layers
FIRST = ("first_k_dense_replace",)  # so many layers at the start


def fewer_layers(source: dict[str, Any], model: PreTrainedModel, path: str, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a stored config that change when only the layers ``kept`` of the list ``path`` are kept, in their order.

    What a config leaves to a rule (every fourth layer) is written out, because the rule would count the remaining layers.
    Raises RequestError for numbers that are not sorted, unique and in range, and for layers that the config cannot express.
    """
    config, total = model.config, len(list(model.get_submodule(path).children()))
    if list(kept) == list(range(total)):
        return {}
    if not kept or sorted({*kept} & {*range(total)}) != list(kept):
        raise RequestError(f"layers {list(kept)} of {total} kept", "give sorted numbers, each once, at least one")
    if not attends(config, kept):
        raise RequestError(f"layers {list(kept)} kept: none of them has attention, and transformers' cache needs one", "keep a layer with attention")
    if family_of(config) is None:
        return without_layers(source, model, path, kept)
    full = config.to_dict()
    changed: dict[str, Any] = {name: [full[name][i] for i in kept] for name in EACH if full.get(name) is not None}
    changed |= {name: _renumbered(full[name], kept) for name in SOME if full.get(name) is not None}
    changed |= {name: sum(i < full[name] for i in kept) for name in FIRST if full.get(name) is not None}
    if full.get("decoder_sparse_step", 1) != 1:  # a mixture in every n-th layer
        dense = [i for i in range(total) if (i + 1) % full["decoder_sparse_step"] or i in full["mlp_only_layers"]]
        changed |= {"decoder_sparse_step": 1, "mlp_only_layers": _renumbered(dense, kept)}
    count = {name for name, true in type(config).attribute_map.items() if "num_hidden_layers" in (name, true)}
    count = {type(config).attribute_map.get(name, name) for name in count} | count
    changed |= dict.fromkeys([name for name in count if name in source] or ["num_hidden_layers"], len(kept))
    return changed | {name: 0 for name in AFTER_LAST if source.get(name)}


def _renumbered(numbers: Sequence[int], kept: Sequence[int]) -> list[int]:
    return [new for new, old in enumerate(kept) if old in numbers]
