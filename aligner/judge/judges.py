"""Judges, which score responses by a model or a function: `nemo llm judge-responses`."""

import abc
import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union, get_args

from tqdm import tqdm

from aligner.common import hashing
from aligner.common.console import log, messages
from aligner.common.errors import ConfigError, RowError
from aligner.common.process_pool import cores
from aligner.data.prompts import PromptIndex
from aligner.data.rows import TextOrMessages
from aligner.generate.engine import Choice, Engine, GenerationRequest, GenerationResult, ResponseFormat
from aligner.generate.journal import Journal, JsonObject, append, read
from aligner.generate.requests import generate_to_file
from aligner.generate.sampling import Sampling, as_stops, seed_of
from aligner.judge import templates
from aligner.judge.scores import after_thought, parse_score
from aligner.judge.scoring_pool import scores

PLACEHOLDERS = {"prompt", "response"}


def _input_hashes(prompts: PromptIndex, candidates: list[JsonObject]) -> dict[str, int]:
    """Return a hash of the responses and of the prompt lines, which a verifier reads."""
    content = repr([(row["key"], row["response"], prompts.prompt(row["key"]).row) for row in candidates])
    return {"prompts or answers": hashing.short_hash(content.encode())}


class Judge(abc.ABC):
    """The interface of judges: one or more scores per response."""

    @abc.abstractmethod
    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        """Write a line per judgment: `key` (`id/sample/number`), `score` or null, `judgment`, `finish_reason`."""


def judge_responses(prompts: Union[str, list[str]], candidates: str, output: str, judge: Judge) -> Path:
    """Score the responses of a file. If `output` is incomplete, judging resumes.

    Each output line is a judgment: `key` (`id/sample/number`), `score` (null if it cannot be parsed), `judgment` (the
    judge's text) and `finish_reason`. Incomplete responses are not judged. Identical responses to a prompt are judged
    once.

    Args:
        prompts: prompts of the candidates.
        candidates: output of `generate-responses`.
        output: file to write.
        judge: `ModelJudge` or `Verifier`.

    Returns:
        The output.

    Raises:
        RowError: an input file is missing, or a line is invalid.
        ConfigError: an argument is invalid, or the output was begun with other settings.
    """
    prompt_index, seen, distinct = PromptIndex(prompts, candidates), set(), []
    for row in read(Path(candidates).expanduser(), ("key", "response", "finish_reason")):
        response_id = prompt_index.prompt(row["key"]).id, row["response"]
        if row["finish_reason"] == "stop" and response_id not in seen:
            seen.add(response_id)
            distinct.append(row)
    path = Path(output).expanduser()
    judge.score(prompt_index, distinct, path)
    return path


AS_JSON = '\n\nWrite all of your reply as one JSON object: {"reasoning": "...", "score": ...}'
"""Added to the judge's prompt where its judgment is held to a schema."""
LAST_LINE = "\nScore: "
"""Text before a score that the engine chooses."""


