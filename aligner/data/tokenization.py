"""Tokenization: chat templates, the boundary between prompt and response, end-of-response tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner.common.errors import ConfigError, RowError
from aligner.data.chat_template import MARK, PLAIN, ChatTemplate, Rendered, TemplateSettings, said
from aligner.data.rows import Message, TextOrMessages


@dataclass(frozen=True, slots=True)
class ResponseTokens:
    """Tokens of a response."""

    ids: list[int]
    unscored: list[int]
    """Positions in `ids` that are context: results of tools between two messages of the assistant's."""


class ResponseTokenizer:
    """Tokenizer of prompts and responses; wraps a Hugging Face tokenizer or NeMo's `AutoTokenizer`.

    Strings are tokenized as they are: with a BOS if the tokenizer adds one, and an EOS unless the response already ends
    in a special token. The tokenizer's chat template renders messages, and with `apply_chat_template` strings too.
    """

    def __init__(
        self, tokenizer: Any, *, apply_chat_template: bool = False, template: TemplateSettings = PLAIN
    ) -> None:
        self.hf = getattr(tokenizer, "tokenizer", tokenizer)
        self.eos = self.hf.eos_token_id
        if self.eos is None:
            raise ConfigError("model.tokenizer: has no end-of-sequence token; a policy must learn where to stop")
        self.special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special} | {self.eos}
        # One call to the tokenizer itself disables padding and truncation that its file may enable.
        empty = self.hf("").input_ids
        self.bos = [i for i in empty if i == self.hf.bos_token_id and i != self.eos][:1]
        self.merged = 0
        self.chat = ChatTemplate(self.hf, apply=apply_chat_template, settings=template)

    def __call__(
        self,
        source: str,
        prompt: TextOrMessages,
        responses: Sequence[TextOrMessages],
        template: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], tuple[list[int], ...]]:
        """Return the tokens of the prompt and of each response; `template` is what a row gives to its chat template.

        Raises:
            RowError: see `tokens`.
        """
        ids, found = self.tokens(source, prompt, responses, template)
        return ids, tuple(response.ids for response in found)

    def tokens(
        self,
        source: str,
        prompt: TextOrMessages,
        responses: Sequence[TextOrMessages],
        template: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], tuple[ResponseTokens, ...]]:
        """Return the tokens of the prompt and of each response, with those that are not scored.

        Raises:
            RowError: the chat template is missing, fails, has no place for a key of a message, or changes the prompt
                before a response; the responses are a string and a message; or the prompt has no tokens.
        """
        rendered = [self.chat.render(source, prompt, response, dict(template or {})) for response in responses]
        prompt_text = rendered[0].prompt
        if any(one.prompt != prompt_text for one in rendered):
            raise RowError(f"{source}: one response is a string and one a message; write both the same way")
        ids = self._encode(prompt_text)
        found = tuple(self._response(source, ids, one) for one in rendered)
        # A template writes the beginning of a text itself, where its model was trained with one.
        if self.bos and ids[:1] != self.bos and not rendered[0].templated:
            ids = self.bos + ids
        if not ids:
            raise RowError(f"{source}: the prompt has no tokens, so the first answer token cannot be scored")
        return ids, found

    def encode_prompt(
        self, source: str, prompt: TextOrMessages, template: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the tokens of a prompt without a response, equal to its tokens in training.

        Raises:
            RowError: see `tokens`.
        """
        # A placeholder response makes generation reject every prompt that training would reject.
        thought = self.chat.opening(source, prompt, dict(template or {}))
        placeholder: TextOrMessages = f"{thought}a" if isinstance(prompt, str) else [said(f"{thought}a")]
        return self(source, prompt, [placeholder], template)[0]

    @property
    def stop_token_ids(self) -> set[int]:
        """Tokens that end a response: the end of sequence and, with a chat template, the end of a turn."""
        stop_ids = {self.eos}
        if self.hf.chat_template:
            prompt: list[Message] = [{"role": "user", "content": "a"}]
            end = self.chat.apply("chat template", [*prompt, said(MARK)], {}).rpartition(MARK)[2]
            stop_ids |= set([token for token in self._encode(end) if token in self.special][:1])
        return stop_ids

    def template_begins_with_bos(self) -> bool:
        """Return whether the chat template writes the tokenizer's BOS token before a conversation."""
        text = self.chat.apply("chat template", [{"role": "user", "content": "a"}], {}, add_generation_prompt=True)
        return self._encode(text)[:1] == self.bos

    def _encode(self, text: str) -> list[int]:
        if self.hf.is_fast:
            # Same tokens as below; avoids 0.1 ms for a BatchEncoding.
            return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return self.hf(text, add_special_tokens=False).input_ids

    def _response(self, source: str, prompt_ids: list[int], rendered: Rendered) -> ResponseTokens:
        sequence = self._encode(rendered.prompt + rendered.response)
        if sequence[: len(prompt_ids)] == prompt_ids:
            ids = self._terminate(sequence[len(prompt_ids) :])
            return ResponseTokens(ids, self._unscored(source, rendered, len(prompt_ids), len(ids)))
        if rendered.scored:
            raise RowError(f"{source}: the response begins inside a token of the prompt, and has several messages")
        # A token across the boundary would belong to both prompt and response. The prompt's own tokens have
        # priority, as in generation.
        self.merged += 1
        return ResponseTokens(self._terminate(self._encode_continuation(rendered.response)), [])

    def _unscored(self, source: str, rendered: Rendered, first: int, count: int) -> list[int]:
        """Return the tokens of a response that begin outside the parts that are scored."""
        if not rendered.scored:
            return []
        if not self.hf.is_fast:
            raise RowError(
                f"{source}: the response has several messages, which only a fast tokenizer (tokenizer.json) can tell "
                "apart"
            )
        text = rendered.prompt + rendered.response
        encoding = self.hf.backend_tokenizer.encode(text, add_special_tokens=False)
        begins = [begin - len(rendered.prompt) for begin, _ in encoding.offsets[first : first + count]]
        return [i for i, at in enumerate(begins) if not any(begin <= at < end for begin, end in rendered.scored)]

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
