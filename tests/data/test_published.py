"""Rows in the shapes of published data sets: linted, converted, trained on and evaluated by the commands as typed."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from launching import nemo_each
from reading import read_rows
from tokenizing import CHATML, byte_level

from aligner.common.run_folder import read_metrics

COUNT = 24
FORMS = {
    "hh_rlhf": "dialogue",
    "ultrafeedback": "preference, explicit prompt",
    "helpsteer2": "attributes",
    "tulu3": "preference, explicit prompt",
}


def sums() -> list[tuple[str, str, str]]:
    draw = random.Random(0)
    pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(COUNT)]
    return [(f"What is {a} + {b}?", f"It is {a + b}.", f"No idea about {a}.") for a, b in pairs]


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]


def hh_rlhf(path: Path) -> str:
    """Dialogues as text; one of them with an empty answer."""
    rows = [
        {side: f"\n\nHuman: {q}\n\nAssistant: {a}" for side, a in (("chosen", c), ("rejected", r))}
        for q, c, r in sums()
    ]
    rows.append({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant:"})
    (path / "hh.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "hh.jsonl"


def ultrafeedback(path: Path) -> str:
    rows = [
        {
            "prompt": q, "prompt_id": str(i), "chosen": talk(q, c), "rejected": talk(q, r), "messages": talk(q, c),
            "score_chosen": 8.5, "score_rejected": 2.0,
        }
        for i, (q, c, r) in enumerate(sums())
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), path / "ultrafeedback.parquet")
    return "ultrafeedback.parquet"


def helpsteer2(path: Path) -> str:
    """Two responses a prompt, one after the other; a tie at the end."""
    rows: list[dict[str, Any]] = []
    for q, c, r in [*sums(), ("Tie?", "yes", "no")]:
        scores = (3, 3) if q == "Tie?" else (4, 1)
        for response, helpfulness in zip((r, c), reversed(scores), strict=True):
            rest = {"correctness": helpfulness, "coherence": 4, "complexity": 1, "verbosity": 1}
            rows.append({"prompt": q, "response": response, "helpfulness": helpfulness, **rest})
    (path / "helpsteer2.json").write_text(json.dumps(rows, indent=1))
    return "helpsteer2.json"


def tulu3(path: Path) -> str:
    rows = [
        {"id": str(i), "source": "made", "prompt": q, "chosen": talk(q, c), "rejected": talk(q, r), "chosen_model": "a"}
        for i, (q, c, r) in enumerate(sums())
    ]
    (path / "tulu3.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "tulu3.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a small model that has a chat template."""
    path = tmp_path_factory.mktemp("published")
    hf = byte_level(chat_template=CHATML)
    hf.eos_token = "<|im_end|>"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(hf), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "model")
    hf.save_pretrained(path / "model")
    return path


@pytest.mark.parametrize(
    ("write", "dropped"),
    [(hh_rlhf, 1), (ultrafeedback, 0), (helpsteer2, 1), (tulu3, 0)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_it_goes_the_whole_way(write: Any, dropped: int, folder: Path) -> None:
    name = write(folder)
    run = write.__name__
    factory = "smollm2_135m_dpo(init_from='model')"
    train = [f"data.train={name}", f"log.name={run}", "data.seq_length=512", "data.global_batch_size=8"]
    train += [
        "data.micro_batch_size=4",
        "data.validation=none",
        "trainer.max_steps=2",
        "optim.lr_scheduler.warmup_steps=0",
    ]
    done = nemo_each(
        [
            [
                "llm",
                "lint-preferences",
                "-y",
                f"train={name}",
                "tokenizer=model",
                "seq_length=512",
                "global_batch_size=8",
            ],
            ["llm", "convert-preferences", "-y", f"input={name}", f"output={run}-pairs.jsonl"],
            ["llm", "align", "--factory", factory, "-y", *train],
            [
                "llm",
                "evaluate",
                "-y",
                f"data={name}",
                f"checkpoint=runs/{run}",
                "reference=model",
                f"output={run}-out.jsonl",
            ],
        ],
        folder,
    )
    for code, said, errors in done:
        assert code == 0, (said[-2000:], errors[-3000:])
    lint, convert, align, evaluated = (said + errors for _, said, errors in done)
    form = f"{name}: {FORMS[run]}"
    assert all(form in told for told in (lint, convert, align, evaluated))
    assert f"{COUNT} pairs" in convert and f"{COUNT} of {COUNT} pairs" in align
    assert ("rows dropped" in convert) == bool(dropped)
    rows = read_rows(folder / f"{run}-pairs.jsonl")
    expected = [(q, c, r) for q, c, r in sums()]
    found = [(row.prompt, row.chosen_response, row.rejected_response) for row in rows]
    plain = [tuple(x if isinstance(x, str) else x[-1]["content"] for x in row) for row in found]
    assert plain == expected
    assert [row["step"] for row in read_metrics(folder / f"runs/{run}/metrics.csv")] == [0, 1]
    lines = [json.loads(line) for line in (folder / f"{run}-out.jsonl").read_text().splitlines()]
    assert len(lines) == COUNT and "acc " in evaluated and all("margin" in line for line in lines)
    if write is ultrafeedback:
        assert {(row.chosen_reward, row.rejected_reward) for row in rows} == {(8.5, 2.0)}
