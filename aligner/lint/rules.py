"""What a lint can find, and how it is put down.

A finding is an error if a run would stop at it or learn the opposite of what it should, otherwise a warning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What is known of a kind of finding beforehand."""

    severity: str
    title: str
    remedy: str


RULES: dict[str, Rule] = {
    "unreadable": Rule(
        "error",
        "rows that cannot be read",
        "mend or drop them; a run would stop at the first",
    ),
    "empty": Rule(
        "error",
        "empty or blank prompts or answers",
        "drop the rows or fill them in; a run would stop at the first",
    ),
    "same-answers": Rule(
        "error",
        "answers that are identical",
        "drop the rows: there is nothing to prefer",
    ),
    "rewards": Rule(
        "error",
        "rewards that are not both numbers",
        "give both chosen_reward and rejected_reward, or neither",
    ),
    "missing-rewards": Rule(
        "error",
        "rows without rewards, where others have them",
        "give them in every row or in none",
    ),
    "missing-preference": Rule(
        "error",
        "answers without a preference, where others have one",
        "give it in every row",
    ),
    "mixed-forms": Rule(
        "error",
        "single responses among pairs",
        "put them into a file of their own",
    ),
    "contradiction": Rule(
        "error",
        "the same two answers to a prompt, preferred both ways",
        "decide for one and drop the other",
    ),
    "too-many-overlong": Rule(
        "error",
        "rows longer than seq_length, more than a run accepts by default (10%)",
        "raise seq_length, clean, or set data.overlong or data.max_dropped_fraction",
    ),
    "overlong": Rule(
        "warning",
        "rows longer than seq_length, which a run drops by default",
        "raise seq_length, or let them go",
    ),
    "no-rows": Rule(
        "error",
        "files without a row",
        "see whether it is the right file; a run would stop",
    ),
    "too-few-rows": Rule(
        "error",
        "fewer rows than a global batch holds",
        "lower global_batch_size, or add data",
    ),
    "mixed-splits": Rule(
        "error",
        "single responses in one split, pairs in the other",
        "give both splits the same form",
    ),
    "same-tokens": Rule(
        "warning",
        "pairs whose answers become the same tokens, which a run drops",
        "drop the rows",
    ),
    "nothing-visible": Rule(
        "warning",
        "answers in which nothing can be seen",
        "drop the rows; they teach to end at once",
    ),
    "duplicate": Rule(
        "warning",
        "rows that came before, word by word",
        "drop them, or they count twice",
    ),
    "near-duplicate": Rule(
        "warning",
        "rows that came before but for case, spaces and Unicode forms",
        "drop them",
    ),
    "near-identical": Rule(
        "warning",
        "answers that hardly differ",
        "look whether the difference is the one that is meant",
    ),
    "tied-rewards": Rule(
        "warning",
        "rewards that are equal",
        "drop the rows; under RPO they teach that both are as good",
    ),
    "inverted-rewards": Rule(
        "warning",
        "a rejected answer with the higher reward",
        "swap the answers or look at the rewards",
    ),
    "length-bias": Rule(
        "warning",
        "the longer answer is nearly always preferred",
        "balance them, or take a loss that counts by tokens (simpo; dpo with average_log_probs=True)",
    ),
    "split-leakage": Rule(
        "warning",
        "validation prompts that occur in training",
        "drop them from one side; accuracy is flattered",
    ),
    "merged-at-border": Rule(
        "warning",
        "answers whose first characters belong to the prompt's last token",
        "begin the answer where a token begins, as with a space or a new line; the prompt's tokens win",
    ),
    "doubled-bos": Rule(
        "warning",
        "prompts with two beginnings of sequence",
        "take the BOS out of the text; the tokenizer sets one",
    ),
    "doubled-eos": Rule(
        "warning",
        "answers with two ends",
        "take the end out of the text; one is set where none stands",
    ),
    "role-marker": Rule(
        "warning",
        "answers that hold a template's or a speaker's mark",
        "cut them off there, or the model learns to speak for the other side",
    ),
    "special-token": Rule(
        "warning",
        "answers with special tokens of this tokenizer inside",
        "take them out of the text; they end turns",
    ),
}


@dataclass
class Finding:
    """Something that was found in some rows."""

    name: str
    count: int
    share: float
    where: list[str]
    """`file:line`, ten at most."""
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
    """Everything that a lint has to say of a split."""

    split: str
    files: list[str]
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    histograms: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Name -> counts and their edges."""

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
