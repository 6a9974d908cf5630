"""The frozen networks that condition or segment, all through transformers: T5 for the text, DINOv2 and CLIP for the
identity image, Grounded SAM to cut a subject out. Each is loaded from a subfolder of the checkpoint where it has one,
else from its hub id.
"""

import re
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import checkpoint
from checkpoint import BadInput
from media import fit, image_to_tensor

CLS = "<cls>"  # Switch's special token (3.3, "Maintaining Identity with a Reference Token")

# Where a network comes from when the checkpoint's folder does not hold it.
HUB = {"dino": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14",
       "grounding_dino": "IDEA-Research/grounding-dino-tiny", "sam": "facebook/sam-vit-base"}


def find(model: Path, part: str) -> Path:
    """The folder of the network `part` ("dino", "clip", ...): the checkpoint's own, else a snapshot of its hub id."""
    return checkpoint.part(model, part) or checkpoint.resolve(HUB[part])


def load_network(folder: Path, kind: str, dtype: torch.dtype, ignore: tuple[str, ...] = (),
                 pickled: bool = False):
    """The network of class `kind` of transformers in `folder`, frozen. What the files lack is an error: transformers
    itself would draw it at random. ignore: beginnings of the names that may be lacking, as nothing uses them.
    pickled: old weights of scoring networks may be a pytorch_model.bin, of which transformers unpickles tensors alone."""
    import transformers

    checkpoint.read_json(folder / "config.json")
    if not (pickled and (folder / "pytorch_model.bin").exists()):
        checkpoint.index(folder, stem="model")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it lists what is not needed, such as the text half of CLIP
    try:
        network, info = getattr(transformers, kind).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # a config or a shape that does not fit: each class has its own way to be displeased
        raise BadInput(f"{folder} cannot be loaded as a {kind}: {' '.join(str(error).split())}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(ignore))
    if missing:
        raise BadInput(f"The weights in {folder} do not fit its config.json: {len(missing)} missing "
                       f"({checkpoint.some(missing)}).")
    return network.eval().requires_grad_(False)


def load_tokenizer(folder: Path):
    """The tokenizer of transformers in `folder`."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")):
        raise BadInput(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json.")  # AutoTokenizer would make an empty one
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each tokenizer has its own way to be displeased
        raise BadInput(f"{folder} has no tokenizer that can be read: {' '.join(str(error).split())[:200]}") from error


# --- text -------------------------------------------------------------------------------------------------------------


def add_cls(prompt: str, noun: str | None = None) -> str:
    """The prompt with <cls> before `noun` where the noun is named in it, else at the front; unchanged if it has one."""
    if CLS in prompt:
        return prompt
    place = re.search(rf"\b{re.escape(noun)}\b", prompt, flags=re.IGNORECASE) if noun else None
    return f"{prompt[: place.start()]}{CLS} {prompt[place.start() :]}" if place else f"{CLS} {prompt}"


class Tokenizer:
    """T5's: text -> token ids, from the official SentencePiece model, or from the tokenizer.json that transformers saves."""

    def __init__(self, folder: Path):
        if (folder / "spiece.model").exists():
            import sentencepiece

            try:
                model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
            except (RuntimeError, OSError) as error:
                raise BadInput(f"{folder / 'spiece.model'} is damaged: it is not a SentencePiece model.") from error
            self.pieces, self.decode = model.encode, model.decode
            self.size = model.vocab_size() + checkpoint.read_json(folder / "tokenizer_config.json").get("extra_ids", 100)
        elif (folder / "tokenizer.json").exists():
            import tokenizers

            try:
                model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more special
                raise BadInput(f"{folder / 'tokenizer.json'} is damaged: {error}.") from error
            model.no_padding()  # transformers writes into the file how it was last called
            model.no_truncation()
            self.pieces = lambda text: model.encode(text, add_special_tokens=False).ids
            self.decode, self.size = model.decode, model.get_vocab_size()
        else:
            raise BadInput(f"{folder} has neither spiece.model nor tokenizer.json.")

    def __call__(self, text: str, cls_id: int | None = None) -> list[int]:
        """Ids without padding, the end of the sequence (1) last; <cls> becomes cls_id where that is given."""
        parts = text.split(CLS) if cls_id is not None else [text]
        ids = self.pieces(parts[0])
        for part in parts[1:]:
            ids = [*ids, cls_id, *self.pieces(part)]
        return [*ids, 1]


def check_text_encoder(model: Path, dim: int, cls: str) -> None:
    """Whether tokenizer and T5 are there, whole, and give features of width `dim`, with a row left for <cls> as a token.
    T5 is the largest network of all, so headers are compared and nothing is read."""
    from transformers import T5Config, T5EncoderModel

    tokenizer, weights = Tokenizer(checkpoint.need(model, "tokenizer")), checkpoint.need(model, "text_encoder")
    raw = checkpoint.read_json(weights / "config.json")
    if raw.get("d_model", 512) != dim:
        raise BadInput(f"The text encoder in {weights} has d_model = {raw.get('d_model')}, but the transformer was made for "
                       f"{dim}.")
    rows = raw.get("vocab_size", 32128)
    if cls == "token" and tokenizer.size >= rows:
        raise BadInput(f"The text encoder in {weights} has {rows} rows of embeddings, all in use: none is left for {CLS}, "
                       f"which this adapter was trained with.")
    try:
        with torch.device("meta"):
            network = T5EncoderModel(T5Config(**raw))
    except Exception as error:
        raise BadInput(f"{weights / 'config.json'} is no config of T5: {' '.join(str(error).split())}") from error
    checkpoint.check(network, weights, stem="model", new=("encoder.embed_tokens.",))  # the same tensor as "shared"


class TextEncoder:
    """T5: prompts -> [B, length, text_embed_dim], padded to `length` tokens without an attention mask, as officially done.

    cls: how <cls> in a prompt is read. "token": as one token, the first unused row of the embedding (32100 of T5's
    32128). "pieces" (or "none"): as ordinary word pieces, which is what the released Switch adapter has seen.
    """

    def __init__(self, model: Path, cls: str = "pieces", length: int = 226, dtype=torch.float32):
        self.length, self.tokenizer = length, Tokenizer(checkpoint.need(model, "tokenizer"))
        weights = checkpoint.need(model, "text_encoder")
        self.cls_id = self.tokenizer.size if cls == "token" else None
        self.t5 = load_network(weights, "T5EncoderModel", dtype)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [B, length], 0 where there is nothing. What does not fit is cut, with a warning that quotes it."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            tokens = self.tokenizer(prompt, self.cls_id)
            if len(tokens) > self.length:
                dropped = self.tokenizer.decode([token for token in tokens[self.length - 1 : -1] if token != self.cls_id])
                print(f"warning: the prompt has {len(tokens)} tokens and {self.length} fit; what was dropped: \"{dropped}\"",
                      file=sys.stderr)
                tokens = tokens[: self.length - 1] + tokens[-1:]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        return self.t5(self.tokenize(prompts).to(self.t5.device))[0]


# --- identity image ---------------------------------------------------------------------------------------------------


KINDS = {"dino": "Dinov2Model", "clip": "CLIPVisionModel"}


def image_settings(folder: Path) -> tuple[int, list[float], list[float]]:
    """Side in pixels, mean and deviation of the images that the encoder in `folder` was made for."""
    settings = checkpoint.read_json(folder / "preprocessor_config.json")
    crop = settings.get("crop_size", 224)
    try:
        return int(crop["height"] if isinstance(crop, dict) else crop), settings["image_mean"], settings["image_std"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'preprocessor_config.json'} lacks crop_size, image_mean or image_std.") from error


def image_tokens(folder: Path) -> tuple[int, int]:
    """How many tokens the encoder in `folder` makes of an image, and how wide they are: by its files, without loading it."""
    config = checkpoint.read_json(folder / "config.json")
    config = config.get("vision_config", config)
    try:
        return (image_settings(folder)[0] // config["patch_size"]) ** 2 + 1, config["hidden_size"]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'config.json'} lacks patch_size or hidden_size.") from error


class ImageEncoder:
    """DINOv2 or CLIP: identity images -> tokens [B, N, D] of the last layer, the class token first (N = 257 at 224
    pixels). The image is padded to a square on white, so nothing of the subject is cut off, then resized."""

    def __init__(self, model: Path, part: str, dtype=torch.float32):
        folder = find(model, part)
        self.side, *statistics = image_settings(folder)
        self.network = load_network(folder, KINDS[part], dtype)
        self.tokens = (self.side // self.network.config.patch_size) ** 2 + 1
        self.mean, self.std = (torch.tensor(x, dtype=dtype).view(3, 1, 1) for x in statistics)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([image_to_tensor(fit(image, self.side, self.side, "pad")) for image in images])
        pixels = ((pixels.to(self.mean) + 1) / 2 - self.mean) / self.std
        return self.network(pixel_values=pixels.to(self.network.device)).last_hidden_state


# --- segmentation -----------------------------------------------------------------------------------------------------


class GroundedSAM:
    """Grounded SAM: the mask of a named subject. GroundingDINO finds the noun's box, SAM the mask in the box."""

    def __init__(self, model: Path, device="cpu", threshold: float = 0.3):
        from transformers import AutoProcessor, SamProcessor

        self.device, self.threshold = device, threshold
        boxes, masks = find(model, "grounding_dino"), find(model, "sam")
        try:
            self.box_processor, self.mask_processor = AutoProcessor.from_pretrained(boxes), SamProcessor.from_pretrained(masks)
        except Exception as error:  # as in load_network()
            raise BadInput(f"{boxes} and {masks} cannot be read as GroundingDINO and SAM: {' '.join(str(error).split())}") from error
        self.box_network = load_network(boxes, "AutoModelForZeroShotObjectDetection", torch.float32).to(device)
        self.mask_network = load_network(masks, "SamModel", torch.float32).to(device)

    @torch.no_grad()
    def __call__(self, image: Image.Image, noun: str) -> Image.Image | None:
        """The mask of the most certain `noun` in the image, 8 bits, 255 inside; None where there is none."""
        image = image.convert("RGB")
        text = noun.lower().strip().rstrip(".") + "."  # GroundingDINO reads lower case and a full stop after each noun
        inputs = self.box_processor(images=image, text=text, truncation=True, max_length=self.box_network.config.max_text_len,
                                    return_tensors="pt").to(self.device)
        found = self.box_processor.post_process_grounded_object_detection(
            self.box_network(**inputs), inputs.input_ids, threshold=self.threshold, text_threshold=self.threshold,
            target_sizes=[image.size[::-1]])[0]
        if not len(found["scores"]):
            return None
        box = found["boxes"][found["scores"].argmax()].tolist()
        inputs = self.mask_processor(images=image, input_boxes=[[box]], return_tensors="pt").to(self.device)
        outputs = self.mask_network(**inputs, multimask_output=True)
        masks = self.mask_processor.image_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu())[0][0]
        mask = masks[outputs.iou_scores[0, 0].argmax().item()]  # [H, W] bool, of three the one SAM is surest of
        return Image.fromarray(mask.numpy().astype("uint8") * 255) if mask.any() else None
