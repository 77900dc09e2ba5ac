"""What experiments/facing.py and experiments/selection.py measure, against what shapes know of themselves."""

import pytest
import torch

import data
from experiments import facing, selection
from modules import Pairs
from support.label_report import face_alike
from support.shapes import shapes_pairs
from train import Cascade, Config, save


@pytest.fixture(scope="module")
def keypoints() -> data.KeypointSet:
    """The 80 validation couples of shapes, drawn once."""
    return shapes_pairs("val")


def test_facing_read_off_keypoints_is_that_of_the_drawn_polygons(keypoints):
    seen = set()
    for pair in keypoints.pairs:
        plain, mirrored = facing.misfits(pair)
        assert min(plain, mirrored) >= 0 and max(plain, mirrored) <= 1 + 1e-9
        if abs(plain - mirrored) > facing.CLEAR:
            alike = face_alike(keypoints.images, {"src": pair.src, "trg": pair.trg})
            assert (plain < mirrored) == alike
            seen.add(alike)
    assert seen == {True, False}


def test_a_similarity_explains_points_that_it_moved_and_its_mirror_those_that_were_flipped():
    torch.manual_seed(0)
    src = torch.rand(6, 2) * 50
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    box = (0.0, 0.0, 50.0, 50.0)
    moved = 1.7 * src @ turn + 3
    plain, mirrored = facing.misfits(data.KeypointPair(0, 1, src, moved, "x", box, box))
    assert plain < 1e-9 < 0.05 < mirrored
    flipped = (src * torch.tensor([-1.0, 1.0])) @ turn * 0.4
    plain, mirrored = facing.misfits(data.KeypointPair(0, 1, src, flipped, "x", box, box))
    assert mirrored < 1e-9 < 0.05 < plain


def test_a_selected_pair_is_judged_where_it_starts_in_a_keypoints_cell(keypoints):
    pair, grid = keypoints.pairs[0], (16, 16)
    ends = [data.pixels_to_cells(kps, keypoints.size(i), grid).round().long()
            for kps, i in ((pair.src_kps, pair.src), (pair.trg_kps, pair.trg))]
    flat = [cells[:, 1] * 16 + cells[:, 0] for cells in ends]
    occupied = set(flat[0].tolist())
    empty = next(c for c in range(256) if c not in occupied)
    src = torch.tensor([[flat[0][0], flat[0][0], empty, flat[0][0]]])
    trg = torch.tensor([[flat[1][0], (flat[1][0] + 120) % 256, 7, flat[1][0]]])
    chosen = Pairs(src, trg, torch.ones(1, 4), torch.tensor([[True, True, True, False]]))
    right = selection.judge(chosen, keypoints, 0, [grid, grid], (0.1,))
    points = int((flat[0] == flat[0][0]).sum())  # keypoints in the same cell are judged one by one
    assert len(right) == 2 * points  # not the pair in an empty cell, nor the one that only fills up
    assert right[:2, 0].tolist() == [True, False]


def test_both_print_their_tables(keypoints, tmp_path, capsys, monkeypatch):
    eight = data.KeypointSet("shapes", keypoints.images, keypoints.pairs[:4] + keypoints.pairs[8:12])
    monkeypatch.setattr("evaluate.DATASETS", {"shapes": lambda root, split: eight})
    cascade = Cascade(Config(backbone="random_vit8", size=64, ffn_ratio=0.25, candidates=6, facing=True))
    optimizer = torch.optim.SGD([p for p in cascade.parameters() if p.requires_grad], 0.1)
    save(tmp_path / "last.pt", cascade, optimizer, 1)
    line = ["--dataset", "shapes", "--checkpoint", str(tmp_path / "last.pt"), "--device", "cpu"]
    facing.main(line)
    told = capsys.readouterr().out
    assert "facing by pair: right in all and in clear pairs" in told and "mirrored by truth" in told
    selection.main(line)
    rows = capsys.readouterr().out.splitlines()[1:]
    names = ["plain", "image, untrained", "region, untrained", "image, trained", "region, trained"]
    assert [row[:20].strip() for row in rows] == names
    counts = [float(row.split()[-1]) for row in rows]
    assert counts[1] == counts[3] and counts[1] <= 6 and 0 < counts[0] <= 16  # nothing was trained
    assert [row.split()[-5:] for row in rows[1:3]] == [row.split()[-5:] for row in rows[3:]]


def test_selection_wants_a_checkpoint():
    with pytest.raises(ValueError, match="give --checkpoint"):
        selection.main(["--dataset", "shapes"])
