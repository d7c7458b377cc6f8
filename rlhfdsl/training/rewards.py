"""Where the score of an answer comes from: a reward model, a Python function, an HTTP endpoint, or a weighted sum.

A function and an endpoint are called once for each rollout and rank with all of its answers. What they give is checked,
and whatever is wrong with it ends the run: a score that is missing or not a number would be learnt as one.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import sys
import traceback
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhfdsl.engines.engine import ScalarEngine
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.training.experience import Answers
from rlhfdsl.training.micro import micro_parts
from rlhfdsl.training.rollouts import read

Function = Callable[[list[str], list[str]], Sequence[float]]
Decode = Callable[[list[int]], str]
LARGEST = torch.finfo(torch.float32).max  # a score beyond it would be infinite


class Reward(Protocol):
    """Scores answers [B] of one rank as fp32 [B]. Every rank calls it together."""

    def __call__(self, answers: Answers) -> Tensor: ...


class ModelReward:
    """A frozen reward model, read at the last real token.

    longest: tokens of a row at which the engine's micro batch was sized. The mean that the model was saved with is
    taken off; with `normalize` the rest is divided by the deviation it was saved with. Raises UserError E0311 where it
    was saved with none, or with 0.
    """

    def __init__(self, engine: ScalarEngine, *, longest: int, normalize: bool = False):
        self.engine, self.longest = engine, longest
        engine.mean, deviation = saved_with(engine)
        engine.deviation = deviation if normalize else 1.0
        if not engine.deviation > 0:
            raise UserError(
                "E0311", f"`normalize` has no effect: `{engine.spec['base']}` was saved with no deviation of scores",
                at=engine.spec["base"],
                help="a `stage reward` with `eval` measures it; without one leave `normalize` out",
            )  # fmt: skip

    def __call__(self, answers: Answers) -> Tensor:
        self.engine.eval()
        (parts,) = micro_parts(answers.lengths.tolist(), self.engine, self.longest)
        scores = read(answers, parts, lambda part: self.engine.scores(part.ids, part.lengths, part.total))
        self.engine.rest()
        return scores


def saved_with(engine: ScalarEngine) -> tuple[float, float]:
    """Mean and deviation of the scores that a reward model gave when it was saved, 0 where it was saved without."""
    config = engine.module.config
    mean, deviation = (float(getattr(config, name, 0.0)) for name in ("reward_mean", "reward_std"))
    return mean, deviation


class TextReward:
    """A score made from texts: `function(prompts, answers)` gives a number for each answer.

    name: what a message calls it; decode: ids to text; at: the recipe's address of it. Raises UserError E0742 when the
    call fails and E0743 when it gives anything but one finite number for each answer.
    """

    def __init__(self, name: str, function: Function, decode: Decode, at: str | None = None):
        self.name, self.function, self.decode, self.at = name, function, decode, at

    def __call__(self, answers: Answers) -> Tensor:
        prompts, texts = [], []
        columns = (answers.ids.tolist(), answers.prompt_lengths.tolist(), answers.lengths.tolist())
        for ids, start, end in zip(*columns, strict=True):
            prompts.append(self.decode(ids[:start]))
            texts.append(self.decode(ids[start:end]))
        try:
            given = self.function(list(prompts), list(texts))
            given = list(given) if isinstance(given, Iterator) else given  # a generator runs here
        except UserError as error:
            error.at = error.at or self.at
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            message = f"{self.name} raised {type(error).__name__}: {first_line(error)}"
            help = f"its first answer was {texts[0][:200]!r}"
            raise UserError("E0742", message, at=self.at, place=_raised_at(error), help=help) from error
        return torch.tensor(self._checked(given, texts), device=answers.ids.device)

    def _checked(self, given: Any, texts: Sequence[str]) -> list[float]:
        if isinstance(given, Tensor):
            given = given.tolist()
        try:
            scores = None if isinstance(given, str | bytes | Mapping | Set) else list(given)
        except TypeError:
            scores = None
        if scores is None:
            raise self._wrong(f"gave {type(given).__name__}, not a list of numbers")
        if len(scores) != len(texts):
            raise self._wrong(f"gave {len(scores)} scores for {len(texts)} answers")
        for number, (score, text) in enumerate(zip(scores, texts, strict=True)):
            try:
                value = math.nan if isinstance(score, str | bytes) else float(score)
            except (TypeError, ValueError, OverflowError):
                value = math.nan
            if not abs(value) <= LARGEST:
                raise self._wrong(f"gave {score!r:.80} for answer {number}, {text[:80]!r}")
            scores[number] = value
        return scores

    def _wrong(self, what: str) -> UserError:
        help = "it takes one finite number for each answer, in their order"
        return UserError("E0743", f"{self.name} {what}", at=self.at, help=help)


def _raised_at(error: BaseException) -> str | None:
    """The file and line that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is the call here
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


