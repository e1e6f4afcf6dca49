"""The fields of a recipe as keyword arguments of ``llmprune.prune``: their types, for editors and type checkers, and values as a recipe has them."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar

from llmprune.methods import check_name
from llmprune.recipe.flags import Flag
from llmprune.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

Name: TypeAlias = str | PathLike[str]
Called = TypeVar("Called", bound=Callable[..., Any])
JOINED = ("skip", "only")  # regular expressions: a list of them is one that matches any
LISTED = ("eval",)  # one or several


class PruneOptions(TypedDict, total=False):
    """Every field of ``llmprune.recipe.recipe.Recipe`` that is no parameter of ``prune`` by itself."""

    revision: str
    target_params: int | str
    target_size: int | str
    target_latency_ratio: float
    max_ppl_increase: float | str
    rounds: int
    schedule: Literal["cubic", "linear"]
    recover_steps: int
    recover_data: Name
    rewind: Name
    round_to: int
    uniform: bool
    exact: bool
    rotate: bool
    pad: bool
    quality: str
    method: str
    criterion: str | Callable[..., Any]
    solver: str | type[Any]
    target: Literal["symmetric", "asymmetric"]
    polish: Literal["kd", "none"]
    polish_steps: int
    permute: bool
    group: Literal["row", "matrix"]
    allocation: str
    ratios: dict[str, float]
    options: dict[str, float | int | str | bool]
    column: str
    split: str
    bos: bool
    samples: int
    sequence_length: int
    shuffle: bool
    seed: int
    device: str | torch.device
    dtype: str | torch.dtype
    skip: str | Sequence[str]
    only: str | Sequence[str]
    eval: Any
    eval_samples: int | Literal["all"]
    write_sample: bool
    accept_damage: bool
    output: Name
    push: str


def plain(name: str, value: Any) -> Any:
    """A caller's value as a recipe has it: paths, dtypes and devices as text, NumPy's and torch's numbers as Python's, regular expressions joined."""
    if name in JOINED and isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return "|".join(f"(?:{one})" for one in value)
    if name in LISTED and isinstance(value, str | PathLike):
        return [fspath(value)]
    if isinstance(value, list | tuple):
        return [plain("", one) for one in value]
    if isinstance(value, PathLike):
        return fspath(value)
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if kind in ("torch.dtype", "torch.device"):
        return str(value).removeprefix("torch.")
    number = kind.startswith("numpy.") or kind == "torch.Tensor"
    return value.item() if number and value.ndim == 0 else value


def recipe_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Raises RequestError for an unknown option, with the nearest known one."""
    for name in options:
        check_name("option", name, list(Recipe.model_fields))
    return {name: plain(name, value) for name, value in options.items()}


def documented(types: type[Any], defaults: Mapping[str, Any], texts: Mapping[str, str]) -> Callable[[Called], Called]:
    """Gives a function of **options a signature and a docstring with each of them. types: a TypedDict."""

    def with_options(function: Called) -> Called:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind.__forward_arg__)
            for name, kind in types.__annotations__.items()
        ]
        function.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        lines = [textwrap.fill(f"{name}: {texts[name]}", 140, initial_indent="    ", subsequent_indent="        ") for name in types.__annotations__]
        function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\nOptions:\n" + "\n".join(lines)
        return function

    return with_options


def of_recipe() -> tuple[dict[str, Any], dict[str, str]]:
    """(default, description) of each field."""
    defaults, texts = {}, {}
    for name, field in Recipe.model_fields.items():
        flag = next(said for said in field.metadata if isinstance(said, Flag))
        defaults[name] = None if field.is_required() else field.get_default(call_default_factory=True)
        texts[name] = f"{field.description}{f' [default: {flag.default}]' if flag.default else ''}"
    return defaults, texts
