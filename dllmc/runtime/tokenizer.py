"""Text to token ids and back: the tokenizer that lies in an artifact, loaded by transformers from local files only.

No code of a checkpoint is run. transformers is imported when a tokenizer is loaded, not before.
"""

import json
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dllmc.errors import ArtifactError, RequestError

CONFIG = "tokenizer_config.json"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",))
# Classes that checkpoints bring as code of their own, and the class of transformers that does the same.
SAME_AS = {"DreamTokenizer": "Qwen2Tokenizer"}


class Tokenizer:
    """A tokenizer of transformers, narrowed to what serving needs."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. None is added; a special token that is spelled out in the text becomes its id."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and with its spaces as they are."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token id adds to those before it: together `decode(ids)`.

        A special token adds nothing. A token that ends within a character adds nothing either; the token that
        completes the character adds all of it.
        """
        pieces: list[str] = []
        # The piece before is decoded with each new token, for some decoders drop a space where a text begins.
        context, done = 0, 0
        for end in range(1, len(ids) + 1):
            known, text = self.decode(ids[context:done]), self.decode(ids[context:end])
            whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
            pieces.append(text[len(known) :] if whole else "")
            if whole and len(text) > len(known):
                context, done = done, end
        return pieces

    def render_chat(self, message: str) -> str:
        """A user's message as the checkpoint's chat template writes it, up to where the model's answer begins.

        Raises `RequestError` without a template, and for one that does not take a single user message.
        """
        if not self._inner.chat_template:
            raise RequestError(
                "the tokenizer has no chat template (neither a chat_template.jinja nor a chat_template in "
                "tokenizer_config.json); give the whole prompt as text, without a template"
            )
        conversation = [{"role": "user", "content": message}]
        try:
            text: str = self._inner.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as cause:
            reason = " ".join(str(cause).split()).rstrip(".")
            raise RequestError(
                f"the tokenizer's chat template fails on a user message: {type(cause).__name__}: {reason}. "
                "Give the whole prompt as text, without the template"
            ) from cause
        return text


def load_tokenizer(folder: Path, names: Collection[str] | None = None) -> Tokenizer | None:
    """The tokenizer in a folder, or None where there is none of its files, or where transformers is not installed.

    `names`: the files that are the tokenizer's; others in the folder are not looked at. Raises `ArtifactError` for a
    tokenizer that is incomplete, corrupt, or needs code that transformers does not have.
    """
    pieces = {CONFIG, *(name for vocabulary in VOCABULARIES for name in vocabulary)}
    listed = pieces if names is None else pieces.intersection(names)
    found = sorted(name for name in listed if (folder / name).is_file())
    if not found:
        return None
    # transformers fills in an empty vocabulary or no merges where the file is absent, and then encodes wrongly.
    if not any(set(vocabulary) <= set(found) for vocabulary in VOCABULARIES):
        choices = ", or ".join(" and ".join(vocabulary) for vocabulary in VOCABULARIES)
        raise ArtifactError(f"{folder}: incomplete tokenizer: expected {choices}, found only {', '.join(found)}")
    try:
        import transformers
    except ImportError:
        return None
    try:
        if names is None:
            return Tokenizer(_load(folder, transformers))
        with tempfile.TemporaryDirectory() as alone:
            for name in names:
                (Path(alone) / name).symlink_to(folder.resolve() / name)
            return Tokenizer(_load(Path(alone), transformers))
    except Exception as cause:
        reason = str(cause).partition("\n")[0].rstrip(".")
        raise ArtifactError(
            f"{folder}: its tokenizer cannot be loaded ({', '.join(found)}): {type(cause).__name__}: {reason}. "
            "Repair its files; a tokenizer that is code of its own must be saved as a tokenizer.json"
        ) from cause


def _load(folder: Path, transformers: ModuleType) -> Any:
    config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    same = SAME_AS.get(str(config.get("tokenizer_class")))
    if same is not None:
        return getattr(transformers, same).from_pretrained(folder, **local)
    # An empty config keeps a config.json beside it, which is the model's, from choosing the class.
    return transformers.AutoTokenizer.from_pretrained(folder, config=transformers.PreTrainedConfig(), **local)
