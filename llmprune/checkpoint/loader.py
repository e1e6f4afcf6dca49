"""Fills a skeleton from a checkpoint, one module at a time, and turns its parameters back into checkpoint tensors."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from llmprune.checkpoint.names import convert, natural, parameter_names, revert, stored_rows
from llmprune.checkpoint.source import DTYPES, FIRST_NUMBER, Source
from llmprune.errors import ConversionError, RequestError

MOST_NAMED = 20
HINT_QUANTISED = "give the checkpoint in float16, bfloat16 or float32; the scales of these codes are unknown"
HINT_MISSING = "the checkpoint is incomplete; fetch it again"
HINT_SHAPES = "config.json and weights do not belong together"


class Finished(Protocol):
    """Where the tensors that a run has finished are written, and read again."""

    @property
    def written(self) -> Container[str]: ...

    def write(self, tensors: dict[str, Tensor]) -> dict[str, str]: ...

    def write_again(self, tensors: dict[str, Tensor]) -> dict[str, str]: ...

    def read_many(self, keys: list[str]) -> dict[str, Tensor]: ...


class Loader:
    """Maps a source onto a skeleton. With a ``sink``, tensors that a run has finished are read from there instead. unused: paths of modules and
    parameters outside the blocks that stay empty.

    Raises RequestError when the source lacks tensors, or holds them in other shapes or in a dtype that cannot be computed with.
    """

    def __init__(self, source: Source, skeleton: PreTrainedModel, block_path: str, blocks: int, unused: Iterable[str] = ()) -> None:
        self.source = source
        self.skeleton = skeleton
        self.sink: Finished | None = None
        names, self.converted, further = parameter_names(skeleton, list(source.tensors))
        self.parameter_of = names
        self.keys_of: dict[str, list[str]] = {}  # parameter -> checkpoint keys
        for key in sorted(names, key=natural):
            self.keys_of.setdefault(names[key], []).append(key)
        self._filled: dict[str, list[str]] = {}  # checkpoint key -> all parameters that it is split into, where they are several
        for name, key in further.items():
            self.keys_of.setdefault(name, []).append(key)
            self._filled.setdefault(key, [names[key]]).append(name)
        self.empty: dict[str, Tensor] = dict(skeleton.state_dict())  # meta parameters; persistent buffers are real until loaded
        # the skeleton's own empty parameters are put back after use: new ones would fragment the heap and keep it from shrinking
        self._meta = {(id(m), leaf): p for m in skeleton.modules() for leaf, p in m._parameters.items() if p is not None}
        self.tied = self._ties()
        self._prefixes = [f"{block_path}.{i}." for i in range(blocks)]
        self._unused = tuple(unused)
        self._first = next(name for name, _ in skeleton.named_parameters())  # of whose device some models make their masks
        self._in_block: list[list[str]] = [[] for _ in range(blocks)]
        self._outer: list[str] = []
        for key in names:
            self._home(names[key]).append(key)
        self._check()

    def _ties(self) -> dict[str, str]:
        """Parameter -> the one whose tensor it shares. As transformers ties: any one of them may be stored, and one that is stored with values of
        its own is not tied, whatever the config says (the skeleton's own record is corrected).
        """
        groups: dict[str, list[str]] = {}
        declared = self.skeleton.all_tied_weights_keys
        for target, source in declared.items():
            if target in self.empty:
                groups.setdefault(source, [source]).append(target)
        found = {}
        for source, members in groups.items():
            keeper = next((name for name in members if name in self.keys_of), source)
            for name in members:
                if name == keeper:
                    continue
                if name not in self.keys_of or self._equal(name, keeper):
                    found[name] = keeper
                else:
                    del declared[name]
        return found

    def _equal(self, one: str, other: str) -> bool:
        """Whether two parameters that are stored as they are have the same values."""
        keys = [self.keys_of[one][0], self.keys_of[other][0]]
        if self.source.tensors[keys[0]].shape != self.source.tensors[keys[1]].shape:
            return False
        tensors = self.source.read_many(keys)
        return torch.equal(tensors[keys[0]], tensors[keys[1]])

    def _home(self, parameter: str) -> list[str]:
        base = self._prefixes[0].removesuffix("0.")
        if parameter.startswith(base):
            return self._in_block[int(parameter.removeprefix(base).split(".", 1)[0])]
        return self._outer

    def _check(self) -> None:
        """Raises RequestError naming everything in which the headers contradict the model."""
        stored = self.source.tensors
        numbers = {k for k, p in self.parameter_of.items() if self.empty[p].is_floating_point()}
        odd = sorted(k for k in self.parameter_of if (d := DTYPES.get(stored[k].dtype)) is None or (k in numbers and not d.is_floating_point))
        wrong = [
            f"{k} is {list(stored[k].shape)}, the config says {list(self.empty[p].shape)}"
            for k, p in self.parameter_of.items()
            if k not in self.converted and stored[k].shape != tuple(self.empty[p].shape)
        ]
        filled_by_conversion = {self.parameter_of[k].rpartition(".")[0] for k in self.converted}
        missing = [
            p
            for p in self.empty
            if p not in self.keys_of and p not in self.tied and not any(p.startswith(path) for path in filled_by_conversion if path)
        ]
        beyond = self._beyond()
        found = {
            f"{len(odd)} tensors in a quantised format that config.json does not mention": [f"{k} ({stored[k].dtype})" for k in odd],
            f"{len(missing)} tensors missing": missing,
            f"{len(beyond)} tensors of blocks that the config does not have": beyond,
            f"{len(wrong)} tensors of another shape": wrong,
        }
        said = "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)
        if said:
            raise RequestError(said, HINT_QUANTISED if odd else HINT_MISSING if missing else HINT_SHAPES)

    def _beyond(self) -> list[str]:
        """Checkpoint tensors of blocks after the last one, except those that the model itself ignores (multi-token prediction)."""
        stems = {found[1] for key in self._in_block[0] if (found := FIRST_NUMBER.match(key)) and found[2] == "0"}
        more = getattr(self.skeleton.config.get_text_config(decoder=True), "num_nextn_predict_layers", 0)
        blocks = len(self._prefixes) + (more if type(more) is int else 0)
        left_out = self.skeleton._keys_to_ignore_on_load_unexpected or ()
        return [
            key
            for key in sorted(self.source.tensors.keys() - self.parameter_of.keys(), key=natural)
            if (found := FIRST_NUMBER.match(key)) and found[1] in stems and int(found[2]) >= blocks and not any(re.search(p, key) for p in left_out)
        ]

    def try_conversion(self) -> None:
        """Load one block that needs conversion and convert it back. Raises ConversionError when that does not return what was read."""
        index = next((i for i, keys in enumerate(self._in_block) if not self.converted.isdisjoint(keys)), None)
        if index is not None:
            self.load_block(index, torch.device("cpu"))
            self.free_block(index)

    def load_block(self, index: int, device: torch.device, dense: bool = False) -> nn.Module:
        """The block with its weights on ``device``, in the skeleton's dtype; ``dense``: as the source has them."""
        self._fill(self._in_block[index], dense)
        block = self.skeleton.get_submodule(self._prefixes[index].removesuffix("."))
        empty = [name for name, p in block.named_parameters() if p.is_meta]
        if empty:
            raise RequestError(f"{self._prefixes[index]}{empty[0]}: not filled by the checkpoint", "the checkpoint does not fit this architecture")
        return block.to(device)

    def free_block(self, index: int) -> None:
        self._empty(self._prefixes[index])

    def load_outer(self, device: torch.device, unused: bool = False) -> None:
        """Everything outside the blocks that is used: embeddings, final norm, head. unused: all the rest too."""
        left_out = set() if unused else set(self.unused_keys)
        names = self._outer_parameters(unused)
        self._fill([key for key in self._outer if key not in left_out])
        for name in names:
            if name in self.tied:
                continue
            module, leaf = self._place(name)
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.to(device), requires_grad=False)
        for target, source in self.tied.items():
            module, leaf = self._place(target)
            module._parameters[leaf] = self.skeleton.get_parameter(source)
        for path in {name.rpartition(".")[0] for name in names}:
            self._initialise(path)

    def _initialise(self, path: str) -> None:
        """What transformers does to a loaded embedding: its class initialises it, but for tensors marked as loaded. Some classes write to the
        padding row all the same, whatever the checkpoint has there.
        """
        module = self.skeleton.get_submodule(path)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            with guard_torch_init_functions(), torch.no_grad():
                self.skeleton._init_weights(module)

    def free_outer(self) -> None:
        for name in self._outer_parameters(unused=True):
            module, leaf = self._place(name)
            if leaf in module._parameters:
                module._parameters[leaf] = self._meta[id(module), leaf]

    def _outer_parameters(self, unused: bool) -> list[str]:
        base = self._prefixes[0].removesuffix("0.")
        return [name for name in self.empty if not name.startswith(base) and (unused or not self._is_unused(name))]

    def _is_unused(self, parameter: str) -> bool:
        return parameter != self._first and any(parameter == path or parameter.startswith(f"{path}.") for path in self._unused)

    @property
    def not_weights(self) -> set[str]:
        """The checkpoint's tensors that fill buffers (bounds, tables), or that the model has no place for."""
        weights = {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        return {key for key in self.source.tensors if self.parameter_of.get(key) not in weights}

    @property
    def unused_keys(self) -> list[str]:
        """The checkpoint's tensors of the parts outside the blocks that stay empty."""
        return sorted((key for key in self._outer if self._is_unused(self.parameter_of[key])), key=natural)

    @property
    def outer_keys(self) -> list[str]:
        """The checkpoint's tensors outside the blocks."""
        return sorted(self._outer, key=natural)

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which the checkpoint holds a parameter."""
        return DTYPES[self.source.tensors[self.keys_of[parameter][0]].dtype]

    def stored_rows(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """As names.stored_rows, of the parameters that this checkpoint stores so."""
        converted = {name: value for name, value in numbers.items() if not self.converted.isdisjoint(self.keys_of.get(name, ()))}
        found = stored_rows(self.skeleton, converted)
        return found if found.keys() <= self.parameter_of.keys() else {}

    def checkpoint_tensors(self, parameters: Iterable[str]) -> dict[str, Tensor]:
        """These parameters of the skeleton as checkpoint tensors, in the stored dtype. The parameters' values must fit it exactly.

        Raises ConversionError when transformers' conversion does not lead back to the names in the checkpoint.
        """
        plain: dict[str, Tensor] = {}
        merged: dict[str, Tensor] = {}
        for name in parameters:
            keys = self.keys_of[name]
            tensor = self.skeleton.get_parameter(name).detach()
            if self.converted.isdisjoint(keys):
                plain[keys[0]] = tensor
            else:
                beside = [other for key in keys for other in self._filled.get(key, ())]  # what a tensor is split into is joined as a whole
                merged |= {other: self.skeleton.get_parameter(other).detach() for other in [name, *beside]}
        if merged:
            back = revert(self.skeleton, merged)
            expected = {key for name in merged for key in self.keys_of[name]}
            if set(back) != expected:
                odd = sorted(set(back) ^ expected)[0]
                raise ConversionError(f"{odd}: the conversion back to the checkpoint's names does not match", "report this architecture")
            plain |= back
        return {k: t.to("cpu", DTYPES[self.source.tensors[k].dtype]).contiguous() for k, t in plain.items()}

    def _fill(self, keys: list[str], dense: bool = False) -> None:
        tensors = self.source.read_many(keys) if dense else self._read(keys)
        for key in keys:
            if key not in self.converted:
                self._set(self.parameter_of[key], tensors.pop(key))
        if tensors:
            dtype = next(p.dtype for p in self.empty.values() if p.is_floating_point())
            convert(self.skeleton, tensors, dtype)
            for name in {self.parameter_of[k] for k in tensors}:
                self._check_back(name, tensors)

    def _check_back(self, name: str, tensors: dict[str, Tensor]) -> None:
        for key, tensor in self.checkpoint_tensors([name]).items():
            if not torch.equal(tensor, tensors[key]):
                raise ConversionError(f"{key}: does not survive transformers' conversion and back", "report this architecture")

    def _read(self, keys: list[str]) -> dict[str, Tensor]:
        finished = [k for k in keys if self.sink is not None and k in self.sink.written]
        rest = [k for k in keys if k not in set(finished)]
        read = self.source.read_many(rest)
        return read | (self.sink.read_many(finished) if self.sink else {})

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.skeleton.get_submodule(path), leaf

    def _set(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._place(name)
        dtype = self.empty[name].dtype
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        else:
            module._buffers[leaf] = tensor.to(dtype)

    def _empty(self, prefix: str) -> None:
        block = self.skeleton.get_submodule(prefix.removesuffix("."))
        for module in block.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = self._meta[id(module), leaf]


def listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
