"""Megatron-LM's own checkpoints come in and compute what its own model did."""

import shutil
from argparse import Namespace
from enum import Enum
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.export import open_weights
from megagpt.cli import main
from megagpt.errors import DamageError
from megagpt.hub.importing import import_model
from tests.lib.refusals import refused

FIXTURE = Path(__file__).parents[1] / "fixtures" / "megatron"


@pytest.mark.parametrize(("name", "gelu"), [("fused", "gelu_tanh"), ("plain", "gelu")])
def test_its_model_and_ours_compute_the_same(name, gelu, tmp_path):
    import_model(str(FIXTURE / name), tmp_path / "in")
    weights = open_weights(tmp_path / "in")
    shape = weights.config.model
    assert shape.activation == gelu and shape.n_head == 3 and shape.vocab_size == 30
    answers = torch.load(FIXTURE / name / "answers.pt", weights_only=True)
    with torch.no_grad():
        ours = weights.model().logits(answers["ids"])
    torch.testing.assert_close(ours, answers["logits"], rtol=1e-6, atol=2e-6)
    assert main(["checkpoint", "verify", str(tmp_path / "in")]) == 0


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the fixture, and its file."""
    folder = Path(shutil.copytree(FIXTURE / "fused", tmp_path / "theirs"))
    return folder, folder / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"


def plain(sizes: dict[str, object]) -> dict[str, object]:
    """What such a file holds, by hand."""
    state = {"embedding.word_embeddings.weight": torch.zeros(30, 12)}
    known = {"hidden_size": 12, "num_attention_heads": 3, "num_layers": 1}
    known |= {"bias_gelu_fusion": True, "max_position_embeddings": 8}
    known |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return {"args": Namespace(**known | sizes), "checkpoint_version": 3.0, "model": state}


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"swiglu": True}, "args.swiglu = True: our model computes only False"),
        ({"normalization": "RMSNorm"}, "args.normalization = 'RMSNorm': .* only 'LayerNorm'"),
        ({"position_embedding_type": "rope"}, "position_embedding_type = 'rope'"),
        ({"group_query_attention": True}, "group_query_attention = True"),
        ({"ffn_hidden_size": 40}, "ffn_hidden_size = 40: our model computes only None, 48"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size = 2"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights"),
        ({}, "transformer.h.0.attn.c_attn.bias is missing"),
        ({"num_attention_heads": 0}, "args.num_attention_heads = 0: must be a whole number of 1"),
        ({"hidden_size": None}, "args.hidden_size = None: must be a whole number of 1 or more"),
        ({"num_layers": 0}, "n_layer = 0: must be a whole number of 1 or more"),
    ],
)
def test_what_our_model_cannot_compute_is_refused_by_its_argument(sizes, problem, checkpoint):
    folder, file = checkpoint
    torch.save(plain(sizes), file)
    refused(folder, problem)


def test_other_forms_of_checkpoints_are_refused_by_name(checkpoint):
    folder, file = checkpoint
    (folder / "iter_0000005" / "mp_rank_01").mkdir()
    refused(folder, "holds the ranks mp_rank_00, mp_rank_01; only one rank")
    (folder / "iter_0000005" / "mp_rank_01").rmdir()
    torch.save({"model": {"language_model": {}}, "args": Namespace()}, file)
    refused(folder, "language_model: is the layout before .*DeepSpeed has")
    torch.save(plain({}) | {"checkpoint_version": 1.0}, file)
    refused(file, "checkpoint_version = 1.0: must be 3.0")
    for model, what in ((torch.zeros(3), "holds Tensor, not a"), ({3: 0}, "has the key 3, which")):
        torch.save(plain({}) | {"model": model}, file)
        refused(file, f"model_optim_rng.pt: {what}")
    torch.save({"iteration": 5}, file)
    refused(folder, "no checkpoint of Megatron-LM .'args' is missing")
    torch.save([1], file)
    refused(folder, "holds list, not a checkpoint of Megatron-LM")
    file.write_bytes(b"no zip")
    refused(folder, "model_optim_rng.pt: not readable .*; copy it again", DamageError)
    shutil.rmtree(file.parent)
    (file.parent.parent / ".metadata").touch()
    refused(folder, "no mp_rank_00, but another format; only one rank of")
    (folder / "latest_checkpointed_iteration.txt").write_text("soon")
    refused(folder, "latest_checkpointed_iteration.txt: holds 'soon'", DamageError)


class Loud(Enum):
    """A class of others, as Megatron-LM's arguments hold some."""

    ONE = 1


class Hostile:
    """A pickle that would remove a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.unlink, (self.path,)


def test_nothing_in_its_pickle_is_executed(checkpoint, tmp_path):
    folder, file = checkpoint
    kept = tmp_path / "kept"
    kept.touch()
    torch.save(plain({"swiglu": True, "backend": Loud.ONE}), file)
    refused(folder, "args.swiglu = True")
    torch.save(plain({"other": Hostile(str(kept))}), file)
    refused(folder, "would have to execute code to be read")
    assert kept.exists()
