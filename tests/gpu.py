"""Check and time everything on one GPU: python tests/gpu.py [--out FILE.md]

One table: the GPU against the CPU on the same input, bfloat16 against float32, a run that is stopped and goes
on, and how long training, labelling and evaluation take at the paper's sizes (ViT-B/16, 512 px). Weights are
random, images the built-in shapes: nothing is needed beside this checkout. Four minutes on an H100, half of
them to compile; without a GPU the CPU's half alone, at smaller sizes, one minute. Exit code 1 if a check
fails or misses its goal.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import Noise  # noqa: E402

import label  # noqa: E402
import modules  # noqa: E402
from data import KeypointPair, KeypointSet  # noqa: E402
from evaluate import predict, score  # noqa: E402
from modules import Features, greedy_selection, hough_matching  # noqa: E402
from support.backbone import BACKBONES  # noqa: E402
from support.files import write_whole  # noqa: E402
from support.presets import PRESETS  # noqa: E402
from support.run import find_device  # noqa: E402
from support.shapes import Shapes, shapes_pairs  # noqa: E402
from train import STAGES, Cascade, Config, batches, build_optimizer  # noqa: E402

CPU, NOT_RUN, LABELS = torch.device("cpu"), "not run: no GPU", label.LabelConfig()
IMAGES, PAIRS, SPAIR = 379_000, 794_612, 12_234  # the paper's images and pairs of ImageNet; SPair-71k's test


class Sizes(NamedTuple):
    """How large the timed checks are."""

    preset: dict  # of train.Config
    batch: int  # couples of a training step
    cliques: tuple[int, int]  # images that loops, and pairs, are labelled in
    transfers: int  # couples that are read in bfloat16 too
    pairs: int  # evaluated couples, and the images that they are drawn from
    images: int
    side: int  # cells of the volumes that pairs are selected in
    steps: int  # of the run that is stopped
    repeats: int


PAPER = Sizes(PRESETS["paper"] | {"backbone": "random_vitb16"}, batch=4,
              cliques=(LABELS.clique_size, LABELS.pair_clique_size), transfers=40, pairs=600, images=100,
              side=32, steps=12, repeats=5)
SMALL = Sizes(PRESETS["quick"], batch=2, cliques=(6, 6), transfers=16, pairs=40, images=10,
              side=32, steps=6, repeats=2)


class Row(NamedTuple):
    """What a check found."""

    cpu: str
    gpu: str
    figure: str = ""
    ok: bool = True


def on(device: torch.device, text: str) -> tuple[str, str]:
    """The columns CPU and GPU of what runs on one of them."""
    return ("", text) if device.type == "cuda" else (text, NOT_RUN)


def milliseconds(work: Callable, device: torch.device, repeats: int) -> float:
    """Median time of several calls, after one that warms up; on a GPU by its own events."""
    times = []
    work()
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


@cache
def random_cascade(moved: float = 0.0, **preset) -> Cascade:
    """A cascade of a preset on the CPU, its weights drawn. moved: off the zeros that stages start with."""
    if preset["backbone"] not in BACKBONES:  # the paper's, of which nothing is downloaded
        BACKBONES[preset["backbone"]] = BACKBONES["ibot_vitb16"]._replace(url=None)
    torch.manual_seed(0)
    cascade = Cascade(Config(**preset | {"dataset": "shapes", "workers": 0}))
    with torch.no_grad():
        for p in cascade.parameters():
            p += moved * p.requires_grad * torch.randn(p.shape)
    return cascade.eval()


def placed(sizes: Sizes, device: torch.device, moved: float = 0.0) -> Cascade:
    """A copy of the cascade of these sizes on a device, for one check."""
    return copy.deepcopy(random_cascade(moved, **sizes.preset)).to(device)


def couples_of(cascade: Cascade, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """The first couples of shapes, as training has them: views and maps of sources, of targets; classes."""
    cfg = dataclasses.replace(cascade.cfg, batch=count)
    batch = next(batches(cfg, Shapes("train"), cascade.backbone.patch, 0, CPU))
    return *((batch[f"{end}_img"], batch[f"{end}_sal"]) for end in ("src", "trg")), batch["label"]


# ------------------------------------------------------------------------------------------------------------
# The same input on the CPU and on the GPU, in float32 without TF32


def compare(work: Callable, tolerance: float, sizes: Sizes, device: torch.device) -> Row:
    """work(device), a tensor, on both: the largest difference over the largest value that the CPU finds."""
    found, times = [], []
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for where in dict.fromkeys((CPU, device)):
            found.append(work(where).cpu().double())
            times.append(f"{milliseconds(partial(work, where), where, 1):.1f} ms")
    shape, finite = "x".join(map(str, found[0].shape)), bool(found[0].isfinite().all())
    if len(found) == 1:
        return Row(times[0], NOT_RUN, f"{shape}, {'all' if finite else 'not all'} finite", finite)
    off = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    wanted = f"at most {tolerance:g}" if tolerance else "exact"
    return Row(*times, f"{shape}, off by {off:.1e} ({wanted})", finite and off <= tolerance)


@cache
def oblong(device: torch.device) -> tuple[Cascade, Features, Features]:
    """A small cascade and the features of two couples: sources of 16x12 cells, targets of 12x16."""
    cascade = copy.deepcopy(random_cascade(0.02, **PRESETS["quick"] | {"amp": False})).to(device)
    (src, src_map), (trg, trg_map), _ = couples_of(cascade, 2)
    src = cascade.features(src[..., :96], src_map[..., :12])
    return cascade, src, cascade.features(trg[..., :96, :], trg_map[:, :12])


def whole_volume(stage: str, device: torch.device) -> Tensor:
    """From features of whole pictures to the volume of the image or the pixel stage."""
    cascade, src, trg = oblong(device)
    return cascade.volume(src, trg, stage)


@cache
def known_volume() -> Tensor:
    """The image stage's volume, by the CPU."""
    return whole_volume("image", CPU)


