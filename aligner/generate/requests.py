"""Generation to a file: one row per request, resumable after a kill."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from aligner.common.console import is_first_rank, log_rank0, messages
from aligner.common.errors import RowError
from aligner.common.files import atomic_write
from aligner.generate.engine import FAILED, NO_ROOM, Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject, append
from aligner.generate.sampling import Sampling


def generate_to_file(
    journal: Journal,
    engine: Engine,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    row: Callable[[GenerationRequest, GenerationResult], JsonObject],
    *,
    refuse_long: bool,
    cache: Path,
) -> None:
    """Write a row for each request to the journal, in the order of the requests.

    Every rank calls this function. A request that is too long gets an empty response with `finish_reason` `no_room`.
    The throughput is written beside the journal (`speed_of`).

    Args:
        row: makes the row of a result, with the request's `key`.
        refuse_long: raise if a request is too long.
        cache: folder for what the engine makes once.

    Raises:
        RowError: a request is too long or invalid.
        UserError: the engine or the journal raises it.
    """
    if journal.check_finished():
        log_rank0(f"{journal.path} is complete; skipping generation")
        return
    order = {request.key: i for i, request in enumerate(requests)}
    engine.total_requests = len(requests)
    with engine.session(cache):
        share = engine.shard
        if share is None:
            return
        long = _too_long(engine, requests, sampling, refuse=refuse_long)
        try:
            if is_first_rank():
                journal.begin()
            engine.barrier()
            fields = [*row(requests[0], _empty(requests[0]))] if requests else []
            done = {written["key"] for written in journal.rows(order, fields)}
            engine.barrier()
            start = time.monotonic()
            mine = _requests_of_part([q for q in requests if q.key not in done], *share)
            if engine.is_writer:
                with journal.open_part(share[0]) as file, _progress(journal, len(requests), len(done), share) as bar:
                    _write_rows(file, bar, engine, mine, long, sampling, row)
            else:
                for _ in engine.generate([q for q in mine if q.source not in long], sampling):
                    pass
            engine.barrier()
            if is_first_rank():
                rows = sorted(journal.rows(order, fields), key=lambda written: order[written["key"]])
                assert len(rows) == len(order), "a request is lost"
                _log_failed(journal.path, rows)
                new = [written for written in rows if written["key"] not in done]
                _write_speed(journal.path, new, time.monotonic() - start)
                journal.finish(rows)
            engine.barrier()
        finally:
            journal.close()


def _write_rows(
    file: IO[bytes],
    bar: tqdm,  # type: ignore[type-arg]
    engine: Engine,
    requests: Sequence[GenerationRequest],
    long: set[str],
    sampling: Sampling,
    row: Callable[[GenerationRequest, GenerationResult], JsonObject],
) -> None:
    """Append the row of each request; those of the sources `long` get an empty response."""
    for request in requests:
        if request.source in long:
            append(file, row(request, _empty(request)))
    by_key = {request.key: request for request in requests if request.source not in long}
    for result in engine.generate(list(by_key.values()), sampling):
        append(file, row(by_key[result.key], result) | ({"error": result.error} if result.error else {}))
        bar.update()


def _empty(request: GenerationRequest) -> GenerationResult:
    return GenerationResult(key=request.key, text="", num_tokens=0, finish_reason=NO_ROOM)


def _log_failed(path: Path, rows: Sequence[JsonObject]) -> None:
    reasons = Counter(written["error"] for written in rows if written.get("finish_reason") == FAILED)
    if reasons:
        shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        log_rank0(f"{path.name}: {reasons.total()} of {len(rows)} requests have no answer ({FAILED}): {shown}")


def _requests_of_part(requests: Sequence[GenerationRequest], part: int, parts: int) -> list[GenerationRequest]:
    """Return the requests of a process. Those of one source stay together: their common prompt is prefilled once."""
    groups = [list(group) for _, group in itertools.groupby(requests, key=lambda q: q.source)]
    units = groups if len(groups) >= parts else [[q] for q in requests]
    return [q for group in units[part::parts] for q in group]


def speed_of(path: Path) -> dict[str, float]:
    """Return the throughput of the job that finished a file: `answers` and `tokens` per second of all ranks.

    Empty for a file that `generate_to_file` did not write.
    """
    file = _speed_file(path)
    return json.loads(file.read_text()) if file.is_file() else {}


def _speed_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.speed.json")


def _write_speed(path: Path, rows: list[JsonObject], seconds: float) -> None:
    if not rows:
        return
    tokens = sum(row["num_tokens"] for row in rows)
    speed = {"answers": len(rows) / seconds, "tokens": tokens / seconds}
    with atomic_write(_speed_file(path)) as partial:
        partial.write_text(json.dumps(speed))
    log_rank0(
        f"{path.name}: {len(rows)} answers of {tokens / len(rows):.0f} tokens on average in {seconds:.0f} s, "
        f"{speed['answers']:.3g} answers and {speed['tokens']:.3g} tokens a second"
    )


def _too_long(engine: Engine, requests: Sequence[GenerationRequest], sampling: Sampling, *, refuse: bool) -> set[str]:
    """Return the sources of requests that are too long; all requests of one source have the same prompt."""
    by_source = {q.source: q for q in requests}
    long = engine.too_long(list(by_source.values()), sampling)
    if long and refuse:
        shown = "; ".join(f"{q.source}: {why}" for q, why in long[:5]) + ("; ..." if len(long) > 5 else "")
        raise RowError(
            f"{len(long)} of {len(by_source)} prompts are too long: {shown}. Shorten or drop them, or lower max_tokens"
        )
    if long:
        log_rank0(
            f"{len(long)} of {len(by_source)} prompts are too long and get an empty response, first {long[0][0].source}"
        )
    return {q.source for q, _ in long}


def _progress(journal: Journal, count: int, done: int, share: tuple[int, int]) -> tqdm:  # type: ignore[type-arg]
    """Return a progress bar of this process's part; the first part shows one for all."""
    part, parts = share
    return tqdm(
        desc=journal.path.name,
        total=-(-count // parts),
        initial=done // parts,
        unit="answer",
        disable=part > 0,
        file=messages(),
    )
