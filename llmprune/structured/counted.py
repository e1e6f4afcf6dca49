"""Config fields that may count the units of a pattern, where an architecture has no table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llmprune.model.matrices import block_matrices
from llmprune.structured.fields import fields_of

FFN = ("intermediate", "ffn", "inner", "dff", "ff_", "_ff", "feed_forward", "mlp")  # words in the fields that count channels
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "kv_channels", "d_kv", "global_head_dim", "swa_head_dim", "v_head_dim")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")  # experts of a token
EXPERT_GROUPS = ("n_group", "num_expert_group")  # runs of experts, the best of which a token chooses from: so many as topk_group says
NO_HEADS = ("dim", "size", "linear", "mamba", "index", "ssm", "rank", "lm_head")  # words in fields that do not count attention's heads


@dataclass(frozen=True)
class Count:
    """Config fields that count units: (field, its value per unit), all changed together. groups: equally many units are kept in each; heads: query
    heads of a unit; least: units that must be kept.
    """

    fields: tuple[tuple[str, int], ...]
    units: int
    fixed: tuple[tuple[str, Any], ...] = ()
    groups: int = 1
    heads: int = 1
    least: int = 1


def channel_counts(model: PreTrainedModel, path: str) -> Iterator[Count]:
    """Fields that are as large as the input of some matrix, or twice that, and fields that are unset."""
    widths = {m.columns for block in model.get_submodule(path).children() for m in block_matrices(block)}
    for name, value in fields_of(model.config.to_dict()):
        if not any(word in name.rpartition(".")[2] for word in FFN):
            continue
        several = isinstance(value, list | tuple) and value and len({*map(str, value)}) == 1
        number = value[0] if several else value
        if type(number) is int and number > 2:
            yield from (Count(((name, each),), number // each) for each in (1, 2) if number % each == 0 and number // each in widths)
        elif value is None:
            yield from (Count(((name, 1),), width) for width in sorted(widths))


def head_counts(model: PreTrainedModel, path: str) -> Iterator[Count]:
    """Query heads, equally many of every KV group; without grouping a query head goes with its key and value."""
    for queries, keys, heads, groups, fixed in _head_fields(model):
        if keys is None or heads == groups:
            yield Count(((queries, 1),) + (((keys, 1),) if keys else ()), heads, fixed)
        else:
            yield Count(((queries, 1),), heads, fixed, groups)


def group_counts(model: PreTrainedModel, path: str) -> Iterator[Count]:
    """KV groups with all their query heads."""
    for queries, keys, heads, groups, fixed in _head_fields(model):
        per = heads // groups
        yield Count((*(((keys, 1),) if keys else ()), (queries, per)), groups, fixed, heads=per)


def _head_fields(model: PreTrainedModel) -> Iterator[tuple[str, str | None, int, int, tuple[tuple[str, Any], ...]]]:
    """(field of the query heads, of the KV heads, their numbers, fields that keep the head size)."""
    fields = dict(fields_of(model.config.to_dict()))
    counts = {name: value for name, value in fields.items() if _counts_heads(name) and type(value) is int and value > 1}
    shared = [name for name in counts if "kv" in name.rpartition(".")[2] or "key_value" in name]
    for queries in [name for name in counts if name not in shared]:
        heads, outer = counts[queries], queries.rpartition(".")[0]
        sizes = tuple((f, v) for f, v in fields.items() if f.rpartition(".")[0] == outer and f.rpartition(".")[2] in HEAD_SIZES and type(v) is int)
        size, rest = divmod(fields.get(f"{outer}.hidden_size".lstrip("."), 0) or 0, heads)
        named = {name.rpartition(".")[2] for name, _ in sizes}
        own = ((f"{outer}.head_dim".lstrip("."), size),) if size and not rest and "head_dim" not in named else ()
        for keys in [name for name in shared if heads % counts[name] == 0] or (None,):
            groups = counts[keys] if keys else heads
            yield from ((queries, keys, heads, groups, fixed) for fixed in dict.fromkeys((sizes + own, sizes)))


def _counts_heads(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "head" in last and not any(word in last for word in NO_HEADS)


def expert_counts(model: PreTrainedModel, path: str) -> Iterator[Count]:
    """Experts, as many as a token chooses at least; where it chooses within groups, equally many of each. A group is judged by its two best."""
    fields = dict(fields_of(model.config.to_dict()))
    for name, value in fields.items():
        outer, _, last = name.rpartition(".")
        number = value[0] if isinstance(value, list | tuple) and len({*map(str, value)}) == 1 else value
        if "expert" not in last or last in (*PER_TOKEN, *EXPERT_GROUPS) or type(number) is not int or number < 2:
            continue
        beside = {f.rpartition(".")[2]: v for f, v in fields.items() if f.rpartition(".")[0] == outer}
        chosen = max((max(v) if isinstance(v, list | tuple) else v for f in PER_TOKEN if (v := beside.get(f))), default=1)
        grouped = [beside[f] for f in EXPERT_GROUPS if beside.get(f)]
        groups = grouped[0] if grouped else 1
        in_a_group = max(2, -(-chosen // (beside.get("topk_group") or 1))) if grouped else chosen
        yield Count(((name, 1),), number, groups=groups, least=groups * in_a_group)


COUNTS = {"channels": channel_counts, "heads": head_counts, "kv-groups": group_counts, "experts": expert_counts}
