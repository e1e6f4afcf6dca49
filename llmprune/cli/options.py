"""Options of a command from the fields of ``Recipe``: flag, type, default, text and panel are read off each field."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, Optional, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperCommand
from typer.models import ParameterInfo

from llmprune.cli.console import Count, Text
from llmprune.errors import RequestError
from llmprune.recipe.flags import PANELS, Flag
from llmprune.recipe.recipe import Recipe

Command = Callable[..., None]
ARGUMENTS = "Arguments"
Several = Optional[list[str]]
Switch = Optional[bool]  # on, off, or as it is by default


def takes_recipe(names: Iterable[str]) -> Callable[[Command], Command]:
    """Gives a command options for these fields of ``Recipe``. Its first parameter receives the given values, by field."""
    fields = {name: Recipe.model_fields[name] for name in names}

    def with_options(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def called(**values: Any) -> None:
            given = given_values({name: values.pop(name) for name in fields})
            command(given, **values)

        options = [_option(name, field) for name, field in fields.items()]
        options += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        called.__signature__ = inspect.Signature(sorted(options, key=_panel))  # type: ignore[attr-defined]
        return called

    return with_options


def given_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that were given on the command line, from the values of all options. Raises RequestError for an entry without a value."""
    given = {name: value for name, value in values.items() if value not in (None, [], ()) and (value is not False or _kind_of(name) is Switch)}
    tables = [name for name in given if _is_table(Recipe.model_fields[name])]
    return given | {name: _table(name, given[name]) for name in tables}


def _kind_of(name: str) -> Any:
    return _kind(Recipe.model_fields[name])


def flag_of(name: str) -> Flag:
    """The flag of a field."""
    return next(said for said in Recipe.model_fields[name].metadata if isinstance(said, Flag))


class Panels(TyperCommand):
    """A command whose help has its options by panels, in plain text; what it does not take is refused with a hint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True  # they are refused here
        left = super().parse_args(ctx, args)
        if left and not ctx.resilient_parsing:
            wants = ctx.params.get("model", "") is None
            hint = f"write --model {left[0]}" if wants else f"see {ctx.command_path} --help"
            raise RequestError(f"unexpected argument {left[0]!r}", hint)
        return left

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[Any]] = {name: [] for name in (ARGUMENTS, *PANELS)}
        for parameter in self.get_params(ctx):
            shown, words = parameter.get_help_record(ctx) or ("", "")
            if isinstance(parameter, TyperArgument):
                panels[ARGUMENTS].append((shown.split()[0], words))  # without the name of a Python type
            else:
                panels[getattr(parameter, "rich_help_panel", None) or PANELS[0]].append((shown, words))
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    flag, kind = flag_of(name), _kind(field)
    words = f"{field.description}; may be repeated" if kind is Several else field.description
    default = flag.default or ("" if kind is bool or field.is_required() else field.get_default(call_default_factory=True))
    shown = f"{words} [default: {default}]" if default not in (None, "", [], {}) else f"{words}"
    spelled = (flag.name or name).replace("_", "-")
    info = typer.Option(
        f"--{spelled}/--no-{spelled}" if kind is Switch else f"--{spelled}",
        help=shown,
        metavar=None if kind in (bool, Switch) else flag.value or ("INT" if kind is Count else "TEXT"),
        rich_help_panel=flag.panel,
    )
    unset = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=unset, annotation=Annotated[kind, info])


def _kind(field: FieldInfo) -> Any:
    """The type of an option: a number only where the field accepts no other spelling of it."""
    plain = [kind for kind in get_args(field.annotation) if kind is not type(None)] if get_origin(field.annotation) else []
    if field.annotation in (bool, Switch):
        return bool if field.annotation is bool else Switch
    if _is_table(field) or get_origin(field.annotation) is list:
        return Several
    return Count if field.annotation is int or plain == [int] else Text


def _is_table(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def _table(name: str, entries: list[str]) -> dict[str, Any]:
    """Of entries NAME=VALUE, whose values are read as TOML where they can be, as text otherwise. The last "=" counts: a pattern may have some."""
    table: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.rpartition("=")
        if not (key and equals and value):
            flag = flag_of(name)
            raise RequestError(f"--{flag.name} {entry!r}", f"write --{flag.name} {flag.value}")
        try:
            table[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = value
    return table


def _panel(parameter: inspect.Parameter) -> int:
    info = next(said for said in get_args(parameter.annotation) if isinstance(said, ParameterInfo))
    return PANELS.index(info.rich_help_panel or PANELS[0])
