"""How long a step takes, item by item (L0: numpy, no torch).

The formulas are physics; what they leave open are constants (constants.json, fitted by
benchmarks/planner/fit.py). Letters: b sequences of a micro-batch, s their length, h width, t
tensor, p pipeline, d data ranks, m micro-batches of a data rank. Sources: Narayanan et al. 2021
("SC21": FLOPs, bubble, communication), Korthikanti et al. 2022 (sequence parallel, selective
recompute), Rajbhandari et al. 2020 (ZeRO's traffic), NVIDIA's "Matrix Multiplication Background"
(shapes), and the alpha-beta model of collectives.
"""

from collections.abc import Mapping

import numpy as np

from megagpt.plan.jobs import EAGER, GENERATIONS, SYSTEMS, Column, Jobs

Constants = Mapping[str, float]
ITEMS = ("compute", "bubble", "tensor", "pipeline", "data", "optimizer")
"""What a step's time is made of, in the order in which it is told."""


HOST_LINK = 12e9
"""Bytes/s between a device and its host in each direction, eight devices at once (PCIe 4)."""
HOST_UPDATES = 2e9
"""Parameters/s that a host's processors update with DeepSpeed's CPU Adam (its own benchmark: 1 to
2 billion a second)."""
HOST_GATHER = 1.4
"""Time of a byte that gloo gathers, as a multiple of one that its all-reduce moves: 0.4 beside
0.55 GB/s of 4 to 70 MB between two ranks on two cores."""
HOST_MESSAGE = 2e-3
"""Seconds of one of ZeRO-3's gathers of no size on a host, with DeepSpeed's work around it: what a
step of six small layers takes longer than under ZeRO-1, by 105 gathers."""
TILE = 256 * 128
"""Elements of a product's result that one multiprocessor computes at a time (cuBLAS)."""
NANOTRON = SYSTEMS.index("nanotron")
OURS = [SYSTEMS.index("megagpt"), SYSTEMS.index(f"megagpt{EAGER}")]
OMNI_PATH = SYSTEMS.index("megatron-deepspeed")


def by_system(constants: Constants, kind: str, jobs: Jobs) -> Column:
    """The constant `kind.SYSTEM` of each job; `kind` alone for a system without one of its own."""
    table = []
    for name in SYSTEMS:
        like = constants.get(f"{kind}.{name.removesuffix(EAGER)}", constants[kind])
        table.append(constants.get(f"{kind}.{name}", like))
    return np.array(table)[jobs.framework]


def by_gpu(constants: Constants, kind: str, jobs: Jobs) -> Column:
    """The constant `kind.GENERATION` of each job."""
    return np.array([constants[f"{kind}.{name}"] for name in GENERATIONS])[jobs.gpu]


def ours(jobs: Jobs) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Where megagpt itself trains, through DeepSpeed."""
    return np.asarray(np.isin(jobs.framework, OURS))


def on_host(jobs: Jobs) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Where the devices are processors of a host, whose ranks talk through gloo."""
    return np.asarray(jobs.processors == 1)


def stage_parameters_of(jobs: Jobs) -> Column:
    """Parameters of a rank on the fullest stage, embeddings included where p = 1."""
    return layer_parameters(jobs) * jobs.most + np.where(jobs.pp > 1, 1.0, 1.0 + jobs.untied) * (
        jobs.vocab * jobs.width / jobs.tp
    )


def layer_parameters(jobs: Jobs) -> Column:
    """Parameters of a layer on a rank."""
    h, kv = jobs.width, jobs.width * jobs.kv_heads / jobs.heads
    return (2 * h * h + 2 * h * kv + (2 + jobs.gated) * h * jobs.d_ff) / jobs.tp


