"""What a captured model must do: give the eager module's logits at lengths never traced, and decode as it does."""

from pathlib import Path

import torch
from torch import Tensor, nn

import dllmc
from dllmc.capture import capture
from dllmc.ir.step_graph import HINTS, StepGraph
from dllmc.passes.pipeline import REGISTRY
from tests.brute_force import decode
from tests.graphs import execute, run, step_inputs

OPTIONS = dllmc.CompileOptions(max_tokens_per_step=128, max_requests=4, max_logit_rows=64)
# Passes that leave logits to compare.
WITHOUT = ("select-logit-rows", "cache-kv", "fuse-head", "chunk-activations")
LOGITS = ",".join(name for name in REGISTRY if name not in WITHOUT).partition(",lower")[0]
LENGTHS = (9, 17, 41)
GEN_LENGTH = 6
SPECIAL = 6  # tokens below, the mask's among them, stand for no text


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V], eager."""
    output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def random_sequences(spec: dllmc.ModelSpec) -> list[Tensor]:
    """Token ids of `LENGTHS`, none of them special: a model may treat padding in its own way."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SPECIAL, spec.vocab_size, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def check_logits(model: nn.Module, spec: dllmc.ModelSpec) -> StepGraph:
    """Every pass but those of the head: a packed step gives each sequence the eager module's logits within 1e-4."""
    assert HINTS["tokens"] not in LENGTHS
    step = capture(model, spec, OPTIONS.maxima)
    run(step, LOGITS)
    inputs = step_inputs(*LENGTHS)
    inputs["token_ids"] = torch.cat(sequences := random_sequences(spec))
    expected = torch.cat([logits_of(model, ids[None])[0] for ids in sequences])
    assert expected.std() > 0.5, "choose other weights: these logits are nearly equal"
    torch.testing.assert_close(execute(step, inputs)["logits"], expected, rtol=0, atol=1e-4)
    return step


def check_decoding(model: nn.Module, spec: dllmc.ModelSpec, out: Path) -> None:
    """The artifact, prompts of all lengths in shared steps: greedy tokens, and log-probabilities of given ones."""
    engine = dllmc.load(dllmc.compile(model, out / "artifact", OPTIONS, spec).path)
    drawn = [ids.tolist() for ids in random_sequences(spec)]
    prompts = [ids[:-GEN_LENGTH] for ids in drawn]
    options = {"gen_length": GEN_LENGTH, "block_length": GEN_LENGTH // 2, "suppress_tokens": tuple(range(SPECIAL))}
    params = dllmc.SamplingParams(**options, logprobs=True)
    for references in ([None] * len(prompts), [ids[-GEN_LENGTH:] for ids in drawn]):
        requests = [dllmc.Prompt(ids, reference=ref) for ids, ref in zip(prompts, references, strict=True)]
        for prompt, reference, result in zip(prompts, references, engine.generate(requests, params), strict=True):
            expected = decode(lambda ids, _: logits_of(model, ids), spec, prompt, reference=reference, **options)
            assert expected.decisive, "choose other weights: rounding may decide here"
            assert result.token_ids == expected.token_ids
            assert result.logprobs is not None
            torch.testing.assert_close(
                torch.tensor(result.logprobs), torch.tensor(expected.logprobs), rtol=0, atol=1e-4
            )
