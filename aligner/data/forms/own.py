"""nemo-align's own forms, which are NeMo-Aligner's for pairs: every fault is refused, nothing is dropped."""

from __future__ import annotations

from aligner.common.errors import RowError
from aligner.data.forms.form import Form, Found, Options, Values, rewards
from aligner.data.forms.messages import NOTHING, answers, is_empty, parse_messages, template_arguments, text_of
from aligner.data.rows import DroppedRow, PreferenceRow, ResponseRow, shorten

REWARDS = (("chosen_reward", "rejected_reward"), ("chosen_score", "rejected_score"))


def read_pair(row: Values, source: str, options: Options) -> Found:
    """Return the pair of a row."""
    prompt = text_of(row, "prompt", source)
    chosen, rejected = (text_of(row, f"{side}_response", source, response=True) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError(
            f"{source}: chosen_response equals rejected_response ({shorten(chosen)}); a pair needs two different "
            "answers: drop the row",
            fault="same-answers",
        )
    return [
        PreferenceRow(source, prompt, chosen, rejected, *rewards(row, REWARDS, source), template_arguments(row, source))
    ]


def read_single(row: Values, source: str, options: Options) -> Found:
    """Return the single response of a row."""
    prompt, response = text_of(row, "prompt", source), text_of(row, "response", source, response=True)
    return [ResponseRow(source, prompt, response, _preference(row, source), template_arguments(row, source))]


def read_conversation(row: Values, source: str, options: Options) -> Found:
    """Return each answer of a conversation that does not have weight 0, after all messages before it."""
    if "messages" not in row:
        text_of(row, "messages", source)
    messages, template = parse_messages(row["messages"], "messages", source), template_arguments(row, source)
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise RowError(f"{source}: 'messages' has no assistant message after another, so there is nothing to learn")
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i and is_empty(message):
            raise RowError(f"{source}: messages[{i}] is an empty answer; drop the row or fill it in", fault="empty")
    found: Found = [ResponseRow(source, messages[:i], [messages[i]], None, template) for i in answers(messages)]
    return found or [DroppedRow(source, NOTHING)]


def _preference(row: Values, source: str) -> bool | None:
    value = row.get("preference")
    labels = {"chosen": True, "rejected": False}
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in labels:
        raise RowError(
            f"{source}: 'preference' must be 'chosen' or 'rejected' (or true or false), found {shorten(value)}"
        )
    return labels[value]


_PROMPT = {"prompt": "What is 2 + 2?"}
PAIR = Form(
    "pair",
    "nemo-align, NeMo-Aligner",
    frozenset({"prompt", "chosen_response", "rejected_response"}),
    read_pair,
    {**_PROMPT, "chosen_response": "4", "rejected_response": "5", "chosen_reward": 1.0, "rejected_reward": 0.0},
    reads=frozenset(name for names in REWARDS for name in names),
    repeats=frozenset({"chosen_key", "rejected_key"}),  # names of the responses in another file
)
SINGLE = Form(
    "single response",
    "nemo-align",
    frozenset({"prompt", "response"}),
    read_single,
    {**_PROMPT, "response": "4", "preference": "chosen"},
    reads=frozenset({"preference"}),
)
CONVERSATION = Form(
    "conversation",
    "OpenAI, TRL, Tulu 3 SFT",
    frozenset({"messages"}),
    read_conversation,
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]},
)
