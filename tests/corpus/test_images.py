"""Images: a palette as the tokenizer, one record an image behind the start vector, changed by seed
and sample number alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megagpt.cli import main
from megagpt.config.presets import ModelConfig
from megagpt.corpus.inspect import describe
from megagpt.corpus.manifest import read_manifest
from megagpt.corpus.records import prepare
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, UsageError
from megagpt.order.augment import Augment
from megagpt.order.fitting import check_vocabulary
from megagpt.order.loader import TokenLoader
from megagpt.order.trace import trace
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.palette import Palette, fit_palette, read_palette
from tests.lib.corpus import edit_manifest, sentences, write_corpus
from tests.lib.weights import placeholder_run

DRAW = np.random.default_rng(0)
COLOURS = DRAW.uniform(-1, 1, (20, 3)).astype(np.float32)
PALETTE = Palette(COLOURS)
IMAGES = DRAW.integers(0, 256, (30, 4, 4, 3)).astype(np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    prepare(tmp_path / "images", records=PALETTE.encode(IMAGES), vocabulary=PALETTE)
    return tmp_path / "images"


# --- the palette ---------------------------------------------------------------------------------


def test_ids_are_those_of_transformers_processor() -> None:
    module = "transformers.models.imagegpt.image_processing_pil_imagegpt"
    processor = pytest.importorskip(module).ImageGPTImageProcessorPil
    theirs = processor(clusters=COLOURS.tolist(), do_resize=False)
    images = [Image.fromarray(image) for image in IMAGES]
    expected = theirs(images, return_tensors="np")["input_ids"]
    assert np.array_equal(PALETTE.encode(IMAGES), expected)
    shown = PALETTE.decode(expected)
    # OpenAI's decoding: np.rint(127.5 * (clusters[ids] + 1)).
    assert np.array_equal(shown.reshape(30, 16, 3), np.rint(127.5 * (COLOURS[expected] + 1)))


def test_k_means_gives_the_same_palette_again_the_darkest_first(tmp_path: Path) -> None:
    pixels = IMAGES.reshape(-1, 3)
    made = fit_palette(pixels, 16, seed=3)
    assert made.size == 16 and made.fingerprint == fit_palette(pixels, 16, seed=3).fingerprint
    light = made.colours @ [0.299, 0.587, 0.114]
    assert (np.diff(light) >= 0).all()
    centres = np.array([pixels[made.encode(IMAGES).ravel() == i].mean(0) for i in range(16)])
    assert np.abs(centres / 127.5 - 1 - made.colours).max() < 0.2, "a colour is its pixels' mean"
    few = fit_palette(np.repeat(pixels[:5], 9, 0), 16, seed=0)
    assert {tuple(c) for c in few.decode(np.arange(5)[:, None]).reshape(-1, 3)} == {
        tuple(c) for c in pixels[:5]
    }
    (tmp_path / "p.json").write_text(made.text)
    np.save(tmp_path / "kmeans_centers.npy", made.colours)  # as OpenAI gives it
    for name in ("p.json", "kmeans_centers.npy"):
        assert read_palette(tmp_path / name, made.fingerprint).text == made.text


def test_what_is_no_palette_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with pytest.raises(DamageError, match=r"tokenizer.json: not a palette .*copy it again"):
        read_palette(file)
    file.write_text(PALETTE.text)
    with pytest.raises(DamageError, match="another palette than the images were made with"):
        read_palette(file, "0" * 64)
    with pytest.raises(UsageError, match="a palette of images, whose ids are colours and no text"):
        load_tokenizer(file)
    for colours, why in (
        (np.zeros((513, 3)), r"shape \(513, 3\): must be 1 to 512 colours"),
        (np.full((2, 3), 1.5), "a channel is outside -1 to 1"),
    ):
        np.save(tmp_path / "p.npy", colours)
        with pytest.raises(UsageError, match=f"p.npy: palette.*{why}"):
            read_palette(tmp_path / "p.npy")
    with pytest.raises(UsageError, match="513 colours: a palette has 1 to 512"):
        fit_palette(IMAGES.reshape(-1, 3), 513, 0)
    with pytest.raises(UsageError, match="3 pixels: an image is square"):
        PALETTE.decode(np.zeros((1, 3), np.int64))


# --- records -------------------------------------------------------------------------------------


def test_an_image_is_a_window_behind_the_start_vector(images: Path) -> None:
    manifest, ids = read_manifest(images), PALETTE.encode(IMAGES)
    assert (manifest.vocab_size, manifest.record_start, manifest.record_length) == (20, 20, 17)
    assert manifest.fingerprint == PALETTE.fingerprint and verify_shards(images) == []
    assert main(["data", "verify", str(images)]) == 0
    assert "palette tokenizer.json: 20 colours" in describe(images)
    loader = TokenLoader([(images, 1.0)], 16, seed=5)
    [(x, y)] = loader.micro_batches(0, 30, 0, 1, 30)
    wanted = ids[loader.places(0, 30).window]
    # No pixel of an image is read or predicted with another image's.
    assert (x[:, 0] == 20).all() and np.array_equal(x[:, 1:], wanted[:, :-1])
    assert np.array_equal(y, wanted)
    again = prepare(images, records=ids, vocabulary=PALETTE)
    assert again.preparation == manifest.preparation
    with pytest.raises(UsageError, match="already holds a corpus of the train split"):
        prepare(images, records=ids, vocabulary=Palette(COLOURS[::-1]))


def test_records_of_another_length_or_beginning_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="sample 1 has 3 tokens; all records have one length, n_ct"
    ):
        prepare(tmp_path / "a", records=[[1, 2, 3, 4], [1, 2, 3]], vocabulary=PALETTE)
    with pytest.raises(UsageError, match="sample 0 holds the id 20; ids are 0 to 19"):
        prepare(tmp_path / "a", records=[[1, 20, 3, 4]], vocabulary=PALETTE)
    shard = next(images.glob("*.bin"))
    tokens = np.fromfile(shard, np.uint16)
    tokens[[17, 40]] = tokens[[40, 17]]
    tokens.tofile(shard)
    problems = " ".join(verify_shards(images))
    assert "sha256" in problems
    edit_manifest(images, shards__0__sha256=_digest(shard))
    [problem] = verify_shards(images)
    assert "2 records do not hold 20 at their beginning alone, the first is record 1" in problem
    edit_manifest(images, records__start=3)
    with pytest.raises(DamageError, match="begin with 3, which is not behind the vocabulary"):
        read_manifest(images)


def _digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_models_and_corpora_of_images_go_together_alone(images: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", sentences(60, 1))
    shape = {"n_layer": 1, "n_head": 1, "d_model": 8, "n_ctx": 16}
    image = ModelConfig(**shape, family="igpt", vocab_size=20)
    pictures, text = (TokenLoader([(tmp_path / n, 1.0)], 16, 0) for n in ("images", "text"))
    check_vocabulary(placeholder_run(image), [pictures])
    with pytest.raises(UsageError, match="its windows begin with any token.*data_prep/images.py"):
        wanted = dataclasses.replace(image, vocab_size=257)
        check_vocabulary(placeholder_run(wanted), [text])
    with pytest.raises(UsageError, match="images behind a start vector, which model.family = .gpt"):
        check_vocabulary(placeholder_run(ModelConfig(**shape, vocab_size=20)), [pictures])
    prepare(tmp_path / "ids", records=[[0] * 17], vocabulary=20)
    mixed = TokenLoader([(tmp_path / n, 1.0) for n in ("images", "ids")], 16, 0)
    with pytest.raises(UsageError, match="ids: its windows begin with any token"):
        check_vocabulary(placeholder_run(image), [mixed])


# --- augmentation --------------------------------------------------------------------------------


def test_a_sample_is_changed_by_its_number_alone(images: Path) -> None:
    ids = PALETTE.encode(IMAGES).reshape(30, 4, 4)
    change = Augment(flip=True, shift=1)
    loader = TokenLoader([(images, 1.0)], 16, seed=5)
    plain = loader.fingerprint(30), loader.digest(0, 30)
    loader.augment_images(change)
    assert loader.fingerprint(30) != plain[0] and loader.digest(0, 30) != plain[1]
    [(x, y)] = loader.micro_batches(0, 90, 0, 1, 90)
    assert (x[:, 0] == 20).all() and np.array_equal(x[:, 1:], y[:, :-1])
    seen = set()
    for number, (window, row) in enumerate(
        zip(loader.places(0, 90).window, y.numpy(), strict=True)
    ):
        flipped, right, down = change.draw(5, number)
        seen.add((flipped, right, down))
        padded = np.pad(ids[window], 1, mode="reflect")
        moved = padded[1 - down : 5 - down, 1 - right : 5 - right]
        assert np.array_equal(row.reshape(4, 4), moved[:, ::-1] if flipped else moved)
    assert len(seen) == 18, "every change comes"
    for rank in (0, 1):  # whatever the layout and the place where a run goes on
        for i, (_, part) in enumerate(loader.micro_batches(30, 12, rank, 2, 3)):
            first = 30 + (2 * i + rank) * 3
            assert np.array_equal(part, y[first : first + 3])
    [one] = trace(loader, 7, 1)
    assert np.array_equal(one.tokens[1:], y[7])


def test_only_images_are_changed(images: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", sentences(60, 1))
    loader = TokenLoader([(tmp_path / "text", 1.0)], 16, 0)
    with pytest.raises(UsageError, match=r"text: data.flip and data.shift change images"):
        loader.augment_images(Augment(flip=True))
    with pytest.raises(UsageError, match=r"data.shift = 4: model.n_ctx = 16 pixels must be a sq"):
        TokenLoader([(images, 1.0)], 16, 0).augment_images(Augment(shift=4))
