"""Encoding spread over processes: the same chunks, hence the same results, whatever their number.

Speaks chunks of conversations and their results. Knows nothing of how a conversation becomes examples.
"""

from __future__ import annotations

import functools
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from graft.config.train import Encode
from graft.data.parallel import map_batches, usable_workers
from graft.tokens.renderer import Renderer
from graft.types import Conversation, Example, FloatArray, IntArray, Reject

CHUNK = 256
"""Conversations encoded together: enough to keep the tokenizer's threads busy and to share what they share."""

PER_WORKER = 20_000
"""Conversations that make a process worth its start, which takes one to two seconds."""

Result = list[Example] | Reject
EncodeChunk = Callable[[Sequence[Conversation], Renderer, Encode], tuple[list[Result], Counter[str]]]


def default_workers(conversations: int) -> int:
    """Processes that pay for so many conversations on this machine."""
    return max(1, min(usable_workers(), conversations // PER_WORKER))


def map_chunks(
    function: EncodeChunk, conversations: Iterable[Conversation], renderer: Renderer, settings: Encode, workers: int
) -> Iterator[tuple[list[Result], Counter[str]]]:
    """`function` of each chunk of conversations, in order. `function` must be one of a module, so that it has a name.

    With one worker it runs here, and the tokenizer's own threads use the cores.
    """
    if workers <= 1 or not type(renderer.tokenizer).__module__.startswith("transformers."):
        # Code that came with a model is no module that a fresh process could import.
        here = functools.partial(_in_process, function, renderer, settings)
        yield from map_batches(here, conversations, 1, CHUNK)
        return
    with tempfile.TemporaryDirectory(prefix="graft-encode-") as folder:
        # A function travels with every chunk, a tokenizer takes half a second: so its file is named, and read once.
        file = Path(folder) / "renderer"
        file.write_bytes(pickle.dumps(replace(renderer, memory={})))
        there = functools.partial(_in_worker, function, str(file), settings)
        for packed in map_batches(there, conversations, workers, CHUNK):
            yield packed.unpack(), packed.notes


def _in_process(
    function: EncodeChunk, renderer: Renderer, settings: Encode, chunk: list[Conversation]
) -> tuple[list[Result], Counter[str]]:
    return function(chunk, renderer, settings)


def _in_worker(function: EncodeChunk, file: str, settings: Encode, chunk: list[Conversation]) -> _Packed:
    return _Packed.pack(*function(chunk, _renderer_of(file), settings))


@functools.lru_cache(maxsize=1)
def _renderer_of(file: str) -> Renderer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    # The parent process wrote this file, for this one: pickle is how processes speak, and never a format of ours.
    renderer: Renderer = pickle.loads(Path(file).read_bytes())  # noqa: S301
    return renderer


@dataclass(frozen=True, slots=True)
class _Packed:
    """A chunk's results with few and large arrays: two arrays of each example would cost more to send than to make."""

    ids: IntArray
    weights: FloatArray
    heads: list[Reject | list[tuple[str, int, int, int, str]]]
    """Of each conversation: its reject, or conversation, turn, length, prompt_len and way of each example."""
    notes: Counter[str]

    @classmethod
    def pack(cls, results: Sequence[Result], notes: Counter[str]) -> _Packed:
        examples = [example for result in results if not isinstance(result, Reject) for example in result]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(example.ids for example in examples)]),
            np.concatenate([np.empty(0, np.float32), *(example.weights for example in examples)]),
            [
                result
                if isinstance(result, Reject)
                else [(e.conversation, e.turn, len(e.ids), e.prompt_len, e.way) for e in result]
                for result in results
            ],
            notes,
        )

    def unpack(self) -> list[Result]:
        results: list[Result] = []
        start = 0
        for head in self.heads:
            if isinstance(head, Reject):
                results.append(head)
                continue
            examples = []
            for conversation, turn, length, prompt_len, way in head:
                span = slice(start, start + length)
                examples.append(Example(conversation, turn, self.ids[span], self.weights[span], prompt_len, way))
                start += length
            results.append(examples)
        return results
