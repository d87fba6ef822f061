"""Argument dataclass -> command: tokens, environment, YAML and the tables in docs, from one field per option.

Typer shows the help, dispatches and completes. The values never pass through it: reading them here lets every mistake
be reported the same way, whichever of the three places it was made in, and costs no import.
"""

import inspect
import json
import os
import re
import shlex
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from mmtool.errors import MMToolError
from mmtool.other_names import hint_for_option
from mmtool.utils import did_you_mean

ENV_PREFIX = "MMTOOL_"
HELP_NAMES = {"help_option_names": ["--help", "-h"]}
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

_OPTION_TOKEN = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)  # "-1", "-" and "- a b" are values


def opt(default: Any, help: str, **more: Any) -> Any:
    """Declare an option: a dataclass field with its help text.

    Args:
        default: the value when it is set nowhere; a list or dict is copied.
        help: one sentence for ``--help`` and the docs.
        more: ``metavar`` (what --help shows for the value), ``aliases`` (other names, not shown), ``positional``,
            ``same`` (other words for a choice, not shown).
    """
    metadata = {"help": help, **more}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """A field made by ``opt``: ``type`` without None, ``group`` the attribute it lives in (None: the command's own)."""

    name: str
    group: str | None
    title: str
    type: Any
    optional: bool
    default: Any
    help: str
    metavar: str
    aliases: tuple[str, ...] = ()
    positional: bool = False
    same: Mapping[str, str] = field(default_factory=dict)

    @property
    def repeated(self) -> bool:
        """Whether it takes a list."""
        return get_origin(self.type) is list

    @property
    def default_text(self) -> str | None:
        """The default as one would type it, or None where there is nothing to show."""
        if self.default is None or self.default in ([], {}):
            return None
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    def convert(self, value: Any, where: str) -> Any:
        """Return ``value`` (text, or what YAML made of it) in the type of the option; ``where`` names its source."""
        if not self.repeated:
            value = self.same.get(value.lower(), value) if isinstance(value, str) else value
            return _convert(value, self.type, where, self.help)
        items = value if isinstance(value, list) else [value]
        return [_convert(item, get_args(self.type)[0], where, self.help) for item in items]


def options_of(cls: type) -> tuple[Option, ...]:
    """Return the options of an argument class: its groups as written, inherited groups, then its own."""
    grouped, own = [], []
    hints = get_type_hints(cls)
    inherited = [f for f in fields(cls) if f.name not in cls.__annotations__]
    for f in [f for f in fields(cls) if f not in inherited] + inherited:
        if is_dataclass(hints[f.name]):
            group_hints = get_type_hints(hints[f.name])
            grouped += [_option(g, group_hints[g.name], f.name, hints[f.name]) for g in fields(hints[f.name])]
        elif "help" in f.metadata:
            own.append(_option(f, hints[f.name], None, cls))
    return (*grouped, *own)


def _option(f: Any, hint: Any, group: str | None, owner: type) -> Option:
    members = [tp for tp in _members(hint) if tp is not types.NoneType]
    tp = members[0] if len(members) == 1 else Union[tuple(members)]  # noqa: UP007 - the members are known at run time only
    more = dict(f.metadata)
    metavar = more.pop("metavar", None) or _metavar(tp)
    default = f.default_factory() if f.default is MISSING else f.default
    optional = len(members) < len(_members(hint))
    title = (owner.__doc__ or owner.__name__).partition("\n")[0]
    return Option(f.name, group, title, tp, optional, default, metavar=metavar, **more)


def _members(tp: Any) -> tuple[Any, ...]:
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def _metavar(tp: Any) -> str:
    if get_origin(tp) is list:
        return _metavar(get_args(tp)[0]) + " ..."
    if get_origin(tp) is Literal:
        return "|".join(get_args(tp))
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}.get(tp, "JSON")


# Values ---------------------------------------------------------------------------------------------------------------

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a JSON object"}


def _convert(value: Any, tp: Any, where: str, help: str) -> Any:
    if get_origin(tp) is Literal:
        return _choice(value, get_args(tp), where)
    kinds = [get_origin(member) or member for member in _members(tp)]
    for kind in kinds:
        if kind is dict and isinstance(value, str) and (len(kinds) == 1 or value.lstrip().startswith("{")):
            return _json_object(value, where)
    for kind in kinds:
        converted = _as(value, kind)
        if converted is not None:
            return converted
    expected = " or ".join(_EXPECTED[kind] for kind in kinds)
    hint = "Put the value in quotes." if str in kinds and isinstance(value, int | float) else help
    raise MMToolError(f"{where} must be {expected}, not {_shown(value)}", hint)


