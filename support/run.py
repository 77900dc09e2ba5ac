"""Where and how a program runs: devices, processes, signals, progress, and the log of what it did."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from support.files import check_record, read_state, write_whole


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, by torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_device(name: str) -> torch.device:
    """--device to a device that works, or ValueError; "auto" and "cuda" mean this process's own GPU."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def start_processes(device: torch.device) -> tuple[int, int]:
    """This process's rank and how many there are; connects them if there are several."""
    rank, world = processes()
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # One process measures PCK while the others wait.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world


def share_weights(module: nn.Module) -> None:
    """Every process gets the first one's parameters and buffers."""
    for tensor in module.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)


def average_over_processes(params: list[nn.Parameter], logged: dict[str, Tensor]) -> dict[str, float]:
    """Replace gradients by their mean over all processes; returns the mean of the scalars that are logged."""
    values = torch.stack([value.float() for value in logged.values()])
    if not dist.is_initialized():
        return dict(zip(logged, values.tolist()))
    flat = torch.cat([p.grad.flatten() for p in params] + [values])
    dist.all_reduce(flat)
    *grads, values = (flat / dist.get_world_size()).split([p.numel() for p in params] + [len(values)])
    for p, grad in zip(params, grads):
        p.grad.copy_(grad.view_as(p))
    return dict(zip(logged, values.tolist()))


@contextlib.contextmanager
def command() -> Iterator[None]:
    """The frame of a program: a refusal is one line and code 1, Ctrl-C that nothing waits for code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM are noted in, so that a loop can finish its step, save and leave."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def has_steps_left(last: Path, state: dict) -> bool:
    """Whether the checkpoint at `last` is of a run that was stopped."""
    return state["step"] < state.get("steps", state["config"].get("steps", 0))


def free_folder(out: str, named: bool, phases: tuple[str, ...] = ("",),
                stopped: Callable[[Path, dict], bool] = has_steps_left) -> str:
    """The folder for a new run: `out` or, if it holds a finished run and was not named on the command line,
    the next free name. ValueError if it holds a run that was stopped.

    phases: folders in it that hold a last.pt, the latest first; stopped: by such a file and its state.
    """
    for number in itertools.count(1):
        place = f"{out}-{number}" if number > 1 else out
        found = [last for phase in phases if (last := Path(place, phase, "last.pt")).exists()]
        for last in found:
            if stopped(last, check_record(last, read_state(str(last)), {"config": dict, "step": int})):
                raise ValueError(f"{place} holds a run that was stopped: go on with --resume {last}, or give"
                                 " another --out")
        if named or not found:
            return place


def check_resume(state: dict, given: dict, free: set[str], path: str) -> None:
    """ValueError, in one line, for options that make a resumed run end elsewhere than an uninterrupted one.

    state: the checkpoint; given: what the command line says; free: what cannot change the numbers.
    """
    base, wrong, world = state["config"], "--resume goes on with the run as it was:", processes()[1]
    for name in (name for name in given if name not in free | {"resume"}):
        if name not in base or given[name] != base[name]:
            raise ValueError(f"{wrong} --{name.replace('_', '-')} cannot change")
    if state.get("processes", world) != world:
        raise ValueError(f"{wrong} by {state['processes']} process(es), not by {world}")
    if state["step"] >= given.get("steps", base.get("steps", math.inf)):
        raise ValueError(f"--resume {path}: this run has finished its {state['step']} steps")


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag holds in any process; every process has to call this."""
    if not dist.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return bool(count)


def leave_signals(worker: int) -> None:
    """A signal to the whole group reaches the loaders too; they live as long as the process they serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def endless(dataset: Dataset, stream: Sampler, workers: int, device: torch.device) -> Iterator[dict]:
    """The micro-batches that a stream asks a data set for. The first is read at once, so that what cannot be
    read shows before anything is written."""
    loader = iter(DataLoader(dataset, batch_sampler=stream, num_workers=workers,
                             pin_memory=device.type == "cuda", worker_init_fn=leave_signals))
    return itertools.chain([next(loader)], loader)


def report_skipped(skipped: set[str]) -> None:
    """Name what any process passed over; every process has to call this."""
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, skipped)
        skipped = set().union(*gathered)
    classes = sorted(line for line in skipped if line.startswith("class "))
    files = sorted(skipped - set(classes))
    if files and not processes()[0]:
        print(f"{len(files)} unreadable files passed over: {'; '.join(files[:5])}", file=sys.stderr)
    if classes and not processes()[0]:
        print("\n".join(classes), file=sys.stderr)


def progress(*arguments, **options) -> tqdm:
    """A progress bar: on a terminal; a line a minute in the log of a long job, nothing in that of a short."""
    slow = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60}
    return tqdm(*arguments, **options, **slow)


def commit_of_source() -> str:
    """The commit of this checkout, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_header(cfg, device: torch.device) -> None:
    """Versions, device, commit and every field of a configuration."""
    print(f"torch {torch.__version__}, {device}, {processes()[1]} process(es), commit {commit_of_source()}")
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))


def open_log(out: Path, start: int) -> Path:
    """OUT/metrics.jsonl, one JSON line per record: empty for a new run, for a resumed one cut to its
    start."""
    out.mkdir(parents=True, exist_ok=True)
    path, kept = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if start and path.exists() else []:
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except ValueError:  # a kill may cut the last line short
            break
    write_whole(path, "".join(kept))
    return path


def record(log: Path, step: int, values: dict) -> None:
    """Append one line to metrics.jsonl."""
    try:
        with open(log, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
    except OSError as error:
        raise OSError(f"cannot write {log}: {error.strerror}; what was saved before stands") from None
