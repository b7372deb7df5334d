"""Comparison of a checkpoint with the hashes of its files: `nemo llm verify-checkpoint`."""

import time
from pathlib import Path

from aligner.common.errors import CheckpointError


def verify_checkpoint(checkpoint: str) -> None:
    """Compare all files of a checkpoint, or of every checkpoint of a run, with the hashes that were written with them.

    Exits with code 1 if a file is missing, was cut or has changed. Files without a hash, as notes, are not looked at.

    Args:
        checkpoint: checkpoint folder, or run folder.

    Raises:
        CheckpointError: a file is damaged, or there is no checkpoint, or it was written without hashes.
    """
    from aligner.checkpoint import folders
    from aligner.checkpoint.safety import integrity

    path = Path(checkpoint).expanduser()
    found = [path] if folders.is_checkpoint(path) else sorted(folders.folders(path))
    if not found:
        raise CheckpointError(f"checkpoint: {path} is neither a checkpoint nor a run with checkpoints/")
    problems = []
    for each in found:
        if folders.is_unfinished(each):
            print(f"{each}: was not written to its end and is passed over")
            continue
        began = time.monotonic()
        damage = integrity.find_damage(each)
        hashes = None if damage else integrity.read(each)
        corruption = folders.find_corruption(each)
        if damage or corruption:
            problems += [f"{each}: {problem}" for problem in damage or [corruption]]
        elif hashes is None:
            problems.append(f"{each}: has no {integrity.HASHES}, so its files cannot be compared")
        else:
            size, seconds = sum(size for size, _ in hashes.values()) / 1e9, time.monotonic() - began
            print(f"{each}: {len(hashes)} files of {size:.3g} GB are what was written ({seconds:.1f} s)")
    if problems:
        raise CheckpointError("; ".join(problems))