def _as(value: Any, kind: type) -> Any:
    """Return ``value`` as ``kind``, or None where it is not one."""
    if isinstance(value, bool) or kind in (bool, str, dict):
        if kind is bool and isinstance(value, str) and value.lower() in TRUE + FALSE:
            return value.lower() in TRUE
        return value if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) else None
    if not isinstance(value, int if kind is int else int | float) and not isinstance(value, str):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def _choice(value: Any, choices: tuple[str, ...], where: str) -> str:
    text = str(value) if isinstance(value, bool | int) else value  # YAML reads true and 4 as other types
    for choice in choices:
        if isinstance(text, str) and text.lower() == choice.lower():
            return choice
    listed = ", ".join(choices)
    hint = did_you_mean(str(value), choices, f"Choose from {listed}.")
    raise MMToolError(f"{where} must be one of {listed}, not {_shown(value)}", hint)


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise MMToolError(
            f"{where} is not valid JSON: {error.msg} at character {error.pos + 1} of {text!r}",
            """Write an object in single quotes, such as '{"key": 1}'.""",
        ) from error
    if not isinstance(value, dict):
        raise MMToolError(f"{where} must be a JSON object, not {text!r}", """Write it as '{"key": 1}'.""")
    return value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


# Command line, environment, YAML --------------------------------------------------------------------------------------


