"""What the README and the pages of docs/ name exists: files, functions, tests, options, pictures, links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
OTHER_PROGRAMS = {
    "--nproc_per_node",
    "--nnodes",
    "--standalone",
    "--benchmark",
    "--pretrained",
    "--load",
    "--upgrade",
}


def known_options() -> set[str]:
    from experiments.finetune import FinetuneConfig
    from label import LabelConfig
    from support.options import fields_with_groups
    from train import Config

    options = {"--preset", "--resume", "--help", "--no-dense"}
    for cls in (Config, LabelConfig, FinetuneConfig):
        for name, (group, _) in fields_with_groups(cls).items():
            if group != "no option":
                options |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    for file in ("evaluate.py", "support/match.py", "experiments/peers.py", "experiments/headline.py",
                 "tests/benchmark.py", "tests/gpu.py"):  # fmt: skip
        options |= set(re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', (ROOT / file).read_text()))
    return options


def test_the_equation_map_names_what_exists():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGES["README.md"])
    assert len(named) > 12 and len(set(re.findall(r"`(test_\w+)`", PAGES["README.md"]))) > 12


@pytest.mark.parametrize("page", PAGES)
def test_every_pointer_of_a_page_leads_somewhere(page):
    text = PAGES[page]
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        for part in name.split("."):
            found = re.search(rf"((def|class) {part}\b|^{part}\b)", (ROOT / file).read_text(), re.MULTILINE)
            assert found, f"{file}:{name}"
    for file in re.findall(r"`((?:support/|experiments/|tests/|docs/)?\w+\.(?:py|csv|md|jpg))`", text):
        assert (ROOT / file).exists(), file
    for test in set(re.findall(r"`(test_\w+)`", text)):
        assert f"def {test}(" in TESTS, test
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link
    for heading in re.findall(r"\]\(#([^)]+)\)", text):
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, heading


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_page_is_known(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGES[page])) - OTHER_PROGRAMS
    assert named <= known_options(), named - known_options()


def test_the_readme_is_one_page_and_leads_to_every_other():
    assert len(PAGES["README.md"].splitlines()) <= 200
    for page in PAGES:
        assert page == "README.md" or f"({page})" in PAGES["README.md"], page
    for picture in ROOT.glob("docs/*.jpg"):
        assert picture.stat().st_size < 300_000 and any(
            f"{picture.name})" in text for text in PAGES.values()
        ), picture


def test_it_names_the_eight_files_in_reading_order():
    eight = ("modules", "image_stage", "region_stage", "pixel_stage", "data", "train", "label", "evaluate")
    rows = re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", PAGES["README.md"], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(eight) and rows[0][0] == "modules"
    for name, count in rows:
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert abs(lines - int(count)) <= 0.05 * lines, f"{name}.py has {lines} lines"
