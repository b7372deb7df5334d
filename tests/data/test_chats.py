"""Chats under templates in the formats of published models: what is scored, token by token, and what is refused.

The templates are our own, in the formats of the models that they are named after.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from reading import row_of
from tokenizing import CHATML, byte_level

from aligner.common.errors import RowError
from aligner.data import chat_template
from aligner.data.chat_template import TemplateSettings
from aligner.data.examples import Kind, examples
from aligner.data.tokenization import ResponseTokenizer

TEMPLATES = Path(__file__).parent / "templates"
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|User|>", "<|Assistant|>",
    "[INST]", "[/INST]",
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"role": "user", "content": "Rain?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"at": "Bern"}}}],
}
RESULT = {"role": "tool", "name": "weather", "content": "wet"}
SAID = {"role": "assistant", "content": "It rains."}
HERMES_CALL = '<tool_call>\n{"arguments": {"at": "Bern"}, "name": "weather"}\n</tool_call><|im_end|>'
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"at": "Bern"}}\n</tool_call><|im_end|>'
LLAMA_CALL = '{"name": "weather", "parameters": {"at": "Bern"}}<|eot_id|>'
LLAMA_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
R1_CALL = '<|call|>weather\n{"at": "Bern"}<|call end|></s>'


def encoder(name: str, **settings: Any) -> ResponseTokenizer:
    hf = byte_level()
    hf.add_special_tokens({"additional_special_tokens": MARKERS})
    hf.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return ResponseTokenizer(hf, template=TemplateSettings(settings.pop("kwargs", None), "2026-11-30"), **settings)


def scored(encode: ResponseTokenizer, prompt: list[Any], answer: list[Any], **template: Any) -> tuple[str, list[str]]:
    """The prompt's text, and the text of each scored part of the answer."""
    ids, (response,) = encode.tokens("f.jsonl:1", prompt, [answer], template)
    assert encode.encode_prompt("f.jsonl:1", prompt, template) == ids, "in generating as in training"
    parts: list[list[int]] = [[]]
    for i, token in enumerate(response.ids):
        if i in response.unscored:
            parts.append([])
        else:
            parts[-1].append(token)
    return encode.hf.decode(ids), [encode.hf.decode(part) for part in parts if part]


@pytest.mark.parametrize(
    ("name", "call", "then"),
    [
        ("llama31", [LLAMA_CALL], ["It rains.<|eot_id|>"]),
        ("qwen25", [QWEN_CALL], ["It rains.<|im_end|>"]),
        ("qwen3", ["<think>\n\n</think>\n\n" + QWEN_CALL], ["<think>\n\n</think>\n\nIt rains.<|im_end|>"]),
        ("hermes", ["\n" + HERMES_CALL], ["It rains.<|im_end|>"]),
    ],
)
def test_calls_and_what_follows_their_results(name: str, call: list[str], then: list[str]) -> None:
    encode = encoder(name)
    if name == "hermes":
        # Its generation prompt ends with the line break that a call begins with.
        call = [call[0].removeprefix("\n")]
    prompt, found = scored(encode, [ASKED], [CALL], tools=TOOLS)
    assert found == call and '"weather"' in prompt
    prompt, found = scored(encode, [ASKED, CALL, RESULT], [SAID], tools=TOOLS)
    assert found == then and "wet" in prompt and "Bern" in prompt
    # All in one answer: every token of the assistant's, none of the tool's.
    _, found = scored(encode, [ASKED], [CALL, RESULT, SAID], tools=TOOLS)
    assert found == [call[0].removeprefix("<think>\n\n</think>\n\n"), *then]


def test_thoughts() -> None:
    encode = encoder("qwen3")
    thought, written = {**SAID, "reasoning_content": "I look."}, "<think>\nI look.\n</think>\n\nIt rains.<|im_end|>"
    assert scored(encode, [ASKED], [thought])[1] == [written]
    assert scored(encode, [ASKED], [{**SAID, "content": "<think>\nI look.\n</think>\n\nIt rains."}])[1] == [written]
    silent, found = scored(encoder("qwen3", kwargs={"enable_thinking": False}), [ASKED], [SAID])
    assert silent.endswith("assistant\n<think>\n\n</think>\n\n") and found == ["It rains.<|im_end|>"]
    # A row's own argument takes precedence.
    assert scored(encode, [ASKED], [SAID], enable_thinking=False) == (silent, found)
    # DeepSeek's takes the thought out of what it writes, and opens it in the prompt.
    r1 = encoder("r1")
    prompt, found = scored(r1, [ASKED], [{**SAID, "content": "<think>\nI look.\n</think>\n\nIt rains."}])
    assert prompt.endswith("<|Assistant|><think>\n") and found == ["I look.\n</think>\n\nIt rains.</s>"]
    assert r1.stop_token_ids == {r1.eos}
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template opens each answer with '<think>"):
        scored(r1, [ASKED], [SAID])
    for name in ("llama31", "qwen25", "hermes", "mistral", "r1"):
        with pytest.raises(
            RowError, match=r"has 'reasoning_content', which the tokenizer's chat template does not write"
        ):
            scored(encoder(name), [ASKED], [thought])


def test_arguments_of_calls_are_objects_or_json_as_the_template_has_them() -> None:
    text = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"at": "Bern"}'}}]}
    for call in (CALL, text):
        (row,) = row_of({"messages": [ASKED, call, RESULT, SAID, ASKED, SAID], "tools": TOOLS})[:1]
        assert scored(encoder("qwen25"), row.prompt, row.response, **row.template)[1] == [QWEN_CALL]
    assert R1_CALL in scored(encoder("r1"), [ASKED, CALL, RESULT], [SAID])[0]


