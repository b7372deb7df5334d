"""A plain transformers Llama with the weights of a Megatron one, and log-probabilities taken from it one by one."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aligner import losses
from aligner.common.errors import CheckpointError
from aligner.demo import toy
from aligner.train import run_lock

HEADS, GROUPS, HIDDEN, FFN, VOCAB = 4, 2, 64, 96, 96


class Capture(pl.Callback):
    """Weights and whole-batch gradients of the first optimizer step, by Megatron's parameter names."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        Capture.weights = {name: p.detach().clone() for name, p in _parameters(pl_module)}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            Capture.gradients = {name: p.main_grad.detach().clone() for name, p in _parameters(pl_module)}


def _parameters(module: Any) -> list[tuple[str, Any]]:
    return [(name.split("module.")[-1], p) for name, p in module.named_parameters()]


def to_hugging_face(megatron: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's tensors (weights or gradients) under Hugging Face's names, written out independently of NeMo."""
    size = HIDDEN // HEADS
    found = {
        "model.embed_tokens.weight": megatron["embedding.word_embeddings.weight"],
        "model.norm.weight": megatron["decoder.final_layernorm.weight"],
        "lm_head.weight": megatron["output_layer.weight"],
    }
    for i in range(2):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        # One block a query group: its queries, then its key, then its value.
        blocks = megatron[ours + "self_attention.linear_qkv.weight"].view(GROUPS, HEADS // GROUPS + 2, size, HIDDEN)
        found[theirs + "self_attn.q_proj.weight"] = blocks[:, :-2].reshape(-1, HIDDEN)
        found[theirs + "self_attn.k_proj.weight"] = blocks[:, -2].reshape(-1, HIDDEN)
        found[theirs + "self_attn.v_proj.weight"] = blocks[:, -1].reshape(-1, HIDDEN)
        found[theirs + "self_attn.o_proj.weight"] = megatron[ours + "self_attention.linear_proj.weight"]
        gate, up = megatron[ours + "mlp.linear_fc1.weight"].chunk(2)
        found[theirs + "mlp.gate_proj.weight"], found[theirs + "mlp.up_proj.weight"] = gate, up
        found[theirs + "mlp.down_proj.weight"] = megatron[ours + "mlp.linear_fc2.weight"]
        found[theirs + "input_layernorm.weight"] = megatron[ours + "input_layernorm.weight"]
        found[theirs + "post_attention_layernorm.weight"] = megatron[ours + "pre_mlp_layernorm.weight"]
    return found


def llama(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, rms_norm_eps=1e-5, rope_theta=10000.0, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict({k: v.clone() for k, v in weights.items()})
    assert not missing and not unexpected
    return model


def logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence at a time, without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0].float()
    at = torch.arange(len(response)) + len(prompt) - 1
    return logits.log_softmax(-1)[at, torch.tensor(response)].sum()


class SaveRows(pl.Callback):
    """The rows of every training step on this rank, a line a step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_megatron_step_start(self, step: Any) -> Any:
        if step.forward_only:
            return step
        batches = list(step.data)
        rows = [int(i) for b in batches for i, valid in zip(b.index_P, b.valid_P, strict=True) if valid]
        with open(f"{self.path}.{step.trainer.global_rank}", "a") as file:
            file.write(json.dumps([step.trainer.global_step, rows]) + "\n")
        return dataclasses.replace(step, data=iter(batches))


def rows_of(path: Path) -> dict[int, Counter[int]]:
    """How often each row was trained in each step, over all ranks, of `SaveRows(path)`."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for file in path.parent.glob(f"{path.name}.[0-9]"):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            found[step].update(rows)
    return found


class SaveGradients(pl.Callback):
    """The gradient of the first global batch, each rank's part of it with its place in the whole, in `PATH.RANK`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            return
        model: Any = trainer.strategy.megatron_parallel  # type: ignore[attr-defined]
        gradients = {p.data_ptr(): p.main_grad for chunk in model for p in chunk.parameters()}
        state = model.sharded_state_dict()
        for piece in nested_values(state):
            if isinstance(getattr(piece, "data", None), Tensor) and piece.data.data_ptr() in gradients:
                piece.data = gradients[piece.data.data_ptr()]
        apply_factories(state)
        held = [
            (piece.key, piece.global_shape, piece.global_offset, piece.data.detach().clone())  # type: ignore[union-attr]
            for piece in nested_values(state)
            if isinstance(piece, ShardedTensor) and is_main_replica(piece.replica_id)
        ]
        torch.save(held, f"{self.path}.{trainer.global_rank}")


def gradients_of(path: Path) -> dict[str, Tensor]:
    """The parts of all ranks put together."""
    found: dict[str, Tensor] = {}
    for file in path.parent.glob(f"{path.name}.[0-9]"):
        for key, shape, offset, data in torch.load(file, weights_only=False):
            whole = found.setdefault(key, torch.full(shape, torch.nan))
            extra = len(shape) - data.dim()
            whole[(*offset[:extra], *(slice(o, o + n) for o, n in zip(offset[extra:], data.shape, strict=True)))] = data
    assert len(found) > 5 and not any(bool(g.isnan().any()) for g in found.values())
    return found


def differ(a: Path, b: Path) -> float:
    """Largest distance of a parameter's gradients, relative to their size, of two `SaveGradients`."""
    one, two = gradients_of(a), gradients_of(b)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one)


