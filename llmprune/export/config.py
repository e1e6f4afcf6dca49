"""The config that a smaller model is saved with: its own kind if that can express the sizes, else the nearest kind that can, else a config of
each layer with a few lines of model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmprune.errors import RequestError
from llmprune.model.blocks import ROUTER_LOGITS
from llmprune.model.families.lookup import family_of
from llmprune.model.families.table import HEADS, KV_HEADS
from llmprune.model.skeleton import MODULE, OWN_SIZES, READABLE, own_sizes
from llmprune.structured.derived import without_layers
from llmprune.structured.fields import canonical, put, read, stored
from llmprune.structured.slicing import Keeps, Sizes, all_sizes, widened
from llmprune.structured.spaces import Space

# transformers renames the tensors of some models by the name of their class, which differs here
RENAMING = """from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

register_checkpoint_conversion_mapping("Pruned{model}", get_checkpoint_conversion_mapping("{model}"), overwrite=True)
"""
NOT_SHARED = ("attention_bias", "mlp_bias", "pretraining_tp", "rope_theta", "rope_scaling")  # of Llama's config, or under a newer name
CODE = '''"""{layer} in {sizes} sizes: what config.json says under per_layer_config. Written by llmprune."""

from {module} import {layer}, {model}
{renaming}

class Pruned{model}({model}):
    def __init__(self, config):
        if config.is_heterogeneous:
            config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        if config.is_heterogeneous:
            layers = self.get_submodule("{path}")
            for i, own in enumerate(config.per_layer_config):
                layers[i] = {layer}(own, i)
            self.post_init()
'''


@dataclass(frozen=True)
class Export:
    """config.json, the files beside it (name -> text), and what the report should say about them."""

    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def per_layer(self) -> dict[int, Sizes]:
        """Sizes of the layers that differ from the config's own; empty for a uniform model."""
        return own_sizes(self.config)


def export(
    source: dict[str, Any],
    model: PreTrainedModel,
    path: str,
    spaces: Sequence[Sequence[Space]],
    keeps: Sequence[Keeps],
    kept: Sequence[int] | None = None,
) -> Export:
    """What to save for a model with fewer units, or fewer blocks.

    source: the config as stored. model: the uncut one, on any device; ``path`` its list of blocks. spaces: all of each block. kept: numbers of
    the kept blocks. Raises RequestError for sizes or layers that no config can express.
    """
    config = model.config
    kept = range(len(spaces)) if kept is None else kept
    wanted, fixed = _fields(spaces, keeps)
    uneven = own_sizes(source)
    left = _left_uneven(uneven, config, spaces)
    wanted |= left
    replaced = ("auto_map", "transformers_weights", *((OWN_SIZES,) if uneven else ()))
    saved = {name: value for name, value in source.items() if name not in replaced}
    saved |= without_layers(source, model, path, kept)
    for name, value in fixed.items():
        put(saved, config, name, value)
    uncounted = {name: read(config, name) for name in left - {name for layer in spaces for space in layer for name, _ in space.config}}
    sizes_of = {i: uncounted | {n: v for n, v in uneven.get(i, {}).items() if n in uncounted} | all_sizes(spaces[i], keeps[i]) for i in kept}
    layers = [{name: v for name, v in sizes_of[i].items() if name in wanted} for i in kept]
    varied = any(len({sizes[name] for sizes in layers if name in sizes}) > 1 for name in wanted)
    for name in wanted:
        put(saved, config, name, _shared(config, name, layers, varied))
    different = {i: own for i, sizes in enumerate(layers) if (own := _own(config, saved, sizes))}
    if different:
        return _each_layer(saved, model, path, different, _without_loss(saved, config, spaces, different))
    return _uniform(saved, config)


def padded(spaces: Sequence[Sequence[Space]], keeps: Sequence[Keeps]) -> list[dict[str, Any]]:
    """Keeps as wide as the widest of all layers for each config field, filled up with dropped units: mask with the true keeps, slice with these.

    Raises RequestError for experts: zeros would still be chosen.
    """
    widest: dict[tuple[str, str], int] = {}
    for layer, cut in zip(spaces, keeps, strict=True):
        for space in layer:
            count = len(cut[space.name]) if space.name in cut else space.units
            widest[_same(space)] = max(widest.get(_same(space), 0), count)
    for layer, cut in zip(spaces, keeps, strict=True):
        for space in layer:
            if space.pattern == "experts" and space.name in cut and len(cut[space.name]) < widest[_same(space)]:
                raise RequestError(
                    f"{space.name}: experts cannot be padded with zeros, a router would choose them", "keep equally many in every layer"
                )
    return [{s.name: widened(s, cut[s.name], widest[_same(s)]) for s in layer if s.name in cut} for layer, cut in zip(spaces, keeps, strict=True)]


