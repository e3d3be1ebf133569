"""Conversations: read from data, kept as text that a person can open, rendered with the base's own chat template.

    [
    {"role":"user","content":"What is a larva?"},
    {"role":"assistant","content":"An animal before its metamorphosis."}
    ]

That is the text of a document of a chat domain: JSON, one message a line, equal conversations in equal bytes. Which domains
are chats stands in the genome's recipe.

A model learns what the assistant says, and when it ends its turn, from everything that stands before it. Where the template
marks that with ``{% generation %}``, the marks decide; else what the rendering grows by when the assistant has spoken.
Templates are run by transformers in a sandbox; nothing else of a base's folder is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeError, ModelError
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.tokenizer import byte_counts

ROLES = ("system", "user", "assistant")
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHAPE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'

Message = Mapping[str, str]
Encoded = tuple[NDArray[np.uint32], NDArray[np.bool_]]  # ids of a document, and which of them are learned


# reading ------------------------------------------------------------------------------------------------------------


def conversation_text(value: Any, where: str) -> str:
    """The document text of a list of messages as data holds it. Raises GenomeError naming `where` for anything else."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise GenomeError(f"{where}: a list of messages is wanted, this is {found}", SHAPE)
    messages = [_message(entry, f"{where}: message {place}") for place, entry in enumerate(value, start=1)]
    speakers = [message["role"] for message in messages]
    if "assistant" not in speakers:
        raise GenomeError(f"{where}: the assistant never speaks: there is nothing to learn", "leave the conversation out")
    if speakers[0] == "assistant":
        raise GenomeError(f"{where}: the assistant speaks first, in answer to nobody", "begin with a system or user message")
    lines = ",\n".join(json.dumps(message, ensure_ascii=False, separators=(",", ":")) for message in messages)
    return f"[\n{lines}\n]"


