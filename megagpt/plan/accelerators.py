"""Accelerators that a plan can be made for, from their data sheets (L0, stdlib only).

Sources: the data sheets of NVIDIA and AMD; networks and memory of nodes as in the DGX and HGX
systems that carry them. `reach` is an estimate: cards for PCIe hold their clocks within half the
power, and what MI250X (a half of it is a device) and MI300X reach at best is less of their peak
(stas00/ml-engineering).
"""

import re
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
    host_gb: float
    """Its node's memory for each of its devices, 10^9 bytes; --host-memory sets another."""
    reach: float = 1.0
    """Speed of products as a share of what others of its generation reach of their data sheet."""
    domain: int = 0
    """Devices that NVLink connects beyond a node; 0: those of a node."""


ACCELERATORS = {
    "v100-16": Accelerator("V100", 80, 125, 15.7, 0.9, 16, 150, 100, 300, 1.0, 64),
    "v100-pcie": Accelerator("V100", 80, 112, 14, 0.9, 32, 16, 100, 250, 1.0, 64),
    "v100": Accelerator("V100", 80, 125, 15.7, 0.9, 32, 150, 100, 300, 1.2, 64),
    "a100-40": Accelerator("A100", 108, 312, 19.5, 1.555, 40, 300, 1600, 400, 1.3, 128),
    "a100-pcie": Accelerator("A100", 108, 312, 19.5, 1.935, 80, 32, 200, 300, 1.5, 64, 0.87),
    "a100": Accelerator("A100", 108, 312, 19.5, 2.039, 80, 300, 1600, 400, 1.8, 128),
    "h100-500w": Accelerator("H100", 132, 989, 67, 2.4, 96, 450, 3200, 500, 2.5, 256),
    "h100-pcie": Accelerator("H100", 114, 756.5, 51.2, 2.0, 80, 64, 400, 350, 2.3, 128, 0.83),
    "h100-nvl": Accelerator("H100", 132, 835.5, 60, 3.9, 94, 64, 400, 400, 2.5, 128, 0.83),
    "h100": Accelerator("H100", 132, 989, 67, 3.35, 80, 450, 3200, 700, 2.8, 256),
    "h200-nvl": Accelerator("H100", 132, 835.5, 60, 4.8, 141, 450, 400, 600, 3.0, 128, 0.95),
    "h200": Accelerator("H100", 132, 989, 67, 4.8, 141, 450, 3200, 700, 3.3, 256),
    "gh200": Accelerator("H100", 132, 989, 67, 4.0, 96, 450, 800, 700, 2.5, 480),
    "h20": Accelerator("H100", 78, 148, 44, 4.0, 96, 450, 3200, 400, 1.5, 256),
    "b200": Accelerator("B200", 148, 2250, 80, 8.0, 180, 900, 3200, 1000, 5.0, 256),
    # Processors of one host: only --calibrate makes anything of it.
    # The link is gloo's through the loopback device, which the ranks' own cores drive.
    "cpu": Accelerator("V100", 1, 0.1, 0.1, 0.02, 64, 0.25, 10, 200, 0.05, 64),
    "gb200": Accelerator("B200", 148, 2500, 80, 8.0, 186, 900, 3200, 1200, 6.0, 240, domain=72),
    "mi250x": Accelerator("A100", 110, 191.5, 23.9, 1.6, 64, 100, 800, 280, 1.0, 64, 0.8),
    "mi300x": Accelerator("H100", 304, 1307, 163.4, 5.3, 192, 448, 3200, 750, 2.5, 256, 0.64),
}
_NAMES = {
    "gb200": "gb[23]00", "b200": "b[23]00", "h200-nvl": "h200.*nvl(?!ink)",
    "h200": "h200|gh200.*144", "gh200": "gh200", "h20": "h20", "h100-500w": "h100-500w|h100.*96",
    "h100-pcie": "h100.*pcie", "h100-nvl": "h100.*nvl(?!ink)", "h100": "h100|h800|hopper",
    "a100-40": "a100.*40", "a100-pcie": "a100.*pcie", "a100": "a100|a800", "v100-16": "v100.*16",
    "v100-pcie": "v100.*pcie", "v100": "v100", "mi250x": "mi250", "mi300x": "mi300|mi325",
}  # fmt: skip
"""Accelerator -> what its name holds as a driver or a paper writes it; the first counts."""


def known_gpu(name: str) -> str:
    """The accelerator that --gpu names, as here or as its driver does. Raises UsageError for one
    that is not known."""
    found = accelerator_in(name) or name
    if found not in ACCELERATORS:
        raise UsageError(f"--gpu {name}: must be one of {', '.join(ACCELERATORS)}")
    return found


def accelerator_in(text: str) -> str:
    """The name of the accelerator that the text holds; "" where nothing fits."""
    # Whole numbers: neither is an A1000 an A100 nor an H200 an H20; 8xH100 is one.
    words = {name: rf"(?<![a-wyz0-9])(?:{part})(?!\d)" for name, part in _NAMES.items()}
    return next((name for name, part in words.items() if re.search(part, text.lower())), "")


def peak_tflops(device: str) -> float | None:
    """The peak of a device by the name that its driver gives, half of what data sheets print "with
    sparsity"; None for one not listed."""
    name = accelerator_in(device)
    return ACCELERATORS[name].tflops if name else None