def _same(space: Space) -> tuple[str, str]:
    return space.pattern, space.config[0][0]


def _fields(spaces: Sequence[Sequence[Space]], keeps: Sequence[Keeps]) -> tuple[set[str], dict[str, Any]]:
    """The config fields that any cut touches, and those to write out with them."""
    cut = [space for layer, keep in zip(spaces, keeps, strict=True) for space in layer if space.name in keep]
    return {name for space in cut for name, _ in space.config}, {name: value for space in cut for name, value in space.fixed}


def _left_uneven(own: dict[int, Sizes], config: PreTrainedConfig, spaces: Sequence[Sequence[Space]]) -> set[str]:
    """The config fields of layers that an earlier cut left uneven, by the names that spaces have for them."""
    names = {canonical(config, name): name for layer in spaces for space in layer for name, _ in space.config}
    return {names.get(name, name) for sizes in own.values() for name in sizes}


def _shared(config: PreTrainedConfig, name: str, layers: Sequence[Sizes], varied: bool) -> int:
    """The sizes in the config of the whole model: the one size, else the widest. Where layers have separate configs (``varied``) a head count
    stays the source's, because configs check it.
    """
    found = {sizes[name] for sizes in layers if name in sizes}
    if (varied and name in (HEADS, KV_HEADS)) or not found:
        return read(config, name)
    return max(found)


def _own(config: PreTrainedConfig, saved: dict[str, Any], sizes: Sizes) -> Sizes:
    """Where a layer differs from the config of the whole model."""
    return {canonical(config, name): value for name, value in sizes.items() if value != stored(saved, config, name)}


def _uniform(saved: dict[str, Any], config: PreTrainedConfig) -> Export:
    family = family_of(config)
    if family is None or not family.divides:
        return Export(saved)
    heads, width = (saved.get(name, getattr(config, name)) for name in (HEADS, "hidden_size"))
    if width % heads == 0:
        return Export(saved)
    why = f"{heads} heads do not divide a hidden size of {width}, which a {config.model_type} config requires"
    if family.substitute is None:
        raise RequestError(f"{config.model_type}: {why}", "keep another number")
    return _substituted(saved, config, family.substitute, why)


def _substituted(saved: dict[str, Any], config: PreTrainedConfig, kind: str, why: str) -> Export:
    """The other kind has different defaults, so every field is written out."""
    full = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    named = {name: value for name, value in (full | saved).items() if name not in NOT_SHARED}
    named |= {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "sliding_window": None,
        "rope_parameters": full["rope_parameters"],
    }
    return Export(named, notes=(f"saved as {kind}, which has the same tensors and the same forward: {why}",))


def _without_loss(saved: dict[str, Any], config: PreTrainedConfig, spaces: Sequence[Sequence[Space]], different: dict[int, Sizes]) -> tuple[str, ...]:
    """Routers' logits are not returned where layers differ in experts: the balancing loss joins those of all layers. Notes about that."""
    counts = {canonical(config, name) for layer in spaces for space in layer if space.pattern == "experts" for name, _ in space.config}
    if not any(counts & sizes.keys() for sizes in different.values()) or not config.to_dict().get(ROUTER_LOGITS):
        return ()
    saved[ROUTER_LOGITS] = False
    return (f"{ROUTER_LOGITS} is off: the balancing loss cannot join routers of different sizes",)


def _each_layer(saved: dict[str, Any], model: PreTrainedModel, path: str, different: dict[int, Sizes], notes: tuple[str, ...] = ()) -> Export:
    blocks: nn.ModuleList = model.get_submodule(path)  # type: ignore[assignment]
    layer, name = type(blocks[0]), type(model).__name__
    if saved.get(OWN_SIZES):
        raise RequestError(f"{model.config.model_type}: its own config has sizes of single layers already", "use --uniform, or --pad")
    count = 1 + len({tuple(sorted(sizes.items())) for sizes in different.values()})
    family = family_of(model.config)
    renaming = RENAMING.format(model=name) if family and family.named_by_class else ""
    code = CODE.format(renaming=renaming, layer=layer.__name__, model=name, module=type(model).__module__, path=path, sizes=count)
    saved |= {
        "architectures": [f"Pruned{name}"],
        "auto_map": {"AutoModelForCausalLM": f"{MODULE}.Pruned{name}"},
        OWN_SIZES: {str(i): sizes for i, sizes in different.items()},
    }
    if any(HEADS in sizes for sizes in different.values()):
        saved[READABLE] = True
    note = f"layers of different sizes: load with trust_remote_code=True, which runs {MODULE}.py beside the weights"
    return Export(saved, {f"{MODULE}.py": code}, (note, *notes))
