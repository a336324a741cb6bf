"""What accelerators can do, from their data sheets (L0, stdlib only)."""

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) matrix products, 10^12 FLOP/s, of the SXM form, without sparsity."""


def peak_tflops(device: str) -> float | None:
    """The peak of a device by the name that its driver gives; None for one not listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
