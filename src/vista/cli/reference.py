"""docs/cli.md, made from the commands themselves: ``python -m vista.cli.reference > docs/cli.md``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import EnumType
from typing import Any, Literal, get_args, get_origin

import typer

from vista.cli.main import app

HEADER = """# Command line

Made from the commands by `python -m vista.cli.reference > docs/cli.md`; a test compares the two. Do not edit by hand.
"""

TYPE_NAMES = {"int": "INTEGER", "integer": "INTEGER", "float": "FLOAT", "Path": "PATH", "path": "PATH"}


def reference() -> str:
    """The reference of all commands as Markdown."""
    root = typer.main.get_command(app)
    return "\n".join([HEADER, *(_section(path, command) for path, command in commands(root, "vista"))])


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The command at ``path`` and all below it that are not hidden, in the order of registration."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from commands(child, f"{path} {name}")


def _section(path: str, command: Any) -> str:
    params = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = [p for p in params if p.param_type_name == "argument"]
    options = [p for p in params if p.param_type_name == "option"]
    usage = [path, *(_argument_usage(p) for p in arguments), "[OPTIONS]" if options else ""]
    if hasattr(command, "commands"):
        usage.append("COMMAND ...")
    lines = [f"## {path}", "", "```text", " ".join(filter(None, usage)), "```", "", _text(command.help)]
    if hasattr(command, "commands"):
        lines += ["", "| command | |", "|---|---|"]
        lines += [f"| {name} | {_summary(child)} |" for name, child in command.commands.items() if not child.hidden]
    if params:
        lines += ["", "| argument or option | default | |", "|---|---|---|"]
        lines += [f"| {_names(p)} | {_default(p)} | {_help(p)} |" for p in arguments + options]
    return "\n".join(lines) + "\n"


def _argument_usage(param: Any) -> str:
    name = _argument_name(param) + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _argument_name(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _names(param: Any) -> str:
    """``--out PATH``, ``--json``, ``--raw / --no-raw``, or the name of an argument."""
    if param.param_type_name == "argument":
        return f"`{_argument_name(param)}`"
    names = [", ".join(param.opts)]
    if param.secondary_opts:
        names.append(", ".join(param.secondary_opts))
    return f"`{' / '.join(names)}{'' if param.is_flag else ' ' + _value(param)}`"


def _value(param: Any) -> str:
    """What stands for the value of an option: its metavar, its choices, or its type."""
    if param.metavar:
        return str(param.metavar)
    choices = _choices(param)
    return "{" + ",".join(choices) + "}" if choices else TYPE_NAMES.get(_type(param), "TEXT")


def _type(param: Any) -> str:
    """Name of the type of a parameter's value. Typer keeps it in one of two places, depending on its version."""
    if hasattr(param, "type_descriptor"):
        return str(getattr(_annotation(param), "__name__", ""))
    return str(param.type.name)


def _choices(param: Any) -> list[str]:
    if not hasattr(param, "type_descriptor"):
        choices = getattr(param.type, "choices", ())
    elif isinstance(annotation := _annotation(param), EnumType):
        choices = tuple(annotation)
    else:
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return [str(getattr(choice, "value", choice)) for choice in choices]


def _annotation(param: Any) -> Any:
    """The Python type of one value: of ``list[int]`` it is int."""
    annotation = param.type_descriptor.annotation
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation


def _default(param: Any) -> str:
    """The value that holds when the option is not given, empty where that is nothing or off."""
    if param.required:
        return "required"
    value = getattr(param.default, "value", param.default)
    return "" if value is None or value is False or value == () or callable(value) else f"`{value}`"


def _help(param: Any) -> str:
    text = _cell(getattr(param, "help", None))
    notes = [f"environment: `{param.envvar}`"] if param.envvar else []
    if getattr(param, "multiple", False) and "repeat" not in text:
        notes.append("may be repeated")
    return text + (f" ({'; '.join(notes)})" if notes else "")


def _summary(command: Any) -> str:
    return _cell(_text(command.help).split("\n\n")[0])


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _text(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("\b", "").strip()


if __name__ == "__main__":
    print(reference(), end="")
