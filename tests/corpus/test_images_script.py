"""data_prep/images.py: digits, folders, CIFAR and .npz as shards, and what it refuses."""

import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.verify import verify_shards
from megagpt.errors import UsageError
from megagpt.order.loader import TokenLoader
from megagpt.tokenizer.palette import Palette, read_palette
from tests.corpus.test_scripts import script
from tests.lib.distributed import ROOT

DRAW = np.random.default_rng(0)
COLOURS = DRAW.uniform(-1, 1, (20, 3)).astype(np.float32)
PALETTE = Palette(COLOURS)


def test_digits_keep_their_grey_levels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    made = script("images", "digits", "--output", tmp_path / "d", "--validation-fraction", 0.2)
    assert made.returncode == 0, made.stderr
    assert "palette of 17 colours" in made.stdout and "PSNR inf dB" in made.stdout
    ids, labels = [], []
    for folder in (tmp_path / "d", tmp_path / "d-validation"):
        assert verify_shards(folder) == []
        loader = TokenLoader([(folder, 1.0)], 64, 0, shuffle=False)
        ids += loader.samples(0, loader.n_windows)[:, 1:].tolist()
        labels += np.load(folder / "labels.npy").tolist()
    digits = datasets.load_digits()
    expected = zip(digits.data.astype(int).tolist(), digits.target.tolist(), strict=True)
    assert sorted(zip(ids, labels, strict=True)) == sorted(map(tuple, expected))
    assert 0.15 < read_manifest(tmp_path / "d-validation").documents / 1797 < 0.25


def test_images_are_put_at_places_of_their_own(tmp_path: Path) -> None:
    # No two alike, and no edge of black, so that each place is seen.
    images = np.arange(20 * 9, dtype=np.uint8).reshape(20, 3, 3) + 10
    np.savez(tmp_path / "in.npz", images=images, labels=np.arange(20))
    greys = np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, 1).astype(np.float32)
    np.save(tmp_path / "greys.npy", greys)
    words = ["--field", 5, "--copies", 3, "--validation-fraction", 0.3]
    words += ["--palette", tmp_path / "greys.npy"]
    made = script("images", tmp_path / "in.npz", *words, "--output", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    seen: dict[int, list[tuple[int, int]]] = {}
    for folder in (tmp_path / "out", tmp_path / "out-validation"):
        palette = read_palette(folder / "tokenizer.json")
        loader = TokenLoader([(folder, 1.0)], 25, 0, shuffle=False)
        shown = palette.decode(loader.samples(0, loader.n_windows)[:, 1:])[..., 0]
        labels = np.load(folder / "labels.npy")
        for picture, label in zip(shown, labels.tolist(), strict=True):
            top, left = (int(np.flatnonzero(picture.any(axis))[0]) for axis in (1, 0))
            assert np.array_equal(picture[top : top + 3, left : left + 3], images[label])
            assert np.count_nonzero(picture) == 9
            seen.setdefault(label, []).append((top, left))
        copies = {len(places) for label, places in seen.items() if label in labels}
        assert copies == ({1} if folder.name.endswith("validation") else {3})
    assert len(seen) == 20 and len({place for places in seen.values() for place in places}) == 9
    for more, why in (
        (["--copies", 0], "--copies 0: must be 1 or more"),
        (["--copies", 2], "--copies 2: needs --field, or a folder of files and the --size"),
        (["--field", 2], "--field 2: must be 3 or more, an image's own side"),
        (["--seed", -1], "--seed -1: must be 0 or more"),
        (["--size", -1], "--size -1: must be 0 or more"),
        (["--size", 1025], "--size 1025: must be 0 or more, and 1024 at most"),
        (["--seed", 2**32], "--seed 4294967296: must be 0 or more, and 4294967295 at most"),
    ):
        made = script("images", tmp_path / "in.npz", *more, "--output", tmp_path / "other")
        assert made.returncode == 2 and why in made.stderr


def test_folders_of_images_are_cropped_and_averaged(tmp_path: Path) -> None:
    for name, colour in (("cat/a.png", (200, 10, 10)), ("dog/b.png", (10, 10, 200))):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True)
        picture = np.zeros((8, 12, 4), np.uint8)
        picture[:, 2:10] = (*colour, 255)  # the square in the middle
        picture[:, 2:6, 3] = 0  # transparent
        Image.fromarray(picture).save(path)
    words = ["--size", 4, "--validation-fraction", 0, "--output", tmp_path / "out"]
    made = script("images", tmp_path / "in", *words)
    assert made.returncode == 0, made.stderr
    palette = read_palette(tmp_path / "out/tokenizer.json")
    loader = TokenLoader([(tmp_path / "out", 1.0)], 16, 0, shuffle=False)
    shown = palette.decode(loader.samples(0, 2)[:, 1:])
    assert (shown[:, :, :2] == 255).all()
    assert (shown[0, :, 2:] == (200, 10, 10)).all() and (shown[1, :, 2:] == (10, 10, 200)).all()
    assert np.load(tmp_path / "out/labels.npy").tolist() == [0, 1]


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    shown = DRAW.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(shown)).save(tmp_path / "in/a.png", exif=exif)
    made = script("images", tmp_path / "in", "--validation-fraction", 0, "--output", tmp_path / "o")
    assert made.returncode == 0, made.stderr
    loader = TokenLoader([(tmp_path / "o", 1.0)], 36, 0, shuffle=False)
    palette = read_palette(tmp_path / "o/tokenizer.json")
    assert np.array_equal(palette.decode(loader.samples(0, 1)[:, 1:])[0], shown)


