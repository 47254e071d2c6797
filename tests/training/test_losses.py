"""What one training forward computes, on which rows, and without ever waiting for the device."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.models.backbone import head_of, logits
from decausal.models.mask_row import freeze_embeddings
from decausal.training.losses import Supervision, install_training_forward, loss_sums, remove_training_forward
from decausal.training.schedule import WeightSchedule
from decausal.training.terms import TokenTerm
from tests.runs import adapted, make_trainer, uneven_rows

BIDIRECTIONAL = Layout("bidirectional")


def a_batch(mask_token_id: int, shift: int = 1, **collation) -> dict[str, Tensor]:
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=shift, noising=Noising(2))
    return Collator(mask_token_id, shift, **collation)([stream[position] for position in range(4)])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("weighting", ["none", "inverse_t"])
@pytest.mark.parametrize("papl", [0.0, 1.0])
def test_the_token_loss_is_the_naive_one_on_the_noised_rows(shift, weighting, papl):
    model, mask_token_id = adapted("qwen3", torch.float64)
    batch = a_batch(mask_token_id, shift, weighting=weighting)
    supervision, term = Supervision(BIDIRECTIONAL, mask_token_id), TokenTerm(papl)
    document_ids, position_ids = (batch[name].repeat_interleave(2, 0) for name in ("document_ids", "position_ids"))
    scores = logits(model, batch["noised_ids"], BIDIRECTIONAL, document_ids=document_ids, position_ids=position_ids)
    scores[..., mask_token_id] = -torch.inf
    is_target = batch["noised_ids"] == mask_token_id
    states = torch.roll(scores, shift, dims=1)[is_target]
    targets = batch["clean_ids"].repeat_interleave(2, 0)[is_target]
    nll = -states.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = batch["target_weight"] + papl * torch.exp(-nll).detach()
    found = loss_sums(model, batch, supervision, [term])[term]
    torch.testing.assert_close(found, (weights * nll).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, naive in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad((weights * nll).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, naive)


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products that involve the vocabulary."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "linear"):
            left, right = args[-2:] if name in ("addmm", "addmm_", "baddbmm") else args[:2]
            sizes = (*left.shape, right.shape[-1])
            if self.vocabulary_size in sizes:
                self.count += torch.Size(sizes).numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("is_frozen", "num_products"), [(False, 3), (True, 2)], ids=["trained", "frozen"])
def test_head_and_loss_run_on_target_rows_only(is_frozen, num_products):
    model, mask_token_id = adapted("llama")
    if is_frozen:
        freeze_embeddings(model, mask_token_id)
    batch = a_batch(mask_token_id)
    weight = head_of(model).weight
    with Products(len(weight)) as products:
        loss_sums(model, batch, Supervision(BIDIRECTIONAL, mask_token_id))[TokenTerm()].backward()
    assert products.count == num_products * len(batch["target_index"]) * weight.numel()
    assert len(batch["target_index"]) < batch["noised_ids"].numel() / 2


class NoSync(TorchDispatchMode):
    """Fails on every operation whose result's size or value the host would have to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal"), name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing by a boolean tensor"
        return function(*args, **(kwargs or {}))


def test_the_guard_against_syncs_works():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        bool(torch.ones(1).sum() > 0)
    with pytest.raises(AssertionError, match="boolean"), NoSync():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("layout", [BIDIRECTIONAL, Layout("block", 4)], ids=lambda layout: layout.kind)
def test_a_step_on_a_device_never_waits_for_it(tmp_path, family, layout):
    """On the meta device nothing can be waited for; the guard also finds what meta tensors would let pass."""
    alignment = WeightSchedule(10.0, "cosine", None, 4)
    supervision = {"alignment": alignment, "anneal_steps": 0 if layout.kind == "block" else 4, "papl": 1.0}
    options = {"family": family, "layout": layout, "noising": Noising(2), "supervision": supervision}
    trainer = make_trainer(tmp_path, uneven_rows(), **options)
    trainer.model.to("meta").train()
    trainer.teacher.model.to("meta")
    batches = [trainer.data_collator([trainer.train_dataset[p], trainer.train_dataset[p + 1]]) for p in (0, 2)]
    batches = [tree_map(lambda tensor: tensor.to("meta"), batch) for batch in batches]
    with NoSync():
        batches, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("meta"))
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).backward()


def test_installing_the_training_forward_leaves_the_stock_one_for_other_calls():
    model, _ = adapted("qwen3")
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    install_training_forward(model)
    assert torch.equal(model(ids).logits, expected)
    assert model(inside=lambda: "anything") == "anything"
    remove_training_forward(model)
    assert "forward" not in vars(model)
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


def test_a_micro_batch_without_a_target_has_loss_0_and_gradients_0():
    model, mask_token_id = adapted("qwen3")
    batch = a_batch(mask_token_id)
    batch |= {name: batch[name][:0] for name in ("target_index", "target_ids", "target_weight")}
    loss = loss_sums(model, batch, Supervision(BIDIRECTIONAL, mask_token_id))[TokenTerm()]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_counts_and_weights_of_a_batch_are_not_rounded_on_their_way(tmp_path, monkeypatch):
    """Under DeepSpeed transformers casts a batch's numbers to the model's type: 257 targets would be 256 in bf16."""
    trainer = make_trainer(tmp_path, uneven_rows())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    batch = {"target_weight": torch.tensor([1 / 3]), "counts": {"tokens": torch.tensor(257.0, dtype=torch.float64)}}
    found = trainer._prepare_inputs(batch)
    assert torch.equal(found["target_weight"], batch["target_weight"])
    assert found["counts"]["tokens"] == 257
