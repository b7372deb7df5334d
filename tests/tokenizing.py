"""Small tokenizers with chosen merges, made on the spot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aligner.data.token_cache import TokenFile, TokenizationConfig, token_files

PAIRS = TokenizationConfig("pairs", 64)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(merges: Sequence[tuple[str, str]] = (), *, bos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with chosen merges, as GPT-2's or Llama 3's."""
    tokens = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(merge) for merge in merges]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return hf


def token_file(path: Path, hf: Any, settings: TokenizationConfig, folder: Path, **options: Any) -> TokenFile:
    """The token file of one file of rows."""
    (found,) = token_files([path], hf, settings, folder, **options)
    return found
