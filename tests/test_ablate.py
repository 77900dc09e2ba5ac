"""Tables 4 and 5, and the cache of features that their rows share."""

import os
import signal
from pathlib import Path

import pytest
import torch
from test_train import SMALL, assert_same_weights, configured, losses, read_checkpoint, train

from experiments import ablate, finetune
from experiments.cache import Known, remembered
from modules import Features
from support.benchmarks import DATASETS
from support.shapes import Shapes
from train import Cascade

# ------------------------------------------------------------------------------------------------------------
# The cache


def test_cached_features_change_nothing(tmp_path):
    flags, known = ("--steps", "4", "--no-augment"), Known()
    train(*configured(tmp_path / "plain", *flags))
    cfg, _ = configured(tmp_path / "cached", *flags)
    train(cfg, build=lambda cfg: ablate.CachedCascade(cfg, known))
    assert_same_weights(tmp_path / "plain", tmp_path / "cached", rtol=1e-3, atol=1e-5)
    assert 1 < len(known) <= 24  # an image, and its silhouette, once


def test_a_cached_image_has_the_same_bits_whatever_it_was_first_seen_with():
    cascade, views = Cascade(configured(Path("unused"))[0]), torch.randn(5, 3, 64, 64)
    for first in ([3], [0, 3], [4, 1, 3, 0, 2]):
        known, device = Known(), torch.device("cpu")
        remembered(known, cascade.features, device, views[first])
        later = remembered(known, cascade.features, device, views[[2, 3]])
        assert torch.equal(later.feat[1], cascade.features(views[3:4]).feat[0])
        torch.testing.assert_close(later.feat, cascade.features(views[[2, 3]]).feat, rtol=1e-3, atol=1e-4)


def test_a_view_is_known_by_its_image_and_its_map():
    cascade = Cascade(configured(Path("unused"))[0])
    views, maps = torch.randn(2, 3, 64, 64), torch.rand(2, 8, 8)
    seen, known, device = [], Known(), torch.device("cpu")

    def compute(images, saliency=None):
        seen.append(len(images))
        return cascade.features(images, saliency)

    for saliency in (None, None, maps, maps, 1 - maps):
        found = remembered(known, compute, device, views.clone(), saliency)
        torch.testing.assert_close(found.saliency, torch.ones(2, 8, 8) if saliency is None else saliency)
        assert found.feat.shape == (2, 64, 128)
    remembered(known, compute, device, torch.stack([views[1], views[1] + 1e-6, views[0]]))
    assert seen == [1] * 7 and len(known) == 7


def test_what_does_not_fit_in_memory_is_computed_anew():
    """Room for three views of 12 KiB: the first three are kept, the others computed whenever they come."""
    seen, device, size = [], torch.device("cpu"), 3 * 32 * 32 * 4

    def compute(images):
        seen.append(float(images[0, 0, 0, 0]))
        return Features(images.flatten(2).transpose(1, 2) * 2, images.new_zeros(len(images), 0),
                        images.new_zeros(len(images), 0, 0))

    known, views = Known(3 * size + 100), torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    for _ in range(3):
        found = remembered(known, compute, device, views)
        assert torch.equal(found.feat, views.flatten(2).transpose(1, 2) * 2)
    assert seen == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert len(known) == 3 and known.free == 100
    assert sum(x.nbytes for features in known.values() for x in features[:3]) == 3 * size
    small = views[3:4, :, :2, :2]  # 48 bytes
    remembered(known, compute, device, small)
    assert len(known) == 4 and known.free == 52


def test_the_caches_of_ablation_and_of_fine_tuning_are_bounded():
    assert Known().free == 4 * 2**30
    cats = finetune.CachedCats(finetune.FinetuneConfig(backbone="random_vit8", size=128), load=False)
    assert isinstance(cats.known, Known)


# ------------------------------------------------------------------------------------------------------------
# The tables


