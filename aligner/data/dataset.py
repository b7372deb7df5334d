"""All the examples of a split as one sequence: several files end to end, and behind them what KTO compares with.

Dimensions: N examples, K responses of each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aligner.common.errors import ConfigError, RowError
from aligner.data.batch import sequence_tokens
from aligner.data.examples import Example, TokenizationStats
from aligner.data.token_cache import TokenFile


class TokenizedDataset(Sequence[Example]):
    """The examples of files that go together; row numbers run on from file to file.

    With `mismatched_within`, row N + i is example i's prompt with another prompt's response, cut to so many tokens:
    what KTO estimates its KL on. The other is the next in order whose prompt differs; the last ones take from the
    beginning. Where all prompts are the same, it is the next response.
    """

    def __init__(self, files: Sequence[TokenFile], *, mismatched_within: int | None = None) -> None:
        """Put `files` end to end.

        Raises:
            RowError: the pairs of one have rewards and those of another have none.
        """
        for file in files[1:] if files[0].settings.kind == "pairs" else ():
            if file.report.with_rewards != files[0].report.with_rewards:
                having, lacking = sorted((files[0], file), key=lambda f: not f.report.with_rewards)
                raise RowError(
                    f"{lacking.path}: its rows have no chosen_reward and rejected_reward, those of {having.path} have; "
                    "give them in every file or in none"
                )
        self.files = files
        self.starts = np.cumsum([0, *map(len, files)])
        self.report = TokenizationStats(files[0].report.kind)
        for file in files:
            self.report.merge(file.report)
        self.num_examples = int(self.starts[-1])
        """N: how many are trained on, or validated on."""
        self._within = mismatched_within
        own = np.concatenate([file.lengths for file in files])
        self._others = np.zeros(0, np.int64)
        if mismatched_within is not None:
            self._others = next_different(np.concatenate([file.prompt_hashes for file in files]))
            cut = np.minimum(own[self._others, 1], mismatched_within - own[:, 0])
            own = np.concatenate([own, np.stack([own[:, 0], cut], axis=1)])
        self.lengths = own
        """Tokens of prompt and responses of each row, `[rows, 1 + K]`."""

    def __len__(self) -> int:
        return self.num_examples + len(self._others)

    def __getitem__(self, row: Any) -> Example:
        if row >= self.num_examples:
            example, other = self[row - self.num_examples], self[self._others[row - self.num_examples]]
            return replace(example, responses=(other.responses[0][: int(self.lengths[row, 1])],))
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[number][row - self.starts[number]]

    def positions(self, multiple: int = 1) -> np.ndarray:
        """Positions that each sequence of each row takes in a batch, `[rows, K]`."""
        return sequence_tokens(self.lengths[:, :1], self.lengths[:, 1:], multiple)

    def packed_tokens(self, multiple: int = 1) -> np.ndarray:
        """Positions that each row needs in a pack, int32 `[rows]`; its mismatched one will lie there in its stead."""
        tokens = self.positions(multiple).sum(axis=1, dtype=np.int32)
        if len(self._others):
            tokens[: self.num_examples] = np.maximum(tokens[: self.num_examples], tokens[self.num_examples :])
        return tokens

    def check_room(self, capacity: int, field: str, *, multiple: int = 1) -> None:
        """See that a pack of `capacity` positions has room for every row; `field` is the argument that sets it.

        Raises:
            ConfigError: naming the longest.
        """
        tokens = self.packed_tokens(multiple)
        if len(tokens) and tokens.max() > capacity:
            raise ConfigError(
                f"{field}: {capacity} tokens, but {self[int(tokens.argmax())].source} alone takes {tokens.max()} "
                "(prompt and response, of each response); raise it, or lower seq_length"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and rewards, in order."""
        parts = [file.meta["fingerprint"] for file in self.files]
        # Mismatched responses are cut to it.
        parts.append(str(self._within))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def mismatched(self, row: int) -> int | None:
        """The row of an example's mismatched one, if there are any."""
        return row + self.num_examples if len(self._others) and row < self.num_examples else None


def next_different(prompts: np.ndarray) -> np.ndarray:
    """For each place the next one, going around, that holds something else; the next one if nothing else is there."""
    count = len(prompts)
    begins = np.flatnonzero(prompts != np.roll(prompts, 1))
    if not len(begins):
        return (np.arange(count) + 1) % count
    # The first run that begins behind a place; behind the last one, the first of all.
    return begins[np.searchsorted(begins, np.arange(count), side="right") % len(begins)]
