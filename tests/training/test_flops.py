import json
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import CASES, RESNET, SYNTHETIC, VIT, make_model, make_trainer, weights_of
from torch import nn
from torch._dynamo.backends import registry
from torch.testing import assert_close
from transformers.modeling_outputs import ImageClassifierOutput

from hnml_hf import HNMLTrainingArguments
from hnml_hf.training.flops import (
    CostMeter,
    count_flops,
    cross_entropy_flops,
    peak_memory_mib,
    peak_tensor_bytes,
    tensor_bytes,
)


CPU = torch.device("cpu")
# older versions of transformers know the second name only; in newer ones it is a deprecated alias
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in NAMES if hasattr(HNMLTrainingArguments, name))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 7, bias=False)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.layer(pixel_values))


def test_flops_by_hand():
    """(4, 30) times (30, 7): two per multiply-add."""
    a, b = torch.ones(4, 30), torch.ones(30, 7)
    assert count_flops(lambda: a @ b) == 2 * 4 * 30 * 7


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_cost_three_times_their_forward(layer, groups):
    """Also with groups, down to one channel in each: output, gradient by the input, gradient by the weight."""
    convolution = layer(6, 12, 3, stride=2, groups=groups, bias=False)
    images = torch.ones(4, 6, 9, 9, requires_grad=True)
    positions = 4 * 4 if layer is nn.Conv2d else 9 * 9  # of the output, or of the input
    forward = 2 * 4 * positions * 9 * 6 * 12 // groups
    assert count_flops(lambda: convolution(images)) == forward
    assert count_flops(lambda: convolution(images).sum().backward()) == 3 * forward


