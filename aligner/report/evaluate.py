"""`nemo llm evaluate`: loss and log-probabilities of a checkpoint on rows, without training."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch
from tqdm import tqdm

from aligner.common.console import messages
from aligner.common.errors import ConfigError, RowError
from aligner.common.files import atomic_write
from aligner.data import sources
from aligner.data.batch import Item, collate
from aligner.data.chat_template import TemplateSettings
from aligner.data.examples import Example, Kind, examples
from aligner.data.forms.convert import as_line
from aligner.data.forms.form import Options, RankedPairs
from aligner.data.rows import FormatCounts, PreferenceRow, Row
from aligner.data.tokenization import ResponseTokenizer

Scores = list[tuple[float, ...]]
"""Log-probability of each response of an example, nats."""
SIDES = ("chosen", "rejected")


def evaluate(
    data: Union[list[Any], str],
    checkpoint: str,
    reference: Optional[str] = None,
    output: Optional[str] = None,
    beta: float = 0.1,
    seq_length: int = 2048,
    micro_batch_size: int = 8,
    apply_chat_template: Optional[bool] = None,
    chat_template_kwargs: Optional[dict[str, Any]] = None,
    ranked_pairs: RankedPairs = "best_worst",
    ignore_columns: Optional[list[str]] = None,
) -> dict[str, float]:
    """Score rows by a checkpoint, without training: loss, accuracy, margins, and log-probabilities of every response.

    Without a reference, the better response is the one with the higher log-probability, and the loss is the negative
    log-probability of a token of the chosen responses. With one, rewards are beta * (log-probability - the other),
    and the loss is DPO's. A row with more tokens than seq_length is left out and counted. Runs on one device.

    Args:
        data: rows of any form (nemo llm forms): file, folder, glob, hf://datasets/NAME, or list of these.
        checkpoint: NeMo checkpoint, run folder, adapters, Hugging Face folder or hf://name.
        reference: likewise; the model that rewards are relative to.
        output: file of JSON lines to write: each row with its log-probabilities, tokens, rewards and margin.
        beta: factor of rewards.
        seq_length: most tokens of prompt and response together.
        micro_batch_size: rows that are scored at a time.
        apply_chat_template: as data.apply_chat_template; None: as in the checkpoint's training.
        chat_template_kwargs: as data.chat_template_kwargs; None: as in the checkpoint's training.
        ranked_pairs: as data.ranked_pairs.
        ignore_columns: as data.ignore_columns.

    Returns:
        The metrics.

    Raises:
        RowError: a row is invalid.
        ConfigError: the output exists, or an argument is invalid.
        CheckpointError: a checkpoint cannot be loaded.
    """
    target = Path(output).expanduser() if output else None
    if target is not None and target.exists():
        raise ConfigError(f"output: {target} exists already; remove it or name another file")
    rows, kind = _read(data, Options(ranked_pairs, tuple(ignore_columns or ())))
    cache = (target.parent if target else Path()) / "models"
    sizes = (seq_length, micro_batch_size)
    found, scores, rendering = _score(
        checkpoint, rows, kind, cache, *sizes, (apply_chat_template, chat_template_kwargs)
    )
    others = None
    if reference is not None:
        # Under the checkpoint's template, whatever the reference was trained with.
        same, others, _ = _score(reference, rows, kind, cache, *sizes, rendering)
        if [(e.prompt, e.responses) for _, e in same] != [(e.prompt, e.responses) for _, e in found]:
            raise ConfigError(f"reference: {reference} has another tokenizer or chat template than {checkpoint}")
    lines = [
        _line(row, example, logps, others[i] if others else None, beta)
        for i, ((row, example), logps) in enumerate(zip(found, scores, strict=True))
    ]
    metrics = _metrics(lines, kind, referenced=others is not None)
    _print(metrics, len(lines), kind, len(rows) - len(found))
    if target is not None:
        with atomic_write(target) as partial:
            partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"written: {output}")
    return metrics


def _read(data: Any, options: Options) -> tuple[list[Row], Kind]:
    rows: list[Row] = []
    for part in sources.resolve_files(data, "data"):
        reader, counts = sources.reader_of(part.path, options), FormatCounts()
        rows += sources.rows(part.path, reader, counts)
        counts.check(part.path)
        dropped = "".join(f"; {count} rows left out: {reason}" for reason, count in counts.dropped.items())
        print(f"{part.path}: {reader.name}{dropped}")
    pairs = {isinstance(row, PreferenceRow) for row in rows}
    if len(pairs) > 1:
        raise RowError("data: some files hold pairs, others single responses; evaluate them one after the other")
    return rows, "pairs" if pairs == {True} else "unpaired"


def _score(
    name: str,
    rows: list[Row],
    kind: Kind,
    cache: Path,
    seq_length: int,
    micro_batch_size: int,
    rendering: tuple[Any, Any],
) -> tuple[list[tuple[Row, Example]], Scores, tuple[bool, TemplateSettings]]:
    """Return the rows that fit, their scores, and whether and how the chat template was applied.

    `rendering` is that of another call, or `apply_chat_template` and `chat_template_kwargs`.
    """
    from aligner.backend import attention, device, distributed, kernels, patches

    patches.apply()
    from aligner.generate import restore

    def prepare(config: Any) -> None:
        if device.no_transformer_engine():
            attention.replace_attention(config)
        kernels.choose_attention(config)

    checkpoint = restore.find(name, cache)
    with distributed.preserved_environment():
        try:
            restored = restore.restore(checkpoint, prepare)
            applies, template = rendering
            if applies is None:
                applies = restored.applies_template()
            if not isinstance(template, TemplateSettings):
                template = restored.template(template)
            encode = ResponseTokenizer(restored.tokenizer, apply_chat_template=applies, template=template)
            found = [(row, one) for row in rows for one in _examples(row, encode, kind, seq_length)]
            for _, example in found if len(encode.hf) > restored.config.vocab_size else ():
                if max(max(ids) for ids in (example.prompt, *example.responses)) >= restored.config.vocab_size:
                    raise RowError(
                        f"{example.source}: holds a token that has no row in the embedding of {name} "
                        f"({restored.config.vocab_size} rows, {len(encode.hf)} tokens)"
                    )
            if not found:
                raise RowError(f"data: none of {len(rows)} rows has at most seq_length={seq_length} tokens; raise it")
            scores = list(_forward(restored, [example for _, example in found], micro_batch_size))
        finally:
            distributed.destroy_distributed()
    return found, scores, (applies, template)


def _examples(row: Row, encode: ResponseTokenizer, kind: Kind, seq_length: int) -> list[Example]:
    if isinstance(row, PreferenceRow) or row.desirable is not None:
        return examples([row], encode, kind=kind, seq_length=seq_length)[0]
    return examples([row], encode, kind="demonstrations", seq_length=seq_length)[0]


class _Callable:
    """Megatron's model in the shape in which NeMo hands it to a forward step."""

    def __init__(self, core: Any) -> None:
        self.module = core

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _forward(restored: Any, found: list[Example], micro_batch_size: int) -> Iterator[tuple[float, ...]]:
    from aligner.model import policy

    hf = getattr(restored.tokenizer, "tokenizer", restored.tokenizer)
    pad = hf.pad_token_id if hf.pad_token_id is not None and hf.pad_token_id < restored.config.vocab_size else 0
    # Rows of like length share a batch.
    order = sorted(range(len(found)), key=lambda i: found[i].length)
    scores: dict[int, tuple[float, ...]] = {}
    for begin in tqdm(range(0, len(order), micro_batch_size), "Scoring", unit="batch", file=messages()):
        batch = collate([Item(i, found[i]) for i in order[begin : begin + micro_batch_size]], pad_id=pad)
        if torch.cuda.is_available():
            batch = batch.cuda()
        with torch.no_grad():
            logp = policy.logps(batch, policy.forward_step(_Callable(restored.core), batch))
        for i, values in zip(batch.index_P.tolist(), logp.tolist(), strict=True):
            scores[i] = tuple(values)
    return (scores[i] for i in range(len(found)))


