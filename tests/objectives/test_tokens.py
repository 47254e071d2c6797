"""The chunked loss as a good citizen: logits, dtypes, devices, freezing, memory and work."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decausal.objectives.head import Head, default_chunk_size, logits
from decausal.objectives.tokens import chunked_cross_entropy


class TensorLedger(TorchDispatchMode):
    """Records, over the operations run inside it, peak live bytes, the largest tensor and the matrix products.

    Tensors that exist before, given as `inputs`, are not counted.
    """

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest = 0
        self.matmul_rows: list[int] = []
        self.inputs = [tensor.untyped_storage() for tensor in inputs]
        self.seen = {id(storage) for storage in self.inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.matmul_rows.append(output.shape[0])
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._record(tensor)
        return output

    def _record(self, tensor: torch.Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            return
        self.seen.add(id(storage))
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, storage_id: int, num_bytes: int) -> None:
        self.seen.discard(storage_id)
        self.live_bytes -= num_bytes


def _problem(n, V, D, *, trainable, device="cpu", dtype=torch.float32):
    hidden = torch.randn(n, D, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device, dtype=dtype) * 0.3).requires_grad_(trainable)
    targets = torch.zeros(n, dtype=torch.long, device=device) + torch.arange(n, device=device) % V
    return hidden, Head(weight), targets, torch.rand(n, device=device)


def _naive_sum(hidden, head, targets, weights):
    nll = torch.nn.functional.cross_entropy((hidden @ head.weight.T).float(), targets, reduction="none")
    return (weights * nll).sum()


def _peak_bytes(loss_sum, hidden, head, targets, weights) -> int:
    with TensorLedger(hidden, head.weight, targets, weights) as ledger:
        loss_sum(hidden, head, targets, weights).backward()
    return ledger.peak_bytes


def _chunked_sum(*problem, **options):
    return chunked_cross_entropy(*problem, **options).loss_sum


# Tensors on the meta device have shapes and storage sizes but no data: peak memory at a real vocabulary, in no time.
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_peak_memory_at_150k_vocabulary_is_a_tenth_of_the_naive_form(device_type):
    chunk_size = default_chunk_size(150_000, device_type)
    problem = _problem(max(2048, 16 * chunk_size), 150_000, 64, trainable=False, device="meta")
    ours = _peak_bytes(lambda *p: _chunked_sum(*p, chunk_size=chunk_size), *problem)
    assert ours <= _peak_bytes(_naive_sum, *problem) / 10


def test_peak_memory_with_a_trainable_head_is_a_tenth_of_the_naive_form():
    problem = _problem(2048, 150_000, 64, trainable=True, device="meta")
    assert _peak_bytes(_chunked_sum, *problem) <= _peak_bytes(_naive_sum, *problem) / 10


def test_the_ledger_sees_the_naive_form_hold_all_logits():
    problem = _problem(32, 1000, 8, trainable=False)
    assert _peak_bytes(_naive_sum, *problem) >= 2 * 32 * 1000 * 4


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_tensor_as_large_as_all_logits_is_ever_made(softcap):
    n, V, D = 96, 300, 8
    hidden, head, targets, weights = _problem(n, V, D, trainable=True)
    with TensorLedger() as ledger:
        loss = chunked_cross_entropy(hidden, head._replace(softcap=softcap, banned=4), targets, weights, 1.0, 16)
        loss.loss_sum.backward()
    assert ledger.largest == max(16 * V, V * D) < n * V


@pytest.mark.parametrize(("trainable", "products"), [(False, 2), (True, 3)])
def test_the_head_runs_once_per_target_row_and_products_are_two_or_three(trainable, products):
    problem = _problem(96, 300, 8, trainable=trainable)
    with TensorLedger() as ledger:
        chunked_cross_entropy(*problem, chunk_size=32).loss_sum.backward()
    assert len(ledger.matmul_rows) == products * 3
    of_rows = [rows for rows in ledger.matmul_rows if rows != 300]
    assert sum(of_rows) == 2 * 96


def test_without_gradients_only_the_logits_are_computed():
    problem = _problem(96, 300, 8, trainable=True)
    with torch.no_grad(), TensorLedger() as ledger:
        loss = chunked_cross_entropy(*problem, chunk_size=32)
    assert ledger.matmul_rows == [32, 32, 32]
    assert not loss.loss_sum.requires_grad
    assert torch.equal(loss.nll, chunked_cross_entropy(*problem, chunk_size=32).nll)


def test_the_host_never_reads_a_value():
    hidden, head, targets, weights = _problem(8, 30, 4, trainable=True, device="meta")
    # A meta tensor has no value to read: any .item(), nonzero or branch on one raises.
    head = head._replace(bias=torch.zeros(30, device="meta"), softcap=2.0, scale=0.5, banned=3)
    chunked_cross_entropy(hidden, head, targets, weights, papl=1.0, chunk_size=3).loss_sum.backward()
    assert hidden.grad.shape == hidden.shape


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same():
    hidden, head, targets, weights = _problem(20, 30, 4, trainable=True)
    _chunked_sum(hidden, head, targets, weights).backward()
    with_head, hidden.grad = hidden.grad, None
    _chunked_sum(hidden, Head(head.weight.detach()), targets, weights).backward()
    assert torch.equal(hidden.grad, with_head)


def test_a_trainable_head_on_states_without_gradient():
    hidden, head, targets, weights = _problem(20, 30, 4, trainable=True)
    _chunked_sum(hidden, head, targets, weights).backward()
    with_hidden, head.weight.grad = head.weight.grad, None
    _chunked_sum(hidden.detach(), head, targets, weights).backward()
    assert torch.equal(head.weight.grad, with_hidden)


def test_gradient_scales_with_what_follows_the_loss_and_a_retained_graph_repeats_it():
    hidden, head, targets, weights = _problem(20, 30, 4, trainable=True)
    loss = _chunked_sum(hidden, head, targets, weights) * 0.25
    first = torch.autograd.grad(loss, (hidden, head.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, head.weight))
    whole = torch.autograd.grad(_chunked_sum(hidden, head, targets, weights), (hidden, head.weight))
    for a, b, c in zip(first, second, whole, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(4 * a, c, rtol=1e-6)


def test_no_rows_cost_nothing_and_stay_connected():
    hidden, head, targets, weights = _problem(0, 30, 4, trainable=True)
    loss = chunked_cross_entropy(hidden, head, targets, weights)
    loss.loss_sum.backward()
    assert loss.loss_sum == 0
    assert loss.nll.shape == (0,)
    assert hidden.grad.shape == (0, 4)
    assert (head.weight.grad == 0).all()


# An infinite state under a cap is not here: there the stock model's own logits are finite, too.
@pytest.mark.parametrize(
    ("value", "softcap"), [(torch.nan, None), (torch.inf, None), (-torch.inf, None), (torch.nan, 5.0)]
)
def test_a_state_that_is_not_finite_makes_the_loss_not_finite(value, softcap):
    hidden, head, targets, weights = _problem(9, 30, 4, trainable=False)
    with torch.no_grad():
        hidden[5, 2] = value
    loss = chunked_cross_entropy(hidden, head._replace(softcap=softcap), targets, weights, chunk_size=4)
    assert not loss.loss_sum.isfinite()


def test_bf16_states_keep_an_fp32_softmax_and_get_bf16_gradients():
    hidden, head, targets, weights = _problem(64, 50, 16, trainable=True, dtype=torch.bfloat16)
    loss = chunked_cross_entropy(hidden, head, targets, weights, chunk_size=10)
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), head.weight.detach().double()
    exact = chunked_cross_entropy(exact_hidden, Head(exact_weight), targets, weights)
    loss.loss_sum.backward()
    exact.loss_sum.backward()
    assert loss.nll.dtype == torch.float32
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    assert loss.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=3e-3)
    assert (hidden.grad - exact_hidden.grad).norm() < 0.02 * exact_hidden.grad.norm()


def test_under_autocast_products_run_in_its_dtype_and_master_weights_get_fp32_gradients():
    hidden, head, targets, weights = _problem(40, 50, 16, trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = chunked_cross_entropy(hidden, head, targets, weights)
    autocast.loss_sum.backward()
    explicit = chunked_cross_entropy(hidden.bfloat16(), Head(head.weight.bfloat16()), targets, weights)
    assert torch.equal(autocast.nll, explicit.nll)
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32


def test_logits_are_fp32_capped_scaled_and_never_the_banned_token():
    hidden, head, _, _ = _problem(12, 30, 4, trainable=False, dtype=torch.bfloat16)
    plain = logits(hidden, head)
    changed = logits(hidden, head._replace(scale=4.0, softcap=2.0, banned=7))
    others = torch.arange(30) != 7
    assert plain.dtype == changed.dtype == torch.float32
    assert torch.equal(changed[:, others], (2 * torch.tanh(4 * plain / 2))[:, others])
    assert (changed[:, 7] == -torch.inf).all()


def test_default_chunks_are_bounded_in_bytes_and_never_tiny():
    assert default_chunk_size(4096, "cpu") == 1024
    assert default_chunk_size(10**9, "cpu") == 64
    assert default_chunk_size(150_000, "cuda") * 150_000 * 4 <= 2**30
