"""How fast `llmkit delta xor` and `delta decrypt` are, beside `cp` of the same bytes and the published algorithms.

    python tests/bench/decode_release.py SCRATCH [--gib 1] [--repeat 2] [--reference-mib 16] [--keep]

SCRATCH needs five times the size of the model, which is random float16 in two torch files of `--gib` each. The key is a
third one, of two thirds of that. Files are warm. The published algorithms (facts on formats, 1.5 and 1.6) are written
below in plain Python, one byte at a time as they were released; they decode the first `--reference-mib` of a file, and
their rate is compared. `cp` copies the payload, `cp + sync` waits for the disk as llmkit does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from delta_apply import Run, timed

BLOCK = 10 * 2**20
FILES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def published_xor(payload: Path, base: Path, out: Path, nbytes: int) -> None:
    """Blocks of 4096 bytes, the base's padded with zeros, byte by byte."""
    with payload.open("rb") as first, base.open("rb") as second, out.open("wb") as result:
        for _ in range(0, nbytes, 4096):
            a = first.read(4096)
            b = second.read(len(a)).ljust(len(a), b"\0")
            result.write(bytes(x ^ y for x, y in zip(a, b, strict=True)))


def published_decrypt(encrypted: Path, key: Path, out: Path, nbytes: int) -> None:
    """Blocks of 10 MiB, each with its block of the key repeated to its length, byte by byte, and hashed."""
    digest = hashlib.sha256()
    with encrypted.open("rb") as first, key.open("rb") as second, out.open("wb") as result:
        first.read(32)
        done = 0
        while done < nbytes:
            data = first.read(min(BLOCK, nbytes - done))
            part = second.read(BLOCK)
            if not part:
                second.seek(0)
                part = second.read(BLOCK)
            plain = bytes(data[i] ^ part[i % len(part)] for i in range(len(data)))
            digest.update(plain)
            result.write(plain)
            done += len(data)


def write_torch(path: Path, nbytes: int, seed: int) -> None:
    """Random weights, a few dozen matrices in one file."""
    import torch

    g = torch.Generator().manual_seed(seed)
    rows = nbytes // 2 // 4096 // 32
    torch.save({f"w{i}": (torch.randn(rows, 4096, generator=g) * 0.02).half() for i in range(32)}, path)


def combine(first: Path, second: Path, out: Path, *, keyed: bool) -> None:
    """Make a coded file, with numpy."""
    import numpy as np

    a, b = np.fromfile(first, np.uint8), np.fromfile(second, np.uint8)
    if keyed:
        n = -(-len(b) // BLOCK)
        for i in range(0, len(a), BLOCK):
            part = b[i // BLOCK % n * BLOCK :][:BLOCK]
            a[i : i + BLOCK] ^= np.resize(part, len(a[i : i + BLOCK]))
    else:
        n = min(len(a), len(b))
        a[:n] ^= b[:n]
    with out.open("wb") as file:
        if keyed:
            file.write(hashlib.sha256(first.read_bytes()).digest())
        a.tofile(file)


def prepare(home: Path, nbytes: int) -> None:
    """Base, tuned, key and both releases."""
    for name in ("base", "tuned", "xor", "enc"):
        (home / name).mkdir(parents=True, exist_ok=True)
    write_torch(home / "key.pth", nbytes * 2 // 3, 9)
    for i, name in enumerate(FILES):
        write_torch(home / "base" / name, nbytes, i)
        write_torch(home / "tuned" / name, nbytes, 10 + i)
        combine(home / "tuned" / name, home / "base" / name, home / "xor" / name, keyed=False)
        digest = hashlib.sha256((home / "tuned" / name).read_bytes()).hexdigest()
        combine(home / "tuned" / name, home / "key.pth", home / "enc" / f"{name}.{digest}.enc", keyed=True)


def same(a: Path, b: Path) -> bool:
    """Whether two files have the same bytes."""
    with a.open("rb") as first, b.open("rb") as second:
        while True:
            x, y = first.read(2**20), second.read(2**20)
            if x != y:
                return False
            if not x:
                return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--reference-mib", type=int, default=16)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    home = args.scratch / "decode_release"
    if not (home / "enc").is_dir():
        prepare(home, int(args.gib * 2**30))
    os.sync()
    total = sum(p.stat().st_size for p in (home / "xor").iterdir())
    encrypted = sorted((home / "enc").iterdir())
    llmkit = [sys.executable, "-m", "llmkit", "delta"]
    commands = {
        "delta xor": [*llmkit, "xor", str(home / "base"), str(home / "xor"), "-q"],
        "delta decrypt": [*llmkit, "decrypt", str(home / "key.pth"), str(home / "enc"), "-q"],
    }
    runs: dict[str, list[Run]] = {name: [] for name in ("cp", "cp + sync", *commands)}
    out = home / "out"
    for _ in range(args.repeat):
        started = time.monotonic()
        runs["cp"].append(timed(["cp", "-r", str(home / "xor"), str(out)]))
        os.sync()
        runs["cp + sync"].append(Run(time.monotonic() - started, 0.0))
        shutil.rmtree(out)
        for name, command in commands.items():
            os.sync()
            runs[name].append(timed([*command, "-o", str(out)]))
            assert all(same(out / f, home / "tuned" / f) for f in FILES), name
            shutil.rmtree(out)
    part = args.reference_mib * 2**20
    rates = {}
    for name, function, one, two in (
        ("delta xor", published_xor, home / "xor" / FILES[0], home / "base" / FILES[0]),
        ("delta decrypt", published_decrypt, encrypted[0], home / "key.pth"),
    ):
        started = time.monotonic()
        function(one, two, home / "part", part)
        rates[name] = part / (time.monotonic() - started)
        with (home / "part").open("rb") as mine, (home / "tuned" / FILES[0]).open("rb") as right:
            assert mine.read() == right.read(part), name
    (home / "part").unlink()
    print(f"{total / 1e9:.2f} GB in {len(FILES)} files")
    best = {name: min(r.wall for r in found) for name, found in runs.items()}
    for name, found in runs.items():
        every = ", ".join(f"{r.wall:.2f} ({r.cpu:.2f} cpu)" for r in found)
        mib = max(r.mib for r in found)
        print(f"{name:>14}  {best[name]:6.2f} s  {total / best[name] / 1e6:5.0f} MB/s  {mib:4.0f} MiB   [{every}]")
    for name, rate in rates.items():
        print(
            f"{name}: {best[name] / best['cp']:.2f} x cp, {best[name] / best['cp + sync']:.2f} x cp + sync; the "
            f"published algorithm runs at {rate / 1e6:.1f} MB/s, llmkit {total / best[name] / rate:.0f} times as fast"
        )
    if not args.keep:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
