"""Two processes are one process with twice the accumulation: same weights, teacher and memory, for every objective.

The processes are started once; `distributed_worker.py` runs all cases in that launch. Only backbones without batch
norm can be compared exactly, because each process normalizes its own part of the batch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from commands import free_port
from safetensors.torch import load_file
from torch.testing import assert_close

from hnml_hf.data.collate import collate_images
from hnml_hf.objectives import OBJECTIVES
from hnml_hf.objectives.batch_view import BatchView
from hnml_hf.training.distributed import RanksDifferError, check_ranks_agree, tensor_digests
from hnml_hf.training.trainer import batch_generator


WORKER = Path(distributed_worker.__file__)
TOLERANCE = {"rtol": 0, "atol": 1e-6}


CONFIGS = WORKER.parents[2] / "scripts" / "accelerate"


def launch(
    *arguments, processes: int = 2, machine: tuple[int, int] = (0, 1), port: int | None = None
) -> subprocess.Popen:
    """Start the worker in several processes on the CPU; `machine` is its rank and their number."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", processes, "--num_machines", machine[1], "--machine_rank", machine[0]),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", port or free_port()),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *(("--config_file", CONFIGS / "two_nodes.yaml") if machine[1] == 2 else ()),
        *(WORKER, *arguments, "--use_cpu", "true"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The same cases in two processes and, meanwhile, in this one."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    process = launch(two, 1)
    try:
        distributed_worker.main(one, 2)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output[-5000:]
    return one, two


@pytest.fixture(scope="module")
def one_process(launches):
    facts = json.loads((launches[0] / "facts.json").read_text())
    assert facts["num_processes"] == 1
    return launches[0], facts


@pytest.fixture(scope="module")
def two_processes(launches):
    facts = json.loads((launches[1] / "facts.json").read_text())
    assert facts["num_processes"] == 2  # several launch commands quietly start only one
    return launches[1], facts


@pytest.fixture(scope="module")
def initial_weights():
    return distributed_worker.make_model(distributed_worker.VIT).state_dict()


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes_equal_one_with_accumulation(case, one_process, two_processes, initial_weights):
    one, two = (load_file(folder / f"{case}.safetensors") for folder, _ in (one_process, two_processes))
    name = "timm_model.head.weight"
    assert (one[f"student.{name}"] - initial_weights[name]).abs().max() > 1e-4  # it did train
    assert one.keys() == two.keys()
    for name in one:
        assert_close(two[name], one[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_cases_differ_from_each_other(one_process):
    """Else the comparison above would compare the same thing many times."""
    folder, _ = one_process
    heads = {
        case: load_file(folder / f"{case}.safetensors")["student.timm_model.head.weight"]
        for case in distributed_worker.CASES
    }
    for case in heads:
        for other in heads:
            assert case == other or (heads[case] - heads[other]).abs().max() > 1e-5, (case, other)


@pytest.mark.parametrize("case", distributed_worker.LONG_CASES)
def test_ranks_hold_the_same_weights_after_many_steps(case, two_processes):
    """Student, teacher with its batch-norm statistics, and memory; also where the last batch must be filled up."""
    assert two_processes[1]["rank_equality"][case]


def test_what_is_measured_is_one_model_on_all_ranks(two_processes):
    """Each has seen other images, and without a teacher nothing else evens their batch-norm statistics out."""
    assert two_processes[1]["rank_equality"]["batch norm without a teacher, when evaluated"]


def test_the_log_is_of_all_ranks(one_process, two_processes):
    one, two = one_process[1]["logged"], two_processes[1]["logged"]
    assert len(one) == distributed_worker.STEPS and all(None not in entry.values() for entry in one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_the_mean_over_ranks_of_their_own_draws_is_applied(two_processes, initial_weights):
    """One plain SGD step at learning rate 1 moves the weights by minus the mean of the two shards' gradients.

    Each is recomputed here from the shard's images and the labels that its rank drew, without a trainer.
    """
    folder, facts = two_processes
    weights = load_file(folder / "one step.safetensors")
    trainer = distributed_worker.make_trainer(distributed_worker.VIT, distributed_worker.ONE_STEP)
    model, rows = trainer.model, {int(index): row for row, index in enumerate(trainer.train_dataset.index)}
    teacher = trainer.teacher.network.eval()
    gradients = []
    for index, recorded in zip(facts["indices"], facts["draws"], strict=True):
        batch = collate_images(trainer.train_dataset.__getitems__([rows[i] for i in index]))
        assert batch["labels"].tolist() == recorded[0]
        terms, _ = trainer.objective(
            BatchView(model.train(), batch["pixel_values"]),
            batch["labels"],
            active_terms={"base", "consistency", "mask_guided"},
            teacher=torch.no_grad()(lambda batch=batch: teacher(batch["pixel_values"], cam_classes="predicted")),
            generator=batch_generator(trainer.args.seed, 0, torch.tensor(index)),
        )
        gradients.append(torch.autograd.grad(sum(term.mean() for term in terms.values()), list(model.parameters())))
    for (name, parameter), own, other in zip(model.named_parameters(), *gradients, strict=True):
        moved = initial_weights[name] - weights[f"student.{name}"]
        assert_close(moved, (own + other) / 2, rtol=1e-4, atol=1e-6)
        assert_close(parameter, initial_weights[name], rtol=0, atol=0)
    assert (gradients[0][-1] - gradients[1][-1]).abs().max() > 1e-4  # so the mean is neither


def test_all_ranks_measure_the_memorization_of_all(one_process, two_processes):
    """Observations of both processes count on both, so that they agree on the weight of the meta terms."""
    (alone,) = one_process[1]["monitor_counts"]
    assert alone[1] > 0 and alone[3] > 0
    assert two_processes[1]["monitor_counts"] == [alone, alone]


def test_all_ranks_correct_by_the_noise_rate_of_all(one_process, two_processes):
    """The first process estimates it from the observations of both."""
    (alone,) = one_process[1]["noise_rates"]
    assert alone > 0
    assert two_processes[1]["noise_rates"] == pytest.approx([alone, alone], abs=1e-3)
    assert two_processes[1]["rank_equality"]["corrected"]


def test_every_rank_draws_its_own_synthetic_labels(one_process, two_processes):
    _, facts = two_processes
    assert len(set(facts["draw_seeds"])) == 2
    for given, *drawn in facts["draws"]:
        assert any(labels != given for labels in drawn)
    assert any(len({tuple(labels) for labels in drawn}) > 1 for _, *drawn in facts["draws"])  # two may be alike
    assert facts["draw_seeds"] == one_process[1]["draw_seeds"]  # those of the accumulation steps of one process
    assert facts["draws"] == one_process[1]["draws"]


def test_all_ranks_start_from_one_judge_and_share_its_forward_pass(two_processes):
    judges = two_processes[1]["judges"]
    first, other = judges["head"]
    assert first == other == pytest.approx(judges["judged"][0])
    assert judges["computed"] == [16, 16]


def test_a_rank_that_drifts_stops_the_run_at_the_next_check(two_processes):
    message = two_processes[1]["divergence"]
    assert "After step 2" in message and "process 1" in message and "student.timm_model.head.weight" in message


def test_digests_tell_single_bits_apart():
    same = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int64)}
    other = {"a": torch.nextafter(same["a"], torch.tensor(9.0)), "b": same["b"]}
    digests = torch.stack([tensor_digests(same), tensor_digests(same)])
    check_ranks_agree(["a", "b"], digests, step=7)
    with pytest.raises(RanksDifferError, match="After step 7 .* process 1 .* 1 of 2 tensors, first `a`"):
        check_ranks_agree(["a", "b"], torch.stack([tensor_digests(same), tensor_digests(other)]), step=7)


@pytest.mark.parametrize("case", ["ce", "weighted", "gce", "elr"])
def test_a_batch_of_eight_is_two_of_four(case):
    """Per-sample objectives do not care how a batch is cut; HNML and MLNT do: neighbors are those of a batch."""
    trained = []
    for size, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = distributed_worker.make_trainer(
            distributed_worker.VIT,
            {**distributed_worker.CASES[case], **options},
            weighted=case == "weighted",
        )
        trainer.train()
        trained.append(distributed_worker.weights_of(trainer))
    assert_close(trained[0], trained[1], **TOLERANCE)


@pytest.mark.slow
def test_two_machines_equal_one_process(tmp_path, initial_weights):
    """Two launches with the ranks of two machines, one process each, by the configuration that users get."""
    cases, port = ["full first", "momentum"], free_port()
    folders = [tmp_path / name for name in ("first", "second", "one")]
    for folder in folders:
        folder.mkdir()
    machines = [launch(folders[rank], 1, ",".join(cases), machine=(rank, 2), port=port) for rank in (0, 1)]
    try:
        outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    for folder in folders[:2]:
        assert json.loads((folder / "facts.json").read_text())["num_processes"] == 2
    assert not list(folders[1].glob("*.safetensors"))  # only the first machine saves
    distributed_worker.run_cases(folders[2], 2, cases)
    for case in cases:
        one, two = (load_file(folder / f"{case}.safetensors") for folder in (folders[2], folders[0]))
        assert_close(two, one, **TOLERANCE)


@pytest.mark.slow
def test_more_processes_than_samples(tmp_path):
    """Two images for three processes: some are seen twice, and nothing hangs."""
    process = launch(tmp_path, 1, "few images", processes=3)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "facts.json").read_text())["num_processes"] == 3
    weights = load_file(tmp_path / "few images.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if path.stem == "two_nodes" else 1)
    assert config.mixed_precision == "no" and not config.use_cpu


def test_objectives_are_all_among_the_cases():
    assert {options["objective"] for options in distributed_worker.CASES.values()} == set(OBJECTIVES)
