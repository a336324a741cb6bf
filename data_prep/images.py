"""Images as Image GPT reads them: one id a pixel, from a palette, behind the start vector.

    python data_prep/images.py digits --output data/digits              # scikit-learn's, 8 x 8
    python data_prep/images.py FOLDER --size 32 --output data/mine      # PNG, JPEG ... in folders
    python data_prep/images.py images.npy --output data/mine            # (N, S, S) or (N, S, S, 3)
    python data_prep/images.py cifar-10-batches-py --output data/cifar  # or -bin; CIFAR-100's too

An image becomes one record: the start vector's id, then its pixels in raster order. Files are
turned as their camera says (EXIF), cut to the square in their middle and made smaller by averaging;
what is transparent becomes white. The palette is k-means' of a million pixels of the training
split, 512 colours or fewer; --palette takes one that is there: a tokenizer.json of another corpus,
or OpenAI's kmeans_centers.npy.

--field F puts each image, such as one of the digits, at a place of its own in a black field of F
pixels a side, and each of the training split --copies times at others. Without a field the copies
are crops of a file, drawn as the paper does.

A share of the images (4%, as in the paper) goes to OUTPUT-validation, by a hash of their pixels, so
that equal images are never on both sides; CIFAR's test images to OUTPUT-test. labels.npy beside a
split has each image's class, where the input tells them: a folder's name, a .npz's "labels".
"""

import argparse
import hashlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megagpt.corpus.command import run
from megagpt.corpus.records import prepare
from megagpt.corpus.unfinished import beside
from megagpt.errors import DamageError, UsageError
from megagpt.files import whole_file
from megagpt.tokenizer.palette import MOST, Palette, fit_palette, read_palette

PIXELS = 1_000_000
"""Pixels that k-means sees at most."""
BLOCK = 4096
"""Images that are in memory as bytes at a time."""
BOUNDS = {"copies": (1, 1000), "size": (0, 1024), "field": (0, 1024), "seed": (0, 2**32 - 1)}
"""Of options. 1024 pixels a side are a context of a million; scikit-learn seeds have 32 bits."""
ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SHARE, SHORTER = 224, (256, 384)
"""The paper's crops of ImageNet: 224 pixels of a shorter side that is drawn between the two."""
CIFAR = {
    "train": ("data_batch_*", "train", "train.bin"),
    "test": ("test_batch*", "test", "test.bin"),
}
NUMPY = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""What a pickle of CIFAR calls."""


class Block(NamedTuple):
    """Some images of one split of the input."""

    split: str
    """train, or test where the input itself says so."""
    images: NDArray[np.uint8]
    """(N, S, S, 3)."""
    labels: NDArray[np.int64]
    """(N,); -1: not known."""
    paths: tuple[Path, ...] = ()
    """Of their files, where each has one."""


# --- inputs --------------------------------------------------------------------------------------


def blocks(source: str, size: int) -> Iterator[Block]:
    """The images of an input; size: pixels a side, 0: as they are. Raises UsageError for what is
    none, DamageError for a file that cannot be read."""
    path = Path(source)
    if source == "digits":
        yield from _digits()
    elif path.suffix in (".npy", ".npz"):
        yield from _arrays(path)
    elif path.is_dir() and any(any(path.glob(names[0])) for names in CIFAR.values()):
        yield from _cifar(path, "10")
    elif path.is_dir() and any((path / name).is_file() for name in CIFAR["train"][1:]):
        yield from _cifar(path, "100")
    elif path.is_dir():
        yield from _folder(path, size)
    else:
        raise UsageError(
            f"{source}: neither `digits` nor a folder of images, a .npy, a .npz or CIFAR's folder"
        )


def _digits() -> Iterator[Block]:
    """1,797 digits of 8 x 8 in 17 grey levels (UCI, Alpaydin and Kaynak 1998)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("digits: they come with scikit-learn; pip install scikit-learn") from None
    found = load_digits()
    grey = np.rint(found.images * 255 / 16).astype(np.uint8)
    yield Block("train", _coloured(grey, "digits"), found.target.astype(np.int64))


def _arrays(path: Path) -> Iterator[Block]:
    """A .npy of images, or a .npz of images and perhaps labels."""
    try:
        with open(path, "rb") as file:
            tree = np.load(file, allow_pickle=False)
            there = dict(tree) if path.suffix == ".npz" else {"images": tree}
        images = there["images"]
        labels = there.get("labels", np.full(len(images), -1))
    except Exception as error:  # zipfile, zlib and numpy's headers have a dozen kinds
        raise DamageError(
            f'{path}: no arrays of images ({error}); a .npz has "images" and perhaps "labels"'
        ) from None
    whole = labels.dtype.kind in "iu" and labels.shape == (len(images),)
    if images.dtype != np.uint8 or not whole:
        raise UsageError(
            f"{path}: {images.dtype} images with labels {labels.dtype} {labels.shape}: must be "
            f"uint8, 0 to 255, and one integer for each of the {len(images)}"
        )
    yield Block("train", _coloured(images, str(path)), labels.astype(np.int64))


