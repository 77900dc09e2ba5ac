"""Images with class labels, same-class pairs of views of them, annotated pairs, and coordinate conversions.

Paper, section 4.1. Training sets give images with class labels and pair them within a class; keypoint sets
give image pairs with annotated points and are only ever scored on. Readers of the benchmarks:
support/benchmarks.py.

Keypoints are (x, y) with pixel centres at integers. Every image is squashed to S x S and cut into h x w
cells, so a cell's centre is ((i + 0.5) * W / w - 0.5) in the pixels of the image itself, see
`pixels_to_cells` and `cells_to_pixels`.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone was trained with
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
UNREAD = ".arw .avif .cr2 .dng .gif .heic .heif .jfif .jp2 .jxl .nef .ppm .psd .svg .tga .tif .tiff".split()
ORIENTATION = 0x0112  # the EXIF tag: 1 as stored, 2 to 8 mirrored or turned, of which 5 to 8 swap the sides
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of its image


# ------------------------------------------------------------------------------------------------------------
# Coordinates


def pixels_to_cells(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(..., 2) points (x, y) in pixels of an image of size (W, H) to fractional cells of a grid (h, w)."""
    scale = torch.tensor([grid[1] / size[0], grid[0] / size[1]], dtype=points.dtype, device=points.device)
    return (points + 0.5) * scale - 0.5