def _message(entry: Any, where: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise GenomeError(f"{where} is {type(entry).__name__}, not an object with role and content", SHAPE)
    given = {key: value for key, value in entry.items() if value is not None}
    if {"from", "value"} <= given.keys():
        remedy = "write role and content; human is user, gpt is assistant"
        raise GenomeError(f"{where} has 'from' and 'value', as ShareGPT writes it", remedy)
    if not isinstance(given.get("role"), str) or given["role"] not in ROLES:
        raise GenomeError(f"{where} has the role {given.get('role')!r}", f"roles are {', '.join(ROLES)}")
    content = given.get("content")
    if not isinstance(content, str) or not content.strip():
        found = "empty" if isinstance(content, str) or content is None else f"{type(content).__name__}, not text"
        raise GenomeError(f"{where} ({given['role']}): its content is {found}", "write text, or leave the conversation out")
    if more := sorted(str(key) for key in given.keys() - {"role", "content"}):
        raise GenomeError(f"{where} has {more} beside role and content", "leave them out: they would be lost")
    return {"role": given["role"], "content": content}


def messages_of(document: Document) -> list[dict[str, str]]:
    """The messages of a document of a chat domain."""
    return json.loads(document.text)


def as_plain_text(document: Document) -> str:
    """A conversation as people write one down."""
    return "".join(f"{message['role']}:\n{message['content']}\n" for message in messages_of(document))


# rendering ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTokenizer:
    """A base's tokenizer with a chat template. `source` is where that comes from: the base's folder, or a file."""

    tokenizer: Any
    template: str
    source: Path

    @property
    def sha256(self) -> str:
        """Of the template: beside the tokenizer it decides what a conversation is in tokens."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def encode(self, documents: Iterable[Document]) -> list[Encoded]:
        """Ids of every conversation, and which are learned. Raises GenomeError for one that the template cannot render."""
        encode_one = self._by_marks if MARK.search(self.template) else self._by_growth
        found = []
        for document in documents:
            messages = messages_of(document)
            self._check_text(messages, document.path)
            found.append(encode_one(messages, document.path))
        return found

    def encode_sized(self, documents: Iterable[Document]) -> tuple[list[Encoded], list[NDArray[np.int32]]]:
        """`encode`, and the bytes of what was rendered that each token stands for: those of the messages, and of the words that
        the template puts between them. A control token stands for none, as one that ends a document does. -1 throughout where
        the rendered text does not give these tokens again."""
        known = list(documents)
        found = self.encode(known)
        return found, [self._sizes(document, ids) for document, (ids, _) in zip(known, found, strict=True)]

    def _sizes(self, document: Document, ids: NDArray[np.uint32]) -> NDArray[np.int32]:
        whole = self._apply(messages_of(document), document.path, tokenize=False)
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if encoding["input_ids"] != ids.tolist():
            return np.full(len(ids), -1, np.int32)
        sizes = byte_counts(whole, [end for _, end in encoding["offset_mapping"]])
        control = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        return np.where(np.isin(ids, control), np.int32(0), sizes)

    def cue(self, messages: Sequence[Message], where: str) -> list[int]:
        """Ids of a conversation up to where the assistant begins to speak. Raises GenomeError for one that the template cannot
        render."""
        self._check_text(messages, where)
        return list(self._apply(messages, where, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"])

    def _by_marks(self, messages: Sequence[Message], where: str) -> Encoded:
        """What stands between the template's own marks is learned."""
        rendered = self._apply(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.array(rendered["input_ids"], np.uint32), np.array(rendered["assistant_masks"], np.bool_)

    def _by_growth(self, messages: Sequence[Message], where: str) -> Encoded:
        """What an assistant's turn adds to the rendering of all before it, with the cue to speak, is learned."""
        whole = self._apply(messages, where, tokenize=False)
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        learned = np.zeros(len(begins), np.bool_)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._apply(messages[:place], where, tokenize=False, add_generation_prompt=True)
                after = self._apply(messages[: place + 1], where, tokenize=False)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise GenomeError(
                        f"{where}: the chat template of {self.source} renders message {place + 1} otherwise when it is the "
                        "last one, so that the answer cannot be told from the rest",
                        "use conversations with one answer, or as base.chat_template one that marks answers with "
                        "{% generation %}, such as blueprints/chatml.jinja",
                    )
                learned |= (ends > len(before)) & (begins < len(after))
        return np.array(encoding["input_ids"], np.uint32), learned

    def _apply(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            turns = [dict(message) for message in messages]
            return self.tokenizer.apply_chat_template(turns, chat_template=self.template, **options)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {self.source} is not Jinja: {error.message} at line {error.lineno}", "repair it"
            ) from error
        except (TemplateError, TypeError, ValueError) as error:
            raise GenomeError(
                f"{where}: the chat template of {self.source} cannot render this conversation: {error}",
                "write it as that template wants it (most want user and assistant in turn, and system first), or leave it out",
            ) from error

    def _check_text(self, messages: Sequence[Message], where: str) -> None:
        """A control token that somebody spells would end a turn, or open one in the name of another."""
        control = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for place, message in enumerate(messages, start=1):
            spelt = next((token for token in control if token in message["content"]), None)
            if spelt is not None:
                raise GenomeError(
                    f"{where}: message {place} ({message['role']}) spells {spelt!r}, a control token of the base",
                    "write it in other characters, or leave the conversation out",
                )


def load_chat_tokenizer(folder: Path, template_file: Path | None = None) -> ChatTokenizer:
    """The tokenizer of a base's folder and its chat template, or that of a file. Raises ModelError where there is none."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if template_file is not None:
            return ChatTokenizer(tokenizer, template_file.read_text(encoding="utf-8"), template_file)
        template = tokenizer.get_chat_template()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{template_file or f'the base at {folder}'} has no chat template for the genome's conversations "
            f"({str(error)[:200]})",
            "choose a base made to chat, or write base.chat_template: FILE, such as blueprints/chatml.jinja",
        ) from error
    return ChatTokenizer(tokenizer, template, folder)
