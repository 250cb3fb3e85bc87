"""Made-up English-like and Chinese texts, and what can be done to one so that it still says nearly the same."""

import random
import string
import unicodedata
from dataclasses import dataclass

from graft.types import Conversation, Message, Origin


@dataclass
class Language:
    """Words (or characters) and how they are put together."""

    words: list[str]
    join: str
    marks: str

    def text(self, rng: random.Random, length: int) -> str:
        return self.join.join(rng.choices(self.words, k=length))

    def change(self, rng: random.Random, text: str, count: int) -> str:
        """`count` words at random places are others now."""
        words = text.split(self.join) if self.join else list(text)
        for place in rng.sample(range(len(words)), count):
            words[place] = rng.choice(self.words)
        return self.join.join(words)

    def respell(self, rng: random.Random, text: str) -> str:
        """Other case, width and punctuation; the same words."""
        words = text.split(self.join) if self.join else list(text)
        spelt = []
        for word in words:
            shout = word.upper() if rng.random() < 0.3 else word
            if rng.random() < 0.2:  # full-width forms: NFKC makes them ASCII again
                shout = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in shout)
            spelt.append(shout + (rng.choice(self.marks) if rng.random() < 0.2 else ""))
        return rng.choice(("", " ", "\n")) + self.join.join(spelt) + rng.choice(self.marks)


def english(seed: int = 0) -> Language:
    rng = random.Random(seed)
    words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(3000)}
    return Language(sorted(words), " ", ",.!?;:")


def chinese() -> Language:
    return Language([chr(code) for code in range(0x4E00, 0x4E00 + 3000)], "", "，。！？、：")


LANGUAGES = {"english": english(), "chinese": chinese()}


def talk(prompt: str, answer: str = "", line: int = 1, file: str = "f.jsonl", **meta: object) -> Conversation:
    messages = [Message("user", prompt)] + ([Message("assistant", answer)] if answer else [])
    return Conversation(f"{file}:{line}", Origin(file, line), tuple(messages), meta=meta)


def reference_tokens(text: str) -> list[str]:
    """Words one character after the other, as the docs say it."""
    tokens: list[str] = []
    word = ""
    for char in [*unicodedata.normalize("NFKC", text).casefold(), " "]:
        category = unicodedata.category(char)[0]
        if "\u4e00" <= char <= "\u9fff" or category == "S":
            tokens += [word, char]
            word = ""
        elif category in "LMN":
            word += char
        else:
            tokens.append(word)
            word = ""
    return [token for token in tokens if token]


def reference_shingles(text: str) -> set[tuple[str, ...]]:
    tokens = reference_tokens(text)
    found = set()
    for start, token in enumerate(tokens):
        single = "\u4e00" <= token <= "\u9fff" or unicodedata.category(token[0])[0] == "S"
        size = 3 if single else 2
        if start + size <= len(tokens):
            found.add(tuple(tokens[start : start + size]))
    if found:
        return found
    folded = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {("".join(c for c in folded if not unicodedata.category(c).startswith("P")) or folded,)}


def reference_jaccard(left: str, right: str) -> float:
    a, b = reference_shingles(left), reference_shingles(right)
    return len(a & b) / len(a | b)