def region_volumes(device: torch.device) -> Tensor:
    """From the CPU's suspected pairs to the region stage's volumes."""
    (cascade, src, trg), (_, *on_cpu) = oblong(device), oblong(CPU)
    suspected = cascade.image.select(known_volume(), *on_cpu)
    regions = cascade.image.regions(modules.Pairs(*(x.to(device) for x in suspected)), src, trg)
    return cascade.region(regions.src, regions.trg)


def hough(device: torch.device) -> Tensor:
    """Hough matching inside the foreground."""
    _, src, trg = oblong(device)
    return hough_matching(known_volume().to(device), src.foreground(0.5), trg.foreground(0.5))


def selected(inside: bool, device: torch.device) -> Tensor:
    """Pairs of a volume of distinct scores: of all cells by Algorithm 1, or inside by `select_pairs`."""
    (cascade, src, trg), known = oblong(device), known_volume()
    scores = torch.randperm(known.numel(), generator=torch.Generator().manual_seed(0)) + 1.0
    volume, cfg = scores.view_as(known).to(device), dataclasses.replace(cascade.cfg, hough=False)
    pairs = modules.select_pairs(volume, src, trg, cfg) if inside else greedy_selection(volume)
    return torch.stack([x.long() for x in pairs])


def transfer(device: torch.device) -> Tensor:
    """Points that lie anywhere in the sources, in cells of the targets."""
    points = 12 * torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0))
    return modules.transfer_keypoints(known_volume().to(device), points.to(device))


def loop_errors(device: torch.device) -> Tensor:
    """From a picture, four times under noise, to their errors by closed loops."""
    cascade, _, _ = oblong(device)
    item = label.CliqueSet(Shapes("train"), [list(range(4))], cascade)[0]
    noise = torch.randn(item["views"].shape, generator=torch.Generator().manual_seed(0))
    item |= {"views": item["views"][:1] + 0.1 * noise, "cells": item["cells"][:1].expand(4, -1, -1)}
    clique, _ = label.build_clique(cascade, item, {}, LABELS.facing)
    return torch.tensor(label.image_errors(clique, label.clique_maps(cascade, clique.feats, LABELS.batch)[0]))


