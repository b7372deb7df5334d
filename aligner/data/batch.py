"""How examples lie in a batch; nobody else knows.

Dimensions: P examples of a micro-batch, K responses of each (2: chosen and rejected; or 1), S = K·P sequences (all
first responses, then all second ones), R rows of T tokens.

    padded    R = S: a row holds one sequence, padded on the right to the longest of them
    packed    R = 1: the row holds all sequences one after the other, and `cu_seqlens` says where each begins

In both, padding stands to the right of the sequence that it belongs to, so that causal attention never looks at it.
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
    """One example on its way into a batch."""

    index: int
    """Row of its split; where its reference stands and where a score computed for it belongs."""
    example: Example
    valid: bool = True
    """False for the copies that fill up places so that every rank has as many; they weigh nothing."""
    mismatched: Item | None = None
    """Its prompt with another's response, if the objective asks for one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of examples as Megatron takes it."""

    tokens_RT: Tensor
    labels_RT: Tensor
    """Token t of labels is token t + 1 of the sequence."""
    positions_RT: Tensor
    start_S: Tensor
    """Where each response's first token is a label, counted through all rows."""
    length_S: Tensor
    """Response tokens."""
    total_S: Tensor
    """Prompt and response tokens."""
    index_P: Tensor
    valid_P: Tensor
    desirable_P: Tensor
    reward_P2: Tensor
    """The data's own rewards of chosen and rejected."""
    cu_seqlens: Tensor | None = None
    """Packed: where each sequence begins in the row, and where the last one ends; int32, [S + 1]."""
    max_seqlen: int = 0
    """Tokens of the longest sequence with its padding."""
    mismatched: Batch | None = None

    def columns(self, x_S: Tensor) -> Tensor:
        """Anything that has one entry a sequence, `[P, K]`: a row for each example."""
        return x_S.reshape(-1, len(self.index_P)).T

    def sequence_lengths(self) -> list[int]:
        """Positions of each sequence of a row, padding included; a padded row is one sequence."""
        return [self.tokens_RT.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.diff().tolist()

    def loss_mask_RT(self) -> Tensor:
        """Where a label belongs to a response."""
        steps = torch.zeros(self.labels_RT.numel() + 1, dtype=torch.int32, device=self.labels_RT.device)
        steps = steps.index_add(0, self.start_S, steps.new_ones(len(self.start_S)))
        steps = steps.index_add(0, self.start_S + self.length_S, steps.new_full(self.start_S.shape, -1))
        return steps.cumsum(0)[:-1].reshape(self.labels_RT.shape).bool()

    def cuda(self, non_blocking: bool = True) -> Batch:
        """The same batch on this process's device."""
        return self._each(lambda x: x.cuda(non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """What torch's DataLoader calls to make the copy to the device asynchronous."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: change(v) if isinstance(v, Tensor | Batch) else v for name, v in values.items()})


def sequence_tokens(prompt: Any, response: Any, multiple: int = 1) -> Any:
    """Positions that a prompt and response of so many tokens take in a batch; numbers or arrays.

    The last token of a sequence is only ever a label. Rounded up to a multiple of `multiple`.
    """
    taken = prompt + response - 1
    return taken if multiple == 1 else -(-taken // multiple) * multiple


def collate(
    items: Sequence[Item],
    *,
    pad_id: int,
    packed: bool = False,
    multiple: int = 1,
    row_multiple: int = 1,
    at_least: int = 0,
) -> Batch:
    """Lay examples out as one micro-batch.

    Args:
        items: the examples.
        pad_id: token that stands where nothing is.
        packed: one row for all, instead of a padded one for each sequence.
        multiple: each sequence takes a multiple of so many positions (context parallelism cuts every sequence).
        row_multiple: and so does each row (sequence parallelism cuts rows).
        at_least: positions of a row, for micro-batches that must have one shape; a multiple of both.
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
    places = torch.arange(len(tokens)) - begins.repeat_interleave(widths)
    # Nothing reads what is padded; counted on, it could run past a table of learned positions.
    places *= places < (prompts + lengths - 1).repeat_interleave(widths)
    others = [item.mismatched for item in items if item.mismatched is not None]
    return Batch(
        tokens_RT=tokens.reshape(shape),
        labels_RT=labels.reshape(shape),
        positions_RT=places.reshape(shape),
        # Position len(prompt) - 1 holds the last prompt token and predicts the first of the response.
        start_S=begins + prompts - 1,
        length_S=lengths,
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
