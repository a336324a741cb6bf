"""Text into verified shards, and what is done with shards afterwards.

The pipe of a preparation, step by step, and the module of each:

    inputs -> sources   which files, in which format            documents.py (huggingface.py)
    sources -> units    about 8 MB each, by the input alone     unit.py (array.py: JSON arrays)
    units -> texts      in a worker; what is broken is named    texts.py, open.py
    texts -> parts      clean, encode, END-OF-DOCUMENT          part.py (contamination.py)
    parts -> shards     in order, without copies                pipe.py, duplicates.py, shards.py
    shards -> corpus    manifest.json, the last that is written manifest.py, digests.py

recipe.py says what is asked, summary.py what came out, progress.py how it goes; workers.py runs the
processes, and unfinished.py keeps what a killed run had done. Ids that exist already enter at the
shards: one's own by records.py (forms.py), those in files of others by foreign.py and adopt.py.
verify.py, inspect.py and stage.py take a corpus as it is. command.py has the command lines, and
train_bpe.py makes a vocabulary out of the same texts.
"""