# ------------------------------------------------------------------------------------------------------------
# bfloat16, whole programs


def bfloat16(sizes: Sizes, device: torch.device) -> Row:
    """The pixel stage's volumes and transfers with bfloat16 in the networks, against float32."""
    if device == CPU:
        return Row("", NOT_RUN)
    known, found = shapes_pairs("val"), []
    few = KeypointSet("shapes", known.images, known.pairs[: sizes.transfers])
    for half in (False, True):
        cascade = placed(sizes._replace(preset=sizes.preset | {"amp": half}), device, moved=0.02)
        *ends, _ = couples_of(cascade, 2)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            volume = cascade.volume(*(cascade.features(*end) for end in ends), "pixel")
            found.append((volume, predict(cascade, few, ["pixel"], quiet=True)["pixel"]))
    (full, places), (low, moved) = found
    off = float((full - low).abs().max() / full.std())
    cell = max(few.size(few.pairs[0].src)) * cascade.backbone.patch / cascade.cfg.size
    near = float((torch.cat(places) - torch.cat(moved)).norm(dim=-1).lt(cell / 2).float().mean())
    pck = " and ".join(f"{score(x, few)['bbox']['per_image'][1]:.1f}" for x in (places, moved))
    text = f"volume off by {off:.3f} of its spread; PCK {pck}"
    text += f", {100 * near:.1f} % of points within half a cell (at least 90)"
    return Row(*on(device, f"{cascade.cfg.size} px, {len(few)} couples"), text, near >= 0.9)


def losses(folder: Path) -> list[float]:
    """The losses that a run has written, a step each."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def finished(command: list) -> None:
    """Run a program of the project to its end; its last words are the error."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def stopped_and_resumed(sizes: Sizes, device: torch.device) -> Row:
    """train.py on shapes: stopped by SIGTERM after its first step and resumed, against an undisturbed run."""
    words = f"train.py --size 64 --batch 3 --candidates 6 --val none --log-every 1 --steps {sizes.steps}"
    command = [sys.executable, *words.split(), "--device", device.type, "--out"]
    nowhere = subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        whole, halted = Path(folder, "whole"), Path(folder, "halted")
        finished([*command, whole])
        with subprocess.Popen([*command, halted], cwd=ROOT, stdout=nowhere, stderr=nowhere) as process:
            until = time.monotonic() + 120
            while process.poll() is None and not losses(halted) and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        code, first = process.returncode, len(losses(halted))
        finished([*command[:2], "--resume", halted / "last.pt", "--device", device.type])
        found = list(zip(losses(whole), losses(halted)))
    off = max(abs(a - b) for a, b in found)
    most = 0 if device == CPU else 0.02  # CUDA's atomics sum gradients in any order
    text = f"code {code} after step {first} of {sizes.steps}, losses off by {off:.1e} (at most {most:g})"
    ok = code == 143 and first < len(found) == sizes.steps and off <= most
    return Row(*on(device, f"3 x {sizes.steps} steps"), text, ok)


# ------------------------------------------------------------------------------------------------------------
# Times


def selection(function: Callable, inside: bool, sizes: Sizes, device: torch.device) -> Row:
    """Hough matching, or greedy selection of its scores, of all cells or inside the foreground; of one couple
    and of four at once."""
    cascade, columns = random_cascade(**PRESETS["quick"] | {"size": 8 * sizes.side}), []
    src, trg = (cascade.features(*end) for end in couples_of(cascade, 4)[:2])
    known = [cascade.volume(src, trg, "nn"), *(x.foreground(0.5) for x in (src, trg) if inside)]
    if function is greedy_selection:
        known[0] = hough_matching(*known)
    for where in dict.fromkeys((CPU, device)):
        some = ([x[:n].to(where) for x in known] for n in (1, 4))
        one, four = (milliseconds(partial(function, *x), where, sizes.repeats) for x in some)
        columns.append(f"{one:.2f} and {four:.2f} ms")
    text = f"{sizes.side}^4 cells, 1 and 4 couples: {four / 4:.2f} ms each of four"
    if device == CPU:
        return Row(*columns, NOT_RUN, text)
    return Row(*columns, f"{text} (goal 2)", four / 4 <= 2)


