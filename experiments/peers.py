"""Score as others do: the protocols of the peers' tables, the paper's own rows beside ours, CATs checkpoints.

    python -m experiments.peers --dataset spair --checkpoint CATS/finetune/best.pt --protocol cats --compare
    python -m experiments.peers --dataset pfwillow --baseline nn --protocol target padded cats

A number can only be put beside others of its protocol. Options are those of evaluate.py without its pictures;
--checkpoint takes CATs of experiments.finetune too.
"""

import argparse
import csv
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import data
import evaluate
from experiments.cats import Cats, as_cats_reads
from experiments.finetune import PROGRAM, load_matcher
from support.files import read_state
from support.run import command, find_device, processes

PAPER_TABLES = Path(__file__).parent.parent / "docs" / "paper_tables.csv"


class Protocol(NamedTuple):
    """How a table was scored: a function from pairs to the pairs that its authors would score."""

    frame: int | tuple[int, int] | None = None  # squashed to S x S or (W, H) pixels; None: own pixels
    swap: bool = False  # target points go to the source and are compared there
    d_of: Literal["answer", "query"] = "answer"  # the image that d is of: that of the found, or of the given
    pad: int | None = None  # on PF-WILLOW d is the extent of points padded with this value: too large
    strict: bool = False  # < instead of <=
    whole: bool = False  # the points asked for are cut to whole pixels of the frame

    def __call__(self, keypoints: data.KeypointSet, rule: str | None = None) -> data.KeypointSet:
        """The pairs, the points that are asked for as source points, with d (of "bbox", "img") and scale."""
        asked = data.KeypointSet(keypoints.name, keypoints.images, [], keypoints.rule)
        asked.sizes = keypoints.sizes
        for p in keypoints.pairs:
            if self.swap:
                p = p._replace(src=p.trg, trg=p.src, src_kps=p.trg_kps, trg_kps=p.src_kps, src_box=p.trg_box,
                               trg_box=p.src_box)
            at, scale = (self.scale(keypoints.size(image)) for image in (p.src, p.trg))
            ends = {"query": (p.src_kps, p.src_box, at, keypoints.size(p.src)),
                    "answer": (p.trg_kps, p.trg_box, scale, keypoints.size(p.trg))}
            d = self.extent(*ends[self.d_of], rule or keypoints.rule, self.pads(keypoints))
            if self.whole:
                p = p._replace(src_kps=(p.src_kps * at).trunc().clamp(0, self.frame - 1) / at)
            asked.pairs.append(p._replace(d=d, scale=tuple(scale.tolist())))
        return asked

    def scale(self, size: tuple[int, int]) -> Tensor:
        """Frame over image, along x and y, for an image of (W, H) pixels."""
        frame = self.frame or size
        return torch.tensor((frame, frame) if isinstance(frame, int) else frame) / torch.tensor(size)

    def extent(self, kps: Tensor, box: data.Box, scale: Tensor, size: tuple[int, int], rule: str,
               pads: bool) -> float:
        """d in the frame: of an image of (W, H) pixels ("img"), of its points padded, or of its box."""
        if rule == "img":
            return float((scale * torch.tensor(size)).max())
        if pads:
            return float((kps * scale).max()) - self.pad
        x0, y0, x1, y1 = box
        return float((scale * torch.tensor([x1 - x0, y1 - y0])).max())

    def pads(self, keypoints: data.KeypointSet) -> bool:
        """Whether d of rule "bbox" is that of padded points."""
        return self.pad is not None and keypoints.name == "PF-WILLOW"

    def __str__(self) -> str:
        frame = (self.frame, self.frame) if isinstance(self.frame, int) else self.frame
        where = "own pixels" if frame is None else f"squashed to {frame[0]}x{frame[1]}"
        query, answer = ("target", "source") if self.swap else ("source", "target")
        way = f"{query} to {answer}, d of the {query if self.d_of == 'query' else answer}"
        return f"{way}, {where}, {'<' if self.strict else '<='} alpha d"


PROTOCOLS = {
    "target": Protocol(),  # HPF, DIFT
    "padded": Protocol(frame=256, pad=-1),  # many older tables of PF-WILLOW, d 1.28 times too large
    "proposalflow": Protocol(strict=True),
    "geoaware": Protocol(strict=True),
    "densematching": Protocol(swap=True),
    "ncnet": Protocol(frame=224, swap=True),  # on PF-PASCAL
    "ncnet-willow": Protocol(swap=True),
    "mmnet": Protocol(frame=(320, 224)),
    "dhpf": Protocol(frame=240, pad=-1),
    "chm": Protocol(frame=240, pad=-2),
    "transformatcher": Protocol(frame=240, pad=-2),
    "cats": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "semimatch": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "scorrsan": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "vat": Protocol(frame=512, swap=True, pad=-1, whole=True),
    "cats++": Protocol(frame=512, swap=True, pad=-1, whole=True),
    "actr": Protocol(frame=512, d_of="query", pad=-1, whole=True),
    "sd4match": Protocol(frame=768),  # its default split, "test"
    "sd4match-ori": Protocol(),  # its split "test_ori"
}


