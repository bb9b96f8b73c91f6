"""Distils a game into a student, then a second one without data of the first, and measures what is left of the first.

    python benchmarks/policy_streams.py --cartpole rl-trained-agents/ppo/CartPole-v1_1 \\
        --acrobot rl-trained-agents/ppo/Acrobot-v1_1

Three pairs of games: CartPole, then Acrobot, in the same padded observations; CartPole, then CartPole with mirrored
actions, which one observed number marks; and the same without that number, where both games have the same states.

The students are an MLP and a discrete key-value bottleneck, distilled with DAgger by the project's `Distiller`. In the
second game only the values of a bottleneck are trained: its decoder and heads are those after the first game. Its keys
are fitted before training to observations of the first game, to random numbers in the scale of the first game, or to
observations of both games. Counted values are counts of the teacher's greedy actions at each key. The controls are
the MLP in the same sequence, with 1 % of the first game's observations in the buffer of the second, and with both
games at once. Sizes and learning rates were chosen with seed 0, which is not measured.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from policy_games import ENVIRONMENTS, Game, pairs
from torch import Tensor, nn
from tqdm.auto import tqdm

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.cli import Parser, run
from kd.common.metrics.verdict import verdict_of_gains
from kd.common.outputs import Outputs
from kd.common.reporting.tables import gain_with_interval, markdown, mean_and_deviation
from kd.common.utils.files import write_text
from kd.reinforcement_learning.data.environments import training_environments
from kd.reinforcement_learning.data.rollouts import TEST_SEED, Observations, Recorder, returns_of
from kd.reinforcement_learning.student_model.arguments import DistillArguments, StudentArguments
from kd.reinforcement_learning.student_model.distillation import DistillationTask, Distiller
from kd.reinforcement_learning.student_model.student import StudentNetwork, new_student
from kd.reinforcement_learning.teacher_model.bottleneck import BottleneckFeatures, moments
from kd.reinforcement_learning.teacher_model.policies import greedy, sampling
from kd.reinforcement_learning.teacher_model.recipes import training_recipe

CODEBOOKS, CODEBOOK_SIZE, KEY_DIM = 8, 512, 16  # a key wider than an observation preserves distances
MLP = StudentArguments(student=[64, 64])
BOTTLENECK = StudentArguments(student=[], codebooks=CODEBOOKS, codebook_size=CODEBOOK_SIZE, key_dim=KEY_DIM)
RATE, VALUE_RATE = 0.01, 0.1  # learning rates, of the MLP and of students with a bottleneck
SPREAD = 2.0  # of random numbers to which keys are fitted, in standard deviations of the first game
REPLAYED = 0.01  # share of the first game's observations
Record = dict[str, Any]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--cartpole", required=True, help="Teacher of CartPole-v1: a zip or folder.")
    parser.add_argument("--acrobot", required=True, help="Teacher of Acrobot-v1: a zip or folder.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--steps", type=int, default=10_000, help="Environment steps in each game.")
    parser.add_argument("--updates", type=int, default=100, help="Number of updates in each of 5 rounds.")
    parser.add_argument("--key_rows", type=int, default=4_000, help="Observations of a game that keys are fitted to.")
    parser.add_argument("--episodes", type=int, default=20, help="Test episodes of each game.")
    parser.add_argument("--output", default="policy_streams.json", help="File of all figures; .md has the tables.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = list[Record]()
    games_of = pairs(args.cartpole, args.acrobot)
    for seed in tqdm(range(1, args.seeds + 1), desc="seeds"):
        for title, games in games_of.items():
            torch.manual_seed(seed)
            records += [{"pair": title, "seed": seed} | record for record in Study(games, args, seed).students()]
            write_text(args.output, json.dumps({"arguments": vars(args), "records": records}, indent=1))
    tables = "\n\n".join(f"{title}\n\n{table(records, title)}" for title in games_of)
    write_text(args.output.removesuffix(".json") + ".md", tables + "\n")
    print(tables)


class Study:
    """The students of one pair of games, with one seed."""

    def __init__(self, games: tuple[Game, Game], args: Any, seed: int) -> None:
        self.games, self.episodes, self.seed = games, args.episodes, seed
        self.args = DistillArguments(steps=args.steps, rounds=5, updates=args.updates, num_envs=ENVIRONMENTS)
        first, second = (game.observations(args.key_rows, seed) for game in games)
        mean, std = moments(first)
        self.rows = {"game 1": first, "random": mean + SPREAD * std * torch.randn(2 * args.key_rows, len(mean))}
        self.rows["both"] = torch.cat([first, second])

    def students(self) -> Iterator[Record]:
        """The figures of each student. The MLP in sequence, the control of the others, is the first."""
        mlp = self.new(MLP, "game 1")
        seen = self.distil(mlp, self.games[:1])
        kept = seen[torch.randperm(len(seen))[: max(1, round(REPLAYED * len(seen)))]]
        yield self.sequence("MLP", mlp)
        yield self.sequence("MLP, 1 % replay", mlp, replay=kept)
        joint = self.new(MLP, "both")
        self.distil(joint, self.games)
        yield {"student": "MLP, both games at once", "before": None, "after": self.play(joint), "changed": None}
        for keys in self.rows:
            student = self.new(BOTTLENECK, keys)
            self.distil(student, self.games[:1])
            yield self.sequence(f"bottleneck, keys: {keys}", only_values(copy.deepcopy(student)))
        yield self.sequence("bottleneck, keys: both; all layers trained", student)
        counted = Counted(self.rows["both"], self.games[0].teacher.actions)
        counted.add(self.games[0], self.args, self.seed)
        yield self.sequence("counted values, keys: both", counted)

    def new(self, args: StudentArguments, keys: str) -> StudentNetwork:
        """An untrained student, with statistics and keys of the named observations."""
        with closing(training_environments(self.games[0].environment, 1, self.seed)) as environments:
            model = new_student(environments, args, training_recipe("ppo", "any"), self.seed)
        student = StudentNetwork(model.policy, None)
        student.prepare(self.rows[keys])
        return student

    def distil(self, student: StudentNetwork, games: tuple[Game, ...], replay: Tensor | None = None) -> Tensor:
        """Distils games into a student, each with as many updates. Returns the observations of the first of them.
        `replay`: observations of game 1 that are in the buffer from the start.
        """
        rate = VALUE_RATE if isinstance(student.policy.features_extractor, BottleneckFeatures) else RATE
        args = replace(self.args, steps=self.args.steps * len(games), learning_rate=rate)
        tasks = []
        for game in games:
            environments = game.environments(self.seed)
            buffer = Observations(2 * args.steps, environments.observation_space.shape or (), torch.float32)
            if replay is not None:
                buffer.append(replay, self.games[0].teacher)
            tasks.append(DistillationTask(Recorder(environments), game.teacher, student, buffer))
        with TemporaryDirectory() as folder:
            Distiller(tasks, args, Path(folder), self.seed).learn(dict)
        for task in tasks:
            task.recorder.environments.close()
        return tasks[0].buffer.observations[: len(tasks[0].buffer)]

    def sequence(self, name: str, student: "StudentNetwork | Counted", replay: Tensor | None = None) -> Record:
        """Continues a copy of a student of game 1 in game 2."""
        after = copy.deepcopy(student)
        if isinstance(after, Counted):
            after.add(self.games[1], self.args, self.seed)
        else:
            self.distil(after, self.games[1:], replay)
        before, states = self.play_game(student, self.games[0])
        with torch.inference_mode():
            logits, now = (one(states, value=False).logits for one in (student, after))
        changed = (logits != now).any(1).float().mean().item()
        return {"student": name, "before": before, "after": self.play(after), "changed": changed}

    def play(self, student: nn.Module) -> list[Record]:
        return [self.play_game(student, game)[0] for game in self.games]

    def play_game(self, student: nn.Module, game: Game) -> tuple[Record, Tensor]:
        """The mean return, the share of the visited states with the teacher's greedy action, and these states."""
        returns, states = returns_of(greedy(student), game.environment, self.episodes, TEST_SEED)
        same = greedy(student)(states) == greedy(game.teacher)(states)
        return {"return": float(returns.mean()), "agreement": same.float().mean().item()}, states