def test_ablations_share_their_views_and_change_what_they_say(tmp_path, monkeypatch, capsys):
    shapes = Shapes("train", True)
    few = DATASETS["shapes"](None, "test")
    few.pairs = few.pairs[:3]
    for module in ("train", "experiments.ablate"):
        monkeypatch.setattr(f"{module}.keypoint_set", lambda cfg, split: few)
    monkeypatch.setattr("train.training_set", lambda cfg: shapes)
    seen: dict[int, int] = {}
    original = Cascade.features

    def counted(self, images, saliency=None):
        if saliency is not None:  # training images come with their silhouettes
            seen[self.cfg.size] = seen.get(self.cfg.size, 0) + len(images)
        return original(self, images, saliency)

    monkeypatch.setattr(Cascade, "features", counted)
    flags = ("--steps", "2", "--size", "96", "--augment", "--consensus", "3")
    cfg, out = configured(tmp_path / "all", *flags)[0], tmp_path / "all"
    ablate.ablate(cfg)
    assert seen == {96: 12, 48: 12, 72: 12}
    configs = {path.parent.name: read_checkpoint(str(path))["config"] for path in out.glob("*/last.pt")}
    full = configs.pop("0")
    changed = [{k: v for k, v in config.items() if v != full[k] and k != "out"}
               for _, config in sorted(configs.items())]
    assert changed == [
        {"consensus": 0}, {"saliency_threshold": 0.0}, {"hough": False}, {"hough_side": 3}, {"hough_side": 7},
        {"shared_attention": True}, {"size": 48}, {"size": 72},
    ]
    table = capsys.readouterr().out.split("PCK@")[-1].splitlines()[1:]
    pck = losses(out / "0")[-1]["pck"]
    assert len(table) == 11 and all(line.startswith(("full", "ours", "4 (", "5 (")) for line in table)
    for line, stage in ((table[0], "pixel"), (table[9], "region"), (table[10], "image")):
        assert line.split()[-3:] == [f"{v:.1f}" for v in pck[stage]]
    # A second call trains what is missing (4), was cut off (5) or trained otherwise (6): same table.
    (out / "4" / "last.pt").unlink()
    (out / "5" / "metrics.jsonl").write_text((out / "5" / "metrics.jsonl").read_text()[:-9])
    state = torch.load(out / "6" / "last.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"lr": 1.0}}, out / "6" / "last.pt")
    seen.clear()
    ablate.ablate(cfg)
    assert seen == {96: 12}
    again = capsys.readouterr().out
    assert again.count("finished before") == 6 and again.split("PCK@")[-1].splitlines()[1:] == table
    train(*configured(tmp_path / "plain", *flags))
    assert_same_weights(out / "0", tmp_path / "plain", rtol=1e-3, atol=1e-5)


def test_an_interrupted_row_ends_the_program_with_the_signals_code(tmp_path, monkeypatch, capsys):
    few = DATASETS["shapes"](None, "test")
    few.pairs = few.pairs[:2]
    for module in ("train", "experiments.ablate"):
        monkeypatch.setattr(f"{module}.keypoint_set", lambda cfg, split: few)
    steps = []

    def interrupted(self, src, trg, labels, forward=Cascade.forward):
        steps.append(1)
        if len(steps) == 3:  # the first step of the second row
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, src, trg, labels)

    flags = *SMALL, "--val", "shapes", "--size", "96", "--steps", "2", "--out", str(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(Cascade, "forward", interrupted)
        ablate.main(flags)
    assert stopped.value.code == 143
    said = capsys.readouterr().out
    assert "the rows before it are kept: the same command goes on with this one" in said
    assert read_checkpoint(str(tmp_path / "0" / "last.pt"))["step"] == 2
    assert read_checkpoint(str(tmp_path / "1" / "last.pt"))["step"] == 1


@pytest.mark.parametrize("record", ["", "{", "null", "[]", "{}", '{"pck": {}}'])
def test_a_damaged_record_of_a_row_is_none(tmp_path, record):
    cfg, _ = configured(tmp_path, "--steps", "1")
    train(cfg)
    (tmp_path / "metrics.jsonl").write_text(record)
    assert ablate.measured(cfg) is None


@pytest.mark.parametrize("flags, words", [
    ("--val shapes --stages 2", "every row trains all three stages"),
    ("--val shapes --checkpoint last.pt", "every row trains all three stages from the start"),
    ("--val shapes --size 72", "--size 72: a row trains at half of it, and a region needs 80"),
    ("--val none", "every row is measured on --val: name one"),
    ("--resume absent.pt", "no such checkpoint: absent.pt"),
])  # fmt: skip
def test_what_cannot_be_ablated_is_one_line(tmp_path, flags, words):
    with pytest.raises(SystemExit) as error:
        ablate.main(["--dataset", "shapes", "--device", "cpu", "--out", str(tmp_path), *flags.split()])
    assert words in str(error.value) and str(error.value).startswith("error: ")
    assert "\n" not in str(error.value)


def test_a_row_is_not_resumed_by_hand(tmp_path):
    train(*configured(tmp_path, "--steps", "1"))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"steps": 2}}, tmp_path / "last.pt")  # as if stopped
    with pytest.raises(SystemExit, match="--resume: give the same command again"):
        ablate.main(["--resume", str(tmp_path / "last.pt")])
