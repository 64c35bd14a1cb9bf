#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["pillow>=10", "ImageHash>=4.3", "numpy>=2.0", "scipy>=1.10", "tqdm"]
# ///
"""Build a labelled drawing set from the Open Clip Art Library.

The source is Debian's package ``openclipart-png``, whose drawings were sorted
into folders by people and placed in the public domain.  The result is a folder
of class folders, ``{train,val}/<category>/<name>.webp``, with an ``index.csv``,
a ``LICENSE`` and a ``README.md`` whose numbers are counted here.

    python build_openclipart.py            # build
    python build_openclipart.py --verify   # check what was built
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import shutil
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import Pool
from pathlib import Path, PurePosixPath

import imagehash
import numpy as np
from PIL import Image, ImageChops, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

warnings.simplefilter("error", Image.DecompressionBombWarning)

HERE = Path(__file__).resolve().parent
PACKAGE = "openclipart-png 1:0.18+dfsg"
SOURCE = Path("/usr/share/openclipart/png")

#: pHash, dHash and normalised grey thumbnail of one drawing.
Look = tuple[int, int, np.ndarray]

#: A category and the folders of the collection it is made of (with sub-folders).
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("animals",),
    "buildings": ("buildings",),
    "computers": ("computer",),
    "flags": ("signs_and_symbols/flags",),
    "food": ("food",),
    "geography": ("geography",),
    "music": ("recreation/music",),
    "office": ("office",),
    "people": ("people",),
    "plants": ("plants",),
    "signs": ("transportation/aiga-symbols", "transportation/roadsigns"),
    "sports": ("recreation/sports",),
    "tools": ("tools",),
    "transportation": ("transportation",),
}
#: Sub-folders left out: icon themes, colour variants of buttons, and members which
#: do not show what the category's name says.
SKIPPED = (
    "buildings/furniture",
    "computer/buttons",
    "computer/icons",
    "people/clothing",
    "tools/weapons",
)
#: Seen by eye; most such drawings are recognised by `is_broken`.
BROKEN = frozenset({"animals/birds/duck_yellow_ii_kurt_cagl_.png"})

CAP = 250  # most drawings in a category
VAL_SHARE = 0.3  # share of every category held out
QUALITY = 80  # WebP quality
MIN_SIDE = 32  # a drawing whose longer side is shorter than this is too small
MIN_SPREAD = 4.0  # a drawing whose grey values spread less than this is blank
MARGIN = 0.04  # white margin around the trimmed drawing

# Two drawings are near duplicates where all three measures agree.
THUMB = 24  # side of the grey thumbnail whose correlation is taken
STRICT = (12, 12, 0.90)  # most bits of pHash, of dHash (of 64); least correlation
LOOSE = (20, 20, 0.80)  # the same where both names begin with the same word

#: Words in a file name which tell variants of one drawing apart.
VARIANT_WORDS = frozenset(
    "bw color colour colored coloured black white red green blue yellow orange "
    "pink purple grey gray brown small big left right r".split()
)
MIN_FAMILY_NAME = 6  # letters that a name must keep to make a family

REASONS = {
    "unreadable": "unreadable, or larger than Pillow's default limit on pixels",
    "blank": "blank or nearly blank",
    "small": f"drawing smaller than {MIN_SIDE} px",
    "broken": "badly rendered (shows the text “Linked Image Not Found”)",
    "copy": "exact copy of another drawing of its category",
    "ambiguous": "lies in two categories",
    "cap": f"over the cap of {CAP} drawings a category",
}

LICENCE = """\
These drawings come from the Open Clip Art Library (http://www.openclipart.org)
by way of the Debian package openclipart-png, whose copyright file says:

Copyright:

 creative commons Public Domain Dedication

 Copyright-Only Dedication (based on United States law) or Public Domain
 Certification

 The person or persons who have associated work with this document (the
 "Dedicator" or "Certifier") hereby either (a) certifies that, to the best
 of his knowledge, the work of authorship identified is in the public
 domain of the country from which the work is published, or (b) hereby
 dedicates whatever copyright the dedicators holds in the work of authorship
 identified below (the "Work") to the public domain. A certifier, moreover,
 dedicates any copyright interest he may have in the associated work, and
 for these purposes, is described as a "dedicator" below.

 A certifier has taken reasonable steps to verify the copyright status of
 this work. Certifier recognizes that his good faith efforts may not shield
 him from liability if in fact the work certified is not in the public domain.

 A dedicator makes this dedication for the benefit of the public at large and
 to the detriment of the Dedicator's heirs and successors. Dedicators intend
 this dedication to be an overt act of relinquishment in perpetuity of all
 present and future rights under copyright law, whether vested or contingent,
 in the Work. Dedicator understand that such relinquishment of all rights
 includes the relinquishment of all rights to enforce (by lawsuit or otherwise)
 those copyrights in the Work.

 Dedicator recognizes that, once placed in the public domain, the Work may be
 freely reproduced, distributed, transmitted, used, modified, built upon, or
 otherwise exploited by anyone for any purpose, commercial or non-commercial,
 and in any way, including by methods that have not yet been invented or
 conceived.
"""

README = """\
# Open Clip Art, sorted by people

{total} public-domain drawings in {classes} categories, {size} px WebP on white.  A label
is the folder into which the collection's own editors put a drawing, so a category
holds drawings that mean the same and look very different.

Source: the Open Clip Art Library as packaged by Debian, `{package}`.
Licence: public domain (text below and in `LICENSE`).

Layout: `train/<category>/<name>.webp` and `val/<category>/<name>.webp`.  `index.csv`
has one row a drawing: path, label, split, near-duplicate group, path in the source.

## Rebuild

Written by `data/build_openclipart.py`; do not edit by hand.

    apt-get install openclipart-png
    pip install pillow ImageHash numpy scipy tqdm
    python data/build_openclipart.py            # same seed, same bytes
    python data/build_openclipart.py --verify

Without Debian, unpack the package (`dpkg-deb -x openclipart-png_*.deb somewhere`, or
`ar x` and `tar xf`) and pass `--source somewhere/usr/share/openclipart/png`.

## Counts

{counts}

Made from these folders of the collection, sub-folders included (left out: {skipped}):

{folders}

## Drawings left out

{dropped}

A copy that lies in two categories is left out of both, unless one of its folders
contains the other: then the inner folder gives the label (a road sign stored in both
`transportation` and `transportation/roadsigns` is a sign).  `unsorted` is not used.
The cap keeps the drawings with the smallest seeded hash of their path.

The labels are the editors' own and were not corrected: a few drawings are misfiled (a
padlock among the animals, four houses among the computers).

