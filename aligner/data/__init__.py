"""From lines on a disk to the batches of a step.

`rows` parses lines, `tokenization` and `examples` tokenize them, `token_cache` keeps the tokens on disk, `sampler` orders
them, `microbatches` and `packing` split global batches, and `batch` lays a micro-batch out. Read `module` first: the
Lightning data module that connects these.
"""
