"""Data against its peers: tokenising with masks against TRL, importing and cleaning against `datasets.map`.

    python bench/data.py tokens                        # 50,000 rows of each case, three rounds
    python bench/data.py tokens --case chat --rows 5000 --rounds 3
    python bench/data.py tokens --once --workers 1     # each real row once and as it is: nothing is known before
    python bench/data.py pipeline                      # import and clean, 50,000 rows
    python bench/data.py pipeline --rows 1000000 --rounds 1 --no-peer [--near]     # about 1 GB: peak memory
    python bench/data.py split --rows 1000000          # `graft data split --check`, near-duplicates kept together

`tokens`: the same rows, the same tokenizer with its own chat template, the same number of processes. Theirs is what
`SFTTrainer` does to a data set before it trains (chat template, ids, mask, labels, truncation), ours is `encode_stored`
(its key, ids, weights, every check, the memory-mapped files). Both begin with the rows in memory as each likes them,
and end with ids and masks on disk; what it takes to build a trainer around them is not counted. The sides alternate,
and the medians' ratio is what counts. Rows are real ones over and over with words changed, so that most words are
known: `--once` gives the other end, each row once and no word known. Seconds of processor time stand beside those of
the clock, so that a machine with other things to do can be told from a slow program.

`pipeline`: `graft data import` and `graft data clean` as commands, with one process and with several, against one
process of `datasets.map` with the same cleaning functions (batches of 256 rows, an Arrow file as result). Peak memory
is that of all processes of a command together, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pipeline
from rows import MATERIAL, ROOT, mutated, real_conversations

TOKENIZER = "qwen2.5"
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Case:
    """Real rows, and how the peer's users would train on them."""

    said: str
    files: tuple[str, ...]
    peer: str
    """`completion`: prompt and completion columns, completion_only_loss; `assistant`: assistant_only_loss."""


CASES = {
    "completion": Case(
        "single turns, English: alpaca; peer: prompt and completion",
        ("stanford_alpaca/alpaca_5000.json",),
        "completion",
    ),
    "chat": Case(
        "single turns, English: alpaca; peer: assistant_only_loss", ("stanford_alpaca/alpaca_5000.json",), "assistant"
    ),
    "chinese": Case(
        "single turns, Chinese: domain-bloom; peer: assistant_only_loss",
        ("domain-bloom/domain.train.json",),
        "assistant",
    ),
    "multi-turn": Case(
        "two to five turns: FastChat's and picked conversations, tool calls' talk; peer: assistant_only_loss",
        ("fastchat/dummy_conversation.json", "conversations60/conversations.jsonl"),
        "assistant",
    ),
    "tools": Case(
        "tool schemas, calls and answers, about six messages each: glaive; peer: assistant_only_loss",
        ("llamafactory_demos/glaive_toolcall_en_demo.json",),
        "assistant",
    ),
}


