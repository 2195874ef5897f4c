"""Text to tokens: of a file, a list of texts, a dataset, or the manual that comes with Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextSource", "packed", "split_text", "token_sequences"]

# A text file, a list of texts, the name of a text dataset of the `datasets` library, or None: `pydoc_data.topics`.
TextSource = str | Path | Sequence[str] | None


def token_sequences(source: TextSource, tokenizer: PreTrainedTokenizerBase, most: int, sequence_length: int) -> Tensor:
    """[at most `most`, sequence_length], int64: the beginning of the text."""
    rows = list(islice(packed(source, tokenizer, sequence_length), most))
    return torch.tensor(rows, dtype=torch.int64).view(-1, sequence_length)


def split_text(source: TextSource) -> tuple[list[str], list[str]]:
    """The first three quarters of a text, to calibrate on, and its last quarter, to judge by."""
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"'{source}' is no file, so it has no last quarter to judge by; give a test text (--test) too")
    text = "\n\n".join(_texts(source))
    cut = len(text) * 3 // 4
    return [text[:cut]], [text[cut:]]


def packed(source: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Iterator[list[int]]:
    """The text's tokens, sequence_length at a time, one text behind the other; what is left at the end is dropped."""
    prefix = list(tokenizer("").input_ids)  # a BOS token, for the models that start every sequence with one
    chunk = sequence_length - len(prefix)
    ids: list[int] = []
    for text in _texts(source):
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        whole = len(ids) // chunk * chunk
        for start in range(0, whole, chunk):
            yield prefix + ids[start : start + chunk]
        ids = ids[whole:]


def _texts(source: TextSource) -> Iterator[str]:
    if source is None:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics[name] for name in sorted(topics))
    elif isinstance(source, (str, Path)):
        if Path(source).is_file():
            yield Path(source).read_text(encoding="utf-8", errors="replace")
        else:
            yield from _dataset_texts(str(source))
    else:
        yield from source


def _dataset_texts(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"'{name}' is no file; if it is the name of a dataset: pip install 'transmla_ext[data]'"
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # datasets raises nearly anything here
        raise ValueError(f"'{name}' is no file, and no dataset that can be loaded: {error}") from error
    for row in rows:
        yield row["text"]
