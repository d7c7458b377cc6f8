"""Which files hold the weights of a model, and the shapes that they list. No weight is read here.

safetensors come first; the pickles that torch writes (`pytorch_model.bin`) are taken where a model has nothing else.
Nothing heavy is imported with this module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.planning.checkpoints import weights

PICKLE = "pytorch_model.bin"
INDEXES = ("model.safetensors.index.json", f"{PICKLE}.index.json")

_BUFFERS = re.compile(r"(\.attn|\.attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
_SCALAR_HEADS = re.compile(r"^(score|v_head|value_head|classifier|classification_head)\.")


def weight_files(directory: Path, named: str, at: str | None) -> list[Path]:
    """The files of a directory that hold its weights, as its index lists them where it has one.

    named: what the recipe calls the directory. Raises UserError for an index that lists no files or one that is not
    there, and for a directory without weights.
    """
    safe, pickle = (directory / name for name in INDEXES)
    if safe.is_file():
        return _listed(safe, named, at)
    paths = sorted(directory.glob("model*.safetensors"))
    if paths:
        return paths
    if (directory / PICKLE).is_file():
        return [directory / PICKLE]
    if pickle.is_file():
        return _listed(pickle, named, at)
    raise no_weights(named, at)


def _listed(index: Path, named: str, at: str | None) -> list[Path]:
    place = f"{named}/{index.name}"
    paths = [index.parent / name for name in index_names(index, place, at)]
    for path in paths:
        if not path.is_file():
            message = f"`{named}` lacks {path.name}, which its index lists"
            raise UserError(codes.WEIGHTS, message, at=at, place=place, help="copy the missing file")
    return paths


def index_names(index: Path, place: str, at: str | None) -> list[str]:
    """The names of the files over which an index spreads the weights. Raises UserError for one that lists none."""
    listed = read_json(index, place, at).get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(
            codes.WEIGHTS,
            f"`{place}` has no `weight_map` of files beside it",
            at=at,
            place=place,
            help="copy or save the model again",
        )
    return names


def no_weights(named: str, at: str | None) -> UserError:
    """What to say of a model that has a configuration and none of the files that are loaded."""
    return UserError(
        codes.NOT_A_MODEL,
        f"`{named}` has no weights",
        at=at,
        place=named,
        help=f"model.safetensors is read, or {PICKLE}, or the parts that an index of one of them lists",
    )


def header(path: Path, place: str, at: str | None) -> dict[str, list[int]]:
    """Name and shape of each tensor in a safetensors file: 8 bytes of length, JSON, then the data."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            tensors = json.loads(file.read(size))
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if path.stat().st_size != 8 + size + end:
            raise ValueError(f"it should have {8 + size + end} bytes and has {path.stat().st_size}")
        return {name: tensor["shape"] for name, tensor in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            codes.WEIGHTS,
            f"`{place}` is not a complete safetensors file",
            at=at,
            place=place,
            help=f"{first_line(error)}; copy it again",
        ) from error


def local_headers(paths: Iterable[Path], named: str, at: str | None) -> list[dict[str, list[int]]]:
    """Tensor shapes of a directory's weight files; none of pickles, which tell them only when they are unpickled."""
    return [header(path, f"{named}/{path.name}", at) for path in paths if path.suffix == ".safetensors"]


def hub_headers(source: str, options: Mapping[str, Any], names: Iterable[str]) -> list[dict[str, list[int]]]:
    """Tensor shapes from the hub, which reads only the heads of the files, or from the cache; none when neither tells.

    names: the files of the repository.
    """
    from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache

    listed = [name for name in weights(names) if name.endswith(".safetensors")]
    if not listed:
        return []
    try:
        metadata = get_safetensors_metadata(source, **options)
    except Exception:  # offline: the count stays unknown where the cache lacks a file, and nothing else is lost
        cached = {name: try_to_load_from_cache(source, name, **options) for name in listed}
        if not all(isinstance(path, str) for path in cached.values()):
            return []
        return [header(Path(str(path)), f"{source}/{name}", None) for name, path in cached.items()]
    return [
        {name: list(tensor.shape) for name, tensor in file.tensors.items()}
        for file in metadata.files_metadata.values()
    ]


def count(headers: Iterable[Mapping[str, Sequence[int]]], tied: bool) -> int | None:
    """Parameters over all files, without buffers, a scalar head, or an output matrix that is tied."""
    shapes = {name: shape for header in headers for name, shape in header.items()}
    counted = [
        math.prod(shape)
        for name, shape in shapes.items()
        if not _BUFFERS.search(name)
        and not _SCALAR_HEADS.search(name)
        and not (tied and name in ("lm_head.weight", "embed_out.weight"))
    ]
    return sum(counted) if counted else None


def read_json(path: Path, place: str, at: str | None) -> dict[str, Any]:
    """A JSON object from a model's directory. Raises UserError with the line where it breaks."""
    line, why = None, "it holds no JSON object"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except json.JSONDecodeError as error:
        line, why = error.lineno, f"{error.msg} at column {error.colno}"
    except (OSError, UnicodeDecodeError) as error:
        why = first_line(error)
    raise UserError(
        codes.CONFIG,
        f"`{place}` cannot be read: {why}",
        at=at,
        place=f"{place}:{line}" if line else place,
        help="save or copy the model again",
    )
