"""One training step against TRL's SFTTrainer: same model, data, order, schedule and initial weights.

    python bench/train.py                 # LoRA, every case, 30 steps each, about half an hour on two cores
    python bench/train.py --case plain --steps 30 --out bench/results/train.json
    python bench/train.py --case plain --method full --precision bf16
    python bench/train.py --case reasoning8 --steps 12 --out bench/results/train_reasoning8.json

The two trainers alternate step by step inside one process, so that a machine that slows down slows both; the ratio of
their medians is what counts. What is given to the peer:

- its micro-batch size and loss type are the fastest of those tried on this machine, in this run (`calibration`);
- its rows come in the order in which they were drawn, as its own sampler would hand them out; with `--sorted` each
  step's conversations are sorted by length for it instead, so that its micro-batches hold as little padding as any
  order of them can (its `train_sampling_strategy: group_by_length` comes near that);
- gradient checkpointing off, fused AdamW, the same precision, the same LoRA (r 16, all linear layers) or all weights.

tokens/s counts the data's tokens (each example's own length, prompt and answer, no padding, whether shared or not) over
the time of a whole optimizer step, for both alike. An example is a conversation up to one of its answers: where the
template strips the thinking of earlier turns, a sequence shows no more than one answer as the model will give it, so
the peer gets one sample per turn.

`of_product_peak` is the share of the machine's limit that graft's step reaches: floating-point operations of its matrix
products and attention, counted as they are executed (model/memory/count.py; one step is counted, the others by their
nodes), over the step's time, over the best rate of a product of the shapes of the model's layers, by the faster of
torch's two libraries, measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, TrainerCallback
from transformers.models.qwen2 import modeling_qwen2
from trl import SFTConfig, SFTTrainer

from graft.config.train import load_train
from graft.model.device import keep_freed_memory, pick_device, pick_precision
from graft.model.files.load import load_base
from graft.model.fused.product import times
from graft.model.memory.count import Counter
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora, trainable
from graft.runs import RunFolder
from graft.tokens.tree import sharing, total_weight
from graft.train.prepare import Prepared, prepare
from graft.train.step import Stepper
from graft.train.updates.optim import make_optimizer, set_learning_rate
from graft.train.updates.schedule import learning_rate
from graft.train.validate import validate

ROTARY = modeling_qwen2.apply_rotary_pos_emb
"""transformers' own, before graft replaces it."""
ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared" / "material"
CASES = {
    "plain": "the 1,666 rows of domain-bloom as they are (about 225 tokens each)",
    "system400": "the same rows, one 400-token system prompt before each",
    "labels-system400": "2,000 queries of banking77, short answers; a 400-token system prompt names the 77 intents",
    "reasoning8": "1,600 problems of gsm8k, 8 turns to a conversation, with thinking that Qwen3's template strips",
}
TURNS = 8
"""Turns of a conversation of `reasoning8`."""
PEAK_ROWS = 2048
"""Rows of the products that the peak is measured with."""
PEER_WAYS = ((16, "nll"), (4, "nll"), (4, "chunked_nll"))
"""Sequences of a micro-batch and loss types that are tried for the peer."""
RULES = (
    "你是一位耐心的家庭教育顾问。回答之前先想一想孩子的年龄、家庭的情况和父母真正担心的事情。"
    "先用一句话说出父母的感受,再给出两到三个今天就能做的办法,每个办法都要说清楚怎么做、为什么这样做。"
    "不要责备父母,也不要给孩子贴标签;遇到可能伤害孩子身心健康的情况,要建议父母寻求专业帮助。"
    "用平实的语言,不用术语;答案不超过三百字。"
)


