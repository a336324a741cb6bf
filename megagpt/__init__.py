"""megagpt: trains the GPT-3 family with DeepSpeed, from one laptop core to a multi-node cluster."""

__version__ = "0.1.0"
