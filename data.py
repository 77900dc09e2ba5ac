"""Every data set, the views that training takes of an image, and all coordinate conversions.

Training sets give images with class labels and pair them within a class; keypoint sets give image pairs with annotated
points and are only ever scored on. `shapes` is both, is drawn on the fly, and needs no files.

Keypoints are (x, y) with pixel centres at integers. Every image is squashed to S x S and cut into h x w cells, so a
cell's centre is ((i + 0.5) * W / w - 0.5) in the pixels of the image itself; `pixels_to_cells` and `cells_to_pixels`
are the only places that know.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

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
        return open_image(path), open_saliency(sal) if sal else None

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
    """The weak pairs of SPair-71k's large training layout: lines `seq-source-target:category`."""
    layout = Path(root or "", "Layout", "large", "trn.txt")
    if not layout.is_file():
        raise ValueError(f"--root {root}: expected SPair-71k with JPEGImages/<category>/ and Layout/large/trn.txt")
    pairs = []
    for number, line in enumerate(layout.read_text().split(), 1):
        try:
            ids, category = line.split(":")
            _, src, trg = ids.split("-")
        except ValueError:
            raise ValueError(f"{layout} line {number}: {line!r} is not seq-source-target:category") from None
        folder = Path(root or "", "JPEGImages", category)
        pairs.append((folder / f"{src}.jpg", folder / f"{trg}.jpg", category))
    return PairedSet(pairs, saliency)


PASCAL_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def pfpascal_train(root: str | None, saliency: str | None = None) -> PairedSet:
    """The weak pairs of PF-PASCAL's training split (trn_pairs.csv, or NCNet's train_pairs_pf_pascal.csv).

    Rows with flip 1 repeat the others mirrored; training mirrors at random, so they are left out.
    """
    found = [p for p in (Path(root or "", n) for n in ("trn_pairs.csv", "train_pairs_pf_pascal.csv")) if p.is_file()]
    if not found:
        raise ValueError(f"--root {root}: expected PF-PASCAL with JPEGImages/ and trn_pairs.csv")
    with open(found[0], newline="") as file:
        rows = list(csv.reader(file))[1:]
    folder, pairs, known = Path(root or "", "JPEGImages"), [], dict(enumerate(PASCAL_CLASSES, 1))
    for number, row in enumerate(rows, 2):
        try:
            src, trg, label, flip = row
            name, flip = known[int(label)], int(flip)
        except (ValueError, KeyError):
            raise ValueError(f"{found[0]} line {number}: expected source,target,class 1 to 20,flip 0 or 1") from None
        if not flip:
            pairs.append((folder / Path(src).name, folder / Path(trg).name, name))
    return PairedSet(pairs, saliency)


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
        return {
            "src_img": src_img,
            "trg_img": trg_img,
            "src_sal": src_sal,
            "trg_sal": trg_sal,
            "label": self.images.labels[src],
            "index": (src, trg),
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


class KeypointPair(NamedTuple):
    """Two images by their ids in a KeypointSet, corresponding points and the target object's extent."""

    src: int
    trg: int
    src_kps: Tensor  # (n, 2) pixels of the source image
    trg_kps: Tensor  # (n, 2) pixels of the target image
    category: str
    extent: float  # longer side of the target object's box in target pixels: d of PCK, rule "bbox"


class KeypointSet:
    """Images and annotated pairs of them; `load(id)` gives an RGB image and its saliency map or None."""

    def __init__(self, name: str, images: ImageSet, pairs: list[KeypointPair]) -> None:
        self.name, self.images, self.pairs, self.sizes = name, images, pairs, {}

    def __len__(self) -> int:
        return len(self.pairs)

    def size(self, index: int) -> tuple[int, int]:
        """(W, H) of an image in pixels."""
        if index not in self.sizes:
            self.sizes[index] = self.load(index)[0].size
        return self.sizes[index]

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        return self.images.load(index)


def pfwillow(root: str | None) -> KeypointSet:
    """PF-WILLOW's 900 pairs from test_pairs.csv: paths in columns 0 and 1, then ten x and ten y of either image.

    The extent is the longer side of the box around the target's points (rule "bbox": no padding enters it).
    """
    found = [p for p in (Path(root or "", n) for n in ("test_pairs.csv", "test_pairs_pf.csv")) if p.is_file()]
    if not found:
        raise ValueError(
            f"PF-WILLOW folder {root}: expected test_pairs.csv and <folder>/<image>.png"
            " (www.di.ens.fr/willow/research/proposalflow)"
        )
    with open(found[0], newline="") as file:
        rows = list(csv.reader(file))[1:]
    ids: dict[tuple[str, str], int] = {}
    pairs = []
    for number, row in enumerate(rows, 2):
        try:
            kps = torch.tensor([float(v) for v in row[2:]]).view(2, 2, 10).transpose(1, 2)  # (image, point, xy)
            (folder, _), _ = names = [tuple(Path(p).parts[-2:]) for p in row[:2]]
            if not kps.isfinite().all() or len(names[1]) < 2:
                raise ValueError
        except (ValueError, RuntimeError):
            raise ValueError(f"{found[0]} line {number}: expected two <folder>/<image> and 40 coordinates") from None
        src, trg = (ids.setdefault(name, len(ids)) for name in names)
        extent = float((kps[1].amax(0) - kps[1].amin(0)).max())
        pairs.append(KeypointPair(src, trg, kps[0], kps[1], folder, extent))
    if not pairs:
        raise ValueError(f"{found[0]}: no pairs in it")
    classes = sorted({folder for folder, _ in ids})
    labels = [classes.index(folder) for folder, _ in ids]
    return KeypointSet("PF-WILLOW", ImageSet([Path(root or "", *i) for i in ids], labels, classes), pairs)


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
        x0, y0, x1, y1 = b["bbox"]
        pairs.append(KeypointPair(src, trg, *kps, images.classes[images.labels[src]], max(x1 - x0, y1 - y0)))
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