def labelling(pairs: bool, sizes: Sizes, device: torch.device) -> Row:
    """A clique of images of one class, from views to errors or to pairs; pairs are those of one view over and
    over, which all match: few labels cost more. Files are not read."""
    cascade, count, found = placed(sizes, device), sizes.cliques[pairs], []
    item = label.CliqueSet(Shapes("train"), [list(range(count))], cascade)[0]
    if pairs:
        item |= {name: item[name][:1].expand_as(item[name]) for name in ("views", "cells")}

    def work() -> None:
        clique, _, *maps = label.map_clique(cascade, item, {}, LABELS, matched=pairs)
        found[:] = label.pair_matches(clique, *maps, LABELS) if pairs else label.image_errors(clique, maps[0])

    seconds = milliseconds(work, device, sizes.repeats) / 1e3
    loops = (count - 1) * (count - 2)  # an image
    some, kind = (math.comb(count, 2), "pairs") if pairs else (count * loops, "loops")
    volumes = 2 * math.comb(count, 2)  # with targets as they are and mirrored
    text = f"{cascade.cfg.size} px, cliques of {count}: {volumes / seconds:.0f} volumes/s"
    if sizes is PAPER:
        cliques = PAIRS / (LABELS.pairs * count) if pairs else IMAGES / count
        what = f"{PAIRS:,} pairs" if pairs else f"{IMAGES:,} images x {loops} loops"
        text += f"; {what}: {cliques * seconds / 86400:.2f} days"
    return Row(*on(device, f"{some / seconds:.0f} {kind}/s"), text, len(found) == (some if pairs else count))


def evaluation(sizes: Sizes, device: torch.device) -> Row:
    """Couples of ten points by what evaluate.py reads a trained cascade by."""
    generator, pairs, box = torch.Generator().manual_seed(0), [], (0.0, 0.0, 499.0, 374.0)
    for _ in range(sizes.pairs):
        ends = torch.randperm(sizes.images, generator=generator)[:2].tolist()
        points = (370 * torch.rand(10, 2, generator=generator) for _ in range(2))
        pairs.append(KeypointPair(*ends, *points, "noise", box, box))
    keypoints = KeypointSet("noise", Noise(), pairs)
    read = partial(predict, placed(sizes, device), keypoints, ["pixel", "best-pixel"], quiet=True)
    read(numbers=[0])  # warms up
    began = time.perf_counter()
    read()
    seconds = time.perf_counter() - began
    rate, whole = f"{sizes.pairs / seconds:.1f} couples/s", seconds * SPAIR / sizes.pairs
    text = f"{sizes.pairs} couples of {sizes.images} images in {seconds:.1f} s"
    if sizes is not PAPER:
        return Row(*on(device, rate), text)
    text += f", so SPair-71k's {SPAIR:,} (scaled) in {whole:.0f} s (goal 180)"
    return Row(*on(device, rate), text, whole <= 180)