def test_cross_entropy_flops_by_hand_and_without_a_trace():
    """One layer: forward and the gradient of its weight; the images need no gradient."""
    model = Linear()
    assert cross_entropy_flops(model, torch.zeros(4, 30)) == 2 * (2 * 4 * 30 * 7)
    assert model.layer.weight.grad is None


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_cross_entropy_flops_are_those_of_the_real_step(backbone):
    model = make_model(backbone).train()
    images, labels = torch.randn(4, *model.input_size), torch.tensor([0, 1, 2, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = cross_entropy_flops(model, images)
    assert_close(model.state_dict(), before, rtol=0, atol=0)  # nor do batch-norm statistics move
    assert expected == count_flops(lambda: model(images, labels=labels).loss.backward())


def test_meter_averages_over_kinds_of_steps():
    model, images, meter = Linear(), torch.zeros(4, 30), CostMeter()

    def step(passes):
        with meter.step(passes, model, images):
            for _ in range(passes):
                model(images).logits.sum().backward()

    assert meter.cost != meter.cost  # nan before the first step
    for passes in (1, 1, 3, 1):
        step(passes)
    assert meter.ratios == {1: 1.0, 3: 3.0}
    assert meter.cost == (1 + 1 + 3 + 1) / 4
    meter.forward_passes(6)
    assert meter.cost == (1 + 1 + 3 + 1 + 6 / 3) / 4


def test_what_a_cross_entropy_step_costs_is_counted_once_for_each_shape(monkeypatch):
    counted = []

    def reference(model, images):
        counted.append(len(images))
        return 1

    monkeypatch.setattr("hnml_hf.training.flops.cross_entropy_flops", reference)
    model, meter = Linear(), CostMeter()
    for kind, size in (("one", 4), ("two", 4), ("three", 2), ("four", 4)):
        with meter.step(kind, model, torch.zeros(size, 30)):
            pass
    assert counted == [4, 2]


def test_a_step_that_fails_is_not_counted():
    meter = CostMeter()
    with pytest.raises(RuntimeError, match="stop"), meter.step("kind", Linear(), torch.zeros(4, 30)):
        raise RuntimeError("stop")
    assert not meter.steps and not meter.ratios


def test_peak_of_tensors_by_hand():
    """4 MB, then 4 MB beside it, then the first is freed before 2 MB more come: 8 MB at the peak."""

    def allocate():
        first = torch.ones(1_000_000)
        second = first * 2
        del first
        third = torch.ones(500_000)
        return second, third

    assert abs(peak_tensor_bytes(allocate, CPU) - 8_000_000) < 1_000


def test_tensors_are_counted_once():
    tensor = torch.ones(10)
    assert tensor_bytes([tensor, tensor, torch.ones(5)]) == 60


def test_peak_memory_of_the_process_grows_with_what_it_holds():
    before = peak_memory_mib(CPU)
    block = torch.ones(300 * 2**20 // 4)
    assert before > 100
    assert peak_memory_mib(CPU) >= before
    del block


# ratios of method.md's cost table; F = 1/3 of a cross-entropy step
@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("ce", 1, 1),
        ("elr", 1, 1),
        ("mean_teacher", 1.3, 1.36),
        ("momentum", 1.3, 1.36),
        ("momentum memory", 1, 1.01),
        ("head second", 1.3, 1.36),
        ("full first", 2.9, 3.1),
        ("full second", 4.0, 5.3),
    ],
)
def test_a_run_reports_what_it_cost(case, low, high, tmp_path):
    trainer = make_trainer(RESNET, {**CASES[case], "output_dir": str(tmp_path), "max_steps": 2})
    metrics = trainer.train().metrics
    assert low <= metrics["cost_ce"] <= high
    assert metrics["train_samples_per_second"] > 0 and metrics["peak_memory_mib"] > 100
    trainer.save_metrics("all", metrics, combined=False)
    assert json.loads((tmp_path / "all_results.json").read_text())["cost_ce"] == metrics["cost_ce"]


# -- what a step must survive, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["head second", "full first", "momentum", "momentum memory", "elr"])
def test_a_last_batch_of_one_sample(case):
    """13 images in batches of four: the last one has no neighbor, and nothing to swap."""
    trainer = make_trainer(VIT, {**CASES[case], "num_train_epochs": 1, "max_steps": -1}, num_images=13)
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("case", ["head second", "full first"])
def test_a_batch_where_no_neighbor_differs(case):
    """All labels of the batches are equal: no draw changes one, and nothing is divided by the number of changes."""
    trainer = make_trainer(VIT, {**CASES[case], "max_steps": 4, "logging_strategy": "steps", "logging_steps": 1})
    data = trainer.train_dataset
    data.labels = data.labels * 0
    data._columns = data.columns()
    trainer.train()
    assert all(value.isfinite().all() for value in weights_of(trainer).values())
    assert not any("swapped_label_loss_drop" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("scope", ["full"])
def test_activation_checkpointing_is_refused_where_it_would_be_wrong(scope):
    with pytest.raises(ValueError, match="wrong gradients"):
        HNMLTrainingArguments(**{**SYNTHETIC, "meta_scope": scope}, use_cpu=True, **{CHECKPOINTING: True})


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("case", ["head second", "momentum"])
def test_activation_checkpointing_changes_nothing_where_it_works(case, backbone):
    """Nor batch-norm statistics, though layers run twice."""
    trained = []
    options = CASES[case]
    for checkpointing in (False, True):
        trainer = make_trainer(backbone, {**options, CHECKPOINTING: checkpointing})
        trainer.train()
        assert trainer.model.timm_model.grad_checkpointing == checkpointing
        trained.append(weights_of(trainer))
    assert_close(trained[0], trained[1], rtol=0, atol=1e-6)


def test_out_of_memory_says_what_would_fit():
    options = {**CASES["full second"], "num_meta_draws": 5}
    trainer = make_trainer(VIT, options)

    def starve(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.objective = starve
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    wanted = [
        "CUDA out of memory",
        "--num_meta_draws 1",
        "--second_order false",
        "--meta_scope head",
    ]
    wanted += [
        "--teacher_source memory",
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 2",
    ]
    places = [message.index(part) for part in wanted]
    assert places == sorted(places)


def test_sharded_weights_are_refused(monkeypatch):
    from transformers import Trainer

    def sharded(self, *args, **kwargs):
        self.is_fsdp_enabled, self.is_deepspeed_enabled = True, False
        self.callback_handler = SimpleNamespace(add_callback=lambda callback: None)

    monkeypatch.setattr(Trainer, "__init__", sharded)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed"):
        make_trainer(VIT, CASES["ce"])


@pytest.mark.parametrize("case", ["head second", "momentum memory"])
def test_bf16_takes_nearly_the_same_step(case):
    initial, moved = make_model(RESNET).class_weights, []
    for options in ({}, {"bf16": True}):
        trainer = make_trainer(RESNET, {**CASES[case], **options, "max_steps": 1})
        trainer.train()
        moved.append((trainer.model.class_weights - initial).flatten())
    assert moved[1].dtype == torch.float32
    assert not torch.equal(*moved)
    assert nn.functional.cosine_similarity(*moved, dim=0) > 0.95


DYNAMO_LOOKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # at any tensor that it meets


@DYNAMO_LOOKS
@pytest.mark.slow
def test_traced_steps_remember():
    """Dynamo alone, without a compiler: each of two runs must write into its own memory on disk."""
    options = {**CASES["full memory"], "per_device_train_batch_size": 8, "max_steps": 8}
    traced = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, first, second = (make_trainer(VIT, {**options, **how}) for how in ({}, traced, traced))
    for trainer in (plain, first, second):
        trainer.train()
        assert (trainer.memory.store.mass > 0.5).all()  # two observations of each sample
    assert_close(weights_of(first), weights_of(plain), rtol=0, atol=1e-4)
    assert_close(weights_of(second), weights_of(first), rtol=0, atol=1e-6)


TRACED = [case for case in CASES if case not in ("full second", "mlnt second")]  # these two are refused
SLOW = [case for case in TRACED if case not in ("momentum", "elr")]  # these two are what the recipes take


@DYNAMO_LOOKS
@pytest.mark.parametrize("case", ["momentum", "elr", *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_traced_steps_are_the_same(case, backend):
    """Without a compiler's kernels: Dynamo reads each objective's code, and nothing is rounded otherwise. The first
    step of a run, whose operations are counted, is not compiled."""
    torch._dynamo.reset()
    trained = []
    for how in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        trainer = make_trainer(VIT, {**CASES[case], **how, "max_steps": 2}, weighted="weighted" in case)
        trainer.train()
        trained.append(weights_of(trainer))
    assert_close(trained[0], trained[1], rtol=0, atol=0)


@DYNAMO_LOOKS
@pytest.mark.slow
@pytest.mark.parametrize("case, atol", [("momentum", 1e-5), ("head second", 1e-5), ("full first", 5e-5)])
def test_compiled_steps_are_the_same(case, atol):
    """Compiles for minutes. Its kernels round otherwise: by 3e-5 after two steps of the full scope."""
    trained = []
    for compiled in (False, True):
        trainer = make_trainer(RESNET, {**CASES[case], "torch_compile": compiled, "max_steps": 2})
        trainer.train()
        trained.append(weights_of(trainer))
    assert_close(trained[0], trained[1], rtol=1e-4, atol=atol)


@DYNAMO_LOOKS
@pytest.mark.slow
def test_compiled_graphs_are_the_same():
    """Without the compiler's kernels: to the bit."""
    trained = []
    for how in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(RESNET, {**CASES["full first"], **how, "max_steps": 2})
        trainer.train()
        trained.append(weights_of(trainer))
    assert_close(trained[0], trained[1], rtol=0, atol=0)


def test_compiled_second_order_is_refused():
    with pytest.raises(ValueError, match="differentiate a compiled backward"):
        HNMLTrainingArguments(**{**CASES["full second"]}, torch_compile=True, use_cpu=True)


def test_a_failed_compilation_stops_the_run(monkeypatch):
    """A backend that always fails."""

    def broken(graph, inputs):
        raise RuntimeError("the backend is broken")

    registry.lookup_backend("eager")
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", broken)
    options = {**CASES["ce"], "torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    trainer = make_trainer(VIT, options)
    with pytest.raises(RuntimeError, match="(?s)`torch_compile` failed.*the backend is broken.*Train without it"):
        trainer.train()
