"""Random configs of every family that transformers knows: llmkit's decoder against transformers' class, or a reason.

    python tests/reliability/random_configs.py [FAMILY …] [--count 20] [--seed 0] [--verbose]

Each config follows from the family, the seed and its number, and is printed where it goes wrong. Exit code 1 then, or
where a config is refused for another reason than those that llmkit states it cannot compute (`STATED`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from reliability.against_transformers import PLUGINS, Outcome, described, quietly, their_model, try_ours
from reliability.config_draws import random_config

__all__ = ["FAMILIES", "STATED", "Trial", "trials"]

FAMILIES = [name for name, a in PLUGINS.items() if described(a, a.tiny_config()) is not None]
STATED = (r"rotary positions would turn \d+ of the \d+ dims",)


@dataclass(frozen=True)
class Trial:
    """One config and what came of it."""

    config: Mapping[str, Any]
    outcome: Outcome

    @property
    def verdict(self) -> str:
        if self.outcome.is_equal:
            return "equal"
        if self.outcome.refusal is None:
            return "WRONG"
        return "refused" if any(re.search(s, self.outcome.refusal) for s in STATED) else "refused without need"


def trials(name: str, count: int, seed: int = 0) -> Iterator[Trial]:
    """`count` random configs of a family that transformers itself computes to finite logits."""
    architecture, done, number = PLUGINS[name], 0, 0
    with quietly(), tempfile.TemporaryDirectory() as folder:
        while done < count:
            draw = random.Random(f"{name} {seed} {number}")
            number += 1
            if number > 20 * count:
                raise RuntimeError(f"{name}: transformers takes too few of the configs that are drawn")
            config = random_config(name, draw)
            theirs = described(architecture, config)
            assert theirs is not None
            try:
                wanted = their_model(theirs, architecture.reference_attention, seed=number, is_exact=True)
            except Exception:  # noqa: BLE001 - transformers' own refusal, in whatever form
                continue
            if not torch.isfinite(wanted.logits).all():
                continue
            done += 1
            yield Trial(config, try_ours(wanted, config, Path(folder) / str(number)))


def main() -> int:
    """A line for each family; each config that goes wrong as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--count", type=int, default=20, help="configs of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="every config")
    args = parser.parse_args()
    total: dict[str, int] = {}
    for name in args.family or FAMILIES:
        counts: dict[str, int] = {}
        for trial in trials(name, args.count, args.seed):
            counts[trial.verdict] = counts.get(trial.verdict, 0) + 1
            if args.verbose or trial.verdict in ("WRONG", "refused without need"):
                print(f"{name}: {trial.verdict}: {trial.outcome}\n  {json.dumps(dict(trial.config))}")
        print(f"{name}: {counts}", flush=True)
        total = {k: total.get(k, 0) + counts.get(k, 0) for k in total.keys() | counts.keys()}
    print(f"all: {total}")
    return int(bool(total.keys() & {"WRONG", "refused without need"}))


if __name__ == "__main__":
    sys.exit(main())
