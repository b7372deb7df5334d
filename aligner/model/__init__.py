"""A Megatron GPT model as a policy and as a reference model.

Read `policy` first: the forward step and the loss reduction. `scoring` computes log-probabilities without learning,
`reference` has the reference models, `parallelism` the checks of parallel sizes.
"""
