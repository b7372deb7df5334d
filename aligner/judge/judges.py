"""Scores of answers, by a model that reads them or by a function that checks them: `nemo llm judge-responses`."""

import abc
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from tqdm import tqdm

from aligner.common import hashing
from aligner.common.errors import ConfigError, RowError
from aligner.data.prompts import Prompt, PromptIndex
from aligner.data.rows import TextOrMessages
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.journal import Journal, JsonObject, append, read
from aligner.generate.requests import generate_to_file
from aligner.generate.sampling import Sampling, seed_of
from aligner.judge import templates
from aligner.judge.verdicts import parse_score

FILLED = {"prompt", "response"}


def _made_of(asked: PromptIndex, candidates: list[JsonObject]) -> dict[str, int]:
    """Answers and the lines of their prompts, which a verifier compares with, as a hash."""
    content = repr([(row["key"], row["response"], asked.prompt(row["key"]).row) for row in candidates])
    return {"prompts or answers": hashing.short_hash(content.encode())}


class Judge(abc.ABC):
    """Writes a score for each answer, several where it judges several times."""

    @abc.abstractmethod
    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        """Write a line for each judgment: `key` (`id/sample/number`), `score` or null, `judgment`, `finish_reason`."""


def judge_responses(prompts: Union[str, list[str]], candidates: str, output: str, judge: Judge) -> Path:
    """Have the answers of a file judged; run again, it goes on where it was.

    A line of the output is a judgment: `key` (`id/sample/number`), `score` (null if it could not be read), `judgment`
    (the judge's own words) and `finish_reason`. Answers that did not end properly are not judged; the same answer to the same
    prompt is, once.

    Args:
        prompts: the file that was answered.
        candidates: what `generate-responses` wrote.
        output: the file to write.
        judge: `ModelJudge` or `Verifier`.

    Returns:
        The output.

    Raises:
        RowError: a file does not hold what it should.
        ConfigError: an argument is not as it must be, or the output was begun with others.
    """
    asked, seen, distinct = PromptIndex(prompts, candidates), set(), []
    for row in read(Path(candidates).expanduser(), ("key", "response", "finish_reason")):
        said = asked.prompt(row["key"]).id, row["response"]
        if row["finish_reason"] == "stop" and said not in seen:
            seen.add(said)
            distinct.append(row)
    path = Path(output).expanduser()
    judge.score(asked, distinct, path)
    return path


