"""What accelerators can do, from their data sheets (L0, stdlib only)."""

import re

PEAK_TFLOPS = {
    # Blackwell (HGX and NVL72 data sheets: 4.5 and 5 PFLOP/s of bf16 with sparsity).
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    # Hopper: 1,979 TFLOP/s with sparsity as SXM, 1,671 as NVL, 1,513 as PCIe; H20: 148 without.
    "GH200": 989.0,
    "H200 NVL": 835.5,
    "H200": 989.0,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) matrix products, 10^12 FLOP/s: half of what data sheets print "with
sparsity". A form comes before the name alone, which is the SXM form."""


def peak_tflops(device: str) -> float | None:
    """The peak of a device by the name that its driver gives; None for one not listed."""
    # Whole numbers: neither is an A1000 an A100 nor an H200 an H20.
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}(?!\d)", device))
    return next(found, None)