class Weighted:
    """A sum of rewards, each times its weight; `names` are those of the metrics of its terms."""

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]):
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.rewards = [reward for _, _, reward in terms]

    def terms(self, answers: Answers) -> Tensor:
        """The unweighted scores of every term, fp32 [B, terms]."""
        return torch.stack([reward(answers).float() for reward in self.rewards], 1)

    def total(self, terms: Tensor) -> Tensor:
        """[B, terms] -> [B]."""
        return terms @ torch.tensor(self.weights, device=terms.device)

    def __call__(self, answers: Answers) -> Tensor:
        return self.total(self.terms(answers))


def models(reward: Reward) -> Iterator[ModelReward]:
    """The reward models of a reward."""
    if isinstance(reward, ModelReward):
        yield reward
    for inner in reward.rewards if isinstance(reward, Weighted) else ():
        yield from models(inner)


def function_of(path: Path, name: str, pins: Mapping[str, Any] | None) -> Function:
    """A function of a Python file, whose code is the bytes that the plan pinned. Raises UserError.

    The file is run here and nowhere before. Only it is pinned, not what it imports.
    """
    code = path.read_bytes()
    found = "sha256:" + hashlib.sha256(code).hexdigest()
    if pins is not None and pins["sha256"] != found:
        raise UserError("E0725", f"`{path.name}` is not the file that was planned: {pins['sha256']} then, {found} now",
                        place=str(path), help="plan again")  # fmt: skip
    module = types.ModuleType(f"scorer_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # which a dataclass of the file asks for
    try:
        exec(compile(code, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise UserError("E0742", f"`{path.name}` raised {type(error).__name__} as it was loaded: {first_line(error)}",
                        place=str(path)) from error  # fmt: skip
    if not callable(getattr(module, name, None)):
        raise UserError("E0741", f"`{path.name}` defines no function `{name}`", place=str(path))
    return getattr(module, name)


def endpoint(url: str, timeout: float) -> Function:
    """A function that asks an HTTP endpoint: POST {"prompts": […], "answers": […]} gives {"scores": […]}.

    timeout: seconds. It raises UserError E0742 or E0743, which name the URL.
    """

    def ask(prompts: list[str], answers: list[str]) -> Sequence[float]:
        def failed(why: str) -> UserError:
            help = f"it was asked to score {len(answers)} answers; when it works, the same command goes on"
            return UserError("E0742", f"POST {url} {why}", help=help)

        body = json.dumps({"prompts": prompts, "answers": answers}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise failed(f"answered {error.code} {error.reason}") from error
        except http.client.HTTPException as error:
            raise failed(f"gave no whole answer: {first_line(error)}") from error
        except TimeoutError as error:
            raise failed(f"took longer than {timeout:g} s") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            raise failed(f"took longer than {timeout:g} s" if late else f"could not be reached: {reason}") from error
        try:
            return json.loads(text)["scores"]
        except (ValueError, KeyError, TypeError):
            raise UserError("E0743", f'POST {url} gave {text[:80]!r}, not {{"scores": […]}}') from None

    return ask