def test_what_a_template_mentions_and_does_not_write_is_refused() -> None:
    encode = encoder("mistral")
    assert scored(encode, [ASKED], [SAID])[1] == [" It rains.</s>"]
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template does not write 'weather' of 'tool_calls'"):
        scored(encode, [ASKED], [CALL], tools=TOOLS)
    encode = ResponseTokenizer(byte_level(chat_template="{% if tools %}Use them.{% endif %}" + CHATML))
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template does not write 'weather' of 'tools'"):
        scored(encode, [ASKED], [SAID], tools=TOOLS)
    # Hermes' leaves out what is said beside a call.
    with pytest.raises(RowError, match="writes the prompt without its answer"):
        scored(encoder("hermes"), [ASKED], [{**CALL, "content": "I look."}], tools=TOOLS)


@pytest.mark.parametrize("name", ["llama31", "qwen25", "hermes", "mistral"])
def test_an_answer_goes_on_with_the_assistants_message(name: str) -> None:
    begun = {"role": "assistant", "content": "It"}
    prompt, (found,) = scored(encoder(name), [ASKED, begun], [{"role": "assistant", "content": " rains."}])
    assert prompt.endswith("It") and found.startswith(" rains.")
    encode = encoder(name, apply_chat_template=True)
    assert encode.hf.decode(encode("f.jsonl:1", [ASKED, begun], [" rains."])[1][0]) == found
    with pytest.raises(RowError, match="which the response goes on with; that can be text alone"):
        scored(encoder(name), [ASKED, begun], [SAID, RESULT, SAID])


def test_the_tokens_of_a_prompt_are_those_of_transformers() -> None:
    """A tokenizer that begins each text with <s>, and a template that does not."""
    hf = byte_level(bos=True, chat_template=CHATML)
    prompt, _ = ResponseTokenizer(hf)("f.jsonl:1", [ASKED], [[SAID]])
    assert prompt == hf.apply_chat_template([ASKED], add_generation_prompt=True, return_dict=False)
    assert hf.bos_token_id not in prompt
    assert ResponseTokenizer(hf)("f.jsonl:1", "a", ["b"])[0][0] == hf.bos_token_id


def test_the_date_is_the_one_of_the_settings() -> None:
    prompt, _ = scored(encoder("llama31"), [ASKED], [SAID])
    assert "Today Date: 30 Nov 2026\n" in prompt


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + 1 }}{% endfor %}",
        {"rag": "{{ messages }}", "tool_use": "{{ messages }}"},
        "{{ raise_exception('no') }}",
        "{% for m in messages %}",
    ],
)
def test_a_template_that_fails_is_told_with_the_line(template: Any) -> None:
    hf = byte_level()
    hf.chat_template = template
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template refuses these messages \(user"):
        ResponseTokenizer(hf).tokens("f.jsonl:1", [ASKED], [[SAID]])


LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_told_with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_S", 0.5)
    hf = byte_level()
    hf.chat_template = LOOPS
    with pytest.raises(RowError, match=r"f.jsonl:1: the chat template refuses these .*did not end within 0.5 s"):
        ResponseTokenizer(hf).tokens("f.jsonl:1", [ASKED], [[SAID]])


def test_texts_with_the_templates_own_tokens_are_refused_under_the_template() -> None:
    hf = byte_level(chat_template=CHATML)
    written = "<|im_start|>user\n0+1=<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(RowError, match=r"f.jsonl:1: holds '<\|im_start\|>', which the chat template writes"):
        ResponseTokenizer(hf, apply_chat_template=True)("f.jsonl:1", written, ["1", "2"])
    assert hf.decode(ResponseTokenizer(hf)("f.jsonl:1", written, ["1", "2"])[0]) == written


def of(rows: list[Any], kind: Kind) -> list[Any]:
    encode = encoder("qwen25")
    found, _ = examples(rows, encode, kind=kind, seq_length=999)
    return found


def test_answers_of_weight_0_are_context() -> None:
    talk = [ASKED, {**SAID, "content": "No.", "weight": 0}, ASKED, {**SAID, "weight": 1}]
    (only,) = of(row_of({"messages": talk}), "demonstrations")
    encode = encoder("qwen25")
    assert "No." in encode.hf.decode(only.prompt) and encode.hf.decode(only.responses[0]) == "It rains.<|im_end|>"
    with pytest.raises(RowError, match=r"'weight' is 0\.5"):
        row_of({"messages": [ASKED, {**SAID, "weight": 0.5}]})


def test_answers_that_differ_in_their_calls_alone_are_two() -> None:
    other = json.loads(json.dumps(CALL).replace("Bern", "Basel"))
    row = {"prompt": [ASKED], "chosen_response": [CALL, RESULT, SAID], "rejected_response": other, "tools": TOOLS}
    (pair,) = of(row_of(row), "pairs")
    assert pair.unscored[0] and not pair.unscored[1]
    assert len(pair.responses[0]) > len(pair.unscored[0])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "assistant", "content": None}, r"expected a message with 'role' and 'content'"),
        ({"role": "user", "content": None}, r"expected a message with 'role' and 'content'"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, r"tool_calls\[0\]: expected a call"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "'arguments' is not JSON",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"'content' has parts that are no text \(image_url\)"),
    ],
)
def test_messages_that_cannot_be_read_are_told(message: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError, match=told):
        row_of({"messages": [ASKED, message, SAID]})


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "Ra"}, {"type": "text", "text": "in?"}]
    (row,) = row_of({"messages": [{"role": "user", "content": parts}, SAID]})
    assert row.prompt == [ASKED]
