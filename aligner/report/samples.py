"""Sample responses before and after training: of the initial model and of the run's latest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligner.checkpoint import folders
from aligner.common import run_folder
from aligner.common.errors import CheckpointError
from aligner.common.files import atomic_write
from aligner.data.rows import TextOrMessages
from aligner.generate import journal
from aligner.report import run_data

MAX_TOKENS = 128
"""Most tokens of a response, where half of the model's context length is not less."""


def write_samples(folder: Path, prompts: str, *, max_tokens: int | None = None) -> None:
    """Generate responses to prompts by a run's initial model and its latest checkpoint.

    Args:
        folder: folder of the run.
        prompts: file of prompts.
        max_tokens: maximum number of tokens of a response; None: 128, or half of a shorter context length.

    Raises:
        CheckpointError: either checkpoint is missing.
        RowError: a prompt is invalid.
    """
    from aligner.generate.generation import generate_responses
    from aligner.generate.megatron_engine import MegatronEngine

    run = run_data.read(folder)
    if max_tokens is None:
        context = run.recipe.get("model", {}).get("config", {}).get("seq_length") or 2 * MAX_TOKENS
        max_tokens = min(MAX_TOKENS, int(context) // 2)
    newest = folders.latest_checkpoint(folder)
    # A relative path is one of the folder in which the job was started.
    starts = (Path(job["folder"]) / job["initialized_from"] for job in run.jobs if job["initialized_from"])
    start = next(map(str, starts), None)
    if newest is None or start is None or not Path(start).exists():
        missing = "has no checkpoint" if newest is None else f"started from {start or 'random weights'}"
        raise CheckpointError(f"{folder}: {missing}; expected a run with the checkpoint that it made and its start")
    apply_chat_template = bool(run.recipe.get("data", {}).get("apply_chat_template"))
    answers: list[dict[str, Any]] = []
    for side, checkpoint in (("before", start), (f"after-step-{folders.step_of(newest)}", str(newest))):
        engine = MegatronEngine(checkpoint=checkpoint, apply_chat_template=apply_chat_template)
        output = folder / run_folder.PROVENANCE / "samples" / f"{side}-{max_tokens}-{Path(prompts).name}"
        generate_responses(prompts, str(output), engine, num_generations=1, temperature=0, max_tokens=max_tokens)
        answers.append({row["key"]: _shown(row, max_tokens) for row in journal.read(output)})
    before, after = answers
    rows = [
        {"prompt": _plain(row["prompt"]), "before": row["shown"], "after": after[key]["shown"]}
        for key, row in before.items()
    ]
    with atomic_write(folder / run_folder.SAMPLES) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = ["prompt", "before", "after"]
    _log_samples(folder, run.recipe, columns, [[row[name] for name in columns] for row in rows])


def _shown(row: journal.JsonObject, max_tokens: int) -> journal.JsonObject:
    cut = f" [cut at {max_tokens} tokens]" if row["finish_reason"] == "length" else ""
    return {**row, "shown": row["response"] + cut}


def _plain(text: TextOrMessages) -> str:
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)


def _log_samples(folder: Path, recipe: dict[str, Any], columns: list[str], rows: list[Any]) -> bool:
    """Log a table of responses to the folder's W&B run; return False if it has none."""
    wandb_id = folder / run_folder.PROVENANCE / run_folder.WANDB_ID
    settings = recipe.get("log", {}).get("wandb") or {}
    if not wandb_id.is_file():
        return False
    import wandb

    place = {name: settings[name] for name in ("project", "entity") if settings.get(name)}
    mode: Any = "offline" if settings.get("offline") else "online"
    run = wandb.init(id=wandb_id.read_text().strip(), resume="allow", dir=str(folder), mode=mode, **place)
    run.log({"samples": wandb.Table(columns=list[Any](columns), data=rows)})
    run.finish()
    return True
