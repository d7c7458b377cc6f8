"""The LoRA of another tool: whether it is on, in which engines, and its numbers where the tool has its own defaults."""

from __future__ import annotations

import json

from rlhfdsl.language.foreign.taking import NO, Draft, value_of

# What a tool takes when nothing is said. DeepSpeed-Chat divides 1 by the rank; LLaMA-Factory takes twice the rank.
_RANK = {"TRL": "16", "LLaMA-Factory": "8"}
_ALPHA = {"DeepSpeed-Chat": "1", "TRL": "32", "OpenRLHF": "16", "axolotl": "8"}
_DROPOUT = {"TRL": "0.05"}
# The engines of PPO that get adapters.
_ENGINES = {"OpenRLHF": ("actor", "critic"), "TRL": ("actor",), "LLaMA-Factory": ("actor",)}
_ALL = ("all", "all-linear", "decoder.layers.", "transformer.h.", "gpt_neox.layers.", "model.layers.")


def adapters(draft: Draft) -> None:
    """Put `lora { }` into the engines that the tool would give adapters."""
    tool, ppo = draft.command.tool, draft.command.stage == "ppo"
    parts = [("", "@lora.")]
    if ppo and tool == "DeepSpeed-Chat":
        parts = [("actor.", "@actor_lora."), ("critic.", "@critic_lora.")]
    elif ppo:
        parts = [(f"{role}.", "@lora.") for role in _ENGINES.get(tool, ())]
    for engine, given in parts:
        found = {name.removeprefix(given): text for name, text in draft.lists.items() if name.startswith(given)}
        packed = _packed(tool, found)
        if _wanted(tool, found):
            _adapt(draft, engine, {name: texts for name, texts in found.items() if texts and name != "base"})
            if packed:
                draft.values[f"{engine}lora.base"] = "nf4"
        elif packed:
            draft.notes.append((0, f"{engine}lora.base", "without adapters weights are held in their own type"))


def _packed(tool: str, found: dict[str, tuple[str, ...]]) -> bool:
    """Whether the frozen weights are in 4 bits."""
    if tool == "axolotl" and "".join(found.get("kind", ())).lower() == "qlora":
        return True
    asked = "".join(found["base"]).lower() if "base" in found else "no"
    return asked == "4" if tool == "LLaMA-Factory" else asked not in NO


def _wanted(tool: str, found: dict[str, tuple[str, ...]]) -> bool:
    kind = "".join(found.get("kind", ())).lower()
    if tool == "TRL":
        return "kind" in found and kind not in NO
    if tool == "LLaMA-Factory":
        return kind in ("", "lora") and ("kind" in found or "rank" in found)
    if tool == "axolotl":
        return kind in ("lora", "qlora")
    return "".join(found.get("rank", ("0",))) not in ("", "0")


def _adapt(draft: Draft, engine: str, found: dict[str, tuple[str, ...]]) -> None:
    tool, values = draft.command.tool, draft.values
    policy = engine == "actor." or (not engine and draft.command.stage != "reward")
    at = f"{engine}lora."

    for name in ("rank", "alpha", "dropout", "lr"):
        if name in found and value_of("lora", name, found[name][0]) is None:
            draft.notes.append((0, f"{at}{name}", f"`{found.pop(name)[0]}` is nothing that it takes"))

    def first(name: str, default: str | None = None) -> str | None:
        return found[name][0] if name in found else default

    rank = first("rank", _RANK.get(tool))
    if rank is None:
        draft.notes.append((0, f"{at}rank", "not given; 16 stands for it"))
        rank = "16"
    values[f"{at}rank"] = rank
    twice = str(2 * int(rank)) if tool == "LLaMA-Factory" else None
    alpha = first("alpha", twice or _ALPHA.get(tool))
    if alpha is not None and alpha != rank:
        values[f"{at}alpha"] = alpha
    names = [name for name in found.get("targets", ()) if name]
    if names and not (len(names) == 1 and names[0] in _ALL):
        values[f"{at}targets"] = "[" + ", ".join(json.dumps(name, ensure_ascii=False) for name in names) + "]"
    dropout = first("dropout", _DROPOUT.get(tool))
    if dropout is not None and dropout.strip("0."):
        if engine == "actor.":
            draft.notes.append((0, f"{at}dropout", "the actor of PPO has no dropout"))
        else:
            values[f"{at}dropout"] = dropout
    if tool == "DeepSpeed-Chat":
        if "@lora.only" not in draft.lists:
            draft.notes.append((0, f"{at}rank", "only the adapters train; DeepSpeed-Chat trains all else beside them"))
        rate = first("lr", "5e-4") or "5e-4"
        if "lr" not in found:
            draft.notes.append((0, f"{at}lr", f"not given; DeepSpeed-Chat takes {rate} for adapters"))
        if policy and f"{engine}lr" in values:
            given = values[f"{engine}lr"]
            draft.notes.append((0, f"{engine}lr", f"{given} was for the weights, which are frozen here"))
        values[f"{engine}lr" if policy else f"{at}lr"] = rate
