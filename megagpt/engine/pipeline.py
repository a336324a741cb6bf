"""The model's layer list as a DeepSpeed PipelineModule (L2).

The embedding and the head are one tied layer: DeepSpeed keeps a copy on the first and on the last
stage and adds up their gradients. The head computes the loss inside its own forward, where its
weight is counted; a loss function outside would lose the weight's gradient under bf16.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megagpt.config import RunConfig
from megagpt.engine import split
from megagpt.engine.slices import Named, Split
from megagpt.model import Layer, Parts, initial_value, layers
from megagpt.plan.layout import Layout, fitted_model
from megagpt.plan.stages import stage_bounds

SPLITS = {
    "attn.c_attn.weight": "qkv",
    "attn.c_attn.bias": "qkv",
    "attn.c_proj.weight": "row",
    "mlp.c_fc.weight": "column",
    "mlp.c_fc.bias": "column",
    "mlp.c_proj.weight": "row",
    "wte.weight": "column",
}
"""How a tensor split shares out each parameter, by the end of its canonical name; others: whole."""


class Targets:
    """Holds the targets of the micro-batch that the last stage is about to score."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def stash(self, batch: Any) -> Any:
        """DeepSpeed's batch hook: remembers the targets and passes the batch on."""
        self.held = batch[1].to(torch.accelerator.current_accelerator() or "cpu")
        return batch


class PipelinedGPT(PipelineModule):
    """The layer list cut into stages of nearly equal work."""

    def __init__(self, config: RunConfig, layout: Layout, parts: Parts, targets: Targets) -> None:
        chain = layers(fitted_model(config, layout), parts)
        # DeepSpeed's constructor asks for the stages, so they must be known before it.
        self.bounds = stage_bounds(config.model, layout.pipeline)
        self.layer_names = [layer.name for layer in chain]
        parallel = config.parallel
        super().__init__(
            [_spec(layer, targets) for layer in chain],
            topology=topology(layout),
            loss_fn=_loss_is_output,
            activation_checkpoint_interval=(
                parallel.recompute_every if parallel.recompute == "full" else 0
            ),
            checkpointable_layers=["Block"],
        )

    def _partition_layers(self, method: str = "") -> None:
        """In place of DeepSpeed's split, which does not know what the logits cost."""
        self.parts = self.bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def own_layers(self) -> dict[str, nn.Module]:
        """The layers of this rank's stage by canonical name, without the head."""
        names = self.layer_names[self._local_start : self._local_stop]
        found = dict(zip(names, self.forward_funcs, strict=True))
        return {name: layer for name, layer in found.items() if isinstance(layer, nn.Module)}

    def named(self, layout: Layout, rank: int) -> Iterator[Named]:
        """This rank's parameters under their canonical names."""
        tensor_rank = layout.tensor_rank(rank)
        for own, parameter in self.named_parameters():
            name = canonical_name(own, self.layer_names)
            kind = split_kind(name) if layout.tensor > 1 else "whole"
            parts = layout.tensor if kind != "whole" else 1
            copy = parameter.ds_pipe_replicated or (kind == "whole" and tensor_rank > 0)
            part = tensor_rank if parts > 1 else 0
            yield Named(
                name=name,
                parameter=parameter,
                split=Split(kind=kind, part=part, parts=parts),
                owned=not copy,
            )


def _spec(layer: Layer, targets: Targets) -> LayerSpec:
    if layer.name == "wte":
        return TiedLayerSpec("wte", layer.cls, **layer.kwargs)
    if layer.loss is not None:
        score = partial(_score, layer.loss, targets)
        return TiedLayerSpec("wte", layer.cls, forward_fn=score, **layer.kwargs)
    return LayerSpec(layer.cls, **layer.kwargs)


def _score(
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    targets: Targets,
    module: nn.Module,
    hidden: Tensor,
) -> Tensor:
    assert targets.held is not None
    return loss(module, hidden, targets.held)


def _loss_is_output(output: Tensor, _: Tensor) -> Tensor:
    return output


def topology(layout: Layout) -> PipeModelDataParallelTopology:
    """DeepSpeed's numbering of the ranks: pipeline x data x tensor."""
    return PipeModelDataParallelTopology(
        num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
    )


def canonical_name(own: str, layer_names: list[str]) -> str:
    """Canonical name of a PipelineModule's parameter: 2.ln_1.weight -> h.0.ln_1.weight."""
    head, _, rest = own.partition(".")
    if head == "tied_modules":
        return rest
    return f"{layer_names[int(head)]}.{rest}"


def split_kind(name: str) -> str:
    """How a tensor split shares out the parameter of this canonical name."""
    return next((kind for end, kind in SPLITS.items() if name.endswith(end)), "whole")


@torch.no_grad()
def initialise_parts(named: Iterator[Named], config: RunConfig) -> None:
    """This rank's part of the same initial weights that every other layout starts from."""
    for one in named:
        shape = split.whole_shape(one.parameter.shape, one.split.kind, one.split.parts)
        whole = initial_value(one.name, shape, config.model, config.seed)
        one.parameter.copy_(split.take(whole, one.split.kind, one.split.part, one.split.parts))
