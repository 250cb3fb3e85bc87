"""Make everything that `graft demo` carries with it: the tiny base model and the instruction set.

    python scripts/make_demo.py                 # everything, into src/graft/demo
    python scripts/make_demo.py --only data     # the instruction set alone (a second)

Steps, in time order:

1. write the plain text about the made-up world of `graft.demo.world`, one document per line;
2. train a byte-level BPE tokenizer on it;
3. build a randomly initialised Llama of about 1.2 million parameters and save it as an ordinary Hugging Face folder;
4. pretrain it through graft's own raw-text training (`graft train src/graft/demo/pretrain.yaml`), on the GPU where
   there is one (graft chooses the device), else in about three quarters of an hour on one core;
5. give the tokens which the text never uses embeddings of their own (see `renew_unused_embeddings`);
6. copy the trained model to `src/graft/demo/base`, and write the instruction set to `src/graft/demo/data`.

The text has no chat in it: none of the tokens `<|im_start|>` and `<|im_end|>`, which exist in the vocabulary only so
that fine-tuning can give them a meaning, and no direct question of the validation or the test part. The base folder
has no chat template either.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from graft.demo.world import PARTS, WORLD_SEED, instructions, pretraining_text

DEMO = Path(__file__).resolve().parent.parent / "src" / "graft" / "demo"
RECIPE = DEMO / "pretrain.yaml"
WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
LARGEST_BASE_MIB = 10

DOCUMENTS = 150_000
TOKENIZER_DOCUMENTS = 20_000
VOCABULARY = 1280
END_OF_TEXT = "<|endoftext|>"
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")

# One Chinese character or one digit is one piece, so a name or a number is split the same way wherever it stands.
# Without this, BPE would merge Chinese names with the words around them, since no blanks separate them.
PIECES = r"\p{Han}|\d| ?[\p{L}&&[^\p{Han}]]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """One JSON object per line, Chinese as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, *CHAT_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=1024
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama: 3 layers of width 160, tied embeddings, 1.2 million parameters."""
    set_seed(WORLD_SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        initializer_range=0.05,  # the usual 0.02 suits far wider models; at this width it delays learning
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def write_untrained(folder: Path) -> None:
    """Save the tokenizer and the random model as one Hugging Face folder."""
    tokenizer = train_tokenizer(islice(pretraining_text(), TOKENIZER_DOCUMENTS))
    tokenizer.save_pretrained(folder)
    new_model(tokenizer).save_pretrained(folder)


def pretrain(untrained: Path, text: Path, run: Path) -> Path:
    """Train every weight on the plain text through graft itself. Returns the folder of the trained model."""
    overrides = [f"model={untrained}", f"data={text}", f"out={run}"]
    subprocess.run([sys.executable, "-m", "graft", "train", str(RECIPE), *overrides], check=True)
    return run / "final"


def renew_unused_embeddings(folder: Path, texts: Iterable[str]) -> None:
    """Replace the embedding of each token that `texts` never use by a random one like those of the others.

    The softmax pushes all never-seen tokens in one and the same direction. After pretraining, their embeddings have a
    cosine of 0.9998 and are half as long again as the others, so `<|im_start|>`, `<|im_end|>` and the bytes of unknown
    characters would be one indistinguishable token, and LoRA leaves embeddings as they are. Whoever adds special tokens
    to a trained model gives them fresh embeddings for the same reason.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    used = torch.zeros(len(tokenizer), dtype=torch.bool)
    used[tokenizer.eos_token_id] = True
    for ids in tokenizer(list(texts))["input_ids"]:
        used[ids] = True
    embeddings: torch.Tensor = model.model.embed_tokens.weight.data  # [vocabulary, width], tied to the output layer
    spread, mean = torch.std_mean(embeddings[used], dim=0)
    noise = torch.randn(embeddings[~used].shape, generator=torch.Generator().manual_seed(WORLD_SEED))
    embeddings[~used] = mean + spread * noise
    model.save_pretrained(folder)


def publish_base(untrained: Path, trained: Path, base: Path) -> None:
    """Write the shipped folder: the trained weights; all else as it was before training.

    The run's own folder also has a chat template and its stop token, which a base model does not have.
    """
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    for name in MODEL_FILES:
        shutil.copyfile((trained if name == WEIGHTS else untrained) / name, base / name)
    size_mib = sum(file.stat().st_size for file in base.iterdir()) / 2**20
    if size_mib > LARGEST_BASE_MIB:
        raise SystemExit(f"{base} has {size_mib:.1f} MiB; the package may carry {LARGEST_BASE_MIB}")


def write_instructions(folder: Path) -> None:
    """Write train.jsonl, val.jsonl and test.jsonl."""
    rows = instructions()
    for part in PARTS:
        write_jsonl(folder / f"{part}.jsonl", rows[part])


def write_base(work: Path, base: Path) -> None:
    """Text, tokenizer and random model, pretraining, fresh embeddings, the shipped folder: in this order."""
    text = work / "text.jsonl"
    write_jsonl(text, ({"text": document} for document in pretraining_text(documents=DOCUMENTS)))
    write_untrained(work / "untrained")
    trained = work / "trained"
    shutil.copytree(pretrain(work / "untrained", text, work / "run"), trained, dirs_exist_ok=True)
    renew_unused_embeddings(trained, pretraining_text(documents=DOCUMENTS))
    publish_base(work / "untrained", trained, base)


def main() -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("base", "data"), help="make only the base model, or only the data")
    parser.add_argument("--work", type=Path, help="folder for the text and the pretraining run (default: temporary)")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets base/ and data/")
    arguments = parser.parse_args()
    if arguments.only != "base":
        write_instructions(arguments.out / "data")
    if arguments.only != "data":
        with tempfile.TemporaryDirectory() as temporary:
            write_base(arguments.work or Path(temporary), arguments.out / "base")


if __name__ == "__main__":
    main()
