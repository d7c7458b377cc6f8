"""Tiny models of every type that the graph rollout serves, and its comparison with the eager one."""

from __future__ import annotations

import torch
from small import spec
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhfdsl.engines.base import BasePolicy, BesideBase
from rlhfdsl.engines.distributed import world
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout import parity
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampling, left_padded
from rlhfdsl.engines.rollout.sampling import Distribution, row_seeds
from rlhfdsl.models.inputs import length_mask
from rlhfdsl.models.lora import add_adapters
from rlhfdsl.training.experience import answer_mask, at_answers

VOCAB = 259
PROMPTS = [[10, 20, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8], [200, 100], list(range(30, 47))]
STOP = tuple(range(0, VOCAB, 12))  # 22 of 259: an answer ends after about 12 tokens

_LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
_PLAIN = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
_OPT = {**_PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}
_BLOOM = {"n_layer": 2, "hidden_size": 64, "n_head": 4}
_MPT = {"n_layers": 2, "d_model": 64, "n_heads": 4, "max_seq_len": 512}
TYPES: dict[str, dict] = {
    "opt": _OPT,
    "opt post-norm": {**_OPT, "model_type": "opt", "do_layer_norm_before": False},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "mistral": {**_LLAMA, "sliding_window": None},
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 512},
    "gpt_neox": {**_PLAIN, "intermediate_size": 128},
    "phi": {**_PLAIN, "intermediate_size": 128},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": _LLAMA,
    "granite": {**_LLAMA, "logits_scaling": 2.0, "attention_multiplier": 0.1},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_LLAMA, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6},
    "mistral with a window": {**_LLAMA, "model_type": "mistral", "sliding_window": 8},
    "qwen2 with a window": {
        **_LLAMA, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1,
    },
    "bloom": _BLOOM,
    "bloom of six heads": {**_BLOOM, "model_type": "bloom", "n_head": 6, "hidden_size": 96},
    "falcon": {**_PLAIN, "alibi": False},
    "falcon with alibi": {
        **_PLAIN, "model_type": "falcon", "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
    },
    "falcon with alibi, one key": {**_PLAIN, "model_type": "falcon", "alibi": True, "num_attention_heads": 6,
                                   "hidden_size": 96},
    "falcon of groups": {**_PLAIN, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "gpt_neo": {
        "num_layers": 2, "hidden_size": 64, "num_heads": 4, "max_position_embeddings": 512, "window_size": 8,
        "attention_types": [[["global", "local"], 1]],
    },
    "mpt": _MPT,
    "mpt of six heads": {**_MPT, "model_type": "mpt", "n_heads": 6, "d_model": 96, "attn_config": {"clip_qkv": 0.5}},
}  # fmt: skip
EAGER = {"bloom", "gptj", "gpt_neo", "mpt"}  # which transformers refuses under any other attention


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """A tiny model of a type in fp32. Its weights are spread so that a wrong position or mask shows."""
    arch = {**TYPES.get(name, {}), **changes}
    config = AutoConfig.for_model(
        arch.pop("model_type", name), vocab_size=VOCAB, pad_token_id=256, bos_token_id=257, eos_token_id=258, **arch
    )
    eager = config.model_type in EAGER or getattr(config, "attn_logit_softcapping", None)
    config._attn_implementation = "eager" if eager else "sdpa"
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    torch.random.set_rng_state(generator_state)
    module.config.use_cache = False
    return module


def tiny(
    name: str, dtype: str = "fp32", zero: int = 0, lr: float = 0.02, device: str = "cpu", lora: dict | None = None,
    kept: int | None = None, **changes,
) -> HybridEngine:  # fmt: skip
    """A tiny model of a type on an engine. kept: parameters that ZeRO 3 leaves whole, else all."""
    module = tiny_model(name, **changes).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    if lora is not None:
        add_adapters(module, lora, seed=2, scalar=False)
    entry = spec(dtype=dtype, zero=zero, lr=lr, device=device, lora=lora, world=world())
    if kept is not None:
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        entry["deepspeed"]["zero_optimization"] |= {f"stage3_{name}": kept for name in names}
    return HybridEngine("actor", entry, module)


