"""Where the benchmarks lie on disk, and where they are fetched from."""

import os
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from tqdm import tqdm


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
        ("PF-PASCAL", "PF-dataset-PASCAL", "pf-pascal/PF-dataset-PASCAL"),  # the last: where NCNet puts it
        "JPEGImages",
        "JPEGImages/<image>.jpg, Annotations/<class>/<image>.mat, {trn,val,test}_pairs.csv or"
        " {train,val,test}_pairs_pf_pascal.csv, or NCNet's image_pairs/{train,val,test}_pairs.csv inside or"
        " beside that folder; from www.di.ens.fr/willow/research/proposalflow",
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
        "JPEGImages/<category>/<id>.jpg, PairAnnotation/<split>/<pair>.json,"
        " Layout/{large,small}/{trn,val,test}.txt; from cvlab.postech.ac.kr/research/SPair-71k",
        "http://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz",
    ),
    "labels": Benchmark(
        "label set",
        ("SC-ImageNet", "SC-IMAGENET"),
        "JPEGImages",
        "JPEGImages/<category>/<category>_<id>.JPEG, PairAnnotation/<split>/<pair>.json,"
        " Layout/large/{trn,val}.txt; from label.py or, the authors' own, github.com/21210240056/SC-ImageNet",
    ),
}


def places(name: str, root: str | None) -> list[Path]:
    """Where a benchmark's folder may be, in order: root itself or one of its names in root; without a root
    one of its names in the current folder, in datasets/ or in $COCR_DATA.
    """
    folders = BENCHMARKS[name].folders
    if root:
        return [Path(root, folder) for folder in ("", *folders)]
    roots = ("", "datasets", os.environ.get("COCR_DATA") or "datasets")
    return [Path(root, folder) for root in roots for folder in folders]


def is_there(name: str, root: str | None) -> bool:
    """Whether one of the places holds a benchmark, whole or not: a download leaves it as it is."""
    made = Path(root or "datasets", BENCHMARKS[name].folders[0])
    return made.exists() or any((place / BENCHMARKS[name].holds).is_dir() for place in places(name, root))


def benchmark_file(name: str, root: str | None, *files: str, within: tuple[str, ...] = ("",)) -> Path:
    """The first of some files in a benchmark's folder, or in folders `within` it; ValueError, in one line,
    says how to get it."""
    for path in (place / inner / file for place in places(name, root) for inner in within for file in files):
        if path.exists():
            return path
    title, folders, _, layout, archive, _ = BENCHMARKS[name]
    wanted, names = f"expected {' or '.join(files)}", " or ".join(folders)
    missing = f"{title} not found: {wanted} in {names} in the current folder, in datasets/ or in $COCR_DATA"
    command = f"python evaluate.py --dataset {name} --download"
    if root:
        missing = f"{title} folder {root}: {wanted} in it, or in {names} inside it"
        command += f" --datapath {quote(root)}"
    fetch_it = f"; to fetch it: {command}" if archive and not is_there(name, root) else ""
    raise ValueError(f"{missing}; the layout: {layout}{fetch_it}")


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
    """Unpack a zip or tar; any kind of error for a damaged one and for a member outside the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for member in packed.namelist():
                if not (folder / member).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{member!r} would be unpacked outside its folder")
            packed.extractall(folder)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def download(name: str, root: str | None = None) -> None:
    """Fetch a benchmark into its folder in root (None: datasets/), unless it is in one of its places.

    ValueError, in one line, leaves nothing behind.
    """
    if name not in (known := [key for key, benchmark in BENCHMARKS.items() if benchmark.archive]):
        raise ValueError(f"--download: nothing to fetch for {name}; known: {', '.join(known)}")
    if is_there(name, root):
        return
    title, folders, holds, _, url, lists = BENCHMARKS[name]
    target, at = Path(root or "datasets", folders[0]), url
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
        reason = f"{' '.join(str(error).split())}; nothing was kept"
        raise ValueError(f"cannot download {at}: {reason}; by hand: unpack {url} as {target}{rest}") from None
