"""What planning refuses or warns of. Each check is a plain function: it looks at numbers and reports, or does
not.

A message names the numbers and where they came from, points at the setting that decides, and offers the
nearest value that works. CODES lists every code of this part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfdsl.language.diagnostics import Diagnostic
from rlhfdsl.language.recipe import Recipe
from rlhfdsl.planning import advice, checkpoints
from rlhfdsl.planning.batches import Misfit, nearest_divisor, remainder
from rlhfdsl.planning.entries import Model
from rlhfdsl.planning.families import FAMILIES
from rlhfdsl.planning.hardware import Target, meant
from rlhfdsl.planning.layout import Fit, Need, Part, Rollout
from rlhfdsl.planning.problems import Problems
from rlhfdsl.planning.timing import Work

CODES = {
    "E0701": "a batch does not split evenly over the GPUs",
    "E0702": "a micro batch does not divide the sequences of a GPU",
    "E0703": "the sequences of a rollout do not split into minibatches",
    "E0704": "a stage makes no update",
    "E0705": "a warm-up is as long as the run or longer",
    "E0706": "a sequence is longer than the model's context",
    "E0707": "two models of a stage have different tokenizers",
    "E0708": "two models of a stage have different chat templates",
    "E0709": "the numbers of a model from scratch do not fit each other",
    "E0710": "the device cannot compute in the model's type",
    "E0711": "ZeRO and offload settings exclude each other or the device",
    "E0712": "a stage does not fit in the memory of a GPU",
    "E0713": "a part that a stage reads has no rows",
    "E0714": "the GPU is not in the catalog",
    "E0715": "the attention is none that the model's type has",
    "E0716": "the actor cannot have the rollout engine that the recipe names",
    "E0717": "the weights of a rollout cannot be cut over so many GPUs",
    "E0718": "the reference has fewer token ids than the actor",
    "E0719": "what a stage offloads does not fit in the memory of a node",
    "E0720": "a saved plan or a lock file cannot be used",
    "E0730": "LoRA targets name no layer of the model",
    "E0731": "a LoRA rank is as wide as a layer",
    "E0732": "a base in 4 bits would be cut in shards",
    "E0733": "the layers of a base in 4 bits do not split into blocks",
    "W0701": "a large share of the rows is in no batch",
    "W0702": "an interval is longer than the run",
    "W0703": "a warm-up rounds to no update",
    "W0705": "the reference is not what the actor starts from",
    "W0706": "many rows are cut or dropped",
    "W0707": "the weights of a model are pickled",
    "W0709": "adapters that were merged are rounded to 4 bits",
}


def unknown_gpu(recipe: Recipe, name: str, at: str) -> Diagnostic:
    """What to say of a GPU that the catalog does not list."""
    problems = Problems(recipe)
    problems.report("E0714", f"`{name}` is not in the catalog of GPUs", at, help=meant(name))
    return problems.found[0]


def pickled(problems: Problems, model: Model) -> None:
    """A model whose weights are in .bin form, which is pickle, by the files that its facts pin."""
    files = checkpoints.pickles(model.entry)
    if files:
        named = model.entry["from"].get("hub") or model.entry["from"]["path"]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        problems.report(
            "W0707", f"the weights of `{named}` are in .bin form, which is pickle", f"{model.address}.from",
            notes=[f"{files[0]}{more}: pinned by sha256, and read with torch.load(weights_only=True)"],
            help="nothing has to be done: no code in them is run. Safetensors of the same model need no such care",
        )  # fmt: skip


def engine(problems: Problems, where: Target, model: Model, part: Part) -> None:
    """Type, ZeRO stage and offload of one engine against each other and the device."""
    at, dtype = f"{model.address}.dtype", model.dtype
    if dtype == "fp16" and where.device == "cpu":
        problems.report(
            "E0710", "a CPU does not train in fp16", at, notes=[f"the target is cpu ({where.origin})"],
            help="dtype = bf16 or fp32",
        )  # fmt: skip
    if dtype == "bf16" and not where.has_bf16:
        problems.report("E0710", f"{where.gpu} does not compute in bf16", at, help="dtype = fp16 or fp32")
    family = FAMILIES.get(model.shape.type) if model.shape is not None else None
    if family is not None and not family.sdpa and model.entry["attention"] == "sdpa":
        problems.report(
            "E0715", f"transformers has no sdpa attention for {model.shape.type if model.shape else ''}",
            f"{model.address}.attention", help="attention = eager",
        )  # fmt: skip
    group = part.group
    parallel = group["parallel"] if group is not None else None
    if parallel is None:
        return
    block = problems.recipe.blocks[parallel.address]
    zero, offload = block["zero"], block["offload"] or "off"
    third = "zero" if zero == 3 else "offload" if offload in ("params", "both") else "nvme"
    if part.in_4_bits and part.shares is None and (third != "nvme" or block["nvme"] is not None):
        needs = "" if third == "zero" else f", which `{third}` needs here,"
        problems.report(
            "E0732", f"ZeRO 3{needs} would cut the base in 4 bits of the {part.name}: its scales are no parameters",
            f"{block.address}.{third}", also=[(f"{part.at}.lora.base", "the base in 4 bits")],
            help="zero = 2 or less, and offload = optimizer or none, in a `parallel` block of its own",
        )  # fmt: skip
        return
    if where.device == "cpu" and offload != "off":
        problems.report(
            "E0711", "offload has no effect on a CPU", f"{block.address}.offload",
            notes=[f"the target is cpu ({where.origin})"], help="leave offload out",
        )  # fmt: skip
    elif offload == "idle" and zero == 3:
        problems.report(
            "E0711", "offload = idle moves whole weights, and zero is 3", f"{block.address}.offload",
            also=[(f"{block.address}.zero", "stage 3 keeps them in shards")], help="offload = params, or another stage",
        )  # fmt: skip
    if zero == 0 and dtype != "fp32" and part.trains:
        problems.report(
            "E0711", f"ZeRO 0 cannot sum the gradients of {dtype} weights in fp32", f"{block.address}.zero",
            also=[(f"{part.at}.parallel", f"the {part.name} is in {dtype}")],
            help="zero = 1, which on one GPU is the same with fp32 sums",
        )  # fmt: skip
    if block["nvme"] is not None and part.trains:
        if offload in ("off", "idle"):
            problems.report(
                "E0711", "`nvme` has no effect: nothing is offloaded", f"{block.address}.nvme",
                help="offload = optimizer",
            )  # fmt: skip
        elif zero not in ("auto", 3):
            problems.report(
                "E0711", f"offload to NVMe needs ZeRO 3, and zero is {zero}", f"{block.address}.nvme",
                also=[(f"{block.address}.zero", f"stage {zero}")], help="zero = 3",
            )  # fmt: skip
            return
    if where.device == "cpu":
        return
    # The stages 1 and 2 are of what trains: beside them the parameters of an engine that infers can be in shards.
    whole = zero in ((0, 1, 2) if part.trains else (0,))
    if offload in ("params", "both") and whole:
        problems.report(
            "E0711", f"offload = {offload} needs ZeRO 3, and zero is {zero}", f"{block.address}.offload",
            also=[(f"{block.address}.zero", f"stage {zero} keeps the parameters whole")], help="zero = 3",
        )  # fmt: skip
    elif offload == "optimizer" and zero == 0 and part.trains:
        problems.report(
            "E0711", "offload = optimizer needs ZeRO 1, 2 or 3, and zero is 0", f"{block.address}.offload",
            also=[(f"{block.address}.zero", "stage 0")], help="zero = 2",
        )  # fmt: skip


def offload(problems: Problems, where: Target, asked: Sequence[tuple[Part, Need]]) -> None:
    """A `parallel` block whose offload none of the engines that name it can have.

    Engines of every kind may share a block, in which each finds what is for it.
    """
    for block in problems.recipe.of_kind("parallel"):
        offload, users = block["offload"] or "off", []
        for part, need in asked:
            named = None if part.group is None else part.group["parallel"]
            if named is not None and named.address == block.address:
                users.append((part, need))
        moved = any(need.offload != "off" for _, need in users)
        # `engine` has said what is wrong with the ZeRO stage beside it.
        refused = offload != "optimizer" and block["zero"] == (3 if offload == "idle" else 0)
        if offload == "off" or not users or moved or refused or where.device == "cpu":
            continue
        keeps = "is in use all through its stage" if offload == "idle" else "does not train"
        problems.report(
            "E0711", f"offload = {offload} has no effect: none of its engines can have it",
            f"{block.address}.offload",
            also=[
                (f"{part.at}.parallel", f"the {part.name} {'trains' if part.trains else keeps}") for part, _ in users
            ],
            help="offload = idle is for the `ref` and `reward` of a ppo, grpo or rloo stage" if offload == "idle"
            else "leave offload out",
        )  # fmt: skip


def context(problems: Problems, model: Model, length: int, at: str, words: str) -> None:
    """A sequence longer than the positions of a model; `words` say where its length comes from."""
    if model.shape is None or length <= model.shape.context:
        return
    limit = model.shape.context
    problems.report(
        "E0706", f"{words} exceed the {limit} positions of `{model.address}`", at,
        also=[
            (f"{model.address}.{name}", f"{limit} positions") for name in ("context", "from")
            if _written(problems, model.address, name)
        ],
        help=f"at most {limit} tokens in all",
    )  # fmt: skip


def same_tokens(problems: Problems, first: Model, other: Model, whose: tuple[str, str], part: Part) -> None:
    """Tokenizer and template of another model of a stage against those of its first, by their locked digests.

    whose: the place where the first is named, and what it is called (`stage.ppo.actor.model`, `actor`).
    """
    first_at, name_of_first = whose
    at = f"{part.at}.model"
    mine, theirs = first.entry, other.entry
    if mine["facts"] is not None and theirs["facts"] is not None:
        for name, code, word in (("tokenizer", "E0707", "tokenizer"), ("template", "E0708", "chat template")):
            if mine["facts"][name] != theirs["facts"][name]:
                problems.report(
                    code, f"the {part.name}'s {word} is not the {name_of_first}'s", at,
                    label=f"{other.address}: {_short(theirs['facts'][name])}",
                    also=[(first_at, f"{first.address}: {_short(mine['facts'][name])}")],
                    help=_agree(name),
                )  # fmt: skip
                return
    elif "bytes" in (mine["tokenizer"], theirs["tokenizer"]) and mine["tokenizer"] != theirs["tokenizer"]:
        problems.report(
            "E0707", f"the {part.name}'s tokenizer is not the {name_of_first}'s", at,
            label=f"{other.address}: {_tokenizer(theirs)}",
            also=[(first_at, f"{first.address}: {_tokenizer(mine)}")], help=_agree("tokenizer"),
        )  # fmt: skip


def same_ids(problems: Problems, actor: Model, reference: Model, at: str) -> None:
    """A reference without a log-probability for some ids that the actor can sample, when both shapes are known.

    Models of one tokenizer can differ in the padding rows behind its ids. A critic or reward model with fewer of them
    reads its last row in their place (models/scalar.py); a reference has no number for them.
    """
    if actor.shape is None or reference.shape is None or reference.shape.vocab >= actor.shape.vocab:
        return
    problems.report(
        "E0718",
        f"the actor `{actor.address}` can sample {actor.shape.vocab} ids, and the reference `{reference.address}` has "
        f"{reference.shape.vocab}", f"{at}.ref.model",
        notes=["the ids beyond the tokenizer's are padding of the model: it gives them a small probability, not none"],
        help="leave `ref` out for the actor's own start, or take a reference with as many ids",
    )  # fmt: skip


def _agree(name: str) -> str:
    if name == "template":
        return "template = human_assistant in both models gives both the built-in one"
    return "every model of a stage reads the same token ids: take models of one family"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _tokenizer(entry: Mapping[str, Any]) -> str:
    return "the byte tokenizer" if entry["tokenizer"] == "bytes" else "its own tokenizer"


def parts_have_rows(problems: Problems, at: str, edges: Mapping[str, Any]) -> None:
    """Edges whose locked facts count no usable row."""
    for name, edge in edges.items():
        if edge is None or edge["facts"] is None or edge["facts"]["used"]:
            continue
        facts = edge["facts"]
        what = edge["source"] + (f".{edge['part']}" if edge["part"] else "")
        dropped = {why: count for why, count in facts["dropped"].items() if count}
        lost = [f"{count} dropped: {why.replace('_', ' ')}" for why, count in dropped.items()]
        setting = {"train": "data", "ptx": "ptx.data"}.get(name, name)
        problems.report(
            "E0713", f"`{what}` has no rows for {at}", f"{at}.{setting}",
            notes=[f"{facts['rows']} rows in the part", *lost],
            help="a larger share of the split, or another source",
        )  # fmt: skip


def does_not_split(problems: Problems, where: Target, at: str, name: str, misfit: Misfit, item: str) -> None:
    """A batch that is no multiple of the world size."""
    also = []
    if where.origin.startswith("cluster."):
        also.append((f"{where.origin}.gpus", f"{where.gpus} on each of {where.nodes}"))
    problems.report(
        "E0701", f"{name} = {misfit.total} {item} do not split over {misfit.divisor} {where.devices}", at,
        label=remainder(misfit.total, misfit.divisor),
        also=also, notes=[f"{where.world} = {where.nodes} x {where.gpus} ({where.origin})"],
        help=f"{name} = {misfit.nearest}",
    )  # fmt: skip


def micro(problems: Problems, at: str, part: Part, written: int) -> None:
    """A written micro batch that does not divide what one GPU gets."""
    problems.report(
        "E0702", f"micro = {written} does not divide the {part.per_rank} of {part.at} on each GPU", at,
        label=remainder(part.per_rank, written),
        also=[(f"{part.at}.parallel", f"the {part.name} uses it here")],
        help=f"micro = {nearest_divisor(part.per_rank, written)}, or leave it to be derived",
    )  # fmt: skip


def minibatches(problems: Problems, at: str, prompts: int, answers: int, minibatch: int) -> int | None:
    """Minibatches of a rollout, or None and a report when they do not come out even."""
    sequences = prompts * answers
    if sequences % minibatch == 0:
        return sequences // minibatch
    problems.report(
        "E0703", f"{sequences} sequences of a rollout do not split into minibatches of {minibatch}",
        f"{at}.update.minibatch", label=remainder(sequences, minibatch),
        also=[(f"{at}.rollout.batch", f"{prompts} prompts x {answers} answers")],
        help=f"minibatch = {nearest_divisor(sequences, minibatch)}",
    )  # fmt: skip
    return None


def has_updates(
    problems: Problems, where: Target, at: str, per_epoch: int, rows: int, batch: int, item: str
) -> None:
    """A part with fewer rows than one batch."""
    if per_epoch or not rows:
        return
    fill = f"1 {item.removesuffix('s')} does" if rows == 1 else f"{rows} {item} do"
    most = rows // where.world * where.world
    problems.report(
        "E0704", f"{fill} not fill one batch of {batch}, so the stage would make no update", at,
        help=f"a batch of at most {most}, or more data" if most
        else f"more data: a batch takes at least {where.world}, one for each of {where.world} {where.devices}",
    )  # fmt: skip


def memory(
    problems: Problems, where: Target, at: str, placed: Fit, rollout: Rollout | None, work: Work
) -> None:
    """A stage that is predicted to need more than a GPU has, or offloads more than a node has, with what would fit and
    what it costs in time."""
    if placed.fits is not False or placed.peak is None or placed.usable is None or where.memory is None:
        return
    needs = [p.need for p in placed.engines]
    known = [(p, p.states) for p in placed.engines if p.states is not None and p.need.shares is None]
    ways = advice.nearest(needs, rollout, where, work)
    told = [f"`{way.words}` fits{_slower(way, ways[0])}" for way in ways]
    if all("offload" in way.words for way in ways):
        if advice.adapted(needs, rollout, where):
            told.append(f"`lora {{ rank = {advice.RANK} }}` in what trains fits, and learns something else")
        elif advice.adapted(needs, rollout, where, in_4_bits=True):
            told.append(
                f"`lora {{ rank = {advice.RANK}, base = nf4 }}` in what trains fits, and learns something else"
            )
        wider = advice.more_gpus(needs, rollout, where)
        if wider is not None:
            size = f"--gpus {wider.gpus} --nodes {wider.nodes}"
            told.append(f"{size} fits with `zero = auto, offload = off, micro = auto`")
    if placed.peak > placed.usable:
        worst = max(placed.phases, key=lambda phase: phase.peak)
        problems.report(
            "E0712",
            f"{at} needs {_gib(placed.peak)} of each {where.gpu or 'GPU'}, of whose {_gib(where.memory)} a plan "
            f"may fill {_gib(placed.usable)}", at,
            notes=[
                *(f"{p.need.name}: {_gib(s.total + p.average)} of model states at ZeRO {p.zero}" for p, s in known),
                f"{worst.name}: {_gib(worst.resident)} that stays, {_gib(worst.working)} that the {worst.engine} needs "
                "at once",
            ],
            help="; ".join(told) or "nothing here fits: more or larger GPUs, or a smaller model",
        )  # fmt: skip
        return
    assert where.host is not None and placed.host_usable is not None
    problems.report(
        "E0719",
        f"what {at} offloads needs {_gib(placed.host)} of the host of each node, of whose {_gib(where.host)} a plan "
        f"may fill {_gib(placed.host_usable)}", at,
        notes=[f"{p.need.name}: {_gib(s.host)} with offload = {p.offload}" for p, s in known if s.host],
        help="; ".join(told) or "nothing here fits: more or larger GPUs, more memory in a node, or a smaller model",
    )  # fmt: skip


def _slower(way: advice.Change, first: advice.Change) -> str:
    if way is first or not way.seconds or not first.seconds:
        return ""
    slower = round(way.seconds / first.seconds - 1, 2)
    return f" (time {'+' if slower >= 0 else '-'} {abs(slower):.0%})"


def _written(problems: Problems, address: str, name: str) -> bool:
    block = problems.recipe.find(address)
    return block is not None and block.written(name)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
