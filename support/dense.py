"""Dense reading: images at half the patch's stride, as four views of each, moved by half a patch.

What overlapping patches give (Amir et al., 2021) for a fraction of their attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Features
from support.ours import Reading

# Where the four views lie in a grid of twice their cells: every second row and column.
VIEWS = [(slice(y, None, 2), slice(x, None, 2)) for y in (0, 1) for x in (0, 1)]


class Dense:
    """A cascade in twice the cells a side; it takes the cascade's place in evaluate.predict.

    Features are those of the four views, interleaved; a volume is that of every view of the source with every
    view of the target, as the stages know them, interleaved likewise. The border is repeated. The region
    stage, which refines in whole cells, has no dense reading.
    """

    def __init__(self, cascade) -> None:
        self.cascade, self.cfg, self.backbone = cascade, cascade.cfg, cascade.backbone

    def features(self, images: Tensor, maps: Tensor | None = None) -> Features:
        """Images (B, 3, H, W) and maps (B, h, w) or None to Features of 2H/patch x 2W/patch cells; the token
        is the mean of four."""
        (height, width), half = images.shape[-2:], self.backbone.patch // 2
        first = (half + 1) // 2  # cells then lie where those of a grid of twice the cells do, to half a pixel
        padded = F.pad(images, (first, half - first, first, half - first), mode="replicate")
        corners = [(y, x) for y in (0, half) for x in (0, half)]
        views = [self.cascade.features(padded[..., y : y + height, x : x + width]) for y, x in corners]
        h, w = views[0].grid
        cells = views[0].feat.new_empty(len(images), 2 * h, 2 * w, views[0].feat.shape[-1])
        saliency = cells.new_empty(cells.shape[:3])
        for (y, x), view in zip(VIEWS, views):
            cells[:, y, x], saliency[:, y, x] = view.feat.unflatten(1, (h, w)), view.saliency
        if maps is not None:
            saliency = F.interpolate(maps[:, None], cells.shape[1:3], mode="bilinear")[:, 0].to(cells)
        token = torch.stack([view.token for view in views]).mean(0)
        return Features(cells.flatten(1, 2), token, saliency)

    def volume(self, src: Features, trg: Features, method: str) -> Tensor:
        """Features of `features` to a volume of their cells, (B, Hs, Ws, Ht, Wt)."""
        if method.startswith("best"):
            return self.best(src, trg, method).volume
        if method == "nn":  # a cell's cosines know nothing of views
            return self.cascade.volume(src, trg, method)
        s, t = (x.feat.unflatten(1, x.grid) for x in (src, trg))
        corr = s.new_empty(len(s), *src.grid, *trg.grid)
        for ys, xs in VIEWS:
            for yt, xt in VIEWS:
                views = (
                    Features(cells[:, y, x].flatten(1, 2), image.token, image.saliency[:, y, x])
                    for cells, image, y, x in ((s, src, ys, xs), (t, trg, yt, xt))
                )
                corr[:, ys, xs, yt, xt] = self.cascade.volume(*views, method)
        return corr

    def best(self, src: Features, trg: Features, method: str) -> Reading:
        """Our reading of such a volume, train.Cascade.best."""
        return self.cascade.best(src, trg, method, self.volume)

    @torch.no_grad()
    def transfer(self, src: Features, trg: Features, points: Tensor, method: str) -> Tensor:
        """Source to target: points (B, n, 2) as (x, y) in source cells to target cells."""
        return self.cascade.transfer(src, trg, points, method, self.volume)
