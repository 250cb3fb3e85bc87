"""Settings of `graft data synth`: what is asked, of whom, how much of it, and what may pass. Knows no requests."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graft.config.base import Settings


def _as_tuple(value: Any) -> Any:
    """Accept one path or word where a list is meant."""
    return (value,) if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    """YAML reads an unquoted day as a date and `2024` as a number; in a prompt both are text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Text = Annotated[str, BeforeValidator(_as_text)]


class Endpoint(Settings):
    """A server that speaks the OpenAI protocol (chat completions), and how it is treated."""

    base_url: str
    """Its address up to the version, for example http://localhost:8000/v1."""
    model: str
    """The model's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. A local endpoint needs none; a key is never part of a recipe."""
    headers: Mapping[str, str] = {}
    """Further headers of every request, name to the environment variable that holds the value: {api-key: AZURE_KEY}.
    Where there are headers `api_key_env` plays no part: one vendor's key is not for another."""
    query: Mapping[str, str] = {}
    """What stands behind `?` in every request's address, nothing secret: {api-version: 2024-10-21}."""
    concurrency: int = Field(default=8, ge=1, le=1024)
    """Most requests in flight at once."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds that one answer may take."""
    retries: int = Field(default=6, ge=0, le=100)
    """How often a request is sent again after 408, 409, 429, 5xx, a lost connection, a timeout or a broken answer."""
    backoff: float = Field(default=1.0, gt=0)
    """Seconds before the first retry; doubled each time, up to `longest_wait`. A `Retry-After` header wins."""
    longest_wait: float = Field(default=120.0, gt=0)
    """Most seconds to wait before a retry; an endpoint that asks for more is taken as closed for now."""
    failures_in_a_row: int = Field(default=8, ge=1)
    """So many requests without one answer between them stop the run: then it is not they, it is the endpoint."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which the endpoint takes an answer's longest length."""
    extra_body: Mapping[str, Any] = {}
    """Further fields of every request, as the endpoint knows them: {chat_template_kwargs: {enable_thinking: false}}."""

    @field_validator("query", mode="before")
    @classmethod
    def _as_texts(cls, value: Any) -> Any:
        """YAML reads an unquoted version as a date or a number."""
        return {key: _as_text(item) for key, item in value.items()} if isinstance(value, Mapping) else value

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, value: str) -> str:
        """Secrets in it are refused wherever settings are read (`graft.config.base.load`)."""
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address such as http://localhost:8000/v1 is expected")
        if parts.query:
            raise ValueError(f"what stands behind `?` ({parts.query}) goes into `query`")
        return value


class Sampling(Settings):
    """How the model writes in one stage."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """None leaves it to the endpoint."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """None leaves it to the endpoint."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer in tokens; also what is reserved of the budget while a request is in flight."""


class Questions(Sampling):
    """How new questions are asked for."""

    temperature: float | None = Field(default=1.0, ge=0, le=2)
    """High: the questions are to differ."""
    max_tokens: int = Field(default=2048, ge=1)
    """Longest list in tokens."""
    per_request: int = Field(default=10, ge=1, le=100)
    """Questions asked for at once: `{n}` in the prompt."""
    seed_examples: int = Field(default=6, ge=0)
    """Seeds among the examples of each request (self-instruct: 6)."""
    generated_examples: int = Field(default=2, ge=0)
    """Questions generated before among the examples (self-instruct: 2); seeds stand in while there are none."""
    ahead: int = Field(default=8, ge=1)
    """A request may take its examples from all but the last so many requests, which can so be in flight at once.
    Part of the plan: other than `concurrency`, it changes which questions come out."""
    patience: int = Field(default=20, ge=1)
    """So many requests in a row without one question that passes end the generation."""


class Filter(Settings):
    """What a generated question must pass."""

    rouge: float = Field(default=0.7, gt=0, le=1)
    """A question is rejected at this ROUGE-L F-measure with any question of the pool (self-instruct: 0.7); at 1, only
    where it has the same words in the same order."""
    min_words: int = Field(default=3, ge=1)
    """Fewest words; a Chinese, Japanese or Korean character counts as one."""
    max_words: int = Field(default=150, ge=1)
    """Most words."""
    banned: Texts = ()
    """Words that neither questions nor answers may hold, whatever their case: `image` does not ban `imagery`."""
    language: bool = True
    """Reject what is surely not in `language`."""

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        if not all(map(str.strip, self.banned)):
            raise ValueError("banned: an empty word would be found in every text; leave it out")
        return self


