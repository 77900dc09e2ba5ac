"""Views of annotated pairs, as CATs and SemiMatch are trained on: colour changes, crops, the strong view."""

import bisect
import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

import data
from experiments import semimatch
from experiments.cats import GRID, flow_target, squashed


def photometric(p: float, blur: bool = False) -> v2.Compose:
    """CATs' photometric changes, each with probability p; SemiMatch's strong view blurs, not sharpens.

    Their ranges are those of albumentations, which CATs uses; Sharpen is torchvision's, of factor 1.5 instead
    of a drawn one, and Blur a Gaussian.
    """
    sharpness = v2.RandomApply([v2.GaussianBlur(7)], p) if blur else v2.RandomAdjustSharpness(1.5, p)
    return v2.Compose(
        [
            v2.RandomGrayscale(p),
            v2.RandomPosterize(4, p),
            v2.RandomEqualize(p),
            sharpness,
            v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)], p),
            v2.RandomSolarize(128, p),
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.2)], p),
        ]
    )


def random_crop(size: tuple[int, int], box: data.Box, rng: np.random.Generator) -> data.Box:
    """CATs' crop: each side anywhere between the image's and the box's, in whole pixels of a (W, H) image."""
    width, height = size
    x0, y0 = (int(np.clip(v, 0, side - 1)) for v, side in zip(box[:2], size))
    x1, y1 = (int(np.clip(math.ceil(v), low + 1, side)) for v, low, side in zip(box[2:], (x0, y0), size))
    left, top = rng.integers(0, x0 + 1), rng.integers(0, y0 + 1)
    return tuple(map(float, (left, top, rng.integers(x1, width + 1), rng.integers(y1, height + 1))))


def to_view(points: Tensor, crop: data.Box, cells: int) -> Tensor:
    """Points (..., 2) in pixels of an image to those of its view of cells x cells; clamped to it."""
    x0, y0, x1, y1 = crop
    moved = data.pixels_to_cells(points - torch.tensor([x0, y0]), (x1 - x0, y1 - y0), (cells, cells))
    return moved.clamp(-0.5, cells - 0.5)


class KeypointViews(Dataset):
    """Pairs with points as training sees them. Keys are (epoch, place in the epoch, pair), so that everything
    random follows from the key and the seed: the order of work, workers and resumption change nothing.

    numbers: the pairs that are used, ascending. cfg: finetune.FinetuneConfig.
    """

    def __init__(self, keypoints: data.KeypointSet, numbers: list[int], cfg, patch: int):
        self.keypoints, self.numbers, self.cfg, self.patch = keypoints, numbers, cfg, patch
        self.weak = photometric(cfg.semi_photometric if cfg.semi else 0.2)
        self.strong = photometric(cfg.semi_photometric, cfg.semi_blur)
        self.load = functools.lru_cache(2048)(keypoints.load) if cfg.cache_features else keypoints.load

    def epoch_pairs(self, seed: int, epoch: int) -> list[tuple[int]]:
        """All pairs in random order; fewer than a batch are repeated until they fill one."""
        rng = np.random.default_rng((seed, epoch))
        repeats = math.ceil(self.cfg.batch / len(self.numbers))
        return [(n,) for _ in range(repeats) for n in rng.permutation(self.numbers).tolist()]

    def side(self, image: int, points: Tensor, box: data.Box, rng: np.random.Generator) -> tuple:
        """One image of a pair: the picture, its crop, points and box (4,) in cells of the crop's view."""
        picture = self.load(image)[0]
        # a crop loses neither the object nor a point; a box has edges, points are centres of pixels
        around = torch.cat([torch.tensor(box).view(2, 2), points + 0.5])
        crop = (0.0, 0.0, *map(float, picture.size))
        if self.cfg.augment and rng.random() < 0.5:
            crop = random_crop(picture.size, (*around.amin(0).tolist(), *around.amax(0).tolist()), rng)
        edges = to_view(torch.tensor(box).view(2, 2) - 0.5, crop, GRID).flatten()
        return picture, crop, to_view(points, crop, GRID), edges

    def view(self, picture, crop: data.Box, change: v2.Compose | None) -> Tensor:
        """A crop as the network wants it, (3, S, S)."""
        view = squashed(change(picture) if change else picture, self.cfg.size, crop)
        return data.prepare(view, None, self.cfg.size, self.patch)[0]

    def item(self, number: int, rng: np.random.Generator) -> dict:
        """The views of one pair and what they should be matched to."""
        cfg, pair, weak = self.cfg, self.keypoints.pairs[number], self.weak if self.cfg.augment else None
        src, src_crop, src_kps, src_box = self.side(pair.src, pair.src_kps, pair.src_box, rng)
        trg, trg_crop, trg_kps, trg_box = self.side(pair.trg, pair.trg_kps, pair.trg_box, rng)
        flow, valid = flow_target(src_kps, trg_kps, cfg.original_target)
        item = {"src": self.view(src, src_crop, weak), "trg": self.view(trg, trg_crop, weak)}
        item |= {"flow": flow, "valid": valid}
        if cfg.semi:
            pixel = cfg.size / GRID
            kps, edges = (trg_kps + 0.5) * pixel - 0.5, ((trg_box + 0.5) * pixel).tolist()
            strong = self.view(trg, trg_crop, self.strong)
            strong = semimatch.key_out(strong, kps, tuple(edges), cfg.semi_keyout, rng)
            affine, offsets = semimatch.draw_warp(rng, cfg.semi_tps)
            item |= {"plain": self.view(trg, trg_crop, None), "strong": strong}
            item |= {"affine": affine, "offsets": offsets, "src_box": src_box, "trg_box": trg_box}
        return item

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """What is at the key's pair or, if that cannot be read, at the next; `skipped` names the file."""
        epoch, place, number = key
        at, skipped = bisect.bisect_left(self.numbers, number), []
        for turn in range(len(self.numbers)):
            other = self.numbers[(at + turn) % len(self.numbers)]
            rng = np.random.default_rng((self.cfg.seed, epoch, place))
            with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
                torch.default_generator.manual_seed(int(rng.integers(2**62)))
                try:
                    return self.item(other, rng) | {"skipped": "\n".join(skipped)}
                except ValueError as error:
                    skipped.append(str(error))
        raise ValueError(f"no pair can be read; the first: {skipped[0]}")
