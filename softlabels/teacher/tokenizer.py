"""Tokenizers of Hugging Face: from a folder, a hub repository, a tokenizer.json or a .gguf file."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError, MismatchError, one_line
from softlabels.fingerprint import sha256_bytes, sha256_json, sha256_vocabulary
from softlabels.teacher.spec import SequenceCaptureSpec

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
"""Who may speak in a chat. Many templates write any other name as well, and a data set whose
assistant is called "gpt" would train on nothing."""

_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")


class ChatError(Exception):
    """A chat that cannot be rendered: it is left out, and counted by `reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and what makes it the same or another.

    Attributes:
        name: where it came from, for messages.
        sha256: of its token-to-id map, added tokens included; what lineage holds.
        digest: of all that decides how it cuts text: merges, normalisation, special tokens. Two
            tokenizers of one sha256 may differ in it.
        num_ids: V, its largest id plus one.
        end_id: of the end-of-text token; None where it names none.
        mask_id: of the mask token; None where it names none.
        special_ids: int32, rising, tokens that are no text.
        ends: whether its own encoding of a text ends with a special token.
        chat_template: Jinja text; None where chats are not asked for.
        model: the Hugging Face object, `PreTrainedTokenizerBase`.
    """

    name: str
    sha256: str
    digest: str
    num_ids: int
    end_id: int | None
    mask_id: int | None
    special_ids: Ids
    ends: bool
    chat_template: str | None
    model: Any

    @property
    def chat_template_sha256(self) -> str | None:
        """The sha256 of the chat template's text, where there is one."""
        return None if self.chat_template is None else sha256_bytes(self.chat_template.encode())

    def encode(self, texts: Sequence[str], end: bool = False) -> list[Ids]:
        """Token ids of each text, int32 [L], with the special tokens that it adds by itself.

        Args:
            texts: valid Unicode.
            end: add the end-of-text token where it adds none by itself.
        """
        found = self.model.backend_tokenizer.encode_batch_fast(list(texts))
        close = [self.end_id] if end and not self.ends else []
        return [np.array(encoding.ids + close, np.int32) for encoding in found]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], assistant_only: bool, place: str = "a chat"
    ) -> tuple[Ids, Flags]:
        """Token ids of a rendered chat, int32 [L], and which of them are to be predicted, [L].

        All are, or the assistant's: what the template marks by `{% generation %}`, else what each
        assistant message adds to the chat before it, up to the token that ends the turn.

        Raises:
            ChatError: this chat is malformed, or the template refuses it.
            BadInputError: the template has no marks, and what it writes for the first messages
                is not how it begins the whole chat, so that no one can say which tokens are whose.
        """
        _check_messages(messages)
        if not assistant_only:
            encoding = self._encode_rendered(self._render(messages))
            return np.array(encoding.ids, np.int32), np.ones(len(encoding.ids), bool)
        assert self.chat_template is not None
        if _GENERATION.search(self.chat_template):
            ids, flags = self._marked(messages)
        else:
            ids, flags = self._derived(messages, place)
        return ids, self._with_end_of_turn(ids, flags)

    def _marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Ids, Flags]:
        self._render(messages)  # for its errors, and its check of the text
        found = self.model.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = np.array(found["input_ids"], np.int32)
        return ids, np.array(found["assistant_masks"], bool)

    def _derived(self, messages: Sequence[Mapping[str, Any]], place: str) -> tuple[Ids, Flags]:
        whole = self._render(messages)
        encoding = self._encode_rendered(whole)
        ids = np.array(encoding.ids, np.int32)
        flags = np.zeros(len(ids), bool)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ChatError("chat that begins with the assistant")
            before = self._render(messages[:number], add_generation_prompt=True)
            if before == self._render(messages[:number]):
                raise BadInputError(
                    "loss_on: assistant: the chat template does not heed add_generation_prompt, so "
                    f"the assistant's tokens cannot be told from their heading in {place}: give a "
                    "chat_template that marks them by {% generation %}"
                )
            after = self._render(messages[: number + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise BadInputError(
                    f"loss_on: assistant: the chat template writes message {number + 1} of {place} "
                    "otherwise when it stands alone than in the whole chat, so its tokens cannot "
                    "be told apart: give a chat_template that marks them by {% generation %}"
                )
            flags |= self._turn(ids, (starts >= len(before)) & (starts < len(after)))
        return ids, flags

    def _turn(self, ids: Ids, turn: Flags) -> Flags:
        # After its end of turn a template breaks the line: no model writes that.
        at = np.flatnonzero(turn)
        ends = at[np.isin(ids[at], self.special_ids)]
        if ends.size and not self._text(ids[ends[-1] + 1 : at[-1] + 1]).strip():
            turn = turn.copy()
            turn[ends[-1] + 1 :] = False
        return turn

    def _with_end_of_turn(self, ids: Ids, flags: Flags) -> Flags:
        # Some templates leave the end-of-turn token outside of their marks; a student that is
        # never taught it does not stop.
        special = np.isin(ids, self.special_ids)
        found = flags.copy()
        found[1:] |= special[1:] & flags[:-1] & ~special[:-1]
        return found

    def _text(self, ids: Ids) -> str:
        return str(self.model.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        try:
            text = self.model.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except ImportError as error:
            raise BadInputError(f"chat templates need jinja2: {one_line(error)}") from error
        except Exception as error:
            # Templates refuse what they do not know, and may fail in any other way.
            raise ChatError("chat template failed", one_line(error)) from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError("invalid UTF-8") from error
        return str(text)

    def _encode_rendered(self, text: str) -> Any:
        # A template writes its special tokens itself.
        return self.model.backend_tokenizer.encode(text, add_special_tokens=False)


def tokenizer_of(spec: SequenceCaptureSpec) -> Tokenizer:
    """The tokenizer that a capture's text is cut with, and its chat template where it has chats.

    Raises:
        BadInputError: it cannot be loaded, or there are chats and no template.
        MismatchError: the model's folder has another.
    """
    teacher, source = spec.teacher, spec.source
    if teacher.tokenizer is not None:
        tokenizer = load_tokenizer(teacher.tokenizer)  # the revision is the model's
        _require_own(tokenizer, teacher.model)
    else:
        tokenizer = load_tokenizer(teacher.model, teacher.revision)
    if source.messages is None:
        return tokenizer
    return with_chat_template(tokenizer, source.chat_template)


def _require_own(tokenizer: Tokenizer, model: str) -> None:
    if not os.path.isfile(os.path.join(model, "tokenizer.json")):
        return
    own = load_tokenizer(model)
    if own.sha256 != tokenizer.sha256:
        raise MismatchError(
            f"tokenizers differ: teacher.tokenizer {tokenizer.name!r} has sha256 "
            f"{tokenizer.sha256!r}, that of model {model!r} has {own.sha256!r}: the model would "
            "read other words"
        )


def load_tokenizer(path: str, revision: str = "") -> Tokenizer:
    """The tokenizer in a folder, a tokenizer.json, a .gguf file or a hub repository.

    A .gguf file has all tokens and merges, yet names its pre-tokenisation only by a word that
    transformers passes over: SmolLM2's then differs in 0.16 % of the tokens of a manual, at
    white space before digits. Where the original tokenizer is at hand, name that.

    Args:
        path: of it. No code of a repository is ever run.
        revision: of a hub repository; elsewhere it means nothing.

    Raises:
        BadInputError: there is none, or none that is fast (made of the `tokenizers` library).
    """
    model = _load(path, revision)
    if not getattr(model, "is_fast", False):
        raise BadInputError(
            f"tokenizer {path!r} is a {type(model).__name__}, which the tokenizers library does "
            "not run: expected one with a tokenizer.json"
        )
    # A tokenizer.json may hold a truncation, which would cut documents without a word.
    model.backend_tokenizer.no_truncation()
    model.backend_tokenizer.no_padding()
    model.model_max_length = 10**30  # lengths are the spec's business: no warnings of long texts
    vocabulary = model.backend_tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise BadInputError(f"tokenizer {path!r} has no tokens")
    sample = model.backend_tokenizer.encode("a")
    whole = json.loads(model.backend_tokenizer.to_str())
    end, mask = model.eos_token_id, model.mask_token_id
    special = np.unique(np.array(model.all_special_ids, np.int32))
    return Tokenizer(
        name=path,
        sha256=sha256_vocabulary(vocabulary),
        digest=sha256_json([whole, end, mask, special.tolist()]),
        num_ids=max(vocabulary.values()) + 1,
        end_id=end,
        mask_id=mask,
        special_ids=special,
        ends=bool(sample.special_tokens_mask and sample.special_tokens_mask[-1]),
        chat_template=None,
        model=model,
    )


def with_chat_template(tokenizer: Tokenizer, path: str | None = None) -> Tokenizer:
    """`tokenizer` with a Jinja template: the one in the file `path`, or its own.

    Raises:
        BadInputError: there is none, or it writes the date of the day.
    """
    if path is not None:
        try:
            template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = one_line(error)
            raise BadInputError(f"chat_template {path!r} cannot be read: {reason}") from error
    else:
        try:
            template = tokenizer.model.get_chat_template()
        except ValueError as error:
            raise BadInputError(
                f"tokenizer {tokenizer.name!r} has no chat template to render messages with: "
                "give source.chat_template, a file"
            ) from error
    if "strftime_now" in template:
        raise BadInputError(
            f"the chat template of {path or tokenizer.name!r} writes today's date (strftime_now): "
            "the same chat would be other tokens tomorrow; give source.chat_template, a copy "
            "with a fixed date"
        )
    return Tokenizer(**{**vars(tokenizer), "chat_template": template})


def _load(path: str, revision: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BadInputError(
            f"tokenizers need the extra softlabels[hf]: {one_line(error)}"
        ) from error
    library: Any = transformers
    local = Path(path)
    options: dict[str, Any] = {"trust_remote_code": False, "use_fast": True}
    with _quiet():
        try:
            if path.endswith(".gguf"):
                options["gguf_file"] = local.name
                return library.AutoTokenizer.from_pretrained(str(local.parent), **options)
            if path.endswith(".json"):
                beside = (local.parent / "tokenizer_config.json").is_file()
                if local.name != "tokenizer.json" or not beside:
                    return library.PreTrainedTokenizerFast(tokenizer_file=path)
                local = local.parent
            if local.is_dir():
                return library.AutoTokenizer.from_pretrained(str(local), **options)
            return library.AutoTokenizer.from_pretrained(
                path, revision=revision or "main", **options
            )
        except Exception as error:
            # Whatever a damaged file makes of the loader: what was asked for is what matters.
            reason = one_line(f"{type(error).__name__}: {error}")
            raise BadInputError(f"cannot load the tokenizer of {path!r}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    logging: Any = transformers.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ChatError("chat without messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError("malformed chat", f"message {number} has no role")
        if message["role"] not in ROLES:
            raise ChatError("unknown role", f"{message['role']!r} in message {number}")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise ChatError("malformed chat", f"message {number} has no content")
