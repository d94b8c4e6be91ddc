"""How a model reads conversations: its chat template, its tokenizer, and the text that stands for its pictures.

Training and generation both take their text from `Chat.segments`, so that a prompt cannot differ between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mixlora_cli.data.images import Picture, size_as_shown
from mixlora_cli.data.problems import BadRecord, Kind
from mixlora_cli.data.template import CHOICES, IMAGE_MARKER, Role, Segment, Template, Turn
from mixlora_cli.errors import UserError, cut

ROLES: Mapping[Role, str] = {"system": "system", "human": "user", "gpt": "assistant"}
SPEAKERS: Mapping[str, Role] = {said: role for role, said in ROLES.items()}
"""What chat templates and servers call whom a `Turn` is from."""
_MARK = "mixlora"
_PROBES = ((32, 32), (640, 200), (200, 640), (1500, 1400))
"""Sizes of pictures that show whether a model gives every picture the same number of tokens."""


@dataclass(frozen=True)
class Chat:
    """All that encoding needs of a model: no weights."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    processor: ProcessorMixin | None = None
    """Prepares pictures; None for a model that reads text alone."""
    picture_options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the processor for pictures in the place of its own, such as `{"do_image_splitting": False}`."""

    @property
    def pad(self) -> int:
        """The token that pads."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)

    @property
    def image_token(self) -> str | None:
        """What the template writes for a picture."""
        return getattr(self.processor, "image_token", None)

    @cached_property
    def image_token_ids(self) -> tuple[int, ...]:
        """The tokens that stand for a picture and no text."""
        found = getattr(self.processor, "image_token_ids", None) or [
            getattr(self.processor, "image_token_id", None)
        ]
        return tuple(int(token) for token in found if token is not None)

    @cached_property
    def end(self) -> str:
        """The token that ends an answer: the first control token that the template writes behind it.

        Raises:
            UserError: there is none.
        """
        behind = self.render([Turn("human", _MARK), Turn("gpt", _MARK)]).rpartition(_MARK)[2]
        found = [token for token in self._control_tokens if token in behind]
        if not found:
            raise UserError(
                f"chat template {self.template.name} ends answers with {behind!r}, which is no control token of this "
                "model's tokenizer, so that no answer would ever end; give the template that the model was trained "
                f"with ({CHOICES})"
            )
        return min(found, key=behind.index)  # of several there the longest

    @cached_property
    def begin(self) -> list[int]:
        """What goes before the text: the begin-of-sequence token or nothing.

        A template that says nothing of it leaves it to the model's processor, which asks its tokenizer for that token
        where the text does not begin with it. A tokenizer alone adds none to a chat.
        """
        bos, token = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        wanted = self.template.bos
        if wanted is None and self.processor is not None and bos is not None:
            written = self.render([Turn("human", _MARK)], prompt=True).startswith(str(token))
            wanted = not written and self.tokenizer("")["input_ids"][:1] == [bos]
        return [int(bos)] if wanted and bos is not None else []

    @cached_property
    def _control_tokens(self) -> list[str]:
        return sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)

    @cached_property
    def ends(self) -> list[int]:
        """Tokens at which generation stops."""
        own = [self.tokenizer.convert_tokens_to_ids(self.end), self.tokenizer.eos_token_id]
        return list(dict.fromkeys(int(token) for token in own if token is not None))

    @cached_property
    def forbidden(self) -> tuple[str, ...]:
        """Texts that no turn may hold, because the model would take them for the end of an answer or for a picture."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.image_token_ids))
        special = getattr(self.processor, "all_special_multimodal_tokens", None) or []
        texts = [self.end, self.image_token, *tokens, *special]
        return tuple(dict.fromkeys(text for text in texts if text))

    def render(self, conversation: Sequence[Turn], prompt: bool = False) -> str:
        """The template's text of a conversation; a `prompt` ends where the next answer would begin.

        Raises:
            UserError: the template refuses the conversation, or has a fault of its own.
        """
        read: Callable[[str], Any] = str.strip if self.processor is None else content_parts
        messages = [{"role": ROLES[turn.role], "content": read(turn.text)} for turn in conversation]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template.source,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **{"image_token": self.image_token, **self.template.options},
                )
            )
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"chat template {self.template.name} cannot write the turns "
                f"{', '.join(ROLES[turn.role] for turn in conversation)}: {cut(' '.join(str(error).split()), 200)}"
            ) from error

    def segments(self, conversation: Sequence[Turn], *, with_answer: bool = True) -> list[Segment]:
        """The conversation's text, cut where loss begins and ends: prompt, answer, prompt, answer, ...

        The text up to an answer is the one that the template writes as a prompt, and behind the answer stands its end
        token. `with_answer=False` leaves out the last answer: what remains ends with the prompt that generation
        continues. What the template writes behind the last end is left out.

        Raises:
            ValueError: the roles do not alternate human, gpt or the conversation does not end with an answer.
            UserError: the template does not write a conversation as the prompt and what follows.
        """
        roles = [turn.role for turn in conversation if turn.role != "system"]
        if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
            raise ValueError(f"a conversation alternates human, gpt and ends with gpt, got {roles}")
        shown = conversation if with_answer else conversation[:-1]
        whole = self.render(shown, prompt=not with_answer)
        segments: list[Segment] = []
        done = 0
        for number, turn in enumerate(shown):
            if turn.role != "gpt":
                continue
            prompt = self.render(conversation[:number], prompt=True)
            behind = whole.find(self.end, len(prompt)) + len(self.end)
            if not whole.startswith(prompt) or behind < len(prompt):
                raise UserError(
                    f"chat template {self.template.name} writes a conversation of {len(roles)} turns otherwise than "
                    f"the prompt and its answer (up to {cut(prompt[-40:])!r}): the labels of training cannot be "
                    f"told; give another template ({CHOICES}), or options of it "
                    "(model.template_options={enable_thinking: false})"
                )
            segments += [
                Segment(whole[done : len(prompt)], False),
                Segment(whole[len(prompt) : behind], True),
            ]
            done = behind
        return segments if with_answer else [*segments, Segment(whole[done:], False)]

    def control_token_at_end(self, text: str) -> str | None:
        """The control token that a text ends with; None where it ends otherwise."""
        return next((token for token in self._control_tokens if text.endswith(token)), None)

    def picture_texts(self, pictures: Sequence[Picture]) -> list[str]:
        """What stands in a text for each picture of a conversation: the image token as often as the model needs it.

        Raises:
            BadRecord: the model's processor refuses a picture.
            UserError: the model reads no pictures.
        """
        if not pictures:
            return []
        if self.processor is None:
            raise UserError(
                "this model reads text alone, but records have pictures; take a vision-language model"
            )
        if (fixed := self._fixed_text) is not None:
            return [fixed] * len(pictures)
        return self._texts_of_sizes(tuple(map(size_as_shown, pictures)))

    @cached_property
    def fixed_size(self) -> bool:
        """Whether every picture, alone or not, stands for the same tokens."""
        return self._fixed_text is not None

    @cached_property
    def probe(self) -> list[str]:
        """What stands in a text for pictures of several sizes; empty for a model that reads text alone."""
        if self.processor is None:
            return []
        alone = [text for size in _PROBES for text in self._texts_of_sizes((size,))]
        try:
            return [*alone, *self._texts_of_sizes(_PROBES[:2])]
        except BadRecord:  # it cannot put pictures of two sizes into one tensor
            return [*alone, ""]

    @cached_property
    def picture_tokens(self) -> list[int]:
        """The tokens that stand for a small picture."""
        tokens: list[int] = self.tokenizer(self.probe[0], add_special_tokens=False)["input_ids"]
        return tokens

    @cached_property
    def _fixed_text(self) -> str | None:
        return self.probe[0] if len(set(self.probe)) == 1 else None

    @cached_property
    def token_types(self) -> str | None:
        """Name of the model's input that tells its tokens' kinds; None for a model that takes none."""
        if self.processor is None:
            return None
        returned = self.processor(images=[[Image.new("RGB", _PROBES[0])]], text=[self.image_token])
        return next((name for name in TOKEN_TYPES if name in returned), None)

    @cached_property
    def _known(self) -> dict[tuple[tuple[int, int], ...], list[str]]:
        return {}

    def _texts_of_sizes(self, sizes: tuple[tuple[int, int], ...]) -> list[str]:
        """They depend on the pictures' sizes (width, height) alone, so blank ones do."""
        if sizes not in self._known:
            blank = [Image.new("RGB", size) for size in sizes]
            self._known[sizes] = self.process([blank])[1][0]
        return self._known[sizes]

    def process(self, rows: Sequence[Sequence[Image.Image]]) -> tuple[dict[str, Any], list[list[str]]]:
        """What the model's processor makes of the pictures of some conversations, each of which has some.

        Returns:
            The tensors that the model takes beside the text, and the texts that stand for the pictures, row by row.

        Raises:
            BadRecord: the processor refuses a picture.
        """
        assert self.processor is not None and self.image_token is not None
        try:
            found: dict[str, Any] = dict(
                self.processor(
                    images=[list(row) for row in rows],
                    text=[self.image_token * len(row) for row in rows],
                    images_kwargs=dict(self.picture_options),
                    padding=True,
                    return_tensors="pt",
                    return_text_replacement_offsets=True,
                )
            )
        except Exception as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for row in rows for image in row)
            raise BadRecord(
                Kind.CORRUPT_IMAGE,
                f"the model's processor refuses pictures of {sizes}: {cut(str(error), 200)}",
            ) from error
        offsets = found.pop("text_replacement_offsets")
        texts = [[str(entry["replacement"]) for entry in row] for row in offsets]
        return {key: value for key, value in found.items() if key not in TEXT_INPUTS}, texts


def content_parts(text: str) -> list[dict[str, str]]:
    """A turn's text and the places of its pictures, as chat templates take them: `text` or `image` in "type".

    White space around a turn, and between its end and a picture there, is no part of it.
    """
    pieces = text.split(IMAGE_MARKER)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        is_first, is_last = not "".join(pieces[:number]).strip(), not "".join(pieces[number + 1 :]).strip()
        piece = piece.lstrip() if is_first else piece
        piece = piece.rstrip() if is_last else piece
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]


TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES)
"""What a processor returns for each token of the text."""
