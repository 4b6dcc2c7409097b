"""Text to token ids, as it reads in the middle of a prompt."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 4096
_SENTINELS = ("\n", ":", "|", "#")


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Turn texts into token ids, each as it reads in the middle of a prompt.

    Nothing is added before or after a text, and what looks like a special token (``</s>``, ``<|im_end|>``) is encoded as
    plain text. Tokenizers like SentencePiece's put a space before their input; for them the text is encoded after
    another character, whose tokens are then cut off.

    Args:
        tokenizer: a fast tokenizer.
        texts: any strings, the empty one too.

    Returns:
        token ids of each text.
    """

    def encode(strings: list[str]) -> list[list[int]]:
        if not strings:
            return []
        return tokenizer(
            strings, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]

    leads = _leads(encode)
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        # Tokenizers refuse half a surrogate pair, which is not valid Unicode.
        chunk = [text.encode("utf-8", "replace").decode() for text in texts[start : start + _TEXTS_AT_ONCE]]
        found: dict[int, list[int]] = {}
        for sentinel, head in leads:
            rest = [index for index in range(len(chunk)) if index not in found]
            for index, encoded in zip(rest, encode([sentinel + chunk[index] for index in rest]), strict=True):
                if encoded[: len(head)] == head:
                    found[index] = encoded[len(head) :]
        # Where the text's first characters merge with every sentinel, its own encoding is the best approximation.
        rest = [index for index in range(len(chunk)) if index not in found]
        found.update(zip(rest, encode([chunk[index] for index in rest]), strict=True))
        ids += [found[index] for index in range(len(chunk))]
    return ids


def _leads(encode: Callable[[list[str]], list[list[int]]]) -> list[tuple[str, list[int]]]:
    """Return the characters to encode texts after, with their tokens; none where a tokenizer adds nothing before a text."""
    leads = []
    for sentinel in _SENTINELS:
        head, both, alone = encode([sentinel, sentinel + "a", "a"])
        if head and both[: len(head)] == head:
            if both[len(head) :] == alone:
                return []
            leads.append((sentinel, head))
    return leads
