"""Forms with ratings or ranks of several responses: pairs are made of them, ties are dropped and counted."""

from __future__ import annotations

import json
from typing import Any

from aligner.common.errors import RowError
from aligner.data.forms.form import Form, Found, Options, Values, answer_of, number, pair, prompt_of, ranked, truth
from aligner.data.forms.messages import parse_messages
from aligner.data.forms.preference import SPEAKERS, TURN
from aligner.data.rows import DroppedRow, TextOrMessages, shorten

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SIDES = {"model_a": 0, "model_b": 1, "a": 0, "b": 1}
TIES = ("tie", "tie (bothbad)", "both_bad", "tie_bothbad")


def read_helpsteer(row: Values, source: str, options: Options) -> Found:
    """Two or more consecutive rows of one prompt, each a response with attributes: helpfulness decides."""
    answers = []
    for one in row["rows"]:
        rating = number(one, "helpfulness", source)
        if rating is None:
            raise RowError(f"{source}: 'helpfulness' is null, so the response cannot be ranked")
        answers.append((-rating, answer_of(one["response"], "response", source)))
    return ranked(source, prompt_of(row["rows"][0], "prompt", source), answers, {}, options)


def read_strength(row: Values, source: str, options: Options) -> Found:
    """response_1, response_2, preference_strength or overall_preference: positive prefers the second."""
    key = "preference_strength" if "preference_strength" in row else "overall_preference"
    strength = number(row, key, source)
    if strength is None:
        raise RowError(f"{source}: {key!r} is null, so neither response is preferred")
    return _two(row, source, ("response_1", "response_2"), None if strength == 0 else int(strength > 0))


def read_shp(row: Values, source: str, options: Options) -> Found:
    """history, human_ref_A, human_ref_B, labels: 1 prefers A, 0 prefers B."""
    return _two(row, source, ("human_ref_A", "human_ref_B"), int(not truth(row, "labels", source)))


def read_arena(row: Values, source: str, options: Options) -> Found:
    """conversation_a, conversation_b, winner: two whole conversations."""
    side = _winner(row["winner"], source)
    if side is None:
        return [DroppedRow(source, "with a tie")]
    both = [parse_messages(row[f"conversation_{name}"], f"conversation_{name}", source) for name in ("a", "b")]
    count = len(both[0]) - 1
    if both[0][:-1] != both[1][:-1] or not count:
        return [DroppedRow(source, "with dialogues that differ before their last answer")]
    return pair(source, both[0][:-1], both[side][-1:], both[1 - side][-1:], row)


