"""One request to an OpenAI-compatible endpoint, tried once: an answer, or a failure that says what can be done.

Speaks of chat completions. Knows no journal, no budget and no retries: who asks decides about those.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from graft.config.synth import Endpoint, Sampling
from graft.data.synth.budget import PER_MESSAGE, Usage, estimate_tokens, most_tokens
from graft.data.synth.wording import Chat
from graft.errors import ConfigError, InputError

if TYPE_CHECKING:
    import openai

Stage = Literal["questions", "answers", "critique", "rewrite"]
_TRY_AGAIN = (408, 409, 425, 429)
_CLOSED = (401, 402, 403, 404)
_SECRET = 16
"""Shorter keys are dummies (`EMPTY`), and might well be words of an answer."""
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. Two requests of equal content are told apart by `index`."""

    stage: Stage
    chat: Chat
    sampling: Sampling
    max_tokens: int
    index: int = 0

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The fields of the protocol."""
        fields: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": role, "content": content} for role, content in self.chat],
            endpoint.limit_field: self.max_tokens,
        }
        for name in ("temperature", "top_p"):
            if (value := getattr(self.sampling, name)) is not None:
                fields[name] = value
        return fields

    def key(self, endpoint: Endpoint) -> str:
        """Depends on all that shapes the answer, and not on where the endpoint is."""
        said = [self.stage, self.index, self.body(endpoint), dict(endpoint.extra_body)]
        text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def most(self) -> Usage:
        """Tokens that it can use at most."""
        return Usage(most_tokens([content for _, content in self.chat]), self.max_tokens)

    def likely(self, completion: int) -> Usage:
        """Tokens that it used, as far as can be guessed from its texts."""
        prompt = sum(estimate_tokens(content) + PER_MESSAGE for _, content in self.chat)
        return Usage(prompt, completion, estimated=True)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered."""

    text: str
    finish: str
    """The protocol's `finish_reason`: `stop`, `length`, `content_filter` ..."""
    usage: Usage
    reasoning: str = ""
    refusal: str = ""
    """Set where the endpoint itself marks the answer as a refusal."""
    id: str = ""
    """The endpoint's name for the answer."""


class TryAgain(Exception):
    """A failure that may pass."""

    def __init__(self, why: str, wait: float | None = None, lost: Usage | None = None, busy: bool = False) -> None:
        super().__init__(why)
        self.wait = wait
        """Seconds that the endpoint asks to wait."""
        self.lost = lost
        """Tokens that were paid, or may have been, for nothing."""
        self.busy = busy
        """It is the endpoint, not this request: the others had better wait too."""


class Unanswerable(Exception):
    """The endpoint will not answer this request, however often it is sent."""


class EndpointClosed(InputError):
    """The endpoint will not answer any request: a wrong key, an unknown model, no money left."""


class Client:
    """The connection. Opens no socket before the first `attempt`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._key = read_key(endpoint)
        self._headers = read_headers(endpoint)
        self._secrets = [secret for secret in (self._key, *self._headers.values()) if secret]
        self._api: openai.AsyncOpenAI | None = None

    async def attempt(self, request: Request) -> Reply:
        """Send a request once.

        Raises:
            TryAgain: the endpoint is busy or broken for the moment, or its answer was.
            Unanswerable: it refuses this request.
            EndpointClosed: it refuses all.
        """
        import openai

        everything = request.likely(request.max_tokens)  # a lost answer may have been written to its end, and paid
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                raw = await self._connect().chat.completions.with_raw_response.create(
                    **request.body(self._endpoint),
                    extra_headers=self._all_headers(),
                    extra_query=dict(self._endpoint.query) or None,
                    extra_body=dict(self._endpoint.extra_body) or None,
                )
                text = raw.text
        except (TimeoutError, openai.APITimeoutError):
            raise TryAgain(f"no answer within {self._endpoint.timeout:g} s", lost=everything) from None
        except openai.APIStatusError as error:
            raise self._judge(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            name = type(cause).__name__ if cause else type(error).__name__
            never_sent = name in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
            said = self.clean(str(cause or error))
            raise TryAgain(f"connection lost ({name}: {said})", lost=None if never_sent else everything) from None
        except (openai.OpenAIError, UnicodeError) as error:
            raise TryAgain(f"unreadable answer ({self.clean(str(error))})", lost=everything) from None
        return _read(self.scrub(text), request, self.clean)

    async def close(self) -> None:
        """Close the connections."""
        if self._api is not None:
            await self._api.close()

    @property
    def in_the_open(self) -> bool:
        """Whether a key is sent over a network of others without encryption."""
        url = self._endpoint.base_url
        return bool(self._secrets) and not is_local(url) and urlsplit(url).scheme == "http"

    def scrub(self, text: str) -> str:
        """The text without key and headers, should they be quoted."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if len(secret) >= _SECRET else text
        return text

    def clean(self, text: str, most: int = 200) -> str:
        """A text of the endpoint for messages and files: one line, short, without the secrets should it quote them."""
        line = " ".join(text.split())
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line if len(line) <= most else f"{line[:most]}…"

    def _all_headers(self) -> dict[str, str | openai.Omit] | None:
        """The recipe's headers, without the library's own key: it might be looked at before the one that counts."""
        import openai

        if not self._headers:
            return None
        given = any(name.lower() == "authorization" for name in self._headers)
        return dict(self._headers) if given else {**self._headers, "Authorization": openai.Omit()}

    def _connect(self) -> openai.AsyncOpenAI:
        import openai

        if self._api is None:
            local = is_local(self._endpoint.base_url)
            self._api = openai.AsyncOpenAI(
                base_url=self._endpoint.base_url,
                api_key=self._key or "none",  # the library wants one; a local endpoint does not look at it
                max_retries=0,
                timeout=self._endpoint.timeout,
                # A proxy of the environment is for the world outside, and would not find an endpoint of this machine.
                http_client=openai.DefaultAsyncHttpxClient(trust_env=not local, timeout=self._endpoint.timeout),
            )
        return self._api

    def _judge(self, error: openai.APIStatusError) -> Exception:
        """What a status other than 200 means."""
        # The library puts the status before every message.
        status, said = (
            error.status_code,
            self.clean(re.sub(r"^Error code: \d+( - )?", "", error.message) or "no message"),
        )
        where = f"{self._endpoint.base_url} (model {self._endpoint.model})"
        if status in _CLOSED or error.code in _NO_MONEY:
            remedy = {
                401: f"check {self._where_the_key_is()}",
                403: f"check what the key may use: {self._where_the_key_is()}",
                404: "check endpoint.base_url and endpoint.model",
            }.get(status, "check the account")
            return EndpointClosed(f"{where}: {status}: {said}; {remedy}, then start again: what was answered is kept")
        if status in _TRY_AGAIN or status >= 500:
            wait = _wanted_wait(error.response.headers)
            return TryAgain(f"{status}: {said}", wait, busy=status in (429, 503) or wait is not None)
        return Unanswerable(f"{status}: {said}")

    def _where_the_key_is(self) -> str:
        if self._endpoint.headers:
            return f"endpoint.headers ({', '.join(self._endpoint.headers)})"
        return f"the key in ${self._endpoint.api_key_env}"


