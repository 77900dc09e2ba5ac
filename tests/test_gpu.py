"""What would fail on a GPU alone, without one: tensors that stay on the wrong device; and tests/gpu.py.

A fake GPU computes on the CPU, refuses what CUDA refuses (an operation between its tensors and the CPU's),
and so runs whole programs, with loops over what they find. Two things it cannot: the backward pass, which
PyTorch's engine hands to the real device, and bfloat16, which autocast leaves off where there is no GPU.
"""

import dataclasses
import json
import warnings
from functools import cache
from types import SimpleNamespace

import gpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import label
import modules
import train
from data import KeypointSet
from evaluate import load_methods, predict, shared_options
from experiments import finetune
from modules import greedy_selection, hough_matching
from support import match
from support.dense import Dense
from support.ours import both_faces
from support.presets import PRESETS
from support.shapes import Shapes, draw_shape, shapes_pairs
from train import Cascade, Config

CUDA, aten = torch.device("cuda", 0), torch.ops.aten


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU; its numbers are held on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnGPU":
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=CUDA, **like)
        self.held = held
        return self

    def tolist(self) -> list:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of a fake GPU's tensor after the fake GPU is gone")


class FakeGPU(TorchDispatchMode):
    """Runs every operation on the CPU, and raises RuntimeError where it mixes devices.

    CUDA lets the CPU's scalars in, and its indices, which it copies unasked: indices are refused here. It
    stands above a FakeTensorMode, under which PyTorch does not look for a real GPU.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), function.overloadpacket
        if op is aten._fused_sdp_choice:
            return 0  # attention in plain operations: CUDA's own kernels are not there
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        on_gpu = bool(ours)
        if op is aten.copy_:
            on_gpu = isinstance(args[0], OnGPU)
        elif op is not aten._to_copy and ours and any(x.dim() and not isinstance(x, OnGPU) for x in tensors):
            raise RuntimeError(f"{function}: tensors of the GPU and of the CPU")
        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = torch.device("cpu")
        known = {id(x.held): x for x in ours}  # what works in place gives back the tensor it was given
        args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
        with unset_fake_temporarily():
            found = function(*args, **kwargs)

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else OnGPU(x)

        return tree_map(wrap, found) if on_gpu else found


@pytest.fixture
def fake_gpu(monkeypatch):
    """The test runs beside a fake GPU, and without a real one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # no autocast
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # nor pinned memory
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter is of OnGPU's kind, too
    # the fake GPU's are not to outlive it
    tables = modules.relative_index, modules.attention_mask, modules.cell_distances
    for table in tables:
        table.cache_clear()
    with FakeTensorMode(), FakeGPU(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(CUDA is not available|no accelerator).*")
        yield
    for table in tables:
        table.cache_clear()
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def cascade(device: str = "cuda", moved: float = 0.02, **changes) -> Cascade:
    """A small cascade. moved: by how much its weights are off the zeros that they start with."""
    torch.manual_seed(0)
    small = {"size": 64, "candidates": 6, "pairs": 4, "batch": 2, "augment": False, "workers": 0}
    found = Cascade(Config(**PRESETS["quick"] | small | changes))
    for p in found.parameters():
        p.data += moved * p.requires_grad * torch.randn_like(p)
    return found.to(device)


@cache
def val_pairs() -> KeypointSet:
    """Couples of shapes, drawn once."""
    return shapes_pairs("val")


OURS = dict(axes=64, consensus=3, facing=True, frozen_share=0.5, loop_radius=1.5, hough=False)
LITERAL = {k: v for k, v in PRESETS["literal"].items() if k in ("residual", "ffn_ratio", "temperature", "ap")}
BOTH = pytest.mark.parametrize("changes", [{}, OURS], ids=["quick", "ours"])


def test_the_fake_gpu_refuses_what_cuda_refuses(fake_gpu):
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device="cuda").view(2, 3)
    assert there.device == CUDA and there.sum().item() == 15 and (there + torch.tensor(1.0)).device == CUDA
    assert torch.equal(there.cpu(), here) and type(here.to("cuda")) is OnGPU
    there[0, 1:] = here[1, 1:].to("cuda")
    assert there.tolist() == [[0, 4, 5], [3, 4, 5]] and there.nonzero().device == CUDA
    index = torch.tensor([1], device="cuda")
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here @ there.T,
        lambda: here[index],
        lambda: there[index.cpu()],
        lambda: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda: there.index_put_((index,), here[:1]),
        lambda: torch.where(there > 1, here, there),
    ):
        with pytest.raises(RuntimeError, match="tensors of the GPU and of the CPU"):
            mixed()


