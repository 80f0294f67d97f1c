"""Capture: bare modules in published styles become artifacts that decode as the modules do, or are refused by line."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dllmc
from dllmc.capture import capture
from dllmc.compiler import rewrite
from dllmc.errors import ArtifactError, CaptureError, ConfigError, DllmcError
from tests.brute_force import decode
from tests.graphs import MAXIMA
from tests.published import (
    HEAD_DIM,
    MAX_POSITIONS,
    VOCAB,
    WIDTH,
    LearnedPositions,
    LearnedPositionsAndNorms,
    LikeDream,
    LikeLLaDA,
    Model,
    Output,
    SelectedTokens,
    drawn,
)

# Torch's own, from where it makes a graph functional.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

SPEC = dllmc.ModelSpec(VOCAB, 0, (), max_positions=MAX_POSITIONS)
OPTIONS = dllmc.CompileOptions(max_tokens_per_step=96, max_requests=4, max_logit_rows=32)
PROMPTS = [[3, 4, 5], [7], [9, 9, 2, 11, 12, 5, 6]]
PARAMS = {"gen_length": 8, "block_length": 4}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def compiled(model: nn.Module, out: Path, spec: dllmc.ModelSpec = SPEC) -> dllmc.Engine:
    return dllmc.load(dllmc.compile(model, out / "artifact", OPTIONS, spec).path)


def check_decoding(model: nn.Module, out: Path, spec: dllmc.ModelSpec = SPEC) -> None:
    """Compiled, prompts of different lengths in shared steps, against one forward pass a step and prompt, eager."""
    results = compiled(model, out, spec).generate(PROMPTS, dllmc.SamplingParams(**PARAMS))
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = decode(lambda ids, _: logits_of(model, ids), spec, prompt, **PARAMS)
        assert expected.decisive, "choose other weights: rounding may decide here"
        assert result.token_ids == expected.token_ids
        assert len(set(result.token_ids)) > 2


@pytest.mark.parametrize(
    ("build", "shifted"),
    [
        (LikeLLaDA, False),
        (lambda: LikeLLaDA(scale_logits=True), False),
        (LikeDream, True),
        (lambda: LikeDream(enable_gqa=True), False),
        (lambda: LearnedPositions(sliced=True), False),
        (lambda: LearnedPositions(sliced=False), False),
        (lambda: SelectedTokens(sliced=False), False),
    ],
    ids=(
        "LLaDA",
        "LLaDA, scaled",
        "Dream",
        "enable_gqa",
        "learned table, sliced",
        "learned table, looked up",
        "tokens told apart",
    ),
)
def test_published_styles_decode_as_the_module_does(
    build: Callable[[], nn.Module], shifted: bool, tmp_path: Path
) -> None:
    """Token for token, whatever the spelling of positions, norms, repeated heads, outputs and residuals."""
    spec = dllmc.ModelSpec(VOCAB, 0, (), shifted, MAX_POSITIONS)
    check_decoding(drawn(build()), tmp_path, spec)


def test_norms_of_torch_decode_as_the_module_does(tmp_path: Path) -> None:
    """nn.LayerNorm and nn.RMSNorm are operators of a program, the one before the head on its rows alone."""
    check_decoding(drawn(LearnedPositionsAndNorms(), seed=2), tmp_path)


class OddTensors(Model):
    """Tensors that lie in memory, or are named, as few models have them."""

    def __init__(self) -> None:
        super().__init__()
        tables = torch.randn(2, MAX_POSITIONS, WIDTH, generator=torch.Generator().manual_seed(7))
        self.register_buffer("positions", tables[0], persistent=False)  # a view, named as an input of every step
        self.register_buffer("rows", tables[1], persistent=True)
        self.register_buffer("both", tables, persistent=False)
        self.square = nn.Parameter(torch.empty(WIDTH, WIDTH).t())  # columns first
        fused = torch.empty(2 * WIDTH, WIDTH)
        self.k_proj.weight, self.v_proj.weight = nn.Parameter(fused[:WIDTH]), nn.Parameter(fused[WIDTH:])

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        x = self.embed_tokens(input_ids) + self.positions[:t] * self.rows[:t] + self.both[1][:t]
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.lm_head(x + F.linear(y.transpose(1, 2).flatten(2), self.square))


def test_weights_may_lie_in_memory_as_they_like(tmp_path: Path) -> None:
    """Views of one tensor, transposed parameters, and names that a step's inputs have too."""
    model = drawn(OddTensors(), seed=1)
    assert not model.get_parameter("square").is_contiguous()
    check_decoding(model, tmp_path)
    step = capture(model, SPEC, MAXIMA)
    assert {"self.positions", "self.rows", "self.both", "self.square"} < set(step.tensors)
    storages = [tensor.untyped_storage() for tensor in step.tensors.values()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in step.tensors.values())