## How a drawing is made

Transparency is flattened on white, the empty border trimmed, the drawing padded with
white to a square, resized (Lanczos) to {size} px and saved as WebP, quality {quality}.

## Near duplicates

Many drawings come in variants.  Two drawings are linked where either

* they look alike, also in mirror image: perceptual hashes at most {strict[0]} (pHash) and
  {strict[1]} (dHash) of 64 bits apart, and grey {thumb} x {thumb} thumbnails correlated
  at {strict[2]:.2f} or more; where both file names begin with the same word, {loose[0]} and
  {loose[1]} bits and {loose[2]:.2f} are enough; or
* they are of one category and their file names differ only in numbers and in words
  such as `bw` or a colour.

Connected drawings are one group, and a group is always wholly in `train` or wholly in
`val`, also where it reaches over two categories; within that, every category is split
about 70 to 30.  There are {groups} groups of two or more drawings, with {grouped}
drawings in them; the largest has {largest}; {crossing} reach over two categories.

## Licence text

{licence}"""


@dataclass(frozen=True)
class Drawing:
    """One drawing on its way from the source to the written folder."""

    source: str
    label: str
    data: bytes = b""
    problem: str = ""
    name: str = ""
    group: int = -1
    split: str = ""

    @property
    def path(self) -> str:
        """Path below the output folder."""
        return f"{self.split}/{self.label}/{self.name}"


@dataclass(frozen=True)
class Looks:
    """What is compared of many drawings, one row a drawing."""

    phash: np.ndarray
    dhash: np.ndarray
    thumb: np.ndarray


# --- finding and drawing -------------------------------------------------------


def inside(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it."""
    return path == folder or path.startswith(folder + "/")


