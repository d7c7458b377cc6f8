"""What the table cannot say: rules over several attributes or blocks, each a function of the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rlhfdsl.language.diagnostics import Diagnostic, Label, Span
from rlhfdsl.language.presence import strength
from rlhfdsl.language.recipe import Block, Reference, Source
from rlhfdsl.language.schema import definition
from rlhfdsl.language.suggest import either, listed, nearest

# What each stage reads of a row, by the format of its source.
_READS = {
    "sft": ("chat", "preference", "text"),
    "reward": ("preference",),
    "dpo": ("preference",),
    **dict.fromkeys(("ppo", "grpo", "rloo"), ("preference", "chat", "prompt")),
    "ptx": ("text", "chat", "preference"),
}
COLUMNS = {
    "preference": ("prompt", "chosen", "rejected"),
    "chat": ("messages",),
    "prompt": ("prompt",),
    "text": ("text",),
}

_POLICIES = ("stage.sft", "stage.dpo")  # stages that are themselves the engine of a policy

Blocks = Mapping[str, Block]
Found = Iterator[Diagnostic]


def _error(code: str, message: str, span: Span | None, help: str | None, *labels: Label) -> Diagnostic:
    return Diagnostic(code, "error", message, span, secondary=labels, help=help)


def sums(blocks: Blocks) -> Found:
    """The shares of a mix and of a split make 100 %."""
    for blend in blocks.values():
        for inner in blend.blocks.values():
            if "x-sum" not in definition(inner.type).table or not inner.settings:
                continue
            shares = [setting.value for setting in inner.settings.values()]
            if not all(isinstance(share, float) for share in shares):
                continue
            total = sum(shares)
            if abs(total - 1) > 1e-9:
                message = f"the shares of `{inner.address}` sum to {total * 100:g} %, not to 100 %"
                left = f"{abs(1 - total) * 100:g} % {'missing' if total < 1 else 'too much'}"
                if len(shares) > 1:
                    left = " + ".join(f"{share * 100:g}" for share in shares) + f" = {total * 100:g}; {left}"
                yield _error("E0601", message, inner.span, left)


def mixes(blocks: Blocks) -> Found:
    """A mix names data blocks, and parts that its blend has."""
    known = [address.removeprefix("data.") for address, block in blocks.items() if block.kind == "data"]
    for blend in blocks.values():
        for mix in (inner for inner in blend.blocks.values() if inner.kind == "mix"):
            for name, setting in mix.settings.items():
                if name not in known:
                    near = nearest(name, known)
                    help = (
                        f"did you mean {listed(near)}?"
                        if near
                        else f"data blocks: {', '.join(known) or 'none'}"
                    )
                    message = f"`{mix.address}` names `{name}`, and there is no `data {name}`"
                    yield _error("E0602", message, setting.name, help)
            if mix.name is None:
                continue
            split = blend.blocks.get("split")
            parts = list(split.settings) if split is not None else []
            if mix.name not in parts:
                near = nearest(mix.name, parts)
                help = f"did you mean {listed(near)}?" if near else f"its parts: {', '.join(parts) or 'none'}"
                yield _error("E0604", f"`{blend.address}` has no part `{mix.name}`", mix.span, help)


def scorers(blocks: Blocks) -> Found:
    """What is added to a reward are scorers, and a scorer's file is a path; what only a model has needs one."""
    known = [address.removeprefix("scorer.") for address, block in blocks.items() if block.kind == "scorer"]
    for scorer in (block for block in blocks.values() if block.kind == "scorer"):
        source = scorer["file"]
        if isinstance(source, Source) and source.kind == "hub":
            message = f"`{source.text}` is not a path: a scorer is a file beside the recipe"
            yield _error("E0317", message, scorer.setting("file").span, f'write "./{source.text}"')
    for stage in (block for block in blocks.values() if "reward" in block.blocks):
        reward = stage.blocks["reward"]
        added = reward.blocks.get("add")
        for name, setting in added.settings.items() if added is not None else ():
            if name not in known:
                near = nearest(name, known)
                help = f"did you mean {listed(near)}?" if near else f"scorers: {', '.join(known) or 'none'}"
                message = f"`{reward.address}.add` names `{name}`, and there is no `scorer {name}`"
                yield _error("E0608", message, setting.name, help)
        parts = [reward["call"].address] if isinstance(reward["call"], Reference) else []
        parts += [f"scorer.{name}" for name in (added.settings if added is not None else ())]
        models = reward["model"] is not None or any(blocks[at].written("model") for at in parts if at in blocks)
        for name in ("normalize", "parallel"):
            if not models and reward.written(name):
                message = f"`{name}` has no effect where no reward model scores"
                yield _error("E0311", message, reward.setting(name).name, "delete it")


def formats(blocks: Blocks) -> Found:
    """A stage can read every source of the rows that it is given."""
    for stage in (block for block in blocks.values() if block.kind == "stage"):
        kind = stage.type.removeprefix("stage.")
        places = [(stage, "data", kind), (stage, "eval", kind)]
        if "ptx" in stage.blocks:
            places.append((stage.blocks["ptx"], "data", "ptx"))
        for block, name, reader in places:
            reference = block[name]
            if not isinstance(reference, Reference):
                continue
            for source in _sources(blocks, reference):
                form, span = source["format"], block.setting(name).span
                where = source.setting("format").span or source.span
                label = (Label(where, f"`{source.address}` is {form}"),) if where is not None else ()
                if isinstance(form, str) and form not in _READS[reader]:
                    readable = either(_READS[reader])
                    message = f"`{block.address}` reads {readable}, and `{source.address}` is {form}"
                    yield _error("E0605", message, span, f"refer to data of format {readable}", *label)
                elif form == "text" and reader == "sft" and stage["loss"] == "answer":
                    message = f"plain text has no answers to learn, and `{source.address}` is text"
                    yield _error("E0605", message, span, "write `loss = all`", *label)


