"""Every objective trained for some steps equals a hand-written loop; a configured loss that is ignored would not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch
import torch.nn.functional as F
from hand import Capture, llama, logp, to_hugging_face
from torch import Tensor

from aligner import losses
from aligner.common.run_folder import read_metrics
from aligner.data.sampler import permutation
from aligner.losses import unpaired

Tiny = Callable[..., Any]
STEPS, BATCH, LR = 4, 4, 3e-3
# Below it a gradient is rounding, which Adam would make a whole step of, in whichever direction it fell.
EPS = 1e-4


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def log_odds(x: Tensor) -> Tensor:
    return x - torch.log(1 - torch.exp(x))


# Of a pair's log-ratios w and x (chosen, rejected), reward gap g, log-probabilities a token pw and px.
HAND: dict[str, Callable[..., Tensor]] = {
    "dpo": lambda w, x, g, pw, px: softplus(-0.1 * (w - x)),
    "robust_dpo": lambda w, x, g, pw, px: (0.9 * softplus(-0.1 * (w - x)) - 0.1 * softplus(0.1 * (w - x))) / 0.8,
    "hinge": lambda w, x, g, pw, px: (1 - 0.1 * (w - x)).clamp(min=0),
    "exo_pair": lambda w, x, g, pw, px: kl(sig(0.1 * (w - x)), torch.tensor(0.999)),
    "rpo_sq": lambda w, x, g, pw, px: (0.1 * (w - x) - g) ** 2,
    "rpo_bwd_kl": lambda w, x, g, pw, px: kl(sig(torch.tensor(g)), sig(0.1 * (w - x))),
    "rpo_fwd_kl": lambda w, x, g, pw, px: kl(sig(0.1 * (w - x)), sig(torch.tensor(g))),
    "apo_zero": lambda w, x, g, pw, px: 1 - sig(0.1 * w) + sig(0.1 * x),
    "apo_down": lambda w, x, g, pw, px: sig(0.1 * w) + 1 - sig(0.1 * (w - x)),
    "nca_pair": lambda w, x, g, pw, px: softplus(-0.1 * w) + 0.5 * softplus(0.1 * w) + 0.5 * softplus(0.1 * x),
    "sppo_hard": lambda w, x, g, pw, px: (w - 5) ** 2 + (x + 5) ** 2,
    "simpo": lambda w, x, g, pw, px: softplus(-(2 * (pw - px) - 0.5)),
    "orpo": lambda w, x, g, pw, px: -pw + 0.1 * softplus(-(log_odds(pw) - log_odds(px))),
}


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Callable[[str], Any]:
    """A recipe of 4 steps of 4 pairs under Adam alone: no decay, no clipping, one learning rate."""
    draw, rows = random.Random(3), []
    for _ in range(16):
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        wrong = draw.choice(["?", "no idea", "it is " + "so " * draw.randint(1, 5) + str(a * b)])
        pair = {"prompt": f"{a}+{b}=", "chosen_response": str(a + b), "rejected_response": wrong}
        rows.append(pair | {"chosen_reward": draw.choice([1.0, 2.5]), "rejected_reward": draw.choice([0.0, 0.5])})
    (tmp_path / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(name: str) -> Any:
        recipe = tiny(name, held_out=0)
        recipe.data.train = str(tmp_path / "rated.jsonl")
        recipe.data.global_batch_size, recipe.data.micro_batch_size = BATCH, 2
        recipe.trainer.max_steps = STEPS
        recipe.log.ckpt.every_n_train_steps = 100
        recipe.trainer.callbacks = [run.Config(Capture)]
        recipe.model.config.init_method_std = 0.15
        recipe.optim.config.lr = recipe.optim.lr_scheduler.min_lr = LR
        recipe.optim.config.adam_eps = EPS
        recipe.optim.lr_scheduler.warmup_steps = 0
        recipe.optim.config.weight_decay = recipe.optim.config.clip_grad = 0.0
        return recipe

    return make


def trained(recipe: Any) -> tuple[list[dict[str, float]], Any]:
    built: Any = fdl.build(recipe)
    rows = read_metrics(built() / "metrics.csv")
    assert [row["train/lr"] for row in rows] == [pytest.approx(LR)] * STEPS
    return rows, built.keywords["data"]


def by_hand(data: Any, batch_loss: Callable[[Any, list[int]], Tensor]) -> list[float]:
    """The same steps with torch's own Adam on a transformers Llama."""
    model = llama(to_hugging_face(Capture.weights))
    adam = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.98), eps=EPS)
    order = permutation(data.seed, 0, data.datasets["train"].num_examples)
    found = []
    for step in range(STEPS):
        loss = batch_loss(model, [int(row) for row in order[step * BATCH : (step + 1) * BATCH]])
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item())
    return found


