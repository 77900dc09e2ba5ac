"""Features that are kept: a view passes a frozen backbone once, however many steps or runs show it again."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from modules import Features


def remembered(known: dict[bytes, Features], compute: Callable[..., Features], device: torch.device,
               images: Tensor, saliency: Tensor | None = None) -> Features:
    """compute(images) or compute(images, saliency), on a device, of views that `known` does not hold yet.

    images (B, 3, S, S), saliency (B, h, w). known: features of single views in the memory of the CPU, by the
    views' own bytes; what is computed joins it. A view is computed alone, so that the last bits of its
    features do not depend on its company.
    """
    keys = []
    for k in range(len(images)):
        view = [x[k : k + 1].cpu().contiguous() for x in (images, saliency) if x is not None]
        digest = hashlib.blake2b(bytes([torch.is_autocast_enabled()]))  # bfloat16 gives other features
        for x in view:
            digest.update(x.numpy())
        keys.append(digest.digest())
        if keys[-1] not in known:
            known[keys[-1]] = compute(*view).map(lambda x: x[0].cpu())
    return Features(*(torch.stack(x).to(device) for x in zip(*(known[key] for key in keys))))
