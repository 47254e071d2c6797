"""Exports as SDAR, the form in which SGLang and LMDeploy serve block diffusion models made from Qwen3."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.exchange import configuration_sdar
from decausal.exchange.card import CARD, ModelCard
from decausal.exchange.converted_files import ConvertedFiles, facts_to_hand_on, open_converted, whole_directory
from decausal.exchange.engines import SGLANG_SETTINGS, launch_commands, sglang_settings
from decausal.exchange.mask_token import ENGINE_MASK_TOKEN_ID, engine_mask_token, never_predicted
from decausal.exchange.staging import Exported, refuse_filled, staged
from decausal.exchange.stock import EMBEDDINGS, HEAD, expected_tensors, head_dim
from decausal.exchange.tensor_files import Stored, refuse_other_tensors, write_tensor_files
from decausal.models.facts import ConversionFacts, read_facts

ARCHITECTURES = {"qwen3": "SDARForCausalLM", "qwen3_moe": "SDARMoeForCausalLM"}
MODEL_TYPES = {"qwen3": "sdar", "qwen3_moe": "sdar_moe"}
FACTS_KEY = "decausal"


def export_sdar(directory: str | Path, output_dir: str | Path, *, card: ModelCard | None = None) -> Exported:
    """Writes a converted Qwen3 or Qwen3-MoE block model as an SDAR checkpoint.

    Tensors are copied one at a time in their stored type. The head is always written, untied, with the mask token's row
    silenced (`never_predicted`). The mask token moves to id 151669 if the vocabulary is large enough.

    Args:
        directory: What `decausal convert` wrote.
        output_dir: A new or empty directory.
        card: What the model card says apart from the facts.

    Raises:
        UserError: SDAR cannot express the model (with the reason), its files are broken, or `output_dir` is not empty.
    """
    refuse_filled(Path(output_dir))
    if read_facts(directory).is_gated:
        raise UserError(
            f"{directory} is a gated conversion, which SDAR's form cannot hold: its adapter acts at masks alone and is "
            "never merged; give --format hf"
        )
    with whole_directory(Path(directory)) as whole:
        source = open_converted(whole)
        reason = refusal(source.facts, source.config)
        if reason is not None:
            raise UserError(f"{directory} cannot be exported as SDAR: {reason}; --format hf takes any converted model")
        return _export(source, Path(output_dir), card or ModelCard())


def _export(source: ConvertedFiles, output_dir: Path, card: ModelCard) -> Exported:
    refuse_other_tensors(source.tensors.shapes(), expected_tensors(source.config), source.directory)
    mask_token_id = engine_mask_token(source.tokenizer, source.config.vocab_size)
    facts = replace(source.facts, mask_token_id=mask_token_id)
    is_served = mask_token_id == ENGINE_MASK_TOKEN_ID
    commands = launch_commands(output_dir, facts) if is_served else {}
    with staged(output_dir) as staging:
        write_tensor_files(staging, _tensors(source, mask_token_id))
        _write_json(staging / "config.json", sdar_config(source, facts))
        _write_json(staging / "generation_config.json", _generation_config(source))
        shutil.copyfile(configuration_sdar.__file__, staging / "configuration_sdar.py")
        (staging / SGLANG_SETTINGS).write_text(yaml.safe_dump(sglang_settings(facts)), encoding="utf-8")
        _save_tokenizer(source.tokenizer, staging)
        text = card.text(facts, source.config, form="sdar", commands=commands)
        (staging / CARD).write_text(text, encoding="utf-8")
    return Exported(output_dir, facts, commands, _notes(source, facts))


def refusal(facts: ConversionFacts, config: PretrainedConfig) -> str | None:
    """Returns why SDAR cannot express a model, as one clause, or None."""
    if config.model_type not in MODEL_TYPES:
        return f"it is made from '{config.model_type}', and SDAR is Qwen3 or Qwen3-MoE"
    if facts.layout != "block":
        return f"its layout is '{facts.layout}', and SDAR's is 'block'"
    if facts.causal_context:
        return "its finished blocks read causally (causal_context), and SDAR's read their whole block"
    if facts.shift != 0:
        return f"its shift is {facts.shift} (the state before a token predicts it), and SDAR's is 0"
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type != "default":
        return f"its rotary embedding is scaled ('{rope_type}'), which engines read in different ways"
    if config.use_sliding_window:
        return "it has sliding-window layers, which SDAR does not have"
    if config.hidden_act != "silu":
        return f"its activation is '{config.hidden_act}', and SDAR's is 'silu'"
    if config.model_type == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        return "some of its layers are not mixtures of experts"
    return None


def sdar_config(source: ConvertedFiles, facts: ConversionFacts) -> dict[str, Any]:
    """Returns the exported config.json, with the names that SGLang, LMDeploy and transformers each read."""
    config, kind = source.config, source.config.model_type
    end_ids = source.all_end_ids
    class_name = "SDARConfig" if kind == "qwen3" else "SDARMoeConfig"
    dtype = str(source.tensors.dtype(EMBEDDINGS)).removeprefix("torch.")
    rope_theta = config.rope_parameters["rope_theta"]
    copied = ("attention_bias", "attention_dropout", "hidden_act", "hidden_size", "initializer_range")
    copied += ("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    copied += ("num_key_value_heads", "pad_token_id", "rms_norm_eps", "vocab_size")
    if kind == "qwen3_moe":
        copied += ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")
        copied += ("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
    return {name: getattr(config, name) for name in copied} | {
        "architectures": [ARCHITECTURES[kind]],
        "auto_map": {"AutoConfig": f"configuration_sdar.{class_name}"},
        "block_size": facts.block_size,
        # LMDeploy fills rows with it, so it may not be empty.
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else next(iter(end_ids), None),
        "dtype": dtype,
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
        "fuse_cross_entropy": True,  # as published: SDAR's modelling file reads it, but always fuses in training
        "head_dim": head_dim(config),
        "mask_token_id": facts.mask_token_id,
        "max_window_layers": config.num_hidden_layers,
        "model_type": MODEL_TYPES[kind],
        # Read by LMDeploy and transformers 5, which drops it if there is also a key rope_scaling.
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,  # read by SGLang, which otherwise silently uses 10000
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        FACTS_KEY: asdict(facts_to_hand_on(facts)),
    }


def _tensors(source: ConvertedFiles, mask_token_id: int) -> dict[str, Stored]:
    tensors = {name: source.tensors.stored(name) for name in source.tensors.names()}
    old_mask_token_id = source.facts.mask_token_id
    embeddings, is_tied = tensors[EMBEDDINGS], source.config.tie_word_embeddings
    head = embeddings if is_tied else tensors[HEAD]

    def moved() -> Any:
        rows = embeddings.load().clone()
        rows[mask_token_id] = rows[old_mask_token_id]
        return rows

    def silenced() -> Any:
        num_rows = source.config.vocab_size
        trained_ids = [found for found in source.tokenizer.get_vocab().values() if found < num_rows]
        return never_predicted(head.load(), sorted({mask_token_id, old_mask_token_id}), trained_ids)

    if mask_token_id != old_mask_token_id:
        tensors[EMBEDDINGS] = Stored(embeddings.num_bytes, moved)
    tensors[HEAD] = Stored(head.num_bytes, silenced)
    return tensors


def _generation_config(source: ConvertedFiles) -> dict[str, Any]:
    ids = {
        "bos_token_id": source.config.bos_token_id,
        "eos_token_id": source.all_end_ids,
        "pad_token_id": source.config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves a tokenizer under names that transformers 4, which engines also use, and 5 both understand."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(path, settings)


def _notes(source: ConvertedFiles, facts: ConversionFacts) -> list[str]:
    notes = []
    if facts.mask_token_id != ENGINE_MASK_TOKEN_ID:
        notes.append(
            f"SGLang and LMDeploy take token {ENGINE_MASK_TOKEN_ID} for the mask token, and this vocabulary has only "
            f"{source.config.vocab_size} rows: they cannot serve this model (its mask token has id "
            f"{facts.mask_token_id})"
        )
    elif source.facts.mask_token_id != facts.mask_token_id:
        notes.append(f"the mask token moved from id {source.facts.mask_token_id} to {facts.mask_token_id}")
    if facts.mask_token_id == ENGINE_MASK_TOKEN_ID and facts.sampler.get("num_steps") is not None:
        notes.append("SGLang has no schedule of fixed steps: it keeps one token a step")
    if not source.all_end_ids:
        notes.append("the model has no end-of-text token: engines write until their length limit")
    return notes


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
