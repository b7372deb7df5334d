"""What the machine decides: the device, kernels, deterministic mode, process groups.

`patches` changes NeMo and Megatron where CUDA or Transformer Engine is missing; no other file changes code of others.
Read `device` first, then `hardware`, whose functions recipes call on the machine where the job runs.
"""