def _line(
    row: Row, example: Example, logps: tuple[float, ...], others: tuple[float, ...] | None, beta: float
) -> dict[str, Any]:
    """Return a row with its scores."""
    names = [f"{side}_" for side in SIDES] if len(logps) == 2 else [""]
    unscored = example.unscored or ([],) * len(logps)
    line: dict[str, Any] = {"source": row.source, **as_line(row)}
    for k, name in enumerate(names):
        line[f"{name}logp"] = logps[k]
        line[f"{name}tokens"] = len(example.responses[k]) - len(unscored[k])
        if others is not None:
            line[f"reference_{name}logp"] = others[k]
            line[f"{name}policy_reward"] = beta * (logps[k] - others[k])
    if len(logps) == 2:
        key = "logp" if others is None else "policy_reward"
        line["margin"] = line[f"chosen_{key}"] - line[f"rejected_{key}"]
    return line


def _metrics(lines: list[dict[str, Any]], kind: Kind, *, referenced: bool) -> dict[str, float]:
    side = "chosen_" if kind == "pairs" else ""
    nll = -sum(line[f"{side}logp"] for line in lines) / sum(line[f"{side}tokens"] for line in lines)
    found = {"nll_per_token": nll}
    for name in SIDES if kind == "pairs" else ("",):
        prefix = f"{name}_" if name else ""
        suffix = f"_{name}" if name else ""
        found[f"logps{suffix}_mean"] = statistics.fmean(line[f"{prefix}logp"] for line in lines)
        if referenced:
            found[f"rewards{suffix}_mean"] = statistics.fmean(line[f"{prefix}policy_reward"] for line in lines)
    if kind == "pairs":
        margins = [line["margin"] for line in lines]
        found["acc"] = statistics.fmean((m > 0) + 0.5 * (m == 0) for m in margins)
        found["margin_mean"] = statistics.fmean(margins)
        if referenced:
            found["loss"] = statistics.fmean(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins)
    return found


def _print(metrics: dict[str, float], count: int, kind: Kind, long: int) -> None:
    print(
        f"{count} {'pairs' if kind == 'pairs' else 'responses'}"
        + (f", {long} left out as too long or with equal tokens" if long else "")
    )
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.6g}")