def read_key(endpoint: Endpoint) -> str:
    """The key of the environment; empty where a local endpoint has none, or headers stand in its place.

    Raises:
        ConfigError: there is none and the endpoint is not local.
    """
    if endpoint.headers:
        return ""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key and not is_local(endpoint.base_url):
        raise ConfigError(
            f"endpoint {endpoint.base_url}: needs a key, and the environment variable {endpoint.api_key_env} is not "
            f"set; export {endpoint.api_key_env}=..., or name another variable with endpoint.api_key_env"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"${endpoint.api_key_env}: holds characters that no key has; set it again")
    return key


_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")


def read_headers(endpoint: Endpoint) -> dict[str, str]:
    """The headers with their values from the environment.

    Raises:
        ConfigError: a name is none, or its variable is not set. What may be a secret itself is not shown.
    """
    headers: dict[str, str] = {}
    for name, variable in endpoint.headers.items():
        if not _HEADER.fullmatch(name):
            raise ConfigError("endpoint.headers: one of the names is no name of a header; write {api-key: MY_VARIABLE}")
        shown = f"the environment variable {variable}" if _VARIABLE.fullmatch(variable) else "an environment variable"
        if variable not in os.environ:
            raise ConfigError(
                f"endpoint.headers: {name} takes its value from {shown}, which is not set; a recipe names the "
                "variable, never the value: {api-key: MY_VARIABLE}"
            )
        value = os.environ[variable].strip()
        if not value or not (value.isascii() and value.isprintable()):
            raise ConfigError(f"endpoint.headers: {name} takes its value from {shown}, which holds nothing to send")
        headers[name] = value
    return headers


def is_local(base_url: str) -> bool:
    """Whether an address is of this machine or of a private network."""
    host = urlsplit(base_url).hostname or ""
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host  # a bare name: a container or a machine of the own network
    return address.is_loopback or address.is_private or address.is_link_local


def _wanted_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds by `Retry-After-Ms`, or by `Retry-After` as seconds or as a date; None where nothing usable is said."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    return None


def _read(text: str, request: Request, clean: Callable[[str], str]) -> Reply:
    """The answer in a body that came with status 200; `clean` makes the endpoint's words fit for messages.

    Raises:
        TryAgain: it is not what the protocol says: truncated JSON, an error object, no choices.
    """
    paid = request.likely(estimate_tokens(text))
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        what = "broken JSON" if text.lstrip().startswith("{") else "no JSON"
        raise TryAgain(f"{what} in an answer of {len(text)} characters: {clean(text[:100])}", lost=paid) from None
    if not isinstance(body, dict):
        raise TryAgain("an answer that is no JSON object", lost=paid)
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(message, dict):
        error = body.get("error")
        said = f"an error object: {clean(_error_text(error))}" if error else "no choices"
        raise TryAgain(f"an answer with {said}", lost=_usage(body, paid))
    content, reasoning = _text(message, "content"), _text(message, "reasoning_content", "reasoning")
    return Reply(
        text=content,
        finish=_text(first, "finish_reason") or "stop",
        usage=_usage(body, request.likely(estimate_tokens(content) + estimate_tokens(reasoning))),
        reasoning=reasoning,
        refusal=_text(message, "refusal"),
        id=_text(body, "id"),
    )


def _error_text(error: Any) -> str:
    """What an error object says: OpenAI's form, or whatever stands in its place."""
    if isinstance(error, dict) and (message := _text(error, "message")):
        return message
    return json.dumps(error, ensure_ascii=False)


def _text(values: Any, *names: str) -> str:
    """The first text under one of the names, fit for UTF-8."""
    found = next((values[name] for name in names if isinstance(values.get(name), str)), "")
    return found.encode(errors="replace").decode()


def _usage(body: Mapping[str, Any], otherwise: Usage) -> Usage:
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return otherwise
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (isinstance(prompt, int) and isinstance(completion, int)) or prompt < 0 or completion < 0:
        return otherwise
    return Usage(int(prompt), int(completion))
