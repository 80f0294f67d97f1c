"""Tokenizers from a folder that holds only their files: a tokenizer.json, and Dream's vocabulary and merges."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dllmc.errors import ArtifactError, RequestError
from dllmc.runtime.tokenizer import Tokenizer, load_tokenizer

QUICK = settings(deadline=None, derandomize=True, max_examples=100)
SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|unknown|>"]
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "ll o", "he llo", "Ġ hello"]
DREAM_VOCABULARY = {token: i for i, token in enumerate([*BYTES, *(merge.replace(" ", "") for merge in MERGES)])}
DREAM_SPECIAL = {t: len(DREAM_VOCABULARY) + i for i, t in enumerate(("<|endoftext|>", "<|im_end|>", "<|mask|>"))}


def write_characters(folder: Path) -> Path:
    """A tokenizer of one token a character, which frames a text with end tokens unless told not to."""
    folder.mkdir(exist_ok=True)
    ids = {token: i for i, token in enumerate([*SPECIAL, *PRINTABLE])}
    backend = Backend(models.WordLevel(ids, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A {SPECIAL[0]}", special_tokens=[(SPECIAL[0], 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "mask_token": SPECIAL[1]}
    write_config(folder, {**config, "unk_token": SPECIAL[2], "clean_up_tokenization_spaces": True})
    return folder


def write_dream(folder: Path) -> Path:
    """Dream's layout: vocab.json, merges.txt, and a config that names code which is not there."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(DREAM_VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "special": True}
        for token, i in DREAM_SPECIAL.items()
    }
    config = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added, "add_prefix_space": False}
    config["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    write_config(folder, config | {"bos_token": "<|endoftext|>", "unk_token": None, "model_max_length": 131072})
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_characters(tmp_path_factory.mktemp("characters")))


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_dream(tmp_path_factory.mktemp("dream")))


@QUICK
@given(st.text(PRINTABLE))
def test_characters_become_their_ids_and_nothing_is_added(characters: Tokenizer, text: str) -> None:
    """No end token frames the text, though this tokenizer would add two."""
    ids = characters.encode(text)
    assert ids == [3 + PRINTABLE.index(c) for c in text]
    assert characters.decode(ids) == text


def test_special_tokens_are_read_from_a_text_but_not_written_to_one(characters: Tokenizer) -> None:
    ids = characters.encode("a<|mdm_mask|>b<|endoftext|>")
    assert ids == [3 + PRINTABLE.index("a"), 1, 3 + PRINTABLE.index("b"), 0]
    assert characters.decode(ids) == "ab"


def test_spaces_are_decoded_as_they_are(characters: Tokenizer) -> None:
    """The config asks for a clean-up that would join punctuation to the word before it."""
    text = "do n't , stop .  1 0 ?"
    assert characters.decode(characters.encode(text)) == text


def test_dream_is_byte_level_bpe(dream: Tokenizer) -> None:
    """Merged words, a digit a token, bytes for what the vocabulary lacks, special tokens by their ids."""
    byte = DREAM_VOCABULARY
    expected = [byte["hello"], byte["Ġhello"], byte["Ġ"], byte["1"], byte["2"], byte["Ã"], byte["©"]]
    assert dream.encode("hello hello 12é<|mask|>") == [*expected, DREAM_SPECIAL["<|mask|>"]]


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_dreams_tokenizer(dream: Tokenizer, text: str) -> None:
    """Up to Unicode normalisation: as Qwen2's, it composes characters (NFC)."""
    assert dream.decode(dream.encode(text)) == unicodedata.normalize("NFC", text)


def test_dream_leaves_special_tokens_out_of_a_text(dream: Tokenizer) -> None:
    assert dream.decode([*DREAM_SPECIAL.values(), DREAM_VOCABULARY["hello"], *DREAM_SPECIAL.values()]) == "hello"


@QUICK
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 3))
def test_the_pieces_of_a_text_are_the_text(dream: Tokenizer, text: str, rest: int) -> None:
    """One a token, together the decoded text, also where it breaks off within a character."""
    ids = dream.encode(text)
    for part in (ids, ids[:-rest]):
        pieces = dream.pieces(part)
        assert len(pieces) == len(part)
        assert "".join(pieces) == dream.decode(part)


def test_a_character_is_the_piece_of_the_token_that_completes_it(dream: Tokenizer) -> None:
    """Special tokens add nothing; a character that never is completed is shown with the last token."""
    ids = [*dream.encode("hello hello é"), DREAM_SPECIAL["<|mask|>"], *dream.encode("1é")[:-1]]
    assert dream.pieces(ids) == ["hello", " hello", " ", "", "é", "", "1", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("home", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_frames_a_message(tmp_path: Path, home: str) -> None:
    """From either place that transformers knows, up to where the answer begins."""
    write_characters(tmp_path)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    if home == "tokenizer_config.json":
        write_config(tmp_path, json.loads((tmp_path / home).read_text()) | {"chat_template": template})
    else:
        (tmp_path / home).write_text(template)
    assert load(tmp_path).render_chat("hi") == "<user>hi<a>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template \(neither a chat_template\.jinja nor"),
        ("{% for %}", "fails on a user message: TemplateSyntaxError"),
        ("{{ raise_exception('A system message comes first.') }}", "TemplateError: A system message comes first. Give"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(tmp_path: Path, template: str | None, message: str) -> None:
    """None at all, one that is no template, one that wants another conversation, one that would run code."""
    write_characters(tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match=message):
        load(tmp_path).render_chat("hi")


def test_a_tokenizer_needs_no_config(tmp_path: Path) -> None:
    """A tokenizer.json says all there is to say."""
    (write_characters(tmp_path) / "tokenizer_config.json").unlink()
    assert load(tmp_path).encode("\n ") == [3, 4]


def test_the_models_config_does_not_choose_the_tokenizer(tmp_path: Path) -> None:
    """A checkpoint folder can be loaded from as well as an artifact: the config.json in it is not read."""
    (write_characters(tmp_path) / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert load(tmp_path).encode("\n ") == [3, 4]


def test_a_folder_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("lost", ["vocab.json", "merges.txt"])
def test_a_tokenizer_with_half_its_vocabulary_is_refused(tmp_path: Path, lost: str) -> None:
    (write_dream(tmp_path) / lost).unlink()
    with pytest.raises(
        ArtifactError, match=rf"{tmp_path}: incomplete tokenizer: expected tokenizer\.json, .*found only"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": ["x"]}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_with_its_folder(tmp_path: Path, file: str, content: str) -> None:
    (write_characters(tmp_path) / file).write_text(content)
    with pytest.raises(ArtifactError, match=rf"{tmp_path}: its tokenizer cannot be loaded \(tokenizer\.json, "):
        load_tokenizer(tmp_path)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """A tokenizer class that only the checkpoint's code defines is refused, with what to do instead."""
    write_config(write_dream(tmp_path), {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ArtifactError, match=r"must be saved as a tokenizer\.json"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_transformers_is_loaded_with_the_first_tokenizer_and_the_compiler_never(tmp_path: Path) -> None:
    """Importing the module is cheap, and loading a tokenizer loads neither Dynamo nor Inductor."""
    code = f"""
import sys
from pathlib import Path
from dllmc.runtime.tokenizer import load_tokenizer
assert "transformers" not in sys.modules
load_tokenizer(Path({str(write_characters(tmp_path))!r}))
assert "transformers" in sys.modules
assert not {{"torch._dynamo", "torch._inductor"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
