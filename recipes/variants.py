"""Settings of the self-rewarding methods, as their papers and as NVIDIA's implementation have them.

docs/self_rewarding.md compares the three and says which argument changes each line.
"""

from __future__ import annotations

from typing import NamedTuple

from aligner.common.errors import ConfigError


class Variant(NamedTuple):
    """Settings of all iterations."""

    iterations: int
    num_generations: int
    """Responses to each prompt."""
    num_judgments: int
    """Judgments of each response."""
    temperature: float
    """Of responses, judgments and comparisons, as `top_p`."""
    top_p: float
    new_prompts: bool
    """Each iteration answers a share of the prompts that no other iteration answers; else all answer all of them."""
    length_control: tuple[float, ...] = (0.0,)
    """By iteration; the last one holds for further iterations."""
    judge_pair_iterations: int | None = None
    """Number of the first iterations that also train judging; None: all."""
    max_judge_pair_fraction: float | None = 0.15
    """Part of judge pairs among all rows; None: no limit."""
    max_same_score_fraction: float = 0.4
    """Part of the judge pairs whose better judgment gives the same score."""

    def controls(self, iterations: int) -> list[float]:
        """Return ρ for each of a number of iterations."""
        last = len(self.length_control) - 1
        return [self.length_control[min(i, last)] for i in range(iterations)]


PAPER, NEMO_ALIGNER = "paper", "nemo_aligner"
VARIANTS = {
    "self_rewarding": {
        # Yuan et al. 2024, arXiv 2401.10020, section 3.1.2.
        PAPER: Variant(3, 4, 3, 0.7, 0.9, new_prompts=True),
        # gpt_self_rewarding.yaml of pull request 321; ρ from its guide.
        NEMO_ALIGNER: Variant(3, 4, 3, 1.0, 1.0, new_prompts=False, length_control=(0.0, 0.0, 0.1)),
    },
    "meta_rewarding": {
        # Wu et al. 2024, arXiv 2407.19594, sections 2 and 3.1. The paper controls lengths; its ρ were not at hand.
        PAPER: Variant(
            4, 7, 11, 0.8, 0.95, new_prompts=True, length_control=(0.0, 0.0, 0.1), judge_pair_iterations=2,
            max_judge_pair_fraction=None, max_same_score_fraction=1.0,
        ),
        NEMO_ALIGNER: Variant(3, 4, 3, 1.0, 1.0, new_prompts=False, length_control=(0.0, 0.0, 0.1)),
    },
}  # fmt: skip


def variant_of(method: str, name: str) -> Variant:
    """Return the settings of a method, `self_rewarding` or `meta_rewarding`.

    Raises:
        ConfigError: the variant is unknown.
    """
    if name not in VARIANTS[method]:
        raise ConfigError(f"variant: there is no {name!r}; there are: {', '.join(VARIANTS[method])}")
    return VARIANTS[method][name]
