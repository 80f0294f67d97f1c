"""Train a bundled checkpoint: a small LLaDA, as LLaDA is trained (arXiv 2502.09992), on the CPU.

    python examples/train.py tiny-llada         # continues where it stopped
    python examples/train.py tiny-llada-code

A share of the tokens, drawn uniformly, is masked, and the loss is the cross entropy of the masked ones. Batches are
a function of (seed, step), so a restarted run is the same run. Weights, config, tokenizer and the figures on held-out
data (training.json) go into the checkpoint's folder.
"""

import importlib
import json
import math
import sys
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from recipes.base import Recipe
from recipes.muon import Muon
from safetensors.torch import save_file
from torch import nn

from dllmc.models.llada import LLaDAConfig, LLaDAModel

HERE = Path(__file__).parent
RECIPES = {"tiny-llada": "recipes.characters", "tiny-llada-code": "recipes.code"}
WARM_UP, LAST_RATE = 100, 0.02


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: a linear warm-up, then a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


def new_model(config: dict[str, object]) -> LLaDAModel:
    """Normal weights of deviation 0.02, smaller where attention adds to the residual stream."""
    model = LLaDAModel(LLaDAConfig.from_dict(config))
    adding = 0.02 / math.sqrt(2 * model.config.n_layers)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=adding if name.endswith("attn_out.weight") else 0.02)
    return model


def optimizers_of(model: LLaDAModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and ".blocks." in name]
    others = [p for name, p in named if p.dim() != 2 or ".blocks." not in name]
    return [Muon(matrices, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0)]


def write_checkpoint(folder: Path, model: LLaDAModel, recipe: Recipe, figures: dict[str, object]) -> None:
    """Write config, tokenizer, weights in the config's dtype, and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe.tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", recipe.config),
        ("tokenizer_config.json", recipe.tokenizer_config),
        ("training.json", figures),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    dtype = getattr(torch, str(recipe.config["torch_dtype"]))
    weights = folder / "model.safetensors"
    save_file({k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}, weights, {"format": "pt"})
    weights.chmod(0o644)


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.option("--steps", type=int, help="Default: the recipe's.")
@click.option("--rate", default=4e-3, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--state", type=Path, help="What to continue from.  [default: build/NAME.pt]")
@click.option("--compile/--eager", "compiled", default=True, help="Compile the step; needs a C++ compiler.")
def main(name: str, steps: int | None, rate: float, seed: int, state: Path | None, compiled: bool) -> None:
    torch.manual_seed(seed)
    recipe: Recipe = importlib.import_module(RECIPES[name]).recipe()
    steps, state = steps or recipe.steps, state or Path("build") / f"{name}.pt"
    model = new_model(recipe.config)
    optimizers = optimizers_of(model, rate)
    first, seconds = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        first, seconds = saved["step"], saved["seconds"]
        click.echo(f"continuing at step {first}")

    logits_of = torch.compile(model, dynamic=True) if compiled else model
    for step in range(first, steps):
        began = time.perf_counter()
        losses = []
        for batch in recipe.batches_at(seed, step, steps):
            logits = logits_of(batch.inputs)[batch.masked]
            losses.append((F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum())
            losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        if (step + 1) % recipe.report_every == 0 or step + 1 == steps:
            state.parent.mkdir(parents=True, exist_ok=True)
            content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save({**content, "step": step + 1, "seconds": seconds}, state)
            shown = {"step": step + 1, "loss": [round(x.item(), 4) for x in losses], **recipe.figures(model, False)}
            click.echo(json.dumps({**shown, "seconds": round(seconds)}))
            sys.stdout.flush()

    run = {"steps": steps, "seed": seed, "rate": rate, "seconds": round(seconds), "threads": torch.get_num_threads()}
    figures = {**run, "parameters": sum(p.numel() for p in model.parameters()), **recipe.figures(model, True)}
    write_checkpoint(HERE / name, model, recipe, figures)
    click.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