def print_paper(dataset: str, ours: dict[str, dict[tuple[str, str], float]] | None = None) -> None:
    """The rows of the paper's and its supplement's tables for one benchmark, and below each table our own.

    ours: {name: {(class or "all", alpha as text): PCK in per cent}}.
    """
    with open(PAPER_TABLES, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    if not rows:
        print("\nThe paper has no rows on these pairs")
        return
    print(f"\nThe paper's rows on {dataset}; frame, direction and padding are not stated, most likely"
          " those of protocol cats")
    for table in dict.fromkeys(row["table"] for row in rows):
        some = [row for row in rows if row["table"] == table]
        columns = list(dict.fromkeys((row["class"], row["alpha"]) for row in some))
        print(f"{table:30s}" + "".join(f"{(a if c == 'all' else c)[:6]:>7s}" for c, a in columns))
        for method in dict.fromkeys(row["method"] for row in some):
            found = {(row["class"], row["alpha"]): row["pck"] for row in some if row["method"] == method}
            print(f"  {method:28s}" + "".join(f"{found.get(column, '-'):>7s}" for column in columns))
        for name, found in (ours or {}).items():
            cells = (f"{found[column]:.1f}" if column in found else "-" for column in columns)
            print(f"  here: {name[:22]:22s}" + "".join(f"{cell:>7s}" for cell in cells))


def compared(scores: dict, alphas: tuple[float, ...]) -> dict[str, dict[tuple[str, str], float]]:
    """Our scores as `print_paper` takes them. scores: {protocol: {method: table of evaluate.score}}."""
    ours = {}
    for protocol, tables in scores.items():
        for method, table in tables.items():
            (block,) = table.values()
            rows = {"all": block["per_image"]} | block["per_class"]
            ours[f"{method}, {protocol}"] = {
                (c, f"{a:g}"): v for c, values in rows.items() for a, v in zip(alphas, values)
            }
    return ours


def load(args: argparse.Namespace) -> tuple:
    """The matcher and the methods to score it by: experiments.finetune's CATs, or what evaluate.py scores."""
    if not args.checkpoint or read_state(args.checkpoint)["program"] != PROGRAM:
        if args.reading:
            raise ValueError("--reading is of CATs: give --checkpoint of experiments.finetune")
        return evaluate.load_methods(args)
    for name in ("stage", "baseline", "weights", "backbone", "layer", "size", "dense"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"{args.checkpoint} holds CATs: --{name} does not apply")
    readings = list(dict.fromkeys(args.reading or ["cats"]))
    return load_matcher(args.checkpoint, find_device(args.device)), readings


def score_as(name: str, found: dict[str, list[Tensor]], asked: data.KeypointSet, args: argparse.Namespace,
             size: int) -> dict:
    """Score and print predictions by a protocol: {method: table of evaluate.score}."""
    protocol, tables = PROTOCOLS[name], {}
    for method, predictions in found.items():
        table = evaluate.score(predictions, asked, args.alphas, args.rule, protocol.strict)
        ((rule, block),) = table.items()
        shown = {"bbox-padded" if rule == "bbox" and protocol.pads(asked) else rule: block}
        evaluate.print_scores(shown, method, asked, args.alphas, size, f"{name}: {protocol}")
        tables[method] = table
    return tables


def main(argv: list[str] | None = None) -> None:
    parser = evaluate.shared_options(__doc__, "python -m experiments.peers")
    add = parser.add_argument
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["target"], help="score as these peers do")
    add("--compare", action="store_true", help="print the paper's own rows too")
    add("--reading", nargs="+", choices=("cats", "kernel"),
        help="of CATs' volume: its own soft-argmax (default), the project's under a Gaussian round the best")
    args = evaluate.read_options(parser, argv)
    keypoints = evaluate.load_pairs(args)
    matcher, methods = load(args)
    scores, done = {}, {}
    for name in dict.fromkeys(args.protocol):
        protocol = PROTOCOLS[name]
        asked = protocol(keypoints, args.rule)
        if isinstance(matcher, Cats):
            asked = as_cats_reads(asked, matcher.cfg.size)
        depends_on = protocol.swap, protocol.frame if protocol.whole else None
        if depends_on not in done:
            done[depends_on] = evaluate.predict_shared(matcher, asked, methods)
        if not processes()[0]:
            scores[name] = score_as(name, done[depends_on], asked, args, matcher.cfg.size)
    if dist.is_initialized():
        dist.destroy_process_group()
    if processes()[0]:
        return
    if args.compare:
        print_paper((args.dataset or "").removesuffix("-small"), compared(scores, args.alphas))
    if args.json:
        evaluate.write_report(args, matcher, keypoints, scores)


if __name__ == "__main__":
    with command():
        main()