def scores(model: Any, examples: Any, row: int) -> list[Tensor]:
    return [logp(model, examples[row].prompt, response) for response in examples[row].responses]


def reference(examples: Any) -> list[list[Tensor]]:
    model = llama(to_hugging_face(Capture.weights))
    with torch.no_grad():
        return [scores(model, examples, row) for row in range(len(examples))]


def pair_loss(
    data: Any, formula: Callable[..., Tensor], *, average: bool = False
) -> Callable[[Any, list[int]], Tensor]:
    examples = data.datasets["train"]
    held = reference(examples)

    def batch_loss(model: Any, rows: list[int]) -> Tensor:
        total = torch.zeros(())
        for row in rows:
            n_w, n_x = map(len, examples[row].responses)
            (p_w, p_x), (r_w, r_x) = scores(model, examples, row), held[row]
            w, x = (p_w - r_w, p_x - r_x) if not average else ((p_w - r_w) / n_w, (p_x - r_x) / n_x)
            total = total + formula(w, x, examples[row].rewards[0] - examples[row].rewards[1], p_w / n_w, p_x / n_x)
        return total / len(rows)

    return batch_loss


def curve(rows: list[dict[str, float]]) -> list[float]:
    return [row["train/loss"] for row in rows]


@pytest.mark.slow
def test_every_pair_loss_makes_its_own_trajectory(base: Callable[[str], Any]) -> None:
    curves = {}
    for name, formula in HAND.items():
        recipe = base(name)
        recipe.loss = run.Partial(getattr(losses, name))
        rows, data = trained(recipe)
        curves[name] = curve(rows)
        assert curves[name] == pytest.approx(by_hand(data, pair_loss(data, formula)), rel=2e-4), name
    # After the first step no two are alike, up to what separates them at the start.
    moved = {name: tuple(round(v, 5) for v in values[1:]) for name, values in curves.items()}
    assert len(set(moved.values())) == len(HAND)


@pytest.mark.parametrize("average", [True, False])
def test_ipo_averaged_and_summed(base: Callable[[str], Any], average: bool) -> None:
    recipe = base("ipo")
    recipe.loss = run.Partial(losses.ipo, average_log_probs=average)
    rows, data = trained(recipe)
    hand = pair_loss(data, lambda w, x, *_: (w - x - 5) ** 2, average=average)
    assert curve(rows) == pytest.approx(by_hand(data, hand), rel=2e-4)


def test_a_likelihood_beside_the_preference_and_a_mix_of_losses(base: Callable[[str], Any]) -> None:
    recipe = base("both")
    recipe.loss = run.Partial(
        losses.mix, losses=[run.Partial(losses.dpo, beta=0.2), run.Partial(losses.sppo_hard)], weights=[1.0, 0.01]
    )
    recipe.preference_loss_weight, recipe.sft_loss_weight = 0.5, 0.3
    rows, data = trained(recipe)

    def formula(w: Tensor, x: Tensor, g: float, pw: Tensor, px: Tensor) -> Tensor:
        return 0.5 * (softplus(-0.2 * (w - x)) + 0.01 * HAND["sppo_hard"](w, x, g, pw, px)) - 0.3 * pw

    mixed = pair_loss(data, formula)
    assert curve(rows) == pytest.approx(by_hand(data, mixed), rel=2e-4)
    for row in rows:
        parts = 0.5 * row["train/preference_loss"] + 0.3 * row["train/sft_loss"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-6)
    # The rewards of the rows, by step: of one epoch, their mean.
    for i, side in enumerate(("chosen", "rejected")):
        given = [example.rewards[i] for example in data.datasets["train"]]
        assert sum(row[f"train/{side}_generated_rewards"] for row in rows) / STEPS == pytest.approx(sum(given) / 16)


