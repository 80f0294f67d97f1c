"""tiny-llada-code: a LLaDA over Python source, the standard library's modules, for figures on natural text.

Trained as LLaDA is: each window of the stream of modules has its own mask ratio, uniform in (0, 1], and a masked
token's loss is weighted by 1 / ratio. Windows are short at first and grow to the model's full length.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from recipes.base import END, Batch, config, masked_batch, tokenizer_config
from recipes.kneser_ney import KneserNey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from dllmc.tasks.python_source import modules

SPECIAL = ["<|endoftext|>", "<|mdm_mask|>"]
VOCABULARY = 2048
LONGEST = 1024
TOKENS_A_STEP = 8192
# Share of the steps from which windows have this length.
WINDOWS = ((0.0, 128), (0.55, 256), (0.8, LONGEST))
LEAST_RATIO = 0.05  # below, a window's few masked tokens would weigh too much
ORDER = 5
TEST_WINDOW, TEST_RATIO = 768, 0.15


def new_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with each digit apart."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Code:
    """The recipe."""

    steps, report_every = 2200, 50

    def __init__(self) -> None:
        texts = {held_out: list(modules(held_out).values()) for held_out in (False, True)}
        self.tokenizer = new_tokenizer(texts[False])
        self.config = config(VOCABULARY, layers=5, positions=LONGEST, tied=True, dtype="bfloat16")
        self.tokenizer_config = tokenizer_config(SPECIAL)
        self.trained, self.held_out = (self._stream(texts[held_out]) for held_out in (False, True))

    def _stream(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """All modules one after the other, each with an end token behind it."""
        encoded = self.tokenizer.encode_batch(texts)
        return np.concatenate([np.array([*e.ids, END], np.int64) for e in encoded])

    def batches_at(self, seed: int, step: int, steps: int) -> list[Batch]:
        rng = np.random.default_rng((seed, step))
        length = [length for share, length in WINDOWS if step >= share * steps][-1]
        count = TOKENS_A_STEP // length
        start = rng.integers(len(self.trained) - length, size=(count, 1))
        clean = self.trained[start + np.arange(length)]
        # One ratio from each of `count` equal parts of the range: the same distribution, less noise.
        ratio = LEAST_RATIO + (1 - LEAST_RATIO) * (rng.permutation(count) + rng.random(count))[:, None] / count
        masked = rng.random(clean.shape) < ratio
        weights = np.broadcast_to((1 / ratio / clean.size).astype(np.float32), clean.shape)
        return [masked_batch(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (clean, masked, weights)))]

    @torch.inference_mode()
    def figures(self, model: nn.Module, final: bool) -> dict[str, Any]:
        """NLL (nats a token) of tokens masked at 15 % in held-out windows, and of the same ones by the n-gram model."""
        windows = self.held_out[: len(self.held_out) // TEST_WINDOW * TEST_WINDOW].reshape(-1, TEST_WINDOW)
        windows = windows if final else windows[::8]
        masked = np.random.default_rng(0).random(windows.shape) < TEST_RATIO
        masked[:, : ORDER - 1] = False
        nll = [
            F.cross_entropy(model(batch.inputs)[batch.masked], batch.targets, reduction="none")
            for at in range(0, len(windows), 8)
            for batch in [masked_batch(*map(torch.from_numpy, (windows[at : at + 8], *[masked[at : at + 8]] * 2)))]
        ]
        found = {"masked_nll": round(torch.cat(nll).mean().item(), 4)}
        if not final:
            return found
        n_gram = KneserNey(self.trained, ORDER, VOCABULARY)
        p = np.stack([n_gram.probabilities(window) for window in windows])[masked[:, ORDER - 1 :]]
        n_gram_nll = round(float(-np.log(p).mean()), 4)
        sizes = {"held_out_tokens": int(windows.size), "masked_tokens": int(masked.sum()), "window": TEST_WINDOW}
        return {**found, f"kneser_ney_{ORDER}_gram_nll": n_gram_nll, "training_tokens": len(self.trained), **sizes}


recipe = Code