def cells_to_pixels(cells: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of pixels_to_cells."""
    scale = torch.tensor([size[0] / grid[1], size[1] / grid[0]], dtype=cells.dtype, device=cells.device)
    return (cells + 0.5) * scale - 0.5


# ------------------------------------------------------------------------------------------------------------
# Images, saliency maps, views


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture, of which the header has been read; ValueError, naming the file, if it is missing or corrupt,
    whenever that shows."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"no such image: {path}") from None
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise ValueError(f"cannot read image {path}: {error}") from None


def open_image(path: str | Path, upright: bool = False, ground: str = "white") -> Image.Image:
    """Read an RGB image, what is transparent on a ground; ValueError, naming the file, if it is missing or
    corrupt.

    upright: turn it as its camera's orientation tag says. One rule everywhere: photographs (class folders,
    lists and pictures of one's own) are upright, as viewers and annotation tools show them; benchmark sets
    are as stored, as their points were made.
    """
    with opened(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's own conversion clips to white
            array = np.asarray(image, np.float32)
            scale = 255 / max(255, 65535 * (array.max() > 255))
            image = Image.fromarray((array * scale).astype(np.uint8))
        if image.has_transparency_data:  # the colours of clear pixels are not meant to be seen
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
        return image.convert("RGB")


def image_size(path: str | Path, upright: bool = False) -> tuple[int, int]:
    """(W, H) of what open_image gives, from the file's header alone."""
    with opened(path) as image:
        swapped = upright and image.getexif().get(ORIENTATION, 1) in range(5, 9)
        return image.size[::-1] if swapped else image.size


def open_saliency(path: str | Path, rescale: bool = True, upright: bool = False) -> Image.Image:
    """Read an 8-bit saliency map of any size: mode F in [0, 1], rescaled to its own minimum and maximum.

    Detectors rarely reach 0 and 1, and a threshold means the same for every image only after rescaling;
    without it the map's own values are kept. upright: see open_image.
    """
    gray = np.asarray(open_image(path, upright, "black").convert("L"), np.float32)
    low, high = (gray.min(), gray.max()) if rescale else (0, 255)
    if high == low:  # nothing stands out: everything is foreground
        return Image.fromarray(np.ones_like(gray))
    return Image.fromarray((gray - low) / (high - low))


def open_with_map(path: str | Path, place: str | Path | None, rescale: bool = True,
                  upright: bool = True) -> tuple[Image.Image, Image.Image | None]:
    """An image and its saliency map, if a place of one is given; see open_image and open_saliency.

    A map covers the whole image, so it is square, the image squashed, or has the image's aspect to within a
    pixel a side or a tenth, which is room for any rounding of small maps and to whole patches. ValueError,
    naming both files and sizes, for every other: it was cut or padded or is of another picture and, if it is
    high where the image is wide, one of them lies on its side.
    """
    image = open_image(path, upright)
    if place is None:
        return image, None
    saliency = open_saliency(place, rescale, upright)
    (w, h), (width, height) = saliency.size, image.size
    turned, off = (w - h) * (width - height) < 0, abs(w * height - h * width)
    if w != h and (turned or off > max(0.1 * h * width, width + height)):
        shown = f"{width}x{height} px{' upright' * upright}"
        raise ValueError(f"saliency map {place} of {w}x{h} px does not fit image {path} of {shown}: a map has"
                         " its image's orientation and aspect, or is square")
    return image, saliency


def check_size(size: int, patch: int) -> None:
    """ValueError for an input side that does not hold whole patches."""
    if size % patch:
        raise ValueError(f"--size {size}: not a multiple of the backbone's patch of {patch} px")


def prepare(image: Image.Image, saliency: Image.Image | None, size: int, patch: int, box: Box | None = None,
            mirror: bool = False) -> tuple[Tensor, Tensor | None]:
    """A view of an image as the backbone wants it, and of its saliency map in cells.

    box: in pixels of the image, the whole of it if None; squashed to size x size (bicubic), mirrored last.
    Returns the normalised image (3, size, size) and the map (size/patch, size/patch), the mean over each
    cell, or None. Raises ValueError if the size is not a multiple of the patch.
    """
    check_size(size, patch)
    box = box or (0, 0, *image.size)
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.float32) / 255
    tensor, cells = torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1), None
    if saliency is not None:
        sx, sy = saliency.width / image.width, saliency.height / image.height
        scaled = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
        cells = saliency.resize((size // patch, size // patch), Image.Resampling.BOX, box=scaled)
        cells = torch.from_numpy(np.array(cells))
    if mirror:
        tensor, cells = tensor.flip(-1), None if cells is None else cells.flip(-1)
    return tensor, cells


def random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A random crop of a (W, H) image, in pixels: 35 to 100 % of the area, aspect ratio times 3/4 to 4/3."""
    width, height = size
    area, ratio = rng.uniform(0.35, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = width * min(1.0, np.sqrt(area * ratio)), height * min(1.0, np.sqrt(area / ratio))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return x, y, x + w, y + h


# ------------------------------------------------------------------------------------------------------------
# Training sets: images with class labels, paired within a class


class ImageSet:
    """Images with class labels; `load` gives an image and its saliency map.

    paths, labels: one entry an image; classes: the names behind the labels; saliency: folder of
    <class>/<image name>_sal.png; rescale: its maps, see open_saliency.
    """

    def __init__(self, paths: list[Path], labels: list[int], classes: list[str],
                 saliency: str | None = None, rescale: bool = True) -> None:
        if saliency and not Path(saliency).is_dir():
            raise ValueError(f"--saliency {saliency}: no such folder; expected <class>/<image>_sal.png in it")
        self.paths, self.labels, self.classes = paths, labels, classes
        self.maps, self.rescale = [saliency] * len(paths), rescale
        self.empty: list[Path] = []  # files of no bytes that were left out
        self.mirrored: set[int] = set()  # images that are turned left to right when loaded
        self.upright = False  # images, and maps, turned as their cameras' tags say

    def __len__(self) -> int:
        return len(self.paths)

    def members(self) -> list[list[int]]:
        """The images of every class."""
        found: list[list[int]] = [[] for _ in self.classes]
        for index, label in enumerate(self.labels):
            found[label].append(index)
        return found

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """RGB image and its saliency map (mode F, [0, 1]) or None; ValueError names a file it cannot read."""
        image, saliency = open_with_map(self.paths[index], self.map_path(index), self.rescale, self.upright)
        if index in self.mirrored:
            return ImageOps.mirror(image), saliency and ImageOps.mirror(saliency)
        return image, saliency

    def map_path(self, index: int) -> Path | None:
        """Where an image's saliency map lies; None without a folder of maps."""
        name = f"{self.paths[index].stem}_sal.png"
        folder = self.maps[index]
        return Path(folder, self.classes[self.labels[index]], name) if folder else None

    def size(self, index: int) -> tuple[int, int]:
        """(W, H) of what `load` gives, without decoding it."""
        return image_size(self.paths[index], self.upright)

    def as_stored(self, index: int) -> bool:
        """Whether the image's file holds what `load` gives, neither turned nor mirrored."""
        with opened(self.paths[index]) as image:
            turned = self.upright and image.getexif().get(ORIENTATION, 1) in range(2, 9)
        return not turned and index not in self.mirrored

    def substitutes(self, index: int) -> list[int]:
        """Images to fall back on, in order, where this one cannot be read: the rest of its class."""
        same = [i for i, label in enumerate(self.labels) if label == self.labels[index]]
        at = same.index(index)
        return same[at + 1 :] + same[:at]

    def epoch_pairs(self, seed: int, epoch: int) -> list[tuple[int, int]]:
        """Same-class pairs in random order, every image used at most once (paper, section 3.5).

        An odd class leaves one image out, another one every epoch.
        """
        rng = np.random.default_rng((seed, epoch))
        pairs = []
        for members in self.members():
            order = rng.permutation(members).tolist()
            pairs += list(zip(order[0::2], order[1::2]))
        return [pairs[k] for k in rng.permutation(len(pairs))]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without what tools hide there: names with a dot ahead, and __MACOSX."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")


def one_root(root: str | None, saliency: str | None = None, rescale: bool = True) -> ImageSet:
    """One folder a class (ImageNet's train layout, Caltech); classes of a single image are left out and
    named. See class_folders.

    Images are upright, see open_image. Hidden folders and files are none; empty files and pictures of endings
    that are not read are skipped, counted and named here; other damage shows when a file is decoded, see
    TrainPairs.
    """
    folders = [p for p in visible(Path(root)) if p.is_dir()] if root and Path(root).is_dir() else []
    if not folders:
        raise ValueError(f"--root {root}: expected a folder of class folders, ROOT/<class>/<image>.jpg")
    paths, labels, classes, empty, others = [], [], [], [], Counter()
    for folder in folders:
        found = visible(folder)
        files = [p for p in found if p.suffix.lower() in EXTENSIONS]
        others.update(p.suffix.lower() for p in found if p.suffix.lower() in UNREAD)
        usable = [p for p in files if p.is_file() and p.stat().st_size]
        empty += sorted(set(files) - set(usable))
        if len(usable) < 2:
            print(f"class {folder.name}: {len(usable)} usable image, no pairs; left out", file=sys.stderr)
            continue
        paths += usable
        labels += [len(classes)] * len(usable)
        classes.append(folder.name)
    if empty:
        print(f"{len(empty)} empty files skipped: {', '.join(map(str, empty[:5]))}", file=sys.stderr)
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common())
        print(f"{others.total()} pictures of endings that are not read skipped ({counts}): convert them to"
              f" one of {' '.join(sorted(EXTENSIONS))}", file=sys.stderr)
    if not paths:
        raise ValueError(f"--root {root}: no class folder holds two images ({', '.join(sorted(EXTENSIONS))})")
    images = ImageSet(paths, labels, classes, saliency, rescale)
    images.empty, images.upright = empty, True
    return images


