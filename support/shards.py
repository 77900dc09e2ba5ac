"""Shards of a long run: a file a record, made once, shared over processes, kept when a run is killed."""

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import data
from support.files import write_whole
from support.run import leave_signals, processes, progress

Members = dict[int, list[int]]  # {class: images}, by their numbers in an ImageSet


def connect() -> int:
    """Connect torchrun's processes, which may wait for days between steps; returns this one's rank."""
    rank, world = processes()
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return rank


def wait() -> None:
    """For the other processes."""
    if dist.is_initialized():
        dist.barrier()


def disconnect() -> None:
    """Leave the other processes, when all of them are here."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str) -> None:
    """Print a line once, whatever the number of processes."""
    if not processes()[0]:
        print(text, flush=True)


def shard_path(out: str | Path, step: str, number: int) -> Path:
    """The file of one shard."""
    return Path(out, "work", step, f"{number:06d}.json")


def read_json(path: Path) -> dict:
    """A file of the work; ValueError names it if a crash has damaged it."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and the same command makes it anew") from None


def digest(content) -> str:
    """Sixteen characters that tell one bytes, text or plain value from another."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def digest_names(images: data.ImageSet, members: Members) -> str:
    """`digest` of the names of images and classes. Their folders may move."""
    names = [(images.classes[k], images.paths[i].name) for k, some in members.items() for i in some]
    return digest(names)


class ImageGroups(Dataset):
    """Groups of images to be read together, a shard each; a subclass turns what `read` gives into an item."""

    def __init__(self, images: data.ImageSet, groups: list[list[int]]) -> None:
        self.images, self.groups = images, groups

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, number: int) -> tuple[list[tuple], list[tuple[int, str]]]:
        """(index, image, saliency map) of what can be read, and (index, why) of the rest."""
        found, skipped = [], []
        for i in self.groups[number]:
            try:
                found.append((i, *self.images.load(i)))
            except ValueError as error:
                skipped.append((i, str(error)))
        return found, skipped


class Records(NamedTuple):
    """The records of a step, read one at a time: in order when iterated over, or any one by its number."""

    out: str
    step: str
    count: int

    def __iter__(self) -> Iterator[dict]:
        quiet = processes()[0] != 0
        bar = progress(range(self.count), desc=f"reading {self.step}", leave=False, disable=quiet)
        yield from map(self.read, bar)

    def read(self, number: int) -> dict:
        return read_json(shard_path(self.out, self.step, number))


def check_settings(folder: Path, settings: dict) -> None:
    """Write down what shards depend on; ValueError if those in the folder were made with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, settings = folder / "settings.json", json.loads(json.dumps(settings))
    old = read_json(stored) if stored.exists() else settings
    if old != settings:
        what = next(k for k in settings | old if settings.get(k) != old.get(k))
        raise ValueError(f"{folder} was made with {what} {old.get(what)}, not {settings.get(what)};"
                         f" give another --out, or delete {folder} to make it anew")
    write_whole(stored, json.dumps(settings, indent=1))


def run_shards(cfg, step: str, unit: str, items: ImageGroups, costs: list[int], settings: dict,
               make: Callable[[int, dict], dict]) -> Records:
    """Make the shards OUT/work/<step>/<number>.json of a step that are not there yet; returns all records.

    cfg: out, workers. costs: each shard's part of the progress bar, in `unit`s. settings: what shards depend
    on, beside the groups of images. make(number, item): the record of one, of plain values. Every one of w
    processes has to call this and makes every w-th shard.
    Raises ValueError if the shards that are there were made with other settings.
    """
    rank, world = processes()
    if rank == 0:
        check_settings(Path(cfg.out, "work", step), settings | {"groups": digest(items.groups)})
    wait()
    todo = [k for k in range(rank, len(costs), world) if not shard_path(cfg.out, step, k).exists()]
    loader = DataLoader(items, sampler=todo, batch_size=None, num_workers=cfg.workers,
                        worker_init_fn=leave_signals)
    start, total = time.perf_counter(), sum(costs[k] for k in todo)
    with progress(total=total, desc=step, unit=f" {unit}", unit_scale=True, disable=rank != 0) as bar:
        for number, item in zip(todo, loader):
            write_whole(shard_path(cfg.out, step, number), json.dumps(make(number, item)))
            bar.update(costs[number])
    wait()
    seconds = time.perf_counter() - start
    if todo:
        others = f" in each of {world} processes" if world > 1 else ""
        say(f"{step}: {total:,} {unit} in {seconds:.0f} s, {total / seconds:,.1f} a second{others}")
    return Records(cfg.out, step, len(costs))