def _coloured(images: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """(N, S, S) or (N, S, S, 1 or 3) as (N, S, S, 3). Raises UsageError for another shape."""
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1] != images.shape[2]:
        raise UsageError(f"{name}: shape {images.shape}: must be (N, S, S) or (N, S, S, 3), square")
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _cifar(folder: Path, kind: str) -> Iterator[Block]:
    """CIFAR-10's or CIFAR-100's files, of their Python or their binary version."""
    for split, names in CIFAR.items():
        patterns = names[:1] if kind == "10" else names[1:]
        for path in sorted(one for pattern in patterns for one in folder.glob(pattern)):
            try:
                rows, labels = _binary(path, kind) if path.suffix == ".bin" else _pickled(path)
                images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                if len(labels) != len(images):
                    raise ValueError(f"{len(labels)} labels of {len(images)} images")
                if not ((labels >= 0) & (labels < int(kind))).all():
                    raise ValueError(f"classes of {labels.min()} to {labels.max()} of {kind}")
            except Exception as error:  # a pickle has a dozen kinds
                raise DamageError(f"{path}: not CIFAR's ({error}); copy it again") from None
            yield Block(split, images, labels)


def _binary(path: Path, kind: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows of 1 label (CIFAR-100: a coarse and a fine one) and 3,072 bytes, red first."""
    own = 1 if kind == "10" else 2
    rows = np.fromfile(path, np.uint8).reshape(-1, own + 3072)
    return rows[:, own:], rows[:, own - 1].astype(np.int64)


class _Numbers(pickle.Unpickler):
    """Reads arrays and plain values; nothing else in a pickle is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NUMPY:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def _pickled(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with path.open("rb") as file:
        tree = _Numbers(file, encoding="bytes").load()
    labels = tree[b"labels"] if b"labels" in tree else tree[b"fine_labels"]
    return np.asarray(tree[b"data"], np.uint8), np.asarray(labels, np.int64)


def _folder(folder: Path, size: int) -> Iterator[Block]:
    """Image files, sorted by path; the first folder below `folder` is their class."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise UsageError(f"{folder}: no image in it ({', '.join(sorted(ENDINGS))})")
    tops = [path.relative_to(folder).parts[0] for path in paths]
    classes = sorted({top for top, path in zip(tops, paths, strict=True) if top != path.name})
    number = {name: i for i, name in enumerate(classes)}
    shapes: set[tuple[int, ...]] = set()
    for first in range(0, len(paths), BLOCK):
        files = paths[first : first + BLOCK]
        images = [_file(path, size) for path in files]
        shapes |= {image.shape for image in images}
        if len(shapes) > 1:
            raise UsageError(f"{folder}: images of several sizes; choose one with --size")
        labels = [number.get(top, -1) for top in tops[first : first + BLOCK]]
        yield Block("train", np.stack(images), np.array(labels, np.int64), tuple(files))


def _file(path: Path, size: int, draw: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """(S, S, 3) of a file: the square in its middle, or one of SHARE of its shorter side that is
    drawn, averaged down to `size`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would cut every number off at 255
                raise UsageError(f"{path}: has more than 8 bits a pixel ({image.mode}); give it 8")
            whole = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamageError(f"{path}: not an image that Pillow reads ({error})") from None
    white = Image.new("RGBA", whole.size, "white")
    side = min(whole.size)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    if draw is not None:
        side = round(side * SHARE / draw.uniform(*SHORTER))
        left, top = (int(draw.integers(0, n - side + 1)) for n in whole.size)
    square = Image.alpha_composite(white, whole).convert("RGB")
    square = square.crop((left, top, left + side, top + side))
    if size and size != side:
        square = square.resize((size, size), Image.Resampling.BOX)
    return np.asarray(square)


# --- work ----------------------------------------------------------------------------------------


def held_out(image: NDArray[np.uint8], fraction: float) -> bool:
    """Whether an image belongs to validation: by a hash of its pixels."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def sampled(found: list[Block], fraction: float, seed: int) -> NDArray[np.uint8]:
    """(P, 3) pixels of the training split for k-means, PIXELS at most, drawn by the seed."""
    parts = []
    total = sum(len(b.images) for b in found if b.split == "train") * found[0].images[0].size // 3
    draw = np.random.default_rng(seed)
    for block in found:
        if block.split != "train":
            continue
        kept = [image for image in block.images if not held_out(image, fraction)]
        pixels = np.stack(kept).reshape(-1, 3) if kept else np.zeros((0, 3), np.uint8)
        if total > PIXELS:
            pixels = pixels[draw.random(len(pixels)) < PIXELS / total]
        parts.append(pixels)
    if not any(len(pixels) for pixels in parts):
        raise UsageError(
            f"--validation-fraction {fraction}: leaves no image for the training split; lower it"
        )
    return np.concatenate(parts)


def shown(
    block: Block, rows: NDArray[np.bool_], first: int, args: argparse.Namespace, copy: int
) -> NDArray[np.uint8]:
    """Images of a block as they are written: in black fields (N, F, F, 3), or as other crops of
    their files. What is drawn hangs on the seed, the number in the input (the block's is `first`)
    and the copy alone. Raises UsageError for a field that is too small."""
    images, numbers = block.images[rows], first + np.flatnonzero(rows)
    if not args.field:
        if not copy:
            return images
        files = [block.paths[number - first] for number in numbers]
        draws = [np.random.default_rng([args.seed, number, copy]) for number in numbers]
        return np.stack([_file(p, args.size, d) for p, d in zip(files, draws, strict=True)])
    side = images.shape[1]
    if args.field < side:
        raise UsageError(f"--field {args.field}: must be {side} or more, an image's own side")
    fields = np.zeros((len(images), args.field, args.field, 3), np.uint8)
    for field, image, number in zip(fields, images, numbers, strict=True):
        draw = np.random.default_rng([args.seed, number, copy])
        top, left = draw.integers(0, args.field - side + 1, 2)
        field[top : top + side, left : left + side] = image
    return fields


def psnr(images: NDArray[np.uint8], palette: Palette) -> float:
    """Peak signal to noise of what the palette makes of images, dB; inf: nothing is lost."""
    coloured = palette.decode(palette.encode(images))
    error = float(((coloured.astype(np.float64) - images) ** 2).mean())
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def splits(
    found: list[Block], palette: Palette, args: argparse.Namespace
) -> dict[str, tuple[NDArray[np.uint16], NDArray[np.int64]]]:
    """Split -> ids (N, S * S) and labels (N,), in the order of the input, copy after copy."""
    parts: dict[str, list[tuple[NDArray[np.uint16], NDArray[np.int64]]]] = {}
    for copy in range(args.copies):
        first = 0
        for block in found:
            fraction = args.validation_fraction if block.split == "train" else 0.0
            held = np.array([held_out(image, fraction) for image in block.images])
            for name, chosen in ((block.split, ~held), ("validation", held)):
                if not chosen.any() or (copy and name != "train"):
                    continue
                ids = palette.encode(shown(block, chosen, first, args, copy)).astype(np.uint16)
                parts.setdefault(name, []).append((ids, block.labels[chosen]))
            first += len(block.images)
    return {
        name: (np.concatenate([a for a, _ in some]), np.concatenate([b for _, b in some]))
        for name, some in parts.items()
    }


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for an option's value that makes no sense."""
    if not 0 <= args.validation_fraction < 1:
        raise UsageError(
            f"--validation-fraction {args.validation_fraction}: must be 0 or more and below 1"
        )
    for name, (least, most) in BOUNDS.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise UsageError(f"--{name} {value}: must be {least} or more, and {most} at most")


def work(args: argparse.Namespace) -> int:
    """Prepares the splits, and tells what the palette costs."""
    check(args)
    found = [block for block in blocks(args.source, args.size) if block.images.size]
    if not any(block.split == "train" for block in found):
        raise UsageError(f"{args.source}: holds no images to train on")
    if args.copies > 1 and not args.field and not (found[0].paths and args.size):
        raise UsageError(
            f"--copies {args.copies}: needs --field, or a folder of files and the --size of crops"
        )
    if args.palette:
        palette = read_palette(args.palette)
    else:
        pixels = sampled(found, args.validation_fraction, args.seed)
        if args.field:
            pixels = np.concatenate([pixels, np.zeros((1, 3), np.uint8)])
        palette = fit_palette(pixels, args.colours, args.seed)
    for name, (ids, labels) in splits(found, palette, args).items():
        place = args.output if name == "train" else beside(args.output, f"-{name}")
        prepare(place, records=ids, vocabulary=palette, split=name)
        if (labels >= 0).any():
            with whole_file(place / "labels.npy") as file:
                np.save(file, labels)
        print(f"{place}: {len(ids):,} images of {ids.shape[1]} pixels")
    loss = psnr(found[0].images[:BLOCK], palette)
    print(f"palette of {palette.size} colours, {palette.fingerprint[:12]}: PSNR {loss:.1f} dB")
    return 0


def main() -> int:
    """Parse the command line and prepare."""
    options = argparse.ArgumentParser(
        description="Prepare images for Image GPT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("source", help="digits, a folder of images, a .npy or .npz, or CIFAR's folder")
    add("--output", type=Path, default=Path("data/images"), help="folder of the training split")
    add("--size", type=int, default=0, help="pixels a side of files in folders; 0: as they are")
    add("--field", type=int, default=0, help="put each image at a random place in a black field of "
        "so many pixels a side; 0: as it is")  # fmt: skip
    add("--copies", type=int, default=1, help="of each training image: at other places of the "
        "field, or after the first, which is its middle, as crops drawn from its file")  # fmt: skip
    add("--colours", type=int, default=MOST, help="of the palette, at most")
    add("--palette", type=Path, help="a palette that is there already")
    add("--validation-fraction", type=float, default=0.04, help="share of the images held out")
    add("--seed", type=int, default=1337, help="of k-means and the pixels that it sees")
    args = options.parse_args()
    return run(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
