"""Judging of responses, selection of training rows, and self-rewarding iterations.

Read `self_rewarding` first: the stages of an iteration. `judges` scores responses, `selection` and `build_pairs` make
training rows, `meta_judge` makes rows that train judging. `verifiers` scores without a model, code in `sandbox`.
"""
