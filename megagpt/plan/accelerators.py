"""Accelerators that a plan can be made for, from their data sheets (L0, stdlib only).

Sources: NVIDIA's data sheets of V100, A100, H100, H200 and B200; node networks as in the DGX and
HGX systems that carry them.
"""

from dataclasses import dataclass

from megagpt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device and the node that it usually stands in."""

    generation: str
    """Whose fitted constants count for it."""
    processors: int
    """Multiprocessors."""
    tflops: float
    """Dense 16-bit matrix products, 10^12 FLOP/s."""
    fp32_tflops: float
    """The same in fp32."""
    memory_tb_s: float
    """Bandwidth of its memory, 10^12 bytes/s."""
    memory_gb: float
    """Its memory, 10^9 bytes."""
    link_gb_s: float
    """NVLink, 10^9 bytes/s in each direction."""
    node_gb: float
    """Network of a node, 10^9 bits/s."""
    watts: float
    """Power of the device at full load."""
    dollars: float
    """A GPU-hour on demand, a round figure of 2025 for comparing plans; --price sets another."""


ACCELERATORS = {
    "v100-16": Accelerator("V100", 80, 125.0, 15.7, 0.9, 16.0, 150.0, 100.0, 300.0, 1.0),
    "v100": Accelerator("V100", 80, 125.0, 15.7, 0.9, 32.0, 150.0, 100.0, 300.0, 1.2),
    "a100-40": Accelerator("A100", 108, 312.0, 19.5, 1.555, 40.0, 300.0, 1600.0, 400.0, 1.3),
    "a100": Accelerator("A100", 108, 312.0, 19.5, 2.039, 80.0, 300.0, 1600.0, 400.0, 1.8),
    "h100-500w": Accelerator("H100", 132, 989.0, 67.0, 2.4, 96.0, 450.0, 3200.0, 500.0, 2.5),
    "h100": Accelerator("H100", 132, 989.0, 67.0, 3.35, 80.0, 450.0, 3200.0, 700.0, 2.8),
    "h200": Accelerator("H100", 132, 989.0, 67.0, 4.8, 141.0, 450.0, 3200.0, 700.0, 3.3),
    "b200": Accelerator("B200", 148, 2250.0, 80.0, 8.0, 180.0, 900.0, 3200.0, 1000.0, 5.0),
    # Processors of one host: only --calibrate makes anything of it.
    # The link is gloo's through the loopback device, which the ranks' own cores drive.
    "cpu": Accelerator("V100", 1, 0.1, 0.1, 0.02, 64.0, 0.25, 10.0, 200.0, 0.05),
    "gb200": Accelerator("B200", 148, 2500.0, 80.0, 8.0, 186.0, 900.0, 3200.0, 1200.0, 6.0),
}


def check_gpu(name: str) -> None:
    """Raises UsageError for a --gpu that is not known."""
    if name not in ACCELERATORS:
        raise UsageError(f"--gpu {name}: must be one of {', '.join(ACCELERATORS)}")


def accelerator(text: str) -> tuple[str, Accelerator]:
    """The accelerator whose name the text holds, as a driver or a paper writes it; an A100 of
    80 GB where nothing fits."""
    name = accelerator_in(text) or "a100"
    return name, ACCELERATORS[name]


def accelerator_in(text: str) -> str:
    """The name of the accelerator that the text holds; "" where nothing fits."""
    low = text.lower()
    for name, parts in (
        ("gb200", ("gb200",)),
        ("b200", ("b200", "b300")),
        ("h200", ("h200",)),
        ("h100-500w", ("h100-500w", "h100-96gb")),
        ("h100", ("h100", "h800", "hopper")),
        ("a100-40", ("a100-40", "a100-sxm4-40")),
        ("a100", ("a100", "a800")),
        ("v100-16", ("v100-16", "v100-sxm2-16", "v100-sxm3-16")),
        ("v100", ("v100",)),
    ):
        if any(part in low for part in parts):
            return name
    return ""
