"""`rlhf chat`: talk to a trained policy, several turns, streaming."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from rlhfdsl.cli.common import from_zero, say, show_user_error
from rlhfdsl.cli.planned import positive
from rlhfdsl.cli.saving import read_plan
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.language.terminal import visible
from rlhfdsl.models.tokenizers import HUMAN_ASSISTANT, render
from rlhfdsl.planning.places import relocate

HELP = "talk to a trained policy"
COMMANDS = "/new starts a new conversation, /quit ends"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's folder (runs/NAME), or any model folder in Hugging Face form")
    parser.add_argument("--stage", help="the stage whose policy answers, e.g. sft (default: the last one)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of that stage")
    parser.add_argument(
        "--temperature", type=from_zero, default=1.0, metavar="T", help="0 takes the most likely token (default 1.0)"
    )
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--system", help="a system message to start with")
    parser.add_argument("--seed", type=seed, help="repeat the same conversation")


def seed(text: str) -> int:
    """A seed of torch."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"takes a whole number from 0 to {(1 << 64) - 1}, not `{text}`")
    return value


def run(args: argparse.Namespace) -> int:
    try:
        directory = policy_folder(args.run, args.stage, args.ema)
        return converse(directory, args)
    except UserError as error:
        show_user_error(error, None)
        return 1


def policy_folder(run: Path, stage: str | None, ema: bool) -> Path:
    """The folder of the policy to talk to. Raises UserError when there is none."""
    plan_path = run / "plan.json"
    if not plan_path.exists():
        if (run / "config.json").exists():
            return run
        stage_of = (run.parent / "plan.json").exists()
        raise UserError(
            "E0830",
            f"`{run}` is neither a run nor a model: it has no plan.json and no config.json",
            help=f"for a stage of a run: `rlhf chat {run.parent} --stage {run.name}`"
            if stage_of
            else "give the folder that `rlhf run` wrote, e.g. runs/quickstart",
        )
    # Paths in the plan are relative to where the run was started; this may be elsewhere, or the folder was moved.
    plan = relocate(read_plan(plan_path), str(run))
    artifact, what = ("ema", "averaged weights") if ema else ("policy", "a policy")
    made = {
        s["address"].removeprefix("stage."): Path(s["artifacts"][artifact])
        for s in plan["stages"]
        if artifact in s["artifacts"]
    }
    ready = {name: path for name, path in made.items() if path.is_dir()}
    if stage is not None:
        stage = stage.removeprefix("stage.")
        if stage not in ready:
            why = "is not finished" if stage in made else f"makes no {what.removeprefix('a ')}"
            raise UserError("E0831", f"stage `{stage}` of {run} {why}", help=_choices(ready))
        return ready[stage]
    if not made:
        help = "`ema = 0.992` in an actor keeps an average" if ema else None
        raise UserError("E0831", f"no stage of {run} makes {what}", help=help)
    if not ready:
        raise UserError("E0831", f"no stage of {run} has made {what} yet", help="finish it with `rlhf run`")
    return list(ready.values())[-1]


def _choices(ready: dict[str, Path]) -> str:
    return "ready: " + ", ".join(ready) if ready else "finish it with `rlhf run`"


def converse(directory: Path, args: argparse.Namespace) -> int:
    """Read a line, stream the answer, until the input ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    class Shown(TextStreamer):
        """Prints what a model writes, which may be anything, as text and never as commands of the terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the library raises many kinds for a broken or missing file
        raise UserError(
            "E0832", f"the model in `{directory}` cannot be loaded", help=first_line(error)
        ) from error
    if loading["missing_keys"]:
        raise UserError(
            "E0832", f"the model in `{directory}` has no weights for `{min(loading['missing_keys'])}`",
            help="a reward model or critic writes no text; give the folder of a policy",
        )  # fmt: skip
    if not tokenizer.chat_template:
        say(f"{directory} has no chat template: turns are written as Human: and Assistant:")
        tokenizer.chat_template = HUMAN_ASSISTANT
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{directory}  ({COMMANDS})")
    system = (args.system or "").encode(errors="replace").decode()  # an argument may hold bytes that are no text
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/new":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt = fitted(tokenizer, messages, context - min(args.tokens, context // 2)).to(model.device)
        try:
            with torch.no_grad():
                output = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=min(args.tokens, max(context - prompt.shape[1], 1)),
                    do_sample=args.temperature > 0,
                    temperature=args.temperature if args.temperature > 0 else None,
                    top_k=0 if args.temperature > 0 else None,
                    streamer=Shown(tokenizer, skip_prompt=True, skip_special_tokens=True),
                )
        except KeyboardInterrupt:
            print("\n(stopped)")
            messages.pop()
            continue
        answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})


def fitted(tokenizer, messages: list[dict[str, str]], room: int):
    """Ids [1, T] of the conversation; the oldest turns are forgotten (in place) until it leaves room for an answer.

    Of a single turn that is too long the beginning is left out, and that is said. Raises UserError when the template
    refuses the conversation, as some do with a system message.
    """
    from jinja2 import TemplateError

    while True:
        try:
            (text,) = render(tokenizer, [messages], generation=True)
        except TemplateError as error:
            raise UserError(
                "E0832", "the model's chat template refuses this conversation", help=first_line(error)
            ) from error
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        first = 1 if messages[0]["role"] == "system" else 0
        if ids.shape[1] <= room:
            return ids
        if len(messages) - first <= 1:
            say(f"(of {ids.shape[1]} tokens the model reads the last {room})")
            return ids[:, -room:]
        del messages[first : first + 2]