def test_odd_weights_beside_wrapped_regions() -> None:
    """A weight that has to be copied is propagated anew, through regions that are still wrapped."""
    model = drawn(LikeLLaDA())
    with torch.no_grad():
        model.get_submodule("q_proj").weight = nn.Parameter(model.get_parameter("q_proj.weight").t().contiguous().t())
    step = capture(model, SPEC, MAXIMA)
    assert torch.equal(step.tensors["q_proj.weight"], model.get_parameter("q_proj.weight"))
    assert step.tensors["q_proj.weight"].is_contiguous()


def test_a_tied_weight_is_one_tensor() -> None:
    """Whether two names hold one parameter, or two parameters one memory."""
    step = capture(drawn(LearnedPositions(sliced=True)), SPEC, MAXIMA)
    assert [name for name in step.tensors if tuple(step.tensors[name].shape) == (VOCAB, WIDTH)] == [
        "embed_tokens.weight"
    ]
    model = LikeDream()
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    step = capture(drawn(model), SPEC, MAXIMA)
    assert [name for name in step.tensors if tuple(step.tensors[name].shape) == (VOCAB, WIDTH)] == [
        "embed_tokens.weight"
    ]


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    """Norms and rotary embeddings convert to float32 and back; a confident model chooses the same tokens."""
    model = drawn(LikeDream())
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model = model.to(torch.bfloat16)
    results = compiled(model, tmp_path).generate(PROMPTS, dllmc.SamplingParams(gen_length=1, block_length=1))
    for prompt, result in zip(PROMPTS, results, strict=True):
        logits = logits_of(model, torch.tensor([[*prompt, SPEC.mask_id]]))[0, -1]
        first, second = logits.topk(2)[0].tolist()
        assert first - second > 0.3, "choose other weights: rounding may decide here"
        assert result.token_ids == [int(logits.argmax())]


def test_capture_puts_the_module_in_evaluation_mode() -> None:
    """Dropout does nothing in a captured step, and the module is left so."""
    model = drawn(LikeLLaDA()).train()
    step = capture(model, SPEC, MAXIMA)
    assert not model.training
    assert all(node.args[2] is False for node in step.calls(torch.ops.aten.dropout.default))


class Causal(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.lm_head(y.transpose(1, 2).flatten(2))


class Masked(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=(input_ids != 1)[:, None, None])
        return self.lm_head(y.transpose(1, 2).flatten(2))


class CrossAttention(Model):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, 4, 5, HEAD_DIM))

    def forward(self, input_ids: Tensor) -> Tensor:
        q, _, _ = self.heads(self.embed_tokens(input_ids))
        y = F.scaled_dot_product_attention(q, self.memory, self.memory)
        return self.lm_head(y.transpose(1, 2).flatten(2))


