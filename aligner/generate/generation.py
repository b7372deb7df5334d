"""Answers of a model to a file of prompts: `nemo llm generate-responses`."""

from pathlib import Path
from typing import Any, Optional, Union

from aligner.common import hashing
from aligner.common.errors import ConfigError
from aligner.data.prompts import parent_key, read_prompts
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject
from aligner.generate.requests import generate_to_file
from aligner.generate.sampling import Sampling, seed_of


def generate_responses(
    prompts: Union[str, list[str]],
    output: str,
    engine: Engine,
    num_generations: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 512,
    stop: Optional[list[str]] = None,
    seed: int = 1234,
) -> Path:
    """Answer every prompt of a file `num_generations` times; run again, it goes on where it was.

    A line of the output is an answer: `key` (`id/sample`), `prompt`, `response`, `num_tokens`, `finish_reason` (`stop` if it ended
    properly, else `length` or `special`), `logp` (nats, of the answer under the model itself) and `seed`. An answer is
    a function of the weights, its prompt and its seed, up to rounding whatever the ranks and the batch.

    Args:
        prompts: JSON lines with `prompt`, a file, a folder or several.
        output: the file to write.
        engine: who answers (`aligner.generate.engine`).
        num_generations: answers of each prompt.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: of the likeliest tokens, the fewest that have this much probability together.
        top_k: of the likeliest tokens, so many; 0: all.
        max_tokens: of an answer.
        stop: texts that an answer ends before.
        seed: another one gives other answers.

    Returns:
        The output.

    Raises:
        RowError: a prompt is not as it must be, or too long.
        ConfigError: an argument is not, or the output was begun with others.
    """
    if num_generations < 1:
        raise ConfigError(f"num_generations: must be at least 1, found {num_generations}")
    if temperature == 0 and num_generations > 1:
        raise ConfigError(
            f"temperature: 0 gives {num_generations} times the same answer; raise it, or set num_generations=1"
        )
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=tuple(stop or ())
    )
    path = Path(output).expanduser()
    asked = _questions(prompts, num_generations, seed)
    prompts_hash = hashing.short_hash(repr([(parent_key(q.key), q.prompt) for q in asked[::num_generations]]).encode())
    made_with = {"num_generations": num_generations, "seed": seed, **vars(sampling), "engine": engine.describe()}
    settings = {"of": {"prompts": prompts_hash}, **made_with}

    def row(question: GenerationRequest, answer: GenerationResult) -> JsonObject:
        told = {
            "prompt": question.prompt,
            "response": answer.text,
            "num_tokens": answer.num_tokens,
            "finish_reason": answer.finish_reason,
        }
        return {"key": question.key, **told, "logp": answer.logp, "seed": question.seed}

    generate_to_file(
        Journal(path, settings), engine, asked, sampling, row, refuse_long=True, cache=path.parent / "models"
    )
    return path


def _questions(source: Any, num_generations: int, seed: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(key=f"{p.id}/{i}", prompt=p.prompt, seed=seed_of(seed, p.id, i), source=p.source)
        for p in read_prompts(source)
        for i in range(num_generations)
    ]
