"""The number of heads of RWKV-5 to 7, which follows from their width."""

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.keys import Computed
from llmkit.errors import SpecError


def heads_as_wide_as(key: str) -> Computed:
    """How many heads of the width under `key` (64, where it is absent) make up the stream.

    Raises:
        SpecError: the stream is no whole number of them wide.
    """

    def heads(config: Mapping[str, Any]) -> int:
        hidden, width = int(config["hidden_size"]), int(config.get(key) or 64)
        if hidden % width:
            raise SpecError(f"config.json: hidden_size {hidden} is not a multiple of {key} {width}")
        return hidden // width

    return Computed(heads)
