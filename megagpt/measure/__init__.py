"""What a run measures of itself beside the loss (L2).

    meter = Meter(config, layout, engine)
    meter.begin(step)
    result = engine.train_step(...)
    record |= meter.end(result, batch_tokens, lr)

The figures have the same names and meaning under every layout; docs/monitoring.md lists them.
"""

from megagpt.measure.meter import Meter

__all__ = ["Meter"]
