"""The label set on disk: SC-ImageNet's tree, as the authors' CATs and DHPF read it."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from data import ImageSet
from support.benchmarks import CODES
from support.files import write_whole

# Every tree holds it, from the first moment on: only what has it is ever replaced or deleted.
MARK, MARK_TEXT = "made_by_label.txt", "label.py made this folder, and replaces it with the next label set.\n"


def plain_names(names: list[str]) -> list[str]:
    """Names of letters, digits, '_' and '.' alone (no '-', ':', glob characters or spaces), all different.

    At most 64 characters of a name are kept, and a number is added where two are alike.
    """
    found: dict[str, int] = {}  # and the number that the next one of the same name tries
    for name in names:
        plain = new = re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:64] or "_"
        while new in found:
            found[plain] += 1
            new = f"{plain}_{found[plain]}"
        found[new] = 1
    return list(found)


def image_names(images: ImageSet) -> list[tuple[str, str]]:
    """(category, id) of every image; its file in the tree is <category>/<category>_<id>.JPEG."""
    categories, ids = plain_names(images.classes), {}
    for name, members in zip(images.classes, images.members()):
        stems = [images.paths[i].stem.removeprefix(f"{name}_") for i in members]
        ids |= dict(zip(members, plain_names(stems)))
    return [(categories[label], ids[i]) for i, label in enumerate(images.labels)]


def annotation(
    pair: dict, number: int, sides: tuple[dict, dict], names: list[tuple[str, str]]
) -> tuple[str, dict]:
    """A pair's id and its record in SPair-71k's form; loop_error is every match's, in source pixels."""
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
    record |= dict.fromkeys(("mirror", *CODES), 0)
    return name, record | {"loop_error": [round(e * max(x1 - x0, y1 - y0), 2) for e in pair["errors"]]}


def place_image(images: ImageSet, index: int, path: Path, how: str) -> None:
    """Link or copy an image into the tree; drawn ones, and photographs that are turned upright by their
    camera's tag, which no reader of the tree heeds, are saved. The original is never touched."""
    if not images.as_stored(index):
        images.load(index)[0].save(path, "JPEG", quality=95)
    elif how == "copy":
        shutil.copyfile(images.paths[index], path)
    else:
        path.symlink_to(images.paths[index].resolve())


def fill_tree(root: Path, images: ImageSet, records: Iterable[dict], how: str) -> dict[str, str]:
    """Write images, annotations and layouts of the kept pairs into a new root; the origin of every image."""
    names, placed = image_names(images), {}
    lines: dict[str, list[str]] = {"trn": [], "val": []}
    root.mkdir()
    (root / MARK).write_text(MARK_TEXT)
    for folder in ("PairAnnotation/trn", "PairAnnotation/val", "JPEGImages", "Layout/large"):
        (root / folder).mkdir(parents=True)
    kept = ((record, pair) for record in records for pair in record["pairs"] if pair["kept"])
    for number, (record, pair) in enumerate(kept, 1):
        ends, split = (pair["src"], pair["trg"]), record["split"]
        sides = tuple(record["images"][str(i)] for i in ends)
        name, content = annotation(pair, number, sides, names)
        (root / "PairAnnotation" / split / f"{name}.json").write_text(json.dumps(content))
        lines[split].append(f"{name}\n")
        for i in ends:
            if i not in placed:
                category, ident = names[i]
                placed[i] = f"{category}/{category}_{ident}.JPEG"
                path = root / "JPEGImages" / placed[i]
                path.parent.mkdir(exist_ok=True)
                place_image(images, i, path, how)
    for split, found in lines.items():
        (root / "Layout" / "large" / f"{split}.txt").write_text("".join(found))
    return {placed[i]: str(images.paths[i]) for i in sorted(placed)}


def check_places(out: Path) -> list[Path]:
    """What unfinished runs left of their trees; ValueError where label.py would replace or delete something
    that it did not make, such as the authors' own download."""
    unfinished = sorted(out.glob("SC-ImageNet*.tmp"))
    trees = (*(out / name for name in ("SC-ImageNet", "SC-ImageNet.old", "SC-IMAGENET")), *unfinished)
    known = (trees[0] / MARK).is_file() or any(out.glob("work/*/settings.json"))
    for place in (*trees, *(out / name for name in ("names.json", "summary.json", "drawn"))):
        made = known
        if place in trees:
            made = place.is_dir() and ((place / MARK).is_file() or not any(place.iterdir()))
        if os.readlink(place) != "SC-ImageNet" if place.is_symlink() else place.exists() and not made:
            raise ValueError(f"{place} was not made by this label.py; give another --out, or move it away")
    return unfinished


def remove_tree(root: Path) -> None:
    """Delete a tree, its mark last: what a kill leaves of it is still known as ours."""
    for part in root.iterdir() if root.exists() else ():
        if part.name != MARK:
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)


def write_label_tree(out: Path, images: ImageSet, records: Iterable[dict], how: str) -> None:
    """Write OUT/SC-ImageNet (and its second name SC-IMAGENET, which DHPF wants) from the records of pair
    shards.

    how: "link" or "copy" images. Written under a temporary name and put in place as a whole; OSError leaves
    an earlier tree as it was. ValueError if what is there now is not ours.
    """
    final, old, temporary = (out / f"SC-ImageNet{end}" for end in ("", ".old", f".{os.getpid()}.tmp"))
    for left in check_places(out):
        remove_tree(left)
    try:
        origin = fill_tree(temporary, images, records, how)
        write_whole(out / "names.json", json.dumps(origin, indent=0))
        if final.exists():
            remove_tree(old)
            final.rename(old)
        temporary.rename(final)
        remove_tree(old)
        if not (out / "SC-IMAGENET").exists():
            with contextlib.suppress(OSError):  # without links on the file system a reader renames the folder
                (out / "SC-IMAGENET").symlink_to("SC-ImageNet")
    except OSError as error:
        rest = "the shards are kept, the same command goes on"
        raise OSError(f"cannot write the label set: {error}; {rest}") from None
    finally:  # also where a signal stops it
        if old.exists() and not final.exists():
            old.rename(final)
        remove_tree(temporary)
