"""Pipeline x data x tensor parallel: the model's layer list as a DeepSpeed PipelineModule, and the
engine that trains it (L2).

The embedding and the head are one tied layer: DeepSpeed keeps a copy on the first and on the last
stage and adds up their gradients. The head computes the loss inside its own forward, where its
weight is counted; a loss function outside would lose the weight's gradient under bf16.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine import split
from megagpt.engine.clock import COMMUNICATION
from megagpt.engine.engine import Engine, MicroBatch
from megagpt.engine.slices import OwnedParameter, TensorShare
from megagpt.engine.tensor import TensorGroup, tensor_parts
from megagpt.model import Layer, LayerClasses, initial_value, layers
from megagpt.plan.layout import Layout, padded_model
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
        self.targets: Tensor | None = None
        self.weight = 1.0
        """What the micro-batch counts in the mean of the step's losses."""

    def stash(self, batch: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor]:
        """DeepSpeed's batch hook: remembers the targets and passes the batch on.

        It goes to the device here: DeepSpeed would clone it into pageable memory first, and then
        wait for the copy.
        """
        # Not torch.accelerator's, which a build for CUDA names on a machine without a GPU too.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x, self.targets = (part.to(device, non_blocking=True) for part in batch[:2])
        self.weight = batch[2]
        return x, self.targets


class PipelinedGPT(PipelineModule):
    """The layer list cut into stages of nearly equal work."""

    def __init__(
        self, config: RunConfig, layout: Layout, classes: LayerClasses, targets: Targets
    ) -> None:
        chain = layers(padded_model(config, layout), classes)
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

    def named(self, layout: Layout, rank: int) -> Iterator[OwnedParameter]:
        """This rank's parameters under their canonical names."""
        tensor_rank = layout.tensor_rank(rank)
        for own, parameter in self.named_parameters():
            name = canonical_name(own, self.layer_names)
            kind = split_kind(name) if layout.tensor > 1 else "whole"
            parts = layout.tensor if kind != "whole" else 1
            copy = parameter.ds_pipe_replicated or (kind == "whole" and tensor_rank > 0)
            part = tensor_rank if parts > 1 else 0
            yield OwnedParameter(
                name=name,
                parameter=parameter,
                split=TensorShare(kind=kind, part=part, parts=parts),
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
    assert targets.targets is not None
    found = loss(module, hidden, targets.targets)
    return found if targets.weight == 1.0 else found * targets.weight


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
def initialise_parts(named: Iterable[OwnedParameter], config: RunConfig) -> None:
    """This rank's part of the same initial weights that every other layout starts from."""
    for one in named:
        shape = split.whole_shape(one.parameter.shape, one.split.kind, one.split.parts)
        whole = initial_value(one.name, shape, config.model, config.seed)
        one.parameter.copy_(split.take(whole, one.split.kind, one.split.part, one.split.parts))


class PipelineEngine(Engine):
    """Stages, tensor split and ZeRO-1 data parallel, with one micro-batch after another."""

    def __init__(
        self, config: RunConfig, layout: Layout, ranks: Ranks, ds_config: dict[str, Any]
    ) -> None:
        super().__init__(config, layout, ranks, ds_config)
        targets = Targets()
        model = PipelinedGPT(config, layout, tensor_parts(self._tensor_group()), targets)
        parameters = list(model.named(layout, ranks.rank))
        initialise_parts(parameters, config)
        self._start(model, parameters, ds_config, whole_graphs=layout.tensor == 1)
        self.deepspeed.set_batch_fn(targets.stash)
        self._time_instructions()

    def _tensor_group(self) -> TensorGroup:
        """The ranks that share this rank's layers; every rank takes part in making every group."""
        own = TensorGroup(None, 0, 1)
        for members in topology(self.layout).get_axis_comm_lists("model"):
            group = dist.new_group(members)
            if self.ranks.rank in members:
                own = TensorGroup(group, members.index(self.ranks.rank), len(members))
        return own

    def _train(self, batches: Sequence[MicroBatch], weights: list[float]) -> tuple[float, float]:
        loss = float(self.deepspeed.train_batch(self._weighed(batches, weights)))
        return loss, float(self.deepspeed.get_global_grad_norm())

    def _evaluate(self, batches: Sequence[MicroBatch], weights: list[float]) -> float:
        weighed = self._weighed(batches, weights)
        return float(self.deepspeed.eval_batch(weighed, num_micro_batches=len(batches)))

    def _weighed(
        self, batches: Sequence[MicroBatch], weights: list[float]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What Targets.stash takes; the stages are told first when the micro-batch has changed.

        DeepSpeed agrees once on the shapes that the stages send each other, and would receive a
        micro-batch of another size into the old buffers.
        """
        size = len(batches[0][0])
        if size != self.deepspeed.micro_batch_size:
            self.deepspeed.reset_activation_shape()
            self.deepspeed.micro_batch_size = size
        return ((x, y, weight) for (x, y), weight in zip(batches, weights, strict=True))

    def _loss(self) -> float:
        # As train_batch itself does at its end; the update comes before that.
        return float(self.deepspeed._aggregate_total_loss())

    def _time_instructions(self) -> None:
        """The clock's parts, by the instructions of DeepSpeed's schedule."""
        parts = {
            schedule.LoadMicroBatch: "data",
            schedule.ForwardPass: "forward",
            schedule.BackwardPass: "backward",
            schedule.OptimizerStep: "optimizer",
        }
        self.deepspeed._INSTRUCTION_MAP = {
            kind: self.clock.timed(parts.get(kind, COMMUNICATION), method)
            for kind, method in self.deepspeed._INSTRUCTION_MAP.items()
        }

    def layers(self) -> dict[str, nn.Module]:
        return self.deepspeed.module.own_layers()
