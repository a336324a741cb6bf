"""How a run begins: a run file that is fitted to a corpus and a machine, and its launch (L3)."""
