"""Lint rules: severity, title and remedy of each finding.

An error stops a run or trains the opposite of the preference; every other finding is a warning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Fixed properties of a kind of finding."""

    severity: str
    title: str
    remedy: str


RULES: dict[str, Rule] = {
    "unreadable": Rule(
        "error",
        "rows that cannot be read",
        "repair or drop the rows; a run stops at the first one",
    ),
    "empty": Rule(
        "error",
        "empty or blank prompts or responses",
        "drop the rows or fill them in; a run stops at the first one",
    ),
    "same-answers": Rule(
        "error",
        "pairs of identical responses",
        "drop the rows; they contain no preference",
    ),
    "rewards": Rule(
        "error",
        "rewards that are not both numbers",
        "give both chosen_reward and rejected_reward, or neither",
    ),
    "missing-rewards": Rule(
        "error",
        "rows without rewards, in data where other rows have rewards",
        "add rewards to every row or to none",
    ),
    "missing-preference": Rule(
        "error",
        "responses without a preference, in a file where others have one",
        "add a preference to every row",
    ),
    "mixed-forms": Rule(
        "error",
        "single responses and pairs in one file",
        "put single responses into their own file",
    ),
    "contradiction": Rule(
        "error",
        "responses to one prompt that are both preferred and rejected",
        "keep one label and drop the other",
    ),
    "too-many-overlong": Rule(
        "error",
        "rows longer than seq_length, more than a run accepts by default (10%)",
        "raise seq_length, clean the data, or set data.overlong or data.max_dropped_fraction",
    ),
    "overlong": Rule(
        "warning",
        "rows longer than seq_length, which a run drops by default",
        "raise seq_length, or accept that they are dropped",
    ),
    "rows-left-out": Rule(
        "warning",
        "rows that make no example: ties, equal or empty responses",
        "nothing, if so few are to be left out; a run counts them, too",
    ),
    "bos": Rule(
        "warning",
        "the tokenizer begins a text with a BOS token, its chat template does not",
        "nothing, if the model was trained so: the template decides, in training, in generating and in serving",
    ),
    "templated-prompt": Rule(
        "error",
        "prompts with the chat template's own tokens, around which it is put once more",
        "set apply_chat_template=False, or take the tokens out of the rows",
    ),
    "one-sided": Rule(
        "warning",
        "nearly all responses have the same preference",
        "weigh the two sides (loss.desirable_weight, loss.undesirable_weight), or add responses of the other",
    ),
    "one-prompt": Rule(
        "warning",
        "all responses have the same prompt, so KTO's KL compares responses with themselves",
        "add other prompts",
    ),
    "no-rows": Rule(
        "error",
        "files without rows",
        "check the path; a run would stop",
    ),
    "too-few-rows": Rule(
        "error",
        "fewer rows than one global batch",
        "lower global_batch_size, or add data",
    ),
    "few-rows": Rule(
        "warning",
        "fewer rows than the global batch of most recipes",
        "set data.global_batch_size in the run (in lint-preferences, global_batch_size), or add data",
    ),
    "mixed-splits": Rule(
        "error",
        "single responses in one split, pairs in the other",
        "use the same form in both splits",
    ),
    "same-tokens": Rule(
        "warning",
        "pairs whose responses have the same tokens, which a run drops",
        "drop the rows",
    ),
    "nothing-visible": Rule(
        "warning",
        "responses without visible characters",
        "drop the rows; they train the model to end immediately",
    ),
    "duplicate": Rule(
        "warning",
        "exact duplicates of earlier rows",
        "drop the rows; otherwise they count twice",
    ),
    "near-duplicate": Rule(
        "warning",
        "duplicates of earlier rows except for case, spaces and Unicode forms",
        "drop the rows",
    ),
    "near-identical": Rule(
        "warning",
        "nearly identical responses",
        "check that the difference is intended",
    ),
    "tied-rewards": Rule(
        "warning",
        "pairs of equal rewards",
        "drop the rows; under RPO they train equal preference",
    ),
    "inverted-rewards": Rule(
        "warning",
        "rejected responses with a higher reward than the chosen response",
        "swap the responses or check the rewards",
    ),
    "length-bias": Rule(
        "warning",
        "the longer response is nearly always preferred",
        "balance the lengths, or use a length-normalized loss (simpo; dpo with average_log_probs=True)",
    ),
    "split-leakage": Rule(
        "warning",
        "validation prompts that also occur in training",
        "drop them from one split; they inflate validation accuracy",
    ),
    "merged-at-border": Rule(
        "warning",
        "responses whose first characters would merge into the prompt's last token",
        "begin the response at a token boundary, as with a space or a newline; the prompt's tokens have priority",
    ),
    "doubled-bos": Rule(
        "warning",
        "prompts with two BOS tokens",
        "remove the BOS from the text; the tokenizer adds one",
    ),
    "doubled-eos": Rule(
        "warning",
        "responses with two end tokens",
        "remove the end token from the text; one is added if none is present",
    ),
    "role-marker": Rule(
        "warning",
        "responses that contain chat-template tokens or speaker names",
        "truncate them there; otherwise the model learns to generate the other speaker's turns",
    ),
    "special-token": Rule(
        "warning",
        "responses that contain special tokens of this tokenizer",
        "remove them from the text; they end turns",
    ),
}


@dataclass
class Finding:
    """Rows that match one rule."""

    name: str
    count: int
    share: float
    where: list[str]
    """`file:line`, at most ten."""
    detail: str = ""

    @property
    def severity(self) -> str:
        return RULES[self.name].severity

    @property
    def title(self) -> str:
        return RULES[self.name].title

    @property
    def remedy(self) -> str:
        return RULES[self.name].remedy

    def as_dict(self) -> dict[str, Any]:
        return {"severity": self.severity, "title": self.title, "remedy": self.remedy, **asdict(self)}


@dataclass
class LintReport:
    """Findings and statistics of a split."""

    split: str
    files: list[str]
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    histograms: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Name -> counts and bin edges."""

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        histograms = {n: {"counts": c, "edges": e} for n, (c, e) in self.histograms.items()}
        findings = [finding.as_dict() for finding in self.findings]
        return {
            "split": self.split,
            "files": self.files,
            "findings": findings,
            **self.numbers,
            "histograms": histograms,
        }