def read_arena_prompt(row: Values, source: str, options: Options) -> Found:
    """prompt, response_a, response_b, and who won: `winner`, or winner_model_a, winner_model_b and winner_tie."""
    if "winner" in row:
        side = _winner(row["winner"], source)
    else:
        won = [truth(row, f"winner_{name}", source) for name in ("model_a", "model_b", "tie")]
        if sum(won) != 1:
            raise RowError(f"{source}: exactly one of winner_model_a, winner_model_b and winner_tie must be 1")
        side = None if won[2] else int(won[1])
    prompt, *responses = [_turns(row[key], key, source) for key in ("prompt", "response_a", "response_b")]
    if side is None:
        return [DroppedRow(source, "with a tie")]
    if not len(prompt) == len(responses[0]) == len(responses[1]):
        raise RowError(f"{source}: prompt, response_a and response_b must have as many turns")
    if len(prompt) > 1 and responses[0][:-1] != responses[1][:-1]:
        return [DroppedRow(source, "with dialogues that differ before their last answer")]
    earlier = [
        {"role": role, "content": text}
        for turn in zip(prompt[:-1], responses[0][:-1], strict=True)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages = [*earlier, {"role": "user", "content": prompt[-1]}]
    chosen, rejected = ([{"role": "assistant", "content": responses[i][-1]}] for i in (side, 1 - side))
    return pair(source, messages, chosen, rejected, row)


def read_ranks(row: Values, source: str, options: Options) -> Found:
    """context, completions with ranks, of which 0 is best: NeMo-RL's form."""
    prompt = parse_messages(row["context"], "context", source)
    return ranked(source, prompt, _answers(row, "completions", "rank", "completion", source), row, options)


def read_nectar(row: Values, source: str, options: Options) -> Found:
    """prompt, answers with ranks, of which 1 is best: Nectar's form; the prompt is a dialogue as text."""
    return ranked(source, _nectar_prompt(row, source), _answers(row, "answers", "rank", "answer", source), row, options)


def read_ultrafeedback(row: Values, source: str, options: Options) -> Found:
    """instruction, completions with overall_score: UltraFeedback as it was published."""
    scored = _answers(row, "completions", "overall_score", "response", source)
    answers = [(-score, answer) for score, answer in scored]
    return ranked(source, prompt_of(row, "instruction", source), answers, row, options)


def _answers(row: Values, key: str, number_key: str, text_key: str, source: str) -> list[tuple[float, TextOrMessages]]:
    """Return the numbers and the responses of a list of objects."""
    found = []
    for i, item in enumerate(_items(row, key, source)):
        value = number(item, number_key, source)
        if value is None or text_key not in item:
            raise RowError(f"{source}: {key}[{i}]: expected {number_key!r} and {text_key!r}, found {shorten(item)}")
        found.append((value, answer_of(item[text_key], f"{key}[{i}]", source)))
    return found


def _two(row: Values, source: str, keys: tuple[str, str], better: int | None) -> Found:
    """Return the pair of two responses, of which the one at `better` is preferred."""
    prompt: str = next(key for key in ("prompt", "context", "history") if row.get(key))
    responses = [answer_of(row[key], key, source) for key in keys]
    if better is None:
        return [DroppedRow(source, "with a tie")]
    return pair(source, prompt_of(row, prompt, source), responses[better], responses[1 - better], row)


def _winner(value: Any, source: str) -> int | None:
    if isinstance(value, str) and value in TIES:
        return None
    if not isinstance(value, str) or value not in SIDES:
        raise RowError(f"{source}: 'winner' must be one of {', '.join([*SIDES, *TIES])}, found {shorten(value)}")
    return SIDES[value]


def _turns(value: Any, key: str, source: str) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    turns: Any = [value] if isinstance(value, str) else value
    if isinstance(turns, list):
        turns = ["" if turn is None else turn for turn in turns]  # an answer that did not come
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise RowError(f"{source}: {key!r} must be a text or a list of texts, found {shorten(value)}")
    return turns


def _items(row: Values, key: str, source: str) -> list[Values]:
    items = row[key]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise RowError(f"{source}: {key!r} must be a list of objects, found {shorten(items)}")
    return items


def _nectar_prompt(row: Values, source: str) -> Any:
    text: Any = row["prompt"]
    before, *turns = TURN.split(text) if isinstance(text, str) else [""]
    if not turns or before.strip():
        return prompt_of(row, "prompt", source)
    messages = [
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    # The text ends with an empty turn of the assistant's, which the answers are.
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _objects(*keys: str) -> Any:
    return lambda row: all(isinstance(row[k], list) and row[k] and isinstance(row[k][0], dict) for k in keys)


_PROMPT = {"prompt": "2 + 2?"}
_CONVERSATIONS = {
    f"conversation_{name}": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": text}]
    for name, text in (("a", "4"), ("b", "5"))
}
FORMS = (
    Form(
        "arena conversations", "lmsys/chatbot_arena_conversations",
        frozenset({"conversation_a", "conversation_b", "winner"}), read_arena, {**_CONVERSATIONS, "winner": "model_a"},
    ),
    Form(
        "arena pairs", "lmarena preference data", frozenset({"prompt", "response_a", "response_b"}), read_arena_prompt,
        {**_PROMPT, "response_a": "4", "response_b": "5", "winner": "model_a"},
        reads=frozenset({"winner", "winner_model_a", "winner_model_b", "winner_tie"}),
        fits=lambda row: "winner" in row or "winner_model_a" in row,
    ),
    Form(
        "preference strength", "HelpSteer2 preference",
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}), read_strength,
        {**_PROMPT, "response_1": "5", "response_2": "4", "preference_strength": 2},
        repeats=frozenset({"preference_statement", "preference_elaboration", "three_most_similar_preferences",
                           "all_preferences_unprocessed"}),
    ),
    Form(
        "overall preference", "HelpSteer3", frozenset({"context", "response1", "response2", "overall_preference"}),
        lambda row, source, options: read_strength(
            {**row, "response_1": row["response1"], "response_2": row["response2"]}, source, options
        ),
        {"context": [{"role": "user", "content": "2 + 2?"}], "response1": "5", "response2": "4",
         "overall_preference": 2},
        repeats=frozenset({"individual_preference"}),
    ),
    Form(
        "attributes", "HelpSteer, HelpSteer2", frozenset({"prompt", "response", "helpfulness"}), read_helpsteer,
        [{**_PROMPT, "response": text, **dict.fromkeys(ATTRIBUTES, score)} for text, score in (("4", 4), ("5", 1))],
        reads=frozenset(ATTRIBUTES), together="prompt",
    ),
    Form(
        "two human answers", "stanfordnlp/SHP", frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        read_shp,
        {"history": "2 + 2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1, "score_A": 12, "score_B": 3},
        repeats=frozenset({"score_A", "score_B", "score_ratio", "upvote_ratio"}),
    ),
    Form(
        "ranked completions", "NeMo-RL", frozenset({"context", "completions"}), read_ranks,
        {"context": [{"role": "user", "content": "2 + 2?"}],
         "completions": [{"rank": 0, "completion": [{"role": "assistant", "content": "4"}]},
                         {"rank": 1, "completion": [{"role": "assistant", "content": "5"}]}]},
        fits=_objects("completions"),
    ),
    Form(
        "ranked answers", "berkeley-nest/Nectar", frozenset({"prompt", "answers"}), read_nectar,
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ",
         "answers": [{"answer": "4", "rank": 1.0}, {"answer": "5", "rank": 2.0}]},
        fits=_objects("answers"),
    ),
    Form(
        "scored completions", "openbmb/UltraFeedback", frozenset({"instruction", "completions"}), read_ultrafeedback,
        {"instruction": "2 + 2?",
         "completions": [{"response": "4", "overall_score": 9}, {"response": "5", "overall_score": 2}]},
        repeats=frozenset({"correct_answers", "incorrect_answers"}), fits=_objects("completions"),
    ),
)  # fmt: skip