def only_values(student: StudentNetwork) -> StudentNetwork:
    """Freezes everything but the values of a bottleneck."""
    assert isinstance(student.policy.features_extractor, BottleneckFeatures)
    values = student.policy.features_extractor.bottleneck.values
    for parameter in student.parameters():
        parameter.requires_grad_(parameter is values)
    return student


class Counted(nn.Module):
    """A policy whose values count the teacher's greedy actions, with keys fitted to observations (rows, width)."""

    def __init__(self, observations: Tensor, actions: int) -> None:
        super().__init__()
        self.mean, self.std = moments(observations)
        sizes = CODEBOOKS, CODEBOOK_SIZE, "projection", KEY_DIM, "mean"
        self.bottleneck = DiscreteKeyValueBottleneck(len(self.mean), actions, *sizes, values="counted")
        self.bottleneck.fit_keys(self.standardized(observations))

    def standardized(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std

    def forward(self, observations: Tensor, value: bool = True) -> Outputs:
        return Outputs(logits=self.bottleneck(self.standardized(observations)))

    def add(self, game: Game, args: DistillArguments, seed: int) -> None:
        """Adds the observations of a game, collected as for the other students: first by the teacher, then by this."""
        generator = torch.Generator().manual_seed(seed)
        with closing(game.environments(seed)) as environments:
            recorder = Recorder(environments)
            for number in range(args.rounds):
                act = sampling(self if number else game.teacher, generator)
                rows = recorder.collect(act, args.steps // args.rounds)
                self.bottleneck.add(self.bottleneck.encode(self.standardized(rows)), greedy(game.teacher)(rows))


def table(records: list[Record], pair: str) -> str:
    """Means over the seeds; changes and gains with their 95 % intervals (paired t over the seeds)."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["pair"] == pair:
            groups[record["student"]].append(record)
    control = [record["after"][0]["return"] for record in groups["MLP"]]
    rows = []
    for name, group in groups.items():
        first, second = ([record["after"][game]["return"] for record in group] for game in (0, 1))
        paired = [record for record in group if record["before"]]
        before = [record["before"]["return"] for record in paired]
        change = [after - one for after, one in zip(first, before, strict=False)]
        gain = [one - other for one, other in zip(first, control, strict=True)]
        agreements = [[record["before"]["agreement"] for record in paired]]
        agreements += [[record["after"][game]["agreement"] for record in group] for game in (0, 1)]
        changed = mean_and_deviation([record["changed"] for record in paired])
        rows.append([name, mean_and_deviation(before), mean_and_deviation(first), interval(change)])
        rows[-1] += [
            interval(gain) if name != "MLP" else "–",
            mean_and_deviation(second),
            changed,
            *map(mean_and_deviation, agreements),
        ]
    header = ["student", "game 1", "after game 2", "change", "gain over the MLP", "game 2", "states with other logits"]
    return markdown([*header, "agreement, game 1", "after game 2", "agreement, game 2"], rows)


def interval(gains: list[float]) -> str:
    return gain_with_interval(verdict_of_gains(gains), 1) if gains else "–"


if __name__ == "__main__":
    run(main)
