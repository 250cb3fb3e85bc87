"""A real HTTP server on this machine that speaks the OpenAI protocol, with the faults of real ones on request.

It runs in a thread of the test, so that commands in other processes can be killed while it goes on. Answers are a
function of the request alone; their ids number them, so that every answer paid can be followed.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

WORDS = re.findall(
    r"\w+",
    """bread river violin lighthouse glacier bee map clock bridge tide loom kiln orchard
    ferry garden kitchen winter mountain school window blanket lantern saddle pepper harvest compass
    feather anchor basket candle drum engine fountain glove hammer island jacket kettle ladder
    mirror needle oven paddle quilt ribbon sail tent umbrella valley wagon""",
)


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    """None answers as usual, or with an error object where the status is one."""
    cut_at: float = 1.0
    """Share of the body that is sent before the connection ends."""
    reset: bool = False
    """Cut the connection with an RST, where 0 of the body was sent."""
    delay: float = 0.0
    patch: dict[str, Any] = field(default_factory=dict)
    """Fields laid over the answer's first choice (`finish_reason`), its message, or the whole (`usage`, `choices`)."""


@dataclass
class Seen:
    """One request as it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    digest: str
    at: float
    status: int = 0
    """Set when the answer was sent whole."""
    id: str = ""
    query: dict[str, list[str]] = field(default_factory=dict)
    """What stood behind `?` in the address."""


def said(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def digest_of(body: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=8).hexdigest()


def new_questions(digest: str, n: int, chinese: bool) -> list[str]:
    """Different ones for each request, but for one that everybody gives."""
    found = [
        "这是每次都会出现的同一个问题吗？" if chinese else "Is this the question that comes back every single time?"
    ]
    for at in range(n - 1):
        mixed = hashlib.blake2b(f"{digest}:{at}".encode()).digest()
        if chinese:
            pairs = zip(mixed[:24:2], mixed[1:24:2], strict=True)
            found.append("家长怎样看待" + "".join(chr(0x4E00 + (a * 256 + b) % 8000) for a, b in pairs) + "？")
        else:
            things = " and the ".join(WORDS[byte % len(WORDS)] for byte in mixed[:9:2])
            more = " ".join(WORDS[byte % len(WORDS)] for byte in mixed[10:16])
            found.append(f"What have the {things} in common with {more}?")
    return found


def answer_to(body: dict[str, Any], digest: str) -> str:
    """A list of questions where one is asked for, else an answer that names what was asked."""
    text = said(body)
    wanted = re.search(r"(?:Write|再写|写出) ?(\d+) ?(?:new )?(?:个新?问题|questions)", text)
    chinese = bool(re.search("[\u4e00-\u9fff]", text))
    if wanted:
        items = new_questions(digest, int(wanted[1]), chinese)
        return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    if "You review answers" in text or "请在发布之前审阅" in text:
        return "FINE" if int(digest, 16) % 2 else "It leaves out the most useful step."
    if chinese:
        return f"关于这个问题，建议先冷静下来，再一步一步地处理。编号{digest}。"
    return f"Begin with the simplest step and go on from there, one after the other. This is note {digest}."


class OpenAIServer:
    """`with OpenAIServer() as server:`; `fault(seen)` may answer with a Fault for each request."""

    def __init__(
        self,
        fault: Callable[[Seen], Fault | None] = lambda _seen: None,
        answer: Callable[[dict[str, Any], str], str] = answer_to,
    ) -> None:
        self.fault = fault
        self.answer = answer
        self.seen: list[Seen] = []
        self.busy = 0
        self.most_busy = 0
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def answered(self) -> list[Seen]:
        """Requests answered with 200, whole."""
        with self.lock:
            return [seen for seen in self.seen if seen.status == 200]

    def count(self, digest: str) -> int:
        return sum(seen.digest == digest for seen in self.seen)

    def statuses(self) -> Counter[int]:
        return Counter(seen.status for seen in self.seen)

    def wait_for_answers(self, number: int, seconds: float = 30.0) -> bool:
        """Until so many requests are answered."""
        end = time.monotonic() + seconds
        with self.changed:
            while sum(seen.status == 200 for seen in self.seen) < number:
                if not self.changed.wait(max(0.0, end - time.monotonic())):
                    return False
        return True

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(owner: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def do_POST(self) -> None:
            try:
                self._answer()
            except (BrokenPipeError, ConnectionResetError):  # the client was killed
                self.close_connection = True

        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen = Seen(body, {k.lower(): v for k, v in self.headers.items()}, digest_of(body), time.monotonic())
            address = urlsplit(self.path)
            seen.query = parse_qs(address.query)
            with owner.lock:
                owner.seen.append(seen)
                number = len(owner.seen)
                owner.busy += 1
                owner.most_busy = max(owner.most_busy, owner.busy)
            try:
                if not address.path.endswith("/chat/completions"):
                    self._send(seen, Fault(404), b'{"error": {"message": "no such path"}}')
                    return
                fault = owner.fault(seen) or Fault()
                time.sleep(fault.delay)
                self._send(seen, fault, self._body(seen, fault, number))
            finally:
                with owner.lock:
                    owner.busy -= 1

        def _body(self, seen: Seen, fault: Fault, number: int) -> bytes:
            if fault.body is not None:
                return fault.body
            if fault.status != 200:
                return json.dumps({"error": {"message": f"status {fault.status}", "code": None}}).encode()
            text = owner.answer(seen.body, seen.digest)
            seen.id = f"chatcmpl-{number}"
            prompt = sum(len(message["content"].encode()) for message in seen.body["messages"]) // 4
            value: dict[str, Any] = {
                "id": seen.id,
                "object": "chat.completion",
                "created": 0,
                "model": seen.body["model"],
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"},
                ],
                "usage": {"prompt_tokens": prompt, "completion_tokens": 20, "total_tokens": prompt + 20},
            }
            for name, item in fault.patch.items():
                if name in ("usage", "choices"):
                    value[name] = item
                elif name == "finish_reason":
                    value["choices"][0][name] = item
                else:
                    value["choices"][0]["message"][name] = item
            return json.dumps(value, ensure_ascii=False).encode()

        def _send(self, seen: Seen, fault: Fault, data: bytes) -> None:
            if fault.reset:
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            part = data[: int(len(data) * fault.cut_at)]
            self.send_response(fault.status)
            for name, value in fault.headers:
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(part)
            self.wfile.flush()
            if len(part) < len(data):
                self.close_connection = True
                return
            with owner.changed:
                seen.status = fault.status
                owner.changed.notify_all()

    return Handler