@dataclass
class Timed:
    """Steps of one trainer."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def tokens_per_s(self, skip: int) -> dict[str, float]:
        rates = [n / s for n, s in zip(self.tokens[skip:], self.seconds[skip:], strict=True)]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "steps": len(rates)}


def make_model_folder(folder: Path, template: str | None = None) -> None:
    """About 41 M parameters, Qwen2-shaped, random, with a real bilingual tokenizer and its or another's template."""
    tokenizer = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / "minimind-v3")
    if template is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / template).chat_template
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def make_data(case: str, folder: Path, tokenizer: Any) -> Path:
    """Real rows as chat messages; see CASES."""
    data = MATERIAL / "data"
    path = folder / f"{case}.jsonl"
    if case == "reasoning8":
        problems = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        turns = [_thought_through(json.loads(line)) for line in random.Random(0).sample(problems, 1600)]
        talks = [list(itertools.chain(*turns[start : start + TURNS])) for start in range(0, len(turns), TURNS)]
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks), encoding="utf-8")
        return path
    if case == "labels-system400":
        with (data / "banking77" / "train.csv").open(encoding="utf-8") as file:
            labelled = list(csv.DictReader(file))
        pairs = [(row["text"], row["category"]) for row in random.Random(0).sample(labelled, 2000)]
        rules = "Name the intent of the customer's message. The intents are: "
        rules += ", ".join(sorted({row["category"] for row in labelled}))
    else:
        lines = (data / "domain-bloom" / "domain.train.json").read_text(encoding="utf-8").splitlines()
        pairs = [(row["instruction"], row["output"]) for row in map(json.loads, lines)]
        rules = RULES * 9
    system = tokenizer.decode(tokenizer(rules)["input_ids"][:400])
    with path.open("w", encoding="utf-8") as out:
        for question, answer in pairs:
            first = [{"role": "system", "content": system}] if "system400" in case else []
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": first + turns}, ensure_ascii=False) + "\n")
    return path


def _thought_through(row: dict[str, str]) -> list[dict[str, str]]:
    """A problem, and its solution as thinking before the answer."""
    thinking, answer = row["answer"].split("####")
    content = f"<think>\n{thinking.strip()}\n</think>\n\nThe answer is {answer.strip()}."
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": content}]


def trained_model(settings: Any, frozen: torch.dtype) -> PreTrainedModel | PeftModel:
    """The model that both sides begin with: a fresh adapter on it, or all of it trainable in fp32."""
    if settings.method == "lora":
        return add_lora(load_base(settings.model, frozen), settings.lora, settings.seed)
    return load_base(settings.model, torch.float32)