def training_step(compiled: bool, sizes: Sizes, device: torch.device, backend: str | None = None) -> Row:
    """Backbone, heads (forward and backward) and the whole step, as train.train has them. compiled: the
    MVAMs of the stages by torch.compile, only on a GPU unless a backend is named."""
    if compiled and device == CPU and not backend:
        return Row("", NOT_RUN)
    cascade, n = placed(sizes, device).train(), sizes.batch
    for stage in STAGES[: cascade.cfg.stages] if compiled else ():
        getattr(cascade, stage).mvam.compile(dynamic=False, backend=backend or "inductor")
    *ends, labels = couples_of(cascade, n)
    views, maps, labels = *(torch.cat(x).to(device) for x in zip(*ends)), labels.to(device)
    optimizer, gpu = build_optimizer(cascade), device.type == "cuda"
    params = [p for group in optimizer.param_groups for p in group["params"]]

    backbone = partial(cascade.features, views, maps)

    def heads(both: Features) -> None:
        loss, _ = cascade(both.map(lambda x: x[:n]), both.map(lambda x: x[n:]), labels)
        loss.backward()

    def step() -> None:
        heads(backbone())
        nn.utils.clip_grad_norm_(params, math.inf)
        optimizer.step()
        optimizer.zero_grad()

    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began, both = time.perf_counter(), backbone()
    step()
    first = time.perf_counter() - began
    parts = (step, backbone, partial(heads, both))
    whole, below, above = (milliseconds(part, device, sizes.repeats) for part in parts)
    text = f"{cascade.cfg.size} px, {n} couples: backbone {below:.0f} ms, heads {above:.0f} ms, ratio"
    text += f" {above / below:.2f}; first step {first:.0f} s"
    text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if gpu else ""
    return Row(*on(device, f"{whole:.0f} ms"), text)


# ------------------------------------------------------------------------------------------------------------
# The table

CHECKS: dict[str, Callable[[Sizes, torch.device], Row]] = {
    "image stage's volume": partial(compare, partial(whole_volume, "image"), 1e-4),
    "region stage's volumes": partial(compare, region_volumes, 1e-4),
    "pixel stage's volume": partial(compare, partial(whole_volume, "pixel"), 1e-4),
    "Hough matching": partial(compare, hough, 1e-4),
    "greedy selection": partial(compare, partial(selected, False), 0),
    "selection in the foreground": partial(compare, partial(selected, True), 0),
    "keypoint transfer": partial(compare, transfer, 1e-3),
    "closed loops": partial(compare, loop_errors, 1e-3),
    "bfloat16 against float32": bfloat16,
    "stopped and resumed": stopped_and_resumed,
    "time of Hough matching": partial(selection, hough_matching, False),
    "time of greedy selection": partial(selection, greedy_selection, False),
    "the same in the foreground": partial(selection, greedy_selection, True),
    "labelling, loops": partial(labelling, False),
    "labelling, pairs": partial(labelling, True),
    "evaluation": evaluation,
    "training step": partial(training_step, False),
    "training step, four times the couples": lambda sizes, device: training_step(
        False, sizes._replace(batch=4 * sizes.batch), device),
    "training step, compiled": partial(training_step, True),
}


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """A table of rows of five cells."""
    head = ("check", "CPU", "GPU", "agreement or figure", ""), ["---"] * 5
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (*head, *rows))


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> int:
    """Run all checks, print and write the table; the exit code. sizes: None: those that suit the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.md", help="the table, written to this file too")
    args, device, began = parser.parse_args(argv), find_device("auto"), time.perf_counter()
    sizes, rows = sizes or (SMALL if device == CPU else PAPER), []
    threads = f"no GPU here, the CPU's half alone: {torch.get_num_threads()} threads"
    card = threads if device == CPU else torch.cuda.get_device_name(device)
    head = f"{card}, torch {torch.__version__}, {datetime.date.today()}"
    print(f"{head}\n{as_markdown(rows)}", end="", flush=True)
    for name, check in CHECKS.items():
        try:
            row = check(sizes, device)
        except Exception as error:  # whatever it is, the other checks go on
            line = " ".join(str(error).replace("|", "/").splitlines()[:1])
            row = Row("", "", f"{type(error).__name__}: {line}"[:300], False)
        rows.append((name, row.cpu, row.gpu, row.figure, "ok" if row.ok else "FAILED"))
        print(as_markdown(rows[-1:]).splitlines()[-1], flush=True)
        failed, seconds = sum(cells[-1] == "FAILED" for cells in rows), time.perf_counter() - began
        total = f"{len(rows)} of {len(CHECKS)} checks in {seconds:.0f} s, {failed} failed"
        if args.out:  # after each: what was found stays if the next one never ends
            write_whole(args.out, f"{head}; {total}\n\n{as_markdown(rows)}")
    print(total)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
