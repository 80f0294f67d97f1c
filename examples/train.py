"""Train the bundled checkpoint: a 4-layer LLaDA over characters that solves 4x4 Sudoku.

    python examples/tiny-llada/train.py            # under an hour on one core; continues where it stopped

As LLaDA is fine-tuned: the prompt stays, a uniformly drawn share of the completion is masked, and the loss
is the cross entropy of the masked tokens. Completions are padded with the end token to several lengths.
Batches are a function of (seed, step), so a restarted run is the same run.
"""

import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sudoku import GRIDS, is_solved, prompt_of, puzzles, text_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dllmc.models.llada import LLaDAConfig, LLaDAModel

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|unknown|>"]
END, MASK = 0, 1
VOCABULARY = SPECIAL + ["\n"] + [chr(c) for c in range(32, 127)]
ID_OF = {token: i for i, token in enumerate(VOCABULARY)}
CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 192,
    "n_heads": 6,
    "n_kv_heads": 6,
    "n_layers": 4,
    "mlp_hidden_size": 512,
    "activation_type": "silu",
    "block_type": "llama",
    "rope": True,
    "rope_theta": 10000.0,
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "include_bias": False,
    "max_sequence_length": 512,
    "vocab_size": len(VOCABULARY),
    "embedding_size": len(VOCABULARY),
    "mask_token_id": MASK,
    "eos_token_id": END,
    "pad_token_id": END,
    "torch_dtype": "float32",
}
LENGTHS, LENGTH_SHARES = (20, 32, 64, 128), (0.6, 0.3, 0.07, 0.03)


def encode(text: str) -> list[int]:
    """Token ids of a text, one a character."""
    return [ID_OF[c] for c in text]


def batch_at(seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked inputs and targets [size, T] int64; targets are -100 where nothing is to be predicted."""
    rng = np.random.default_rng((seed, step))
    length = rng.choice(LENGTHS, p=LENGTH_SHARES)
    pairs = puzzles(rng, held_out=False)
    prompts, completions = [], []
    for puzzle, grid in (next(pairs) for _ in range(size)):
        completion = encode(text_of(grid))
        prompts.append(encode(prompt_of(puzzle)))
        completions.append(completion + [END] * (length - len(completion)))
    clean = np.asarray(completions)
    masked = rng.random(clean.shape) < rng.random((size, 1))
    masked[np.arange(size), rng.integers(length, size=size)] = True
    prompt = np.asarray(prompts)
    inputs = np.concatenate((prompt, np.where(masked, MASK, clean)), axis=1)
    targets = np.concatenate((np.full_like(prompt, -100), np.where(masked, clean, -100)), axis=1)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@torch.inference_mode()
def solved_share(model: LLaDAModel, count: int, seed: int) -> float:
    """Share of held-out puzzles solved by dense greedy decoding, one token a step, in one batch."""
    pairs = puzzles(np.random.default_rng(seed), held_out=True)
    prompts = [prompt_of(next(pairs)[0]) for _ in range(count)]
    start, length = len(encode(prompts[0])), LENGTHS[0]
    x = torch.tensor([encode(p) + [MASK] * length for p in prompts])
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[:, start:] = True
    for _ in range(length):
        confidence, token = torch.softmax(model(x), dim=-1).max(dim=-1)
        best = torch.where(masked, confidence, -1.0).argmax(dim=1, keepdim=True)
        x.scatter_(1, best, token.gather(1, best))
        masked.scatter_(1, best, False)
    texts = ["".join(VOCABULARY[i] for i in row if i != END) for row in x[:, start:].tolist()]
    return sum(map(is_solved, prompts, texts)) / count


def write_checkpoint(model: LLaDAModel, figures: dict[str, object]) -> None:
    """Write config, weights, tokenizer and the training figures beside this script."""
    tokenizer = Tokenizer(models.WordLevel(ID_OF, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(HERE / "tokenizer.json"))
    tokens = {"eos_token": SPECIAL[END], "mask_token": SPECIAL[MASK], "unk_token": SPECIAL[2]}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens, "clean_up_tokenization_spaces": False}
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", tokenizer_config),
        ("training.json", figures),
    ):
        (HERE / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = HERE / "model.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights, {"format": "pt"})
    weights.chmod(0o644)


@click.command(help=__doc__)
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--rate", default=1.5e-3, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--state", type=Path, default=Path("build/tiny-llada.pt"), show_default=True, help="To continue from.")
def main(steps: int, batch: int, rate: float, seed: int, state: Path) -> None:
    torch.manual_seed(seed)
    model = LLaDAModel(LLaDAConfig.from_dict(CONFIG))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 / (math.sqrt(2 * CONFIG["n_layers"]) if "_out" in name else 1))
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    first, seconds = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
        click.echo(f"continuing at step {first}")

    for step in range(first, steps):
        began = time.perf_counter()
        warm, done = min(1.0, (step + 1) / 200), step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        inputs, targets = batch_at(seed, step, batch)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - began
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state.parent.mkdir(parents=True, exist_ok=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "step": step + 1, "seconds": seconds}, state)
            share = solved_share(model, 200, 1)
            click.echo(f"step {step + 1}  loss {loss.item():.4f}  solved {share:.3f}  {seconds:.0f} s")

    share = solved_share(model, 2000, 2)
    figures = {"steps": steps, "batch": batch, "seed": seed, "seconds": round(seconds)}
    figures |= {"parameters": sum(p.numel() for p in model.parameters()), "solved_held_out": share, "puzzles": 2000}
    write_checkpoint(model, figures)
    click.echo(f"solved {share:.4f} of 2000 held-out puzzles; {len(GRIDS)} grids; checkpoint in {HERE}")


if __name__ == "__main__":
    main()
