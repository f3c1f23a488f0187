"""`python -m fp4jax.data.prepare`: documents → training shards, once, in several processes, restartable.

    inputs → units → documents → filters → tokens → records → shards + index

A unit is one input file, or a range of a TFDS data set. One process turns it into one shard a split and never looks at
another unit, so the output is a function of the inputs and the options alone, whatever the number of processes. A
shard is written under another name, flushed to the disk and renamed; the facts about a unit are written after its
shards. A unit with facts is done, any other is done again from its start: whenever the work is stopped, no document is
lost and none is there twice. The index is written last, and the set can be read (`fp4jax/data/prepared.py`) only then.

In the order in which data flows: `command` (flags), `options`, `inputs`, `filters`, `unit` (the work of a process),
`state` (what is done), `run` (the processes), `progress`, `report`.
"""
