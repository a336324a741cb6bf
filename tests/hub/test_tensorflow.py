"""OpenAI's TensorFlow checkpoints come in bit for bit, and no damage to them is missed."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megagpt.checkpoint.export import open_weights
from megagpt.errors import DamageError, UsageError
from megagpt.hub.importing import import_model
from megagpt.hub.tensorflow import Bundle

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tensorflow"


def variables() -> dict[str, np.ndarray]:
    """What the fixture was written from."""
    spec = importlib.util.spec_from_file_location("make", FIXTURE / "make.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.variables()


def test_tensorflows_own_files_are_read_bit_for_bit(tmp_path):
    bundle, expected = Bundle(FIXTURE / "gpt2" / "model.ckpt"), variables()
    assert bundle.variables.keys() == expected.keys()
    for name, value in expected.items():
        found = bundle.read(name)
        assert found.dtype == value.dtype and np.array_equal(found, value), name
    import_model(str(FIXTURE / "gpt2"), tmp_path / "in")
    weights = open_weights(tmp_path / "in")
    assert weights.config.model.n_ctx == 8 and weights.config.model.vocab_size == 17
    matrix = torch.from_numpy(expected["model/h1/mlp/c_fc/w"][0])
    assert torch.equal(weights.read("h.1.mlp.c_fc.weight"), matrix.t())
    assert torch.equal(weights.read("wte.weight"), torch.from_numpy(expected["model/wte"]))
    assert torch.equal(weights.read("ln_f.bias"), torch.from_numpy(expected["model/ln_f/b"]))


def test_every_damaged_byte_of_them_is_named(tmp_path):
    folder = Path(shutil.copytree(FIXTURE / "gpt2", tmp_path / "gpt2"))
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        content = (folder / name).read_bytes()
        for at in range(len(content)):
            if name.endswith("0001") and at % 17:
                continue
            (folder / name).write_bytes(
                content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
            )
            with pytest.raises(DamageError, match=name):
                bundle = Bundle(folder / "model.ckpt")
                for variable in bundle.variables:
                    bundle.read(variable)
        (folder / name).write_bytes(content[:-100])
        with pytest.raises(DamageError, match=name):
            import_model(str(folder), tmp_path / "in")
        (folder / name).write_bytes(content)
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(DamageError, match="data-00000-of-00001: cannot be read"):
        import_model(str(folder), tmp_path / "in")
    shutil.copy(folder / "model.ckpt.index", folder / "other.index")
    with pytest.raises(UsageError, match="holds 2 files ..index; must be one checkpoint's"):
        import_model(str(folder), tmp_path / "in")