def test_demonstrations(base: Callable[[str], Any]) -> None:
    recipe = base("sft")
    recipe.preference_loss_weight, recipe.sft_loss_weight = 0.0, 1.0
    rows, data = trained(recipe)
    examples = data.datasets["train"]
    assert all(len(e.responses) == 1 for e in examples)

    def batch_loss(model: Any, batch: list[int]) -> Tensor:
        return (
            -sum((scores(model, examples, r)[0] / len(examples[r].responses[0]) for r in batch), torch.zeros(()))
            / BATCH
        )

    assert curve(rows) == pytest.approx(by_hand(data, batch_loss), rel=2e-4)
    assert not any("acc" in name or "reward" in name or "preference" in name for row in rows for name in row)


@pytest.mark.parametrize(("data", "micro_batch_size"), [("pairs", 4), ("mostly wanted", 1), ("mostly wanted", 4)])
def test_kto_with_its_kl_over_the_global_batch(
    base: Callable[[str], Any], tmp_path: Path, data: str, micro_batch_size: int
) -> None:
    recipe = base("kto")
    if data != "pairs":
        rated = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
        rows = [(row["prompt"], row["chosen_response"], True) for row in rated for _ in range(2)]
        rows[3] = rows[3][0], "no", False
        keys = ("prompt", "response", "preference")
        (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows))
        recipe.data.train = str(tmp_path / "one.jsonl")
    recipe.loss = run.Partial(unpaired.kto, beta=0.5, undesirable_weight=0.7)
    recipe.data.micro_batch_size = micro_batch_size
    recipe.sft_loss_weight = 0.1
    logged, module = trained(recipe)
    examples, count = module.datasets["train"], module.datasets["train"].num_examples
    assert (count, len(examples)) == (32, 64)
    held = [found[0] for found in reference(examples)]
    start = llama(to_hugging_face(Capture.weights))
    kls = []

    def mismatched(model: Any, row: int) -> Tensor:
        # Two rows have each prompt: the row of the next two that is in the same place.
        other = examples[(row + 2) % count]
        assert other.prompt != examples[row].prompt and (data != "pairs" or other.desirable == (row % 2 == 0))
        return logp(model, examples[row].prompt, other.responses[0])

    def batch_loss(model: Any, batch: list[int]) -> Tensor:
        with torch.no_grad():
            others = [mismatched(model, r) - mismatched(start, r) for r in batch]
            z = max(0.0, float(torch.stack(others).mean()))
        kls.append(z)
        total = torch.zeros(())
        for r in batch:
            p = scores(model, examples, r)[0]
            ratio = p - held[r]
            if examples[r].desirable:
                total = total + 1 - sig(0.5 * (ratio - z)) - 0.1 * p / len(examples[r].responses[0])
            else:
                total = total + 0.7 * (1 - sig(0.5 * (z - ratio)))
        return total / BATCH

    assert curve(logged) == pytest.approx(by_hand(module, batch_loss), rel=2e-4)
    assert [row["train/kl"] for row in logged] == pytest.approx(kls, rel=1e-3, abs=1e-5)
    assert data == "pairs" or max(kls) > 0.01
    assert not any("acc" in name for row in logged for name in row)


def test_losses_without_a_reference_prepare_none(base: Callable[[str], Any], tmp_path: Path) -> None:
    for name in ("simpo", "orpo"):
        recipe = base(name)
        recipe.loss = run.Partial(getattr(losses, name))
        trained(recipe)
    assert not (tmp_path / "runs/reference").exists()


def test_softplus_is_torchs() -> None:
    """The helpers of this file, so that they may be trusted."""
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(softplus(-x), -F.logsigmoid(x))
