"""The fingerprints of a student's tokenizer and chat template, from their files alone.

A tokenizer.json says which token has which id; reading it needs no tokenizer package.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softlabels.errors import BadInputError, one_line
from softlabels.fingerprint import sha256_bytes, sha256_vocabulary

NAME = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


def tokenizer_sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of the map of tokens to ids, added tokens included, as captures record it.

    Args:
        path: a tokenizer.json, or a folder with one.

    Raises:
        BadInputError: there is none, or it is not the JSON of a tokenizer.
    """
    return sha256_vocabulary(vocabulary(path))


def vocabulary(path: str | os.PathLike[str]) -> dict[str, int]:
    """The id of every token; arguments and errors as `tokenizer_sha256`."""
    file = Path(path)
    if file.is_dir():
        file = file / NAME
    if not file.is_file():
        raise BadInputError(
            f"tokenizer: there is no {str(file)!r}; expected a {NAME} or a folder with one, which "
            "save_pretrained of a fast tokenizer writes"
        )
    try:
        return _tokens(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise BadInputError(f"tokenizer: {str(file)!r} is no {NAME}: {reason}") from error


def template_sha256(path: str) -> str:
    """The sha256 of a chat template's text, as captures record it.

    Raises:
        BadInputError: the file cannot be read.
    """
    try:
        return sha256_bytes(Path(path).read_text(encoding="utf-8").encode())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"chat_template: cannot read {path!r}: {one_line(error)}") from error


def own_template_sha256(folder: str) -> str | None:
    """The same of the template that a folder brings; None where it brings none, or several.

    Raises:
        BadInputError: its file cannot be read.
    """
    own = Path(folder) / _TEMPLATE
    if own.is_file():
        return template_sha256(str(own))
    try:
        config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
        template = config.get("chat_template")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInputError(f"tokenizer: cannot read {folder}/{_CONFIG}: {error}") from error
    return sha256_bytes(template.encode()) if isinstance(template, str) else None


def _tokens(data: Mapping[str, Any]) -> dict[str, int]:
    known = data["model"]["vocab"]
    if isinstance(known, list):  # Unigram: [token, score] in order of id
        known = {token: index for index, (token, _) in enumerate(known)}
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    return {str(token): int(index) for token, index in {**known, **added}.items()}
