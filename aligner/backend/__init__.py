"""Machine-dependent code: device, kernels, deterministic mode, process groups.

`patches` changes NeMo and Megatron where CUDA or Transformer Engine is missing; no other file changes upstream code.
Read `device` first, then `hardware`: recipes call its functions on the machine where the job runs.
"""