@dataclass
class ModelJudge(Judge):
    """LLM-as-a-judge: a model reads prompt and response and generates a score (arXiv 2401.10020, section 2.1).

    Args:
        engine: generation backend of the judge: the policy itself, another checkpoint, or a server.
        template: `additive` (five additive points, after the paper's figure 2), `direct`, or a Jinja file with
            {{ prompt }} and {{ response }}.
        num_judgments: judgments per response; their scores are averaged.
        temperature: sampling temperature.
        top_p: nucleus sampling threshold.
        max_tokens: maximum number of tokens of a judgment.
        stop: string, or list of strings, that ends a judgment; the judgment does not include it.
        min_score: lowest score; a number below it is no score.
        max_score: highest score; a number above it is no score.
        response_format: what the engine holds each judgment to. `json`: an object with reasoning and score, by the
            server's `response_format`. `choice`: a judgment that ends without a score that can be read gets a last line
            `Score: `, and after it the likeliest integer of the scale. `text`: nothing. None: the first of these that
            the engine has (`OpenAIEngine` and `VLLMEngine` have json, `MegatronEngine` choice); text with a pattern.
        pattern: regular expression; the first group of its last match is the score. None: `parse_score`.
        seed: random seed.
    """

    engine: Engine
    template: str = "additive"
    num_judgments: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    stop: Optional[Union[list[str], str]] = None
    min_score: float = 0
    max_score: float = 5
    pattern: Optional[str] = None
    seed: int = 4321
    response_format: Optional[ResponseFormat] = None

    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        if self.num_judgments < 1:
            raise ConfigError(f"judge.num_judgments: must be at least 1, found {self.num_judgments}")
        if not self.min_score < self.max_score:
            raise ConfigError(f"judge.min_score, judge.max_score: {self.min_score} to {self.max_score} is no scale")
        form, parse = self._format(), self._parser()
        held_to = {"json_schema": self._schema() if form == "json" else None, "choice": self._choice(form, parse)}
        sampling = Sampling(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, stop=as_stops(self.stop)
        )
        requests = []
        for candidate in candidates:
            text = self.render_prompt(asked.prompt(candidate["key"]).prompt, candidate["response"])
            source = f"answer {candidate['key']}"
            for i in range(self.num_judgments):
                key = f"{candidate['key']}/{i}"
                seed = seed_of(self.seed, key)
                request = GenerationRequest(key=key, prompt=text, seed=seed, source=source, **held_to)
                requests.append(request)

        def row(request: GenerationRequest, result: GenerationResult) -> JsonObject:
            return {
                "key": request.key,
                "score": _chosen(result.text)
                if result.by_choice
                else parse(result.text, result.finish_reason == "stop"),
                **({"by_choice": result.by_choice} if form == "choice" else {}),
                "judgment": result.text,
                "num_tokens": result.num_tokens,
                "finish_reason": result.finish_reason,
                "seed": request.seed,
            }

        settings = {
            "judge.template": templates.settings_of(self.template),
            "judge.num_judgments": self.num_judgments,
            "judge.min_score": self.min_score,
            "judge.max_score": self.max_score,
            "judge.pattern": self.pattern,
            "judge.seed": self.seed,
            "judge.response_format": form,
            **{f"judge.{name}": value for name, value in vars(sampling).items()},
            "judge.engine": self.engine.describe(),
            "of": _input_hashes(asked, candidates),
        }
        generate_to_file(
            Journal(output, settings), self.engine, requests, sampling, row,
            refuse_long=False, cache=output.parent / "models",
        )  # fmt: skip

    def render_prompt(self, prompt: TextOrMessages, response: str) -> str:
        """Return the judge's prompt for a response.

        Raises:
            ConfigError: the template is missing or invalid.
        """
        text = self._render(
            prompt=templates.as_text(prompt), response=response, min_score=self.min_score, max_score=self.max_score
        )
        return text + (AS_JSON if self._format() == "json" else "")

    @functools.cached_property
    def _render(self) -> Callable[..., str]:
        return templates.template(
            self.template, "judge.template", needed=PLACEHOLDERS, known={"min_score", "max_score"}
        )

    def _format(self) -> ResponseFormat:
        """Return what judgments are held to.

        Raises:
            ConfigError: the engine cannot hold them to it.
        """
        known = self.engine.response_formats
        if self.response_format is None:
            integers = float(self.min_score).is_integer() and float(self.max_score).is_integer()
            fit: list[ResponseFormat] = [form for form in known if form != "choice" or integers]
            return "text" if self.pattern is not None else fit[0]
        form: ResponseFormat = self.response_format
        if form not in get_args(ResponseFormat):
            raise ConfigError(f"judge.response_format: {form!r} is not one of {', '.join(get_args(ResponseFormat))}")
        if form not in known:
            raise ConfigError(
                f"judge.response_format: {form}, which {type(self.engine).__name__} cannot hold a "
                f"judgment to; it has {', '.join(known)}"
            )
        return form

    def _choice(self, form: ResponseFormat, parse: Callable[[str, bool], float | None]) -> Choice | None:
        if form != "choice":
            return None
        low, high = int(self.min_score), int(self.max_score)
        if (low, high) != (self.min_score, self.max_score):
            raise ConfigError(
                f"judge.response_format: choice, which is between integers, but the scale is {self.min_score} to "
                f"{self.max_score}; use text"
            )
        if self.pattern is not None:
            raise ConfigError("judge.response_format: choice, whose line judge.pattern does not read; set one of them")
        options = tuple(map(str, range(low, high + 1)))
        return Choice(before=LAST_LINE, options=options, lacking=lambda text: parse(text, True) is None)

    def _schema(self) -> dict[str, Any]:
        """Return the schema of a judgment."""
        score = {"type": "number", "minimum": self.min_score, "maximum": self.max_score}
        return {
            "type": "object",
            "properties": {"reasoning": {"type": "string"}, "score": score},
            "required": ["reasoning", "score"],
            "additionalProperties": False,
        }

    def _parser(self) -> Callable[[str, bool], float | None]:
        """Return a function of a judgment and of whether it came to its end."""
        if self.pattern is None:
            return lambda text, finished: parse_score(
                text, min_score=self.min_score, max_score=self.max_score, finished=finished
            )
        try:
            expression = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"judge.pattern: {self.pattern!r} is not a regular expression ({error})") from None
        if expression.groups < 1:
            raise ConfigError(f"judge.pattern: {self.pattern!r} has no group for the score, as '(\\d+)'")

        def parse(text: str, finished: bool) -> float | None:
            matches = list(expression.finditer(text))
            try:
                value = float(matches[-1][1]) if matches else None
            except (TypeError, ValueError):
                return None
            return value if value is not None and self.min_score <= value <= self.max_score else None

        return parse


