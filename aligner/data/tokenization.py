"""From text to tokens: chat templates, the border between prompt and response, where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from aligner.common.errors import ConfigError, RowError
from aligner.data.rows import Message, TextOrMessages


class ResponseTokenizer:
    """Turns prompts and responses into tokens with a Hugging Face tokenizer held by NeMo's `AutoTokenizer`.

    Strings are text as it is: a BOS where the tokenizer itself would put one, an EOS after a response that does
    not already end in a special token. Messages, and with `apply_chat_template` strings too, go through the tokenizer's chat
    template.
    """

    def __init__(self, tokenizer: Any, *, apply_chat_template: bool = False) -> None:
        self.hf = getattr(tokenizer, "tokenizer", tokenizer)
        self.apply_chat_template = apply_chat_template
        self.eos = self.hf.eos_token_id
        if self.eos is None:
            raise ConfigError("model.tokenizer: has no end-of-sequence token; a policy must learn where to stop")
        self.special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special} | {self.eos}
        # Asking the tokenizer itself once switches off what padding and truncation its file may have set.
        empty = self.hf("").input_ids
        self.bos = [i for i in empty if i == self.hf.bos_token_id and i != self.eos][:1]
        self.merged = 0

    def __call__(
        self, source: str, prompt: TextOrMessages, responses: Sequence[TextOrMessages]
    ) -> tuple[list[int], tuple[list[int], ...]]:
        """The prompt's tokens, and those of each response to it.

        Raises:
            RowError: the chat template is missing, or does not continue the prompt with the response.
        """
        rendered = [self._render(source, prompt, response) for response in responses]
        prompt_text = rendered[0][0]
        if any(text != prompt_text for text, _ in rendered):
            raise RowError(f"{source}: one response is a string and one a message; write both the same way")
        ids = self._encode(prompt_text)
        answers = tuple(self._response(prompt_text, ids, text) for _, text in rendered)
        if self.bos and ids[:1] != self.bos:
            ids = self.bos + ids
        if not ids:
            raise RowError(f"{source}: the prompt has no tokens, so the first answer token cannot be scored")
        return ids, answers

    def encode_prompt(self, source: str, prompt: TextOrMessages) -> list[int]:
        """The tokens of a prompt that is still to be answered, the same as beside a response.

        Raises:
            RowError: see `__call__`.
        """
        # A template is shown an answer, too, so that what training could not use is refused before it is written.
        return self(source, prompt, ["a"] if isinstance(prompt, str) else [[{"role": "assistant", "content": "a"}]])[0]

    @property
    def stop_token_ids(self) -> set[int]:
        """Tokens that end an answer: the end of a sequence and, where there is a chat template, of a turn."""
        found = {self.eos}
        if self.hf.chat_template:
            turn = [{"role": "user", "content": "a"}], [[{"role": "assistant", "content": "a"}]]
            found.add(self("chat template", *turn)[1][0][-1])
        return found & self.special

    def _encode(self, text: str) -> list[int]:
        if self.hf.is_fast:
            # The same tokens without the tenth of a millisecond that wrapping them up takes.
            return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return self.hf(text, add_special_tokens=False).input_ids

    def _render(self, source: str, question: TextOrMessages, response: TextOrMessages) -> tuple[str, str]:
        """The prompt, and what follows it, as text."""
        if isinstance(question, str) and isinstance(response, str) and not self.apply_chat_template:
            return question, response
        messages = _messages(question, "user")
        answer = _messages(response, "assistant")
        if not self.hf.chat_template:
            raise RowError(
                f"{source}: holds messages, but the tokenizer has no chat template; give strings with the "
                "template's tokens written out, or a tokenizer with a template"
            )
        try:
            prompt = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            whole = self.hf.apply_chat_template(messages + answer, tokenize=False)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages + answer)
            raise RowError(f"{source}: the chat template refuses these messages ({roles}): {error}") from None
        if not whole.startswith(prompt):
            raise RowError(
                f"{source}: the chat template writes the prompt differently once an answer follows, so the "
                f"answer's tokens cannot be told apart: prompt {prompt[-80:]!r}, with answer {whole[:400]!r}"
            )
        return prompt, whole[len(prompt) :]

    def _response(self, prompt_text: str, alone: list[int], text: str) -> list[int]:
        rank_zero_first = self._encode(prompt_text + text)
        if rank_zero_first[: len(alone)] == alone:
            ids = rank_zero_first[len(alone) :]
        else:
            # A token across the border would have to be half prompt, half answer. The prompt's own tokens win,
            # as they do when the model generates.
            self.merged += 1
            ids = self._encode_alone(text)
        return self._end(ids)

    def _encode_alone(self, text: str) -> list[int]:
        """The text as a continuation: without the space that sentencepiece puts before a text's first word."""
        anchor = self._encode("\n")
        anchored = self._encode("\n" + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._encode(text)

    def _end(self, ids: list[int]) -> list[int]:
        """Cut what stands after the last special token if it is blank; without such a token add an EOS."""
        last = max((i for i, token in enumerate(ids) if token in self.special), default=None)
        if last is None or self.hf.decode(ids[last + 1 :]).strip():
            return [*ids, self.eos]
        return ids[: last + 1]


def _messages(text: TextOrMessages, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
