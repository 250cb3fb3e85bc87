"""The names of what can compute answers. Imports nothing heavy: the command line offers them."""

from __future__ import annotations

from typing import Literal

EngineName = Literal["auto", "transformers", "vllm"]
"""`auto` is `transformers`: graft's own generation with the model as transformers loads it."""