def step_items(jobs: Jobs, c: Constants) -> dict[str, Column]:
    """Seconds of a step by item (ITEMS); their sum is the step."""
    m, v = jobs.micro_batches, jobs.vpp
    layer, head = layer_compute(jobs, c), head_compute(jobs, c)
    wire = tensor_wait(jobs, c)
    p2p = pipeline_wait(jobs, c)
    # A pass through the slowest stage: the last bears the logits.
    compute = np.maximum(
        jobs.most * layer + np.where(jobs.pp > 1, 0.0, head), jobs.last * layer + head
    )
    tensor = jobs.most * wire
    whole = (jobs.layers * (layer + wire) + head) / jobs.pp
    gathered = sharded_wait(jobs, c)
    # Weights that arrive while a layer computes cost what does not fit behind it; the processors of
    # a host do both.
    q = 1 + np.where(on_host(jobs), 0.0, by_system(c, "overlap", jobs))
    behind = (compute**q + gathered**q) ** (1 / q) - compute
    scale = 1.0 + by_gpu(c, "straggler", jobs) * np.log2(np.maximum(1.0, jobs.gpus / jobs.per_node))
    return {
        "compute": m * compute * scale,
        # What p2p holds is mostly waiting for neighbours that are out of step; while the pipeline
        # fills and drains there is none, the bubble itself is the wait.
        "bubble": (jobs.pp - 1) / v * whole * scale,
        "tensor": m * tensor * scale,
        "pipeline": m * p2p * scale,
        "data": (np.where(jobs.zero >= 3, m * behind, 0.0) + data_wait(jobs, c)) * scale,
        "optimizer": optimizer_time(jobs, c),
    }


def step_time(jobs: Jobs, c: Constants) -> Column:
    """Seconds of a step."""
    return np.asarray(sum(step_items(jobs, c).values()))


def layer_compute(jobs: Jobs, c: Constants) -> Column:
    """Seconds of one layer on one micro-batch: forward, backward and what is computed again.

    A backward pass is two forward passes of each matrix product; fused attention computes its
    scores once more there.
    """
    h, t, b, s = jobs.width, jobs.tp, jobs.micro, jobs.seq
    rows = b * s
    kv = h * jobs.kv_heads / jobs.heads
    speed = by_system(c, "framework", jobs)
    up = (1 + jobs.gated) * jobs.d_ff / t
    shapes = ((h + 2 * kv) / t, h), (h, h / t), (up, h), (h, jobs.d_ff / t)
    products = sum(_product(jobs, c, rows, n, k) for n, k in shapes)
    attention = attention_time(jobs, c)
    # Norms, dropout and residuals are whole on every tensor rank unless the sequence is split.
    apart = np.where(jobs.sequence_parallel > 0, t, 1.0)
    bytes_ = 2 * rows * (h * (5 / apart + 4 / t) + 2 * jobs.d_ff * (1 + jobs.gated) / t)
    element = c["element"] * by_system(c, "fusion", jobs) * bytes_ / jobs.hbm
    again = jobs.full + 0.0
    passes = 3.0 + again
    attention_passes = np.where(jobs.flash > 0, 3.5, 3.0) + np.maximum(again, jobs.selective)
    pressed = 1 + c["pressure"] * np.maximum(0.0, pressure(jobs) - 0.5)
    work = products * passes + attention * attention_passes + element * (2.5 + again)
    busy = speed * pressed * work
    # Below this the host cannot launch kernels fast enough.
    launch = by_system(c, "launch", jobs) * (2 + again) * np.where(t > 1, 1 + c["launch_tensor"], 1)
    return (busy**2 + launch**2) ** 0.5


def pressure(jobs: Jobs) -> Column:
    """Share of the device's memory that ZeRO-3's states take: near the brim the allocator works
    for every layer (FSDP's runs of 13B on 8 x 40 GB lose 15%)."""
    states = 16 * stage_parameters_of(jobs) / jobs.dp
    return np.where(jobs.zero >= 3, states / jobs.memory, 0.0)


def head_compute(jobs: Jobs, c: Constants) -> Column:
    """Seconds of the logits and their loss on one micro-batch, forward and backward."""
    rows = jobs.micro * jobs.seq
    wide = jobs.vocab / jobs.tp
    loss = c["loss_passes"] * 4 * rows * wide / jobs.hbm
    speed = by_system(c, "framework", jobs)
    return speed * (3 * _product(jobs, c, rows, wide, jobs.width) + loss)


