"""Every data set, the views that training takes of an image, and all coordinate conversions.

Training sets give images with class labels and pair them within a class; keypoint sets give image pairs with annotated
points and are only ever scored on. `shapes` is both, is drawn on the fly, and needs no files.

Keypoints are (x, y) with pixel centres at integers. Every image is squashed to S x S and cut into h x w cells, so a
cell's centre is ((i + 0.5) * W / w - 0.5) in the pixels of the image itself; `pixels_to_cells` and `cells_to_pixels`
are the only places that know.
"""

import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from shapes import SHAPE_CLASSES, draw_shape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which every backbone here was trained with
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


# ----------------------------------------------------------------------------------------------------------------------
# Coordinates


def pixels_to_cells(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(..., 2) points (x, y) in pixels of an image of size (W, H) to fractional cells of a grid (h, w)."""
    scale = torch.tensor([grid[1] / size[0], grid[0] / size[1]], dtype=points.dtype, device=points.device)
    return (points + 0.5) * scale - 0.5


def cells_to_pixels(cells: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of pixels_to_cells."""
    scale = torch.tensor([size[0] / grid[1], size[1] / grid[0]], dtype=cells.dtype, device=cells.device)
    return (cells + 0.5) * scale - 0.5


def parse_points(texts: list[str], size: tuple[int, int]) -> Tensor:
    """["40,52", ...] to (n, 2) float pixels; ValueError names a point that is malformed or outside the (W, H) image."""
    points = []
    for text in texts:
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"--points {text!r}: write a point as x,y in pixels, such as 40,52.5") from None
        if not (-0.5 <= x <= size[0] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            raise ValueError(f"--points {text}: outside the source image of {size[0]}x{size[1]} px")
        points.append((x, y))
    return torch.tensor(points)


# ----------------------------------------------------------------------------------------------------------------------
# Images and views


def open_image(path: str | Path, upright: bool = False) -> Image.Image:
    """Read an RGB image; ValueError, naming the file, if it is missing or corrupt.

    upright: turn it as its camera's orientation tag says (photographs of one's own; no benchmark's points do).
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow's conversion would clip to white
                array = np.asarray(image, np.float32)
                image = Image.fromarray((array * (255 / max(255, 65535 * (array.max() > 255)))).astype(np.uint8))
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such image: {path}") from None
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise ValueError(f"cannot read image {path}: {error}") from None


def open_saliency(path: str | Path) -> Image.Image:
    """Read an 8-bit saliency map of any size and rescale it to its own minimum and maximum: mode F in [0, 1].

    Detectors rarely reach 0 and 1, and a threshold means the same for every image only after rescaling.
    """
    gray = np.asarray(open_image(path).convert("L"), np.float32)
    low, high = gray.min(), gray.max()
    if high == low:  # nothing stands out: everything is foreground
        return Image.fromarray(np.ones_like(gray))
    return Image.fromarray((gray - low) / (high - low))


def prepare(
    image: Image.Image,
    saliency: Image.Image | None,
    size: int,
    patch: int,
    box: tuple[float, float, float, float] | None = None,
    mirror: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A view of an image as the backbone wants it, and of its saliency map in cells.

    box: (x0, y0, x1, y1) in pixels of the image, the whole of it if None; squashed to size x size (bicubic), mirrored
    last. Returns the normalised image (3, size, size) and the map (size/patch, size/patch), the mean over each cell, or
    None. Raises ValueError if the size is not a multiple of the patch.
    """
    if size % patch:
        raise ValueError(f"--size {size}: not a multiple of the backbone's patch of {patch} px")
    box = box or (0, 0, *image.size)
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.float32) / 255
    tensor = (torch.from_numpy(array).permute(2, 0, 1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    cells = None
    if saliency is not None:
        sx, sy = saliency.width / image.width, saliency.height / image.height
        scaled = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
        cells = torch.from_numpy(np.array(saliency.resize((size // patch,) * 2, Image.Resampling.BOX, box=scaled)))
    if mirror:
        tensor, cells = tensor.flip(-1), None if cells is None else cells.flip(-1)
    return tensor, cells


def random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random crop, 35 to 100 % of the area, aspect ratio changed by 3/4 to 4/3, in pixels of a (W, H) image."""
    width, height = size
    area, ratio = rng.uniform(0.35, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = width * min(1.0, np.sqrt(area * ratio)), height * min(1.0, np.sqrt(area / ratio))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return x, y, x + w, y + h


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks on disk: where they lie, where they come from, their lists


class Benchmark(NamedTuple):
    """A benchmark's folder, and where to get it."""

    title: str
    folders: tuple[str, ...]  # the names it goes by; a download makes the first
    holds: str  # a folder in every copy of it
    layout: str  # what is in it; where it is from
    archive: str = ""  # address of a zip or tar with one of the folders in it
    lists: dict[str, str] = {}  # pair lists that the archive may lack, and their addresses


WILLOW = "http://www.di.ens.fr/willow/research"
BENCHMARKS = {
    "pfwillow": Benchmark(
        "PF-WILLOW",
        ("PF-WILLOW", "PF-dataset", "PF-dataset-WILLOW"),
        "car(G)",
        "<folder>/<image>.png, test_pairs.csv or test_pairs_pf.csv or a .mat beside every image;"
        " from www.di.ens.fr/willow/research/proposalflow",
        f"{WILLOW}/proposalflow/dataset/PF-dataset.zip",
        {"test_pairs_pf.csv": f"{WILLOW}/cnngeometric/other_resources/test_pairs_pf.csv"},
    ),
    "pfpascal": Benchmark(
        "PF-PASCAL",
        ("PF-PASCAL", "PF-dataset-PASCAL"),
        "JPEGImages",
        "JPEGImages/<image>.jpg, Annotations/<class>/<image>.mat, {trn,val,test}_pairs.csv or"
        " {train,val,test}_pairs_pf_pascal.csv; from www.di.ens.fr/willow/research/proposalflow",
        f"{WILLOW}/proposalflow/dataset/PF-dataset-PASCAL.zip",
        {
            "test_pairs_pf_pascal.csv": f"{WILLOW}/cnngeometric/other_resources/test_pairs_pf_pascal.csv",
            "val_pairs_pf_pascal.csv": f"{WILLOW}/cnngeometric/other_resources/val_pairs_pf_pascal.csv",
            "train_pairs_pf_pascal.csv": "https://drive.usercontent.google.com/download"
            "?id=111tpXshLiJ4qudBHoGK3HbMSNr9vVRq9&export=download&confirm=t",
        },
    ),
    "spair": Benchmark(
        "SPair-71k",
        ("SPair-71k",),
        "JPEGImages",
        "JPEGImages/<category>/<id>.jpg, PairAnnotation/<split>/<pair>.json, Layout/{large,small}/{trn,val,test}.txt;"
        " from cvlab.postech.ac.kr/research/SPair-71k",
        "http://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz",
    ),
    "labels": Benchmark(
        "label set",
        ("SC-ImageNet", "SC-IMAGENET"),
        "JPEGImages",
        "JPEGImages/<category>/<category>_<id>.JPEG, PairAnnotation/<split>/<pair>.json, Layout/large/{trn,val}.txt;"
        " from label.py or, the authors' own, github.com/21210240056/SC-ImageNet",
    ),
}


def benchmark_file(name: str, root: str | None, *files: str) -> Path:
    """The first of some files in a benchmark's folder: root, or one of its names in root."""
    title, folders, _, layout, archive, _ = BENCHMARKS[name]
    for path in (Path(root or "", folder, file) for folder in ("", *folders) for file in files):
        if path.exists():
            return path
    raise ValueError(
        f"{title} folder {root or '.'}: expected {' or '.join(files)} in it, or in {' or '.join(folders)} inside it;"
        f" the layout: {layout}{', or by evaluate.py --download' * bool(archive)}"
    )


def fetch(url: str, path: Path) -> None:
    """Download a file with a progress bar; OSError if less arrives than was announced."""
    with urllib.request.urlopen(url, timeout=60) as answer, open(path, "wb") as file:
        length = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if length and file.tell() != length:
            raise OSError(f"{file.tell()} of {length} bytes arrived")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar; any kind of error for a damaged one, and for a member whose place is outside the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for member in packed.namelist():
                if not (folder / member).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{member!r} would be unpacked outside its folder")
            packed.extractall(folder)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def download(name: str, root: str | None) -> None:
    """Fetch a benchmark into its folder in root, unless it is there; ValueError, in one line, leaves nothing behind."""
    if name not in (known := [key for key, benchmark in BENCHMARKS.items() if benchmark.archive]):
        raise ValueError(f"--download: nothing to fetch for {name}; known: {', '.join(known)}")
    title, folders, holds, _, url, lists = BENCHMARKS[name]
    target, at = Path(root or "", folders[0]), url
    if target.exists() or any(Path(root or "", folder, holds).is_dir() for folder in ("", *folders)):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{title}.", dir=target.parent) as temporary:
            archive, content = Path(temporary, title), Path(temporary, "content")
            fetch(url, archive)
            unpack(archive, content)
            found = [content / folder for folder in folders if (content / folder / holds).is_dir()]
            if not found:
                raise ValueError(f"no {' or '.join(f'{folder}/{holds}' for folder in folders)} in it")
            for file, at in lists.items():
                if not (place := found[0] / file).exists():
                    fetch(at, place)
                    if place.read_bytes().lstrip()[:1] == b"<":
                        raise ValueError("a web page came instead of the list")
            found[0].rename(target)
    except Exception as error:  # networks and damaged archives raise many kinds
        rest = f" and put {', '.join(lists.values())} into it" * bool(lists)
        by_hand = f"by hand: unpack {url} as {target}{rest}"
        raise ValueError(f"cannot download {at}: {' '.join(str(error).split())}; nothing was kept; {by_hand}") from None


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """A CSV file's header and rows with their line numbers, cells stripped, blank lines left out."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: empty, expected a header and rows")
    return rows


def layout_lines(path: Path) -> Iterator[tuple[int, str, str, str, str]]:
    """Lines `seq-source-target:category` of a layout file: number, the line, source, target, category."""
    for number, line in enumerate(path.read_text().split(), 1):
        try:
            ids, category = line.split(":")
            _, src, trg = ids.split("-")
        except ValueError:
            raise ValueError(f"{path} line {number}: {line!r} is not seq-source-target:category") from None
        yield number, line, src, trg, category


PASCAL_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def pfpascal_list(root: str | None, split: str) -> Path:
    """The list of a split: trn, val or test."""
    ncnet = f"{split.replace('trn', 'train')}_pairs_pf_pascal.csv"
    return benchmark_file("pfpascal", root, f"{split}_pairs.csv", ncnet)


def pfpascal_rows(path: Path) -> Iterator[tuple[int, Path, Path, str, bool, list[str]]]:
    """Rows of a list of PF-PASCAL: line, both images, class, flip, and XA, YA, XB, YB where it has them."""
    (_, header), *rows = read_rows(path)
    folder, known = path.parent / "JPEGImages", dict(enumerate(PASCAL_CLASSES, 1))
    for number, row in rows:
        try:
            src, trg, label, *rest = row
            name, flip = known[int(label)], len(rest) == 1 and bool(("0", "1").index(rest[0]))
            if len(row) != len(header) or len(rest) in (2, 3):
                raise ValueError
        except (ValueError, KeyError):
            wanted = "source,target,class 1 to 20,flip 0 or 1 (test: XA,YA,XB,YB instead), as in the header"
            raise ValueError(f"{path} line {number}: expected {wanted}") from None
        yield number, folder / Path(src).name, folder / Path(trg).name, name, flip, rest[:4] if len(rest) > 1 else []


# ----------------------------------------------------------------------------------------------------------------------
# Training sets: images with class labels


class ImageSet:
    """Images with class labels.

    paths, labels: one entry an image; classes: the names behind the labels; `load` gives image and saliency map.
    """

    def __init__(self, paths: list[Path], labels: list[int], classes: list[str], saliency: str | None = None) -> None:
        if saliency and not Path(saliency).is_dir():
            raise ValueError(f"--saliency {saliency}: no such folder; expected <class>/<image name>_sal.png in it")
        self.paths, self.labels, self.classes, self.saliency = paths, labels, classes, saliency
        self.empty: list[Path] = []  # files of no bytes that were left out
        self.mirrored: set[int] = set()  # images that are turned left to right when loaded
        self.upright = False  # turn images as their cameras' tags say

    def __len__(self) -> int:
        return len(self.paths)

    def members(self) -> list[list[int]]:
        """The images of every class."""
        found: list[list[int]] = [[] for _ in self.classes]
        for index, label in enumerate(self.labels):
            found[label].append(index)
        return found

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        """RGB image and its saliency map (mode F, [0, 1]) or None; ValueError for a file that cannot be read."""
        path = self.paths[index]
        sal = Path(self.saliency, self.classes[self.labels[index]], f"{path.stem}_sal.png") if self.saliency else None
        image, saliency = open_image(path, self.upright), open_saliency(sal) if sal else None
        if index in self.mirrored:
            return ImageOps.mirror(image), saliency and ImageOps.mirror(saliency)
        return image, saliency

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


class PairedSet(ImageSet):
    """Images whose same-class pairs are given by a benchmark's training split; keypoints are never read."""

    def __init__(self, pairs: list[tuple[Path, Path, str]], saliency: str | None = None) -> None:
        names = sorted({name for *_, name in pairs})
        images = sorted({(path, name) for *pair, name in pairs for path in pair})  # a picture may show two classes
        super().__init__([path for path, _ in images], [names.index(name) for _, name in images], names, saliency)
        index = {image: k for k, image in enumerate(images)}
        self.pairs = [(index[src, name], index[trg, name]) for src, trg, name in pairs]

    def epoch_pairs(self, seed: int, epoch: int) -> list[tuple[int, int]]:
        order = np.random.default_rng((seed, epoch)).permutation(len(self.pairs))
        return [self.pairs[k] for k in order]


def class_folders(root: str | None, saliency: str | None = None) -> ImageSet:
    """One folder a class (ImageNet's train layout, Caltech); classes with a single image are left out and named.

    Empty files are skipped, counted and named here; other damage shows when a file is decoded, see TrainPairs.
    """
    folders = sorted(p for p in Path(root).iterdir() if p.is_dir()) if root and Path(root).is_dir() else []
    if not folders:
        raise ValueError(f"--root {root}: expected a folder of class folders, ROOT/<class>/<image>.jpg")
    paths, labels, classes, empty = [], [], [], []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
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
    if not paths:
        raise ValueError(f"--root {root}: no class folder holds two images ({', '.join(sorted(EXTENSIONS))})")
    images = ImageSet(paths, labels, classes, saliency)
    images.empty = empty
    return images


def spair_train(root: str | None, saliency: str | None = None) -> PairedSet:
    """The weak pairs of SPair-71k's large training layout."""
    layout = benchmark_file("spair", root, "Layout/large/trn.txt")
    pairs = []
    for _, _, src, trg, category in layout_lines(layout):
        folder = layout.parents[2] / "JPEGImages" / category
        pairs.append((folder / f"{src}.jpg", folder / f"{trg}.jpg", category))
    return PairedSet(pairs, saliency)


def pfpascal_train(root: str | None, saliency: str | None = None) -> PairedSet:
    """The weak pairs of PF-PASCAL's training split.

    Rows with flip 1 repeat the others mirrored; training mirrors at random, so they are left out.
    """
    rows = pfpascal_rows(pfpascal_list(root, "trn"))
    return PairedSet([(src, trg, name) for _, src, trg, name, flip, _ in rows if not flip], saliency)


class TrainPairs(Dataset):
    """Pairs of views for training. Keys are (epoch, source index, target index), so that everything random follows from
    the key and the seed: the order of work, workers and resumption change nothing.
    """

    def __init__(self, images: ImageSet, size: int, patch: int, augment: bool, seed: int) -> None:
        self.images, self.size, self.patch, self.augment, self.seed = images, size, patch, augment, seed

    def view(self, index: int, epoch: int, partner: int) -> tuple[Tensor, Tensor, list[str]]:
        """Image (3, S, S), saliency cells (h, w) or an empty tensor, and the unreadable files that were passed over.

        What takes an unreadable image's place is of its class and not the partner it is to be matched with.
        """
        candidates, skipped = [index], []
        for candidate in candidates:
            try:
                image, saliency = self.images.load(candidate)
                break
            except ValueError as error:
                skipped.append(str(error))
                if candidate == index:  # the search runs over all labels: only now
                    candidates += [i for i in self.images.substitutes(index) if i != partner]
        else:
            name = self.images.classes[self.images.labels[index]]
            raise ValueError(f"no image of class {name} can be read; the first: {skipped[0]}")
        box, mirror = None, False
        if self.augment:
            rng = np.random.default_rng((self.seed, epoch, index))
            box, mirror = random_box(image.size, rng), bool(rng.random() < 0.5)
        tensor, cells = prepare(image, saliency, self.size, self.patch, box, mirror)
        return tensor, torch.empty(0) if cells is None else cells, skipped

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        epoch, src, trg = key
        src_img, src_sal, bad_s = self.view(src, epoch, trg)
        trg_img, trg_sal, bad_t = self.view(trg, epoch, src)
        first = epoch * len(self.images) if self.augment else 0
        return {
            "src_img": src_img,
            "trg_img": trg_img,
            "src_sal": src_sal,
            "trg_sal": trg_sal,
            "label": self.images.labels[src],
            "index": (first + src, first + trg),  # of the view: what is cropped is another one every epoch
            "skipped": "\n".join(bad_s + bad_t),
        }


class PairStream(Sampler):
    """The endless sequence of micro-batches of keys; rank r of w sees micro-batches r, r + w, r + 2w, ...

    start: micro-batches of the whole sequence that were already used, so that a resumed run goes on where it stopped.
    """

    def __init__(self, images: ImageSet, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.start, self.rank, self.world = start, rank, world
        count = len(images.epoch_pairs(seed, 0))
        if not 1 <= batch <= count:
            raise ValueError(f"--batch {batch}: at least 1, and the training set has only {count} pairs an epoch")
        self.per_epoch = count // batch

    def __iter__(self):
        position, epoch, pairs = self.start + self.rank, -1, []
        while True:
            if position // self.per_epoch != epoch:
                epoch = position // self.per_epoch
                pairs = self.images.epoch_pairs(self.seed, epoch)
            first = position % self.per_epoch * self.batch
            yield [(epoch, *pair) for pair in pairs[first : first + self.batch]]
            position += self.world


# ----------------------------------------------------------------------------------------------------------------------
# Keypoint sets: annotated pairs to score on


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of its image


class KeypointPair(NamedTuple):
    """Two images by their ids in a KeypointSet, corresponding points and the boxes of both objects."""

    src: int
    trg: int
    src_kps: Tensor  # (n, 2) pixels of the source image
    trg_kps: Tensor  # (n, 2) pixels of the target image
    category: str
    src_box: Box
    trg_box: Box
    codes: dict[str, int] = {}  # the difficulties of CODES, on SPair-71k and label sets

    @property
    def extent(self) -> float:
        """Longer side of the target object's box in target pixels: d of PCK, rule "bbox"."""
        x0, y0, x1, y1 = self.trg_box
        return max(x1 - x0, y1 - y0)


class KeypointSet:
    """Images and annotated pairs of them; `load(id)` gives an RGB image and its saliency map or None.

    rule: the benchmark's own d of PCK, "bbox" (longer side of the target's box) or "img" (of the target image).
    """

    def __init__(self, name: str, images: ImageSet, pairs: list[KeypointPair], rule: str = "bbox") -> None:
        self.name, self.images, self.pairs, self.rule, self.sizes = name, images, pairs, rule, {}

    def __len__(self) -> int:
        return len(self.pairs)

    def size(self, index: int) -> tuple[int, int]:
        """(W, H) of an image in pixels."""
        if index not in self.sizes:
            self.sizes[index] = self.load(index)[0].size
        return self.sizes[index]

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        return self.images.load(index)


def gather(name: str, origin: Path, found: list[tuple], rule: str = "bbox") -> KeypointSet:
    """A KeypointSet of pairs that name their images by (path, mirrored): every distinct image gets one id.

    Its label is the category of the first pair that shows it. origin: the list, named if it has no pairs.
    """
    if not found:
        raise ValueError(f"{origin}: no pairs in it")
    shown: dict[tuple[Path, bool], str] = {}
    for src, trg, _, _, category, *_ in found:
        shown.setdefault(src, category)
        shown.setdefault(trg, category)
    classes, ids = sorted(set(shown.values())), {image: k for k, image in enumerate(shown)}
    images = ImageSet([path for path, _ in shown], [classes.index(label) for label in shown.values()], classes)
    images.mirrored = {ids[image] for image in shown if image[1]}
    return KeypointSet(name, images, [KeypointPair(ids[src], ids[trg], *rest) for src, trg, *rest in found], rule)


def point_tensors(src: Iterable, trg: Iterable) -> tuple[Tensor, Tensor]:
    """Two lists of points as float tensors (n, 2); ValueError unless equally many, at least one, and finite."""
    kps = [torch.tensor(points, dtype=torch.float32) for points in (src, trg)]
    if not all(len(k) == len(kps[0]) > 0 and k.shape[1:] == (2,) and k.isfinite().all() for k in kps):
        counts = f"{len(kps[0])} source and {len(kps[1])} target points"
        raise ValueError(f"{counts}: expected equally many, at least one, each of two finite coordinates")
    return kps[0], kps[1]


def point_columns(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Columns XA, YA, XB, YB, each numbers joined by ';', as source and target points (n, 2)."""
    numbers = [[float(v) for v in text.removesuffix(";").split(";")] if text else [] for text in texts]
    if len({len(column) for column in numbers}) > 1:
        raise ValueError(f"XA, YA, XB and YB hold {', '.join(str(len(column)) for column in numbers)} numbers")
    return point_tensors(list(zip(*numbers[:2])), list(zip(*numbers[2:])))


def span(kps: Tensor) -> Box:
    """The box round points (n, 2)."""
    return (*kps.amin(0).tolist(), *kps.amax(0).tolist())


def read_mat(path: Path, **shapes: tuple[int, int]) -> list[np.ndarray]:
    """Variables of a MATLAB file, each a matrix of a given shape, -1 for any length; ValueError names the file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{path}: .mat files are read with scipy: pip install scipy") from None
    try:
        content = loadmat(str(path), variable_names=list(shapes))
        found = [np.asarray(content[name], np.float64) for name in shapes]
    except Exception as error:  # a damaged file raises many kinds
        raise ValueError(f"cannot read {' and '.join(shapes)} of {path}: {error}") from None
    for array, (name, (rows, columns)) in zip(found, shapes.items()):
        if array.shape != (len(array) if rows < 0 else rows, columns) or not len(array):
            raise ValueError(f"{path}: {name} is a matrix of {array.shape}, not of {rows, columns}")
    return found


WILLOW_FOLDERS = [
    *("car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"),
    *("winebottle(M)", "winebottle(wC)", "winebottle(woC)"),
]


def willow_from_mats(root: Path) -> Iterator[tuple[list[Path], tuple[Tensor, Tensor]]]:
    """Images and points of PF-WILLOW's 900 pairs: all ordered pairs of a folder's ten images."""
    for name in WILLOW_FOLDERS:
        files = sorted((root / name).glob("*.mat"))
        if len(files) != 10:
            raise ValueError(f"{root / name}: {len(files)} .mat files; where no list is, ten are expected")
        points = [read_mat(file, pts_coord=(2, 10))[0].T for file in files]
        for i, j in itertools.permutations(range(10), 2):
            yield [files[k].with_suffix(".png") for k in (i, j)], point_tensors(points[i], points[j])


def willow_from_csv(path: Path) -> Iterator[tuple[list[Path], tuple[Tensor, Tensor]]]:
    """The same from a list: paths in columns 0 and 1, then ten x and ten y of either image."""
    for number, row in read_rows(path)[1:]:
        try:
            kps = np.array(row[2:], float).reshape(2, 2, 10).swapaxes(1, 2)  # (image, point, xy)
            (src, _), (trg, _) = names = [Path(p).parts[-2:] for p in row[:2]]
            yield [path.parent.joinpath(*name) for name in names], point_tensors(*kps)
        except ValueError:
            raise ValueError(f"{path} line {number}: expected two <folder>/<image> and 40 coordinates") from None


def pfwillow(root: str | None) -> KeypointSet:
    """PF-WILLOW's 900 pairs, from its list or, without one, from its .mat files.

    The boxes are those around the ten points (rule "bbox": no padding enters them).
    """
    origin = benchmark_file("pfwillow", root, "test_pairs.csv", "test_pairs_pf.csv", WILLOW_FOLDERS[0])
    found = []
    for (src, trg), kps in willow_from_mats(origin.parent) if origin.is_dir() else willow_from_csv(origin):
        found.append(((src, False), (trg, False), *kps, src.parent.name, *map(span, kps)))
    return gather("PF-WILLOW", origin, found)


def pfpascal_pairs(root: str | None, split: str) -> KeypointSet:
    """PF-PASCAL's trn, val or test pairs; rule "img".

    Points are the list's (test) or else the .mat files': the rows that are finite in both. Boxes are the .mat files',
    or whole images where a list with points comes without them. Flip 1 mirrors images, points and boxes, x to W - x
    as is the benchmark's custom.
    """
    listed = pfpascal_list(root, split)
    notes, scipy, found = listed.parent / "Annotations", importlib.util.find_spec("scipy"), []
    read, size, whole = functools.cache(read_mat), functools.cache(lambda path: open_image(path).size), 0
    for number, *paths, name, flip, texts in pfpascal_rows(listed):
        points, boxes = [], []
        for path in paths:
            mat = notes / name / f"{path.stem}.mat"
            if texts and not (scipy and mat.is_file()):
                boxes.append((0.0, 0.0, *map(float, size(path))))
                whole += mat.is_file()
                continue
            kps, box = read(mat, kps=(-1, 2), bbox=(-1, 4))
            points.append(kps)
            boxes.append(tuple(box[0].tolist()))
        try:
            if not texts:
                kept = np.isfinite(points[0]).all(1) & np.isfinite(points[1]).all(1)
            kps = point_columns(texts) if texts else point_tensors(*(p[kept] for p in points))
        except ValueError as error:
            raise ValueError(f"{listed} line {number}: {error}") from None
        for k, path in enumerate(paths if flip else []):
            width, (x0, y0, x1, y1) = size(path)[0], boxes[k]
            kps[k][:, 0] = width - kps[k][:, 0]
            boxes[k] = (width - x1, y0, width - x0, y1)
        found.append((*((path, flip) for path in paths), *kps, name, *boxes))
    if whole:
        print("boxes of PF-PASCAL are whole images: its .mat files need pip install scipy", file=sys.stderr)
    return gather(f"PF-PASCAL {split}", listed, found, "img")


CODES = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")  # 0 to 2 twice, 0 to 3 twice


def annotated_pairs(name: str, root: str | None, split: str, layout: str, file: str | None) -> KeypointSet:
    """Pairs in SPair-71k's form; file: the images' names of {category} and {id}, or None: as the record says."""
    listed = benchmark_file(name, root, f"Layout/{layout}/{split}.txt")
    folder, found = listed.parents[2], []
    for number, line, *ids, category in layout_lines(listed):
        path = folder / "PairAnnotation" / split / f"{line}.json"
        if not path.exists():  # ':' cannot be stored everywhere
            path = path.with_name(f"{line.replace(':', '-')}.json")
        try:
            record, images, boxes = json.loads(path.read_text()), [], []
            for side, ident in zip(("src", "trg"), ids):
                image = file.format(category=category, id=ident) if file else record[f"{side}_imname"]
                images.append((folder / "JPEGImages" / category / image, False))
                x0, y0, x1, y1 = map(float, record[f"{side}_bndbox"])
                boxes.append((x0, y0, x1, y1))
            kps = point_tensors(record["src_kps"], record["trg_kps"])
            codes = {code: int(record[code]) for code in CODES}
        except FileNotFoundError:
            place = f"{line}.json nor {path.name} in {path.parent}"
            raise ValueError(f"{listed} line {number}: neither {place}") from None
        except KeyError as error:
            raise ValueError(f"{path}: no {error} in it") from None
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
        found.append((*images, *kps, category, *boxes, codes))
    small = f" {layout}" if layout != "large" else ""
    return gather(f"{BENCHMARKS[name].title}{small} {split}", listed, found)


def spair_pairs(root: str | None, split: str, layout: str = "large") -> KeypointSet:
    """SPair-71k's trn, val or test pairs of the large or the small layout."""
    return annotated_pairs("spair", root, split, layout, None)


def label_pairs(root: str | None, split: str) -> KeypointSet:
    """The trn or val pairs of a label set, SC-ImageNet or one that label.py wrote."""
    return annotated_pairs("labels", root, split, "large", "{category}_{id}.JPEG")


def csv_pairs(path: str | Path) -> KeypointSet:
    """Pairs of one's own: a CSV with columns source,target,XA,YA,XB,YB and, if wanted, class.

    Images are relative to the file, and turned as their cameras' tags say; XA and YA hold the source's points,
    numbers of pixels joined by ';', XB and YB the target's. The boxes are those around the points.
    """
    path, columns = Path(path), ("source", "target", "XA", "YA", "XB", "YB")
    (_, header), *rows = read_rows(path)
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; expected {','.join(columns)} and, if wanted, class")
    found = []
    for number, row in rows:
        record = dict(zip(header, row))
        try:
            if len(row) != len(header) or not (record["source"] and record["target"]):
                raise ValueError(f"expected two images, and {len(header)} columns as in the header")
            kps = point_columns([record[column] for column in columns[2:]])
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        images = ((path.parent / record[column], False) for column in columns[:2])
        found.append((*images, *kps, record.get("class") or "all", *map(span, kps)))
    keypoints = gather(path.name, path, found)
    keypoints.images.upright = True
    return keypoints


# ----------------------------------------------------------------------------------------------------------------------
# shapes: drawn objects with exact keypoints, for training and for scoring

SHAPE_SPLITS = {"train": (0, 60), "val": (100_000, 8), "test": (200_000, 20)}  # first seed and images a class


class Shapes(ImageSet):
    """The built-in set of one split, drawn on first use and kept. A saliency map is the object's silhouette."""

    def __init__(self, split: str, saliency: bool = True) -> None:
        if split not in SHAPE_SPLITS:
            raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SHAPE_SPLITS)}")
        first, count = SHAPE_SPLITS[split]
        self.seeds = [first + k for _ in SHAPE_CLASSES for k in range(count)]
        labels = [label for label in range(len(SHAPE_CLASSES)) for _ in range(count)]
        paths = [Path(f"shapes/{SHAPE_CLASSES[label]}/{seed}") for label, seed in zip(labels, self.seeds)]
        super().__init__(paths, labels, list(SHAPE_CLASSES))
        self.use_saliency, self.drawn = saliency, {}

    def draw(self, index: int) -> dict:
        """draw_shape's record of one image."""
        if index not in self.drawn:
            self.drawn[index] = draw_shape(self.classes[self.labels[index]], self.seeds[index])
        return self.drawn[index]

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        record = self.draw(index)
        mask = Image.fromarray(np.asarray(record["mask"], np.float32) / 255) if self.use_saliency else None
        return record["image"], mask


def shapes_pairs(split: str) -> KeypointSet:
    """Annotated pairs of one split: every image is once the source, its target drawn at random from its class."""
    images = Shapes(split)
    rng, pairs = np.random.default_rng(SHAPE_SPLITS[split][0]), []
    for src in range(len(images)):
        same = [i for i, label in enumerate(images.labels) if label == images.labels[src] and i != src]
        trg = int(rng.choice(same))
        a, b = images.draw(src), images.draw(trg)
        kps = [torch.tensor([record["kps"][name] for name in a["kps"]]) for record in (a, b)]
        pairs.append(KeypointPair(src, trg, *kps, images.classes[images.labels[src]], a["bbox"], b["bbox"]))
    return KeypointSet(f"shapes {split}", images, pairs)


# ----------------------------------------------------------------------------------------------------------------------
# Label sets on disk: SC-ImageNet as the authors' CATs and DHPF read it


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it; OSError, in one line, leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; what was finished before is kept") from None


def plain_names(names: list[str]) -> list[str]:
    """Names of letters, digits, '_' and '.' alone (no '-', ':', glob characters or spaces), at most 64 characters and
    the number that makes them all different."""
    found: dict[str, int] = {}  # and the number that the next one of the same name tries
    for name in names:
        plain = new = re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:64] or "_"
        while new in found:
            found[plain] += 1
            new = f"{plain}_{found[plain]}"
        found[new] = 1
    return list(found)


def image_names(images: ImageSet) -> list[tuple[str, str]]:
    """(category, id) of every image: its file in the tree is <category>/<category>_<id>.JPEG, ImageNet's own naming."""
    categories, ids = plain_names(images.classes), {}
    for name, members in zip(images.classes, images.members()):
        ids |= dict(zip(members, plain_names([images.paths[i].stem.removeprefix(f"{name}_") for i in members])))
    return [(categories[label], ids[i]) for i, label in enumerate(images.labels)]


def annotation(pair: dict, number: int, sides: tuple[dict, dict], names: list[tuple[str, str]]) -> tuple[str, dict]:
    """A pair's id and its record in SPair-71k's form, with the loop error of every match (source pixels) added."""
    (category, src), (_, trg) = (names[pair[side]] for side in ("src", "trg"))
    name = f"{number:06d}-{src}-{trg}:{category}"
    record: dict = {"pair_id": number, "filename": name, "category": category}
    for side, image, ident in (("src", sides[0], src), ("trg", sides[1], trg)):
        record |= {
            f"{side}_imname": f"{category}_{ident}.JPEG",
            f"{side}_imsize": [*image["size"], 3],
            f"{side}_bndbox": image["box"],
            f"{side}_pose": "Unspecified",
            f"{side}_kps": pair[f"{side}_kps"],
        }
    x0, y0, x1, y1 = sides[0]["box"]
    record |= {"kps_ids": [str(k) for k in range(len(pair["errors"]))]}
    record |= dict.fromkeys(("mirror", "viewpoint_variation", "scale_variation", "truncation", "occlusion"), 0)
    return name, record | {"loop_error": [round(e * max(x1 - x0, y1 - y0), 2) for e in pair["errors"]]}


def place_image(images: ImageSet, index: int, path: Path, how: str) -> None:
    """Link or copy an image into the tree; drawn ones are saved. The original is never touched."""
    if isinstance(images, Shapes):
        images.load(index)[0].save(path, "JPEG", quality=95)
    elif how == "copy":
        shutil.copyfile(images.paths[index], path)
    else:
        path.symlink_to(images.paths[index].resolve())


def write_label_tree(out: Path, images: ImageSet, records: Iterable[dict], how: str) -> None:
    """Write OUT/SC-ImageNet (and its second name SC-IMAGENET, which DHPF wants) from the records of pair shards.

    Written under a temporary name and put in place as a whole; OSError leaves an earlier tree as it was.
    """
    final, temporary, old = (out / f"SC-ImageNet{suffix}" for suffix in ("", ".tmp", ".old"))
    names, placed = image_names(images), {}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split in ("trn", "val"):
            (temporary / "PairAnnotation" / split).mkdir(parents=True)
        (temporary / "JPEGImages").mkdir()
        (temporary / "Layout" / "large").mkdir(parents=True)
        lines: dict[str, list[str]] = {"trn": [], "val": []}
        number = 0
        for record in records:
            for pair in record["pairs"]:
                if not pair["kept"]:
                    continue
                number += 1
                sides = record["images"][str(pair["src"])], record["images"][str(pair["trg"])]
                name, content = annotation(pair, number, sides, names)
                (temporary / "PairAnnotation" / record["split"] / f"{name}.json").write_text(json.dumps(content))
                lines[record["split"]].append(f"{name}\n")
                for i in (pair["src"], pair["trg"]):
                    if i not in placed:
                        category, ident = names[i]
                        placed[i] = path = temporary / "JPEGImages" / category / f"{category}_{ident}.JPEG"
                        path.parent.mkdir(exist_ok=True)
                        place_image(images, i, path, how)
        for split, found in lines.items():
            (temporary / "Layout" / "large" / f"{split}.txt").write_text("".join(found))
        origin = {f"{a}/{a}_{b}.JPEG": str(images.paths[i]) for i, (a, b) in enumerate(names) if i in placed}
        write_whole(out / "names.json", json.dumps(origin, indent=0))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        if not (out / "SC-IMAGENET").exists():
            with contextlib.suppress(OSError):  # a file system without links: the reader has to rename the folder
                (out / "SC-IMAGENET").symlink_to("SC-ImageNet")
    except OSError as error:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write the label set: {error}; the shards are kept, the same command goes on") from None
