"""What the readers of all layouts are given, and how a record's prompt becomes tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from softlabels.errors import one_line
from softlabels.teacher.recorded.entries import (
    BadRecordError,
    Recording,
    list_of,
    number,
    token_ids,
)
from softlabels.teacher.recorded.files import Files
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.recorded.vocabulary import TokenMap
from softlabels.teacher.tokenizer import Tokenizer, with_chat_template

Read = Callable[[Mapping[str, Any]], list[Recording]]


@dataclass
class Context:
    """One import: its spec, its files and the teacher's tokenizer.

    Attributes:
        chat_template_sha256: of the template that prompts were rendered with, once one was.
        compression_sha256: of DistillKit's settings, once they were read.
    """

    spec: ImportSpec
    files: Files
    tokenizer: Tokenizer
    chat_template_sha256: str | None = None
    compression_sha256: str | None = None

    @cached_property
    def tokens(self) -> TokenMap:
        """From token strings to ids."""
        return TokenMap(self.tokenizer, self.spec.tokens)

    @cached_property
    def _templated(self) -> Tokenizer:
        return with_chat_template(self.tokenizer, self.spec.chat_template)

    def name(self, record: Mapping[str, Any]) -> str | None:
        """The record's stable key, where the spec says in which field it is."""
        if self.spec.example_id is None:
            return None
        value = record.get(self.spec.example_id)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise BadRecordError(
                "record without an example id", f"{self.spec.example_id!r} is {value!r:.80}"
            )
        return _whole(str(value))

    def render(self, messages: Any, opening: bool) -> str:
        """A chat as text; `opening`: with the beginning of the assistant's turn."""
        tokenizer = self._templated
        messages = list_of(messages, "messages")
        try:
            text = tokenizer.model.apply_chat_template(
                messages,
                chat_template=tokenizer.chat_template,
                tokenize=False,
                add_generation_prompt=opening,
            )
            text.encode()
        except Exception as error:
            # Templates refuse what they do not know, and may fail in any other way.
            raise BadRecordError("chat that the template refuses", one_line(error)) from error
        self.chat_template_sha256 = tokenizer.chat_template_sha256
        return str(text)

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; `special`: with those that the tokenizer adds by itself."""
        backend = self.tokenizer.model.backend_tokenizer
        _whole(text)
        return list(backend.encode(text, add_special_tokens=special).ids)

    def prompt(self, request: Mapping[str, Any], answer: Mapping[str, Any]) -> list[int]:
        """The tokens before a completion; none where the record does not hold them.

        Args:
            request: what may hold messages or prompt.
            answer: what may hold prompt_token_ids, and usage.prompt_tokens to check them by.
        """
        if not self.spec.prompts:
            return []
        ids = answer.get("prompt_token_ids") or request.get("prompt_token_ids")
        if ids is not None:
            return token_ids(ids, "prompt_token_ids")
        if request.get("messages") is not None:
            found = self.encode(self.render(request["messages"], opening=True), special=False)
        elif isinstance(request.get("prompt"), str):
            found = self.encode(request["prompt"], special=True)
        elif request.get("prompt"):
            found = token_ids(request["prompt"], "prompt")
        else:
            return []
        usage = answer.get("usage")
        said = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if said is not None and said != len(found):
            raise BadRecordError(
                "record whose prompt has another number of tokens than its usage says",
                f"{len(found)} tokens, usage.prompt_tokens is {said!r} (prompts: false leaves "
                "prompts out)",
            )
        return found

    def require_temperature(self, *holders: Any) -> None:
        """Refuses a record of processed values whose request says another temperature or top_p."""
        if self.spec.scale == "raw":
            return
        for holder in holders:
            for name, wanted in (("temperature", 1.0), ("top_p", 1.0)):
                value = holder.get(name) if isinstance(holder, Mapping) else None
                if value is not None and number(value, name) != wanted:
                    raise BadRecordError(
                        f"record of processed values at another {name}",
                        f"expected {name} {wanted!r}, found {value!r}",
                    )


def _whole(text: str) -> str:
    """`text`, unless it holds half characters, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError("record whose text is not UTF-8", one_line(error)) from error
    return text
