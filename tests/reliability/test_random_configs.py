"""Five random configs of each family: transformers' logits, or a reason that llmkit states.

More: `python tests/reliability/random_configs.py --count 20`.
"""

from __future__ import annotations

import pytest

from reliability.random_configs import FAMILIES, trials

SAME = ("aquila", "xverse")  # Llama by another name, and nothing else


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME])
def test_random_configs(name):
    found = list(trials(name, 5))
    assert [t for t in found if t.verdict not in ("equal", "refused")] == []
    assert len({str(t.config) for t in found}) == len(found)
    assert sum(t.verdict == "equal" for t in found) >= 2
