"""Files that are read with care and written whole: weights, checkpoints, one atomic write for all."""

import argparse
import dataclasses
import io
import os
import re
import warnings
from pathlib import Path
from urllib.parse import urlparse

import torch
from PIL import Image
from torch import Tensor

from support.download import fetch


def reason_of(error: Exception) -> str:
    """The first line of an error, plain: no colours of a terminal, no advice to run pickled code."""
    if "weights_only" in str(error):
        return "not a plain file of torch.save"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0] or type(error).__name__


def read_weights(origin: str, what: str, way_out: str, file_name: str | None = None) -> dict:
    """What torch.save left at a path, or at an address: downloaded once into torch.hub's cache, as
    `file_name`, where a file gets its name only when all of it has arrived and can be read.

    Never runs pickled code. what, way_out: words for the one line of ValueError that every failure becomes.
    """
    path, temporary = Path(origin), None
    # A full iBOT checkpoint stores its argparse.Namespace: a plain record, safe to admit.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the refusal is one line
        try:
            if "://" in origin:
                path = Path(torch.hub.get_dir(), "checkpoints", file_name or Path(urlparse(origin).path).name)
            if "://" in origin and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                fetch(origin, temporary)
            state = torch.load(temporary or path, map_location="cpu", weights_only=True)
            if temporary:
                os.replace(temporary, path)
            return state
        except Exception as error:  # unpickling and urllib raise many kinds; the way out is the same for all
            at = f"{path} (from {origin}; delete it to download it again)" if path.exists() else origin
            where = origin if str(path) == origin or temporary else at
            raise ValueError(f"cannot read {what} from {where} ({reason_of(error)}); {way_out}") from None
        finally:
            if temporary:
                temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes | dict | Image.Image) -> None:
    """Write text, bytes, a picture or a state for torch.load under a temporary name and rename it: a kill
    leaves the old file or the new one, and two processes never mix theirs. OSError, in one line, leaves
    nothing behind."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if isinstance(content, dict | Image.Image):  # torch.save itself reports a full disk as a RuntimeError
        buffer = io.BytesIO()
        if isinstance(content, dict):
            torch.save(content, buffer)
        else:
            content.save(buffer, Image.registered_extensions()[path.suffix.lower()], quality=85)
        content = buffer.getvalue()
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror}; what was finished before is kept"
        raise OSError(f"cannot write {path}: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_record(path: str | Path, record, kinds: dict[str, type | tuple[type, ...]]) -> dict:
    """A record that was read from a file, if it holds what it must; else ValueError, naming the file.

    kinds: the types of its entries; others may stand beside them.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(record).__name__}, not a record")
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            found = f"a {type(record[name]).__name__}" if name in record else "missing"
            raise ValueError(f"{path} is damaged: its {name} is {found}")
    return record


def read_state(path: str) -> dict:
    """What a checkpoint of this project holds; its "program" wrote it. One line of ValueError otherwise."""
    if not Path(path).exists():
        raise ValueError(f"no such checkpoint: {path}")
    state = read_weights(str(path), "a checkpoint", "give one that train.py or experiments.finetune wrote")
    if not isinstance(state, dict) or not {"program", "model", "config"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint written by train.py or experiments.finetune")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str) -> None:
    """The optimiser's state from a checkpoint; ValueError, naming the file, if it does not fit."""
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its optimizer does not fit ({error})") from None


def read_checkpoint(path: str, cls: type, program: str) -> dict:
    """A checkpoint that one program wrote with configurations of a class, of this version."""
    state = read_state(path)
    if state["program"] != program:
        raise ValueError(f"{path} is a checkpoint of {state['program']}, not of {program}")
    check_record(path, state, {"model": dict, "config": dict, "step": int})
    if other := state["config"].keys() ^ {field.name for field in dataclasses.fields(cls)}:
        version = f"was written by another version of {program} (option {min(other)})"
        raise ValueError(f"{path} {version}; train it anew")
    kinds = {name: (float, int) if type(value) is float else type(value)
             for name, value in dataclasses.asdict(cls()).items() if value is not None}
    check_record(path, state["config"], kinds)
    for name, value in state["model"].items():
        if not isinstance(value, Tensor) or not value.isfinite().all():
            raise ValueError(f"{path} is damaged: its {name} is no tensor of finite values")
    return state
