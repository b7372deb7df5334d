from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import row_of
from tokenizing import CHATML, byte_level

from aligner.common.errors import ConfigError, RowError
from aligner.data.examples import Kind, check_share, examples
from aligner.data.rows import PreferenceRow
from aligner.data.tokenization import ResponseTokenizer


def row(prompt: Any = "2+2=", chosen: Any = "4", rejected: Any = "5") -> PreferenceRow:
    (found,) = row_of({"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected})
    assert isinstance(found, PreferenceRow)
    return found


class Pair:
    """The tokens of a row's prompt and two responses."""

    def __init__(self, encode: ResponseTokenizer, row: PreferenceRow) -> None:
        responses = [row.chosen_response, row.rejected_response]
        self.prompt, (self.chosen, self.rejected) = encode(row.source, row.prompt, responses)

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)


def pair_of(hf: Any, row: PreferenceRow, **options: Any) -> Pair:
    return Pair(ResponseTokenizer(hf, **options), row)


def as_pairs(rows: list[PreferenceRow], hf: Any, **options: Any) -> Any:
    return examples(rows, ResponseTokenizer(hf), kind="pairs", **options)


def test_strings_get_an_end_and_no_beginning_where_the_tokenizer_sets_none() -> None:
    hf = byte_level()
    pair = pair_of(hf, row())
    assert hf.decode(pair.prompt) == "2+2="
    assert hf.decode(pair.chosen) == "4</s>"
    assert hf.decode(pair.rejected) == "5</s>"


@pytest.mark.parametrize("prompt", ["2+2=", "<s>2+2="])
def test_one_beginning_where_the_tokenizer_sets_one(prompt: str) -> None:
    hf = byte_level(bos=True)
    pair = pair_of(hf, row(prompt))
    assert Counter(pair.prompt)[hf.backend_tokenizer.token_to_id("<s>")] == 1
    assert pair.prompt[0] == hf.bos_token_id
    assert hf.bos_token_id not in pair.chosen


@pytest.mark.parametrize("ending", ["</s>", "<|im_end|>", "<|im_end|>\n"])
def test_an_answer_that_already_ends_gets_no_second_end(ending: str) -> None:
    hf = byte_level()
    pair = pair_of(hf, row(chosen="4" + ending, rejected="5" + ending))
    assert hf.decode(pair.chosen) == "4" + ending.strip()


def test_messages_go_through_the_template_and_the_end_of_turn_is_scored() -> None:
    hf = byte_level(chat_template=CHATML)
    pair = pair_of(hf, 
        row(
            [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": "sure?"},
            ],
            {"role": "assistant", "content": "yes"},
            {"role": "assistant", "content": "no"},
        )
    )  # fmt: skip
    assert hf.decode(pair.prompt).endswith("<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    assert hf.decode(pair.chosen) == "yes<|im_end|>"
    assert hf.decode(pair.rejected) == "no<|im_end|>"


def test_strings_read_as_chat_equal_messages() -> None:
    hf = byte_level(chat_template=CHATML)
    messages = row(
        [{"role": "user", "content": "hi"}],
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    assert pair_of(hf, row("hi", "a", "b"), apply_chat_template=True) == pair_of(hf, messages)


def test_the_prompts_tokens_win_where_the_tokenizer_would_merge_across_the_border() -> None:
    hf = byte_level([("=", "4")])
    encode = ResponseTokenizer(hf)
    pair = Pair(encode, row("2+2=", "4", "5"))
    assert hf.encode("2+2=4", add_special_tokens=False)[-1] == hf.convert_tokens_to_ids("=4")
    assert hf.decode(pair.prompt) == "2+2="
    assert hf.decode(pair.chosen) == "4</s>"
    assert encode.merged == 1
    _, report = as_pairs([row("2+2=", "4", "5")], hf, seq_length=99)
    assert report.merged_at_border == 1
    assert "1 responses start inside a token" in str(report)


@given(st.text("ab= \n", min_size=1, max_size=8), st.text("ab= \n", min_size=1, max_size=8))
def test_prompt_and_answer_read_back_as_they_were(prompt: str, chosen: str) -> None:
    hf = byte_level([("a", "b"), ("=", "a"), ("ab", "=")])
    if not prompt.strip() or not chosen.strip():
        return
    pair = pair_of(hf, row(prompt, chosen, chosen + "x"))
    assert hf.decode(pair.prompt + pair.chosen[:-1]) == prompt + chosen


def test_answers_of_one_token_that_differ_at_once_are_scored() -> None:
    pair = pair_of(byte_level(), row("?", "a", "b"))
    assert pair.chosen[0] != pair.rejected[0]


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template writes the prompt differently"):
        pair_of(byte_level(chat_template=rewriting), row(), apply_chat_template=True)


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(RowError, match=r"no chat template to apply; set data\.apply_chat_template=False"):
        pair_of(byte_level(), row(), apply_chat_template=True)
    said = [{"role": "user", "content": "a"}]
    with pytest.raises(RowError, match="holds messages, but the tokenizer has no chat template"):
        pair_of(byte_level(), row(said))


LONG = row("p" * 10, "c" * 20, "r" * 5)


def test_over_long_pairs_are_dropped_counted_and_limited() -> None:
    rows = [row()] * 19 + [LONG]
    pairs, report = as_pairs(rows, byte_level(), seq_length=16)
    assert len(pairs) == report.kept == 19
    assert report.dropped == {"longer than seq_length=16": 1}
    with pytest.raises(ConfigError, match=r"data.max_dropped_fraction: 1 of 2 examples of f.jsonl would be dropped"):
        check_share(as_pairs([row(), LONG], byte_level(), seq_length=16)[1], "f.jsonl", seq_length=16, limit=0.1)
    check_share(report, "f.jsonl", seq_length=16, limit=0.1)


def test_over_long_pairs_are_refused_if_asked() -> None:
    with pytest.raises(RowError, match=r"f.jsonl:1: has 31 tokens, more than data.seq_length=16"):
        as_pairs([LONG], byte_level(), seq_length=16, overlong="error")


def test_truncated_answers_share_the_prompt_and_do_not_end() -> None:
    hf = byte_level()
    (pair,), report = as_pairs([LONG], hf, seq_length=16, overlong="truncate")
    assert (len(pair.prompt), len(pair.responses[0])) == (10, 6)
    assert hf.eos_token_id not in pair.responses[0]
    assert pair.responses[1][-1] == hf.eos_token_id
    assert report.truncated == 1


def test_answers_that_become_equal_are_dropped() -> None:
    rows = [row("p" * 10, "c" * 20, "c" * 21)] + [row()] * 19
    pairs, report = as_pairs(rows, byte_level(), seq_length=16, overlong="truncate")
    assert len(pairs) == 19
    assert report.dropped == {"both answers have the same tokens": 1}


def test_a_tokenizer_without_an_end_is_refused() -> None:
    hf = byte_level()
    hf.eos_token = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        ResponseTokenizer(hf)


def test_responses_written_in_two_ways_are_refused() -> None:
    """Each would bring its own prompt along."""
    with pytest.raises(RowError, match="one response is a string and one a message"):
        pair_of(byte_level(chat_template=CHATML), row("hi", "a", {"role": "assistant", "content": "b"}))


# ---- what an objective makes of a row -----------------------------------------------------------------------------


def lines(*objects: dict[str, Any]) -> list[Any]:
    return [row for i, o in enumerate(objects, start=1) for row in row_of(o, f"f.jsonl:{i}")]


def responses(rows: list[Any], kind: Kind) -> list[tuple[list[str], bool]]:
    hf = byte_level(chat_template=CHATML)
    found, report = examples(rows, ResponseTokenizer(hf), kind=kind, seq_length=99)
    check_share(report, "f.jsonl", seq_length=99, limit=0.1)
    return [([hf.decode(r) for r in e.responses], e.desirable) for e in found]


def test_a_pair_is_two_single_responses_or_one_to_imitate() -> None:
    assert responses([row()], "pairs") == [(["4</s>", "5</s>"], True)]
    assert responses([row()], "unpaired") == [(["4</s>"], True), (["5</s>"], False)]
    assert responses([row()], "demonstrations") == [(["4</s>"], True)]


def test_single_responses() -> None:
    rows = lines(
        {"prompt": "2+2=", "response": "4", "preference": "chosen"},
        {"prompt": "2+2=", "response": "5", "preference": False},
    )
    assert responses(rows, "unpaired") == [(["4</s>"], True), (["5</s>"], False)]
    assert responses(rows, "demonstrations") == [(["4</s>"], True)]
    _, report = examples(rows, ResponseTokenizer(byte_level()), kind="demonstrations", seq_length=99)
    assert str(report) == "1 of 1 responses, 6 tokens; 1 rejected responses left out"
    with pytest.raises(RowError, match=r"f.jsonl:1: holds one response, but the loss compares two"):
        responses(rows, "pairs")
    with pytest.raises(RowError, match=r"f.jsonl:1: has no 'preference'"):
        responses(lines({"prompt": "a", "response": "b"}), "unpaired")
    with pytest.raises(ConfigError, match="all 1 rows are rejected responses"):
        responses(rows[1:], "demonstrations")


def test_every_answer_of_a_conversation_is_learned_after_what_stood_before_it() -> None:
    talk = [("user", "2+2?"), ("assistant", "4"), ("user", "sure?"), ("assistant", "yes")]
    rows = lines({"messages": [{"role": role, "content": text} for role, text in talk]})
    assert responses(rows, "demonstrations") == [(["4<|im_end|>"], True), (["yes<|im_end|>"], True)]
    hf = byte_level(chat_template=CHATML)
    found, _ = examples(rows, ResponseTokenizer(hf), kind="demonstrations", seq_length=99)
    assert hf.decode(found[1].prompt).startswith("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>")


def test_one_side_alone_is_told_with_the_weight_that_balances_it() -> None:
    def told(wanted: int, unwanted: int) -> str | None:
        labels = [True] * wanted + [False] * unwanted
        rows = lines(*({"prompt": f"{i}+1=", "response": "2", "preference": label} for i, label in enumerate(labels)))
        return examples(rows, ResponseTokenizer(byte_level()), kind="unpaired", seq_length=99)[1].one_sided()

    assert told(10, 10) is None
    assert (
        told(98, 2) == "98 chosen and 2 rejected responses: loss.undesirable_weight=49 gives both sides the same weight"
    )
    assert (told(1, 19) or "").endswith("loss.desirable_weight=19 gives both sides the same weight")
    assert "one side alone teaches no difference" in (told(5, 0) or "")