LORA = {"rank": 4, "alpha": 64.0, "dropout": 0.0, "targets": "all-linear", "lr": None}


def sampled(
    sampler, prompts=PROMPTS, answers=2, temperature=0.7, tokens=24, stop=STOP, seed=5, at_once=None, **cut
) -> Rollout:
    device = sampler.engine.device
    ids, mask = left_padded(prompts, 256)
    seeds = row_seeds(seed, 0, torch.arange(len(prompts) * answers))
    sampling = Sampling(
        max_new_tokens=tokens, temperature=temperature, n_samples_per_prompt=answers, stop_ids=stop, pad_id=256,
        at_once=at_once, **cut,
    )  # fmt: skip
    return sampler.generate(Prompts(ids.to(device), mask.to(device), seeds.to(device)), sampling)


def same(found: Rollout, expected: Rollout, tolerance: float = 1e-4) -> None:
    """Token for token the same answers, ends and lengths, and log-probabilities within the tolerance."""
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert torch.equal(found.answer_lengths, expected.answer_lengths)
    assert torch.equal(found.ended, expected.ended)
    assert torch.equal(found.response_start_idx, expected.response_start_idx)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=tolerance, rtol=0)


def learn(engine: HybridEngine) -> None:
    """One optimizer update that moves every weight."""
    device = engine.device
    ids = torch.randint(0, 255, (4, 12), generator=torch.Generator().manual_seed(0)).to(device)
    engine.train()
    logits = engine.logits(ids, torch.full((4,), 12, device=device))
    engine.backward(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))
    engine.step()


def joined(engine: HybridEngine) -> None:
    """One forward of policy and base says of the same rows what a forward of each does."""
    ids = torch.randint(0, 255, (4, 12), generator=torch.Generator().manual_seed(7)).to(engine.device)
    lengths = torch.tensor([12, 9, 5, 12], device=engine.device)
    base = BasePolicy(spec("ref", trains=False), engine)
    engine.eval()
    with torch.no_grad():
        policy = engine.logits(ids, lengths, 3)
        alone = base.logits(ids, lengths, 3)
        real = length_mask(lengths, 12)[:, 3:]
        rows, columns = real.repeat(2, 1).nonzero(as_tuple=True)
        logits, places = BesideBase(base).logits_at(ids.repeat(2, 1), lengths.repeat(2), rows, columns + 3, 3)
        both = logits[places]
    assert (policy - alone)[real].abs().mean() > 1e-2  # the case is worth something: the adapters have learned
    for found, expected in zip(both.chunk(2), (policy, alone), strict=True):
        torch.testing.assert_close(found, expected[real], atol=1e-5, rtol=1e-5)


def judged(engine: HybridEngine, sampler, prompts=PROMPTS, tokens=24, **cut) -> parity.Parity:
    """What the gate says of a sampler beside the engine's weights."""
    rollout = parity.some_rows(sampled(sampler, prompts, tokens=tokens, **cut), 6)
    ids, prompt_lengths, lengths = rollout.right_padded(256)
    mask = answer_mask(prompt_lengths, lengths)
    engine.eval()  # GPT-2's configuration has dropout
    with torch.no_grad():
        scored = (engine.logits(ids, lengths)[:, :-1].float() / 0.7).log_softmax(-1)
    scored = scored.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    scored = at_answers(scored, prompt_lengths, mask)
    width = mask.shape[1]
    eager, behind = (read[:, :width] for read in EagerSampler(engine).read(rollout, Distribution(0.7, **cut)))
    return parity.compare(rollout.log_probs[:, :width], eager, scored, behind, mask, engine.spec["dtype"])
