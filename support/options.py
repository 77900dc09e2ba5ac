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
            choices, name = get_args(kind), None
            if len(str(choices)) > 99:  # too many for one line
                name, text = "NAME", f"{', '.join(choices)}; {text}"
            add(flag, type=type(choices[0]), choices=choices, metavar=name, help=text)
        elif kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            named = {"folder": "DIR", "file": "FILE", "checkpoint": "FILE"}
            word = next((named[key] for key in named if kind is str and key in text), "TEXT")
            add(flag, type=kind, metavar={int: "N", float: "X"}.get(kind, word), help=text)


ABOVE_0 = (5e-324, math.inf)  # ranges for check_ranges: the least number there is
NOT_NEGATIVE = (0, math.inf)
AT_LEAST_1 = (1, math.inf)
SEEDS = (0, 2**63 - 1)
SHARE = (0, 1)


def check_ranges(cfg, ranges: dict[str, tuple[float, float]]) -> None:
    """ValueError, in one line, for the first number outside its (low, high), infinite or nan.

    One without a range of its own must not be negative.
    """
    for field in dataclasses.fields(cfg):
        if field.type not in (int, float):
            continue
        value, (low, high) = getattr(cfg, field.name), ranges.get(field.name, NOT_NEGATIVE)
        if not (low <= value <= high and value < math.inf):
            allowed = {ABOVE_0: "above 0", NOT_NEGATIVE: "not negative"}.get((low, high), f"at least {low}")
            if high < math.inf:
                allowed = f"from {low} to {high}"
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: {allowed}")
