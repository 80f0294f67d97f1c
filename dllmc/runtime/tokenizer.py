"""Text to token ids and back: the tokenizer that lies in an artifact, loaded by transformers from local files only.

No code of a checkpoint is run. transformers is imported when a tokenizer is loaded, not before.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllmc.errors import ArtifactError

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


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None where there is none of its files.

    Raises `ArtifactError` for a tokenizer that is incomplete, corrupt, or needs code that transformers does not have.
    """
    pieces = {CONFIG, *(name for vocabulary in VOCABULARIES for name in vocabulary)}
    found = sorted(name for name in pieces if (folder / name).is_file())
    if not found:
        return None
    # transformers fills in an empty vocabulary or no merges where the file is absent, and then encodes wrongly.
    if not any(set(vocabulary) <= set(found) for vocabulary in VOCABULARIES):
        choices = ", or ".join(" and ".join(vocabulary) for vocabulary in VOCABULARIES)
        raise ArtifactError(f"{folder}: incomplete tokenizer: expected {choices}, found only {', '.join(found)}")
    try:
        return Tokenizer(_load(folder))
    except Exception as cause:
        reason = str(cause).partition("\n")[0].rstrip(".")
        raise ArtifactError(
            f"{folder}: its tokenizer cannot be loaded ({', '.join(found)}): {type(cause).__name__}: {reason}. "
            "Repair its files; a tokenizer that is code of its own must be saved as a tokenizer.json"
        ) from cause


def _load(folder: Path) -> Any:
    import transformers

    config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    same = SAME_AS.get(str(config.get("tokenizer_class")))
    if same is not None:
        return getattr(transformers, same).from_pretrained(folder, **local)
    # An empty config keeps a config.json beside it, which is the model's, from choosing the class.
    return transformers.AutoTokenizer.from_pretrained(folder, config=transformers.PreTrainedConfig(), **local)