def test_copies_of_files_are_crops(tmp_path: Path) -> None:
    # Red tells the column, green the row: an average tells the place and the side of a crop.
    ramp = np.zeros((120, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(120)[:, None]
    (tmp_path / "in").mkdir()
    Image.fromarray(ramp).save(tmp_path / "in/a.png")
    words = ["--size", 2, "--copies", 5, "--validation-fraction", 0, "--output", tmp_path / "out"]
    made = script("images", tmp_path / "in", *words)
    assert made.returncode == 0, made.stderr
    loader = TokenLoader([(tmp_path / "out", 1.0)], 4, 0, shuffle=False)
    # The palette holds the colours of the middle alone: ids of crops are the nearest of these.
    assert loader.n_windows == 5
    draw = np.random.default_rng([1337, 0, 3])
    side = round(120 * 224 / draw.uniform(256, 384))
    left, top = draw.integers(0, 200 - side + 1), draw.integers(0, 120 - side + 1)
    assert 70 <= side <= 105
    crop = ramp[top : top + side, left : left + side]
    small = np.asarray(Image.fromarray(crop).resize((2, 2), Image.Resampling.BOX))
    palette = read_palette(tmp_path / "out/tokenizer.json")
    assert np.array_equal(loader.samples(3, 1)[0, 1:], palette.encode(small[None])[0])


def cifar(folder: Path, binary: bool) -> np.ndarray:
    """CIFAR-10's files with two images each; the images (4, 32, 32, 3)."""
    folder.mkdir()
    images = DRAW.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    for number, name in enumerate(("data_batch_1", "test_batch")):
        rows = images[2 * number : 2 * number + 2].transpose(0, 3, 1, 2).reshape(2, 3072)
        labels = [3, 7]
        if binary:
            np.c_[np.array(labels, np.uint8), rows].tofile(folder / f"{name}.bin")
        else:
            tree = {b"data": rows, b"labels": labels, b"batch_label": b"one"}
            (folder / name).write_bytes(pickle.dumps(tree, protocol=2))
    return images


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_comes_in_both_forms(tmp_path: Path, binary: bool) -> None:
    images = cifar(tmp_path / "cifar", binary)
    np.save(tmp_path / "p.npy", COLOURS)
    words = ["--palette", tmp_path / "p.npy", "--validation-fraction", 0, "--output"]
    made = script("images", tmp_path / "cifar", *words, tmp_path / "out")
    assert made.returncode == 0, made.stderr
    for folder, part in (("out", images[:2]), ("out-test", images[2:])):
        loader = TokenLoader([(tmp_path / folder, 1.0)], 1024, 0, shuffle=False)
        assert np.array_equal(loader.samples(0, 2)[:, 1:], PALETTE.encode(part))
        assert np.load(tmp_path / folder / "labels.npy").tolist() == [3, 7]


def test_sizes_are_compared_from_one_block_of_files_to_the_next(
    tmp_path: Path, monkeypatch
) -> None:
    for size in (4, 8):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
    blocks = runpy.run_path(str(ROOT / "data_prep/images.py"))["blocks"]
    monkeypatch.setitem(blocks.__globals__, "BLOCK", 1)
    with pytest.raises(UsageError, match="images of several sizes; choose one with --size"):
        list(blocks(str(tmp_path), 0))


def test_hostile_and_broken_inputs_are_named(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "pwned",)

    cifar(tmp_path / "cifar", binary=False)
    (tmp_path / "cifar/data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4)))
    np.save(tmp_path / "flat.npy", np.zeros((2, 4, 5), np.uint8))
    np.savez(tmp_path / "cut.npz", images=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-9])
    cifar(tmp_path / "lost", binary=False)
    few = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3]}
    (tmp_path / "lost/data_batch_1").write_bytes(pickle.dumps(few, protocol=2))
    cifar(tmp_path / "classes", binary=True)
    row = np.full((1, 3073), 200, np.uint8)
    row.tofile(tmp_path / "classes/data_batch_1.bin")
    (tmp_path / "classes/test_batch.bin").unlink()
    halves = np.array([0.5, 1.5])
    np.savez(tmp_path / "halves.npz", images=np.zeros((2, 4, 4), np.uint8), labels=halves)
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4), np.uint8))
    np.save(tmp_path / "one.npy", np.zeros((1, 4, 4), np.uint8))
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep/a.png")
    (tmp_path / "sizes").mkdir()
    for size in (4, 8):
        Image.new("RGB", (size, size)).save(tmp_path / f"sizes/{size}.png")
    for source, code, why in (
        (tmp_path / "cifar", 3, "data_batch_1: not CIFAR's (it would call pathlib"),
        (tmp_path / "empty", 2, "empty: no image in it"),
        (tmp_path / "broken", 3, "a.png: not an image that Pillow reads"),
        (tmp_path / "float.npy", 2, "float64 images with labels int64 (2,): must be uint8"),
        (tmp_path / "halves.npz", 2, "labels float64 (2,): must be uint8, 0 to 255, and one integ"),
        (tmp_path / "classes", 3, "data_batch_1.bin: not CIFAR's (classes of 200 to 200 of 10); "),
        (tmp_path / "flat.npy", 2, "shape (2, 4, 5, 1): must be (N, S, S)"),
        (tmp_path / "other.npz", 3, "no arrays of images ("),
        (tmp_path / "cut.npz", 3, "cut.npz: no arrays of images ("),
        (tmp_path / "lost", 3, "data_batch_1: not CIFAR's (1 labels of 2 images); copy it again"),
        (tmp_path / "sizes", 2, "sizes: images of several sizes; choose one with --size"),
        (tmp_path / "deep", 2, "a.png: has more than 8 bits a pixel (I;16); give it 8"),
        (tmp_path / "none.npy", 2, "none.npy: holds no images to train on"),
        (tmp_path / "one.npy", 2, "leaves no image for the training split; lower it"),
        ("nothing", 2, "nothing: neither `digits` nor a folder of images"),
    ):
        fraction = 0.9999999999 if source == tmp_path / "one.npy" else 0.04
        words = ["--output", tmp_path / "out", "--validation-fraction", fraction]
        made = script("images", source, *words)
        assert made.returncode == code and why in made.stderr, made.stderr
    made = script("images", "digits", "--validation-fraction", 1, "--output", tmp_path / "out")
    assert made.returncode == 2 and "--validation-fraction 1.0: must be" in made.stderr
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()
