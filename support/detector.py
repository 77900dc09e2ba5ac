"""Single instances: images in which a COCO detector finds exactly one sure object (paper, section 3.5)."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
from support.files import read_weights
from support.run import find_device
from support.shards import ImageGroups, Members, digest, run_shards, say

Boxes = dict[int, list[int]]  # {image: [xmin, ymin, xmax, ymax]} in whole pixels


class Singles(NamedTuple):
    """Images to go on with."""

    members: Members
    boxes: Boxes  # of the only object, where a detector looked
    skipped: dict[int, str]  # images that cannot be read, and why


def load_detector(weights: str | None, device: torch.device) -> nn.Module:
    """torchvision's Faster R-CNN (ResNet-50, FPN, v2), COCO weights: a file, or downloaded on first use."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, fasterrcnn_resnet50_fpn_v2

    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    origin = weights or FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
    what, way_out = "the detector", "give it with --detector-weights"
    try:
        detector.load_state_dict(read_weights(origin, what, way_out))
    except (RuntimeError, TypeError) as error:  # of another network, or of none
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read {what} from {origin} ({reason}); {way_out}") from None
    return detector.to(device).eval()


def single_box(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of the only object over 0.9, whatever its class, in whole pixels inside the (W, H) image; None
    if there is not exactly one (section 3.5)."""
    sure = boxes[scores > 0.9]
    if len(sure) != 1:
        return None
    (x0, y0, x1, y1), (width, height) = sure[0].tolist(), size
    x0, y0 = (max(0, min(math.floor(v), side - 1)) for v, side in ((x0, width), (y0, height)))
    return x0, y0, max(x0 + 1, min(math.ceil(x1), width)), max(y0 + 1, min(math.ceil(y1), height))


class PhotoSet(ImageGroups):
    """The images of one group at a time as RGB bytes (3, H, W) of their own size."""

    def __getitem__(self, number: int) -> dict:
        found, skipped = self.read(number)
        photos = []
        for i, image, _ in found:
            if max(image.size) > 20 * min(image.size):
                size = f"{image.width}x{image.height} px"
                skipped.append((i, f"{self.images.paths[i]}: {size} is too narrow to detect in"))
            else:
                photos.append((i, torch.from_numpy(np.array(image)).permute(2, 0, 1)))
        return {"found": photos, "skipped": skipped}


def detect(cfg, images: data.ImageSet, members: Members) -> Singles:
    """Step 2: the images with exactly one object over 0.9, from the shards of step "detector".

    cfg: detector_weights, device, out, workers.
    """
    device = find_device(cfg.device)
    detector = load_detector(cfg.detector_weights, device)
    weights = cfg.detector_weights and digest(Path(cfg.detector_weights).read_bytes())
    settings = {"detector (--detector-weights)": weights}

    @torch.no_grad()
    def make(number: int, item: dict) -> dict:
        boxes = {}
        for i, photo in item["found"]:
            found, size = detector([photo.to(device) / 255])[0], (photo.shape[2], photo.shape[1])
            if box := single_box(found["scores"].cpu(), found["boxes"].cpu(), size):
                boxes[i] = box
        return {"boxes": boxes, "skipped": item["skipped"]}

    every = [i for some in members.values() for i in some]
    groups = [every[k : k + 16] for k in range(0, len(every), 16)]
    costs, boxes, skipped = [len(group) for group in groups], {}, {}
    for record in run_shards(cfg, "detector", "images", PhotoSet(images, groups), costs, settings, make):
        boxes |= {int(i): box for i, box in record["boxes"].items()}
        skipped |= dict(record["skipped"])
    say(f"{len(boxes)} images with exactly one object over 0.9")
    return Singles({k: [i for i in some if i in boxes] for k, some in members.items()}, boxes, skipped)
