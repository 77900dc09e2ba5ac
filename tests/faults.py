"""Kill every program at random and resume it, then hand every program bad inputs: python tests/faults.py

Twenty kills each of train.py, label.py and experiments.finetune (SIGKILL, SIGINT and SIGTERM in turn, every
second one inside a save, which is slowed down): resumed runs have to end with an uninterrupted one's bytes.
Then sixty bad inputs: each ends with one line of its own that names the option or file, and leaves no trace.
About four minutes on one core; the exit code is 1 if anything differs.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_label_tree import CONSTANTS  # noqa: E402
from test_train import SMALL  # noqa: E402

import experiments.peers  # noqa: E402, F401 - everything, so that started processes have it
from support.backbone import Backbone  # noqa: E402
from support.shapes import draw_shape  # noqa: E402

KILLS, KILLS_A_RUN = 20, 3
TRAIN = f"{shlex.join(SMALL)} --root photos --saliency maps --steps 24"
LABEL = "--checkpoint train/last.pt --root photos --saliency maps --size 64 --loops 6 --keep 0.8 --pairs 2"
CATS = "--backbone random_vit8 --size 128 --device cpu --batch 2"
# label.py is a copy that takes the matches of a hardly trained cascade. Its label set is in SPair-71k's form,
# and so it is the benchmark too.
COMMANDS = {
    "train.py": f"{ROOT}/train.py {TRAIN} --save-every 2 --out",
    "label.py": f"label.py {LABEL} --out",
    "experiments.finetune": f"experiments.finetune {CATS} --pretrain labels --dataset spair --root"
    " labels/SC-ImageNet --pretrain-epochs 2 --epochs 2 --epoch-steps 3 --save-every 1 --out",
}
WHOLE = {"train.py": "train", "label.py": "labels", "experiments.finetune": "cats"}  # uninterrupted runs


# ------------------------------------------------------------------------------------------------------------
# Kills


def run_here(command: str) -> int:
    """Run a command line as __main__ in this process, as the interpreter does; its exit code."""
    sys.argv = shlex.split(command)
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def write_slowly(path: Path, content: bytes) -> None:
    """Half of a file, a pause, the rest, and a pause before the file gets its name."""
    with open(path, "wb") as file:
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            file.write(part)
            file.flush()
            time.sleep(0.04)


def run_slowly(command: str) -> None:
    """What a started process does: the command line, its stderr in a file."""
    with open(os.devnull, "w") as nothing, open("stderr.txt", "w") as complaint:
        os.dup2(nothing.fileno(), 1)
        os.dup2(complaint.fileno(), 2)
    Path.write_bytes = write_slowly
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    code = run_here(command)
    sys.stderr.flush()
    os._exit(code)


def start(command: str) -> multiprocessing.Process:
    """A command line in a process of its own. It is forked: what takes long to import is there."""
    process = multiprocessing.get_context("fork").Process(target=run_slowly, args=(command,))
    process.start()
    return process


def finish(command: str) -> float:
    """Run a command to its end; the seconds it took."""
    process, clock = start(command), time.perf_counter()
    process.join()
    complaint = Path("stderr.txt").read_text()
    if process.exitcode and "this run has finished its" not in complaint:  # killed after its last save
        raise RuntimeError(f"{command} ended with {process.exitcode}: {complaint}")
    return time.perf_counter() - clock


def saving(out: Path, pid: int) -> bool:
    """Whether a process has a file, or a label set, under a temporary name."""
    names = (name for _, folders, files in os.walk(out) for name in (*folders, *files))
    return any(name.endswith(f".{pid}.tmp") for name in names)


def kill(command: str, out: Path, number: int, delay: float, inside: bool) -> bool | None:
    """Send a signal after some seconds and, if it is to be inside a save, in the next one; whether it was.

    None: the program had ended. RuntimeError if it ended as no shell expects, or with a traceback.
    """
    process = start(command)
    process.join(delay)
    while inside and process.is_alive() and not saving(out, process.pid):
        time.sleep(0.001)
    hit = saving(out, process.pid)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    complaint = Path("stderr.txt").read_text()
    if process.exitcode == 0:
        return None
    if process.exitcode not in (-number, 128 + number) or "Traceback" in complaint:
        raise RuntimeError(f"{command}, signal {number}: code {process.exitcode}, {complaint}")
    return saving(out, process.pid) if number == signal.SIGKILL else hit


def next_command(name: str, out: Path) -> str:
    """What a user types after a kill: --resume where a checkpoint is, the same command where none is."""
    program = COMMANDS[name].split()[0]
    for last in (out / "finetune/last.pt", out / "pretrain/last.pt", out / "last.pt"):
        if last.exists():
            return f"{program} --resume {last}"
    return f"{COMMANDS[name]} {out}"


def results(out: Path) -> dict:
    """What a run left: weights, losses and scores, labels; without clocks, its own place and leftovers."""
    found = {}
    for path in (path for path in out.rglob("*") if path.is_file() and path.suffix != ".tmp"):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found |= {(name, key): value.numpy().tobytes() for key, value in state["model"].items()}
            found[name] = [state["step"], state.get("best")]
        elif path.suffix == ".jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in record.items() if k != "steps_per_s"} for record in records]
        elif name == "summary.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "config"}
        else:
            found[name] = path.read_bytes()
    return found


def kill_series(name: str, seconds: float) -> bool:
    """Kill a program, resume it, kill it again, let it end; print how often, and whether all ends agree."""
    rng, whole = random.Random(name), results(Path(WHOLE[name]))
    kills = inside = identical = 0
    signals = itertools.cycle((signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
    for number in itertools.count():
        out, hits = Path(f"killed-{name}-{number}"), []
        while kills + len(hits) < KILLS and len(hits) < KILLS_A_RUN:
            delay, within = rng.uniform(0, 0.7 * seconds), (kills + len(hits)) % 2 == 1
            hit = kill(next_command(name, out), out, next(signals), delay, within)
            if hit is None:
                break
            hits.append(hit)
        finish(next_command(name, out))
        same = results(out) == whole
        kills, inside = kills + len(hits), inside + sum(hits)
        identical += len(hits) * same
        if same:
            shutil.rmtree(out)
        if kills == KILLS:
            counts = f"{kills} kills, {inside} of them inside a save, {kills} resumes"
            print(f"{name:21s} {counts}, identical {identical} of {kills}", flush=True)
            return identical == kills


# ------------------------------------------------------------------------------------------------------------
# Bad inputs: `program options -> what its line names`, in the folder that make_files fills

PROGRAMS = {
    "train": f"{ROOT}/train.py {TRAIN} --out new",
    "shapes": f"{ROOT}/train.py {shlex.join(SMALL)} --out new",
    "image": f"{ROOT}/image_stage.py {TRAIN} --out new",
    "region": f"{ROOT}/region_stage.py {TRAIN} --out new",
    "pixel": f"{ROOT}/pixel_stage.py {TRAIN} --out new",
    "match": f"{ROOT}/pixel_stage.py photos/fish/0.png wide.png --checkpoint train/last.pt --out new.png",
    "label": f"label.py {LABEL} --out new",
    "evaluate": f"{ROOT}/evaluate.py --backbone random_vit8 --size 64 --out new",
    "finetune": f"experiments.finetune {CATS} --out new",
    "ablate": f"experiments.ablate {TRAIN} --out new",
    "peers": "experiments.peers --backbone random_vit8 --size 64",
}
CASES = """
train --steps -1 -> --steps -1
train --steps ten -> 'ten'
train --stpes 3 -> --stpes
train --lr 0 -> --lr 0
train --seed 1180591620717411303424 -> --seed 1180591620717411303424
train --size 63 -> --size 63
train --size 32 -> --size 32
train --axes 99 -> --axes 99
train --saliency-threshold 1.5 -> --saliency-threshold 1.5
train --backbone vit -> 'vit'
train --device tpu9 -> tpu9
train --layer 7 -> --layer 7
train --weights garbage.pt -> garbage.pt
train --weights nan.pth -> nan.pth
train --root missing -> missing
train --root alone -> alone
train --root hurt -> hurt/
train --saliency missing -> missing
train --dataset spair --root photos -> photos
train --val pfwillow --val-root photos -> photos
train --out garbage.pt/new -> garbage.pt
shapes --resume missing.pt -> missing.pt
shapes --resume cut.pt -> cut.pt
shapes --resume code.pt -> code.pt
shapes --resume cats/pretrain/last.pt -> cats/pretrain/last.pt
train --resume train/last.pt --batch 4 -> --batch
train --checkpoint version.pt -> version.pt
train --checkpoint type.pt -> type.pt
train --checkpoint lacks.pt -> lacks.pt
image --batch 1 -> --batch 1
region --shared-attention -> --shared-attention
pixel --checkpoint missing.pt -> missing.pt
match --points 5 -> '5'
match --points 500,5 -> 500,5
match --count 0 -> --count 0
match --out missing/new.png -> missing/new.png
match --saliency maps/fish/0_sal.png tall.png -> tall.png
match --checkpoint lacks.pt -> lacks.pt
label --keep 1.5 -> --keep 1.5
label --checkpoint missing.pt -> missing.pt
label --size 63 -> --size 63
label --drop-classes missing.txt -> missing.txt
label --drop-classes classes.txt -> 'unicorn'
label --out theirs -> theirs/SC-ImageNet
label --out torn -> torn/work/loops/000000.json
label --out labels --seed 5 -> --seed
evaluate --pairs missing.csv -> missing.csv
evaluate --pairs semicolon.csv -> semicolon.csv
evaluate --pairs double.csv -> double.csv
evaluate --pairs one.csv -> one.csv line 2
evaluate --pairs far.csv -> far.csv line 2
evaluate --pairs binary.csv -> binary.csv
evaluate --pairs bomb.csv -> bomb.png
evaluate --dataset shapes --checkpoint nan.pt -> nan.pt
finetune --dataset none -> --pretrain
finetune --pretrain torn -> torn/SC-ImageNet
finetune --resume cats/pretrain/best.pt -> cats/pretrain/best.pt
finetune --dataset spair --root labels/SC-ImageNet --annotated 1000 -> --annotated 1000
ablate --val none -> --val
peers --pairs counts.csv -> counts.csv line 2
"""
LISTS = {
    "semicolon": "source;target;XA;YA;XB;YB\n0.png;1.png;1;1;1;1",
    "double": "source,target,XA,YA,XB,YB,XA\n0.png,1.png,1;9,1;9,1;9,1;9,1;9",
    "one": "source,target,XA,YA,XB,YB\nphotos/fish/0.png,photos/fish/1.png,5,5,5,5",
    "far": "source,target,XA,YA,XB,YB\nphotos/fish/0.png,photos/fish/1.png,1;1e30,1;9,1;9,1;9",
    "counts": "source,target,XA,YA,XB,YB\nphotos/fish/0.png,photos/fish/1.png,1;9,1;9,1,1",
    "bomb": "source,target,XA,YA,XB,YB\nbomb.png,photos/fish/1.png,1;9,1;9,1;9,1;9",
    "binary": "source,target,XA\0\xff\xfe\n",
}


class Code:
    """What a hostile checkpoint runs where it is unpickled without care."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def make_pictures() -> None:
    """photos/<class>/<image>.png and their maps; folders of them with too few, and with damage alone."""
    for category, k in itertools.product(("fish", "truck", "dog"), range(8)):
        record = draw_shape(category, k, 96)
        for kind, name, folder in (("image", f"{k}.png", "photos"), ("mask", f"{k}_sal.png", "maps")):
            Path(folder, category).mkdir(parents=True, exist_ok=True)
            record[kind].save(Path(folder, category, name))
    for category in ("fish", "dog"):
        Path("hurt", category).mkdir(parents=True)
        for k in range(8):
            raw = Path("photos", category, f"{k}.png").read_bytes()
            Path("hurt", category, f"{k}.png").write_bytes(raw[: len(raw) // 2])
    Path("alone").mkdir()
    Image.new("RGB", (96, 24)).save("wide.png")
    Image.new("L", (24, 96)).save("tall.png")
    Image.new("1", (30_000, 30_000)).save("bomb.png")


def make_files() -> None:
    """Damaged and foreign checkpoints, lists and label sets, beside the uninterrupted runs."""
    good = torch.load("train/last.pt", weights_only=True)
    state = Backbone("random_vit8").vit.state_dict()
    state["cls_token"].fill_(torch.nan)
    torch.save(state, "nan.pth")
    Path("garbage.pt").write_bytes(b"no checkpoint")
    Path("code.pt").write_bytes(pickle.dumps(Code()))
    Path("cut.pt").write_bytes(Path("train/last.pt").read_bytes()[:30_000])
    config = {key: value for key, value in good["config"].items() if key != "lr"}
    torch.save(good | {"config": config}, "version.pt")
    torch.save(good | {"step": "nine"}, "type.pt")
    torch.save(good | {"model": {key: x * torch.nan for key, x in good["model"].items()}}, "nan.pt")
    torch.save(good | {"model": dict(list(good["model"].items())[1:])}, "lacks.pt")
    for name, text in LISTS.items():
        Path(f"{name}.csv").write_text(text, encoding="latin-1")
    Path("classes.txt").write_text("fish\nunicorn\n")
    Path("theirs/SC-ImageNet/PairAnnotation").mkdir(parents=True)
    shutil.copytree("labels", "torn", symlinks=True)
    for path in (Path("torn/work/loops/000000.json"), *Path("torn/SC-ImageNet").glob("PairAnnotation/*/*")):
        path.write_bytes(path.read_bytes()[:-9])


def on_disk() -> dict:
    """Every file and folder here, with its time."""
    found = (Path(place, name) for place, *both in os.walk(".") for some in both for name in some)
    return {str(path): path.lstat().st_mtime_ns for path in found}


def bad_inputs() -> bool:
    """Print every case that does not end as it must, and how many do."""
    cases, right = CASES.strip().splitlines(), 0
    for case in cases:
        (program, options), named = case.split(" -> ")[0].split(" ", 1), case.split(" -> ")[1]
        before, printed, complaint = on_disk(), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            code = run_here(f"{PROGRAMS[program]} {options}")
        changed = sorted(dict(before.items() ^ on_disk().items()))
        lines = complaint.getvalue().splitlines()[-1 if code == 2 else 0 :]
        if code in (1, 2) and len(lines) == 1 and named in lines[0] and not changed:
            right += 1
        else:
            print(f"{case}\n    code {code}, changed {changed}: {complaint.getvalue()}", flush=True)
            shutil.rmtree("new", ignore_errors=True)
    print(f"{right} of {len(cases)} bad inputs: one line each")
    return right == len(cases)


def main() -> None:
    torch.set_num_threads(1)  # all runs compute the same bits, and threads do not survive a fork
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of modules that are imported already
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_pictures()
        source = (ROOT / "label.py").read_text()
        for old, new in CONSTANTS.items():
            source = source.replace(f"\n{old} ", f"\n{new} ")
        Path("label.py").write_text(source)
        seconds = {name: finish(f"{COMMANDS[name]} {WHOLE[name]}") for name in COMMANDS}
        print(", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()), flush=True)
        right = [kill_series(name, took) for name, took in seconds.items()]
        make_files()
        right.append(bad_inputs())
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