class GraftSide:
    """Graft's own step, taken apart only so far that it can be timed alone."""

    def __init__(self, settings: Any, prepared: Prepared) -> None:
        self.settings, self.prepared = settings, prepared
        precision = pick_precision(settings.precision, pick_device("cpu"))
        model = trained_model(settings, precision.frozen)
        self.start = (
            {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
            if isinstance(model, PeftModel)
            else None
        )
        self.lm, self.precision = TreeLM(model), precision
        self.rotary, modeling_qwen2.apply_rotary_pos_emb = modeling_qwen2.apply_rotary_pos_emb, ROTARY
        self.parameters = trainable(model)
        self.optimizer = make_optimizer(self.parameters, set(), settings)
        self.stepper = Stepper(self.lm, self.parameters, self.optimizer, precision, settings.clip, settings.seed)
        self.timed, self.sharing, self.losses = Timed(), [], []
        self.nodes: list[int] = []
        model.train()

    def step(self, number: int, total: int) -> None:
        # As `graft train` does; the peer's steps run with glibc's own settings and transformers' own functions.
        keep_freed_memory()
        modeling_qwen2.apply_rotary_pos_emb = self.rotary
        self._step(number, total)
        modeling_qwen2.apply_rotary_pos_emb = ROTARY
        library = ctypes.CDLL(None)
        for parameter, default in ((-4, 65536), (-1, 128 * 1024), (-2, 128 * 1024), (-3, 128 * 1024)):
            library.mallopt(parameter, default)

    def _step(self, number: int, total: int) -> None:
        started = time.perf_counter()
        examples = self.prepared.train.examples(self.prepared.plan.step(number))
        rows = self.lm.rows(examples, self.settings.row_budget)
        weight = total_weight(examples)
        set_learning_rate(self.optimizer, learning_rate(number, total, self.settings))
        of_rows = [self.stepper.accumulate(row, (number, index), weight) for index, row in enumerate(rows)]
        nll = self.stepper.update(of_rows, weight, number + 1).nll
        self.timed.seconds.append(time.perf_counter() - started)
        self.timed.tokens.append(sum(len(example.ids) for example in examples))
        self.losses.append(nll / weight)
        self.sharing.append(sharing(examples, rows).ratio)
        self.nodes.append(sum(map(len, rows)))

    def work_per_node(self) -> float:
        """Floating-point operations of products and attention for each node of the first step, which is not taken."""
        rows = self.lm.rows(self.prepared.train.examples(self.prepared.plan.step(0)), self.settings.row_budget)
        with Counter() as counter:
            for index, row in enumerate(rows):
                self.stepper.accumulate(row, (0, index), 1.0)
        self.stepper.discard()
        return sum(work.products for work in counter.counted.work.values()) / sum(map(len, rows))

    def share_of_peak(self, per_node: float, peak: float, skip: int) -> float:
        """Median over the steps of their operations per second over the peak."""
        steps = zip(self.nodes[skip:], self.timed.seconds[skip:], strict=True)
        return statistics.median(per_node * nodes / seconds for nodes, seconds in steps) / peak

    def validation_loss(self) -> float:
        examples = self.prepared.val.examples(range(len(self.prepared.val)))
        return validate(self.lm, examples, self.settings.row_budget, self.precision).loss


def product_peak(model: torch.nn.Module, rows: int, tries: int = 5) -> float:
    """Floating-point operations per second at best, over the shapes of the model's layers and torch's libraries."""
    shapes = {tuple(layer.weight.shape) for layer in model.modules() if type(layer) is torch.nn.Linear}
    best = 0.0
    for out, features in shapes:
        x, weight = torch.randn(rows, features), torch.randn(out, features)
        for product in (torch.nn.functional.linear, times) * tries:
            started = time.perf_counter()
            product(x, weight)
            best = max(best, 2.0 * rows * features * out / (time.perf_counter() - started))
    return best


class Alternate(TrainerCallback):
    """Times the peer's steps and runs the other side between them."""

    def __init__(self, tokens_of_step: list[int], between: Any) -> None:
        self.timed, self.tokens_of_step, self.between, self.started = Timed(), tokens_of_step, between, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.timed.seconds.append(time.perf_counter() - self.started)
        self.timed.tokens.append(self.tokens_of_step[state.global_step - 1])
        self.between(state.global_step - 1)


def peer_rows(
    conversations: dict[str, Any], prepared: Prepared, steps: int, by_length: bool
) -> tuple[list[dict[str, Any]], list[int]]:
    """The plan's examples step by step, one for each answer, in order or by length; and each step's tokens."""
    rows, tokens = [], []
    for number in range(steps):
        chosen = []
        for c in map(int, prepared.plan.step(number)):
            messages = conversations[prepared.train.conversations[c]]["messages"]
            answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            chosen += [
                (len(example.ids), messages[:place], messages[place : place + 1])
                for example, place in zip(prepared.train.examples_of(c), answers, strict=True)
            ]
        if by_length:
            chosen.sort(key=lambda sample: sample[0])
        tokens.append(sum(length for length, _, _ in chosen))
        rows += [{"prompt": prompt, "completion": completion} for _, prompt, completion in chosen]
    return rows, tokens


def run_peer(
    start: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    tokens: list[int],
    settings: Any,
    micro: int,
    loss_type: str,
    between: Any,
    out: str,
    checkpointing: bool = False,
) -> tuple[Any, Timed]:
    """TRL's own trainer over the rows in their order."""
    model = trained_model(settings, pick_precision(settings.precision, torch.device("cpu")).frozen)
    if start is not None:
        set_peft_model_state_dict(model, start)
    per_step = len(rows) // len(tokens)
    config = SFTConfig(
        output_dir=out, use_cpu=True, bf16=settings.precision == "bf16", fp16=False,
        gradient_checkpointing=checkpointing,
        report_to="none",
        per_device_train_batch_size=micro, gradient_accumulation_steps=per_step // micro, max_steps=len(tokens),
        learning_rate=settings.peak_lr, lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * len(tokens)),
        max_grad_norm=settings.clip, weight_decay=0.0, max_length=settings.encode.max_length, packing=False,
        completion_only_loss=True, loss_type=loss_type, train_sampling_strategy="sequential", save_strategy="no",
        logging_steps=1, disable_tqdm=True, dataset_num_proc=None, optim="adamw_torch_fused", seed=0,
    )  # fmt: skip
    callback = Alternate(tokens, between)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings.model), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer.model, callback.timed


def calibrate(rows: Any, tokens: Any, settings: Any) -> dict[str, float]:
    """Median seconds of the peer's step for each way it can be run, over a few steps each."""
    found = {}
    few, per_step = 3, len(rows) // len(tokens)
    # Samples of one conversation differ in length by its turns: fewer of them side by side hold less padding.
    ways = PEER_WAYS if per_step == settings.batch_size else (*PEER_WAYS, (2, "chunked_nll"))
    for micro, loss_type in ways:
        with tempfile.TemporaryDirectory() as out:
            _, timed = run_peer(
                None, rows[: few * per_step], tokens[:few], settings, micro, loss_type,
                lambda _step: None, out,
            )  # fmt: skip
        found[f"{micro} x {per_step // micro}, {loss_type}"] = statistics.median(timed.seconds[1:])
    return found


