"""Prepared corpora: writing them, believing them, and reading them in an order fixed for ever (L1).

manifest, shards, writer, verify   the files of a corpus
mixture, order, store              sample number -> source -> window -> tokens (numpy only)
loader                             micro-batches of a data-parallel rank
trace                              the documents behind a step
"""
