"""Repositories of the Hugging Face hub: the commit and the hashes that the lock keeps, and files against them.

Nothing is downloaded to make a pin: the hub tells the sha256 of large files and git's hash of the others. Nothing
heavy is imported with this module.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.planning.checkpoints import weights

# What loading a tokenizer, a model or a data set may read. Code is not among it, so it is neither kept nor looked at;
# the pickles that torch writes are, where a model has no safetensors.
_TOKENIZER = (
    r"(^|/)(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json$"
    r"|(^|/)(merges|vocab)\.txt$|\.model$|\.jinja$"
)
_WEIGHTS = (
    r"(^|/)(generation_config|model\.safetensors\.index)\.json$|\.safetensors$"
    r"|^pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?$"
)
_READ = {
    "tokenizer": re.compile(_TOKENIZER),
    "model": re.compile(f"{_TOKENIZER}|{_WEIGHTS}"),
    "dataset": re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.gz)?$"),
}
_MOST = 2000  # files of a data set that are listed; the commit covers all of them
_BLOCK = 1 << 20


def pin_repo(name: str, kind: str, revision: str | None) -> dict[str, Any]:
    """{"revision": commit, "files": {path: {"bytes", "sha256" or "git"}}} of a repository as it is now.

    kind: "model", "dataset", or "tokenizer" for a model of which nothing else is used. revision: a branch, tag or
    commit; None for the default branch. Offline it is what the cache holds. Raises what huggingface_hub raises.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return _cached(name, kind, revision)
    info = HfApi().repo_info(name, repo_type=_type(kind), revision=revision, files_metadata=True)
    files = {}
    for file in info.siblings or ():
        if _wanted(file.rfilename, kind):
            lfs = getattr(file, "lfs", None)
            known = {"sha256": f"sha256:{lfs.sha256}"} if lfs else {"git": f"git:{file.blob_id}"}
            files[file.rfilename] = {"bytes": file.size, **known}
    return _pinned(info.sha, files, kind)


def _cached(name: str, kind: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(snapshot_download(name, repo_type=_type(kind), revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        # Files were fetched by commit, so the cache knows no branch: the newest commit is what was last locked.
        home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=_type(kind)) / "snapshots"
        snapshots = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime) if home.is_dir() else []
        if revision is not None or not snapshots:
            raise
        folder = snapshots[-1]
    files = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and _wanted(relative, kind):
            # The cache names a file by the hash that the hub gave it: sha256 or git's.
            scheme = "git" if len(path.resolve().name) == 40 else "sha256"
            files[relative] = {"bytes": path.stat().st_size, scheme: hash_of(path, scheme)}
    return _pinned(folder.name, files, kind)


def _pinned(commit: str, files: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == "model" and not any(name.endswith(".bin") for name in weights(files)):
        files = {name: pin for name, pin in files.items() if ".bin" not in name}
    return {"revision": commit, "files": dict(sorted(files.items())[:_MOST])}


def _wanted(path: str, kind: str) -> bool:
    return bool(_READ[kind].search(path))


def _type(kind: str) -> str:
    """What the hub calls a repository of this kind."""
    return "dataset" if kind == "dataset" else "model"


def hash_of(path: Path, scheme: str) -> str:
    """`sha256:…` of a file, or `git:…`, the hash that git gives its content."""
    digest = hashlib.sha256() if scheme == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return f"{scheme}:{digest.hexdigest()}"


def verify_model(name: str, pins: Mapping[str, Any], at: str | None) -> None:
    """Fetch the locked files of a model, where the cache lacks them, and compare their hashes.

    pins: as `pin_repo` gives them. Raises UserError for a file of other bytes, and for one that cannot be had.
    """
    from huggingface_hub import hf_hub_download

    for path, pin in pins["files"].items():
        try:
            file = Path(hf_hub_download(name, path, revision=pins["revision"]))
        except Exception as error:  # network, authentication and missing files have no common base
            raise UserError(
                "E0855",
                f"`{path}` of `{name}` cannot be had from the Hugging Face hub",
                at=at,
                place=f"{name}@{pins['revision'][:12]}",
                help=first_line(error),
            ) from error
        scheme = "sha256" if "sha256" in pin else "git"
        found = hash_of(file, scheme)
        if found != pin[scheme]:
            raise UserError(
                "E0725",
                f"`{path}` of `{name}` is not the file that was locked: {pin[scheme]} then, {found} now",
                at=at,
                place=str(file),
                help="delete that file of the cache to fetch it anew, or lock the recipe again: "
                "`rlhf lock --upgrade FILE`",
            )