@dataclass
class Timed:
    """What one side took, round by round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), processor_seconds()
        found = work()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(processor_seconds() - cpu)
        return found

    def summary(self, rows: int) -> dict[str, float]:
        return {
            "rows_per_s": rows / statistics.median(self.seconds),
            "rows_per_cpu_s": rows / statistics.median(self.cpu_seconds),
            "seconds_median": statistics.median(self.seconds),
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "cpu_seconds_median": statistics.median(self.cpu_seconds),
        }


def processor_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


# Tokens


class Peer:
    """TRL's own preparation of a data set, taken from a trainer of a model that is hardly there."""

    def __init__(self, kind: str, workers: int, work: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
        from trl import SFTConfig, SFTTrainer

        self.kind = kind
        self.tokenizer = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / TOKENIZER)
        tiny = Qwen2Config(
            vocab_size=len(self.tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )  # fmt: skip
        self.config = SFTConfig(
            output_dir=str(work / "peer"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, packing=False,
            max_length=MAX_LENGTH, dataset_num_proc=workers if workers > 1 else None,
            assistant_only_loss=kind == "assistant", completion_only_loss=True if kind == "completion" else None,
        )  # fmt: skip
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
        few = Dataset.from_list([self.row(turns, ())] * 2)
        self.trainer = SFTTrainer(
            AutoModelForCausalLM.from_config(tiny), self.config, train_dataset=few, processing_class=self.tokenizer
        )

    def row(self, messages: list[dict[str, Any]], tools: tuple[Any, ...]) -> dict[str, Any]:
        extra = {"tools": json.dumps(list(tools))} if tools else {}
        if self.kind == "completion":
            return {"prompt": messages[:-1], "completion": messages[-1:], **extra}
        return {"messages": messages, **extra}

    def dataset(self, conversations: list[Any], work: Path) -> Any:
        """The rows as an Arrow file that is mapped, as `load_dataset` leaves them."""
        from datasets import Dataset, load_from_disk

        from graft.tokens.renderer import message_dict

        rows = [self.row([message_dict(m) for m in c.messages], c.tools) for c in conversations]
        Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(work / "rows"))
        return load_from_disk(str(work / "rows"))

    def prepare(self, dataset: Any) -> Any:
        return self.trainer._prepare_dataset(dataset, self.tokenizer, self.config, False, None, "train")


def tokens_case(name: str, rows: int, rounds: int, workers: int, once: bool) -> dict[str, Any]:
    import datasets

    from graft.config.train import Encode
    from graft.tokens.encode import encode_all
    from graft.tokens.load import load_renderer
    from graft.tokens.store import encode_stored

    datasets.disable_progress_bars()
    case = CASES[name]
    real = real_conversations(case.files)
    conversations = real[:rows] if once else list(mutated(real, rows))
    rows = len(conversations)
    settings = Encode(max_length=MAX_LENGTH)
    ours, theirs = Timed(), Timed()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        peer = Peer(case.peer, workers, work)
        dataset = peer.dataset(conversations, work)
        for number in range(rounds):
            # A fresh one each time: it remembers words, and must not know this round's from the last.
            renderer = load_renderer(str(MATERIAL / "tokenizers" / TOKENIZER))
            encode_all(conversations[:300], renderer, settings)
            if once:
                renderer = load_renderer(str(MATERIAL / "tokenizers" / TOKENIZER))
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                if side == "ours":
                    os.environ["GRAFT_CACHE"] = str(work / "cache" / str(number))
                    # In one process ours would use the tokenizer's threads; theirs cannot.
                    os.environ["TOKENIZERS_PARALLELISM"] = "false"
                    store = ours.measure(partial(encode_stored, conversations, renderer, settings, workers))
                    shutil.rmtree(work / "cache")
                else:
                    datasets.disable_caching()  # a cached result would cost nothing
                    prepared = theirs.measure(lambda: peer.prepare(dataset))
                print(
                    f"{name} round {number} {side}: {(ours if side == 'ours' else theirs).seconds[-1]:.1f} s",
                    flush=True,
                )
        same = compared(store, prepared, [c.id for c in conversations])
        mine, peers = ours.summary(rows), theirs.summary(rows)
        return {
            "case": name, "data": case.said, "rows": rows, "rows_repeat": not once, "workers": workers,
            "rounds": rounds, "graft": mine, "trl": peers, "ratio": mine["rows_per_s"] / peers["rows_per_s"],
            "ratio_cpu": mine["rows_per_cpu_s"] / peers["rows_per_cpu_s"], **same,
            "graft_tokens": len(store.ids), "graft_targets": int((store.weights > 0).sum()),
            "graft_rejects": len(store.rejects),
        }  # fmt: skip


def compared(store: Any, prepared: Any, names: list[str]) -> dict[str, Any]:
    """How many of some rows have the same ids on both sides, but for what the template writes after the stop."""
    index = {name: number for number, name in enumerate(store.conversations)}
    equal = looked = 0
    for number in range(0, min(len(prepared), len(names)), max(1, len(names) // 500)):
        if len(prepared) != len(names) or names[number] not in index:
            continue
        theirs = prepared[number]["input_ids"]
        mine = store.examples_of(index[names[number]])[-1].ids.tolist()
        looked += 1
        equal += theirs[: len(mine)] == mine and len(theirs) - len(mine) <= 2
    return {"rows_compared": looked, "rows_with_the_same_ids": equal}


# Everything


def environment(workers: int) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    names = ("transformers", "tokenizers", "datasets", "trl")
    return {
        "device": f"CPU, {os.cpu_count()} cores, {workers} workers, {platform.processor() or platform.machine()}",
        "load_average": os.getloadavg()[0],
        "commit": commit.strip(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    tokens = kinds.add_parser("tokens", help="tokenising with masks, against TRL")
    tokens.add_argument("--case", choices=list(CASES), action="append")
    tokens.add_argument("--rows", type=int, default=50_000)
    tokens.add_argument("--rounds", type=int, default=3)
    tokens.add_argument(
        "--once", action="store_true", help="each real row once, unchanged, to a renderer that knows none"
    )
    tokens.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    tokens.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "data_tokens.json")
    steps = kinds.add_parser("pipeline", help="import and clean, against datasets.map")
    steps.add_argument("--rows", type=int, default=50_000)
    steps.add_argument("--rounds", type=int, default=3)
    steps.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    steps.add_argument("--near", action="store_true", help="also drop near duplicates")
    steps.add_argument("--no-peer", action="store_true", help="graft alone: its speed and memory on very many rows")
    steps.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "data_pipeline.json")
    halves = kinds.add_parser("split", help="`graft data split --check`: time and peak memory")
    halves.add_argument("--rows", type=int, default=1_000_000)
    halves.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "data_split_million.json")
    args = parser.parse_args()
    if args.kind == "split":
        write(args.out, {"what": "graft data split --check, one worker", **environment(1), **pipeline.split(args.rows)})
        return
    if args.kind == "pipeline":
        found = pipeline.compare(args.rows, args.rounds, args.workers, args.near, not args.no_peer)
        result = {
            "what": "import and clean, graft's commands against datasets.map",
            **environment(args.workers),
            **found,
        }
        write(args.out, result)
        return
    result = {
        "what": "ids and masks of the same rows on disk: graft's encode_stored against TRL's preparation, interleaved",
        **environment(args.workers),
        "cases": [
            tokens_case(name, args.rows, args.rounds, args.workers, args.once) for name in args.case or list(CASES)
        ],
    }
    write(args.out, result)
    for case in result["cases"]:
        print(
            f"{case['case']}: graft {case['graft']['rows_per_s']:.0f} rows/s, TRL {case['trl']['rows_per_s']:.0f}: "
            f"{case['ratio']:.2f}x ({case['ratio_cpu']:.2f}x by processor time)"
        )


if __name__ == "__main__":
    sys.exit(main())
