"""Answers of a model to a file of prompts: `nemo llm generate-responses`."""

from pathlib import Path
from typing import Any, Optional, Union

from aligner import naming
from aligner.asking import ask
from aligner.engines import Answer, Engine, Question
from aligner.errors import ConfigError
from aligner.journal import Journal, Row
from aligner.prompts import above, read_prompts
from aligner.sampling import Sampling, seed_of


def generate_responses(
    prompts: Union[str, list[str]],
    output: str,
    engine: Engine,
    samples: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 512,
    stop: Optional[list[str]] = None,
    seed: int = 1234,
) -> Path:
    """Answer every prompt of a file `samples` times; run again, it goes on where it was.

    A line of the output is an answer: `key` (`id/sample`), `prompt`, `response`, `tokens`, `finish` (`stop` if it ended
    properly, else `length` or `special`), `logp` (nats, of the answer under the model itself) and `seed`. An answer is
    a function of the weights, its prompt and its seed, up to rounding whatever the ranks and the batch.

    Args:
        prompts: JSON lines with `prompt`, a file, a folder or several.
        output: the file to write.
        engine: who answers (`aligner.engines`).
        samples: answers of each prompt.
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
    if samples < 1:
        raise ConfigError(f"samples: must be at least 1, found {samples}")
    if temperature == 0 and samples > 1:
        raise ConfigError(f"temperature: 0 gives {samples} times the same answer; raise it, or set samples=1")
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=tuple(stop or ())
    )
    path = Path(output).expanduser()
    asked = _questions(prompts, samples, seed)
    prompts_hash = naming.short_hash(repr([(above(q.key), q.prompt) for q in asked[::samples]]).encode())
    made_with = {"samples": samples, "seed": seed, **vars(sampling), "engine": engine.identity()}
    settings = {"of": {"prompts": prompts_hash}, **made_with}

    def row(question: Question, answer: Answer) -> Row:
        told = {"prompt": question.prompt, "response": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        return {"key": question.key, **told, "logp": answer.logp, "seed": question.seed}

    ask(Journal(path, settings), engine, asked, sampling, row, refuse_long=True, cache=path.parent / "models")
    return path


def _questions(source: Any, samples: int, seed: int) -> list[Question]:
    return [
        Question(key=f"{p.id}/{i}", prompt=p.prompt, seed=seed_of(seed, p.id, i), source=p.source)
        for p in read_prompts(source)
        for i in range(samples)
    ]