def read_tokens(
    options: Sequence[Option], tokens: Sequence[str], command: str, others: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return the texts given on the command line by option name; a list of texts for repeated options.

    ``others`` are the argument classes of other commands by name; an option of theirs is told so.
    """
    by_name = {name: option for option in options for name in (option.name, *option.aliases) if not option.positional}
    places = deque(option for option in options if option.positional)
    queue, given, last, options_ended = deque(tokens), {}, None, False
    unknown: dict[str, str] = {}  # all of them, so that a script of another tool is corrected in one go
    while queue:
        token = queue.popleft()
        if token == "--":
            options_ended = True
            continue
        if options_ended or not _OPTION_TOKEN.fullmatch(token):
            if not places:
                listed = f"Options are written --name value; `{command} --help` lists them."
                hint = f"Did you mean --{token} VALUE?" if token in by_name else listed
                raise MMToolError(f"unexpected argument {token!r}", hint)
            given[places.popleft().name] = token
            continue
        word, equals, text = token.partition("=")
        name = word[2:].replace("-", "_") if word.startswith("--") else ""
        option = by_name.get(name)
        switch = by_name.get(name.removeprefix("no_")) if option is None and not equals else None
        if switch is not None and switch.type is bool:
            given[switch.name], last = "false", switch
            continue
        if option is None:
            otherwise = f"For a value that begins with a dash write --{last.name}={token}." if last else None
            unknown[word] = _hint_for(
                word, by_name, others or {}, otherwise or f"`{command} --help` lists the options."
            )
            while queue and not _OPTION_TOKEN.fullmatch(queue[0]):
                queue.popleft()
            continue
        texts = [text] if equals else []
        texts += _values(option, queue, bool(texts), bool(places))
        given[option.name] = given.get(option.name, []) + texts if option.repeated else texts[0]
        last = option
    if unknown:
        word, hint = next(iter(unknown.items()))
        if len(unknown) == 1:
            raise MMToolError(f"unknown option {word}", hint)
        hints = [f"{word}: {hint.rstrip('.')}" for word, hint in unknown.items()]
        raise MMToolError(f"unknown options {', '.join(unknown)}", "; ".join(hints))
    return given


def _hint_for(word: str, by_name: Iterable[str], others: Mapping[str, type], otherwise: str) -> str:
    """Return what to do about an option (or YAML key, which has no dashes) that a command does not have."""
    dashes, name = ("--" if word.startswith("-") else ""), word.lstrip("-").replace("-", "_")
    elsewhere = hint_for_option(name)
    if elsewhere:
        return elsewhere
    owners = [
        command
        for command, cls in others.items()
        if any(name in (option.name, *option.aliases) for option in options_of(cls))
    ]
    if owners:
        return f"It is an option of mmtool {' and '.join(owners)}."
    return did_you_mean(word, [f"{dashes}{known}" for known in by_name], otherwise) or otherwise


def _values(option: Option, queue: deque[str], attached: bool, places: bool) -> list[str]:
    """Take the values of ``option`` from the queue; one may already be ``attached`` with an equals sign."""
    taken = []
    while queue and not _OPTION_TOKEN.fullmatch(queue[0]) and queue[0] != "--":
        if option.type is bool and places and queue[0].lower() not in TRUE + FALSE:
            break
        if not option.repeated and (attached or taken):
            break
        taken.append(queue.popleft())
    if taken or attached:
        return taken
    if option.type is bool:
        return ["true"]
    hint = f"For a value that begins with a dash write --{option.name}={queue[0]}." if queue else option.help
    raise MMToolError(f"--{option.name} needs a value: {option.metavar}", hint)


def read_environment(options: Sequence[Option]) -> dict[str, Any]:
    """Return the values of ``MMTOOL_<NAME>`` variables; empty ones count as unset, lists are split as a shell does."""
    values = {}
    for option in options:
        variable = ENV_PREFIX + option.name.upper()
        text = os.environ.get(variable)
        if not text or option.positional:
            continue
        try:
            value = shlex.split(text) if option.repeated else text
        except ValueError as error:
            raise MMToolError(f"{variable}={text!r} cannot be split: {error}", "Quote it as in a shell.") from error
        values[option.name] = option.convert(value, variable)
    return values


def read_config(options: Sequence[Option], path: Path, others: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Return the values of a YAML file whose keys are option names (either spelling), not nested by group."""
    by_name = {name: option for option in options for name in (option.name, *option.aliases) if not option.positional}
    groups = {option.group for option in options}
    values = {}
    for key, value in _load_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            otherwise = "Keys are option names without dashes; `--help` lists them."
            if name in groups:
                otherwise = "Options are not nested in groups: move its keys to the top level."
            near = _hint_for(name, by_name, others or {}, otherwise) if isinstance(key, str) else otherwise
            raise MMToolError(f"unknown key {str(key)!r} in {path}", near)
        option = by_name[name]
        where = f"key {key!r} in {path}"
        if value is None and not option.optional:
            raise MMToolError(f"{where} has no value", option.help)
        if value is not None:
            values[option.name] = option.convert(value, where)
    return values


def _load_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise MMToolError(f"cannot read --config {path}: {reason}", "Give a YAML file.") from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise MMToolError(f"{path} is not valid YAML: {text}", "Write one `option: value` per line.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MMToolError(f"{path} holds no keys but {_shown(content)[:60]}", "Write one `option: value` per line.")
    return content


_CONFIG = Option("config", None, "Options", str, True, None, "YAML file with more options, `name: value`.", "FILE")


def read_args(cls: type, tokens: Sequence[str], command: str, others: Mapping[str, type] | None = None) -> Any:
    """Return an instance of ``cls`` from tokens, environment, ``--config`` and defaults, the first one winning."""
    options = options_of(cls)
    texts = read_tokens((_CONFIG, *options), tokens, command, others)
    environment = read_environment((_CONFIG, *options))
    config = texts.pop("config", None) or environment.pop("config", None)
    by_name = {option.name: option for option in options}
    values = read_config(options, Path(config).expanduser(), others) if config else {}
    values |= environment
    values |= {name: by_name[name].convert(text, _where(by_name[name])) for name, text in texts.items()}
    hints = get_type_hints(cls)
    groups = {option.group for option in options if option.group}
    own: dict[str, Any] = {
        group: hints[group](**{name: value for name, value in values.items() if by_name[name].group == group})
        for group in groups
    }
    own |= {name: value for name, value in values.items() if by_name[name].group is None}
    return cls(**own, explicit=frozenset(values))


def _where(option: Option) -> str:
    return option.name.upper() if option.positional else f"--{option.name}"


# Typer ----------------------------------------------------------------------------------------------------------------


def command(app: typer.Typer) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function of one argument class as a command of its name (`list_`: list), its docstring as help."""

    def register(body: Callable[[Any], None]) -> Callable[[Any], None]:
        cls = get_type_hints(body)["args"]
        help_only = _with_signature(options_of(cls), body)
        app.command(body.__name__.rstrip("_"), cls=_command_class(cls, body), context_settings=HELP_NAMES)(help_only)
        return body

    return register


def _command_class(cls: type, body: Callable[[Any], None]) -> type[TyperCommand]:
    class Command(TyperCommand):
        args_class = cls

        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
            if ctx.resilient_parsing or not set(HELP_NAMES["help_option_names"]).isdisjoint(args):
                return super().parse_args(ctx, ["--help"])
            siblings = getattr(ctx.parent.command, "commands", {}) if ctx.parent else {}
            others = {name: other.args_class for name, other in siblings.items() if other is not self}
            ctx.obj = read_args(cls, args, ctx.command_path, others)
            return []

        def invoke(self, ctx: typer.Context) -> None:
            body(ctx.obj)

    return Command


def _with_signature(options: Sequence[Option], body: Callable[[Any], None]) -> Callable[..., None]:
    """Return a function that has the options as parameters, for Typer to read; it is never called."""

    def never() -> None:
        raise AssertionError("Command.invoke calls the body")

    parameters = []
    for option in (*(o for o in options if o.positional), _CONFIG, *(o for o in options if not o.positional)):
        panel = None if option.positional or option is _CONFIG else option.title
        shown = {"help": option.help, "metavar": option.metavar, "rich_help_panel": panel, "show_default": True}
        info = typer.Argument(**shown) if option.positional else typer.Option(f"--{option.name}", **shown)
        tp = list[str] if option.repeated else str
        default = option.default_text if not option.repeated else []
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(option.name, kind, default=default, annotation=Annotated[tp, info]))
    never.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] - Typer reads both of these
    never.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    never.__doc__ = body.__doc__
    return never


# Docs -----------------------------------------------------------------------------------------------------------------


def markdown_table(cls: type) -> str:
    """Return the options of an argument class as Markdown, one table per group."""
    tables: dict[str, list[str]] = {}
    for option in options_of(cls):
        name = option.name if option.positional else f"--{option.name}"
        default = f"`{option.default_text}`" if option.default_text else ""
        cells = (f"`{name}`", f"`{option.metavar}`", default, option.help)
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(option.title, []).append(f"| {row} |")
    head = "| option | value | default | |\n|---|---|---|---|"
    return "\n\n".join(f"**{title}**\n\n{head}\n" + "\n".join(rows) for title, rows in tables.items())
