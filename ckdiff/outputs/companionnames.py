"""Which files beside weights a loader needs: configs, tokenizers, templates; by their names alone.

It is a list of what is taken, not of what is left out: training state, indexes, notebooks, keys
that somebody left there, and everything else that is not on it, stays where it is.
"""

from __future__ import annotations

import re

MOST_FILES, MOST_FOLDERS = 256, 64  #: of companions, and of folders that are looked into for them
MOST_BYTES = 128 << 20  #: of one companion; the largest tokenizers have some 40 MiB
MOST_IN_ALL = 512 << 20  #: bytes
RECORD = "ckdiff-copied.json"  #: what an output says of the companions in it

_LONGEST = 128  # characters of a name
_NAME = re.compile(
    r"""config\.json | configuration\.json | params\.json | model_index\.json | modules\.json
    | (?P<of>[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*)_config\.json | config_[\w-]+\.json
    | tokenizer[\w.-]*\.(json|model|txt) | tokenizer\.model\.v[0-9]+ | tekken\.json
    | [\w-]+\.tiktoken | [\w.-]+\.(model|spm)
    | (source_|target_)?vocab[\w.-]*\.(json|txt|bpe) | merges[\w.-]*\.txt | bpe\.codes | dict\.txt
    | special_tokens_map\.json | added_tokens\.json | normalizer\.json | encoder\.json
    | chat_template\.json | [\w.-]+\.jinja""",
    re.VERBOSE | re.ASCII,
)
#: of training, not of the model
_TRAINING = re.compile(
    r"(ds|deepspeed|zero|fsdp|accelerate|train|trainer|training|optimizer|wandb|run)(_.*)?"
)
_CODE = re.compile(r"[A-Za-z_]\w*\.py", re.ASCII)
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", re.ASCII)
_TEMPLATES = "additional_chat_templates"
#: what says that there are companions in folders: of a pipeline, of sentence transformers
LISTS = ("model_index.json", "modules.json")


def is_companion(path: str) -> bool:
    """Whether a file of this path, relative to the weights, may be copied with them.

    Modules of Python are where a config names some, which ckdiff does not know.
    """
    folder, slash, name = path.rpartition("/")
    if slash and not _FOLDER.fullmatch(folder):
        return False
    if len(name) > _LONGEST or name.startswith(".") or name.endswith(".index.json"):
        return False
    if folder == _TEMPLATES:
        return name.endswith(".jinja") and _NAME.fullmatch(name) is not None
    if _CODE.fullmatch(name):
        return not folder
    match = _NAME.fullmatch(name)
    # the scheduler of a pipeline has a folder of its own, and is no training state there
    return match is not None and not (
        not folder and match["of"] and _TRAINING.fullmatch(match["of"])
    )


def folders_among(names: list[str]) -> list[str]:
    """The folders, as they are listed with a slash at their end, that may hold companions."""
    inside = any(name in LISTS for name in names)
    found = [name[:-1] for name in names if name.endswith("/") and _FOLDER.fullmatch(name[:-1])]
    return sorted(name for name in found if inside or name == _TEMPLATES)[:MOST_FOLDERS]
