"""Command-line options from a configuration's own source: one an annotated field, its comment the help."""

import argparse
import dataclasses
import inspect
import math
import re
from typing import Literal, get_args, get_origin


def fields_with_groups(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (group, help)}: the comment line `# group: name` above it, and the comment behind it."""
    found, group = {}, "options"
    for part in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        for line in inspect.getsource(part).splitlines():
            if heading := re.match(r"    # group: (.+)$", line):
                group = heading[1]
            elif field := re.match(r"    (\w+): [^#\n]+(?:#\s*(.+))?$", line):
                found[field[1]] = (group, field[2] or "")
    return found


def option_help(cls: type) -> dict[str, str]:
    """Help of every field: the comment behind it."""
    return {name: text for name, (_, text) in fields_with_groups(cls).items()}


def add_options(parser: argparse.ArgumentParser, cls: type, base=None) -> None:
    """One option for every field of a configuration but those of the group "no option".

    base: a configuration whose values --help shows as the defaults. Literal fields take only their choices.
    """
    base, groups = base or cls(), {}
    described = fields_with_groups(cls)
    for field in dataclasses.fields(cls):
        group, text = described[field.name]
        if group == "no option":
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        add = groups[group].add_argument
        flag, value = f"--{field.name.replace('_', '-')}", getattr(base, field.name)
        shown = ("off", "on")[value] if type(value) is bool else "none" if value is None else value
        text = f"{text.replace('%', '%%')} (default: {shown})"
        kind = str if field.type == str | None else field.type
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            add(flag, type=type(choices[0]), choices=choices, help=text)
        elif kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            add(flag, type=kind, metavar={int: "N", float: "X"}.get(kind, "TEXT"), help=text)


def check_ranges(cfg, ranges: dict[str, tuple[float, float]]) -> None:
    """ValueError, in one line, for the first field that lies outside its (low, high)."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(cfg, name) <= high:
            allowed = f"at least {low}" if low else "not negative"
            if high < math.inf:
                allowed = f"from {low:g} to {high:g}"
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {allowed}")
