"""Where the time of a training step goes, by operator."""

from benchmark_steps import BARE, CASES, add_step_options, build_trainers, one_step
from torch.profiler import ProfilerActivity, profile


def profile_case(args):
    (trainer,) = build_trainers(args, [args.case]).values()
    trainer.train()
    step = one_step(trainer, args.batch_size)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(args.steps):
            step()
    key = f"self_{args.device}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key.replace("cuda", "device")))
    total = sum(getattr(event, key.replace("cuda", "device")) for event in events)
    print("| operator | share of the time | calls per step |\n|---|---|---|")
    for event in events[: args.rows]:
        share = getattr(event, key.replace("cuda", "device")) / total
        print(f"| {event.key} | {share:.1%} | {event.count / args.steps:g} |")


def add_parser(subparsers):
    parser = subparsers.add_parser("profile", help="where the time of a training step goes, by operator")
    add_step_options(parser)
    parser.add_argument("--case", choices=[case for case in CASES if case != BARE], default="momentum")
    parser.add_argument("--rows", type=int, default=12, help="Operators to list.")
    parser.set_defaults(run=profile_case, rounds=1)
