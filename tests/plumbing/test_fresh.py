"""Fresh encoders and decoders: fields that cannot be meant are refused. Oracle: written by hand."""

import pytest
from safetensors.torch import load_file

from plumbing.fresh import write_decoder, write_encoder

ENCODERS = [dict(model_type="clip_vision_model"), dict(image_size=0), dict(image_size=24, patch_size="8")]
DECODERS = [dict(model_type="phi3"), dict(vocab_size="400"), dict(num_hidden_layers=10**6), dict(rope_theta=0)]


@pytest.mark.parametrize("fields", ENCODERS, ids=str)
def test_an_encoder_with_a_wrong_field_is_refused_and_not_written(tmp_path, fields):
    with pytest.raises(ValueError, match=f"new/config.json: {list(fields)[-1]} is "):
        write_encoder(tmp_path / "new", fields)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", DECODERS, ids=str)
def test_a_decoder_with_a_wrong_field_is_refused_before_its_tokenizer_is_learnt(tmp_path, fields):
    with pytest.raises(ValueError, match=f"new/config.json: {list(fields)[-1]} is "):
        write_decoder(tmp_path / "new", fields, texts=None)
    assert not list(tmp_path.iterdir())


def test_position_embeddings_of_a_fresh_encoder_are_as_large_as_a_normed_feature(tmp_path):
    fields = dict(image_size=96, patch_size=12, hidden_size=96, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2)
    write_encoder(tmp_path / "new", fields)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert 0.95 < tensors["embeddings.position_embeddings"].std() < 1.05
    assert tensors["encoder.layer.0.mlp.fc1.weight"].std() < 0.03