def compare(
    case: str, steps: int, threads: int, peer: str | None, by_length: bool, method: str, precision: str, batch: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        turns = TURNS if case == "reasoning8" else 1
        make_model_folder(folder, "qwen3" if turns > 1 else None)
        data = make_data(case, Path(scratch), AutoTokenizer.from_pretrained(folder))
        settings = load_train(
            None,
            [
                f"model={folder}",
                f"data={data}",
                f"encode.max_length={1024 if turns == 1 else 4096}",
                "row_tokens=8192",
                f"batch_size={batch // turns}",
                f"max_steps={steps}",
                "warmup=0",
                f"method={method}",
                f"precision={precision}",
            ],
        )
        prepared = prepare(settings, RunFolder(Path(scratch)))
        conversations = {f"{case}:{n}": json.loads(line) for n, line in enumerate(data.read_text().splitlines(), 1)}
        # Steps of exactly batch_size, so that the peer's accumulation divides them.
        prepared = fixed_steps(prepared, settings.batch_size, steps)
        rows, tokens = peer_rows(conversations, prepared, steps, by_length)
        calibration = {} if peer else calibrate(rows, tokens, settings)
        best = peer or min(calibration, key=lambda name: calibration[name])
        micro, loss_type = int(best.split(" ")[0]), best.rsplit(" ", 1)[1]
        graft = GraftSide(settings, prepared)
        work = graft.work_per_node()
        peak = product_peak(graft.lm.base, PEAK_ROWS)
        before = graft.validation_loss()
        peer_model, timed = run_peer(
            graft.start, rows, tokens, settings, micro, loss_type,
            lambda step: graft.step(step, steps), str(Path(scratch) / "peer"),
        )  # fmt: skip
        peak = max(peak, product_peak(graft.lm.base, PEAK_ROWS))
        after = graft.validation_loss()
        peer_lm = TreeLM(peer_model)
        val = prepared.val.examples(range(len(prepared.val)))
        peer_after = validate(peer_lm, val, settings.row_budget, graft.precision).loss
        ours, theirs = graft.timed.tokens_per_s(2), timed.tokens_per_s(2)
        return {
            "case": case, "data": CASES[case], "method": method, "precision": precision, "steps": steps,
            "batch_size": settings.batch_size,
            "trl_rows": "sorted by length within each step" if by_length else "as drawn",
            "parameters": sum(p.numel() for p in graft.lm.base.parameters()),
            "graft_tokens_per_s": ours, "trl_tokens_per_s": theirs, "ratio": ours["median"] / theirs["median"],
            "of_product_peak": graft.share_of_peak(work, peak, 2), "product_peak_gflop_per_s": peak / 1e9,
            "gflop_per_node": work / 1e9, "sharing": statistics.mean(graft.sharing),
            "trl_setting": best, "calibration_s_per_step": calibration,
            "validation_loss_before": before, "graft_validation_loss": after, "trl_validation_loss": peer_after,
            "validation_difference": abs(after - peer_after) / peer_after,
        }  # fmt: skip


def fixed_steps(prepared: Prepared, size: int, steps: int) -> Prepared:
    """The same plan with every step of exactly `size` conversations."""
    import dataclasses

    whole = len(prepared.train) // size * size
    plan = dataclasses.replace(prepared.plan, repeats=(1.0,) * whole, max_steps=steps)
    return dataclasses.replace(prepared, plan=plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peer", help="skip the calibration: the peer's setting as it names it, '4 x 4, chunked_nll'")
    parser.add_argument("--sorted", action="store_true", help="give the peer each step's rows sorted by length")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=16, help="answers of an optimizer step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "train.json")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    result = {
        "what": f"one optimizer step ({args.method}, {args.precision}), graft against TRL's SFTTrainer, interleaved",
        "device": f"CPU, {args.threads} threads, {platform.processor() or platform.machine()}",
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "cases": [
            compare(case, args.steps, args.threads, args.peer, args.sorted, args.method, args.precision, args.batch)
            for case in args.case or list(CASES)
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["cases"]:
        print(
            f"{case['case']}: graft {case['graft_tokens_per_s']['median']:.0f} tokens/s, TRL "
            f"{case['trl_tokens_per_s']['median']:.0f} ({case['trl_setting']}): {case['ratio']:.2f}x; validation loss "
            f"{case['graft_validation_loss']:.4f} against {case['trl_validation_loss']:.4f} "
            f"({case['validation_difference']:.2%} apart); {case['of_product_peak']:.0%} of the peak of "
            f"{case['product_peak_gflop_per_s']:.0f} GF/s"
        )


if __name__ == "__main__":
    main()
