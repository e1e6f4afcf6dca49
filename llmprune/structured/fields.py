"""Fields of a stored config by name, under every other name that it has them by. A dotted name is of a config inside the config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

NOT_SIZES = ("rope_parameters", "rope_scaling", "id2label", "label2id", "quantization_config")


def put(saved: dict[str, Any], config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set a field of a stored config. A field with an entry for each layer gets a number for all of them.

    config: of the model, which may be described by a part of what is stored.
    """
    saved, last = _place(part_of(saved, config), config, name, write=True)
    current = read(config, name)
    value = [value] * len(current) if isinstance(current, list | tuple) and type(value) is int else value
    own = _inside(config, name)
    names = [n for n in names_of(own, last) if n in saved] or [canonical(own, last)]
    saved.update(dict.fromkeys(names, value))


def stored(saved: dict[str, Any], config: PreTrainedConfig, name: str) -> Any:
    """What ``put`` has set; of a field with equal entries for each layer the one value."""
    saved, last = _place(part_of(saved, config), config, name)
    value = next(saved[n] for n in names_of(_inside(config, name), last) if n in saved)
    return value[0] if isinstance(value, list | tuple) and len({*map(str, value)}) == 1 else value


def read(config: Any, name: str) -> Any:
    """The value of a field; None where a config has no such field."""
    own, last = _inside(config, name), name.rpartition(".")[2]
    fields = own.to_dict() if isinstance(own, PreTrainedConfig) else own or {}
    return fields.get(canonical(own, last))


def with_fields(config: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedConfig:
    """A copy of the decoder's config with other values."""
    text = config.get_text_config(decoder=True)
    changed = copy.copy(text)
    for name, value in values.items():
        *outer, last = name.split(".")
        inner = changed
        for part in outer[text is not config and _inside(config, f"{outer[0]}.") is text :] if outer else ():
            setattr(inner, part, copy.copy(getattr(inner, part)))
            inner = getattr(inner, part)
        setattr(inner, last, value)
    return changed


def fields_of(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all fields, of the configs inside it too."""
    for name, value in fields.items():
        if isinstance(value, dict):
            if name not in NOT_SIZES:
                yield from fields_of(value, f"{prefix}{name}.")
        elif isinstance(name, str) and not name.startswith("_"):  # some are tables by number
            yield f"{prefix}{name}", value


def canonical(config: Any, name: str) -> str:
    """The name under which a kind of config keeps a field."""
    return getattr(type(config), "attribute_map", {}).get(name, name)


def names_of(config: Any, name: str) -> list[str]:
    """All names of a field, the canonical one first."""
    true = canonical(config, name)
    return [true, *(alias for alias, target in getattr(type(config), "attribute_map", {}).items() if target == true)]


def part_of(saved: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The part of a stored config that describes the model: all of it, or the one of the model's type, which is copied."""
    if saved.get("model_type") != config.model_type:
        for name, inner in saved.items():
            if isinstance(inner, dict) and inner.get("model_type") == config.model_type:
                saved[name] = dict(inner)
                return saved[name]
    return saved


def _inside(config: Any, name: str) -> Any:
    """The config that holds the last part of a dotted name."""
    for part in name.split(".")[:-1]:
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def _place(saved: dict[str, Any], config: PreTrainedConfig, name: str, write: bool = False) -> tuple[dict[str, Any], str]:
    """(the dictionary that holds a field, its last name); what is not stored is its default, which is added (``write``)."""
    *outer, last = name.split(".")
    inner: Any = config
    for part in outer:
        inner = _inside(inner, f"{part}.")
        fields = dict(saved.get(part) or (inner if isinstance(inner, dict) else inner.to_dict()))
        if write:
            saved[part] = fields
        saved = fields
    return saved, last
