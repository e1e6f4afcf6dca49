"""Fewer blocks: the config fields that count layer by layer are found by trying, and proved on models without weights.

Proved is that every tensor outside the blocks stays as it is, and that each kept block has the modules, settings, shapes and fixed tables of the
block that moves there. The settings are what the config decides by a layer's number: kind of attention, window, experts, scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.skeleton import OWN_SIZES, build_skeleton, own_sizes
from llmprune.structured.spaces import require

TRIES = 64  # configs that are built for one choice of layers
AT_START = ("first", "dense")  # words in fields that count layers from the first one
AFTER_LAST = ("num_nextn_predict_layers", "num_mtp_layers")  # predictors of further tokens: their numbers would be taken by others
WITHOUT_ATTENTION = {"conv", "linear_attention"}  # layer types


def without_layers(source: dict[str, Any], model: PreTrainedModel, path: str, kept: Sequence[int]) -> dict[str, Any]:
    """The fields of a stored config that change when only the blocks ``kept`` of the list ``path`` are kept, in their order; ``model`` may be
    without weights.

    Raises RequestError for numbers that are not sorted, unique and in range, and where no config of this kind is proved to describe the blocks, with
    what the last attempt got wrong.
    """
    total = len(list(model.get_submodule(path).children()))
    if list(kept) == list(range(total)):
        return {}
    if not kept or sorted({*kept} & {*range(total)}) != list(kept):
        raise RequestError(f"layers {list(kept)} of {total} kept", "give sorted numbers, each once, at least one")
    if not attends(model.config, kept):
        raise RequestError(f"layers {list(kept)} kept: none of them has attention, and transformers' cache needs one", "keep a layer with attention")
    require(model.config, "layers")
    text = model.config.get_text_config(decoder=True)
    nested = next((name for name in model.config.sub_configs if getattr(model.config, name, None) is text), None)
    left_out = ("auto_map", OWN_SIZES) if own_sizes(source) else ("auto_map",)  # sizes of their own go along with blocks
    plain = {name: value for name, value in source.items() if name not in left_out}
    whole, wrong = build_skeleton(plain, model.dtype), "no field of its config counts them"
    for edit in islice(_edits(text, source if nested is None else source.get(nested, {}), total, kept), TRIES):
        changed = edit if nested is None else {nested: source.get(nested, {}) | edit}
        different: str | None
        try:
            different = _difference(whole, build_skeleton(plain | changed, model.dtype), path, kept)
        except RequestError as error:
            different = error.message
        if different is None:
            return changed
        wrong = different
    raise RequestError(f"layers: {model.config.model_type} without blocks {sorted({*range(total)} - {*kept})}: {wrong}", "drop other blocks")


def attends(config: PreTrainedConfig, kept: Iterable[int]) -> bool:
    """Whether one of these layers has attention, if any of the model has."""
    types = config.to_dict().get("layer_types") or []
    return bool({types[i] for i in kept if types} - WITHOUT_ATTENTION) or not set(types) - WITHOUT_ATTENTION


def inexpressible(model: PreTrainedModel, path: str, kept: Iterable[int]) -> str | None:
    """Why no config describes the model with only these blocks; None where one does."""
    try:
        without_layers(model.config.to_dict(), model, path, sorted(kept))
    except RequestError as error:
        return error.message
    return None


def require_layers(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Raises RequestError where no single block of these paths can be dropped."""
    path, found = paths[0].rpartition(".")[0], None
    for index in range(len(paths)):
        found = inexpressible(model, path, {*range(len(paths))} - {index})
        if found is None:
            return
    raise RequestError(found or f"layers: {path} has no blocks", "its weights can be pruned without --pattern layers")


