"""Texts in the tokens of a model."""

from typing import Any

import numpy as np

from penalties_jax.recipes.text import Corpus, hold_out


def in_tokens(corpus: Corpus, tokenizer: Any) -> Corpus:
    """Return a corpus of bytes in the tokens of a `tokenizers.Tokenizer`, with no mark at its ends.

    The last tenth of the tokens is held out, which may not begin where that of the bytes does.
    """
    text = (corpus.train.tobytes() + corpus.held_out.tobytes()).decode("utf-8")
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return hold_out(corpus.name, np.array(tokens, np.int32), "token")
