"""Bad input, through the command line: exit code 2, exactly one line on stderr, and nothing left after."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from transformers.utils import logging

from decausal.cli import main
from decausal.data import reading
from tests.families import DECODER, EOS, VOCAB_SIZE, tiny_tokenizer
from tests.runs import call, environment, save_source, write_text

RUN = ["--max_length", "24", "--max_steps", "2", "--use_cpu", "true", "--per_device_train_batch_size", "2"]


@pytest.fixture(autouse=True)
def _no_bars():
    """What `main` asks for by the environment, before transformers is imported."""
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    save_source(root / "model")
    write_text(root / "text.jsonl")
    return root


@pytest.fixture
def refused(files, tmp_path, capfd) -> Callable[..., str]:
    """Runs `convert` on good input but for what is given; returns the one line that it wrote."""

    def refuse(*flags: object, model: object = files / "model", data: object = files / "text.jsonl") -> str:
        before = sorted(tmp_path.rglob("*"))
        given = ["--data", str(data), "--output_dir", str(tmp_path / "out" / "run"), *RUN, *map(str, flags)]
        capfd.readouterr()
        code = main(["convert", str(model), *given])
        reported = capfd.readouterr()
        assert code == 2, reported
        assert_one_line(reported.err)
        assert "converted model" not in reported.out
        assert sorted(tmp_path.rglob("*")) == before
        return reported.err

    return refuse


def assert_one_line(text: str) -> None:
    assert text.endswith("\n")
    (line,) = (line for line in text.splitlines() if not line.startswith("decausal: read "))  # what was read before
    assert line.startswith("decausal: error: ")
    assert "Traceback" not in text


# Models


def test_a_model_directory_that_is_missing(refused, tmp_path):
    assert f"model directory {tmp_path}/nowhere does not exist" in refused(model=tmp_path / "nowhere")


def test_a_model_directory_that_is_empty(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no model that transformers can read" in refused(model=tmp_path / "empty")


def test_a_model_that_is_a_file(refused, files):
    assert "is a file; give the model's directory" in refused(model=files / "text.jsonl")


def test_a_hub_id_without_a_hub(refused):
    assert "neither a directory nor a model that the hub gives" in refused(model="nobody/no-such-model")


def save_config(directory: Path, config: transformers.PretrainedConfig, model_class: str | None = None) -> Path:
    if model_class is None:
        config.save_pretrained(directory)
    else:
        getattr(transformers, model_class)(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_an_encoder(refused, tmp_path):
    config = transformers.BertConfig(vocab_size=VOCAB_SIZE, **ENCODER)
    assert "encoder" in refused(model=save_config(tmp_path / "bert", config, "BertForMaskedLM"))


def test_an_encoder_decoder(refused, tmp_path):
    config = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    assert "encoder-decoder" in refused(model=save_config(tmp_path / "t5", config))


def test_a_model_without_its_language_modelling_head(refused, tmp_path):
    config = transformers.LlamaConfig(vocab_size=VOCAB_SIZE, **DECODER)
    reported = refused(model=save_config(tmp_path / "body", config, "LlamaModel"))
    assert "is not a causal language model: its weights lack lm_head.weight" in reported


@pytest.mark.parametrize("config_name", ["MambaConfig", "JambaConfig", "Qwen3NextConfig"])
def test_hybrids_and_recurrent_models_are_refused_by_name(refused, tmp_path, config_name):
    config = getattr(transformers, config_name)()
    reported = refused(model=save_config(tmp_path / "hybrid", config))
    assert config.model_type in reported
    assert "recurrent" in reported or "state-space" in reported


def test_a_model_whose_weights_are_cut_short(refused, files, tmp_path):
    model = shutil.copytree(files / "model", tmp_path / "cut")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors is cut off or broken" in refused(model=model)


def test_a_model_without_its_tokenizer(refused, files, tmp_path):
    model = shutil.copytree(files / "model", tmp_path / "mute")
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer" in refused(model=model)


def test_a_converted_model_whose_facts_are_broken(refused, files, tmp_path):
    model = shutil.copytree(files / "model", tmp_path / "done")
    (model / "decausal.json").write_text("{}")
    assert "lacks 'schema_version'" in refused(model=model)


# Data


def test_data_that_match_nothing(refused, tmp_path):
    assert f"{tmp_path}/nowhere" in refused(data=tmp_path / "nowhere")
    assert "no-such-file" in refused(data=f"{tmp_path}/*.no-such-file")


def test_data_that_are_not_named(files, tmp_path, capfd):
    assert main(["convert", str(files / "model"), "--output_dir", str(tmp_path / "out")]) == 2
    reported = capfd.readouterr().err
    assert_one_line(reported)
    assert "--data is missing" in reported


@pytest.mark.parametrize("text", ["", "   \n\n  \n"], ids=["empty", "blank"])
def test_empty_text(refused, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    assert "empty.txt" in refused(data=tmp_path / "empty.txt")


def test_a_line_that_is_not_json_is_named_by_file_and_number(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": three}\n')
    assert f"{tmp_path}/bad.jsonl:3" in refused(data=tmp_path / "bad.jsonl")


def test_a_field_that_is_missing_is_named_with_those_that_are_there(refused, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"body": "one"}\n')
    reported = refused(data=tmp_path / "other.jsonl")
    assert f"{tmp_path}/other.jsonl:1" in reported
    assert "body" in reported
    assert "body" in refused("--text_field", "content", data=tmp_path / "other.jsonl")


@pytest.mark.parametrize("verb", ["convert", "compare", "pretrain", "eval nll"])
def test_half_a_surrogate_pair_in_data_is_one_line_in_every_verb(verb, files, tmp_path, capfd):
    data = tmp_path / "half.jsonl"
    data.write_text('{"text": "a whole line"}\n{"text": "bad \\ud83d"}\n')
    given = ["--data", str(data), "--output_dir", str(tmp_path / "out")]
    model = [str(files / "model")]
    arguments = {
        "convert": [*model, *given, *RUN],
        "compare": [*model, *given, *RUN, "--recipes", "mdm", "--eval", "nll", "--eval_data", str(data)],
        "pretrain": [*given, *RUN],
        "eval nll": ["DIR", "--data", str(data), "--max_length", "24"],
    }[verb]
    if verb == "eval nll":
        directory = tmp_path / "converted"
        assert main(["convert", *model, "--data", str(files / "text.jsonl"), "--output_dir", str(directory), *RUN]) == 0
        arguments[0] = str(directory)
    capfd.readouterr()
    assert main([*verb.split(), *arguments]) == 2
    reported = capfd.readouterr().err
    assert_one_line(reported)
    assert f"{data}:2: half a surrogate pair (character 5)" in reported
    assert "--on_bad_record skip" in reported
    if verb in ("compare", "pretrain"):  # a whole run of them takes long, and they read as convert does
        return
    reading._SAID.clear()
    assert main([*verb.split(), *arguments, "--on_bad_record", "skip"]) == 0
    assert f"skipped 1 bad record: {data}:2: half a surrogate pair" in capfd.readouterr().err


def test_a_document_of_nothing_but_special_tokens(refused, tmp_path):
    (tmp_path / "special.jsonl").write_text(json.dumps({"text": EOS * 5}) + "\n")
    assert "special.jsonl" in refused(data=tmp_path / "special.jsonl")


def test_messages_without_a_chat_template(refused, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert "chat template" in refused(data=tmp_path / "chat.jsonl")


def test_a_file_that_is_not_text(refused, tmp_path):
    (tmp_path / "image.txt").write_bytes(bytes(range(256)) * 20)
    assert "image.txt" in refused(data=tmp_path / "image.txt")


# Settings


def test_an_unknown_key_of_a_recipe_names_the_nearest(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("align_wait: 3\n")
    assert "unknown key 'align_wait' (recipe " in refused("--recipe", tmp_path / "mine.yaml")
    assert "did you mean 'align_weight'?" in refused("--recipe", tmp_path / "mine.yaml")


def test_an_unknown_flag_names_the_nearest(refused):
    assert "unknown key 'max_step' (flag); did you mean 'max_steps'?" in refused("--max_step", "3")


def test_an_unknown_recipe_names_all(refused):
    assert "unknown recipe 'mdn'; did you mean 'mdm'?" in refused("--recipe", "mdn")


def test_rows_longer_than_the_model_reads(refused):
    assert "--max_length 65 is over the model's maximum of 64" in refused("--max_length", "65")


def test_no_step(refused):
    assert "--max_steps 0" in refused("--max_steps", "0")
    assert "--num_train_epochs 0.0" in refused("--max_steps", "-1", "--num_train_epochs", "0")


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (("--max_steps", "abc"), "--max_steps: 'abc' is not accepted; give a whole number"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size 0: must be at least 1"),
        (("--gradient_accumulation_steps", "-1"), "--gradient_accumulation_steps -1: must be at least 1"),
        (("--learning_rate", "-1"), "--learning_rate -1.0: must be at least 0"),
        (("--lr_scheduler_type", "cosinus"), "--lr_scheduler_type: 'cosinus' is not accepted; give one of"),
        (("--lr_scheduler_type", "warmup_stable_decay"), "num_decay_steps"),
        (("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"nonsense": 1}'), "nonsense"),
        (("--optim", "adam-nonsense"), "adam-nonsense"),
        (("--report_to", "nonsense"), "nonsense"),
        (("--report_to", "wandb"), "wandb"),
        (("--save_steps", "1.5"), "--save_steps must be an integer"),
        (("--fp16", "true", "--bf16", "true"), "fp16 and bf16"),
        (("--fsdp", "full_shard"), "fsdp"),
        (("--deepspeed", "nowhere.json"), "training arguments"),
        (("--align_layers", "9", "--align_weight", "1"), "states 0 to 2"),
        (("--align_layers", "top"), "--align_layers top"),
        (("--views", "3", "--complementary_masks"), "--complementary_masks needs --views 2"),
        (("--mask_token", EOS), "eos_token"),
        (("--lora_r", "4", "--lora_target_modules", "nowhere"), "--lora_target_modules"),
        (("--attn_implementation", "flash_attention_9"), "attn"),
        (("--layout", "blocks"), "give one of causal, bidirectional, block"),
        (("--recipe", "mdm", "--layout", "block"), "--layout block needs --block_size"),
        (("--layout", "block", "--block_size", "0"), "--block_size 0: must be at least 1"),
        (
            ("--recipe", "bd3lm", "--block_size", "600", "--max_length", "512"),
            "--block_size 600 is over --max_length 512",
        ),
        (("--recipe", "bd3lm", "--layout", "causal"), "--block_size 4 is for --layout block, not causal; give none"),
        (("--recipe", "sdar", "--complementary_masks"), "--complementary_masks needs --views 2"),
        (("--attn_implementation", "flex_attention"), "flex_attention needs a GPU"),
        (("--eval_data", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--output_dir", ""), "--output_dir is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_values_that_are_not_taken(refused, flags, reported):
    assert reported in refused(*flags)


# Output directories


def test_an_output_directory_that_is_not_empty(files, tmp_path, refused):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "run.yaml").write_text("{}")
    reported = refused()
    assert "is not empty" in reported
    assert "--resume_from_checkpoint" in reported
    assert "--overwrite" in reported


def test_an_output_directory_that_no_run_made_is_never_overwritten(tmp_path, refused):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "thesis.txt").write_text("years of work")
    assert "no run of decausal made it" in refused("--overwrite", "true")
    assert "no run of decausal made it" in refused("--resume_from_checkpoint", "true")


def test_an_output_directory_that_is_a_file(tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("--output_dir", tmp_path / "file")


def test_an_output_directory_that_another_run_holds(tmp_path, refused):
    script = f"""
