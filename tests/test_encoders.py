"""T5's tokens and both readings of <cls>, DINOv2 and CLIP tokens, Grounded SAM with random weights: all beside transformers."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import encoders
import toy_networks
import untrained
from checkpoint import BadInput
from encoders import CLS, GroundedSAM, ImageEncoder, TextEncoder, Tokenizer, add_cls, check_text_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "toy"
    untrained.init(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(model):
    """transformers' own tokenizer of the same SentencePiece model."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(model / "tokenizer")


words = st.lists(st.sampled_from("a fox is running in the snow made of gold, and; Ünïcode 雪 ﬁ  ... 12".split(" ")))


@pytest.fixture(scope="module")
def tokenizers(model, oracle, tmp_path_factory):
    """Ours from the official SentencePiece model, and from the tokenizer.json that transformers saves instead."""
    saved = tmp_path_factory.mktemp("tokenizer")
    oracle("a fox", padding="max_length", max_length=3, truncation=True)  # which the file then holds
    oracle.save_pretrained(saved)
    written = json.loads((saved / "tokenizer.json").read_text())
    assert written["padding"] and written["truncation"]
    assert not (saved / "spiece.model").exists()
    return Tokenizer(model / "tokenizer"), Tokenizer(saved)


@settings(deadline=None)
@given(words.map(" ".join))
def test_tokens_are_those_of_transformers(tokenizers, oracle, text):
    for tokenizer in tokenizers:
        assert tokenizer(text) == oracle(text).input_ids
        assert tokenizer.size == len(oracle)


def test_text_features_are_padded_and_unmasked_as_in_the_official_pipeline(model, oracle):
    from transformers import T5EncoderModel

    prompts = ["a fox is running", "a cat made of gold in the snow"]
    inputs = oracle(prompts, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = T5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32)(inputs.input_ids)[0]
    assert relative_error(TextEncoder(model, length=20)(prompts), theirs) < 1e-6


def test_cls_as_a_token_is_the_first_unused_row(model, oracle):
    with_token, pieces = TextEncoder(model, "token"), TextEncoder(model, "pieces")
    row = len(oracle)
    assert with_token.cls_id == row
    oracle_with_cls = type(oracle).from_pretrained(model / "tokenizer")
    oracle_with_cls.add_tokens([CLS], special_tokens=True)
    for prompt in (f"a {CLS} fox is running", f"{CLS} a fox", f"a fox {CLS}"):
        ids = with_token.tokenize([prompt])[0].tolist()
        assert [i for i in ids if i] == oracle_with_cls(prompt).input_ids and ids.count(row) == 1
        assert [i for i in pieces.tokenize([prompt])[0].tolist() if i] == oracle(prompt).input_ids
    assert not torch.allclose(with_token([f"{CLS} a fox"]), pieces([f"{CLS} a fox"]))


def test_no_row_left_for_cls(model, tmp_path):
    import shutil

    from transformers import T5Config, T5EncoderModel

    shutil.copytree(model, tmp_path / "toy")
    config = tmp_path / "toy" / "text_encoder" / "config.json"
    tokens = Tokenizer(model / "tokenizer").size
    T5EncoderModel(T5Config(**{**json.loads(config.read_text()), "vocab_size": tokens})).save_pretrained(config.parent)
    with pytest.raises(BadInput, match="none is left for <cls>"):
        check_text_encoder(tmp_path / "toy", toy_networks.TEXT_DIM, "token")


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_it(model, capsys):
    encoder = TextEncoder(model, length=6)
    ids = encoder.tokenize(["a fox is running in the snow under water"])[0].tolist()
    assert len(ids) == 6 and ids[-1] == 1
    quoted = capsys.readouterr().err.split('"')[1]
    assert "a fox is running in the snow under water".endswith(quoted) and quoted
    encoder.tokenize(["a fox"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prompt,noun,expected", [
    ("An armchair is in the room", "armchair", "An <cls> armchair is in the room"),
    ("a Dog runs", "dog", "a <cls> Dog runs"),
    ("hotdogs and a dog", "dog", "hotdogs and a <cls> dog"),
    ("it runs", "dog", "<cls> it runs"),
    ("a dog runs", None, "<cls> a dog runs"),
    ("a <cls> dog runs", "dog", "a <cls> dog runs"),
])
def test_where_cls_goes(prompt, noun, expected):
    assert add_cls(prompt, noun) == expected


@pytest.mark.parametrize("part,network", [("dino", "Dinov2Model"), ("clip", "CLIPVisionModel")])
def test_image_tokens_are_the_last_layer_of_the_padded_image(model, part, network):
    import transformers

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 48, 3), dtype=np.uint8))
    square = Image.new("RGB", (48, 48), "white")
    square.paste(picture, (0, 12))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    with torch.no_grad():
        theirs = getattr(transformers, network).from_pretrained(model / part, dtype=torch.float32)(pixel_values=(pixels[None] - 0.5) / 0.5)
    ours = ImageEncoder(model, part)([picture])
    assert ours.shape == (1, untrained.IMAGE_TOKENS, toy_networks.IMAGE_DIM)
    assert relative_error(ours, theirs.last_hidden_state) < 1e-5