def class_folders(root: str | None, saliency: str | None = None, rescale: bool = True) -> ImageSet:
    """The class folders of a root, or of several, written A:B as in PATH, each with its own folder of maps,
    or all with one. Classes of one name are one class."""
    roots, maps = ((text or "").split(os.pathsep) for text in (root, saliency))
    if len(maps) not in (1, len(roots)):
        raise ValueError(f"--saliency {saliency}: one folder of maps for each of the {len(roots)} of --root")
    maps = maps * len(roots) if len(maps) == 1 else maps
    first, *rest = (one_root(*pair, rescale) for pair in zip(roots, maps))
    for more in rest:
        first.classes += [name for name in more.classes if name not in first.classes]
        first.labels += [first.classes.index(more.classes[label]) for label in more.labels]
        first.paths, first.maps = first.paths + more.paths, first.maps + more.maps
        first.empty += more.empty
    return first


class TrainPairs(Dataset):
    """Couples of views for training. Keys are (epoch, place in the epoch, source index, target index), so
    that everything random follows from the key and the seed: the order of work, workers and resumption change
    nothing, and an image that stands in several couples of an epoch is cropped anew in each.
    """

    def __init__(self, images: ImageSet, size: int, patch: int, augment: bool, seed: int) -> None:
        self.images, self.size, self.patch, self.augment, self.seed = images, size, patch, augment, seed

    def read(self, src: int, trg: int) -> tuple[list[tuple], list[str]]:
        """(image, saliency map) of both ends, none if the class has no two such images; and a line for each
        unreadable file.

        What takes an unreadable image's place is of its class, and never the other end.
        """
        found, used, skipped = [], [src, trg], []
        for end, index in enumerate((src, trg)):
            candidates = [index]
            for candidate in candidates:
                try:
                    found.append(self.images.load(candidate))
                    used[end] = candidate
                    break
                except ValueError as error:
                    skipped.append(str(error))
                    if candidate == index:  # the search runs over all labels: only now
                        candidates += [i for i in self.images.substitutes(index) if i != used[1 - end]]
            else:
                return [], skipped
        return found, skipped

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict:
        """Both views (3, S, S), both maps (h, w) or empty, their class, and a line for each file or class
        passed over.

        A class without two readable images is left out: another class takes its place.
        """
        epoch, place, src, trg = key
        label, skipped = self.images.labels[src], []
        for turn in range(len(self.images.classes)):
            found, unreadable = self.read(src, trg)
            skipped += unreadable
            if found:
                break
            skipped.append(f"class {self.images.classes[label]}: fewer than two readable images; left out")
            label = (label + 1) % len(self.images.classes)
            rng = np.random.default_rng((self.seed, epoch, place, turn))
            src, trg = rng.permutation(self.images.members()[label])[:2].tolist()
        else:
            raise ValueError(f"no class has two images that can be read; the first: {skipped[0]}")
        item = {"label": label, "skipped": "\n".join(skipped)}
        for end, name in enumerate(("src", "trg")):
            box, mirror, (image, saliency) = None, False, found[end]
            if self.augment:
                rng = np.random.default_rng((self.seed, epoch, place, end))
                box, mirror = random_box(image.size, rng), bool(rng.random() < 0.5)
            view, cells = prepare(image, saliency, self.size, self.patch, box, mirror)
            item |= {f"{name}_img": view, f"{name}_sal": torch.empty(0) if cells is None else cells}
        return item


