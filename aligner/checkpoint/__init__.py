"""Weights on a disk: checkpoint folders, Hugging Face models in and out, NeMo 1 archives, LoRA.

Read `folders` first: which checkpoint of a run is complete, and which is the latest. `resume` decides where a run starts.
"""