def _product(jobs: Jobs, c: Constants, rows: Column, n: Column, k: Column) -> Column:
    """Seconds of a product of rows x k by k x n: FLOPs at the reachable rate plus the traffic of
    its operands, a penalty for a shape that tensor cores cut badly, and one for the processors
    that the last round of tiles leaves idle, the dearer the fewer rounds there are (NVIDIA,
    "Matrix Multiplication Background": wave quantization)."""
    reach = by_gpu(c, "matmul", jobs) * jobs.peak
    reach = np.where(jobs.fp8 > 0, reach * by_system(c, "fp8", jobs), reach)
    odd = np.where((n % 64 != 0) | (k % 64 != 0), 1 + c["misaligned"], 1.0)
    rounds = rows * n / (TILE * jobs.processors)
    odd = odd * (1 + c["last_round"] / rounds)
    traffic = 2 * c["operands"] * (rows * k + k * n + rows * n) / jobs.hbm
    return 2 * rows * n * k / reach * odd + traffic


def attention_time(jobs: Jobs, c: Constants) -> Column:
    """Seconds of a layer's forward attention on one micro-batch.

    Fused (FlashAttention): 4 b s^2 h FLOPs, of which causal kernels skip about half; else two
    batched products and the traffic of b a s^2 scores through mask, softmax and dropout.
    """
    s, d_head = jobs.seq, jobs.width / jobs.heads
    flops = 4 * jobs.micro * s * jobs.keys * jobs.width / jobs.tp
    narrow = 1 + c["narrow_head"] / d_head
    odd = np.where(d_head % 8 != 0, 1 + c["odd_head"], 1.0)
    fused = flops / (by_gpu(c, "flash", jobs) * jobs.peak) * narrow * odd
    scores = jobs.micro * jobs.heads / jobs.tp * s * jobs.keys
    plain = flops / (c["scores_matmul"] * jobs.peak) * narrow * odd + (
        2 * c["scores_passes"] * scores / jobs.hbm
    )
    return np.where(jobs.flash > 0, fused, plain)


def node_rate(jobs: Jobs, c: Constants) -> Column:
    """Bytes/s that a whole node gets through its network."""
    return jobs.node * np.where(slow(jobs), c["slow_network"], c["network"])


def slow(jobs: Jobs) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """BLOOM's cluster: Omni-Path of 400 Gbit/s a node without RDMA from the device, of which an
    all-reduce reached 40 (BigScience's chronicles)."""
    return np.asarray((jobs.node <= 51e9) & (jobs.framework == OMNI_PATH))


def tensor_wait(jobs: Jobs, c: Constants) -> Column:
    """Seconds of a layer's tensor-parallel collectives on one micro-batch (SC21, section 3.2).

    Two all-reduces of 2 s b h bytes forward, two backward, two more with full recompute; an
    all-reduce moves 2 (t - 1) / t of it over each rank's link.
    """
    t = jobs.tp
    message = 2 * jobs.seq * jobs.micro * jobs.width
    rate = jobs.nvlink * c["nvlink_tensor"]
    rate = np.where(t > jobs.domain, np.minimum(rate, node_rate(jobs, c)), rate)
    times = 4 + 2 * jobs.full
    one = c["tensor_latency"] + 2 * (t - 1) / t * message / rate
    exposed = by_system(c, "tensor_exposed", jobs)
    return np.where(t > 1, times * one * exposed, 0.0)


def pipeline_wait(jobs: Jobs, c: Constants) -> Column:
    """Seconds in which one micro-batch waits for its activations and gradients between stages.

    2 s b h bytes in each direction for each virtual stage; most scatter them over the tensor
    ranks. Ranks of a stage share the node's network.
    """
    message = 2 * jobs.seq * jobs.micro * jobs.width
    # Everything but nanotron without sequence parallel, and BigScience's runs of 2022.
    scatter = (jobs.sequence_parallel > 0) | ((jobs.framework != NANOTRON) & ~slow(jobs))
    message = np.where(scatter, message / jobs.tp, message)
    inside = jobs.nvlink * c["nvlink_tensor"]
    rate = np.where(jobs.gpus > jobs.domain, node_rate(jobs, c) / jobs.per_node, inside)
    latency = by_system(c, "pipeline_latency", jobs) * np.where(slow(jobs), c["slow_latency"], 1)
    one = latency + by_system(c, "pipeline_exposed", jobs) * message / rate
    return np.where(jobs.pp > 1, 2 * jobs.vpp * one, 0.0)


