"""What others trained comes in, what was trained here goes out: `megagpt import`, `export` (L3)."""
