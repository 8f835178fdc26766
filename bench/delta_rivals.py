"""What else makes and applies the difference of two checkpoints, as commands.

    python bench/delta_rivals.py TOOL create BASE TUNED DELTA
    python bench/delta_rivals.py TOOL apply BASE DELTA OUT

BASE, TUNED, DELTA and OUT are folders; shards are worked on two at a time, each tool driven as its
own documentation says. Any interpreter that has the tool will do: nothing of ckdiff is imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

WORKERS = 2
SLICE = 1 << 22  # bytes of a slice in the streamed XOR


def xor(left: bytes, right: bytes) -> bytes:
    import numpy as np

    return (np.frombuffer(left, np.uint8) ^ np.frombuffer(right, np.uint8)).tobytes()


def xor_create(base: Path, tuned: Path, delta: Path, level: int) -> None:
    """One zstd frame of the XOR of two files of one size, streamed."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with open(base, "rb") as a, open(tuned, "rb") as b, open(delta, "wb") as out:
        size = tuned.stat().st_size
        if size != base.stat().st_size:
            raise SystemExit(f"{tuned}: not the size of {base}")
        with compressor.stream_writer(out, size=size) as stream:
            while piece := a.read(SLICE):
                stream.write(xor(piece, b.read(SLICE)))


def xor1_create(base: Path, tuned: Path, delta: Path) -> None:
    xor_create(base, tuned, delta, 1)


def xor3_create(base: Path, tuned: Path, delta: Path) -> None:
    xor_create(base, tuned, delta, 3)


def xor_apply(base: Path, delta: Path, out: Path) -> None:
    import zstandard

    with open(base, "rb") as a, open(delta, "rb") as packed, open(out, "wb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(packed)
        while piece := a.read(SLICE):
            file.write(xor(piece, stream.read(len(piece))))


def patch_create(base: Path, tuned: Path, delta: Path) -> None:
    """zstd's own patches; the window has to reach over the whole file."""
    window = max(27, tuned.stat().st_size.bit_length())
    options = ["-q", "-1", f"--long={window}", f"--patch-from={base}"]
    subprocess.run(["zstd", *options, str(tuned), "-o", str(delta)], check=True)


def patch_apply(base: Path, delta: Path, out: Path) -> None:
    window = max(27, base.stat().st_size.bit_length())
    options = ["-q", "-d", f"--long={window}", f"--patch-from={base}"]
    subprocess.run(["zstd", *options, str(delta), "-o", str(out)], check=True)


def xdelta_create(base: Path, tuned: Path, delta: Path) -> None:
    subprocess.run(["xdelta3", "-e", "-f", "-s", *map(str, (base, tuned, delta))], check=True)


def xdelta9_create(base: Path, tuned: Path, delta: Path) -> None:
    """Its smallest: short matches are searched hardest, and Huffman coding suits them best."""
    options = ["-9", "-S", "djw", "-s"]
    subprocess.run(["xdelta3", "-e", "-f", *options, *map(str, (base, tuned, delta))], check=True)


def xdelta_apply(base: Path, delta: Path, out: Path) -> None:
    subprocess.run(["xdelta3", "-d", "-f", "-s", *map(str, (base, delta, out))], check=True)


def zipnn_create(base: Path, tuned: Path, delta: Path) -> None:
    """ZipNN of the XOR of two byte strings, its delta mode."""
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte")
    delta.write_bytes(coder.compress(tuned.read_bytes(), delta_second_data=base.read_bytes()))


def zipnn_apply(base: Path, delta: Path, out: Path) -> None:
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype="bfloat16", delta_compressed_type="byte")
    out.write_bytes(coder.decompress(delta.read_bytes(), delta_second_data=base.read_bytes()))


def fireworks_create(base: Path, tuned: Path, delta: Path) -> None:
    from fireworks_delta_compression import delta_compress_files_to_file as compress

    compress(src=str(base), dst=str(tuned), diff_file=str(delta), compression_format="arc_v3")


def fireworks_apply(base: Path, delta: Path, out: Path) -> None:
    """Its in-place way, which needs no second copy in memory, on a copy of the base."""
    from fireworks_delta_compression import delta_decompress_inplace as decompress

    shutil.copyfile(base, out)
    decompress(base_path=str(out), diff_path=str(delta), compression_format="arc_v3")


Work = Callable[[Path, Path, Path], None]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A tool, and how to tell whether it is here."""

    title: str
    install: str
    module: str = ""  #: what must be importable,
    program: str = ""  #: or on the PATH


@dataclass(frozen=True, kw_only=True)
class Rival(Known):
    """A tool that this program drives, shard by shard."""

    create: Work  #: base, tuned, delta
    apply: Work  #: base, delta, out


REMINIS = Known(title="reminis", module="reminis", install="pip install reminis==0.34.0")
RIVALS = {
    "fireworks": Rival(
        title="fireworks-delta-compression, arc_v3",
        create=fireworks_create,
        apply=fireworks_apply,
        module="fireworks_delta_compression",
        install="pip install fireworks-delta-compression==0.1.0",
    ),
    "zipnn": Rival(
        title="zipnn, delta mode",
        create=zipnn_create,
        apply=zipnn_apply,
        module="zipnn",
        install="pip install zipnn==0.5.4 torch (needs a C compiler)",
    ),
    "xor1": Rival(
        title="zstd -1 of the XOR",
        create=xor1_create,
        apply=xor_apply,
        module="zstandard",
        install="pip install zstandard",
    ),
    "xor3": Rival(
        title="zstd -3 of the XOR",
        create=xor3_create,
        apply=xor_apply,
        module="zstandard",
        install="pip install zstandard",
    ),
    "patch-from": Rival(
        title="zstd -1 --patch-from",
        create=patch_create,
        apply=patch_apply,
        program="zstd",
        install="apt-get install zstd",
    ),
    "xdelta3": Rival(
        title="xdelta3",
        create=xdelta_create,
        apply=xdelta_apply,
        program="xdelta3",
        install="apt-get install xdelta3",
    ),
    "xdelta3-9": Rival(
        title="xdelta3 -9 -S djw",
        create=xdelta9_create,
        apply=xdelta_apply,
        program="xdelta3",
        install="apt-get install xdelta3",
    ),
}


def main(tool: str, action: str, base: str, second: str, third: str) -> None:
    rival = RIVALS[tool]
    work = {"create": rival.create, "apply": rival.apply}[action]
    Path(third).mkdir(parents=True, exist_ok=True)
    shards = sorted(Path(base).glob("*.safetensors"))
    with ProcessPoolExecutor(WORKERS) as pool:
        jobs = [
            pool.submit(work, shard, Path(second) / shard.name, Path(third) / shard.name)
            for shard in shards
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
