"""`nemo llm pack-preferences`."""

from pathlib import Path
from typing import Any, Optional, Union

from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.common.errors import ConfigError
from aligner.data.chat_template import date_of
from aligner.data.dataset import TokenizedDataset
from aligner.data.examples import Kind, Overlong
from aligner.data.forms.form import RankedPairs
from aligner.data.packing import Algorithm
from aligner.data.prepacked import write_packed_folder
from aligner.data.token_cache import TokenizationConfig


def pack_preferences(
    train: Union[list[Any], str],
    tokenizer: str,
    output: str,
    seq_length: int = 2048,
    packed_sequence_size: Optional[int] = None,
    algorithm: Algorithm = "first_fit_shuffle",
    seed: int = 1234,
    kind: Kind = "pairs",
    apply_chat_template: bool = False,
    overlong: Overlong = "drop",
    chat_template_kwargs: Optional[dict[str, Any]] = None,
    date: Optional[str] = None,
    ranked_pairs: RankedPairs = "best_worst",
    ignore_columns: Optional[list[str]] = None,
    global_batch_size: int = 256,
) -> Path:
    """Tokenize and pack rows ahead of time; train on the result with data.train=OUTPUT.

    A run can also pack during training (data.batching=packed), without this command.

    Args:
        train: file of rows, folder of such files, or list of both.
        tokenizer: folder or name of a Hugging Face tokenizer, or a NeMo checkpoint or run with a tokenizer.
        output: folder to write; must not exist.
        seq_length: most tokens of prompt and response together; the run's data.seq_length.
        packed_sequence_size: tokens per pack; None: the most tokens that an example can have.
        algorithm: first_fit_shuffle, first_fit_decreasing, best_fit_decreasing (`aligner.data.packing`).
        seed: random seed of first_fit_shuffle.
        kind: pairs, unpaired (for kto) or demonstrations (for supervised fine-tuning).
        apply_chat_template: the run's data.apply_chat_template.
        overlong: the run's data.overlong.
        chat_template_kwargs: the run's data.chat_template_kwargs.
        date: the run's data.date, for a chat template that writes the day; None: today.
        ranked_pairs: the run's data.ranked_pairs.
        ignore_columns: the run's data.ignore_columns.
        global_batch_size: pairs per optimizer step, to print the equivalent number of packs.

    Raises:
        RowError: a row is invalid.
        ConfigError: an argument is invalid, or an example is longer than a pack.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise ConfigError(f"output: {folder} exists already; remove it or name another folder")
    hf = named_tokenizer(tokenizer)
    settings = TokenizationConfig(
        kind,
        seq_length,
        apply_chat_template,
        overlong,
        dict(chat_template_kwargs or {}),
        date_of(hf, date),
        ranked_pairs,
        list(ignore_columns or ()),
    )
    corpus, meta = write_packed_folder(
        train,
        hf,
        settings,
        folder,
        packed_sequence_size=packed_sequence_size,
        algorithm=algorithm,
        seed=seed,
    )
    _print_summary(corpus, meta, settings, output, global_batch_size)
    return folder


def _print_summary(
    corpus: TokenizedDataset, meta: dict[str, Any], settings: TokenizationConfig, output: str, global_batch_size: int
) -> None:
    noun, mean = "pairs" if settings.kind == "pairs" else "responses", meta["examples_per_pack"]
    print(corpus.report)
    print(
        f"Packing is {meta['efficiency']:.2%} efficient: {meta['packs']} packs of {meta['packed_sequence_size']} tokens"
    )
    print(f">>> average number of {noun} per pack is n = {mean:.2f}")
    print(
        f">>> a global batch counts packs: instead of data.global_batch_size={global_batch_size} ({noun}) "
        f"set data.global_batch_size={max(1, round(global_batch_size / mean))} (packs), data.micro_batch_size=1"
    )
    print(f">>> train with data.train={output} data.seq_length={settings.seq_length}", end=" ")
    more = f" data.date={settings.date}" if settings.date else ""
    print(f"data.apply_chat_template={settings.apply_chat_template} data.overlong={settings.overlong}{more}")
