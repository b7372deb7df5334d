"""Weights on disk: checkpoint folders, Hugging Face import and export, NeMo 1 archives, LoRA.

Read `folders` first: complete checkpoints and the latest one. `resume` selects the starting checkpoint of a run.
"""
