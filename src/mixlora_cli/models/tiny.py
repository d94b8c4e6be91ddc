"""`model=tiny`: a randomly initialised LLaVA of some fifty thousand parameters, for unit tests only.

It has every part of the real thing (CLIP tower, two-layer projector, LLaMA, tokenizer with the special tokens of both
templates), is built in a fraction of a second without any download, and is the same bit for bit in every process.
"""

from __future__ import annotations

import hashlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mixlora_cli.data.chat import Chat
from mixlora_cli.data.template import TEMPLATES
from mixlora_cli.models.load import LoadedModel

IMAGE_SIZE = 16
PATCH_SIZE = 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
WEIGHT_SEED = 20240811
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>")

# Only the merges are learnt from this text; every byte is in the vocabulary, so any other text encodes too.
_CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: a red circle, a blue square and the number 7",
    "user\nIs there a dog to the left of the cat? Answer yes or no.\nassistant\nyes, no, none, two",
)


def build_tiny(template: str = "v1", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Build the tiny model; the result depends on nothing but the arguments, and no random state is touched.

    Args:
        template: key of `TEMPLATES`.
        dtype: floating-point type of the weights.
    """
    tokenizer = _tokenizer()
    image_token_id = SPECIAL_TOKENS.index("<image>")
    model = _model(len(tokenizer), image_token_id)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False).train(False)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return LoadedModel(model, Chat(tokenizer, TEMPLATES[template], processor), "tiny", _fingerprint(model))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few learnt merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )


def _model(vocab_size: int, image_token_id: int) -> PreTrainedModel:
    # A wide initial spread: with the usual 0.02 a model this small hardly reacts to its input,
    # and tests of routing and padding would pass whatever the code did.
    spread = 0.2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=spread,
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
            bos_token_id=SPECIAL_TOKENS.index("<s>"),
            eos_token_id=SPECIAL_TOKENS.index("</s>"),
        ),
        image_token_index=image_token_id,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(WEIGHT_SEED)
        return LlavaForConditionalGeneration(config)


def _fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