def test_parts_that_the_checkpoint_lacks_come_from_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(encoders.checkpoint, "resolve", lambda name: asked.append(name) or tmp_path)
    assert encoders.find(tmp_path, "dino") == tmp_path and asked == ["facebook/dinov2-large"]


# --- Grounded SAM, tiny and with random weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    from transformers import (BertTokenizer, GroundingDinoConfig, GroundingDinoForObjectDetection,
                              GroundingDinoImageProcessor, GroundingDinoProcessor, SamConfig, SamImageProcessor, SamModel,
                              SamProcessor)

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("grounded")
    vocabulary = {word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] . ? a fox".split())}
    tokenizer = BertTokenizer(vocab=vocabulary)
    swin = dict(model_type="swin", image_size=128, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                out_features=["stage2", "stage3", "stage4"])
    bert = dict(model_type="bert", vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16)
    config = GroundingDinoConfig(backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2,
                                 encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                                 decoder_ffn_dim=32, num_queries=5, num_feature_levels=4, max_text_len=16)
    GroundingDinoForObjectDetection(config).save_pretrained(folder / "grounding_dino")
    size = {"shortest_edge": 128, "longest_edge": 256}
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer).save_pretrained(folder / "grounding_dino")
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16, output_channels=8,
                  num_pos_feats=4,
                  mlp_dim=16, window_size=2, global_attn_indexes=[0])
    prompt = dict(hidden_size=8, image_size=64, patch_size=16, image_embedding_size=4)
    decoder = dict(hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8)
    SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).save_pretrained(
        folder / "sam")
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    SamProcessor(processor).save_pretrained(folder / "sam")
    return folder


def test_grounded_sam_gives_a_mask_of_the_image_or_none(segmenter):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    nothing = GroundedSAM(segmenter, threshold=1.0)(picture, "fox")
    assert nothing is None
    mask = GroundedSAM(segmenter, threshold=0.0)(picture, "Fox")
    assert mask is None or (mask.size == picture.size and set(np.unique(np.array(mask))) <= {0, 255})


def test_grounded_sam_takes_the_surest_box_and_the_surest_mask(segmenter, monkeypatch):
    """The two networks replaced by known answers: of two boxes the surer one is segmented, of three masks the surest."""
    from types import SimpleNamespace

    picture, asked = Image.new("RGB", (90, 50)), []
    segment = GroundedSAM(segmenter)
    found = {"scores": torch.tensor([0.4, 0.9]), "boxes": torch.tensor([[0.0, 0, 9, 9], [10.0, 20, 40, 45]])}
    monkeypatch.setattr(segment.box_processor, "post_process_grounded_object_detection", lambda *_, **__: [found])
    real = segment.mask_processor

    class Processor:
        image_processor = SimpleNamespace(post_process_masks=lambda masks, *_: [masks[0] > 0])

        def __call__(self, images, input_boxes, return_tensors):
            asked.append(input_boxes)
            return real(images, input_boxes=input_boxes, return_tensors=return_tensors)

    masks = -torch.ones(1, 1, 3, 50, 90)
    masks[0, 0, 1, 20:45, 10:40] = 1
    segment.mask_processor = Processor()
    segment.mask_network = lambda **_: SimpleNamespace(pred_masks=masks, iou_scores=torch.tensor([[[0.1, 0.8, 0.5]]]))
    assert segment(picture, "fox").getbbox() == (10, 20, 40, 45)
    assert asked == [[[[10.0, 20.0, 40.0, 45.0]]]]


def test_a_long_caption_is_cut_where_grounding_dino_ends(segmenter):
    """Its positions end at max_text_len, 16 here; what lies behind is not read."""
    picture, asked = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8)), []
    segment = GroundedSAM(segmenter, threshold=0.0)
    note = lambda _, args, kwargs: asked.append(kwargs["input_ids"][0].tolist())
    segment.box_network.register_forward_pre_hook(note, with_kwargs=True)
    for caption in ("a fox. " * 30, "a fox. " * 100):
        segment(picture, caption)
    assert len(asked[0]) == 16 and asked[0] == asked[1]


@pytest.mark.parametrize("part,key", [("grounding_dino", "model.encoder.layers.0.deformable_layer.fc1.weight"),
                                      ("sam", "mask_decoder.iou_prediction_head.proj_in.weight")])
def test_grounded_sam_with_tensors_missing_is_refused(part, key, segmenter, tmp_path):
    shutil.copytree(segmenter, tmp_path / "grounded")
    file = tmp_path / "grounded" / part / "model.safetensors"
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadInput, match=f"{part} do not fit its config.json: 1 missing .{re.escape(key)}"):
        GroundedSAM(tmp_path / "grounded")