def _chosen(text: str) -> float | None:
    """Return the score of a last line that the engine wrote; None after a thought that has no end."""
    said = after_thought(text)
    return None if said is None else float(text.rpartition(LAST_LINE)[2])


@dataclass
class Verifier(Judge):
    """A function that scores responses to prompts with a verifiable result (`aligner.judge.verifiers`).

    The function runs in worker processes, which import it. A response whose score cannot be had (an exception, a score
    that is no finite number, a process that takes too long, needs too much memory or ends) gets the score null, the
    `finish_reason` `failed` and an `error`. An exception of `aligner.common.errors`, or a key that the row has not got,
    ends the stage.

    Args:
        function: takes the prompt's JSON line and the response text; returns the score.
        seconds: limit on the time for a response; longer than the function's own limit, if it has one.
        memory_mb: memory that a worker process may take, above what its imports need.
        workers: number of processes. None: that of cores.
        max_failure_rate: part of the responses that may be without score. With more, the stage ends with an error; the
            scores are kept, and the next run tries the rest again.
    """

    function: Callable[[JsonObject, str], float]
    seconds: float = 30
    memory_mb: int = 2048
    workers: Optional[int] = None
    max_failure_rate: float = 0.05

    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        self._check()
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        arguments = self.function.keywords if isinstance(self.function, functools.partial) else {}
        journal = Journal(
            output,
            {
                "judge.function": f"{function.__module__}.{function.__qualname__}",
                "judge.function arguments": {name: repr(value) for name, value in arguments.items()},
                "of": _input_hashes(asked, candidates),
            },
        )
        from aligner.backend.distributed import rank_zero_first

        with rank_zero_first() as first:
            if first and not journal.check_finished():
                journal.begin()
                try:
                    self._score_rows(journal, asked, candidates)
                finally:
                    journal.close()

    def _check(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"judge.workers: must be at least 1, found {self.workers}")
        for name in ("seconds", "memory_mb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"judge.{name}: must be above 0, found {getattr(self, name)}")
        if not 0 <= self.max_failure_rate <= 1:
            raise ConfigError(f"judge.max_failure_rate: must be between 0 and 1, found {self.max_failure_rate}")

    def _score_rows(self, journal: Journal, asked: PromptIndex, candidates: list[JsonObject]) -> None:
        order = {f"{row['key']}/0": i for i, row in enumerate(candidates)}
        done = {row["key"] for row in journal.rows(order)}
        left = [row for row in candidates if f"{row['key']}/0" not in done]
        tasks = [(asked.prompt(row["key"]).row, row["response"]) for row in left]
        failed: dict[int, str] = {}
        outcomes = scores(
            self.function, tasks, workers=self.workers or cores(), seconds=self.seconds, memory_mb=self.memory_mb
        )
        bar = tqdm(initial=len(done), total=len(candidates), desc=journal.path.name, unit="answer", file=messages())
        with journal.open_part(0) as file, contextlib.closing(outcomes), bar:
            for number, outcome in outcomes:
                bar.update()
                key, source = f"{left[number]['key']}/0", asked.prompt(left[number]["key"]).source
                if outcome.score is not None:
                    append(file, {"key": key, "score": outcome.score, "judgment": "", "finish_reason": "stop"})
                    continue
                if isinstance(outcome.error, KeyError):
                    raise RowError(f"{source}: has no {outcome.error}, which the verifier compares with")
                if outcome.error is not None:
                    raise outcome.error
                failed[number] = outcome.reason
                if len(failed) > self.max_failure_rate * len(candidates):
                    first = min(failed)
                    place = f"{asked.prompt(left[first]['key']).source}, response {left[first]['key']}"
                    raise ConfigError(
                        f"judge.function: {len(failed)} of {len(candidates)} responses have no score, more than "
                        f"judge.max_failure_rate={self.max_failure_rate:g} allows; the first is {place}: "
                        f"{failed[first]}; mend the function, or allow more. What is scored is kept"
                    )
            # Last, so that a stage that ended before asks for them again.
            for number, reason in sorted(failed.items()):
                row = {"key": f"{left[number]['key']}/0", "score": None, "judgment": "", "finish_reason": "failed"}
                append(file, {**row, "error": reason})
        if failed:
            reasons = "; ".join(f"{count} times {reason}" for reason, count in Counter(failed.values()).most_common(3))
            log(f"{journal.path.name}: {len(failed)} of {len(candidates)} responses have no score: {reasons}")
        journal.finish(sorted(journal.rows(order), key=lambda row: order[row["key"]]))
