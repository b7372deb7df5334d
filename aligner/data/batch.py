"""Batch layout: padded rows, or one packed row with `cu_seqlens`.

Dimensions: P examples of a micro-batch, K responses of each (2: chosen and rejected; or 1), S = K·P sequences (all
first responses, then all second ones), R rows of T tokens.

    padded    R = S: a row contains one sequence, padded on the right to the longest sequence
    packed    R = 1: the row contains all sequences end to end; `cu_seqlens` contains their offsets

In both layouts, padding follows its sequence on the right, so causal attention never reads it. No other module depends
on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from aligner.data.examples import Example

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Item:
    """An example and its place in a dataset."""

    index: int
    """Row of the dataset; index of its reference log-probabilities and computed scores."""
    example: Example
    valid: bool = True
    """False for copies that equalize the micro-batch counts of ranks; a copy has zero weight."""
    mismatched: Item | None = None
    """Prompt with another prompt's response, if the objective requires it (KTO)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch in Megatron's format."""

    tokens_RT: Tensor
    labels_RT: Tensor
    """Label t of a sequence is its token t + 1."""
    positions_RT: Tensor
    start_S: Tensor
    """Flat index, over all rows, of the first label of each response."""
    length_S: Tensor
    """Number of response tokens."""
    unscored_U: Tensor
    """Flat index, over all rows, of each label inside a response that is context: results of tools."""
    scored_S: Tensor
    """Number of scored response tokens: `length_S` less those."""
    total_S: Tensor
    """Number of prompt and response tokens."""
    index_P: Tensor
    valid_P: Tensor
    desirable_P: Tensor
    reward_P2: Tensor
    """Chosen and rejected rewards from the data."""
    cu_seqlens: Tensor | None = None
    """Packed: start offsets of the sequences and end of the last one; int32, [S + 1]."""
    max_seqlen: int = 0
    """Tokens of the longest sequence, padding included."""
    mismatched: Batch | None = None

    def columns(self, x_S: Tensor) -> Tensor:
        """Reshape one value per sequence, `[S]`, to one row per example, `[P, K]`."""
        return x_S.reshape(-1, len(self.index_P)).T

    def sequence_lengths(self) -> list[int]:
        """Return positions of each sequence in a row, padding included; a padded row is one sequence."""
        return [self.tokens_RT.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.diff().tolist()

    def loss_mask_RT(self) -> Tensor:
        """Return a mask of the labels that are scored."""
        steps = torch.zeros(self.labels_RT.numel() + 1, dtype=torch.int32, device=self.labels_RT.device)
        steps = steps.index_add(0, self.start_S, steps.new_ones(len(self.start_S)))
        steps = steps.index_add(0, self.start_S + self.length_S, steps.new_full(self.start_S.shape, -1))
        mask = steps.cumsum(0)[:-1].bool()
        return mask.index_fill(0, self.unscored_U, False).reshape(self.labels_RT.shape)

    def cuda(self, non_blocking: bool = True) -> Batch:
        """Return the batch on this process's device."""
        return self._map_tensors(lambda x: x.cuda(non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; torch's DataLoader calls this for asynchronous copies to the device."""
        return self._map_tensors(lambda x: x.pin_memory())

    def _map_tensors(self, change: Callable[[Any], Any]) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: change(v) if isinstance(v, Tensor | Batch) else v for name, v in values.items()})


def sequence_tokens(prompt: Any, response: Any, multiple: int = 1) -> Any:
    """Return the positions of a sequence in a batch from its prompt and response lengths (numbers or arrays).

    The last token of a sequence is only a label. The result is rounded up to a multiple of `multiple`.
    """
    positions = prompt + response - 1
    return positions if multiple == 1 else -(-positions // multiple) * multiple


def collate(
    items: Sequence[Item],
    *,
    pad_id: int,
    packed: bool = False,
    multiple: int = 1,
    row_multiple: int = 1,
    at_least: int = 0,
) -> Batch:
    """Build a micro-batch from examples.

    Args:
        items: the examples.
        pad_id: padding token.
        packed: one row with all sequences instead of one padded row per sequence.
        multiple: multiple of each sequence's positions (context parallelism splits every sequence).
        row_multiple: multiple of each row's positions (sequence parallelism splits rows).
        at_least: minimum positions of a row, for micro-batches of equal shape; divisible by both multiples.
    """
    responses = range(len(items[0].example.responses))
    sequences = [(item.example.prompt, item.example.responses[k]) for k in responses for item in items]
    prompts, lengths = (torch.tensor([len(sequence[part]) for sequence in sequences]) for part in (0, 1))
    widths = sequence_tokens(prompts, lengths, multiple)
    if packed:
        total = int(widths.sum())
        widths[-1] += max(-(-total // row_multiple) * row_multiple, at_least) - total
        ends = widths.cumsum(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])
        begins, shape = cu_seqlens[:-1], (1, int(ends[-1]))
    else:
        width = max(-(-int(widths.max()) // row_multiple) * row_multiple, at_least)
        cu_seqlens, begins, shape = None, torch.arange(len(sequences)) * width, (len(sequences), width)
        widths = torch.full_like(widths, width)
    tokens, labels = (torch.full((shape[0] * shape[1],), pad_id) for _ in range(2))
    for begin, (prompt, response) in zip(begins.tolist(), sequences, strict=True):
        ids = torch.tensor(prompt + response)
        tokens[begin : begin + len(ids) - 1] = ids[:-1]
        labels[begin : begin + len(ids) - 1] = ids[1:]
    position_ids = torch.arange(len(tokens)) - begins.repeat_interleave(widths)
    # Padding is never read. Without this reset, padding positions could exceed a table of learned positions.
    position_ids *= position_ids < (prompts + lengths - 1).repeat_interleave(widths)
    others = [item.mismatched for item in items if item.mismatched is not None]
    starts = begins + prompts - 1
    unscored = [item.example.unscored[k] if item.example.unscored else [] for k in responses for item in items]
    flat = [start + i for start, positions in zip(starts.tolist(), unscored, strict=True) for i in positions]
    return Batch(
        tokens_RT=tokens.reshape(shape),
        labels_RT=labels.reshape(shape),
        positions_RT=position_ids.reshape(shape),
        # The logits at len(prompt) - 1, the last prompt token, predict the first response token.
        start_S=starts,
        length_S=lengths,
        unscored_U=torch.tensor(flat, dtype=torch.int64),
        scored_S=lengths - torch.tensor([len(positions) for positions in unscored]),
        total_S=prompts + lengths,
        index_P=torch.tensor([item.index for item in items]),
        valid_P=torch.tensor([float(item.valid) for item in items]),
        desirable_P=torch.tensor([float(item.example.desirable) for item in items]),
        reward_P2=torch.tensor([item.example.rewards for item in items]),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
        max_seqlen=int(widths.max()),
        mismatched=collate(
            others,
            pad_id=pad_id,
            packed=packed,
            multiple=multiple,
            row_multiple=row_multiple,
            at_least=at_least,
        )
        if others
        else None,
    )
