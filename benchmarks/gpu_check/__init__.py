"""Everything that megagpt does on a GPU, measured in one call: docs/benchmarks/gpu.md."""
