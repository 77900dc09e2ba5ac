"""Features that are kept: a view passes a frozen backbone once, however many steps or runs show it again."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from modules import Features

LIMIT = 4 * 2**30  # bytes of features that are kept; at the paper's scale all would be 504 GB


class Known(dict[bytes, Features]):
    """Features of single views in the memory of the CPU, by the views' own bytes: the first that fit."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        self.free = limit  # bytes

    def add(self, key: bytes, features: Features) -> None:
        """Keep them where they fit; else the view is computed anew when it comes again."""
        size = sum(x.nbytes for x in features[:3])
        if size <= self.free:
            self[key] = features
            self.free -= size


def remembered(known: Known, compute: Callable[..., Features], device: torch.device,
               images: Tensor, saliency: Tensor | None = None) -> Features:
    """compute(images) or compute(images, saliency), on a device, of views that `known` does not hold.

    images (B, 3, S, S), saliency (B, h, w). What is computed joins `known` as long as there is room. A view
    is computed alone, so that the last bits of its features do not depend on its company.
    """
    found = []
    for k in range(len(images)):
        view = [x[k : k + 1].cpu().contiguous() for x in (images, saliency) if x is not None]
        digest = hashlib.blake2b(bytes([torch.is_autocast_enabled()]))  # bfloat16 gives other features
        for x in view:
            digest.update(x.numpy())
        features = known.get(key := digest.digest())
        if features is None:
            features = compute(*view).map(lambda x: x[0].cpu())
            known.add(key, features)
        found.append(features)
    return found[0].map(lambda *x: torch.stack(x).to(device), *found[1:])
