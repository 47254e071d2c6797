"""Settings of a conversion: what each refuses, and what is left open for the model to say."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import asdict

import pytest

from decausal.config import resolve
from decausal.errors import UserError
from decausal.training.settings import ConversionSettings
from decausal.training.settings.field import Family

FAMILIES = [family for family in ConversionSettings.__mro__ if issubclass(family, Family)]


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--views", "0"], "--views 0: must be at least 1"),
        (["--align_weight", "-1"], "--align_weight -1.0: must be at least 0"),
        (["--align_weight", "nan"], "--align_weight nan: must be at least 0"),
        (["--max_length", "1"], "--max_length 1: must be at least 2"),
        (["--eval_split", "test"], "--eval_split test has no effect without --eval_data"),
        (["--data_fraction", "0"], "--data_fraction 0.0: must be above 0"),
        (["--complementary_masks", "true"], "--complementary_masks needs --views 2, not 1"),
        (["--align_stop_step", "1.5"], "--align_stop_step 1.5: give a number of steps, or a share of the run below 1"),
        (["--token_start_step", "-1"], "--token_start_step -1: give a number of steps"),
        (
            ["--token_start_step", "5", "--token_stop_step", "5"],
            "--token_stop_step 5 is not after",
        ),
        (["--token_weight", "0"], "--token_weight 0 leaves nothing to train on"),
        (["--kl_stop_step", "1.5"], "--kl_stop_step 1.5: give a number of steps"),
        (["--kl_top_k", "0"], "--kl_top_k 0: must be at least 1"),
        (["--kl_tail_bucket", "--kl_weight", "1"], "--kl_tail_bucket needs --kl_top_k"),
        (["--jsd_beta", "0"], "--jsd_beta 0.0: must lie between 0 and 1"),
        (["--causal_kl_weight", "1"], "--causal_kl_weight is for --layout block, not bidirectional"),
        (["--rows", "rollout"], "--rows rollout needs --layout block, not bidirectional"),
        (["--warm_start_steps", "5"], "--warm_start_steps is for --rows rollout"),
        (["--rollout_prompts", "0"], "--rollout_prompts 0: must be at least 1"),
        (["--rollout_temperature", "-1"], "--rollout_temperature -1.0: must be at least 0"),
        (["--layout", "block"], "--layout block needs --block_size"),
        (["--layout", "block", "--block_size", "0"], "--block_size 0: must be at least 1"),
        (["--layout", "block", "--block_size", "513"], "--block_size 513 is over --max_length 512"),
        (
            ["--layout", "block", "--block_size", "4", "--anneal_steps", "9"],
            "--anneal_steps 9 is not for --layout block",
        ),
        (["--block_size", "4"], "--block_size 4 is for --layout block, not bidirectional"),
        (["--causal_context"], "--causal_context is for --layout block, not bidirectional"),
        (["--noise_per", "block"], "--noise_per block is for --layout block, not bidirectional"),
        (["--layout=block", "--block_size=4", "--complementary_masks"], "--complementary_masks needs --views 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, reported):
    with pytest.raises(UserError, match=re.escape(reported)):
        resolve(ConversionSettings, {}, flags)[0].with_facts()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_checks_only_settings_that_it_has_or_inherits(family):
    """So a contradiction stands in the file of one of the settings that it is about."""
    known = set(dir(family)) | set(getattr(family, "__dataclass_fields__", ()))
    for name in {"check", "check_facts"} & vars(family).keys():
        tree = ast.parse(textwrap.dedent(inspect.getsource(vars(family)[name])))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                assert node.attr in known, f"{family.__name__}.{name} reads {node.attr}"


def test_every_setting_belongs_to_one_family():
    declared = [name for family in FAMILIES for name in vars(family).get("__annotations__", {})]
    assert sorted(declared) == sorted(ConversionSettings.__dataclass_fields__)


def test_facts_that_are_left_open_come_from_the_model_and_what_is_given_wins():
    block = {"layout": "block", "block_size": 4, "causal_context": True, "shift": 0, "sampler": {"threshold": 0.5}}

    def facts(**given):
        completed = ConversionSettings(**given).with_facts(**block)
        return {name: getattr(completed, name) for name in block}

    assert facts() == block
    assert facts(block_size=8, shift=1) == block | {"block_size": 8, "shift": 1}
    assert facts(causal_context=False, sampler={"threshold": 0.9}) == block | {
        "causal_context": False,
        "sampler": {"threshold": 0.9},
    }
    other = {"layout": "bidirectional", "block_size": None, "causal_context": False, "sampler": None}
    assert facts(layout="bidirectional") == block | other  # what belongs to a layout goes with it
    as_of_an_ar_model = other | {"shift": 1, "causal_groups": False, "weights": "shared"}
    assert asdict(ConversionSettings().with_facts()) == asdict(ConversionSettings()) | as_of_an_ar_model
