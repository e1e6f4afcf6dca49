"""The words in which a family's table is written: which parameters of a block lose the same units together. Data only.

A unit is removed or kept as a whole: an FFN channel, a head, an expert. Paths are inside the block; U = units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

HEADS = "num_attention_heads"
KV_HEADS = "num_key_value_heads"


@dataclass(frozen=True)
class Part:
    """Where the units lie along one side of a parameter, or of everything inside a module.

    By default every unit has an equal run of neighbours. ``copies`` such layouts may follow one another (gate before up);
    ``widths`` gives the run of one unit in each of several unequal ones (query, key, value), from the first place on.
    """

    path: str
    copies: int = 1
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scale:
    """A parameter, or everything inside a module, that is multiplied by ``share ** power`` when a share of the units is kept.

    An RMS norm divides by the root of a mean over all its places. Zeros in the dropped ones keep that mean small; without them it grows, unless
    the input is scaled by the root of the kept share. So ``share`` is that root, and it cancels out exactly, epsilon included.
    """

    path: str
    power: int
    offset: float = 0.0  # the parameter counts from here: 1 for norms that multiply by 1 + weight


@dataclass(frozen=True)
class Cut:
    """One way of making a block smaller. It applies to the blocks that have its ``reader`` (or the first of ``writes``)."""

    pattern: str
    name: str
    writes: tuple[Part, ...]  # rows of matrices with their biases, places of vectors, first dimension of anything else
    reader: Part | None = None  # columns of the matrix that takes the units' output back to the residual stream
    reads: tuple[Part, ...] = ()  # columns of other matrices
    units: int = 0  # 0: as many as the reader has columns
    config: tuple[tuple[str, int], ...] = ()  # (field, its value per kept unit)
    fixed: tuple[tuple[str, Any], ...] = ()  # fields whose default would follow the cut, and must not
    scales: tuple[Scale, ...] = ()
    groups: int = 1
    least: int = 1


@dataclass(frozen=True)
class Residual:
    """What touches the residual stream: modules inside a block (those that it has), and the last norm, by its path in the model."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    norms: tuple[str, ...]  # RMS norms of the stream itself
    inner_norms: tuple[str, ...] = ()  # RMS norms of what is added to it
    last_norm: str = "model.norm.weight"
    bare: bool = False  # ``reads`` take the stream without a norm before them
    plus_one: bool = False  # norms that multiply by 1 + weight
    scaled_embeddings: bool = False  # embeddings are multiplied by the root of the width
    fixed: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Family:
    """A family's table. ``refused`` says why a pattern is not supported."""

    cuts: tuple[Cut, ...]
    refused: dict[str, str] = field(default_factory=dict)
    residual: Residual | None = None  # None: ``refused`` says why the width cannot change
    divides: bool = False  # the config requires that the head count divides the hidden size
    substitute: str | None = None  # a model_type with the same tensors and forward whose config checks less
    named_by_class: bool = False  # transformers renames its tensors by the name of the model's class, not by its model_type


Table = Callable[[PreTrainedConfig], Family]


def feed_forward(reader: str, *writes: str | Part, size: str = "intermediate_size", name: str = "mlp", **more: Any) -> Cut:
    """Channels between the way up and the way down."""
    return Cut("channels", name, _parts(writes), Part(reader), config=((size, 1),), **more)


def attention(
    config: PreTrainedConfig,
    queries: tuple[str | Part, ...] = ("self_attn.q_proj",),
    keys: tuple[str | Part, ...] = ("self_attn.k_proj", "self_attn.v_proj"),
    reader: str = "self_attn.o_proj",
    query_scales: tuple[Scale, ...] = (),
    key_scales: tuple[Scale, ...] = (),
    whole: tuple[Part, ...] | None = None,
) -> tuple[Cut, ...]:
    """Heads and KV groups of grouped-query attention whose config has a head size. ``queries`` and ``keys``: parts with rows or places for
    every query head, for every KV head; ``whole``: the parts of a whole group where one matrix produces them all.

    Without grouping, a query head and its key and value are one unit for either pattern.
    """
    heads, groups = getattr(config, HEADS), getattr(config, KV_HEADS)
    per_group, size = heads // groups, head_size(config)
    group = Cut(
        "kv-groups",
        "self_attn.groups",
        whole or _parts((*queries, *keys)),
        Part(reader),
        units=groups,
        config=((KV_HEADS, 1), (HEADS, per_group)),
        fixed=(("head_dim", size),),
        scales=query_scales + key_scales,
    )
    if per_group == 1:
        return replace(group, pattern="heads", name="self_attn.heads"), group
    head = Cut(
        "heads",
        "self_attn.heads",
        _parts(queries),
        Part(reader),
        units=heads,
        config=((HEADS, 1),),
        fixed=(("head_dim", size),),
        scales=query_scales,
        groups=groups,
        least=groups,
    )
    return head, group


def routed(router: str, stacks: str, size: str, count: int, per_token: int, **more: Any) -> Cut:
    """Experts with their rows of the router and of the vectors beside it."""
    return Cut("experts", stacks, (Part(stacks), Part(router)), units=count, config=((size, 1),), **({"least": per_token} | more))


def residual(config: PreTrainedConfig, reads: tuple[str, ...], writes: tuple[str, ...], norms: tuple[str, ...], **more: Any) -> Residual:
    """The residual stream of a family whose config has a head size."""
    return Residual(reads, writes, norms, fixed=(("head_dim", head_size(config)),), **more)


def head_size(config: PreTrainedConfig) -> int:
    """Width of a head: the config's own, else an equal share of the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // getattr(config, HEADS)


def _parts(items: tuple[str | Part, ...]) -> tuple[Part, ...]:
    return tuple(Part(item) if isinstance(item, str) else item for item in items)


CENTRED = "its layer norms subtract the mean over the whole width, which no smaller width has"
