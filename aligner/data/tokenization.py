"""Tokenization: chat templates, the boundary between prompt and response, end-of-response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from aligner.common.errors import ConfigError, RowError
from aligner.data.rows import Message, TextOrMessages


class ResponseTokenizer:
    """Tokenizer of prompts and responses; wraps a Hugging Face tokenizer or NeMo's `AutoTokenizer`.

    Strings are tokenized as they are: with a BOS if the tokenizer adds one, and an EOS unless the response already ends
    in a special token. The tokenizer's chat template renders messages, and with `apply_chat_template` strings too.
    """

    def __init__(self, tokenizer: Any, *, apply_chat_template: bool = False) -> None:
        self.hf = getattr(tokenizer, "tokenizer", tokenizer)
        self.apply_chat_template = apply_chat_template
        self.eos = self.hf.eos_token_id
        if self.eos is None:
            raise ConfigError("model.tokenizer: has no end-of-sequence token; a policy must learn where to stop")
        self.special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special} | {self.eos}
        # One call to the tokenizer itself disables padding and truncation that its file may enable.
        empty = self.hf("").input_ids
        self.bos = [i for i in empty if i == self.hf.bos_token_id and i != self.eos][:1]
        self.merged = 0

    def __call__(
        self, source: str, prompt: TextOrMessages, responses: Sequence[TextOrMessages]
    ) -> tuple[list[int], tuple[list[int], ...]]:
        """Return the tokens of the prompt and of each response.

        Raises:
            RowError: the chat template is missing, fails, or changes the prompt before a response; the responses are a
                string and a message; or the prompt has no tokens.
        """
        rendered = [self._render(source, prompt, response) for response in responses]
        prompt_text = rendered[0][0]
        if any(text != prompt_text for text, _ in rendered):
            raise RowError(f"{source}: one response is a string and one a message; write both the same way")
        ids = self._encode(prompt_text)
        response_ids = tuple(self._response(prompt_text, ids, text) for _, text in rendered)
        if self.bos and ids[:1] != self.bos:
            ids = self.bos + ids
        if not ids:
            raise RowError(f"{source}: the prompt has no tokens, so the first answer token cannot be scored")
        return ids, response_ids

    def encode_prompt(self, source: str, prompt: TextOrMessages) -> list[int]:
        """Return the tokens of a prompt without a response, equal to its tokens in training.

        Raises:
            RowError: see `__call__`.
        """
        # A placeholder response makes generation reject every prompt that training would reject.
        return self(source, prompt, ["a"] if isinstance(prompt, str) else [[{"role": "assistant", "content": "a"}]])[0]

    @property
    def stop_token_ids(self) -> set[int]:
        """Tokens that end a response: the end of sequence and, with a chat template, the end of a turn."""
        stop_ids = {self.eos}
        if self.hf.chat_template:
            prompt_and_response = [{"role": "user", "content": "a"}], [[{"role": "assistant", "content": "a"}]]
            stop_ids.add(self("chat template", *prompt_and_response)[1][0][-1])
        return stop_ids & self.special

    def _encode(self, text: str) -> list[int]:
        if self.hf.is_fast:
            # Same tokens as below; avoids 0.1 ms for a BatchEncoding.
            return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return self.hf(text, add_special_tokens=False).input_ids

    def _render(self, source: str, prompt: TextOrMessages, response: TextOrMessages) -> tuple[str, str]:
        """Return the text of the prompt, and the text of the response after it."""
        if isinstance(prompt, str) and isinstance(response, str) and not self.apply_chat_template:
            return prompt, response
        messages = _as_messages(prompt, "user")
        answer = _as_messages(response, "assistant")
        if not self.hf.chat_template:
            raise RowError(
                f"{source}: holds messages, but the tokenizer has no chat template; give strings with the "
                "template's tokens written out, or a tokenizer with a template"
            )
        try:
            prompt_text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            full_text = self.hf.apply_chat_template(messages + answer, tokenize=False)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages + answer)
            raise RowError(f"{source}: the chat template refuses these messages ({roles}): {error}") from None
        if not full_text.startswith(prompt_text):
            raise RowError(
                f"{source}: the chat template writes the prompt differently once an answer follows, so the "
                f"answer's tokens cannot be told apart: prompt {prompt_text[-80:]!r}, with answer {full_text[:400]!r}"
            )
        return prompt_text, full_text[len(prompt_text) :]

    def _response(self, prompt_text: str, prompt_ids: list[int], text: str) -> list[int]:
        sequence = self._encode(prompt_text + text)
        if sequence[: len(prompt_ids)] == prompt_ids:
            ids = sequence[len(prompt_ids) :]
        else:
            # A token across the boundary would belong to both prompt and response. The prompt's own tokens have
            # priority, as in generation.
            self.merged += 1
            ids = self._encode_continuation(text)
        return self._terminate(ids)

    def _encode_continuation(self, text: str) -> list[int]:
        """Tokenize text as a continuation: without the space that sentencepiece adds before the first word."""
        anchor = self._encode("\n")
        anchored = self._encode("\n" + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._encode(text)

    def _terminate(self, ids: list[int]) -> list[int]:
        """Remove blank text after the last special token; append an EOS if no special token ends the response."""
        last = max((i for i, token in enumerate(ids) if token in self.special), default=None)
        if last is None or self.hf.decode(ids[last + 1 :]).strip():
            return [*ids, self.eos]
        return ids[: last + 1]


def _as_messages(text: TextOrMessages, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