def save_llama(path: Path, **options: Any) -> None:
    """A small random Hugging Face Llama with grouped queries and the demo's tokenizer, in a folder."""
    AutoTokenizer.from_pretrained(toy.TOKENIZER).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=85, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **options,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


class Disturb(pl.Callback):
    """Does something to this process when so many steps have been made: sends it a signal, makes it wait or stop.

    After -1 steps, the reference is yet to be scored.
    """

    def __init__(
        self, at: int, rank: int = 0, signals: tuple[int, ...] = (), sleep: float = 0.0, stop: float = 0.0
    ) -> None:
        self.at, self.rank, self.signals, self.sleep, self.stop = at, rank, signals, sleep, stop

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.at < 0 and trainer.global_rank == self.rank:
            signals, self.signals = self.signals, ()
            for number in signals:
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step >= self.at and self.signals:
            signals, self.signals = self.signals, ()
            for number in signals:
                os.kill(os.getpid(), number)
        if trainer.global_rank != self.rank or trainer.global_step != self.at:
            return
        if self.sleep:
            time.sleep(self.sleep)
        if self.stop:
            subprocess.Popen(["/bin/sh", "-c", f"sleep {self.stop}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)


class Leave(pl.Callback):
    """Ends the process with code 0, as if all were done."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os._exit(0)


class Intrude(pl.Callback):
    """Tries to take the folder of the run that is under way."""

    refused: ClassVar[list[str]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        try:
            with run_lock.lock_run(Path(trainer.loggers[0].log_dir or "").parent):
                pass
        except CheckpointError as error:
            Intrude.refused += re.findall("another job is at work", str(error))


class Slow(pl.Callback):
    """Makes every step, and every batch of a validation, take longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)

    def on_validation_batch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


def no_number(pairs: losses.PairLogprobs, *, length: float) -> Tensor:
    """DPO that is not a number for chosen responses of one length."""
    return torch.where(pairs.chosen_length == length, torch.nan, losses.dpo(pairs))


def no_gradient(pairs: losses.PairLogprobs, *, after: float) -> Tensor:
    """DPO whose gradient is not a number as soon as the policy has moved so far."""
    moved = (pairs.policy_chosen - pairs.reference_chosen).detach().abs()
    # The slope of a root at 0 is infinite, and times 0 it is no number.
    return losses.dpo(pairs) + (pairs.policy_chosen * 0 + (moved <= after)).sqrt()


class Forgets(pl.Callback):
    """Changes the learning rate by how many steps this process has made, which no checkpoint knows."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps += 1
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 1 + 0.1 * self.steps