@dataclass
class ModelJudge(Judge):
    """A model that reads question and answer and states a score (arXiv 2401.10020, section 2.1).

    Args:
        engine: the model; the policy itself, another checkpoint, a server.
        template: `additive` (five points that add up, after the paper's figure 2), `direct`, or a jinja file with
            {{ prompt }} and {{ response }}.
        num_judgments: judgments of each answer, which are averaged.
        temperature: of drawing them.
        top_p: likewise.
        max_tokens: of a judgment.
        stop: texts that a judgment ends before.
        min_score: end of the scale; what is outside is not a score.
        max_score: its other end.
        pattern: a regular expression whose first group, at its last match, is the score; None: `parse_score`.
        seed: another one gives other judgments.
    """

    engine: Engine
    template: str = "additive"
    num_judgments: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    stop: Optional[list[str]] = None
    min_score: float = 0
    max_score: float = 5
    pattern: Optional[str] = None
    seed: int = 4321

    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        if self.num_judgments < 1:
            raise ConfigError(f"judge.num_judgments: must be at least 1, found {self.num_judgments}")
        if not self.min_score < self.max_score:
            raise ConfigError(f"judge.min_score, judge.max_score: {self.min_score} to {self.max_score} is no scale")
        read_score = self._parser()
        sampling = Sampling(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, stop=tuple(self.stop or ())
        )
        questions = []
        for answer in candidates:
            text = self.asked(asked.prompt(answer["key"]).prompt, answer["response"])
            for i in range(self.num_judgments):
                key = f"{answer['key']}/{i}"
                seed = seed_of(self.seed, key)
                questions.append(GenerationRequest(key=key, prompt=text, seed=seed, source=f"answer {answer['key']}"))

        def row(question: GenerationRequest, answer: GenerationResult) -> JsonObject:
            told = {
                "judgment": answer.text,
                "num_tokens": answer.num_tokens,
                "finish_reason": answer.finish_reason,
                "seed": question.seed,
            }
            return {"key": question.key, "score": read_score(answer.text), **told}

        settings = {
            "judge.template": templates.settings_of(self.template),
            "judge.num_judgments": self.num_judgments,
            "judge.min_score": self.min_score,
            "judge.max_score": self.max_score,
            "judge.pattern": self.pattern,
            "judge.seed": self.seed,
            **{f"judge.{name}": value for name, value in vars(sampling).items()},
            "judge.engine": self.engine.describe(),
            "of": _made_of(asked, candidates),
        }
        generate_to_file(
            Journal(output, settings), self.engine, questions, sampling, row,
            refuse_long=False, cache=output.parent / "models",
        )  # fmt: skip

    def asked(self, prompt: TextOrMessages, response: str) -> str:
        """What the model is asked of an answer.

        Raises:
            ConfigError: the template is not one.
        """
        return self._render(
            prompt=templates.as_text(prompt), response=response, min_score=self.min_score, max_score=self.max_score
        )

    @functools.cached_property
    def _render(self) -> Callable[..., str]:
        return templates.template(self.template, "judge.template", needed=FILLED, known={"min_score", "max_score"})

    def _parser(self) -> Callable[[str], float | None]:
        if self.pattern is None:
            return lambda text: parse_score(text, min_score=self.min_score, max_score=self.max_score)
        try:
            expression = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"judge.pattern: {self.pattern!r} is not a regular expression ({error})") from None
        if expression.groups < 1:
            raise ConfigError(f"judge.pattern: {self.pattern!r} has no group that the score stands in, as '(\\d+)'")

        def last(text: str) -> float | None:
            found = list(expression.finditer(text))
            try:
                value = float(found[-1][1]) if found else None
            except (TypeError, ValueError):
                return None
            return value if value is not None and self.min_score <= value <= self.max_score else None

        return last


@dataclass
class Verifier(Judge):
    """A function that checks an answer where right and wrong can be told (`aligner.judge.verifiers`).

    Args:
        function: of the prompt's whole line and the answer's text; returns the score.
    """

    function: Callable[[JsonObject, str], float]

    def score(self, asked: PromptIndex, candidates: list[JsonObject], output: Path) -> None:
        inner = self.function.func if isinstance(self.function, functools.partial) else self.function
        given = self.function.keywords if isinstance(self.function, functools.partial) else {}
        journal = Journal(
            output,
            {
                "judge.function": f"{inner.__module__}.{inner.__qualname__}",
                "judge.function arguments": {name: repr(value) for name, value in given.items()},
                "of": _made_of(asked, candidates),
            },
        )
        from aligner.backend.distributed import rank_zero_first

        with rank_zero_first() as first:
            if first and not journal.check_finished():
                self._work(journal, asked, candidates)

    def _work(self, journal: Journal, asked: PromptIndex, candidates: list[JsonObject]) -> None:
        journal.begin()
        order = {f"{row['key']}/0": i for i, row in enumerate(candidates)}
        done = {held["key"] for held in journal.rows()}
        with journal.appending(0) as file:
            for row in tqdm(candidates, journal.path.name, unit="answer"):
                if f"{row['key']}/0" not in done:
                    score = self._checked(asked.prompt(row["key"]), row["response"])
                    append(file, {"key": f"{row['key']}/0", "score": score, "judgment": "", "finish_reason": "stop"})
        journal.finish(lambda held: order[held["key"]])

    def _checked(self, prompt: Prompt, response: str) -> float:
        try:
            return float(self.function(prompt.row, response))
        except KeyError as error:
            raise RowError(f"{prompt.source}: has no {error}, which the verifier compares with") from None
