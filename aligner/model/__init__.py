"""Megatron GPT models as policy and reference model.

Read `policy` first: the forward step and the loss reduction. `scoring` computes log-probabilities without gradient,
`reference` has the reference models, `parallelism` the checks of parallel sizes.
"""
