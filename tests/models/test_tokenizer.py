"""Tokenizers and where models lie."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config import ModelConfig
from fedray.errors import ConfigError
from fedray.models import tokenizer as module
from fedray.models.paths import resolve_path
from fedray.models.tokenizer import byte_tokenizer, end_token_id, load_tokenizer

BYTES = byte_tokenizer()


def package(root: Path, name: str, *configs: str) -> None:
    """Write a package that must not be imported, with a config.json in each of these folders of it."""
    (root / name).mkdir()
    (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
    for folder in configs:
        (root / name / folder).mkdir(exist_ok=True, parents=True)
        (root / name / folder / "config.json").write_text("{}")


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text())
def test_every_utf8_byte_is_its_own_token_and_texts_come_back(text: str) -> None:
    ids = BYTES(text).input_ids
    assert ids == [257, *text.encode(), 258]
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_bytes_that_spell_a_special_token_stay_bytes() -> None:
    assert BYTES("<pad>", add_special_tokens=False).input_ids == list(b"<pad>")


def test_a_pair_of_byte_texts_is_bos_first_eos_second_eos() -> None:
    assert BYTES("ab", "c").input_ids == [257, 97, 98, 258, 99, 258]
    assert len(BYTES) == 259


def test_loaded_by_name_with_padding_and_end() -> None:
    tokenizer = load_tokenizer(ModelConfig(path="random", config={"model_type": "bert"}, tokenizer="bytes"))
    assert (tokenizer.pad_token_id, end_token_id(tokenizer)) == (256, 258)


@pytest.mark.parametrize(("eos", "sep", "expected"), [("<eos>", "<bos>", 258), (None, "<bos>", 257)])
def test_padding_falls_back_to_the_end_token(tmp_path: Path, eos: str | None, sep: str | None, expected: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.sep_token = None, eos, sep
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert loaded.pad_token_id == end_token_id(loaded) == expected


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="neither an eos nor a sep"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_an_unreachable_hub_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(ModelConfig(path="somebody/something"))
    message = str(caught.value)
    assert all(word in message for word in ("model.path", "somebody/something", "package:", "HF_HOME", "connect"))
    assert "and so on" not in message


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("configs", "folder"), [((".", "deep"), "."), (("weights",), "weights"), (("w", "w/pooling"), "w")]
)
def test_package_folder_is_the_root_or_the_outermost_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configs: tuple[str, ...], folder: str
) -> None:
    package(tmp_path, "some_weights", *configs)
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(resolve_path("package:some_weights")) == tmp_path / "some_weights" / folder
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("configs", "message"), [(("a", "b"), "2 folders with a config.json"), ((), "holds no config.json")]
)
def test_ambiguous_and_empty_packages_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configs: tuple[str, ...], message: str
) -> None:
    package(tmp_path, "other_weights", *configs)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_path("package:other_weights")


def test_a_misspelt_package_gets_the_nearest_name_and_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'transformers'.*pip install --no-deps transformer`"):
        resolve_path("package:transformer")


def test_a_missing_local_folder_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        resolve_path(str(tmp_path / "modle"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="got a file of another kind"):
        resolve_path(str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/model"])
def test_hub_ids_pass_unchanged(name: str) -> None:
    assert resolve_path(name) == name
