"""Files that are read with care and written whole: weights, checkpoints, and one atomic write for
everything."""

import argparse
import dataclasses
import io
import os
from pathlib import Path

import torch


def read_weights(origin: str, what: str, way_out: str, file_name: str | None = None) -> dict:
    """What torch.save left at a path, or at an address (downloaded once into torch.hub's cache, as
    `file_name`).

    Never runs pickled code. what, way_out: words for the one line of ValueError that every failure becomes.
    """
    # A full iBOT checkpoint stores its argparse.Namespace: a plain record, safe to admit.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if "://" in origin:
                return torch.hub.load_state_dict_from_url(
                    origin, map_location="cpu", weights_only=True, file_name=file_name)
            return torch.load(origin, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling and urllib raise many kinds; the way out is the same for all
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if "weights_only" in str(error):
                reason = "not a file of torch.save"
            if isinstance(error, FileNotFoundError):
                reason = "no such file"
            raise ValueError(f"cannot read {what} from {origin} ({reason}); {way_out}") from None


def write_whole(path: str | Path, content: str | bytes | dict) -> None:
    """Write text, bytes or a state for torch.load under a temporary name and rename it: a kill leaves the old
    file or the new one. OSError, in one line, leaves nothing behind."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, dict):  # torch.save itself reports a full disk as a RuntimeError
            buffer = io.BytesIO()
            torch.save(content, buffer)
            content = buffer.getvalue()
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{error.strerror}; what was finished before is kept"
        raise OSError(f"cannot write {path}: {reason}") from None


def read_state(path: str) -> dict:
    """What a checkpoint of this project holds; its "program" wrote it. ValueError in one line for anything
    else."""
    if not Path(path).exists():
        raise ValueError(f"no such checkpoint: {path}")
    state = read_weights(str(path), "a checkpoint", "give one that train.py or experiments.finetune wrote")
    if not isinstance(state, dict) or not {"model", "config"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint written by train.py or experiments.finetune")
    return {"program": "train.py"} | state


def read_checkpoint(path: str, cls: type, program: str) -> dict:
    """A checkpoint that one program wrote with configurations of a class, of this version."""
    state = read_state(path)
    if state["program"] != program:
        raise ValueError(f"{path} is a checkpoint of {state['program']}, not of {program}")
    if other := state["config"].keys() ^ {field.name for field in dataclasses.fields(cls)}:
        version = f"was written by another version of {program} (option {min(other)})"
        raise ValueError(f"{path} {version}; train it anew")
    return state
