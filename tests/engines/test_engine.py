"""Engines against plain PyTorch: gradients, accumulation, masks, rollouts, averages, saved models."""

import os

import pytest
import torch
from small import engine, scratch, spec
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.ema import MovingAverage
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.interface import Prompts, Sampling, left_padded
from rlhfdsl.engines.rollout.sampling import gumbel, row_seeds
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.inputs import length_mask
from rlhfdsl.models.tokenizers import byte_tokenizer
from rlhfdsl.training.experience import answer_mask, at_answers
from rlhfdsl.training.losses import selected_log_probs, token_mean

LENGTHS = torch.tensor([12, 9, 5, 12])


def some_ids() -> torch.Tensor:
    return torch.randint(0, 255, (4, 12), generator=torch.Generator().manual_seed(0))


def nll(policy, ids, lengths, rows, tokens):
    """Masked next-token loss of some rows as a part of the whole batch's token mean."""
    part, part_lengths = ids[rows], lengths[rows]
    log_probs = selected_log_probs(policy.logits(part, part_lengths)[:, :-1], part[:, 1:])
    return token_mean(-log_probs, length_mask(part_lengths, part.shape[1])[:, 1:], tokens, 1)


def weights(module) -> torch.Tensor:
    from rlhfdsl.models.loading import gathered

    parts = []
    for parameter in module.parameters():
        with gathered([parameter]):
            parts.append(parameter.detach().float().flatten().clone())
    return torch.cat(parts)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_update_equals_plain_adamw_however_the_batch_is_cut(source, zero):
    ids, tokens = some_ids(), (LENGTHS - 1).sum()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for _ in range(3):
        losses = []
        for row in range(4):  # a slow, obvious version: one row at a time, no padding at all
            sequence = ids[row : row + 1, : LENGTHS[row]]
            log_probs = plain(sequence).logits[:, :-1].log_softmax(-1)
            losses.append(-log_probs.gather(2, sequence[:, 1:, None]).sum())
        (sum(losses) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    policy = engine(PolicyEngine, source, spec(zero=zero, grad_clip=0.5))
    for _ in range(3):
        policy.train()
        for rows in ([0], [1, 2], [3]):
            policy.backward(nll(policy, ids, LENGTHS, rows, tokens))
        step = policy.step()
    assert step["lr"] == 1e-3 and step["grad_norm"] > 0.5
    torch.testing.assert_close(weights(policy.module), weights(plain), atol=2e-6, rtol=1e-5)


def test_every_update_has_the_rate_of_its_schedule(source):
    # Half of the peak in the warm-up, the peak, and half way down to 0 after the third update.
    rates, ids, tokens = [5e-3, 1e-2, 5e-3], some_ids(), (LENGTHS - 1).sum()
    schedule = {"kind": "linear", "lr": 1e-2, "warmup": 1, "updates": 3}
    policy = engine(PolicyEngine, source, spec(lr=1e-2) | {"schedule": schedule})
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for rate in rates:
        policy.backward(nll(policy, ids, LENGTHS, slice(0, 4), tokens))
        assert policy.step()["lr"] == pytest.approx(rate)
        log_probs = plain(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        (-(log_probs * length_mask(LENGTHS, 12)[:, 1:]).sum() / tokens).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([parameter.detach().flatten() for parameter in plain.parameters()])
    torch.testing.assert_close(weights(policy.module), expected, atol=1e-4, rtol=1e-3)


def test_gradients_in_bf16_are_summed_in_fp32_clipped_by_the_norm_of_all_and_freed(source):
    ids, tokens = some_ids(), (LENGTHS - 1).sum()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in plain.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    policy = engine(PolicyEngine, source, spec(zero=1, dtype="bf16", grad_clip=0.5))
    for _ in range(2):
        policy.train()
        sums = [torch.zeros_like(master) for master in masters]
        for rows in ([0], [1, 2], [3]):
            policy.backward(nll(policy, ids, LENGTHS, rows, tokens))
            assert all(p.grad is None for p in policy.module.parameters())
            log_probs = selected_log_probs(plain(ids[rows]).logits[:, :-1], ids[rows, 1:])
            token_mean(-log_probs, length_mask(LENGTHS[rows], 12)[:, 1:], tokens, 1).backward()
            for total, parameter in zip(sums, plain.parameters(), strict=True):
                total += parameter.grad.float()
                parameter.grad = None
        norm = torch.cat([total.flatten() for total in sums]).norm()
        assert norm > 0.5
        assert policy.step()["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        for master, total in zip(masters, sums, strict=True):
            master.grad = total * 0.5 / norm
        optimizer.step()
        for parameter, master in zip(plain.parameters(), masters, strict=True):
            parameter.data.copy_(master)
    near = torch.isclose(weights(policy.module), weights(plain), atol=1e-5, rtol=2**-8)
    assert near.float().mean() > 0.98  # Adam takes a gradient near 0 up or down by its last bit


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_ends_the_run(source, zero, what):
    policy = engine(PolicyEngine, source, spec(zero=zero, grad_clip=1.0))
    policy.train()
    loss = nll(policy, some_ids(), LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum())
    policy.backward(loss * 1e38 * 1e38 if what == "loss" else (loss * 0).sqrt())  # d sqrt(x) / dx at 0 is infinite
    with pytest.raises(UserError, match=f"the {what} of `test` is not finite in its update 1"):
        policy.step()


def test_padding_content_does_not_matter(source):
    policy = engine(PolicyEngine, source, spec())
    policy.eval()
    ids = some_ids()
    other = ids.masked_fill(~length_mask(LENGTHS, 12), 258)  # end-of-text as padding
    with torch.no_grad():
        first, second = policy.logits(ids, LENGTHS), policy.logits(other, LENGTHS)
    mask = length_mask(LENGTHS, 12)
    torch.testing.assert_close(first[mask], second[mask])


def test_score_is_read_at_the_last_real_token(source):
    reward = engine(ScalarEngine, source, spec("reward", trains=False))
    ids = some_ids()
    with torch.no_grad():
        padded = reward.scores(torch.nn.functional.pad(ids, (0, 5), value=258), LENGTHS)
        alone = torch.cat([reward.scores(ids[i : i + 1, :n], LENGTHS[i : i + 1]) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_new_head_has_the_deviation_of_its_formula(tmp_path):
    wide = scratch(tmp_path / "wide", hidden=512, intermediate=64, layers=1)
    head = engine(ScalarEngine, wide, spec("reward", trains=False)).module.classifier.score.weight
    assert head.shape == (1, 512)
    # sd 1/sqrt(513) = 0.04415; the sample deviation of 512 draws errs by 1/sqrt(2 x 512) = 3 %, so 5 of those
    assert abs(head.std().item() * 513**0.5 - 1) < 0.16


def rollout(policy, prompts, answers=1, temperature=1.0, tokens=10, stop=(258,), seed=5):
    ids, mask = left_padded(prompts, 256)
    seeds = row_seeds(seed, 0, torch.arange(len(prompts) * answers))
    sampling = Sampling(
        max_new_tokens=tokens, temperature=temperature, n_samples_per_prompt=answers, stop_ids=stop, pad_id=256
    )
    return policy.generate(Prompts(ids, mask, seeds), sampling)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_equals_a_loop_without_cache_or_padding(source, temperature):
    policy = engine(HybridEngine, source, spec())
    prompts = [[10, 20, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    stop = tuple(range(0, 259, 12))
    found = rollout(policy, prompts, answers=2, temperature=temperature, stop=stop)
    ids, prompt_lengths, lengths = found.right_padded(256)
    seeds = row_seeds(5, 0, torch.arange(6))
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for row in range(6):
        sequence = list(prompts[row // 2])
        for step in range(10):
            with torch.no_grad():
                logits = plain(torch.tensor([sequence])).logits[0, -1] / temperature
            token = (logits + gumbel(seeds[row : row + 1], step, 259)[0]).argmax().item()
            assert found.log_probs[row, step].item() == pytest.approx(logits.log_softmax(0)[token].item(), abs=1e-4)
            sequence.append(token)
            if token in stop:
                break
        assert ids[row, : lengths[row]].tolist() == sequence
        assert found.ended[row].item() is (sequence[-1] in stop)
        assert prompt_lengths[row] == len(prompts[row // 2])


def test_rollout_log_probs_equal_the_training_forward(source):
    policy = engine(HybridEngine, source, spec())
    found = rollout(policy, [[10, 20, 30], [7], [1, 2, 3, 4, 5, 6]], answers=3, temperature=0.8)
    ids, prompt_lengths, lengths = found.right_padded(256)
    mask = answer_mask(prompt_lengths, lengths)
    with torch.no_grad():
        log_probs = selected_log_probs(policy.logits(ids, lengths)[:, :-1], ids[:, 1:], 0.8)
    torch.testing.assert_close(at_answers(log_probs, prompt_lengths, mask), found.log_probs, atol=1e-4, rtol=1e-4)


def test_a_models_own_generation_defaults_do_not_bend_the_rollout(source):
    policy = engine(HybridEngine, source, spec())
    expected = rollout(policy, [[10, 20, 30], [7]]).input_ids
    policy.module.generation_config.repetition_penalty = 5.0
    policy.module.generation_config.top_k = 1
    policy.module.generation_config.min_new_tokens = 3
    assert torch.equal(rollout(policy, [[10, 20, 30], [7]]).input_ids, expected)
    assert policy.module.generation_config.repetition_penalty == 5.0


def test_rollout_sees_updated_weights(source):
    policy = engine(HybridEngine, source, spec(lr=0.05))
    before = rollout(policy, [[10, 20, 30]]).log_probs
    policy.train()
    policy.backward(nll(policy, some_ids(), LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum()))
    policy.step()
    assert not torch.allclose(rollout(policy, [[10, 20, 30]]).log_probs, before)


@pytest.mark.parametrize(("zero", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_moving_average_follows_the_master_weights(source, zero, dtype):
    policy = engine(PolicyEngine, source, spec(zero=zero, dtype=dtype, lr=1e-3, ema=0.9))
    average = MovingAverage(policy, 0.9)
    expected = {name: tensor.clone() for name, tensor in average.shard.items()}
    ids = some_ids()
    for _ in range(3):
        policy.train()
        policy.backward(nll(policy, ids, LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum()))
        policy.step()
        average.update()
        for name, master in average._mine():
            expected[name] = 0.9 * expected[name] + 0.1 * master
    moved = 0.0
    for name, tensor in average.shard.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)
        moved = max(moved, (tensor - dict(average._mine())[name]).abs().max().item())
    assert moved > 1e-4  # it lags behind the weights
    average.write()
    whole = torch.cat([average.shard[name].flatten() for name, _ in policy.module.named_parameters()])
    tolerance = 1e-7 if dtype == "fp32" else 5e-3
    torch.testing.assert_close(weights(policy.module), whole, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("zero", [0, 3])
def test_saved_policy_loads_in_plain_transformers(source, tmp_path, zero):
    policy = engine(PolicyEngine, source, spec(zero=zero))
    policy.train()
    policy.backward(nll(policy, some_ids(), LENGTHS, [0, 1, 2, 3], (LENGTHS - 1).sum()))
    policy.step()
    save_model(policy, byte_tokenizer(), tmp_path / "model", stop_ids=(258,))
    assert not (tmp_path / "model.partial").exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {plain.stat().st_mode}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert loaded.dtype == torch.float32 and loaded.config.use_cache and loaded.generation_config.eos_token_id == 258
    policy.eval()
    with torch.no_grad():
        expected = policy.logits(some_ids(), torch.full((4,), 12))
        torch.testing.assert_close(loaded(some_ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("hé").input_ids == list("hé".encode())


def test_saved_reward_model_scores_the_same_in_plain_transformers(source, tmp_path):
    reward = engine(ScalarEngine, source, spec("reward"))
    extra = {"reward_mean": 0.25, "reward_std": 2.0}
    save_model(reward, byte_tokenizer(), tmp_path / "reward", stop_ids=(258,), extra=extra)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert (loaded.config.reward_mean, loaded.config.reward_std) == (0.25, 2.0)
    reward.eval()
    with torch.no_grad():
        expected = reward.scores(some_ids(), torch.full((4,), 12))
        torch.testing.assert_close(loaded(some_ids()).logits[:, 0], expected, atol=1e-5, rtol=1e-5)
    again = engine(ScalarEngine, str(tmp_path / "reward"), spec("reward", trains=False), seed=99)
    with torch.no_grad():  # the head is the saved one, not drawn anew
        torch.testing.assert_close(again.scores(some_ids(), torch.full((4,), 12)), expected)


def test_weight_decay_spares_vectors(source):
    policy = engine(PolicyEngine, source, spec(weight_decay=0.1))
    groups = policy.deepspeed.optimizer.param_groups
    assert {(group["weight_decay"], min(p.dim() for p in group["params"])) for group in groups} == {(0.1, 2), (0.0, 1)}


def test_a_build_that_was_killed_does_not_block_the_next_start():
    """torch waits for as long as the mark of a build exists; a killed build leaves it behind."""
    from pathlib import Path

    from torch.utils import cpp_extension

    from rlhfdsl.engines.distributed import build_operator

    build_operator()
    mark = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    mark.touch()
    build_operator()  # without the remedy this never returns
    assert not mark.exists()


def test_the_ninja_of_the_environment_builds_whatever_else_is_on_the_path(tmp_path, monkeypatch):
    """Another release of ninja would build again what this one has built, and the other way round."""
    import shutil

    from rlhfdsl.engines.distributed import own_ninja_first

    for folder in ("environment", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "environment"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    own_ninja_first()
    assert shutil.which("ninja") == str(tmp_path / "environment" / "ninja")
    once = os.environ["PATH"]
    own_ninja_first()
    assert os.environ["PATH"] == once
    (tmp_path / "environment" / "ninja").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    own_ninja_first()  # an environment without one takes the system's
    assert shutil.which("ninja") == str(tmp_path / "system" / "ninja")


def test_two_environments_do_not_build_in_turns(monkeypatch):
    from rlhfdsl.engines.distributed import own_builds

    first = own_builds()
    assert own_builds() == first
    monkeypatch.setattr("sys.prefix", "/another/environment")
    assert own_builds() != first and own_builds().parent == first.parent
