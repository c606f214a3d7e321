import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.testing import assert_close
from trainers import FORMS, arguments, assert_same_networks, build_model, build_trainer, logged, weights_of
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    MixupCollator,
    NonFiniteError,
    TimmCAMForImageClassification,
    TransformedDataset,
    collate_images,
    create_transforms,
    find_label_issues,
)
from hnml_hf.training.callbacks import Teacher
from hnml_hf.training.metrics import noise_auroc
from hnml_hf.training.step import batch_generator
from hnml_hf.training.step_monitor import StepMonitor, label_agreement


STUDENT = {"extrapolation": 0, "eval_teacher": False}  # batch norm keeps the running statistics of training


def is_weight(name):
    """Not a statistic of batch norm, which checkpoints have as training left it."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("form", FORMS)
def test_every_objective_trains_and_logs_its_parts(form, tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **FORMS[form])
    before = weights_of(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    for name in ("timm_model.conv1.0.weight", "timm_model.layer2.0.downsample.1.weight", "timm_model.fc.bias"):
        assert not torch.equal(after[name], before[name])
    parts = {"base"}
    if form in ("mean_teacher", "mlnt", "momentum", "head", "full"):
        parts |= {"consistency"}
    if FORMS[form]["objective"].startswith("hnml"):
        parts |= {"mask_guided"}
    for entry in trainer.state.log_history[:-1]:
        assert parts <= set(entry) and "label_agreement" in entry and "memorized" in entry
        assert ("mask_guided" in entry) == ("mask_guided" in parts)
        assert_close(entry["loss"], sum(entry[part] for part in parts), atol=3e-3, rtol=0)


def test_weights_of_the_terms_scale_them(tiny_dataset, tmp_path):
    options = {"max_steps": 1, "consistency_weight": 0.25, "mask_weight": 4.0, **FORMS["full"]}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = entry["base"] + 0.25 * entry["consistency"] + 4 * entry["mask_guided"]
    assert_close(entry["loss"], expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("form", ["mean_teacher", "mlnt", "head", "full", "momentum"])
def test_without_meta_terms_it_is_the_plain_trainer(form, tiny_dataset, tmp_path):
    """All weights (and the extrapolation) zero: the same weights, bit for bit, as transformers' own Trainer."""
    options = {"consistency_weight": 0, "mask_weight": 0, "augmentation": "standard", **FORMS[form], **STUDENT}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    trainer.train()

    def collate_plainly(samples):
        batch = collate_images(samples)
        return {name: batch[name] for name in ("pixel_values", "labels")}

    args = arguments(tmp_path)
    plain_fields = TrainingArguments.__dataclass_fields__
    plain = Trainer(
        model=build_model(),
        args=TrainingArguments(**{name: getattr(args, name) for name, f in plain_fields.items() if f.init}),
        train_dataset=trainer.train_dataset,
        data_collator=collate_plainly,
    )
    plain.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert_close(logged(plain, "loss"), logged(trainer, "loss"), rtol=1e-6, atol=0)  # another order of summation


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_one_are_no_weights(form, tiny_dataset, tmp_path):
    """Bit for bit, whatever the objective; and weights below one do change what is learned."""
    trained = []
    for weights in (None, np.ones(48), np.linspace(0, 1, 48)):
        weighted = tiny_dataset if weights is None else tiny_dataset.add_column("weight", weights)
        trainer = build_trainer(tmp_path, weighted, max_steps=2, **FORMS[form])
        trainer.train()
        trained.append(weights_of(trainer.model))
    plain, ones, others = trained
    assert all(torch.equal(value, ones[name]) for name, value in plain.items())
    assert not torch.equal(plain["timm_model.fc.weight"], others["timm_model.fc.weight"])


def test_weights_by_hand(tiny_dataset, tmp_path):
    """The loss of a step is the plain mean of w_i l_i."""
    weights = np.linspace(0, 1, 48)
    trainer = build_trainer(tmp_path, tiny_dataset.add_column("weight", weights), objective="ce", max_steps=1)
    batches, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: batches.append(inputs) or compute_loss(model, inputs, **kw)
    trainer.train()
    (batch,) = batches
    rows = [trainer.train_dataset.index.tolist().index(index) for index in batch["index"].tolist()]
    assert_close(batch["sample_weights"], torch.tensor(weights[rows], dtype=torch.float32))
    losses = F.cross_entropy(build_model().train()(batch["pixel_values"]).logits, batch["labels"], reduction="none")
    expected = (batch["sample_weights"] * losses).sum() / 12
    assert_close(logged(trainer, "loss")[0], expected.item(), rtol=1e-4, atol=0)


