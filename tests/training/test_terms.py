"""Each loss is defined once: settings, logs, questions and sums follow from its class."""

from __future__ import annotations

import pytest
import torch

from decausal.data.counts import Count
from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.layout import Layout
from decausal.models.backbone import body_forward, logits
from decausal.training.losses import Supervision, loss_sums, weighted_loss
from decausal.training.questions import HiddenStates, NextTokens, Vocabulary, ask
from decausal.training.settings import ConversionSettings
from decausal.training.terms import TERMS, AlignmentTerm, DivergenceTerm, TotalVariationTerm
from tests.families import VOCAB_SIZE
from tests.runs import BIDIRECTIONAL, adapted, logged, run, save_source, teacher_of, uneven_rows, write_text

CAUSAL = Layout("causal")


def test_every_loss_has_its_settings_and_a_name_of_its_own_in_the_log():
    assert sorted(ConversionSettings.losses()) == sorted(term.setting for term in TERMS)
    assert len({term.log_name for term in TERMS}) == len(TERMS)
    for term in TERMS:
        for setting in ("weight", "schedule", "start_step", "stop_step"):
            assert f"{term.setting}_{setting}" in ConversionSettings.__dataclass_fields__


def test_a_run_with_all_losses_logs_each_and_their_weighted_sum(tmp_path):
    source, text = save_source(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    weights = {f"{term.setting}_weight": 0.5 + number for number, term in enumerate(TERMS)}
    options = weights | {"layout": "block", "block_size": 4, "save_strategy": "no"}
    conversion = run(source, text, tmp_path / "out", **options)
    for number, total in enumerate(logged(conversion, "loss")):
        parts = [weights[f"{term.setting}_weight"] * logged(conversion, term.log_name)[number] for term in TERMS]
        assert all(part > 0 for part in parts)
        assert total == pytest.approx(sum(parts), rel=1e-4)


def a_batch(mask_token_id):
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=1, noising=Noising())
    return Collator(mask_token_id, 1)([stream[position] for position in (2, 3)])


def test_the_total_variation_is_the_naive_mean_with_its_gradients():
    student, mask_token_id = adapted("qwen3", torch.float64)
    teacher, batch, term = teacher_of("qwen3", torch.float64), a_batch(mask_token_id), TotalVariationTerm()
    with torch.no_grad():  # so that the two models differ in their weights, too
        for parameter in student.parameters():
            parameter.mul_(1.5)
    answers = ask(teacher, term.questions, batch, Vocabulary(VOCAB_SIZE, mask_token_id))
    args = student, batch, Supervision(BIDIRECTIONAL, mask_token_id), {term: 2.0}, batch["counts"], answers
    found, means = weighted_loss(*args)

    documents = {"document_ids": batch["document_ids"], "position_ids": batch["position_ids"]}
    of_student = logits(student, batch["noised_ids"], BIDIRECTIONAL, **documents).flatten(0, 1)[batch["target_index"]]
    of_teacher = logits(teacher.model, batch["clean_ids"], CAUSAL, **documents).flatten(0, 1)
    of_teacher = of_teacher[batch["next_token_index"]]
    shared = torch.arange(min(of_student.shape[1], of_teacher.shape[1]))
    shared = shared[shared != mask_token_id]
    q, p = of_student[:, shared].softmax(-1), of_teacher[:, shared].softmax(-1)
    distance = (p - q).abs().sum(-1) / 2
    expected = (distance * batch["logit_weight"]).sum() / batch["counts"][Count.NEXT_TOKENS]
    assert 0.01 < expected < 1
    torch.testing.assert_close(means[term], expected.detach())
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found, parameters)
    for gradient, naive in zip(gradients, torch.autograd.grad(2 * expected, parameters), strict=True):
        torch.testing.assert_close(gradient, naive)


def test_questions_that_losses_share_are_asked_once_and_from_one_pass():
    mask_token_id = adapted("qwen3")[1]
    teacher, batch = teacher_of("qwen3"), a_batch(mask_token_id)
    terms = (AlignmentTerm((0, 2)), DivergenceTerm(), DivergenceTerm("jsd"), TotalVariationTerm())
    passes: list[object] = []
    teacher.model.base_model.register_forward_hook(lambda *_: passes.append(None))
    answers = ask(teacher, [q for term in terms for q in term.questions], batch, Vocabulary(VOCAB_SIZE, mask_token_id))
    assert list(answers) == [HiddenStates((0, 2), "teacher_index"), NextTokens("next_token_index")]
    assert len(passes) == 1
    last = body_forward(
        teacher.model,
        batch["clean_ids"],
        CAUSAL,
        document_ids=batch["document_ids"],
        position_ids=batch["position_ids"],
    ).last_hidden_state.flatten(0, 1)
    assert torch.equal(answers[NextTokens("next_token_index")].hidden, last[batch["next_token_index"]])


def test_without_a_question_there_is_no_pass_and_no_teacher_is_needed():
    student, mask_token_id = adapted("qwen3")
    batch = a_batch(mask_token_id)
    assert ask(None, [], batch, Vocabulary(VOCAB_SIZE, mask_token_id)) == {}
    assert loss_sums(student, batch, Supervision(BIDIRECTIONAL, mask_token_id))
