"""Sources load or are refused in one line; adapting adds a mask token and disturbs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.models.adapt import adapt, load_source
from decausal.models.checkpoint import load_converted, save_converted
from tests.families import EOS, FAMILIES, VOCAB_SIZE, tiny_tokenizer
from tests.sampling.stand_ins import conversion_facts


def save_source(directory: Path, family: str = "qwen3") -> Path:
    FAMILIES[family]().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_a_directory_loads_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_source(save_source(tmp_path))
    assert all(map(torch.equal, model.state_dict().values(), FAMILIES["qwen3"]().state_dict().values()))
    assert tokenizer("the end")["input_ids"] == tiny_tokenizer()("the end")["input_ids"]
    assert not model.training


def test_weights_load_in_the_type_asked_for(tmp_path: Path) -> None:
    model, _ = load_source(save_source(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "implementation"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_eager_only_where_scores_are_capped(family: str, implementation: str, tmp_path: Path) -> None:
    model, _ = load_source(save_source(tmp_path, family))
    assert model.config._attn_implementation == implementation


def refused(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_source(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "is a file" in refused(tmp_path / "model.bin")


def test_hub_id_out_of_reach_is_refused() -> None:
    assert "no-such/model is neither a directory nor a model that the hub gives" in refused("no-such/model")


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "holds no model that transformers can read" in refused(tmp_path)


def test_broken_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    assert "config.json cannot be read" in refused(tmp_path)


def test_code_from_the_repository_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}')
    (tmp_path / "configuration.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "never run" in refused(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_converted", [False, True])
def test_names_of_code_that_stays_behind_are_not_written(tmp_path: Path, is_converted: bool) -> None:
    source = save_source(tmp_path / "source")
    if is_converted:
        model, tokenizer = load_source(source)
        save_converted(source, model, tokenizer, conversion_facts(adapt(model, tokenizer), shift=1))
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((source / name).read_text()) | {"auto_map": {"AutoConfig": "theirs.Config"}}
        (source / name).write_text(json.dumps(values))
    model, tokenizer = load_converted(source)[:2] if is_converted else load_source(source)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    assert "auto_map" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_a_secret_that_would_become_a_token_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = save_source(tmp_path)
    values = json.loads((source / "tokenizer_config.json").read_text()) | {"hub_token": "nobody may read it"}
    (source / "tokenizer_config.json").write_text(json.dumps(values))
    assert "tokenizer_config.json of" in refused(source)
    assert "holds a secret, 'hub_token'" in refused(source)
    (source / "tokenizer_config.json").write_text(json.dumps(values | {"hub_token": None, "audio_token": "<a>"}))
    load_source(source)


def test_encoder_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path)
    assert "'bert' is an encoder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("vit", "not a causal language model"),
        ("mamba", "recurrent layers"),
        ("qwen3_next", "recurrent layers"),
    ],
)
def test_other_architectures_are_refused_before_weights_are_read(model_type: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert reason in refused(tmp_path)


def test_classifier_is_refused_for_its_missing_head(tmp_path: Path) -> None:
    LlamaForSequenceClassification(FAMILIES["llama"]().config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lack lm_head.weight" in refused(tmp_path)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    save_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert "model.safetensors is cut off or broken" in refused(tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_missing_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    assert "holds no tokenizer" in refused(tmp_path)


def test_converted_model_is_no_source(tmp_path: Path) -> None:
    save_source(tmp_path)
    (tmp_path / "decausal.json").write_text("{}")
    assert "already converted" in refused(tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])  # tied, untied, learned positions
@pytest.mark.parametrize("num_spare_rows", [0, 5])
def test_mask_row_starts_as_the_mean_of_the_rows_in_use(family: str, num_spare_rows: int) -> None:
    model, tokenizer = FAMILIES[family](vocab_size=VOCAB_SIZE + num_spare_rows), tiny_tokenizer()
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [matrix.detach()[:VOCAB_SIZE].clone() for matrix in matrices]
    assert adapt(model, tokenizer) == VOCAB_SIZE
    for old, module in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(module.weight[:VOCAB_SIZE], old)
        torch.testing.assert_close(module.weight[VOCAB_SIZE], old.mean(dim=0))
    assert model.config.vocab_size == VOCAB_SIZE + max(num_spare_rows, 1)
    assert model.config.is_causal is False
    assert tokenizer.mask_token_id == VOCAB_SIZE
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_causal_layout_stays_causal() -> None:
    model = FAMILIES["qwen3"]()
    adapt(model, tiny_tokenizer(), layout=Layout("causal"))
    assert model.config.is_causal is True


def test_the_tokenizers_own_mask_token_keeps_its_row() -> None:
    model, tokenizer = FAMILIES["qwen3"](vocab_size=VOCAB_SIZE + 1), tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    before = model.get_input_embeddings().weight.detach().clone()
    assert adapt(model, tokenizer) == VOCAB_SIZE
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert tokenizer.mask_token == "[MASK]"


def test_a_token_of_the_vocabulary_can_be_named() -> None:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    named = adapt(model, tokenizer, mask_token="<|im_end|>")
    assert named == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.mask_token_id
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_new_name_is_added() -> None:
    model, tokenizer = FAMILIES["qwen3"](), tiny_tokenizer()
    assert adapt(model, tokenizer, mask_token="<hole>") == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(VOCAB_SIZE) == "<hole>"


def test_end_of_text_cannot_be_the_mask_token() -> None:
    with pytest.raises(UserError, match="is the tokenizer's eos_token"):
        adapt(FAMILIES["qwen3"](), tiny_tokenizer(), mask_token=EOS)


def test_the_mask_token_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    mask_token_id = adapt(FAMILIES["qwen3"](), tokenizer)
    tokenizer.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert reloaded.mask_token_id == mask_token_id
    assert reloaded("a<|mask|>b")["input_ids"].count(mask_token_id) == 1


def test_qwen3_uses_its_first_spare_row() -> None:
    vocabulary = {f"t{index}": index for index in range(151669)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")))
    sizes = {"hidden_size": 4, "head_dim": 4, "intermediate_size": 4}
    model = FAMILIES["qwen3"](**sizes, vocab_size=151936)
    assert adapt(model, tokenizer) == 151669
    assert model.config.vocab_size == 151936