class PairStream(Sampler):
    """The endless sequence of micro-batches of keys; rank r of w sees micro-batches r, r + w, r + 2w, ...

    start: micro-batches of the whole sequence that were already used, so that a resumed run goes on where it
    stopped.
    """

    def __init__(self, images: ImageSet, batch: int, seed: int, start: int = 0, rank: int = 0,
                 world: int = 1) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.start, self.rank, self.world = start, rank, world
        count = len(images.epoch_pairs(seed, 0))
        if not 1 <= batch <= count:
            limit = f"at least 1, and the training set has only {count} pairs an epoch"
            raise ValueError(f"--batch {batch}: {limit}")
        self.per_epoch = count // batch

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        position, epoch, pairs = self.start + self.rank, -1, []
        while True:
            if position // self.per_epoch != epoch:
                epoch = position // self.per_epoch
                pairs = self.images.epoch_pairs(self.seed, epoch)
            first = position % self.per_epoch * self.batch
            yield [(epoch, first + k, *pair) for k, pair in enumerate(pairs[first : first + self.batch])]
            position += self.world


# ------------------------------------------------------------------------------------------------------------
# Keypoint sets: annotated pairs to score on


class KeypointPair(NamedTuple):
    """Two images by their ids in a KeypointSet, corresponding points and the boxes of both objects.

    d and scale are for scoring as others do (experiments/peers.py): the benchmarks' readers leave them out.
    """

    src: int
    trg: int
    src_kps: Tensor  # (n, 2) pixels of the source image
    trg_kps: Tensor  # (n, 2) pixels of the target image
    category: str
    src_box: Box
    trg_box: Box
    codes: dict[str, int] = {}  # the difficulties of SPair-71k and of label sets, see CODES of the benchmarks
    d: float | None = None  # PCK's threshold at alpha = 1, in the frame, in place of the box's longer side
    scale: tuple[float, float] | None = None  # frame over target pixels along x and y; None: 1, 1

    @property
    def extent(self) -> float:
        """d of PCK, rule "bbox": as given, or the longer side of the target object's box in target pixels."""
        x0, y0, x1, y1 = self.trg_box
        return max(x1 - x0, y1 - y0) if self.d is None else self.d


class KeypointSet:
    """Images and annotated pairs of them; `load(id)` gives an RGB image and its saliency map or None.

    rule: the benchmark's own d of PCK, "bbox" (longer side of the target's box) or "img" (of the target
    image).
    """

    def __init__(self, name: str, images: ImageSet, pairs: list[KeypointPair], rule: str = "bbox") -> None:
        self.name, self.images, self.pairs, self.rule = name, images, pairs, rule
        self.sizes: dict[int, tuple[int, int]] = {}  # of images that were seen

    def __len__(self) -> int:
        return len(self.pairs)

    def size(self, index: int) -> tuple[int, int]:
        """(W, H) of an image in pixels."""
        if index not in self.sizes:
            self.sizes[index] = self.images.size(index)
        return self.sizes[index]

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        return self.images.load(index)
