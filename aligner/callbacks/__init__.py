"""Callbacks around each training step: preparation, metrics, checks, checkpoints, preemption.

`aligner.train.trainer_setup` lists the callbacks in the order in which they run. Read `step_preparation` first, then
`metrics_callback`.
"""
