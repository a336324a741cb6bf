"""Files of weights are written tensor by tensor."""

import torch
from safetensors.torch import load_file

from megagpt.checkpoint.weights import PlannedTensor, write_tensors


def test_one_tensor_is_made_at_a_time(tmp_path):
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        assert len(made) < 3 or (tmp_path / "model-00001-of-00002.safetensors").exists()
        return torch.full((3, 2), float(len(made))).t()

    planned = [PlannedTensor(n, (2, 3), lambda n=n: make(n)) for n in ("a", "b", "c")]
    file_of = write_tensors(tmp_path, planned, torch.bfloat16, 24, {"format": "pt"})
    assert [file_of[n][6:11] for n in "abc"] == ["00001", "00001", "00002"]
    c = load_file(tmp_path / file_of["c"])["c"]
    assert c.dtype == torch.bfloat16 and torch.equal(c.float(), torch.full((2, 3), 3.0))
