"""What can be written and is seldom meant, or would break a stage: rules about single values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from rlhfdsl.language.diagnostics import Diagnostic, Edit, Fix, Label, Span
from rlhfdsl.language.recipe import Block, Reference
from rlhfdsl.language.schema import definition
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.syntax import Number

Blocks = Mapping[str, Block]
Found = Iterator[Diagnostic]

_THOUSANDS = re.compile(r"([0-9]+)k")
_SECRET = re.compile(
    r'"[^"\n]*\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,})'
)


def nested(block: Block) -> Iterator[Block]:
    """A block and all inside it."""
    yield block
    for inner in block.blocks.values():
        yield from nested(inner)


def on_policy(blocks: Blocks) -> Iterator[Block]:
    """The stages whose policy learns from its own answers."""
    for block in blocks.values():
        if block.kind == "stage" and "actor" in definition(block.type).blocks:
            yield block


def tokens(blocks: Blocks) -> Found:
    """`16k` tokens are 16 000; contexts are powers of two."""
    for block in (inner for top in blocks.values() for inner in nested(top)):
        for name, attr in definition(block.type).attributes.items():
            expression = block.settings[name].expression if name in block.settings else None
            if not attr.table.get("x-tokens") or not isinstance(expression, Number):
                continue
            match = _THOUSANDS.fullmatch(expression.text)
            count = int(match.group(1)) if match is not None else 0
            if count and count & (count - 1) == 0:
                message = f"`{expression.text}` is {count * 1000:_} tokens, and {count * 1024:_} is `{count}Ki`"
                fix = Fix(f"write `{count}Ki`", (Edit(expression.span, f"{count}Ki"),))
                help = f"write `{count}Ki`, or `{count * 1000:_}` if it is meant"
                yield Diagnostic("W0308", "warning", message, expression.span, help=help, fixes=(fix,))


def pull(blocks: Blocks) -> Found:
    """A policy that learns from its own answers with a KL factor of 0 forgets what it began as."""
    for stage in on_policy(blocks):
        kl = stage.blocks.get("kl")
        if kl is not None and kl["coef"] == 0 and kl["target"] is None:
            message = "with `coef = 0` nothing pulls the policy to its start"
            help = "write for example `coef = 0.05`, or a `target`"
            notes = ("a reward model is right only near what it was trained on",)
            yield Diagnostic("W0301", "warning", message, kl.setting("coef").span, notes=notes, help=help)


def estimators(blocks: Blocks) -> Found:
    """An estimator of the KL beside where it is applied: as a penalty its value counts, in the loss its gradient."""
    for stage in on_policy(blocks):
        kl = stage.blocks.get("kl")
        if kl is None or not kl.written("estimator"):
            continue
        if kl["apply"] == "loss" and kl["estimator"] == "k1":
            message = "k1 in the loss pulls nowhere: the mean of its gradient is 0, whatever the policy"
            help = "write `estimator = k3`, or `apply = reward`"
        elif kl["apply"] == "reward" and kl["estimator"] in ("k2", "k3"):
            message = f"{kl['estimator']} in the reward is biased: it is never negative, and never pays an answer"
            help = "write `estimator = k1`, or `apply = loss`"
        else:
            continue
        yield Diagnostic("W0302", "warning", message, kl.setting("estimator").span, help=help)


def cuts(blocks: Blocks) -> Found:
    """Answers from a part of the distribution, beside an update that reads the whole one."""
    for stage in on_policy(blocks):
        rollout = stage.blocks.get("rollout")
        if rollout is None:
            continue
        cut = [name for name in ("top_k", "top_p") if rollout.written(name) and isinstance(rollout[name], int | float)]
        if cut:
            verb = "cut" if len(cut) > 1 else "cuts"
            names = " and ".join(f"`{name}`" for name in cut)
            message = f"{names} {verb} the distribution that answers are drawn from, and the update reads the whole one"
            notes = ("ratio, KL and entropy are those of the policy without the cut",)
            help = "leave it out unless answers without it are of no use"
            yield Diagnostic("W0303", "warning", message, rollout.setting(cut[0]).span, notes=notes, help=help)


def buffers(blocks: Blocks) -> Found:
    """A penalty for long answers begins within an answer."""
    for stage in on_policy(blocks):
        reward, rollout = stage.blocks.get("reward"), stage.blocks.get("rollout")
        overlong = reward.blocks.get("overlong") if reward is not None else None
        if overlong is None or rollout is None:
            continue
        buffer, answer = overlong["buffer"], rollout["answer"]
        if isinstance(buffer, int) and isinstance(answer, int) and buffer > answer:
            first = rollout.setting("answer").span
            labels = (Label(first, "the longest answer"),) if first else ()
            message = f"a buffer of {buffer} tokens is longer than an answer, which has at most {answer}"
            yield Diagnostic(
                "E0307", "error", message, overlong.setting("buffer").span, secondary=labels,
                help=f"write {answer} or less",
            )  # fmt: skip


def dropout(blocks: Blocks) -> Found:
    """The ratio compares log-probabilities of one policy, so it has to answer the same twice."""
    for stage in on_policy(blocks):
        actor = stage.blocks.get("actor")
        for block in () if actor is None else (actor, actor.blocks.get("lora")):
            if block is not None and isinstance(block["dropout"], float) and block["dropout"] > 0:
                message = "dropout of the actor breaks PPO's ratio: the same weights give other probabilities each time"
                yield Diagnostic(
                    "E0318", "error", message, block.setting("dropout").span, help="leave it out: the default is 0"
                )


def normalize(blocks: Blocks) -> Found:
    """A reward model is shifted by its mean over the eval part and scaled by its deviation there, so it needs one."""
    for stage in (block for block in blocks.values() if block.type == "stage.reward"):
        if stage.written("normalize") and stage["normalize"] is True and not stage.written("eval"):
            message = "`normalize` has no effect without `eval`: the mean is that of the eval part"
            help = "write for example `eval = blend.chat.eval`"
            yield Diagnostic("E0311", "error", message, stage.setting("normalize").name, help=help)
    for stage in on_policy(blocks):
        reward = stage.blocks.get("reward")
        if reward is None or reward["normalize"] is not True or not reward.written("normalize"):
            continue
        for judge in _judges(blocks, reward):
            if judge.type == "stage.reward" and not judge.written("eval"):
                message = f"`normalize` has no effect: `{judge.address}` has no `eval` to measure its deviation on"
                help = f"write for example `eval = blend.chat.eval` in `{judge.address}`"
                span = reward.setting("normalize").name
                yield Diagnostic("E0311", "error", message, span, help=help)
                break


def _judges(blocks: Blocks, reward: Block) -> Iterator[Block]:
    """The blocks of the reward models that score a stage."""
    added = reward.blocks.get("add")
    scorers = [blocks.get(f"scorer.{name}") for name in (added.settings if added is not None else ())]
    if isinstance(reward["call"], Reference):
        scorers.append(blocks.get(reward["call"].address))
    for named in (reward, *scorers):
        model = named["model"] if named is not None else None
        if isinstance(model, Reference) and model.address in blocks:
            yield blocks[model.address]


def whole_sources(blocks: Blocks) -> Found:
    """A data block that a stage evaluates on whole, and trains on through a blend, or the other way round."""
    for stage in (block for block in blocks.values() if block.kind == "stage"):
        data, on = stage["data"], stage["eval"]
        if not isinstance(data, Reference) or not isinstance(on, Reference) or data == on:
            continue
        ways = sorted((data.address, on.address))
        if ways[0].startswith("blend.") and ways[1].startswith("data."):
            inside = blocks[ways[0]].blocks.values() if ways[0] in blocks else ()
            mixes = [inner for inner in inside if inner.kind == "mix"]
            if any(f"data.{name}" == ways[1] for mix in mixes for name in mix.settings):
                span, first = stage.setting("eval").span, stage.setting("data").span
                message = f"`{stage.address}` evaluates on rows of `{ways[1]}` that it may train on"
                told = "trains on a mix of it" if on.address == ways[1] else "trains on it"
                labels = (Label(first, told),) if first else ()
                help = "evaluate on a part of the blend: `blend.NAME.eval`"
                yield Diagnostic("W0606", "warning", message, span, secondary=labels, help=help)


def secrets(sources: Mapping[str, SourceFile]) -> Found:
    """A recipe is made to be shared, so no access token stands in it."""
    for source in sources.values():
        for match in _SECRET.finditer(source.text):
            span = Span(source.name, match.start(1), match.end(1))
            message = "this looks like an access token, and a recipe is made to be shared"
            help = "delete it and revoke it; `hf auth login` keeps the hub's token outside"
            yield Diagnostic("E0319", "error", message, span, help=help)


ADVICE: tuple[Callable[[Blocks], Found], ...] = (
    tokens, pull, estimators, cuts, buffers, dropout, normalize, whole_sources,
)  # fmt: skip
