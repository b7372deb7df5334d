"""Tokenized dataset of a split: concatenated files, then KTO's mismatched examples.

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
    """Examples of several files with consecutive row numbers.

    With `mismatched_within`, row N + i is example i's prompt with another prompt's response (`other_prompts`); KTO
    estimates its KL on these rows. It is truncated so that prompt and response have at most `mismatched_within` tokens.
    """

    def __init__(self, files: Sequence[TokenFile], *, mismatched_within: int | None = None) -> None:
        """Concatenate `files`.

        Raises:
            RowError: the pairs of one file have rewards and those of another file have none.
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
        """N: number of training or validation examples, without mismatched ones."""
        self._within = mismatched_within
        lengths = np.concatenate([file.lengths for file in files])
        self._others = np.zeros(0, np.int64)
        if mismatched_within is not None:
            self._others = other_prompts(np.concatenate([file.prompt_hashes for file in files]))
            cut = np.minimum(lengths[self._others, 1], mismatched_within - lengths[:, 0])
            lengths = np.concatenate([lengths, np.stack([lengths[:, 0], cut], axis=1)])
        self.lengths = lengths
        """Tokens of prompt and responses of each row, `[rows, 1 + K]`."""

    def __len__(self) -> int:
        return self.num_examples + len(self._others)

    def __getitem__(self, row: Any) -> Example:
        if row >= self.num_examples:
            example, other = self[row - self.num_examples], self[self._others[row - self.num_examples]]
            length = int(self.lengths[row, 1])
            unscored = tuple([i for i in positions if i < length] for positions in other.unscored)
            return replace(example, responses=(other.responses[0][:length],), unscored=unscored)
        file_index = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[file_index][row - self.starts[file_index]]

    def positions(self, multiple: int = 1) -> np.ndarray:
        """Return positions in a batch of each sequence of each row, `[rows, K]`."""
        return sequence_tokens(self.lengths[:, :1], self.lengths[:, 1:], multiple)

    def packed_tokens(self, multiple: int = 1) -> np.ndarray:
        """Return packed positions of each row, int32 `[rows]`: the maximum over an example and its mismatched one."""
        tokens = self.positions(multiple).sum(axis=1, dtype=np.int32)
        if len(self._others):
            tokens[: self.num_examples] = np.maximum(tokens[: self.num_examples], tokens[self.num_examples :])
        return tokens

    def check_room(self, capacity: int, field: str, *, multiple: int = 1) -> None:
        """Check that every row fits into a pack of `capacity` positions; `field` is the argument that sets it.

        Raises:
            ConfigError: a row is longer than a pack; the message contains the longest row.
        """
        tokens = self.packed_tokens(multiple)
        if len(tokens) and tokens.max() > capacity:
            raise ConfigError(
                f"{field}: {capacity} tokens, but {self[int(tokens.argmax())].source} alone takes {tokens.max()} "
                "(prompt and response, of each response); raise it, or lower seq_length"
            )

    def check_vocabulary(self, hf: Any, rows: int) -> None:
        """Check that every token has a row in an embedding of `rows` rows.

        Raises:
            RowError: a token has none; the message has the first row with it.
        """
        for outside in (file.first_outside(rows) for file in self.files):
            if outside:
                source, token = outside
                raise RowError(
                    f"{source}: holds the token {hf.convert_ids_to_tokens(token)!r} of id {token}, but the model's "
                    f"embedding has {rows} rows, and its tokenizer {len(hf)} tokens; resize the embeddings first "
                    "(transformers: model.resize_token_embeddings), or use the tokenizer that the model came with"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and rewards, in order."""
        parts = [file.meta["fingerprint"] for file in self.files]
        parts.append(str(self._within))
        if self._within is not None:  # which mismatched responses, truncated to this length
            parts.append(hashlib.sha256(self._others.tobytes()).hexdigest())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def mismatched(self, row: int) -> int | None:
        """Return the row of an example's mismatched example, or None."""
        return row + self.num_examples if len(self._others) and row < self.num_examples else None


def other_prompts(prompts: np.ndarray) -> np.ndarray:
    """Return for each index one with a different value: the same place in the next run of equal values, cyclically.

    Places are counted from the start of a run and wrap in a shorter one. Pairs, which are a chosen and a rejected
    response of each prompt, so take both sides equally often. If all values are equal, the next index.
    """
    count = len(prompts)
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))
    if not len(starts):
        return (np.arange(count) + 1) % count
    lengths = np.diff(starts, append=starts[0] + count)
    own = np.searchsorted(starts, np.arange(count), side="right") - 1  # before the first start: the last run, -1
    place = (np.arange(count) - starts[own]) % count
    following = (own + 1) % len(starts)
    return (starts[following] + place % lengths[following]) % count
