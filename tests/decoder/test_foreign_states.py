"""Models of transformers that keep a state: greedy tokens are those of whole sequences, computed without any cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from llmkit.decoder.foreign import TransformersDecoder
from llmkit.decoder.generate import generate

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
FAMILIES = {
    "falcon_mamba": {"state_size": 8, "intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 64, "context_length": 96},
    "bamba": {**HEADS, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "lfm2": {**HEADS, "full_attn_idxs": [1]},  # a short convolution, though transformers does not call it stateful
}
PROMPTS = [[5, 9], [7, 30, 31, 32, 33, 8, 12], [60, 44, 12, 9, 8]]  # the first is shorter than a convolution


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    made = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(1)
    for weight in made.parameters():
        scale, shift = (0.15, 0.0) if weight.dim() > 1 else (0.3, 0.5)
        weight.data = torch.randn(weight.shape, generator=generator) * scale + shift
    return made


def test_greedy_tokens_are_those_of_whole_sequences(model):
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    decoder = TransformersDecoder(model, torch.device("cpu"))
    assert [generate(decoder, [p], max_new_tokens=6)[0] for p in PROMPTS] == wanted
    assert generate(decoder, PROMPTS, max_new_tokens=6) == wanted
    assert len({tuple(w) for w in wanted}) == 3

    cache, ids = decoder.new_cache(), torch.tensor([PROMPTS[1]])
    parts = [decoder(ids[:, cut], cache) for cut in (slice(0, 3), slice(3, 6), slice(6, 7))]
    assert (torch.cat(parts, 1) - decoder(ids)).abs().max() < 1e-4


class Forgetful(torch.nn.Module):
    """Takes a cache and looks at its number only: a step sees the last token and how many came before."""

    def __init__(self, keeps):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.keeps, self.lengths = keeps, []

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(50, 1))

    def forward(self, input_ids, cache=None, use_cache=True):
        self.lengths.append(input_ids.shape[1])
        before = cache if cache is not None and self.keeps else 0
        sums = input_ids.cumsum(1) + before
        logits = torch.nn.functional.one_hot(sums % 50, 50).float() * 4
        return transformers.utils.ModelOutput(logits=logits, cache=sums[:, -1:])


@pytest.mark.parametrize(("keeps", "lengths"), [(True, [3, 1, 4, 1, 1]), (False, [3, 1, 4, 5, 6])])
def test_a_step_is_compared_once_and_the_whole_computed_where_the_state_is_lost(keeps, lengths):
    model = Forgetful(keeps)
    made = generate(TransformersDecoder(model, torch.device("cpu")), [[1, 2, 4]], max_new_tokens=4)
    assert made == [[7, 14, 28, 6]]  # each token is the sum of all before, modulo 50
    assert model.lengths == lengths
