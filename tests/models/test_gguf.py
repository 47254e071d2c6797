"""A GGUF file is a model like any other: its weights, tokenizer, template, ends and tied head are the original's."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from decausal.cli import main
from decausal.errors import UserError
from decausal.models.adapt import load_source, source_dtype
from decausal.models.checkpoint import load_converted
from decausal.models.examination import examine_path
from decausal.models.gguf_files import check_gguf, repository_and_file
from decausal.models.names import check_source
from decausal.reporting import quiet_libraries
from tests.families import CHAT_TEMPLATE, CHAT_TOKENS, EOS_ID, FAMILIES, VOCABULARY, tiny_tokenizer
from tests.gguf_model import write_gguf
from tests.runs import run, weights, write_text

SIZES = {"hidden_size": 64, "intermediate_size": 96, "bos_token_id": EOS_ID}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def is_tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def file(is_tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf", original(is_tied))


def original(is_tied: bool):
    return FAMILIES["llama"](**SIZES, tie_word_embeddings=is_tied)


def test_the_model_is_the_one_that_was_written(file: Path, is_tied: bool) -> None:
    model, _ = load_source(file)
    expected = original(is_tied)
    for name, tensor in expected.state_dict().items():
        assert (model.state_dict()[name] - tensor).norm() / tensor.norm() < 0.01, name  # 8 bits
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(ids).logits - expected(ids).logits).norm() / expected(ids).logits.norm() < 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_bar_is_shown_where_transformers_is_asked_to_show_none(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with quiet_libraries():
        load_source(file)
    assert capfd.readouterr() == ("", "")


def test_so_are_its_tokenizer_template_and_ends(file: Path) -> None:
    model, tokenizer = load_source(file)
    text = "the rain in spain"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    end = VOCABULARY.index(CHAT_TOKENS[1])
    assert tokenizer.eos_token_id == end
    assert model.generation_config.eos_token_id == end


def test_it_is_examined_and_converted_and_recorded(file: Path, is_tied: bool, tmp_path: Path) -> None:
    assert all(probe.passed for probe in examine_path(str(file)) if probe.required)
    data = write_text(tmp_path / "text.jsonl", 4)
    made = run(file, data, tmp_path / "out", save_dtype="source", max_steps=1, save_strategy="no", align_weight=1.0)
    assert made.facts.source == str(file)
    written = weights(tmp_path / "out")
    assert ("lm_head.weight" in written) is not is_tied
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16} == {source_dtype(file)}
    loaded = load_converted(tmp_path / "out")
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert not hasattr(loaded.model.config, "quantization_config")


@pytest.mark.parametrize("size", [0, 3, 20, 400, 5000, -40])
def test_a_file_that_is_cut_off_is_one_line(size: int, file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"cut.gguf (is cut off|cannot be read|is not a GGUF file).*; fetch it again"
    ) as caught:
        check_source(cut)
    assert "\n" not in str(caught.value)


def test_the_header_says_how_long_the_file_is(file: Path) -> None:
    assert check_gguf(file).architecture == "llama"
    assert 0 <= file.stat().st_size - check_gguf(file).num_bytes < 64  # the last tensor may be filled up


def test_an_architecture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf", original(False), architecture="rwkv7")
    with pytest.raises(UserError, match=r"odd.gguf holds a model of architecture 'rwkv7', which transformers cannot"):
        load_source(file)


def test_gated_weights_need_files_of_the_source_and_say_so_before_it_is_read(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_text(tmp_path / "text.jsonl", 4), tmp_path / "out"
    with patch("decausal.training.convert.convert", side_effect=AssertionError("it is read")):
        code = main(["convert", str(file), "--recipe", "lossless", "--data", str(data), "--output_dir", str(out)])
    assert code == 2
    assert "write it as a Hugging Face directory first" in capsys.readouterr().err


def test_a_directory_written_from_it_is_the_same_model(file: Path, tmp_path: Path) -> None:
    for part in load_source(file):
        part.save_pretrained(tmp_path / "plain")
    (model, tokenizer), (again, tokenizer_again) = load_source(file), load_source(tmp_path / "plain")
    text = tokenizer("the rain in spain", return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer_again("the rain in spain", return_tensors="pt")["input_ids"], text)
    assert torch.equal(model(text).logits, again(text).logits)


def test_a_file_that_is_not_there_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"GGUF file .*none.gguf does not exist"):
        check_source(tmp_path / "none.gguf")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"GGUF file models/tiny/none.gguf does not exist"):  # not: no such repository
        check_source("models/tiny/none.gguf")
    assert repository_and_file("owner/name/part/model.gguf") == ("owner/name", "part/model.gguf")
