"""Readers of the benchmarks: annotated pairs to score on, weak pairs to train on, lists of one's own.

SPair-71k and label sets in its form, PF-PASCAL, PF-WILLOW, pairs in a CSV file; `shapes` is drawn. A `root`
is the benchmark's folder or one that holds it; None: see download.places. ValueErrors name the file and its
line: that of a malformed entry, of a point outside its image (benchmarks: more than a pixel beyond the
centres of the outermost pixels, which lets SPair-71k's last pixel through) and of a box without extent, by
which nothing could be scored. Images that are missing are named when they are loaded.
"""

import csv
import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Box, ImageSet, KeypointPair, KeypointSet, class_folders, image_size
from support.download import BENCHMARKS, benchmark_file
from support.shapes import Shapes, shapes_pairs


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
    if len(header := rows[0][1]) == 1 and (mark := {";", "\t"} & set(header[0])):
        raise ValueError(f"{path}: its columns are separated by {mark.pop()!r}; expected ','")
    return rows


def point_tensors(src: Iterable, trg: Iterable) -> tuple[Tensor, Tensor]:
    """Two lists of points as float tensors (n, 2); ValueError unless equally many, not none, and finite."""
    kps = [torch.tensor(points, dtype=torch.float32) for points in (src, trg)]
    if not all(len(k) == len(kps[0]) > 0 and k.shape[1:] == (2,) and k.isfinite().all() for k in kps):
        counts = f"{len(kps[0])} source and {len(kps[1])} target points"
        raise ValueError(f"{counts}: expected equally many, at least one, each of two finite coordinates")
    return kps[0], kps[1]


