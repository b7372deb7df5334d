"""Data pipeline: JSON lines -> tokenized examples -> micro-batches.

`rows` parses lines, `tokenization` and `examples` tokenize them, `token_cache` stores tokens on disk, `sampler` orders
samples, `microbatches` and `packing` split global batches, `batch` builds tensors. Read `module` first: the Lightning
data module that connects them.
"""
