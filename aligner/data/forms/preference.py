"""Forms with a chosen and a rejected response, or one labeled response."""

from __future__ import annotations

import json
import re
from typing import Any

from aligner.common.errors import RowError
from aligner.data.forms.form import (
    Form,
    Found,
    Options,
    Values,
    answer_of,
    conversations,
    pair,
    prompt_of,
    rewards,
    truth,
)
from aligner.data.forms.messages import NOTHING, answers, check_response, parse_messages, parse_text, template_arguments
from aligner.data.rows import DroppedRow, Message, ResponseRow, shorten

SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
)  # fmt: skip
"""Names of rewards of the chosen and the rejected response."""
SCORE_KEYS = frozenset(name for names in SCORES for name in names)
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT_TOOLS = {"function_call": "assistant", "observation": "tool", "tool": "tool"}


def read_explicit(row: Values, source: str, options: Options) -> Found:
    """prompt, chosen, rejected: strings, answers as messages, or whole conversations that repeat the prompt."""
    prompt, rated = prompt_of(row, "prompt", source), rewards(row, SCORES, source)
    if row.get("question") and row["question"] not in _texts(row["prompt"]):
        shown = shorten(row["question"])
        raise RowError(f"{source}: 'question' is another text than 'prompt' ({shown}); drop one of the two")
    chosen, rejected = (answer_of(row[key], key, source) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen[0]["role"] != "assistant":
        found = conversations(source, chosen, rejected, row, rated=rated)
        _check_prompt(prompt, chosen, source)
        return _check_messages(row, chosen, found, source)
    found = pair(source, prompt, chosen, rejected, row, rated)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else chosen
    return _check_messages(row, before + answer, found, source)


def read_implicit(row: Values, source: str, options: Options) -> Found:
    """chosen, rejected: two conversations, or two texts, whose common beginning is the prompt."""
    chosen, rejected = (answer_of(row[key], key, source) for key in ("chosen", "rejected"))
    rated = rewards(row, SCORES, source)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _check_messages(row, chosen, conversations(source, chosen, rejected, row, rated=rated), source)
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise RowError(f"{source}: one response is a string and one a message; write both the same way")
    if chosen == rejected:
        return [DroppedRow(source, "with two equal answers")]
    # Up to the last whole word in common; answers begin with the space before them.
    count = len(re.sub(r"\s*\S*\Z", "", _beginning(chosen, rejected)))
    if not chosen[:count].strip():
        raise RowError(f"{source}: 'chosen' and 'rejected' have no beginning in common, so there is no prompt")
    return pair(source, chosen[:count], chosen[count:], rejected[count:], row, rated)


def read_dialogue(row: Values, source: str, options: Options) -> Found:
    """chosen, rejected: dialogues as text, with turns after `Human:` and `Assistant:`."""
    both = []
    for key in ("chosen", "rejected"):
        before, *turns = TURN.split(row[key])
        if before.strip() or not turns:
            raise RowError(f"{source}: {key!r} does not begin with a turn of 'Human:', found {shorten(row[key])}")
        messages = [
            {"role": SPEAKERS[speaker], "content": text.strip()}
            for speaker, text in zip(turns[::2], turns[1::2], strict=True)
        ]
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            return [DroppedRow(source, "with a dialogue that ends without an answer")]
        if not messages[-1]["content"]:
            return [DroppedRow(source, "with an empty answer")]
        both.append(messages)
    return conversations(source, both[0], both[1], row)


def read_unpaired(row: Values, source: str, options: Options) -> Found:
    """prompt, completion, label: one response that is wanted or not."""
    response = parse_text(row["completion"], "completion", source, response=True)
    prompt = prompt_of(row, "prompt", source)
    return [ResponseRow(source, prompt, response, truth(row, "label", source), template_arguments(row, source))]


def read_labeled_conversation(row: Values, source: str, options: Options) -> Found:
    """messages, label: the last answer of a conversation is wanted or not."""
    messages = parse_messages(row["messages"], "messages", source)
    if len(messages) < 2:
        raise RowError(f"{source}: 'messages' has no answer after another message")
    answer = check_response(messages[-1:], "messages", source)
    return [ResponseRow(source, messages[:-1], answer, truth(row, "label", source), template_arguments(row, source))]


def read_completion(row: Values, source: str, options: Options) -> Found:
    """prompt, completion: a response to imitate."""
    response = parse_text(row["completion"], "completion", source, response=True)
    return [ResponseRow(source, prompt_of(row, "prompt", source), response, None, template_arguments(row, source))]


def read_openai(row: Values, source: str, options: Options) -> Found:
    """input, preferred_output, non_preferred_output: OpenAI's form of preferences."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise RowError(f"{source}: 'input' must be an object with 'messages', found {shorten(given)}")
    unknown = set(given) - {"messages", "tools", "parallel_tool_calls"}
    if unknown:
        raise RowError(f"{source}: 'input' has {', '.join(sorted(unknown))}, which is not read")
    prompt = parse_messages(given["messages"], "input.messages", source)
    chosen, rejected = (answer_of(row[key], key, source) for key in ("preferred_output", "non_preferred_output"))
    return pair(source, prompt, chosen, rejected, {**row, "tools": given.get("tools")})


def read_instruction(row: Values, source: str, options: Options) -> Found:
    """instruction, input, chosen, rejected: Alpaca's ranking form, as LLaMA-Factory reads it."""
    prompt = prompt_of({**row, "prompt": _instruction(row, source)}, "prompt", source)
    chosen, rejected = (answer_of(row[key], key, source) for key in ("chosen", "rejected"))
    return pair(source, prompt, chosen, rejected, row, rewards(row, SCORES, source))


def read_alpaca(row: Values, source: str, options: Options) -> Found:
    """instruction, input, output: Alpaca's demonstrations."""
    prompt = prompt_of({**row, "prompt": _instruction(row, source)}, "prompt", source)
    response = parse_text(row["output"], "output", source, response=True)
    return [ResponseRow(source, prompt, response, None, template_arguments(row, source))]


def read_argilla(row: Values, source: str, options: Options) -> Found:
    """instruction, chosen_response, rejected_response: Argilla's UltraFeedback."""
    prompt = prompt_of(row, "instruction", source)
    chosen, rejected = (answer_of(row[key], key, source) for key in ("chosen_response", "rejected_response"))
    return pair(source, prompt, chosen, rejected, row, rewards(row, SCORES, source))


def read_question(row: Values, source: str, options: Options) -> Found:
    """system, question, chosen, rejected: Intel's Orca pairs."""
    prompt = prompt_of(row, "question", source)
    chosen, rejected = (answer_of(row[key], key, source) for key in ("chosen", "rejected"))
    return pair(source, prompt, chosen, rejected, row, rewards(row, SCORES, source))


def read_sharegpt_ranking(row: Values, source: str, options: Options) -> Found:
    """conversations, chosen, rejected: LLaMA-Factory's ranking form of ShareGPT messages."""
    prompt = _sharegpt(row["conversations"], "conversations", source, row)
    chosen, rejected = (_sharegpt([row[key]], key, source, {}) for key in ("chosen", "rejected"))
    return pair(source, prompt, chosen, rejected, row)


def read_sharegpt(row: Values, source: str, options: Options) -> Found:
    """conversations: ShareGPT's dialogues, every answer to imitate."""
    messages, template = _sharegpt(row["conversations"], "conversations", source, row), template_arguments(row, source)
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise RowError(f"{source}: 'conversations' has no answer, so there is nothing to learn")
    return [
        ResponseRow(source, messages[:i], check_response([messages[i]], "conversations", source), None, template)
        for i in answers(messages)
    ] or [DroppedRow(source, NOTHING)]


def read_swift(row: Values, source: str, options: Options) -> Found:
    """messages, rejected_response: ms-swift's form; the last answer of the conversation is the chosen one."""
    messages = parse_messages(row["messages"], "messages", source)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise RowError(f"{source}: 'messages' must end with the chosen answer")
    rejected = answer_of(row["rejected_response"], "rejected_response", source)
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return pair(source, messages[:-1], messages[-1:], rejected, row)


def _beginning(first: str, second: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[:count] if count is not None else min(first, second, key=len)


def _instruction(row: Values, source: str) -> str:
    instruction, more = parse_text(row["instruction"], "instruction", source), row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(more, str):
        raise RowError(f"{source}: 'instruction' and 'input' must be strings, found {shorten(row.get('input'))}")
    return f"{instruction}\n{more}" if more.strip() else instruction


def _sharegpt(value: Any, key: str, source: str, row: Values) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{source}: {key!r} must be a list of messages with 'from' and 'value', found {shorten(value)}")
    if any("role" in item for item in value):
        return _with_system(parse_messages(value, key, source), row, source)
    roles = SHAREGPT | SHAREGPT_TOOLS
    messages: list[Message] = []
    for i, item in enumerate(value):
        if not isinstance(item.get("from"), str) or item["from"] not in roles or not isinstance(item.get("value"), str):
            raise RowError(
                f"{source}: {key}[{i}]: expected 'from' (one of {', '.join(roles)}) and 'value', found {shorten(item)}"
            )
        if item["from"] == "function_call":
            calls = parse_messages([{"role": "assistant", "tool_calls": _calls(item["value"], source)}], key, source)
            messages += calls
        else:
            weight = {"weight": item["weight"]} if item.get("weight") is not None else {}
            messages.append({"role": roles[item["from"]], "content": item["value"], **weight})
    return _with_system(parse_messages(messages, key, source), row, source)


def _with_system(messages: list[Message], row: Values, source: str) -> list[Message]:
    if not row.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise RowError(f"{source}: has 'system' beside a system message of the conversation; drop one of the two")
    return [{"role": "system", "content": row["system"]}, *messages]


def _calls(text: str, source: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except ValueError:
        raise RowError(f"{source}: a 'function_call' is not JSON: {shorten(text)}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _check_prompt(prompt: Any, chosen: list[Message], source: str) -> None:
    """Check that a conversation's own prompt is the one beside it."""
    if isinstance(prompt, str):
        said = [message.get("content", "").strip() for message in chosen if message["role"] == "user"]
        same = prompt.strip() in said
    else:
        same = chosen[: len(prompt)] == prompt
    if not same:
        raise RowError(
            f"{source}: 'prompt' is not in the conversation of 'chosen' ({shorten(prompt)}); drop one of the two"
        )


def _check_messages(row: Values, conversation: list[Message], found: Found, source: str) -> Found:
    """Check that `messages`, where a row has them beside a pair, are those of the chosen response."""
    if row.get("messages") and parse_messages(row["messages"], "messages", source) != conversation:
        raise RowError(f"{source}: 'messages' is another conversation than that of 'chosen'; drop one of the two")
    return found


def _texts(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]


_USER, _GOOD, _BAD = (
    {"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"))
)
_PREFERENCE = frozenset({"chosen", "rejected"})
FORMS = (
    Form(
        "OpenAI preference", "OpenAI's fine-tuning", frozenset({"input", "preferred_output", "non_preferred_output"}),
        read_openai, {"input": {"messages": [_USER]}, "preferred_output": [_GOOD], "non_preferred_output": [_BAD]},
    ),
    Form(
        "ShareGPT ranking", "LLaMA-Factory", _PREFERENCE | {"conversations"}, read_sharegpt_ranking,
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}},
        reads=frozenset({"system"}),
    ),
    Form(
        "Alpaca ranking", "LLaMA-Factory", _PREFERENCE | {"instruction"}, read_instruction,
        {"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5"},
        reads=SCORE_KEYS | {"input", "system"},
    ),
    Form(
        "Argilla's UltraFeedback", "argilla/ultrafeedback-binarized-preferences",
        frozenset({"instruction", "chosen_response", "rejected_response"}), read_argilla,
        {"instruction": "2 + 2?", "chosen_response": "4", "rejected_response": "5", "chosen_avg_rating": 5.0,
         "rejected_avg_rating": 1.0},
        reads=SCORE_KEYS | {"system"},
    ),
    Form(
        "Orca pairs", "Intel/orca_dpo_pairs", _PREFERENCE | {"question"}, read_question,
        {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
        reads=SCORE_KEYS | {"system"}, fits=lambda row: not row.get("prompt"),
    ),
    Form(
        "preference, explicit prompt", "TRL, UltraFeedback-binarized, orpo-dpo-mix, Tulu 3",
        _PREFERENCE | {"prompt"}, read_explicit, {"prompt": [_USER], "chosen": [_GOOD], "rejected": [_BAD]},
        reads=SCORE_KEYS | {"system"}, repeats=frozenset({"messages", "question"}),
    ),
    Form(
        "dialogue", "Anthropic's hh-rlhf", _PREFERENCE, read_dialogue,
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        fits=lambda row: all(isinstance(row[k], str) and row[k].startswith("\n\nHuman:") for k in _PREFERENCE),
    ),
    Form(
        "preference, implicit prompt", "TRL, trl-lib/ultrafeedback_binarized, Tulu 3", _PREFERENCE, read_implicit,
        {"chosen": [_USER, _GOOD], "rejected": [_USER, _BAD], "score_chosen": 8.0, "score_rejected": 3.0},
        reads=SCORE_KEYS, repeats=frozenset({"messages"}),
    ),
    Form(
        "unpaired preference", "TRL", frozenset({"prompt", "completion", "label"}), read_unpaired,
        {"prompt": "2 + 2?", "completion": "4", "label": True}, reads=frozenset({"system"}),
    ),
    Form(
        "labeled conversation", "ms-swift", frozenset({"messages", "label"}), read_labeled_conversation,
        {"messages": [_USER, _GOOD], "label": True},
    ),
    Form(
        "prompt and completion", "TRL, OpenAI", frozenset({"prompt", "completion"}), read_completion,
        {"prompt": "2 + 2?", "completion": "4"}, reads=frozenset({"system"}),
    ),
    Form(
        "ms-swift preference", "ms-swift", frozenset({"messages", "rejected_response"}), read_swift,
        {"messages": [_USER, _GOOD], "rejected_response": "5"},
    ),
    Form(
        "ShareGPT", "ShareGPT, LLaMA-Factory", frozenset({"conversations"}), read_sharegpt,
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        reads=frozenset({"system"}),
    ),
    Form(
        "Alpaca", "Stanford Alpaca", frozenset({"instruction", "output"}), read_alpaca,
        {"instruction": "Add.", "input": "2 + 2", "output": "4"}, reads=frozenset({"input", "system"}),
    ),
)  # fmt: skip
