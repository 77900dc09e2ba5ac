"""The layout holds: which file may import which, how large files and functions are, and what every file says
first."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # lines of code at most: without blank lines, comments and docstrings
    "modules.py": 340,
    "image_stage.py": 95,
    "region_stage.py": 80,
    "pixel_stage.py": 85,
    "data.py": 270,
    "train.py": 420,
    "label.py": 400,
    "evaluate.py": 270,
}
FILES = [
    *SIZES,
    *(str(p.relative_to(ROOT)) for room in ("support", "experiments") for p in (ROOT / room).glob("*.py")),
]
FILES = [name for name in FILES if not name.endswith("__init__.py")]
NAMES = {name.removesuffix(".py").replace("/", "."): name for name in FILES}
# support/ files that modules.py builds on
BELOW_MODULES = {"support.ours"}


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    found: set[int] = set()
    silent = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def imported(tree: ast.AST) -> set[str]:
    """Our own files that a piece of code imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & NAMES.keys()


def imports_of(name: str) -> tuple[set[str], set[str]]:
    """What a file imports when it is imported, and what only later: inside functions, or when it is run."""
    tree = ast.parse((ROOT / NAMES[name]).read_text())
    late = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late += [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    later = set().union(*(imported(node) for node in late))
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set().union(*(imported(node) for node in at_once)), later


def test_the_root_holds_the_eight_files_of_the_paper():
    assert {path.name for path in ROOT.glob("*.py")} == SIZES.keys()


def test_rooms_import_only_what_they_may():
    for name in NAMES:
        now, later = imports_of(name)
        room = name.split(".")[0]
        if room != "experiments":
            assert not any(other.startswith("experiments.") for other in now | later), name
        if room == "support":
            assert all(
                other in ("modules", "data") or other.startswith("support.") for other in now | later
            ), name
    assert imports_of("modules")[0] == BELOW_MODULES
    for name in BELOW_MODULES | {"data"}:
        assert imports_of(name) == (set(), set()), f"{name} imports something of ours"


def test_late_imports_are_the_two_doors():
    doors = {
        name: later
        for name in NAMES
        if not name.startswith("experiments.") and (later := imports_of(name)[1])
    }
    assert doors == {
        "image_stage": {"train"},
        "region_stage": {"train"},
        "pixel_stage": {"train", "evaluate", "support.match"},
        "train": {"evaluate"},  # PCK during training
    }


def test_no_file_is_part_of_an_import_circle():
    edges, done = {name: imports_of(name)[0] for name in NAMES}, set()
    while ready := {name for name, needs in edges.items() if name not in done and needs <= done}:
        done |= ready
    assert done == NAMES.keys(), f"a circle among {sorted(NAMES.keys() - done)}"


@pytest.mark.parametrize("name", FILES)
def test_sizes_lines_functions_and_first_sentences(name):
    source = (ROOT / name).read_text()
    tree, code = ast.parse(source), lines_of_code(source)
    assert len(code) <= SIZES.get(name, 400), f"{name} has {len(code)} lines of code"
    for number, line in enumerate(source.splitlines(), 1):
        assert len(line) <= 110, f"{name}:{number}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            limit = 90 if (name, node.name) == ("train.py", "train") else 60
            assert size <= limit, f"{name}:{node.name} has {size} lines of code"
    first = (ast.get_docstring(tree) or "").split("\n\n")[0]
    assert len(first) > 30, f"{name}: its first sentence states its purpose"


def test_options_stay_few():
    from evaluate import shared_options
    from experiments.finetune import FinetuneConfig
    from label import LabelConfig
    from support.options import fields_with_groups
    from train import Config

    def options(cls: type) -> int:
        described = fields_with_groups(cls)
        return sum(described[name][0] != "no option" for name in cls.__dataclass_fields__)

    assert options(Config) + 2 <= 48  # and --preset, --resume
    assert options(LabelConfig) <= 21
    assert options(FinetuneConfig) + 2 <= 32
    parser = shared_options("")
    assert (
        sum(len(action.option_strings) > 0 for action in parser._actions) - 1 + 2 <= 20
    )  # --visualize, --out
