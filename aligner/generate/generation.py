"""Responses of a model to a file of prompts: `nemo llm generate-responses`."""

from pathlib import Path
from typing import Any, Optional, Union

from aligner.common import hashing
from aligner.common.errors import ConfigError
from aligner.data.prompts import parent_key, read_prompts
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject
from aligner.generate.requests import generate_to_file
from aligner.generate.sampling import Sampling, as_stops, seed_of


def generate_responses(
    prompts: Union[str, list[str]],
    output: str,
    engine: Engine,
    num_generations: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_tokens: int = 512,
    stop: Optional[Union[list[str], str]] = None,
    seed: int = 1234,
) -> Path:
    """Generate `num_generations` responses to every prompt of a file. If `output` is incomplete, generation resumes.

    Each output line is a response: `key` (`id/sample`), `prompt`, `response`, `num_tokens`, `finish_reason` (`stop` if
    complete, else `length` or `special`), `logp` (nats, of the response under the model itself) and `seed`. A response
    depends on the weights, its prompt and its seed alone, up to rounding, whatever the ranks and the batch size.

    Args:
        prompts: JSON lines with `prompt`: a file, a folder or a list of them.
        output: file to write.
        engine: generation backend (`aligner.generate.engine`).
        num_generations: responses per prompt.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: nucleus sampling threshold.
        top_k: number of likeliest tokens to sample from; 0: all.
        max_tokens: maximum number of tokens of a response.
        stop: string, or list of strings, that ends a response; the response does not include it.
        seed: random seed.

    Returns:
        The output.

    Raises:
        RowError: a prompt is invalid or too long.
        ConfigError: an argument is invalid, or the output was begun with other settings.
    """
    if num_generations < 1:
        raise ConfigError(f"num_generations: must be at least 1, found {num_generations}")
    if temperature == 0 and num_generations > 1:
        raise ConfigError(
            f"temperature: 0 gives {num_generations} times the same answer; raise it, or set num_generations=1"
        )
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=as_stops(stop))
    path = Path(output).expanduser()
    requests = _requests(prompts, num_generations, seed)
    prompts_hash = hashing.short_hash(
        repr(
            [(parent_key(r.key), r.prompt, *([r.template] if r.template else [])) for r in requests[::num_generations]]
        ).encode()
    )
    made_with = {"num_generations": num_generations, "seed": seed, **vars(sampling), "engine": engine.describe()}
    settings = {"of": {"prompts": prompts_hash}, **made_with}

    def row(request: GenerationRequest, result: GenerationResult) -> JsonObject:
        return {
            "key": request.key,
            "prompt": request.prompt,
            "response": result.text,
            "num_tokens": result.num_tokens,
            "finish_reason": result.finish_reason,
            "logp": result.logp,
            "seed": request.seed,
        }

    generate_to_file(
        Journal(path, settings), engine, requests, sampling, row, refuse_long=True, cache=path.parent / "models"
    )
    return path


def _requests(source: Any, num_generations: int, seed: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            key=f"{p.id}/{i}", prompt=p.prompt, seed=seed_of(seed, p.id, i), source=p.source, template=p.template
        )
        for p in read_prompts(source)
        for i in range(num_generations)
    ]
