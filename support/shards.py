"""Shards of a long run: one file per record, made once, shared over processes, kept when a run is killed."""

import contextlib
import datetime
import hashlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import data
from support.files import check_record, write_whole
from support.run import leave_signals, processes, progress, stop_signals

Members = dict[int, list[int]]  # {class: images}, by their numbers in an ImageSet


def connect() -> int:
    """Connect torchrun's processes, which may wait for days between steps; returns this one's rank."""
    rank, world = processes()
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return rank


def wait() -> None:
    """For the other processes."""
    try:
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError:  # whatever ended one of them, it said why
        raise ValueError("another process has ended; the same command goes on where it was") from None


def disconnect() -> None:
    """Leave the other processes, when all of them are here."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str, error: bool = False) -> None:
    """Print a line once, whatever the number of processes; error: on stderr."""
    if not processes()[0]:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the program with the code by which a shell knows them, 130 or 143; nothing that
    was finished is lost. See also run_shards."""

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as stopped:
        say("stopped; the same command goes on where it was", error=True)
        sys.exit(128 + stopped.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shard_path(out: str | Path, step: str, number: int) -> Path:
    """The file of one shard."""
    return Path(out, "work", step, f"{number:06d}.json")


def digest(content) -> str:
    """Sixteen characters that tell one bytes, text or plain value from another."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


def write_record(path: Path, record: dict) -> None:
    """A file of the work: a record of plain values, and a digest of it and of the file's place."""
    write_whole(path, json.dumps({"digest": digest([*path.parts[-2:], record]), "record": record}))


def read_record(path: Path, belongs_to: Path | None = None) -> dict:
    """What write_record wrote; ValueError, in one line, for anything else, and for a file of another place.

    belongs_to: what has to be deleted with a damaged file, if that is more than the file.
    """
    try:
        stored = check_record(path, json.loads(path.read_text()), {"digest": str, "record": dict})
        if digest([*path.parts[-2:], stored["record"]]) == stored["digest"]:
            return stored["record"]
    except (ValueError, RecursionError):  # cut short, no text at all, or not ours
        pass
    way_out = f"delete {belongs_to or path}, and the same command makes it anew"
    raise ValueError(f"{path} is damaged, or another version of label.py wrote it; {way_out}")


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


@dataclass(frozen=True)
class Records:
    """The records of a step, read one at a time: in order when iterated over, or any one by its number."""

    out: str
    step: str
    count: int
    splits: dict[int, str]  # of records that have changed theirs

    def __iter__(self) -> Iterator[dict]:
        quiet = processes()[0] != 0
        bar = progress(range(self.count), desc=f"reading {self.step}", leave=False, disable=quiet)
        yield from map(self.read, bar)

    def read(self, number: int) -> dict:
        record = read_record(shard_path(self.out, self.step, number))
        return record | ({"split": self.splits[number]} if number in self.splits else {})


def file_times(items: ImageGroups) -> dict[str, dict]:
    """What tells when files have changed: {kind: {class/image: [bytes, time of modification in ns]}}; None
    where there is no such file."""
    images, found = items.images, {"photographs": {}, "saliency maps": {}}
    for i in itertools.chain.from_iterable(items.groups):
        path, name = images.paths[i], images.classes[images.labels[i]]
        files = {"photographs": path}
        if place := images.map_path(i):
            files["saliency maps"] = place
        for kind, file in files.items():
            state = file.stat() if file.exists() else None
            found[kind][f"{name}/{path.name}"] = state and [state.st_size, state.st_mtime_ns]
    return found


def difference(old: dict, new: dict) -> str:
    """How shards were made otherwise than they would be now, for "was made ..."; empty if they were not."""
    a, b = old["settings"], new["settings"]
    for name in [*b, *a]:
        if a.get(name) != b.get(name):
            options = f"with {name} {a.get(name)}, not {name} {b.get(name)}"
            return options if name.startswith("--") else f"with another {name}"
    for kind, now in new["files"].items():
        then = old["files"][kind]
        same = then.keys() & now.keys()
        changes = {"new": now.keys() - same, "gone": then.keys() - same,
                   "rewritten": {name for name in same if then[name] != now[name]}}
        if found := [f"{len(names)} {what} ({min(names)})" for what, names in changes.items() if names]:
            return f"from other {kind}: {', '.join(found)}"
    return "" if old["groups"] == new["groups"] else "from other groups of these images"


def check_settings(folder: Path, items: ImageGroups, settings: dict) -> None:
    """Write down what shards depend on; ValueError if those in the folder were made of other files or with
    other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, way_out = folder / "settings.json", f"give another --out, or delete {folder} to make it anew"
    made = {"settings": settings, "groups": digest(items.groups), "files": file_times(items)}
    if stored.exists():
        if what := difference(read_record(stored, folder), made):
            raise ValueError(f"{folder} was made {what}; {way_out}")
    elif any(folder.glob("[0-9]*.json")):
        raise ValueError(f"{folder} does not say how it was made, its settings.json is missing; {way_out}")
    else:
        write_record(stored, made)


def run_shards(cfg, step: str, unit: str, items: ImageGroups, costs: list[int], settings: dict,
               make: Callable[[int, dict], dict]) -> Records:
    """Make the shards OUT/work/<step>/<number>.json of a step that are not there yet; returns all records.

    cfg: out, workers. costs: each shard's part of the progress bar, in `unit`s. settings: what shards depend
    on, beside the images and their groups: {option: value} or {words: digest}. make(number, item): the record
    of one, of plain values. Every one of w processes has to call this and makes every w-th shard.
    Raises ValueError if the shards that are there were made of other files or with other settings, and
    KeyboardInterrupt, when the shard at hand is done, after a signal: loaders must not be left in their work.
    """
    rank, world = processes()
    if rank == 0 and costs:
        check_settings(Path(cfg.out, "work", step), items, settings)
    wait()
    todo = [k for k in range(rank, len(costs), world) if not shard_path(cfg.out, step, k).exists()]
    loader = DataLoader(items, sampler=todo, batch_size=None, num_workers=cfg.workers,
                        worker_init_fn=leave_signals)
    start, total = time.perf_counter(), sum(costs[k] for k in todo)
    with stop_signals() as stop, progress(total=total, desc=step, unit=f" {unit}", unit_scale=True,
                                          disable=rank != 0) as bar:
        try:
            for number, item in zip(todo, loader):
                write_record(shard_path(cfg.out, step, number), make(number, item))
                bar.update(costs[number])
                if stop:
                    break
        except Exception:  # of many kinds, where the signal has ended the loaders too
            if not stop:
                raise
    if stop:
        raise KeyboardInterrupt(stop[0])
    wait()
    seconds = time.perf_counter() - start
    if todo:
        others = f" in each of {world} processes" if world > 1 else ""
        say(f"{step}: {total:,} {unit} in {seconds:.0f} s, {total / seconds:,.1f} a second{others}")
    return Records(cfg.out, step, len(costs), {})