def _edits(config: PreTrainedConfig, source: dict[str, Any], total: int, kept: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Changed fields, the likeliest first."""
    full = config.to_dict()
    listed = _listed(full, total)
    full |= listed
    each = {name: [value[i] for i in kept] for name, value in full.items() if _by_layer(name, value, total)}
    some = {
        name: [new for new, old in enumerate(kept) if old in full[name]] for name in full if name not in each and _numbers(name, full[name], total)
    }
    ends = {name: 0 for name in AFTER_LAST if source.get(name)}
    canonical = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    counts = [name for name, value in full.items() if type(value) is int and value == total and ("layer" in name or name == canonical)]
    for count in sorted(counts, key=lambda name: name != canonical) or [""]:  # some count the entries of a list
        parts = {name: _parts(name, value, total, kept) for name, value in full.items() if name != count and _part(name, value, total)}
        for values in product(*parts.values()):
            changed = {name: value for name, value in zip(parts, values, strict=True) if value != full[name]}
            edit = listed | each | some | changed | ends | ({count: len(kept)} if count else {})
            aliases = {alias: edit[true] for alias, true in type(config).attribute_map.items() if true in edit and alias in source}
            yield edit | aliases


def _listed(full: dict[str, Any], total: int) -> dict[str, Any]:
    """Fields in which a mixture in every n-th layer is a list of the other layers: the rule would count the remaining ones."""
    step = full.get("decoder_sparse_step") or 1
    if step == 1 or "mlp_only_layers" not in full:
        return {}
    only = full["mlp_only_layers"] or []
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(total) if (i + 1) % step or i in only]}


def _by_layer(name: str, value: Any, total: int) -> bool:
    """One entry for each layer."""
    return isinstance(value, list | tuple) and len(value) == total and "token" not in name and not (total > 2 and _numbers(name, value, total))


def _numbers(name: str, value: Any, total: int) -> bool:
    """Numbers of layers, ascending."""
    if not isinstance(value, list | tuple) or not value or not any(word in name for word in ("layer", "idx", "indices")):
        return False
    return all(type(v) is int and 0 <= v < total for v in value) and sorted({*value}) == list(value)


def _part(name: str, value: Any, total: int) -> bool:
    """Perhaps a number of layers at the start or at the end."""
    return type(value) is int and 0 < value <= total and any(word in name for word in ("layer", *AT_START)) and name not in AFTER_LAST


def _parts(name: str, value: int, total: int, kept: Sequence[int]) -> list[int]:
    """Values that the field may have afterwards, the likeliest first."""
    start, end = sum(i < value for i in kept), sum(i >= total - value for i in kept)
    found = (start, value, end) if any(word in name for word in AT_START) else (value, start, end)
    return list(dict.fromkeys(found))


def _difference(model: PreTrainedModel, smaller: PreTrainedModel, path: str, kept: Sequence[int]) -> str | None:
    """What the smaller model would have that the kept blocks do not; None where they are alike."""
    blocks, own = list(model.get_submodule(path).children()), list(smaller.get_submodule(path).children())
    if len(own) != len(kept):
        return f"its config would give {len(own)} blocks instead of {len(kept)}"
    outside, wanted = (shapes(m, f"{path}.") for m in (smaller, model))
    if outside != wanted:
        name = sorted(outside.items() ^ wanted.items())[0][0]
        return f"{name} would have another shape"
    for new, old in enumerate(kept):
        setting = unlike(blocks[old], own[new], old, new)
        if setting is not None:
            return f"block {new} of the smaller config would be another kind of block than block {old} ({setting})"
    return None


def unlike(block: nn.Module, other: nn.Module, old: int, new: int) -> str | None:
    """The first thing in which two blocks differ besides their numbers and weights."""
    if shapes(block) != shapes(other):
        return "shapes"
    pairs = zip(block.named_modules(), other.named_modules(), strict=False)
    for (name, module), (_, twin) in pairs:
        if type(module) is not type(twin):
            return name or type(module).__name__
        mine, its = _settings(module), _settings(twin)
        for key in mine.keys() | its.keys():
            if mine.get(key) != its.get(key) and (mine.get(key), its.get(key)) != (old, new):
                return f"{name}.{key}".lstrip(".")
    mine_tables, its_tables = _tables(block), _tables(other)
    unequal = [name for name, table in mine_tables.items() if not torch.equal(table.cpu(), its_tables[name].cpu())]
    return unequal[0] if unequal else None


def shapes(module: nn.Module, outside: str | None = None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items() if outside is None or not name.startswith(outside)}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module was made with."""
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None) and not k.startswith("_") and k != "training"}


def _tables(block: nn.Module) -> dict[str, Tensor]:
    """Buffers that are computed, not stored."""
    stored = block.state_dict()
    return {name: buffer for name, buffer in block.named_buffers() if name not in stored and not buffer.is_meta}