def test_weights_that_cannot_be_used(tiny_dataset, tmp_path):
    for weights, message in (
        (np.full(48, 1.5), "sample 1[0-9]+ has the weight 1.5; .* from 0 to 1"),
        (np.full(48, np.nan), "has the weight nan"),
        (np.zeros(48), "All 48 training samples have weight 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_trainer(tmp_path, tiny_dataset.add_column("weight", weights))
    weighted = tiny_dataset.add_column("weight", np.ones(48))
    with pytest.raises(ValueError, match="A mixed image has two labels and no weight"):
        build_trainer(tmp_path, weighted, objective="ce", collator=MixupCollator(3, mixup_alpha=0.5))


def test_extrapolation_by_hand(tiny_dataset, tmp_path):
    """Three steps of v <- 0.9 v + g(theta - alpha v), theta <- theta - lr v, written out, on the same batches."""
    options = {"consistency_weight": 0, "mask_weight": 0, "extrapolation": 25, "lr_scheduler_type": "constant"}
    trainer = build_trainer(tmp_path, tiny_dataset, max_grad_norm=1e9, **options)
    batches = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: (
        batches.append(dict(inputs)) or compute_loss(model, inputs, **kw)
    )
    trainer.train()

    model = build_model().train()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        originals = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.5 * velocity[name]
        model.zero_grad()
        F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + parameter.grad
                parameter.copy_(originals[name] - 0.02 * velocity[name])
    assert len(batches) == 3
    for name, parameter in model.named_parameters():
        assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_evaluation_and_checkpoints_never_see_the_extrapolation(tiny_dataset, tmp_path):
    """The weights at the start of a step are those at the end of the one before, and what a checkpoint holds."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append(("before", weights_of(model)))

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append(("after", weights_of(model)))

    trainer = build_trainer(tmp_path, tiny_dataset, save_strategy="steps", save_steps=1, extrapolation=250)
    trainer.add_callback(Watch())
    trainer.train()
    parameters = [name for name, _ in trainer.model.named_parameters()]
    for (_, after), (_, before) in zip(seen[1::2], seen[2::2], strict=False):
        assert all(torch.equal(after[name], before[name]) for name in parameters)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name.removeprefix("timm_model.")], seen[3][1][name]) for name in parameters)


def test_the_teacher_is_the_moving_average(tiny_dataset, tmp_path):
    """Weights and batch-norm statistics: t <- d t + (1 - d) s after step n, d = 0, 0.370, 0.520, then 0.6."""
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=5, teacher_decay=0.6, **STUDENT)
    expected = weights_of(trainer.model)

    class Average(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            decay = [0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3), 0.6, 0.6][state.global_step]
            for name, value in model.state_dict().items():
                moved = decay * expected[name] + (1 - decay) * value
                expected[name] = moved if value.is_floating_point() else value.clone()

    trainer.add_callback(Average())
    trainer.train()
    for name, value in trainer.teacher.network.state_dict().items():
        assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_the_teacher_is_timms_average_bit_for_bit(tiny_dataset, tmp_path):
    """Also in a second training, where it starts from the student again."""
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=5, teacher_decay=0.6, **STUDENT)
    averages = []

    class Timms(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            averages.append(ModelEmaV3(model, decay=0.6, use_warmup=True))

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            averages[-1].update(model, step=state.global_step + 1)

    trainer.add_callback(Timms())
    for _ in range(2):
        trainer.train()
        for name, value in averages[-1].module.state_dict().items():
            assert torch.equal(trainer.teacher.network.state_dict()[name], value), name
    assert not trainer.teacher.network.training
    assert not any(parameter.requires_grad for parameter in trainer.teacher.network.parameters())


class Caching(torch.nn.Module):
    """As attention with relative positions in timm: in evaluation it keeps what it computed from its weights."""

    def __init__(self):
        super().__init__()
        self.bias, self.attention_bias_cache = torch.nn.Parameter(torch.ones(1)), {}

    def train(self, mode=True):
        if mode:
            self.attention_bias_cache = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.bias
        return x + self.attention_bias_cache.setdefault("cpu", self.bias.detach().clone())


def test_the_teacher_answers_by_its_present_weights():
    student = Caching()
    teacher = Teacher(student, decay=0.0)
    args, state = TrainingArguments(report_to="none", use_cpu=True), TrainerState()
    teacher.on_train_begin(args, state, None)
    for value in (2.0, 5.0):
        student.bias.data.fill_(value)
        teacher.on_optimizer_step(args, state, None)
        assert teacher.network(torch.zeros(1)).item() == value and not teacher.network.training


def frozen_model():
    model = build_model()
    model.batch_norm_frozen = True
    return model


@pytest.mark.parametrize("form", ["momentum", "full", "ce"])
def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale(form, tiny_dataset, tmp_path):
    """Not a bit of them moves, in student and teacher, with passes at other weights and evaluations in between."""
    options = {**FORMS[form], "eval_teacher": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = build_trainer(tmp_path, tiny_dataset, frozen_model(), **options)
    before = weights_of(trainer.model)
    trainer.train()
    for model in (trainer.model, trainer.teacher.network):
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name, _ in model.named_buffers())
        assert not torch.equal(after["timm_model.bn1.weight"], before["timm_model.bn1.weight"])
    thawed = build_trainer(tmp_path, tiny_dataset, **FORMS[form])
    thawed.train()
    name = "timm_model.bn1.running_mean"
    assert not torch.equal(thawed.model.state_dict()[name], before[name])


def test_with_frozen_batch_norm_a_batch_is_its_samples(tiny_dataset, tmp_path):
    """No sample's loss depends on the others in its batch any more."""
    model = build_trainer(tmp_path, tiny_dataset, frozen_model()).model.train()
    images = torch.randn(4, 3, 32, 32)
    assert model.training
    assert_close(model(images).logits[:2], model(images[:2]).logits)
    model.batch_norm_frozen = False
    model.train()
    assert not torch.allclose(model(images).logits[:2], model(images[:2]).logits, atol=1e-2)


def test_what_is_evaluated_is_what_is_saved(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=12, teacher_decay=0.5)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    saved = TimmCAMForImageClassification.from_pretrained(tmp_path).eval()
    batch = collate_images([trainer.eval_dataset[row] for row in range(len(tiny_dataset))])
    for model, name in ((saved, "eval_accuracy"), (trainer.model.eval(), "eval_student_accuracy")):
        with torch.no_grad():
            accuracy = (model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()
        assert_close(accuracy, metrics[name])
    assert not torch.equal(saved.class_weights, trainer.model.class_weights)  # the teacher, not the student


@pytest.mark.parametrize("both", [True, False])
def test_one_evaluation_by_choice(both, tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.measure_both = both
    trainer.train()
    assert len(logged(trainer, "eval_accuracy")) == 2
    assert len(logged(trainer, "eval_student_accuracy")) == 2 * both
    trainer.measure_both = True
    assert "eval_student_accuracy" in trainer.evaluate()


def test_the_student_is_saved_when_it_is_evaluated(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, eval_teacher=False)
    trainer.train()
    assert "eval_teacher_accuracy" in trainer.evaluate()
    trainer.save_model()
    saved = TimmCAMForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(saved.class_weights, trainer.model.class_weights)


@pytest.mark.parametrize("form", ["momentum", "full", "elr"])
@pytest.mark.parametrize("step", [2, 4], ids=["mid-epoch", "epoch end"])
def test_resume_equals_uninterrupted(form, step, tiny_dataset, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": step, "augmentation": "standard", **FORMS[form]}
    whole = build_trainer(tmp_path / "whole", tiny_dataset, **options)
    whole.train()
    resumed = build_trainer(tmp_path / "resumed", tiny_dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.state.global_step == 6
    assert_same_networks(whole, resumed)
    if whole.memory is not None:
        assert (
            torch.equal(whole.memory.store.targets, resumed.memory.store.targets) and whole.memory.store.targets.any()
        )


def test_the_best_epoch_is_saved_and_the_last_one_kept(tiny_dataset, tmp_path):
    """Accuracy is made to look best at the first evaluation; the saved teacher must be that of that checkpoint."""
    trainer = build_trainer(
        tmp_path, tiny_dataset, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy", teacher_decay=0.5,
    )  # fmt: skip
    scores = iter([0.9, 0.9, 0.1, 0.1])
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    trainer.train()
    trainer.save_model()
    best = load_file(tmp_path / "checkpoint-2" / "teacher" / "model.safetensors")
    saved, last = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "last" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in saved.items() if is_weight(name))
    teacher = trainer.teacher.network.timm_model
    with trainer.last_weights():
        assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in last.items())
    assert any(not torch.equal(value, saved[name]) for name, value in last.items())
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in saved.items())


def test_no_pickle_is_saved(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset)
    trainer.train()
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} == {"_audit", "_run.lock", "config.json", "model.safetensors"}
    assert all(path.suffix == ".npy" for path in (tmp_path / "_audit").iterdir())  # loaded with allow_pickle=False


@pytest.mark.parametrize("form", ["momentum", "full", "elr"])
def test_a_non_finite_loss_stops_the_run_and_names_the_sample(form, tiny_dataset, tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, **FORMS[form]}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    bad = int(trainer.train_dataset.index[7])

    def collate_and_poison(samples):
        batch = collate_images(samples)
        if trainer.state.global_step >= 1:
            batch["pixel_values"][batch["index"] == bad] = math.nan
        return batch

    trainer.data_collator = collate_and_poison
    with pytest.raises(NonFiniteError, match=str(bad)) as error:
        trainer.train()
    assert "`base`" in str(error.value)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    checkpoint = tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors"
    assert all(value.isfinite().all() for value in load_file(checkpoint).values())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_norm_that_is_looked_at_is_that_of_the_gradients(max_grad_norm, tiny_dataset, tmp_path):
    """Before they are clipped; and nothing computes it a second time."""
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", max_grad_norm=max_grad_norm)
    expected, seen = [], []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(trainer.gradient_norm)

    clip = trainer.accelerator.clip_grad_norm_

    def look_and_clip(parameters, max_norm):
        parameters = list(parameters)
        expected.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
        return clip(parameters, max_norm)

    trainer.accelerator.clip_grad_norm_ = look_and_clip
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == len(expected) == 3
    assert_close(torch.stack(seen), torch.stack(expected))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_non_finite_gradient_stops_the_run(max_grad_norm, tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", max_grad_norm=max_grad_norm)
    trainer.model.class_weights.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(trainer.model)
    with pytest.raises(NonFiniteError, match="a gradient, from the batch of the samples with index"):
        trainer.train()
    assert torch.equal(trainer.model.class_weights, before["timm_model.fc.weight"])


@pytest.mark.parametrize("form", ["ce", "momentum", "head", "full"])
def test_bfloat16(form, tiny_dataset, tmp_path):
    """It trains in half precision, keeps its weights in float32, and leaves autocast as it was."""
    trainer = build_trainer(tmp_path, tiny_dataset, bf16=True, **FORMS[form])
    seen = []
    trainer.model.timm_model.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert torch.bfloat16 in seen
    assert not torch.is_autocast_enabled("cpu")
    assert all(
        parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in trainer.model.parameters()
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", ["momentum", "head"])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "test_convnext"])
def test_heads_with_layers_between_pool_and_classifier(backbone, form, bf16, tiny_dataset, tmp_path):
    """Their maps are gradients through the head: in a step whose FLOPs are counted, and in both precisions."""
    model = TimmCAMForImageClassification.from_timm(backbone, num_labels=3, image_size=64)
    trainer = build_trainer(tmp_path, tiny_dataset, model=model, bf16=bf16, **FORMS[form])
    trainer.train()
    assert len(logged(trainer, "mask_guided")) == 3 and not model.pools_by_mean
    assert trainer.cost.meter.cost > 1.1


def test_student_and_teacher_are_evaluated_in_one_precision(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, bf16=True, max_steps=1)
    trainer.train()
    seen = []
    for model in (trainer.model, trainer.teacher.network):
        model.timm_model.fc.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.evaluate()
    assert len(seen) == 2 * len(trainer.get_eval_dataloader()) and set(seen) == {torch.bfloat16}


def test_one_process_uses_one_gpu(tiny_dataset, tmp_path, monkeypatch, caplog):
    """Split among replicas, a batch would lose its labels and ids."""
    monkeypatch.setattr(HNMLTrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 1)))
    trainer_args = arguments(tmp_path)
    trainer_args._n_gpu = 4
    dataset = TransformedDataset(tiny_dataset, create_transforms(build_model().config.pretrained_cfg)[0])
    trainer = HNMLTrainer(build_model(), trainer_args, train_dataset=dataset, data_collator=collate_images)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 12
    assert "4 GPUs are visible" in caplog.text and "--num_processes 4" in caplog.text


class Scaler:
    """What float16 training has: a loss scale that is raised until gradients overflow."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def test_an_overflow_of_float16_is_left_to_its_scaler(tiny_dataset, tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, tiny_dataset)

    def step(scale, norm):
        monkeypatch.setattr(trainer.accelerator, "scaler", None if scale is None else Scaler(scale))
        trainer.finite_check.monitor.watch(torch.tensor([7]), {"base": torch.ones(1)}, {})
        trainer.gradient_norm = torch.tensor(norm)
        trainer.finite_check.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)

    step(None, 1.0)
    step(65536.0, math.inf)  # the scaler skips this step and lowers the scale
    for scale in (None, 0.5):  # without one, or when lowering it does not help
        with pytest.raises(NonFiniteError):
            step(scale, math.inf)


def test_nothing_is_computed_for_an_extrapolation_that_is_not_taken(tiny_dataset, tmp_path, monkeypatch):
    """After the first steps, which show whether the optimizer keeps a running gradient."""
    calls = []
    monkeypatch.setattr(
        "hnml_hf.training.extrapolation.running_directions", lambda optimizer: calls.append(optimizer) or {}
    )
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=4)
    trainer.meta_weight = lambda: 0.0
    trainer.train()
    assert len(calls) == 2
    build_trainer(tmp_path, tiny_dataset, max_steps=4).train()
    assert len(calls) == 2 + 4


@pytest.mark.parametrize(("form", "drawn"), [("momentum", 0), ("elr", 0), ("ce", 0), ("full", 3), ("mlnt", 3)])
def test_ids_are_read_only_where_labels_are_drawn(form, drawn, tiny_dataset, tmp_path, monkeypatch):
    """On a GPU reading them waits for everything before."""
    made = []
    monkeypatch.setattr(
        "hnml_hf.training.trainer.batch_generator", lambda *key: made.append(key) or batch_generator(*key)
    )
    build_trainer(tmp_path, tiny_dataset, **FORMS[form]).train()
    assert len(made) == drawn


def test_second_order_through_attention(tiny_dataset, tmp_path):
    model = TimmCAMForImageClassification.from_timm("test_vit", num_labels=3, image_size=32)
    trainer = build_trainer(tmp_path, tiny_dataset, model, max_steps=1, **FORMS["full"], second_order=True)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["consistency"])


def test_the_meta_weight_scales_both_levels(tmp_path):
    args = arguments(tmp_path, consistency_weight=3.0, mask_weight=2.0)
    assert args.term_weights(0.0) == {"base": 1}
    assert args.term_weights(0.5) == {"base": 1, "consistency": 1.5, "mask_guided": 1}


def test_draws_follow_from_seed_step_and_samples():
    def draw(*key):
        return torch.rand(3, generator=batch_generator(*key)).tolist()

    index = torch.tensor([4, 2])
    assert draw(0, 5, index) == draw(0, 5, index.clone())
    assert (
        len({tuple(draw(*key)) for key in ((0, 5, index), (1, 5, index), (0, 6, index), (0, 5, index.flip(0)))}) == 4
    )


def test_memorization_is_measured_on_the_wrong_labels_alone():
    """Right: rows 0, 1 and 3 of 4. Known to be wrong: rows 1 and 2, of which row 1 is repeated."""
    predicted, labels, clean = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 1, -1])
    fit = label_agreement(predicted, labels, clean)
    assert fit["label_agreement"] == 0.75 and fit["memorized"] == 0.5
    assert label_agreement(predicted, labels, labels)["memorized"].isnan()


def test_the_monitor_averages_what_is_there():
    monitor = StepMonitor()
    for base, rare in ((1.0, math.nan), (2.0, 5.0)):
        terms = {"base": torch.tensor([base, base])}
        monitor.watch(torch.arange(2), terms, {"rare": torch.tensor(rare), "never": torch.tensor(math.nan)})
    assert monitor.averages() == {"base": 1.5, "rare": 5.0}
    assert monitor.averages() == {}


SEEN_TWICE = {"max_steps": 2, "per_device_train_batch_size": 48, "learning_rate": 0.5}
# option: (value, term of the last step that it changes, the other options)
REACHING = {
    "gce_q": (0.3, "base", FORMS["gce"]),
    "elr_weight": (1.0, "base", FORMS["elr"]),
    "elr_decay": (0.2, "base", FORMS["elr"]),
    "elr_decay, memory": (0.2, "consistency", {**FORMS["mean_teacher"], "teacher_source": "memory", **SEEN_TWICE}),
    "extrapolation": (5.0, "base", {**FORMS["ce"], "max_steps": 3}),
    "extrapolation_normalized": (True, "base", {**FORMS["momentum"], "max_steps": 3}),
    "perturb_ratio": (1.0, "consistency", FORMS["head"]),
    "num_neighbors": (1, "consistency", FORMS["head"]),
}


@pytest.mark.parametrize("option", REACHING)
def test_an_option_reaches_the_loss(option, tiny_dataset, tmp_path):
    """On maps of 64 cells, whose mask is hard: it has a threshold."""
    value, term, options = REACHING[option]

    def last(**changed):
        model = build_model(image_size=64)
        trainer = build_trainer(tmp_path, tiny_dataset, model, **{"max_steps": 1, **options, **changed})
        trainer.train()
        return logged(trainer, term)[-1]

    assert last() != last(**{option.partition(",")[0]: value})


def test_mixup_is_refused_where_soft_labels_mean_nothing(tiny_dataset, tmp_path):
    collator = MixupCollator(3, mixup_alpha=0.4)
    trainer = build_trainer(tmp_path, tiny_dataset, collator=collator, objective="ce")
    trainer.train()
    for options in (
        {"objective": "elr"},
        FORMS["full"],
        {"teacher_source": "memory"},  # of mixtures, which are no samples
    ):
        with pytest.raises(ValueError, match="`(elr|hnml|hnml_synthetic)` does not take as it is set"):
            build_trainer(tmp_path, tiny_dataset, collator=collator, **options)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoint-1"])
def test_what_is_saved_does_not_depend_on_the_folder(name, tiny_dataset, tmp_path):
    often = {"save_strategy": "steps", "save_steps": 2}
    trainer = build_trainer(tmp_path / name, tiny_dataset, max_steps=4, **often)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / name / "teacher").exists()
    saved = load_file(tmp_path / name / "model.safetensors")
    kept = load_file(tmp_path / name / "checkpoint-4" / "model.safetensors")
    student, teacher = trainer.model.timm_model.state_dict(), trainer.teacher.network.timm_model.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in saved.items())
    assert all(torch.equal(value, student[key]) for key, value in kept.items() if is_weight(key))
    assert not torch.equal(saved["fc.bias"], kept["fc.bias"])


def test_a_second_training_sees_its_own_samples_alone(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=8)  # two epochs
    for _ in range(2):
        trainer.train()
        assert (trainer.dynamics.records["times_seen"] == 2).all()


def test_a_model_of_its_own_making_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match="`model_init` would put another model"):
        HNMLTrainer(None, arguments(tmp_path), model_init=build_model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "mean_teacher", "mask_weight": 0.5, "monitor_fraction": None}, ["mask_weight"]),
        ({"perturb_ratio": 1.0, "gce_q": 0.5}, ["perturb_ratio", "gce_q"]),
        ({"objective": "ce", "meta_lr": 1.0, "teacher_source": "memory"}, ["teacher_source", "meta_lr"]),
        ({"objective": "elr", "elr_decay": 0.8, "monitor_fraction": None}, []),
        (FORMS["head"], []),
    ],
)
def test_options_without_effect_are_named(options, named, tmp_path, caplog):
    plain = {"num_neighbors": 10, "consistency_weight": 3.0, "mask_weight": 0.0}  # the defaults
    arguments(tmp_path, **{**plain, "per_device_train_batch_size": 12, "monitor_fraction": None, **options})
    warnings = [text for text in caplog.messages if text.startswith("Without effect")]
    assert len(warnings) == bool(named) and all(f"`{name}`" in warnings[0] for name in named)
    assert sum(text.count("`") for text in warnings) == 2 * (len(named) + 1) * bool(named)
    assert all(f", since `{decides}=" in warnings[0] for decides in (["objective"] if named else []))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_strategy": "epoch", "eval_steps": 5}, "`eval_steps`, since `eval_strategy=epoch`"),
        ({"save_strategy": "epoch", "save_steps": 5}, "`save_steps`, since `save_strategy=epoch`"),
        ({"eval_strategy": "no", "eval_delay": 2}, "`eval_delay`, since `eval_strategy=no`"),
        ({"dataloader_persistent_workers": True}, "`dataloader_persistent_workers`, since `dataloader_num_workers=0`"),
        ({"adam_beta1": 0.8}, "`adam_beta1`, since `optim=sgd`"),
        ({"adam_beta1": 0.8, "optim": "adamw_torch", "optim_args": None}, None),
        ({"eval_strategy": "steps", "eval_steps": 5, "logging_strategy": "epoch", "logging_steps": 5}, None),
    ],
)
def test_options_of_transformers_without_effect_are_named(options, said, tmp_path, caplog):
    arguments(tmp_path, **{"num_neighbors": 10, "per_device_train_batch_size": 12, **options})
    warnings = [text for text in caplog.messages if text.startswith("Without effect")]
    assert warnings == ([] if said is None else [f"Without effect in this run: {said}."])


def test_evaluation_never_mixes_images(tiny_dataset, tmp_path):
    model = build_model()
    mixing = build_trainer(tmp_path, tiny_dataset, model, collator=MixupCollator(3, mixup_alpha=1.0), objective="ce")
    plain = build_trainer(tmp_path, tiny_dataset, model, objective="ce")
    assert mixing.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    logits = [trainer.predict(trainer.eval_dataset).predictions for trainer in (mixing, plain)]
    assert np.array_equal(*logits)
    assert "soft_labels" in next(iter(mixing.get_train_dataloader()))


def test_no_workers_need_not_persist(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, dataloader_num_workers=0, dataloader_persistent_workers=True)
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == 12


def test_workers_of_a_loader_that_is_used_once_end_with_it(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert not trainer.get_test_dataloader(trainer.eval_dataset).persistent_workers
    assert trainer.get_eval_dataloader().persistent_workers and trainer.args.dataloader_persistent_workers


@pytest.mark.parametrize("workers", [0, 1])
def test_the_dataset_that_is_given_is_measured(workers, tiny_dataset, tmp_path):
    """With workers that persist, transformers keeps the loader of the first dataset."""
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", eval_teacher=True, **options)
    trainer.evaluate()
    _, evaluation = create_transforms(trainer.model.config.pretrained_cfg)
    part = TransformedDataset(tiny_dataset.select(range(5)), evaluation)
    expected = trainer.predict(part).metrics
    measured = trainer.evaluate(part)
    for name in ("loss", "accuracy"):
        assert measured[f"eval_{name}"] == expected[f"test_{name}"]
        assert measured[f"eval_student_{name}"] == expected[f"test_{name}"]


# -- bad input, before training starts --


def test_bad_data(tiny_dataset, tmp_path):
    for rows, message in (([], "empty"), ([0, 3, 6], "have the one label")):
        with pytest.raises(ValueError, match=message):
            build_trainer(tmp_path, tiny_dataset.filter(lambda x: False) if not rows else one_class(tiny_dataset))
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=32, output_stride=8)
    with pytest.raises(ValueError, match=r"has label 2, but the model has 2 classes \(0 to 1\)"):
        build_trainer(tmp_path, tiny_dataset, model)
    with pytest.raises(ValueError, match="TransformedDataset"):
        HNMLTrainer(model=build_model(), args=arguments(tmp_path), train_dataset=tiny_dataset)


def one_class(dataset):
    return dataset.select([row for row, label in enumerate(dataset["label"]) if label == 1])


def test_a_column_that_is_missing_is_named(tiny_dataset):
    with pytest.raises(ValueError, match=r"Columns \['index'\] are missing; the dataset has \['image'"):
        TransformedDataset(tiny_dataset.remove_columns("index"), lambda image: image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "magic"}, "`objective='magic'` is none of hnml"),
        ({"teacher_decay": 1.5}, "`teacher_decay=1.5` must be between 0 and 1"),
        ({"extrapolation": -1.0}, "`extrapolation=-1.0` must be a number from 0 on"),
        ({"gce_q": 0.0}, "above 0"),
        ({"elr_decay": 1.0}, "`elr_decay=1.0` must be below 1"),
        ({"teacher_decay": 1.0}, "`teacher_decay=1.0` must be below 1"),
        ({"meta_lr": -1.0}, "`meta_lr=-1.0` must be a number from 0 on"),
        ({"num_meta_draws": 0}, "at least 1"),
        ({"objective": "hnml_synthetic", "num_neighbors": 12}, "`num_neighbors=12` needs a batch of more images"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"bf16_full_eval": True}, "`bf16_full_eval=True` is not available here: it would convert the student alone"),
        ({"save_only_model": True, "save_strategy": "epoch"}, "checkpoints that no run can go on from"),
        ({"fp16": True, "objective": "hnml_synthetic"}, "whose gradient would be rounded to 0"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_options_have_help_and_repeat_no_name_of_the_parent():
    own = {
        name: f
        for name, f in HNMLTrainingArguments.__dataclass_fields__.items()
        if name in HNMLTrainingArguments.__annotations__
    }
    assert all(f.metadata.get("help") for f in own.values())
    overridden = set(own) & set(TrainingArguments.__dataclass_fields__)
    assert overridden == {
        "bf16",
        "do_train",
        "optim",
        "optim_args",
        "learning_rate",
        "lr_scheduler_type",
        "remove_unused_columns",
        "ddp_find_unused_parameters",
    }


def test_noise_auroc_by_hand():
    """q_y = 0.9, 0.6 for right labels, 0.2, 0.7 for wrong ones: three of four pairs in order; -1 is left out."""
    q = np.array([0.9, 0.6, 0.2, 0.7, 0.1])
    logits = np.log(np.stack([q, 1 - q], axis=1))
    assert noise_auroc(logits, np.zeros(5, int), np.array([0, 0, 1, 1, -1])) == 0.75
    assert noise_auroc(logits, np.zeros(5, int), np.zeros(5, int)) is None


def test_logs_are_json(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **FORMS["full"])
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_a_trained_run_gives_the_table_of_its_labels(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=4)
    with pytest.raises(ValueError, match="not one was seen"):
        trainer.audit()
    trainer.train()
    table = trainer.audit(source="tiny")
    features = np.random.default_rng(0).normal(size=(12, 4))
    frozen = find_label_issues((features, np.arange(12) % 3))
    of_features = {"nearest_index", "nearest_similarity", "typicality"}  # a judge also keeps the likeliest classes
    more = {name for name in frozen if name not in table}
    assert {name for name in more if not name.startswith("likely_")} == of_features and set(table) < set(frozen)
    assert table.attrs.keys() - frozen.attrs.keys() == {"source"}
    assert (table["rank"].to_numpy() == np.arange(1, len(table) + 1)).all()
    assert set(table["index"]) == set(tiny_dataset["index"])
    trainer.model.config.id2label = {0: "0", 1: "1", 2: "2"}  # as of a model that knows the number of classes alone
    names = tiny_dataset.features["label"].names
    assert trainer.audit().attrs["class_names"] == names and set(trainer.audit()["label_name"]) == set(names)
    trainer.recorder.dynamics = None
    with pytest.raises(ValueError, match="mixed"):
        trainer.audit()