def point_columns(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Columns XA, YA, XB, YB, each numbers joined by ';', as source and target points (n, 2)."""
    numbers = [[float(v) for v in text.removesuffix(";").split(";")] if text else [] for text in texts]
    if len({len(column) for column in numbers}) > 1:
        counts = ", ".join(str(len(column)) for column in numbers)
        raise ValueError(f"XA, YA, XB and YB hold {counts} numbers")
    return point_tensors(list(zip(*numbers[:2])), list(zip(*numbers[2:])))


def span(kps: Tensor) -> Box:
    """The box round points (n, 2)."""
    return (*kps.amin(0).tolist(), *kps.amax(0).tolist())


def read_mat(path: Path, **shapes: tuple[int, int]) -> list[np.ndarray]:
    """Variables of a MATLAB file, each a matrix of a given shape (-1: any); ValueError names the file."""
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


def check_pair(where: str, keypoints: KeypointSet, pair: KeypointPair, slack: float) -> None:
    """ValueError, at `where`, for a box without extent and for a point outside its image: `slack` pixels
    beyond the centres of the outermost pixels, 0.5 being the image's edge."""
    for side, index, kps, box in (("source", pair.src, pair.src_kps, pair.src_box),
                                  ("target", pair.trg, pair.trg_kps, pair.trg_box)):
        if not max(box[2] - box[0], box[3] - box[1]) > 0:
            corners = "{:g},{:g} to {:g},{:g}".format(*box)
            raise ValueError(f"{where}: the {side}'s box, {corners}, has no extent, so that d of PCK is 0;"
                             " the box round points needs two of them, apart")
        try:
            width, height = keypoints.size(index)
        except ValueError:  # loading names the file; training passes over it
            continue
        for number, (x, y) in enumerate(kps.tolist(), 1):
            x = width - x if index in keypoints.images.mirrored else x  # as it is written
            if not (-slack <= x <= width - 1 + slack and -slack <= y <= height - 1 + slack):
                image = f"{keypoints.images.paths[index]} of {width}x{height} px"
                raise ValueError(f"{where}: {side} point {number} ({x:g}, {y:g}) lies outside {image}")


def gather(name: str, origin: Path, found: list[tuple], rule: str = "bbox", slack: float = 1.0,
           upright: bool = False) -> KeypointSet:
    """A KeypointSet of pairs that name their images by (path, mirrored): every distinct image gets one id.

    Its label is the category of the first pair that shows it. origin: the list, named if it has no pairs.
    found: (where it is written, source, target, ...), from there on as in KeypointPair. slack: see
    check_pair.
    """
    if not found:
        raise ValueError(f"{origin}: no pairs in it")
    shown: dict[tuple[Path, bool], str] = {}
    for _, src, trg, _, _, category, *_ in found:
        shown.setdefault(src, category)
        shown.setdefault(trg, category)
    classes, ids = sorted(set(shown.values())), {image: k for k, image in enumerate(shown)}
    labels = [classes.index(label) for label in shown.values()]
    images = ImageSet([path for path, _ in shown], labels, classes)
    images.mirrored, images.upright = {ids[image] for image in shown if image[1]}, upright
    pairs = [KeypointPair(ids[src], ids[trg], *rest) for _, src, trg, *rest in found]
    keypoints = KeypointSet(name, images, pairs, rule)
    for (where, *_), pair in zip(found, pairs):
        check_pair(where, keypoints, pair, slack)
    return keypoints


class PairedSet(ImageSet):
    """Images whose same-class pairs are given by a benchmark's training split; keypoints are never read."""

    def __init__(
        self, pairs: list[tuple[Path, Path, str]], saliency: str | None = None, rescale: bool = True
    ) -> None:
        names = sorted({name for *_, name in pairs})
        # a picture may show two classes
        images = sorted({(path, name) for *pair, name in pairs for path in pair})
        labels = [names.index(name) for _, name in images]
        super().__init__([path for path, _ in images], labels, names, saliency, rescale)
        index = {image: k for k, image in enumerate(images)}
        self.pairs = [(index[src, name], index[trg, name]) for src, trg, name in pairs]

    def epoch_pairs(self, seed: int, epoch: int) -> list[tuple[int, int]]:
        order = np.random.default_rng((seed, epoch)).permutation(len(self.pairs))
        return [self.pairs[k] for k in order]


# ------------------------------------------------------------------------------------------------------------
# SPair-71k, and label sets in its form

CODES = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")  # 0 to 2 twice, 0 to 3 twice


def layout_lines(path: Path) -> Iterator[tuple[int, str, str, str, str]]:
    """Lines `seq-source-target:category` of a layout file: number, the line, source, target, category."""
    for number, line in enumerate(path.read_text().split(), 1):
        try:
            ids, category = line.split(":")
            _, src, trg = ids.split("-")
        except ValueError:
            raise ValueError(f"{path} line {number}: {line!r} is not seq-source-target:category") from None
        yield number, line, src, trg, category


def annotated_pairs(name: str, root: str | None, split: str, layout: str, file: str | None) -> KeypointSet:
    """Pairs in SPair-71k's form; file: names of images from {category} and {id}, or None: as recorded."""
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
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None
        found.append((path, *images, *kps, category, *boxes, codes))
    small = f" {layout}" if layout != "large" else ""
    return gather(f"{BENCHMARKS[name].title}{small} {split}", listed, found)


def spair_pairs(root: str | None, split: str, layout: str = "large") -> KeypointSet:
    """SPair-71k's trn, val or test pairs of the large or the small layout."""
    return annotated_pairs("spair", root, split, layout, None)


def label_pairs(root: str | None, split: str) -> KeypointSet:
    """The trn or val pairs of a label set, SC-ImageNet or one that label.py wrote."""
    return annotated_pairs("labels", root, split, "large", "{category}_{id}.JPEG")


def spair_train(root: str | None, saliency: str | None = None, rescale: bool = True) -> PairedSet:
    """The weak pairs of SPair-71k's large training layout."""
    layout = benchmark_file("spair", root, "Layout/large/trn.txt")
    pairs = []
    for _, _, src, trg, category in layout_lines(layout):
        folder = layout.parents[2] / "JPEGImages" / category
        pairs.append((folder / f"{src}.jpg", folder / f"{trg}.jpg", category))
    return PairedSet(pairs, saliency, rescale)


# ------------------------------------------------------------------------------------------------------------
# PF-PASCAL

PASCAL_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def pfpascal_list(root: str | None, split: str) -> tuple[Path, Path]:
    """The list of a split, trn, val or test, and the folder with JPEGImages and Annotations in it.

    The list lies in that folder or, as NCNet has it, in image_pairs inside or beside it.
    """
    train = split.replace("trn", "train")
    names = dict.fromkeys((f"{split}_pairs.csv", f"{train}_pairs_pf_pascal.csv", f"{train}_pairs.csv"))
    listed = benchmark_file("pfpascal", root, *names, within=("", "image_pairs", "../image_pairs"))
    folder = listed.parents[listed.parent.name == "image_pairs"]
    inside = (folder / name for name in ("", *BENCHMARKS["pfpascal"].folders))
    return listed, next((place for place in inside if (place / "JPEGImages").is_dir()), folder)


def pfpascal_rows(path: Path, images: Path) -> Iterator[tuple[int, Path, Path, str, bool, list[str]]]:
    """Rows of a list of PF-PASCAL: line, both images, class, flip, and XA, YA, XB, YB where it has them."""
    (_, header), *rows = read_rows(path)
    known = dict(enumerate(PASCAL_CLASSES, 1))
    for number, row in rows:
        try:
            src, trg, label, *rest = row
            name, flip = known[int(label)], len(rest) == 1 and bool(("0", "1").index(rest[0]))
            if len(row) != len(header) or len(rest) in (2, 3):
                raise ValueError
        except (ValueError, KeyError):
            wanted = "source,target,class 1 to 20,flip 0 or 1 (test: XA,YA,XB,YB instead), as in the header"
            raise ValueError(f"{path} line {number}: expected {wanted}") from None
        points = rest[:4] if len(rest) > 1 else []
        yield number, images / Path(src).name, images / Path(trg).name, name, flip, points


def pfpascal_pairs(root: str | None, split: str) -> KeypointSet:
    """PF-PASCAL's trn, val or test pairs; rule "img".

    Points are the list's (test) or else the .mat files': the rows that are finite in both. Boxes are the .mat
    files', or whole images where a list with points comes without them. Flip 1 mirrors images, points and
    boxes, x to W - x as is the benchmark's custom.
    """
    listed, folder = pfpascal_list(root, split)
    notes, scipy, found = folder / "Annotations", importlib.util.find_spec("scipy"), []
    read, size, whole = functools.cache(read_mat), functools.cache(image_size), 0
    for number, *paths, name, flip, texts in pfpascal_rows(listed, folder / "JPEGImages"):
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
        ends = ((path, flip) for path in paths)
        found.append((f"{listed} line {number}", *ends, *kps, name, *boxes))
    if whole:
        print("boxes of PF-PASCAL are whole images: its .mat files need pip install scipy", file=sys.stderr)
    return gather(f"PF-PASCAL {split}", listed, found, "img")


def pfpascal_train(root: str | None, saliency: str | None = None, rescale: bool = True) -> PairedSet:
    """The weak pairs of PF-PASCAL's training split.

    Rows with flip 1 repeat the others mirrored; training mirrors at random, so they are left out.
    """
    listed, folder = pfpascal_list(root, "trn")
    rows = pfpascal_rows(listed, folder / "JPEGImages")
    pairs = [(src, trg, name) for _, src, trg, name, flip, _ in rows if not flip]
    return PairedSet(pairs, saliency, rescale)


# ------------------------------------------------------------------------------------------------------------
# PF-WILLOW

WILLOW_FOLDERS = [
    *("car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"),
    *("winebottle(M)", "winebottle(wC)", "winebottle(woC)"),
]


def willow_from_mats(root: Path) -> Iterator[tuple[str, list[Path], tuple[Tensor, Tensor]]]:
    """PF-WILLOW's 900 pairs, all ordered pairs of a folder's ten images: where they are written, the images
    and the points."""
    for name in WILLOW_FOLDERS:
        files = sorted((root / name).glob("[!.]*.mat"))
        if len(files) != 10:
            raise ValueError(f"{root / name}: {len(files)} .mat files; where no list is, ten are expected")
        points = [read_mat(file, pts_coord=(2, 10))[0].T for file in files]
        for i, j in itertools.permutations(range(10), 2):
            paths = [files[k].with_suffix(".png") for k in (i, j)]
            yield f"{files[i]} with {files[j].name}", paths, point_tensors(points[i], points[j])


def willow_from_csv(path: Path) -> Iterator[tuple[str, list[Path], tuple[Tensor, Tensor]]]:
    """The same from a list: paths in columns 0 and 1, then ten x and ten y of either image."""
    for number, row in read_rows(path)[1:]:
        try:
            kps = np.array(row[2:], float).reshape(2, 2, 10).swapaxes(1, 2)  # (image, point, xy)
            (src, _), (trg, _) = names = [Path(p).parts[-2:] for p in row[:2]]
            kps = point_tensors(*kps)
        except ValueError:
            wanted = "expected two <folder>/<image> and 40 coordinates"
            raise ValueError(f"{path} line {number}: {wanted}") from None
        yield f"{path} line {number}", [path.parent.joinpath(*name) for name in names], kps


def pfwillow(root: str | None) -> KeypointSet:
    """PF-WILLOW's 900 pairs, from its list or, without one, from its .mat files.

    The boxes are those around the ten points (rule "bbox": no padding enters them).
    """
    origin = benchmark_file("pfwillow", root, "test_pairs.csv", "test_pairs_pf.csv", WILLOW_FOLDERS[0])
    rows, found = willow_from_mats(origin.parent) if origin.is_dir() else willow_from_csv(origin), []
    for where, (src, trg), kps in rows:
        found.append((where, (src, False), (trg, False), *kps, src.parent.name, *map(span, kps)))
    return gather("PF-WILLOW", origin, found)


# ------------------------------------------------------------------------------------------------------------
# Lists of one's own


def csv_pairs(path: str | Path, root: str | None = None) -> KeypointSet:
    """Pairs of one's own: a CSV with columns source,target,XA,YA,XB,YB and, if wanted, class.

    Images are relative to root, or to the file without one, and upright, see data.open_image; XA and YA hold
    the source's points, numbers of pixels joined by ';', XB and YB the target's. The boxes are those around
    the points.
    """
    path, columns = Path(path), ("source", "target", "XA", "YA", "XB", "YB")
    (_, header), *rows = read_rows(path)
    expected = f"expected {','.join(columns)} and, if wanted, class"
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; {expected}")
    if double := [column for column in header if column and header.count(column) > 1]:
        raise ValueError(f"{path}: column {double[0]} is there twice; {expected}")
    if root and not Path(root).is_dir():
        raise ValueError(f"--datapath {root}: no such folder; the images of {path} are looked for in it")
    found, folder = [], Path(root or path.parent)
    for number, row in rows:
        record, where = dict(zip(header, row)), f"{path} line {number}"
        try:
            if len(row) != len(header) or not (record["source"] and record["target"]):
                raise ValueError(f"expected two images, and {len(header)} columns as in the header")
            images = [folder / record[column] for column in columns[:2]]
            if gone := [image for image in images if not image.is_file()]:
                raise ValueError(f"no such image: {gone[0]}; --datapath names another folder for images")
            kps = point_columns([record[column] for column in columns[2:]])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        ends = ((image, False) for image in images)
        found.append((where, *ends, *kps, record.get("class") or "all", *map(span, kps)))
    return gather(path.name, path, found, slack=0.5, upright=True)


# ------------------------------------------------------------------------------------------------------------
# What the options name

DATASETS: dict[str, Callable[[str | None, str], KeypointSet]] = {
    "shapes": lambda root, split: shapes_pairs(split),
    "pfwillow": lambda root, split: pfwillow(root),  # it has a test split only
    "pfpascal": pfpascal_pairs,
    "spair": spair_pairs,
    "spair-small": lambda root, split: spair_pairs(root, split, "small"),
    "labels": label_pairs,
}
TRAINING_SETS = {"folder": class_folders, "spair": spair_train, "pfpascal": pfpascal_train}


def training_set(cfg) -> ImageSet:
    """The images of --dataset with their saliency maps, if any.

    cfg: its dataset, root and saliency, and saliency_rescale where it has one.
    """
    if cfg.dataset == "shapes":
        return Shapes("train", cfg.saliency == "auto")
    if cfg.dataset not in TRAINING_SETS:
        raise ValueError(f"--dataset {cfg.dataset}: shapes, {', '.join(TRAINING_SETS)}")
    maps = None if cfg.saliency in ("auto", "attention", "none") else cfg.saliency
    return TRAINING_SETS[cfg.dataset](cfg.root, maps, getattr(cfg, "saliency_rescale", True))


def keypoint_set(cfg, split: str) -> KeypointSet | None:
    """The annotated pairs of --val; of shapes the objects of `split` ("val" or "test"), never those trained
    on.

    cfg: its dataset, val and val_root.
    """
    name = cfg.val if cfg.val != "auto" else ("shapes" if cfg.dataset == "shapes" else "none")
    if name == "none":
        return None
    if name not in DATASETS:
        raise ValueError(f"--val {name}: {', '.join(DATASETS)}, none")
    return DATASETS[name](cfg.val_root, split)