def group_rate(jobs: Jobs, c: Constants) -> Column:
    """Bytes/s of a rank in its data-parallel ring: the ranks of a node that are in one ring share
    its network (hierarchy of rings)."""
    inside = np.clip(jobs.domain / jobs.tp, 1.0, jobs.dp)
    fast = jobs.nvlink * c["nvlink_data"]
    shared = node_rate(jobs, c) * inside / jobs.per_node * np.where(slow(jobs), c["slow_ring"], 1)
    return np.where(jobs.dp * jobs.tp <= jobs.domain, fast, np.minimum(fast, shared))


def data_wait(jobs: Jobs, c: Constants) -> Column:
    """Seconds of a step's gradient reduction (and ZeRO's gathering of weights) that are not
    hidden: 2 (d - 1) / d of the gradients, once a step. ZeRO-3 pays with each micro-batch, and so
    do DeepSpeed's gradients under ZeRO-2, which are cut as they are made; it reduces whole buckets
    for all ranks, under ZeRO-1 too (stage_1_and_2.py, use_multi_rank_bucket_allreduce)."""
    held = stage_parameters_of(jobs)
    whole = np.where(jobs.zero == 2, 2 * jobs.micro_batches, 2.0)
    times = np.where(ours(jobs) & (jobs.zero > 0), whole, 1.0)
    gathered = jobs.weight_bytes * np.where(on_host(jobs), HOST_GATHER, 1.0)
    back = np.where(jobs.zero > 0, gathered, jobs.grad_bytes)
    volume = (times * jobs.grad_bytes + back) * held
    ring = (
        volume * (jobs.dp - 1) / jobs.dp / group_rate(jobs, c)
        + by_system(c, "ring_latency", jobs) * jobs.dp
    )
    exposed = by_system(c, "data_exposed", jobs)
    return np.where((jobs.dp > 1) & (jobs.zero < 3), exposed * ring, 0.0)


def sharded_wait(jobs: Jobs, c: Constants) -> Column:
    """Seconds of ZeRO-3's traffic for one micro-batch: weights gathered forward and backward and
    gradients scattered, and a latency for each hop of each ring. What --calibrate found of the
    ring's rate counts here too. Over gloo a reduce-scatter is an all-reduce, of which each rank
    keeps its part (torch's ProcessGroupGloo): twice the traffic."""
    rate = group_rate(jobs, c) / np.where(ours(jobs), by_system(c, "data_exposed", jobs), 1.0)
    host = on_host(jobs)
    gathered = 2 * jobs.weight_bytes * np.where(host, HOST_GATHER, 1.0)
    each = gathered + jobs.grad_bytes * np.where(host, 2, 1)
    volume = each * stage_parameters_of(jobs) * (jobs.dp - 1) / jobs.dp / rate
    # A host's messages: four matrices of a layer, each gathered forward and backward.
    hops = by_system(c, "sharded_latency", jobs) * jobs.dp
    hops = np.where(host & (jobs.dp > 1), 8 * HOST_MESSAGE, hops) * jobs.most
    # From the host's memory each rank fetches its own part forward and backward.
    own = 2 * jobs.weight_bytes * stage_parameters_of(jobs) / jobs.dp
    return volume + hops + jobs.offload_weights * own / HOST_LINK


def optimizer_time(jobs: Jobs, c: Constants) -> Column:
    """Seconds of the update: its traffic through memory and a fixed cost of a step."""
    held = stage_parameters_of(jobs)
    mine = np.where(jobs.zero > 0, held / jobs.dp, held)
    traffic = (28 * mine + 8 * held) / jobs.hbm
    # Gradients go to the host and weights come back, and its processor updates them.
    host = jobs.offload * mine * (jobs.kept_grad_bytes + jobs.weight_bytes) / HOST_LINK
    host = host + jobs.offload * mine * jobs.per_node / HOST_UPDATES
    return c["update"] * traffic + by_system(c, "step", jobs) + host