class Mean(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        y = x - x.mean(1, keepdim=True)
        return self.lm_head(y)


class CumulativeSum(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        y = x.cumsum(1)
        return self.lm_head(y)


class AttentionByHand(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        q, k, v = self.heads(self.embed_tokens(input_ids))
        y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return self.lm_head(y.transpose(1, 2).flatten(2))


class SoftCap(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        z = self.lm_head(self.embed_tokens(input_ids))
        return 30 * torch.tanh(z / 30)


class Branch(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        if x.sum() > 0:
            x = -x
        return self.lm_head(x)


class WrongShape(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        x = x + torch.ones(WIDTH + 1)
        return self.lm_head(x)


class WriteToPart(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        x[:, 0] = 0
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("model", "message", "line"),
    [
        (Causal, "attention with a causal mask", "y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)"),
        (
            Masked,
            "the mask of this attention depends on the values of token_ids, through ne (aten.ne.Scalar)",
            "y = F.scaled_dot_product_attention(*self.heads(x), attn_mask=",
        ),
        (CrossAttention, "expected self-attention", "y = F.scaled_dot_product_attention(q, self.memory, self.memory)"),
        (Mean, "may mix the tokens of a sequence", "y = x - x.mean(1, keepdim=True)"),
        (CumulativeSum, "may mix the tokens of a sequence", "y = x.cumsum(1)"),
        (AttentionByHand, "requests cannot be packed", "y = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v"),
        (SoftCap, "expected logits that are a linear of the hidden state", "return 30 * torch.tanh(z / 30)"),
        (Branch, "branches on no data", "if x.sum() > 0:"),
        (WrongShape, "must match the size of tensor b (17)", "x = x + torch.ones(WIDTH + 1)"),
        (WriteToPart, "requests cannot be packed", "x[:, 0] = 0"),
    ],
)
def test_what_cannot_be_a_packed_step_is_refused(
    model: Callable[[], nn.Module], message: str, line: str, tmp_path: Path
) -> None:
    """The error says what was found and quotes the line of the model; nothing is written."""
    with pytest.raises(DllmcError) as error:
        compiled(drawn(model()), tmp_path)
    assert message in str(error.value)
    assert "test_capture.py:" in str(error.value)
    assert f"in forward: {line}" in str(error.value)
    assert not list(tmp_path.iterdir())


class Counting(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.lm_head(self.embed_tokens(input_ids)) + self.calls


class Tupled(Model):
    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.lm_head(self.embed_tokens(input_ids)),)


class Short(Model):
    """Its table ends before the spec's `max_positions`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(MAX_POSITIONS // 2, WIDTH))

    def forward(self, input_ids: Tensor) -> Output:
        return Output(self.lm_head(self.embed_tokens(input_ids) + self.table[: input_ids.shape[1]]))


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (Counting, SPEC, "Counting writes to its own tensor 'calls' in forward"),
        (Tupled, SPEC, "'tuple' object has no attribute 'logits'"),
        (Short, SPEC, "satisfy the generated guard 2 <= L['token_ids'].size()[0] and L['token_ids'].size()[0] <= 24"),
        (Mean, dllmc.ModelSpec(VOCAB + 1, 0, ()), f"expected logits [tokens, {VOCAB + 1}] of the spec's vocab_size"),
        (Mean, dllmc.ModelSpec(VOCAB, 0, (), max_positions=2), "any T up to 2 (the spec's max_positions)"),
    ],
    ids=("state", "an output without logits", "a table that is too short", "another vocabulary", "no length to vary"),
)
def test_modules_that_do_not_fit_their_spec(
    model: Callable[[], nn.Module], spec: dllmc.ModelSpec, message: str
) -> None:
    """What has no line in the model is told by name and number."""
    with pytest.raises(CaptureError) as error:
        capture(drawn(model()), spec, MAXIMA)
    assert message in str(error.value)


class Counted(Model):
    """Learned positions from a list that skips those of padding tokens, unless it is told the positions."""

    def __init__(self, first: int, padding: int) -> None:
        super().__init__()
        self.first, self.padding = first, padding
        self.config = SimpleNamespace(pad_token_id=padding)
        self.embed_positions = nn.Embedding(MAX_POSITIONS + 8, WIDTH)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = (input_ids != self.padding).long().cumsum(1) - 1 + self.first
        x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.lm_head(x + y.transpose(1, 2).flatten(2))


class Required(Counted):
    """Has no positions of its own."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, position_ids)


@pytest.mark.parametrize(("model", "first"), [(Counted, 0), (Counted, 5), (Required, 0)])
def test_positions_are_given_where_the_model_takes_them(model: type[Counted], first: int, tmp_path: Path) -> None:
    """Counted from 0, or from behind the padding token as RoBERTa does, whichever ordinary tokens have by themselves.

    So a padding token that is generated changes no position.
    """
    module = drawn(model(first, padding=4))
    results = compiled(module, tmp_path).generate(PROMPTS, dllmc.SamplingParams(**PARAMS))
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = decode(
            lambda ids, _: module(ids, torch.arange(first, first + ids.shape[1])[None]), SPEC, prompt, **PARAMS
        )
        assert expected.decisive, "choose other weights: rounding may decide here"
        assert result.token_ids == expected.token_ids


def test_positions_of_another_kind_are_left_to_the_model(tmp_path: Path) -> None:
    """Counting from 3 with padding token 4 is none of the ways that are known; here it mixes tokens."""
    with pytest.raises(CaptureError, match="it may mix the tokens of a sequence") as error:
        compiled(drawn(Counted(3, padding=4)), tmp_path)
    assert "in forward: position_ids = (input_ids != self.padding).long().cumsum(1)" in str(error.value)


@pytest.mark.parametrize("build", [LikeLLaDA, LikeDream, lambda: LearnedPositions(sliced=True)])
def test_a_model_without_weights(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """On the meta device: all passes run and give the program that they give with weights; nothing is written."""
    programs = []
    for device in ("cpu", "meta"):
        model = build()
        if device == "meta":
            made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
            for part in model.modules():
                for name, weight in part.named_parameters(recurse=False):
                    part._parameters[name] = made.setdefault(weight, nn.Parameter(weight.to("meta")))
        step, _ = rewrite(model, SPEC, OPTIONS)
        programs.append(step.program)
    assert programs[0] == programs[1]
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(
        ArtifactError, match="is on the meta device and has no bytes to write; give the model its weights"
    ):
        dllmc.compile(model, tmp_path / "artifact", OPTIONS, SPEC)
    assert not list(tmp_path.iterdir())


def test_a_bare_module_needs_a_spec(tmp_path: Path) -> None:
    """Nothing in a module says which token is the mask."""
    with pytest.raises(ConfigError, match="a bare module needs spec=ModelSpec"):
        dllmc.compile(LikeDream(), tmp_path / "artifact")