@pytest.mark.parametrize(
    "changes",
    [{}, OURS, LITERAL, {"stages": 2}, {"only": "region"}, {"shared_attention": True, "saliency": "none"}],
    ids=["quick", "ours", "literal", "two stages", "one alone", "shared"],
)
def test_a_step_of_training(fake_gpu, changes):
    losses = []
    for device in ("cuda", "cpu"):
        model = cascade(device, **changes)
        batch = next(train.batches(model.cfg, Shapes("train"), 8, 0, torch.device("cpu")))
        views, maps = (torch.cat([batch[f"src_{x}"], batch[f"trg_{x}"]]) for x in ("img", "sal"))
        features = both_faces if model.cfg.facing else Cascade.features
        both = features(model, views, maps if model.cfg.saliency == "auto" else None)
        loss, parts = model(both.map(lambda x: x[:2]), both.map(lambda x: x[2:]), batch["label"].to(device))
        assert {loss.device.type, *(x.device.type for x in parts.values())} == {device}
        losses.append([x.item() for x in (loss, *parts.values())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)


def test_selection_in_a_gpus_rounds(fake_gpu):
    """Several before it is asked what is left; with ties, of all cells and of some."""
    assert torch.ones(1, device="cuda").is_cuda
    generator = torch.Generator().manual_seed(0)
    for sides in ((5, 6, 7, 4), (4, 6, 5, 8)):
        volume = torch.rand(3, *sides, generator=generator)
        masks = [torch.rand(3, *side, generator=generator) < 0.7 for side in (sides[:2], sides[2:])]
        for some in (volume, (4 * volume).round(), torch.ones_like(volume), hough_matching(volume)):
            for given in ((some,), (some, *masks)):
                found = greedy_selection(*(x.to("cuda") for x in given))
                for ours, plain in zip(found, greedy_selection(*given)):
                    assert ours.device == CUDA and torch.equal(ours.cpu(), plain)
        found = hough_matching(volume.to("cuda"))
        assert found.device == CUDA and torch.equal(found.cpu(), hough_matching(volume))


def test_a_matcher_goes_to_the_gpu(fake_gpu, monkeypatch):
    model = cascade("cpu", **OURS)
    state = {"config": dataclasses.asdict(model.cfg), "model": model.trained_state()}
    state["backbone"] = train.fingerprint(model.backbone)
    monkeypatch.setattr(train, "read_checkpoint", lambda *_: state)
    for words, same in (("--checkpoint last.pt", True), ("", False)):
        args = shared_options("").parse_args(f"--dataset shapes --device cuda {words}".split())
        loaded = load_methods(args)[0].state_dict()
        assert {x.device for x in loaded.values()} == {CUDA}
        assert not same or all(torch.equal(loaded[k].cpu(), x) for k, x in model.state_dict().items())


def test_the_training_loop(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(train, "save", lambda path, model, optimizer, step: None)
    monkeypatch.setattr(train, "training_set", lambda cfg: Shapes("val"))  # the smallest
    cfg = cascade("cpu", **OURS).cfg
    cfg = dataclasses.replace(cfg, device="cuda", steps=2, log_every=1, val="none", out=str(tmp_path))
    trained = train.train(cfg)
    assert {x.device for x in trained.state_dict().values()} == {CUDA}
    assert (tmp_path / "metrics.jsonl").read_text().count('"loss"') == 2


@pytest.mark.parametrize("semi", [False, True], ids=["cats", "semimatch"])
def test_fine_tuning(fake_gpu, tmp_path, semi):
    words = "--dataset shapes --backbone random_vit8 --levels 0 --size 64 --batch 2 --annotated 4 --out"
    flags = "--semi --semi-threshold 0 --augment --no-cache-features".split() if semi else []
    cfg, _ = finetune.parse_config([*words.split(), str(tmp_path / "run"), *flags])
    cfg, found = dataclasses.replace(cfg, projection=16, heads=4), []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        model, phase = finetune.CachedCats(cfg).to(device), SimpleNamespace(train=val_pairs(), numbers=[0, 1])
        batch = next(finetune.batches(cfg, phase, 8, 0, torch.device("cpu")))
        batch = {key: value.to(device) for key, value in batch.items() if key != "skipped"}
        loss, parts = finetune.batch_loss(model, batch, cfg)
        places = predict(model.eval(), val_pairs(), ["cats", "kernel"], 2, True, numbers=[0])
        numbers = loss, *parts.values(), *(x[0].sum() for x in places.values())
        found.append([x.item() for x in numbers])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


METHODS = ["nn", "hough", "consensus", "best", "image", "region", "pixel", "best-image", "best-pixel"]


@BOTH
def test_reading_and_transfer(fake_gpu, changes):
    keypoints, found = val_pairs(), []
    for device in ("cuda", "cpu"):
        model = cascade(device, **changes).eval()
        places = predict(model, keypoints, METHODS, 2, True, numbers=[0, 1])
        places["dense"] = predict(Dense(model), keypoints, ["best"], 1, True, numbers=[0])["best"]
        places["sure"] = predict(model, keypoints, ["best"], 2, True, numbers=[0], sure=True)["best"]
        found.append(places)
    for method, places in found[0].items():
        for ours, plain in zip(places, found[1][method]):
            assert torch.allclose(ours, plain, rtol=1e-3, atol=0.05), method


def test_nothing_is_done_on_the_cpu(fake_gpu):
    """Where all of a computation strays, no operation mixes devices."""
    model = cascade(**OURS).eval()
    for matcher, methods in ((model, METHODS), (Dense(model), ["consensus"])):
        both = both_faces(matcher, torch.randn(2, 3, 64, 64))
        src, trg = both.map(lambda x: x[:1]), both.map(lambda x: x[1:])
        assert {x.device for x in (*both[:3], *both.mirror[:3])} == {CUDA}
        for method in methods:
            assert method == "region" or matcher.volume(src, trg, method).device == CUDA


def test_attention_as_saliency_on_images_that_are_not_square(fake_gpu):
    model = cascade(saliency="attention").eval()
    features = model.features(torch.randn(2, 3, 64, 48))
    assert {x.device for x in features[:3]} == {CUDA} and features.grid == (8, 6)


@BOTH
def test_labelling(fake_gpu, changes):
    """Of one view over and over, so that there is something to select, and of different ones."""
    cfg, found = label.LabelConfig(facing=bool(changes), pairs=2), []
    for device in ("cuda", "cpu"):
        model = cascade(device, 0, **changes).eval()
        item = label.CliqueSet(Shapes("train"), [list(range(4))], model)[0]
        same = item | {name: item[name][:1].expand_as(item[name]) for name in ("views", "cells")}
        for some, boxes in ((item, {0: (10, 10, 100, 100)}), (same, {})):
            clique, empty, *maps = label.map_clique(model, some, boxes, cfg, matched=True)
            assert clique.foreground.device.type == maps[0].device.type == device and not empty
            via, back, real = label.closed_loops(maps[0], 0)
            errors = label.match_errors(clique, *maps, 0)
            assert {x.device.type for x in (via, back, real, errors)} == {device}
            found.append((label.image_errors(clique, maps[0]), label.pair_matches(clique, *maps, cfg)))
    ours, plain = (found[k][1] for k in (1, 3))
    assert len(plain) > 0 and [p["src_kps"] for p in ours] == [p["src_kps"] for p in plain]
    assert found[0][0] == pytest.approx(found[2][0], abs=1e-5)


@BOTH
def test_bfloat16_is_for_backbone_and_stages_alone(monkeypatch, changes):
    """What a GPU's autocast would do, on the CPU: none of what follows them is rounded to it."""
    for module in (modules, train):
        monkeypatch.setattr(module, "autocast", lambda x, amp: torch.autocast("cpu", torch.bfloat16, amp))
    cfg, found = label.LabelConfig(facing=bool(changes), pairs=2), []
    for amp in (True, False):
        model = cascade("cpu", amp=amp, **changes).eval()
        item = label.CliqueSet(Shapes("train"), [list(range(4))], model)[0]
        both = both_faces(model, item["views"], item["cells"])
        src, trg = both.map(lambda x: x[:2]), both.map(lambda x: x[2:])
        volumes = [model.volume(src, trg, stage) for stage in ("nn", "image", "pixel")]
        regions = model.image.regions(model.image.select(volumes[1], src, trg), src, trg)
        volumes.append(model.region(regions.src, regions.trg)[:1])
        clique, _, *maps = label.map_clique(model, item, {}, cfg, matched=True)
        region = model.transfer(src, trg, torch.full((2, 1, 2), 3.0), "region")
        loss, _ = model(src, trg, torch.tensor([0, 1]))
        found.append([*volumes, maps[0], region, loss])
    for k, (half, full) in enumerate(zip(*found)):
        assert half.dtype == full.dtype == torch.float32
        assert not torch.equal(half, full) and (k > 3 or (half - full).abs().max() < 0.1), k


def test_two_pictures(fake_gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        draw_shape("fish", ord(name[0]))["image"].resize((128, 96)).save(name)
    for flags in ([], ["--points", "40,52", "60,20.5", "--warp", "warp.png"]):
        found = []
        for device in ("cuda", "cpu"):
            model = cascade(device, saliency="attention").eval()
            argv = ["a.png", "b.png", "--no-dense", "--json", "found.json", *flags]
            match.main(argv, lambda args, model=model: (model, ["best-pixel"]))
            matches = json.loads((tmp_path / "found.json").read_text())["matches"]
            found.append([value for m in matches for value in (*m["target"], m["confidence"])])
        assert len(found[0]) >= 6 and found[0] == pytest.approx(found[1], abs=0.05)


# ------------------------------------------------------------------------------------------------------------
# tests/gpu.py


SMALLEST = gpu.SMALL._replace(
    preset=PRESETS["quick"] | {"size": 64, "candidates": 6},
    cliques=(4, 4),
    transfers=4,
    pairs=4,
    images=4,
    side=8,
    steps=4,
    repeats=1,
)


def table(path) -> dict[str, list[str]]:
    """The written rows: check, then CPU, GPU, figure and verdict."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 5 for row in rows)
    return {row[0]: row[1:] for row in rows[2:]}


GPU_ALONE = ("bfloat16 against float32", "training step, compiled")
# Programs of their own, and what differs from another check by torch.compile alone.
OTHERS = ("stopped and resumed", "training step, compiled")


@pytest.mark.parametrize("name", [name for name in gpu.CHECKS if name not in OTHERS])
def test_the_gpus_half_on_a_fake_gpu(fake_gpu, monkeypatch, name):
    def once(work, device, repeats):
        work()
        return 1.0

    monkeypatch.setattr(gpu, "milliseconds", once)
    monkeypatch.setattr(gpu, "PAPER", SMALLEST)  # what only its rows say
    monkeypatch.setattr(gpu, "SPAIR", 4)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    for call in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, call, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    row = gpu.CHECKS[name](SMALLEST, CUDA)
    gpu.oblong.cache_clear()
    assert row.gpu and row.figure and row.ok, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_the_cpus_half_runs_and_says_so(tmp_path, capsys, monkeypatch):
    def finished(command):  # in this process, which has imported everything
        train.main([str(word) for word in command[2:]])

    monkeypatch.setattr(gpu, "finished", finished)
    assert gpu.main(["--out", str(tmp_path / "gpu.md")], SMALLEST) == 0
    printed, rows = capsys.readouterr().out.splitlines(), table(tmp_path / "gpu.md")
    assert printed[0].startswith("no GPU here, the CPU's half alone")
    assert "failed" in (tmp_path / "gpu.md").read_text().splitlines()[0]
    assert rows.keys() == gpu.CHECKS.keys()
    for name, (cpu, on_gpu, figure, verdict) in rows.items():
        assert (on_gpu, verdict) == (gpu.NOT_RUN, "ok"), name
        assert cpu and figure or name in GPU_ALONE, name


def test_a_failed_check_is_a_row_and_the_exit_code(tmp_path, monkeypatch):
    def broken(sizes, device):
        raise ValueError("no | such\nthing")

    rows = {"misses": gpu.Row("1 ms", "", "", False), "holds": gpu.Row("", "")}
    checks = {name: lambda *_, row=row: row for name, row in rows.items()}
    monkeypatch.setattr(gpu, "CHECKS", {"raises": broken} | checks)
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) == 1
    rows = table(tmp_path / "gpu.md")
    assert [row[-1] for row in rows.values()] == ["FAILED", "FAILED", "ok"]
    assert rows["raises"][2] == "ValueError: no / such"


def test_what_differs_between_devices_fails():
    """The comparison itself, between two kinds of CPU."""
    other = torch.device("cpu", 0)
    for off, tolerance, ok in ((0.0, 0, True), (1e-3, 0, False), (1e-3, 1e-2, True), (0.1, 1e-2, False)):

        def work(where, off=off):
            return torch.ones(3) + off * (where == other)

        row = gpu.compare(work, tolerance, SMALLEST, other)
        assert row.ok is ok, row


def test_a_compiled_step_runs():
    """Only what torch.compile makes of a stage's MVAM; the code for a device takes a minute."""
    sizes = SMALLEST._replace(preset=SMALLEST.preset | {"stages": 1})
    assert gpu.training_step(True, sizes, gpu.CPU, backend="eager").ok
