"""What the README names exists: files, functions, tests, options."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def test_every_function_of_the_equation_map_exists():
    named = re.findall(r"`(\w+\.py):([\w.]+)`", README)
    assert len(named) > 12
    for file, name in named:
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", (ROOT / file).read_text()), f"{file}:{name}"


def test_every_test_it_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 12
    for name in named:
        assert f"def {name}(" in TESTS, name


def test_every_option_of_its_commands_is_known():
    from finetune import FinetuneConfig
    from label import LabelConfig
    from train import Config

    fields = Config.__dataclass_fields__.keys() | LabelConfig.__dataclass_fields__.keys()
    fields |= FinetuneConfig.__dataclass_fields__.keys()
    options = {f"--{name.replace('_', '-')}" for name in fields}
    options |= {"--preset", "--resume", "--help"}
    options |= {f"--no-{name[2:]}" for name in options}
    for path in ("evaluate.py", "pixel_stage.py", "tests/benchmark.py"):
        options |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / path).read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    named -= {"--nproc_per_node", "--benchmark", "--pretrained", "--load"}  # of other programs
    assert named <= options, named - options


def test_line_counts_and_files_are_the_trees_own():
    for file, count in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE):
        lines = len((ROOT / file).read_text().splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, f"{file} has {lines} lines, the README says {count}"
    for picture in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 300_000