def owning_folder(source: str) -> str:
    """Return the innermost chosen folder that holds a source path."""
    folders = chain.from_iterable(CATEGORIES.values())
    return max((f for f in folders if inside(source, f)), key=len)


def find_drawings(root: Path) -> list[Drawing]:
    """List the PNG files of the chosen folders, labelled, in order of path."""
    label_of = {f: label for label, folders in CATEGORIES.items() for f in folders}
    found = set()
    for folder in label_of:
        if not (root / folder).is_dir():
            raise SystemExit(
                f"The source folder {root / folder} is missing. Install the Debian package "
                "openclipart-png, or unpack its .deb file and pass its folder "
                "usr/share/openclipart/png as --source."
            )
        found |= {p.relative_to(root).as_posix() for p in (root / folder).rglob("*.png")}
    kept = sorted(s for s in found if not any(inside(s, f) for f in SKIPPED))
    return [Drawing(source, label_of[owning_folder(source)]) for source in kept]


def flatten(path: Path) -> Image.Image:
    """Read a drawing and put it on white."""
    with Image.open(path) as image:
        drawing = image.convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return page.convert("RGB")


def content_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box around all that is not white, or None."""
    difference = ImageChops.invert(image.convert("L"))
    colour = ImageChops.invert(ImageChops.darker(*image.split()[:2]))
    blue = ImageChops.invert(image.getchannel("B"))
    ink = ImageChops.lighter(ImageChops.lighter(difference, colour), blue)
    return ink.point(lambda value: 255 * (value > 8)).getbbox()


def is_broken(image: Image.Image) -> bool:
    """Recognise the renderer's red and grey sign for a linked file it missed."""
    pixels = np.asarray(image)
    red = (pixels == (255, 112, 112)).all(-1).mean()
    grey = (pixels == (112, 112, 112)).all(-1).mean()
    return bool(red > 0.01 and grey > 0.01)


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Pad with white to a square with a small margin, and resize."""
    side = round(max(image.size) * (1 + 2 * MARGIN))
    page = Image.new("RGB", (side, side), "white")
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page.resize((size, size), Image.Resampling.LANCZOS)


def draw(drawing: Drawing, root: Path, size: int) -> Drawing:
    """Make the WebP file of one drawing, or name the reason why not."""
    try:
        image = flatten(root / drawing.source)
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError):
        return replace(drawing, problem="unreadable")
    box = content_box(image)
    if box is None:
        return replace(drawing, problem="blank")
    if max(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        return replace(drawing, problem="small")
    if drawing.source in BROKEN or is_broken(image):
        return replace(drawing, problem="broken")
    square = fit_square(image.crop(box), size)
    if np.asarray(square.convert("L")).std() < MIN_SPREAD:
        return replace(drawing, problem="blank")
    buffer = io.BytesIO()
    square.save(buffer, "WEBP", quality=QUALITY, method=4)
    return replace(drawing, data=buffer.getvalue())


def in_parallel(work: Callable, items: Sequence, workers: int, title: str) -> list:
    """Map over processes, in order, with a progress bar."""
    with Pool(workers) as pool:
        results = pool.imap(work, items, chunksize=8)
        return list(tqdm(results, total=len(items), desc=title, unit="drawing"))


# --- choosing ------------------------------------------------------------------


def settle_copies(copies: Sequence[Drawing]) -> list[Drawing]:
    """Keep one of several equal drawings, or none where the label is in doubt."""
    folders = {owning_folder(p.source) for p in copies}
    inner = {f for f in folders if not any(g != f and inside(g, f) for g in folders)}
    candidates = [p for p in copies if owning_folder(p.source) in inner]
    if len({p.label for p in candidates}) > 1:
        return [replace(p, problem="ambiguous") for p in copies]
    first = candidates[0]
    return [p if p is first else replace(p, problem="copy") for p in copies]


def drop_copies(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Mark exact copies, told by the bytes of the finished file."""
    same: dict[bytes, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        same[drawing.data or drawing.source.encode()].append(drawing)
    settled = (settle_copies(copies) if copies[0].data else copies for copies in same.values())
    return sorted(chain.from_iterable(settled), key=lambda p: p.source)


def seeded(seed: int, text: str) -> str:
    """Return a hash that stands for chance, the same for the same seed."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def cap_classes(drawings: Iterable[Drawing], seed: int) -> list[Drawing]:
    """Mark the drawings over the cap of their category."""
    taken: Counter[str] = Counter()
    chosen = []
    for drawing in sorted(drawings, key=lambda p: seeded(seed, p.source)):
        if not drawing.problem:
            taken[drawing.label] += 1
            if taken[drawing.label] > CAP:
                drawing = replace(drawing, problem="cap")
        chosen.append(drawing)
    return sorted(chosen, key=lambda p: p.source)


def slug(source: str) -> str:
    """Turn a source file's name into a safe lower-case ASCII name."""
    stem = unicodedata.normalize("NFKD", PurePosixPath(source).stem)
    plain = stem.encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "drawing"


def give_names(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Give each drawing a file name that is its own in its category."""
    used: set[tuple[str, str]] = set()
    named = []
    for drawing in drawings:
        name, number = slug(drawing.source), 1
        while (drawing.label, name) in used:
            number += 1
            name = f"{slug(drawing.source)}-{number}"
        used.add((drawing.label, name))
        named.append(replace(drawing, name=f"{name}.webp"))
    return named


# --- near duplicates -----------------------------------------------------------


def look_at(data: bytes) -> list[Look]:
    """Return pHash, dHash and grey thumbnail of a file and of its mirror image."""
    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L")
    looks = []
    for view in (grey, ImageOps.mirror(grey)):
        thumb = np.asarray(view.resize((THUMB, THUMB), Image.Resampling.BOX), float).ravel()
        thumb -= thumb.mean()
        thumb /= np.linalg.norm(thumb) or 1.0
        phash, dhash = (int(str(h(view)), 16) for h in (imagehash.phash, imagehash.dhash))
        looks.append((phash, dhash, thumb))
    return looks


def stack(looks: Sequence[Look]) -> Looks:
    """Put the looks of many drawings into arrays."""
    phashes, dhashes, thumbs = zip(*looks)
    return Looks(np.array(phashes, np.uint64), np.array(dhashes, np.uint64), np.stack(thumbs))


def alike(ours: Looks, theirs: Looks, akin: np.ndarray) -> np.ndarray:
    """Tell for every pair of drawings whether all three measures agree."""
    phash = np.bitwise_count(ours.phash[:, None] ^ theirs.phash[None])
    dhash = np.bitwise_count(ours.dhash[:, None] ^ theirs.dhash[None])
    corr = ours.thumb @ theirs.thumb.T
    strict, loose = ((phash <= p) & (dhash <= d) & (corr >= c) for p, d, c in (STRICT, LOOSE))
    return strict | (loose & akin)


def visual_links(looks: Sequence[list[Look]], words: np.ndarray) -> np.ndarray:
    """Return the pairs (two columns of row numbers) that look alike."""
    plain, mirrored = (stack([both[side] for both in looks]) for side in (0, 1))
    akin = words[:, None] == words[None]
    pairs = alike(plain, plain, akin) | alike(plain, mirrored, akin)
    return np.argwhere(np.triu(pairs | pairs.T, 1))


def family(source: str) -> str:
    """Return a file's name without numbers and words for variants."""
    words = re.split(r"[^a-z]+", slug(source))
    return "_".join(w for w in words if w and w not in VARIANT_WORDS)


def name_links(drawings: Sequence[Drawing]) -> np.ndarray:
    """Return the pairs of one category whose names tell variants of one drawing."""
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, drawing in enumerate(drawings):
        if len(family(drawing.source)) >= MIN_FAMILY_NAME:
            families[drawing.label, family(drawing.source)].append(row)
    pairs = [(rows[0], row) for rows in families.values() for row in rows[1:]]
    return np.array(pairs, int).reshape(-1, 2)


def near_links(drawings: Sequence[Drawing], workers: int) -> np.ndarray:
    """Return all pairs of near duplicates, by looks and by name."""
    looks = in_parallel(look_at, [p.data for p in drawings], workers, "compare")
    words = np.array([family(p.source).split("_")[0] or p.source for p in drawings])
    return np.concatenate([visual_links(looks, words), name_links(drawings)])


def group(drawings: Sequence[Drawing], workers: int) -> list[Drawing]:
    """Number the groups of near duplicates, single drawings included."""
    links = near_links(drawings, workers)
    graph = coo_array((np.ones(len(links)), links.T), shape=(len(drawings),) * 2)
    _, numbers = connected_components(graph, directed=False)
    return [replace(p, group=int(n)) for p, n in zip(drawings, numbers)]


def split(drawings: Sequence[Drawing], seed: int) -> list[Drawing]:
    """Fill every category's validation side with whole groups, in seeded order."""
    members: dict[int, Counter[str]] = defaultdict(Counter)
    for drawing in drawings:
        members[drawing.group][drawing.label] += 1
    room = {label: round(VAL_SHARE * n) for label, n in Counter(p.label for p in drawings).items()}
    first = {p.group: p.source for p in reversed(drawings)}
    val = set()
    for number in sorted(members, key=lambda n: seeded(seed, first[n])):
        if all(room[label] >= n for label, n in members[number].items()):
            val.add(number)
            for label, n in members[number].items():
                room[label] -= n
    return [replace(p, split="val" if p.group in val else "train") for p in drawings]


# --- writing -------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table whose columns after the first hold numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def count_table(paths: Iterable[str]) -> str:
    """Count files per category and side from their paths below the output folder."""
    counts = Counter(tuple(PurePosixPath(path).parts[:2]) for path in paths)
    rows = []
    for label in sorted({label for _, label in counts}):
        train, val = counts["train", label], counts["val", label]
        rows.append([label, train, val, train + val])
    rows.append(["total", *(sum(row[i] for row in rows) for i in (1, 2, 3))])
    return table(["category", "train", "val", "all"], rows)


def readme(drawings: Sequence[Drawing], dropped: Counter[str], size: int) -> str:
    """Fill in the README from what was made."""
    sizes = Counter(p.group for p in drawings)
    labels = defaultdict(set)
    for drawing in drawings:
        labels[drawing.group].add(drawing.label)
    several = [n for n in sizes.values() if n > 1]
    folders = (f"* {c}: {', '.join(f'`{f}`' for f in fs)}" for c, fs in CATEGORIES.items())
    rows = [[text, dropped[key]] for key, text in REASONS.items()]
    return README.format(
        total=len(drawings), classes=len(CATEGORIES), size=size, package=PACKAGE,
        counts=count_table(p.path for p in drawings), folders="\n".join(folders),
        skipped=", ".join(f"`{f}`" for f in SKIPPED), quality=QUALITY,
        dropped=table(["reason", "files"], [*rows, ["total", dropped.total()]]),
        strict=STRICT, loose=LOOSE, thumb=THUMB,
        groups=len(several), grouped=sum(several), largest=max(several, default=0),
        crossing=sum(len(found) > 1 for found in labels.values()), licence=LICENCE,
    )  # fmt: skip


def clear(out: Path) -> None:
    """Empty an earlier result, and refuse a folder that holds anything else."""
    ours = {"train", "val", "index.csv", "LICENSE", "README.md"}
    strange = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []
    if strange:
        raise SystemExit(f"{out} holds other files, such as {strange[0]}. Pass another --out.")
    for side in ("train", "val"):
        shutil.rmtree(out / side, ignore_errors=True)


def write(drawings: Sequence[Drawing], dropped: Counter[str], out: Path, size: int) -> None:
    """Write drawings, index, licence and README."""
    clear(out)
    for drawing in drawings:
        target = out / drawing.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(drawing.data)
    with open(out / "index.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "label", "split", "group", "source"])
        rows.writerows(sorted((p.path, p.label, p.split, p.group, p.source) for p in drawings))
    (out / "LICENSE").write_text(LICENCE, encoding="utf-8")
    (out / "README.md").write_text(readme(drawings, dropped, size), encoding="utf-8")


def build(source: Path, out: Path, size: int, seed: int, workers: int) -> None:
    """Make the whole set."""
    found = find_drawings(source)
    drawn = in_parallel(partial(draw, root=source, size=size), found, workers, "draw")
    settled = cap_classes(drop_copies(drawn), seed)
    dropped = Counter(p.problem for p in settled if p.problem)
    named = give_names(p for p in settled if not p.problem)
    write(split(group(named, workers), seed), dropped, out, size)


# --- checking ------------------------------------------------------------------


def read_back(out: Path) -> list[Drawing]:
    """Read the written folder, and check that it and the index agree."""
    if not (out / "index.csv").is_file():
        raise SystemExit(f"{out} has no index.csv. Build the set first, without --verify.")
    with open(out / "index.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    files = {p.relative_to(out).as_posix() for p in out.glob("*/*/*")}
    check(files == {row["path"] for row in rows}, "index.csv and the files differ")
    return [
        Drawing(row["source"], row["label"], (out / row["path"]).read_bytes(),
                name=Path(row["path"]).name, group=int(row["group"]), split=row["split"])
        for row in rows
    ]  # fmt: skip


def check(holds: bool, complaint: str) -> None:
    """Stop with a message where a check fails."""
    if not holds:
        raise SystemExit(f"Check failed: {complaint}.")


def unreadable(data: bytes) -> bool:
    """Tell whether a written file cannot be decoded."""
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, ValueError):
        return True
    return False


def verify(out: Path, workers: int) -> None:
    """Recompute hashes from the written files and check every promise."""
    drawings = read_back(out)
    bad = [p.path for p in drawings if unreadable(p.data)]
    check(not bad, f"unreadable: {', '.join(bad)}")
    check(len({p.data for p in drawings}) == len(drawings), "two files are equal")
    for one, other in near_links(drawings, workers):
        a, b = drawings[one], drawings[other]
        check(a.split == b.split, f"near duplicates {a.path} and {b.path} straddle the split")
        check(a.group == b.group, f"near duplicates {a.path} and {b.path} are in two groups")
    sides = {(p.group, p.split) for p in drawings}
    check(len(sides) == len({p.group for p in drawings}), "a group is on both sides")
    counts = count_table(p.path for p in drawings)
    check(counts in (out / "README.md").read_text(encoding="utf-8"), "the README's counts differ")
    check((out / "LICENSE").read_text(encoding="utf-8") == LICENCE, "the LICENSE differs")
    print(f"{len(drawings)} drawings: readable, distinct, no near duplicates across the split.")


def main() -> None:
    """Read the command line and build or verify."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the PNG collection")
    parser.add_argument("--out", type=Path, default=HERE / "openclipart", help="folder to write")
    parser.add_argument("--size", type=int, default=224, help="side of a drawing in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cap and of the split")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--verify", action="store_true", help="check a folder that was built")
    args = parser.parse_args()
    if args.verify:
        return verify(args.out, args.workers)
    build(args.source, args.out, args.size, args.seed, args.workers)
    print(count_table(p.relative_to(args.out).as_posix() for p in args.out.glob("*/*/*")))


if __name__ == "__main__":
    main()