class Answers(Sampling):
    """How questions are answered."""

    attempts: int = Field(default=2, ge=1, le=10)
    """How often a question is asked while the answer is cut, refused, empty, too short or otherwise rejected. After a
    cut answer the next attempt may have twice the tokens."""
    min_words: int = Field(default=1, ge=1)
    """Fewest words of an answer; a Chinese, Japanese or Korean character counts as one."""
    max_words: int = Field(default=4000, ge=1)
    """Most words of an answer."""
    keep_refusals: bool = False
    """Keep answers that refuse or speak "as an AI"."""
    keep_reasoning: bool = False
    """Keep what the model thought before its answer as the turn's reasoning; otherwise it is left out."""
    answer_seeds: bool = True
    """Answer the seeds too; those that came with an answer are left as they are and not written."""
    system: str = ""
    """System turn of the rows written (placeholders as in prompts, for example "{persona}"); empty is none. It need
    not be what the model was told: rows without it teach the persona itself."""


class Critique(Sampling):
    """Optional second look: the model criticises each answer and rewrites it where it found faults."""

    rounds: int = Field(default=0, ge=0, le=5)
    """How often an answer is looked at; 0 leaves this stage out. It ends early when no fault is found."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """Low: a judgement."""


class Persona(Settings):
    """Who answers. Fields left empty are not spoken of."""

    name: Text = ""
    """The assistant's name."""
    company: Text = ""
    """Who made it."""
    date: Text = ""
    """Since when it exists, or the day on which it speaks: what your prompts make of it."""
    about: Text = ""
    """What it is for, in a sentence or a phrase."""


class Identity(Settings):
    """Self-cognition rows: questions such as `who are you?`, answered as the persona."""

    count: int = Field(default=0, ge=0)
    """Rows wanted; 0 makes none."""
    by: Literal["template", "model"] = "template"
    """`template` needs no model and costs nothing; `model` has the model answer, and rejects answers that do not
    give the persona's name where it was asked for."""


class Documents(Settings):
    """Document-grounded mode: questions and answers from your own text files."""

    paths: Texts = ()
    """Text files, or folders in which all files with one of `suffixes` are read; where empty, the mode is off."""
    suffixes: Texts = (".txt", ".md", ".markdown")
    """Suffixes looked for in folders."""
    chunk_chars: int = Field(default=2000, ge=100)
    """Longest piece of text in characters; pieces end at paragraphs, else at sentences, where there are any."""
    questions_per_chunk: int = Field(default=3, ge=1, le=100)
    """Questions asked for per piece: `{n}` in the prompt."""
    context: Literal["none", "meta", "prompt"] = "meta"
    """Where rows keep the piece: not at all, as a column `context`, or in the user's turn before the question (to train
    reading rather than knowing). Its file and number are kept always."""


class Prices(Settings):
    """What the endpoint's owner charges."""

    input: float = Field(ge=0)
    """Money per million tokens of prompt."""
    output: float = Field(ge=0)
    """Money per million tokens of answer."""
    currency: str = "USD"
    """Its name in messages."""


class Limits(Settings):
    """What a folder's run may use up over all of its starts; it stops before the request that could exceed it."""

    money: float | None = Field(default=None, gt=0)
    """In the currency of `prices`."""
    tokens: int | None = Field(default=None, gt=0)
    """Prompt and answer together."""


class Synth(Settings):
    """All settings of `graft data synth`."""

    endpoint: Endpoint
    language: str = Field(default="en", pattern="^[a-z]{2,3}$")
    """What questions and answers must be written in, as an ISO 639-1 code. Prompts and templates are shipped for `en`
    and `zh`; for another one write `prompts` of your own."""
    domain: Text = ""
    """What the questions are about: `{domain}`."""
    seeds: Texts = ()
    """Files of seed questions: rows with `id` and `question`, self-instruct's seed tasks, or any instruction file."""
    count: int | None = Field(default=None, ge=1)
    """Questions to generate. None is 100; with documents, whatever they give."""
    seed: int = Field(default=0, ge=0)
    """Which examples are mixed, and which templates are taken."""
    prompts: str | None = None
    """YAML file of your own prompts; those that it does not have are the shipped ones."""
    variables: Mapping[str, Text] = {}
    """Further placeholders of your prompts and their values: {audience: parents}."""
    questions: Questions = Questions()
    filter: Filter = Filter()
    answers: Answers = Answers()
    critique: Critique = Critique()
    persona: Persona = Persona()
    identity: Identity = Identity()
    documents: Documents = Documents()
    prices: Prices | None = None
    budget: Limits = Limits()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.seeds or self.documents.paths or self.identity.count):
            raise ValueError("nothing to start from; give `seeds`, `documents.paths` or `identity.count`")
        if self.budget.money is not None and self.prices is None:
            raise ValueError("budget.money needs `prices` (money per million tokens of input and of output)")
        if self.identity.count and not self.persona.name:
            raise ValueError("identity rows need `persona.name`, the name that they teach")
        return self