def evals(blocks: Blocks) -> Found:
    """A stage does not evaluate on what it trains on; an interval of evaluation needs rows to evaluate on."""
    for stage in (block for block in blocks.values() if block.kind == "stage"):
        data, on = stage["data"], stage["eval"]
        if isinstance(on, Reference) and on == data:
            message = f"`{stage.address}` would evaluate on the rows that it trains on"
            help = "name another part, for example `eval = blend.NAME.eval`"
            first = stage.setting("data").span
            labels = (Label(first, "trains on them here"),) if first is not None else ()
            yield _error("E0606", message, stage.setting("eval").span, help, *labels)
        every = stage.blocks["every"]
        if on is None and every.written("eval") and every["eval"] is not None:
            message = "an interval of evaluation has no effect without rows to evaluate on"
            yield _error(
                "E0311", message, every.setting("eval").name, "write `eval = …` in the stage, or delete it"
            )


def models(blocks: Blocks) -> Found:
    """The numbers of a model made from scratch divide each other; its tokenizer comes from somewhere."""
    for model in (block for block in blocks.values() if block.kind == "model"):
        for whole, part in (("hidden", "heads"), ("heads", "kv_heads")):
            a, b = model[whole], model[part]
            if isinstance(a, int) and isinstance(b, int) and b > 0 and a % b:
                message = f"`{part}` ({b}) must divide `{whole}` ({a}) in `{model.address}`"
                help = f"divisors of {a} near {b}: {_divisors(a, b)}"
                yield _error("E0316", message, model.setting(part).span or model.span, help)
        if model["tokenizer"] == "from" and model.written("tokenizer") and model.written("arch"):
            message = "a model made from scratch has no weights to take the tokenizer from"
            yield _error(
                "E0311", message, model.setting("tokenizer").span, "write `tokenizer = bytes`, or a hub id"
            )


def revisions(blocks: Blocks) -> Found:
    """A revision and a subset belong to a hub id. Where a stronger layer puts a path over it, they go unused."""
    for block in blocks.values():
        source = block["from"] if block.kind in ("model", "data") else None
        if isinstance(source, Source) and source.kind == "path":
            for name in ("revision", "subset"):
                beside = name in block.settings and block.written(name)
                if beside and strength(block.setting("from")) <= strength(block.setting(name)):
                    message = f"a `{name}` has no effect beside a path"
                    yield _error("E0311", message, block.setting(name).name, "delete it")


def columns(blocks: Blocks) -> Found:
    """Turns and columns mean something in the format of their data."""
    for data in (block for block in blocks.values() if block.kind == "data"):
        form = data["format"]
        if form == "text" and data["turns"] == "hh":
            message = "`turns` has no effect on plain text"
            yield _error("E0311", message, data.setting("turns").name, "delete it")
        if form not in COLUMNS:
            continue
        for role, setting in data.blocks["columns"].settings.items():
            if role not in COLUMNS[form]:
                near = nearest(role, COLUMNS[form])
                help = f"did you mean {listed(near)}?" if near else f"roles: {', '.join(COLUMNS[form])}"
                message = f"`{role}` plays no role in rows of format {form}"
                yield _error("E0607", message, setting.name, help)


def loras(blocks: Blocks) -> Found:
    """A rate of adapters needs something beside them that trains; a reference that is an actor's base has no place."""
    for stage in (block for block in blocks.values() if block.kind == "stage"):
        policy = stage if stage.type in _POLICIES else stage.blocks.get("actor")
        lora, ref = policy.blocks.get("lora") if policy is not None else None, stage.blocks.get("ref")
        if policy is None or lora is None:
            continue
        if lora.written("lr"):
            message = "only adapters train in a policy, and their rate is the engine's `lr`"
            yield _error("E0311", message, lora.setting("lr").name, f"write it as `lr` of `{policy.address}`")
        if ref is not None and ref.written("parallel") and ref["model"] in (None, policy["model"]):
            message = "the reference is the policy with its adapters off: it has no place of its own"
            labels = (Label(lora.span, "the adapters"),) if lora.span is not None else ()
            yield _error("E0311", message, ref.setting("parallel").name, "delete it", *labels)


RULES: tuple[Callable[[Blocks], Found], ...] = (formats, evals, models, revisions, columns, loras)
# Those that something unread would mislead.
WHOLE: tuple[Callable[[Blocks], Found], ...] = (sums, mixes, scorers)


def _sources(blocks: Blocks, reference: Reference) -> list[Block]:
    """The data blocks behind a reference: itself, or those of a blend's mix (a part's own first)."""
    target = blocks.get(reference.address)
    if target is None or target.kind == "data":
        return [target] if target is not None else []
    if target.kind != "blend":
        return []
    mix = target.blocks.get(f"mix.{reference.facet}") or target.blocks.get("mix")
    names = list(mix.settings) if mix is not None else []
    return [blocks[f"data.{name}"] for name in names if f"data.{name}" in blocks]


def _divisors(number: int, near: int) -> str:
    divisors = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - near))[:3]))
