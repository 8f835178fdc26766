"""Which files of one directory are the model: an index, or what its names and contents say."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckdiff.checkpoints import deepspeed
from ckdiff.checkpoints.contents import has_pieces, is_torch, looks_torch
from ckdiff.checkpoints.explaining import is_weight_version
from ckdiff.checkpoints.folders import Choice, Folder, called, inside, some, where
from ckdiff.checkpoints.indexes import INDEX_LIMIT, Index, index_of, not_an_index
from ckdiff.checkpoints.megatron import FORM, of_other_backend
from ckdiff.checkpoints.weightnames import (
    SAFETENSORS,
    TORCH,
    IndexName,
    WeightName,
    choices,
    index_name,
    is_adapter,
    is_complete,
    is_consolidated,
    is_deepspeed,
    is_training_state,
    missing_names,
    numbered_sets,
    rank_of,
    variants_among,
    weight_name,
)
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

_MAIN = {SAFETENSORS: "model", ".bin": "pytorch_model"}
METADATA = ".metadata"  #: what makes a directory a ``torch.distributed.checkpoint``
_PROBED = 16  # files of other names that are looked into


def weights_in(folder: Folder, sub: str, names: Sequence[str]) -> Choice | None:
    """The model in the directory ``sub``, in which ``names`` lie; None where there is none.

    Raises CheckpointError where it cannot be said which of several it is, or a part is missing.
    """
    files = sorted((n for n in names if not n.startswith(".") and n[-1:] != "/"), key=natural_key)
    found = _by_index(folder, sub, files, SAFETENSORS)
    tensors = [file for name in files if (file := weight_name(name, (SAFETENSORS,)))]
    model = [file for file in tensors if not is_adapter(file.stem)]
    aside = [file.name for file in tensors if is_adapter(file.stem)]
    if found is not None:
        return found
    if model:
        return _safetensors(folder, sub, model, aside)
    torch = _torch(folder, sub, files, METADATA in names)
    if torch is not None:
        return _noted(torch, folder, aside)
    if tensors:
        return _safetensors(folder, sub, tensors, [])
    adapters = [f for n in files if (f := weight_name(n, TORCH)) and is_adapter(f.stem)]
    if not adapters:
        return None
    return _chosen(folder, "torch", sub, _one_of(folder, sub, adapters), adapters)


def has_weights(names: Iterable[str]) -> bool:
    """Whether a directory of ``names`` seems to hold a checkpoint; nothing is opened."""
    names = list(names)
    return deepspeed.is_model(names) or any(
        name == METADATA
        or (
            not name.startswith(".")
            and (index_name(name) or (weight_name(name) and not is_training_state(name)))
            and not is_deepspeed(name)
        )
        for name in names
    )


def indexed_choice(folder: Folder, sub: str, name: str) -> Choice:
    """What the index ``name`` in ``sub`` lists. Raises CheckpointError."""
    index = _read(folder, sub, name)
    if "delta_encoding" in index.metadata:
        raise is_weight_version(where(folder, sub))
    files = tuple(sorted(set(index.weight_map.values()), key=natural_key))
    _check_there(folder, sub, name, files)
    known = index_name(name)
    form = "torch" if known is not None and known.suffix != SAFETENSORS else "safetensors"
    return Choice(form, sub, files, name, index.weight_map, index.digest)


def _read(folder: Folder, sub: str, name: str) -> Index:
    path = where(folder, inside(sub, name))
    try:
        raw = folder.read(inside(sub, name), INDEX_LIMIT)
    except ValueError as error:
        raise not_an_index(path, error) from None
    return index_of(raw, path)


def _check_there(folder: Folder, sub: str, index: str, files: Sequence[str]) -> None:
    """Raise CheckpointError where a file that an index lists is not there."""
    there: set[str] = set()
    for inner in sorted({posixpath.dirname(file) for file in files}):
        if inner and not _is_folder(folder, sub, inner):
            continue
        there.update(inside(inner, name) for name in folder.names(inside(sub, inner)))
    lacking = [file for file in files if file not in there]
    if not lacking:
        return
    others = choices(name for name in folder.names(sub) if weight_name(name))
    raise CheckpointError(
        f"{where(folder, inside(sub, index))}: {_lacking(files, lacking, others)}",
        hint="fetch or save what is missing, or give the path of the file that you want",
    )


def _lacking(files: Sequence[str], lacking: Sequence[str], others: Sequence[str]) -> str:
    """Which of the files that an index lists are not there, and what is."""
    if len(lacking) < len(files):
        there = [file for file in files if file not in lacking]
        are, others_are = ("is" if len(names) == 1 else "are" for names in (lacking, there))
        return (
            f"lists {len(files):,} files, and {len(lacking):,} of them {are} not there: "
            f"{some(lacking)}; {len(there):,} {others_are}: {some(there)}"
        )
    beside = f"there lie {some(others)}" if others else "there are no others"
    if len(files) == 1:
        return f"lists one file, which is not there: {some(lacking)}; {beside}"
    return f"lists {len(files):,} files, and none of them exists: {some(lacking)}; {beside}"


def _is_folder(folder: Folder, sub: str, inner: str) -> bool:
    """Whether a directory that an index speaks of is there."""
    at = sub
    for part in inner.split("/"):
        if f"{part}/" not in folder.names(at):
            return False
        at = inside(at, part)
    return True


def _by_index(folder: Folder, sub: str, files: Sequence[str], suffix: str) -> Choice | None:
    """What the index lists that counts among ``files``, if there is any."""
    indexes = [i for name in files if (i := index_name(name)) and i.suffix == suffix]
    weights = [file for name in files if (file := weight_name(name, (suffix,)))]
    weights = [file for file in weights if not is_training_state(file.name)]
    index = _which(folder, sub, indexes)
    if index is None:
        return None
    if index.aside and _is_beside(folder, sub, index, weights):
        return None
    choice = indexed_choice(folder, sub, index.name)
    rest = [file.name for file in weights if file.name not in choice.names]
    if index.twin in rest and suffix == SAFETENSORS:
        raise CheckpointError(
            f"{where(folder, sub)}: holds both {called(index.twin)} and {called(index.name)}, "
            "which does not list it: they are two models, and loaders disagree about which counts",
            hint="give the path of the one that you want, or remove the other",
        )
    return _noted(choice, folder, rest)


def _which(folder: Folder, sub: str, indexes: Sequence[IndexName]) -> IndexName | None:
    """The index that counts of several."""
    if len(indexes) <= 1:
        return indexes[0] if indexes else None
    main = [i for i in indexes if i.stem == _MAIN[i.suffix] and not i.variant]
    plain = main or [i for i in indexes if not i.aside]
    if len(plain) == 1:
        return plain[0]
    raise CheckpointError(
        f"{where(folder, sub)}: holds {len(indexes)} indexes, and none of them is the main one: "
        f"{some((i.name for i in indexes), 5)}",
        hint="give the path of the index that you want",
    )


def _is_beside(folder: Folder, sub: str, index: IndexName, weights: Sequence[WeightName]) -> bool:
    """Whether an index of a variant, an adapter or a twin lies beside a model that it is not."""
    if index.base:
        listed = _read(folder, sub, index.name).weight_map.values()
        return any(file.stem == index.base and file.name not in listed for file in weights)
    return any(not (is_adapter(file.stem) or is_consolidated(file.stem)) for file in weights)


def _safetensors(
    folder: Folder, sub: str, files: Sequence[WeightName], adapters: Sequence[str]
) -> Choice:
    """What counts of safetensors files that no index lists."""
    if len(files) > 1:
        pieces = [file for file in files if has_pieces(folder, inside(sub, file.name))]
        if pieces:
            return _chosen(folder, "pieces", sub, pieces, files, adapters)
    chosen = _one_of(folder, sub, files)
    return _chosen(folder, "safetensors", sub, chosen, files, adapters)


def _one_of(folder: Folder, sub: str, files: Sequence[WeightName]) -> Sequence[WeightName]:
    """The files that are the model; all that are no copies of it where nothing tells them apart."""
    main = [file for file in files if not is_consolidated(file.stem)] or list(files)
    variants = {file.name for file in variants_among(main)}
    main = [file for file in main if file.name not in variants]
    if one := [f for f in main if f.stem in ("model", "adapter_model") and f.number < 0]:
        return one[:1]
    return _whole_set(folder, sub, main) or main


def _whole_set(folder: Folder, sub: str, files: Sequence[WeightName]) -> Sequence[WeightName]:
    """The one numbered set that is complete; none where there are several. CheckpointError where
    there is none and files of some.
    """
    sets = numbered_sets(files)
    whole = [one for one in sets if is_complete(one)]
    if len(whole) == 1:
        return whole[0]
    if len(whole) < len(sets):
        raise _incomplete(folder, sub, next(one for one in sets if not is_complete(one)))
    return ()


def _incomplete(folder: Folder, sub: str, files: Sequence[WeightName]) -> CheckpointError:
    count, lacking = int(files[0].count), missing_names(files)
    more = count - len(files) - len(lacking)
    what = f"lacks {some(lacking)}" + (f" and {more:,} more" if lacking and more > 0 else "")
    return CheckpointError(
        f"{where(folder, sub)}: has {len(files):,} of {count:,} files of a numbered set; it "
        f"{what if lacking else 'has numbers that it cannot have'}",
        hint="fetch or save the rest, or give the path of the file that you want",
    )


def _torch(folder: Folder, sub: str, files: Sequence[str], metadata: bool) -> Choice | None:
    """What counts of torch files."""
    found = _by_index(folder, sub, files, ".bin")
    if found is not None:
        return found
    named = [file for name in files if (file := weight_name(name, TORCH))]
    named = [f for f in named if not (is_adapter(f.stem) or is_training_state(f.name))]
    named = [f for f in named if not is_deepspeed(f.name)]
    aside = {file.name for file in variants_among(named)}
    aside.update(file.name for file in named if is_consolidated(file.stem))
    plain = [file for file in named if file.name not in aside] or named
    main = [file for file in named if file.name == "pytorch_model.bin"]
    if main or (main := list(_whole_set(folder, sub, plain))):
        return _chosen(folder, "torch", sub, main, named)
    if metadata:
        parts = tuple(name for name in files if name.endswith(".distcp"))
        return Choice("dcp", sub, parts, METADATA)
    if ranks := _ranks(folder, sub, files):
        return ranks
    if FORM in files and (error := of_other_backend(folder, sub)) is not None:
        raise error
    there = [file.name for file in plain if is_torch(folder, inside(sub, file.name))]
    if not named and deepspeed.is_model(folder.names(sub)):
        there = [deepspeed.MODEL]
    elif not named:
        others = [n for n in files if looks_torch(n) and not is_training_state(n)][:_PROBED]
        there = [name for name in others if is_torch(folder, inside(sub, name), archive=True)]
    if len(there) > 1:
        raise CheckpointError(
            f"{where(folder, sub)}: holds {len(there):,} torch files, and nothing says which is "
            f"the model: {some(choices(there), 5)}",
            hint="give the path of the file that you want",
        )
    if not there:
        return None
    passed = [file.name for file in named if file not in plain]
    return _noted(Choice("torch", sub, (there[0],)), folder, passed)


def _ranks(folder: Folder, sub: str, files: Sequence[str]) -> Choice | None:
    """The files that the processes of a sharded run wrote, each its own."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in files:
        if known := rank_of(name):
            sets.setdefault(known[:2], {})[known[2]] = name
    if not sets:
        return None
    if len(sets) > 1:
        listed = [f"{stem} of {world} ranks" for stem, world in sets]
        raise CheckpointError(
            f"{where(folder, sub)}: holds files of several sharded runs: {some(listed, 5)}",
            hint="keep each in a directory of its own",
        )
    (((stem, world), ranks),) = sets.items()
    lacking = [rank for rank in range(min(world, len(ranks) + 3)) if rank not in ranks]
    if lacking or len(ranks) != world:
        absent = f"{stem}_world_size_{world}_rank_{lacking[0]}.pt" if lacking else ""
        first = f"; {called(absent)} is not there" if lacking else ""
        raise CheckpointError(
            f"{where(folder, sub)}: has files of {len(ranks):,} ranks of {world:,}{first}",
            hint="copy the files of all ranks, and no others, into one directory",
        )
    return Choice("ranks", sub, tuple(ranks[rank] for rank in range(world)))


def _chosen(
    folder: Folder,
    form: str,
    sub: str,
    chosen: Sequence[WeightName],
    among: Sequence[WeightName],
    also: Sequence[str] = (),
) -> Choice:
    """The choice, with a note of what else lies there."""
    names = tuple(sorted((file.name for file in chosen), key=natural_key))
    rest = [file.name for file in among if file.name not in names]
    return _noted(Choice(form, sub, names), folder, [*rest, *also])


def _noted(choice: Choice, folder: Folder, passed: Sequence[str]) -> Choice:
    """The choice with one more note, of files that were passed over, if there are any."""
    if not passed:
        return choice
    of = choice.index or some(choices(choice.names))
    note = f"{where(folder, choice.folder)}: {of} counts; left out: {some(choices(passed), 5)}"
    return replace(choice, notes=(*choice.notes, note))