import sys
from pathlib import Path
from decausal.training.run_directory import claimed
with claimed(Path({str(tmp_path / "out" / "run")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert "is in use by another run" in refused()
    holder.communicate()
    assert holder.returncode == 0


def test_a_checkpoint_to_resume_that_is_none(tmp_path, refused):
    assert "is not a checkpoint to resume from" in refused("--resume_from_checkpoint", tmp_path / "nowhere")


# Generating


@pytest.fixture(scope="module")
def converted(files) -> Path:
    arguments = ["convert", files / "model", "--data", files / "text.jsonl", "--output_dir", files / "out", *RUN]
    assert main([str(argument) for argument in arguments]) == 0
    return files / "out"


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["generate", "{model}", "the rain " * 60], "context"),
        (["generate", "{model}", "the <|mask|> rain"], "mask token"),
        (["generate", "{model}", "the", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["generate", "{model}", "the", "--num_steps", "0"], "num_steps=0"),
        (["generate", "{model}", "the", "--max_new_tokens", "many"], "max_new_tokens"),
        (["generate", "{model}", "the", "--temperature", "-1"], "temperature"),
        (["generate", "{model}", "the", "--no_such_flag"], "no_such_flag"),
        (["generate", "{source}", "the"], "not a decausal checkpoint"),
        (["generate", "/nowhere", "the"], "/nowhere does not exist"),
        (["infill", "{model}", "--prefix", "a", "--suffix", "b", "--length", "0"], "length"),
        (["infill", "{model}", "--prefix", "a", "--suffix", "b", "--length", "500"], "context"),
        (["infill", "{model}", "--prefix", "a <|mask|>", "--suffix", "b", "--length", "3"], "mask token"),
        (["infill", "{model}", "--prefix", "a"], "--suffix"),
        (["eval", "nll", "{source}", "--data", "{text}"], "not a decausal checkpoint"),
        (["eval", "nll", "{model}", "--data", "/nowhere.txt", "--max_length", "24"], "/nowhere.txt"),
        (["eval"], "eval"),
        (["doctor"], "model"),
        (["doctor", "/nowhere"], "/nowhere"),
        (["pretrain", "--data", "/nowhere.txt", "--output_dir", "{new}"], "/nowhere.txt"),
        (["pretrain", "--hidden_size", "100", "--num_attention_heads", "3", "--output_dir", "{new}"], "not a multiple"),
        (["pretrain"], "--output_dir is missing"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_bad_input_to_other_verbs(files, converted, tmp_path, capfd, arguments, reported):
    places = {"model": converted, "source": files / "model", "text": files / "text.jsonl", "new": tmp_path / "new"}
    capfd.readouterr()
    assert main([argument.format(**places) for argument in arguments]) == 2
    found = capfd.readouterr().err
    assert_one_line(found)
    assert reported in found
    assert not list(tmp_path.iterdir())


# In a process of its own, where nothing has been imported or silenced before


def test_an_error_found_after_the_model_was_loaded_is_still_one_line(files, tmp_path):
    (tmp_path / "bad.jsonl").write_text("not json\n")
    ended = call("convert", files / "model", "--data", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out", *RUN)
    assert ended.returncode == 2
    assert_one_line(ended.stderr)
    assert f"{tmp_path}/bad.jsonl:1" in ended.stderr
    assert not ended.stdout
    assert not (tmp_path / "out").exists()
