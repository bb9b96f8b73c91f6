"""Evaluation of policies (returns, agreement with the teacher, cost) and the report of a run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import functional_call

from kd.common import losses
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import chance_warning, normalized_return, return_metrics
from kd.common.metrics.verdict import Measurement, is_constant, measure_mean
from kd.common.outputs import EnsembleTeacher, Outputs
from kd.common.reporting.model_card import Card, model_card
from kd.common.reporting.origins import CARD
from kd.common.reporting.report import write_report
from kd.common.utils.files import write_text, writing_folder
from kd.reinforcement_learning.data.environment_ids import view
from kd.reinforcement_learning.data.rollouts import (
    TEST_SEED,
    Episodes,
    play_in,
    predict,
    random_actions,
    returns_of,
    to_outputs,
)
from kd.reinforcement_learning.data.specs import environment_code, fingerprint, registration_code
from kd.reinforcement_learning.student_model.matching import joint, same_actions
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, greedy, greedy_actions, memory_of, sampling
from kd.reinforcement_learning.teacher_model.recipes import folder_name
from kd.reinforcement_learning.teacher_model.run import PolicyRun
from kd.reinforcement_learning.teacher_model.teacher import MODEL, Agent

WORK = ("environment_steps", "observations", "cpu_seconds")  # of a training, in its log
SAMPLED_EPISODES = 20  # with sampled actions; the verdict is on greedy actions
STATES = 20_000  # maximum number of states for the agreement of student and teacher
BOTTLENECK_IMPORT = "import kd.reinforcement_learning.teacher_model.bottleneck  # a part of the student\n"
USAGE = """{imports}import gymnasium
from stable_baselines3 import PPO

folder = "student"  # the path of this model, or huggingface_hub.snapshot_download("OWNER/NAME")
model = PPO.load(f"{{folder}}/student.zip")
environments = gymnasium.make_vec({environment}, num_envs=1)
observations, _ = environments.reset(seed=0)
actions, _ = model.predict(observations, deterministic=True)"""


class PolicyEvaluation(NamedTuple):
    """A model's entry in results.json, its mean return on any of the episodes, and the greedy episodes."""

    entry: dict[str, Any]
    measurement: Measurement
    episodes: Episodes


def evaluate(
    agents: Sequence[Agent],
    environment: str,
    episodes: int,
    network: PolicyNetwork | EnsembleTeacher | None = None,
    teacher: nn.Module | None = None,
) -> PolicyEvaluation:
    """Evaluates a model: the returns of greedy actions, the mean return of sampled actions in up to SAMPLED_EPISODES
    of the episodes, the cost of an action and, with a teacher, the agreement with it in states that the model visits.

    Args:
        agents: one agent, or those of an ensemble.
        network: the network of the ensemble; default: that of the agent.
    """
    network = agents[0].network() if network is None else network
    memory = memory_of(teacher) or memory_of(network)
    played = play_in(environment, greedy(network), episodes, TEST_SEED, memory)
    returns, observations = played.returns, played.observations
    generator = torch.Generator().manual_seed(0)
    count = min(episodes, SAMPLED_EPISODES)
    sampled, _ = returns_of(sampling(network, generator), environment, count, TEST_SEED, memory)
    metrics: dict[str, Any] = return_metrics(returns) | {"return_mean_sampled": float(sampled.mean())}
    metrics["episodes_sampled"] = len(sampled)
    constant = False
    if teacher is not None:
        states = observations[torch.randperm(len(observations), generator=generator)[:STATES]]
        outputs, space = predict(network, states), agents[0].policy.action_space
        metrics |= policy_agreement(outputs, predict(teacher, states), space)
        constant = is_constant(greedy_actions(to_outputs(outputs)).numpy())
    entry = {
        "name": " + ".join(agent.name for agent in agents),
        "observation_statistics": " + ".join(agent.source for agent in agents),
        **cost(network, {"observations": observations[:1].to(network.device), "value": False}),
        "actor_parameters": actor_parameters(network, observations[:1].to(network.device)),
        "metrics": {"test": metrics},
    }
    return PolicyEvaluation(entry, measure_mean(returns, constant), played)


def actor_parameters(network: nn.Module, observations: Tensor) -> int:
    """Number of parameters that the greedy action depends on: without critics, value network and standard deviations
    of actions.
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}
    outputs: Outputs = functional_call(network, weights, (observations,), {"value": False})
    named = {"logits": outputs.logits} | (outputs.features or {})
    actions = [values.sum() for name, values in named.items() if values is not None and name != "log_std"]
    gradients = torch.autograd.grad(torch.stack(actions).sum(), list(weights.values()), allow_unused=True)
    return sum(weight.numel() for weight, used in zip(weights.values(), gradients, strict=True) if used is not None)


def policy_agreement(student: dict[str, Tensor], teacher: dict[str, Tensor], space: spaces.Space) -> dict[str, float]:
    """Compares the outputs of `predict` for the same states. `agreement` is the share of states with the same greedy
    action, in all components, or, for Box actions, 1 - mean |difference| / range. `kl` is KL(teacher || student) if
    both have a distribution.
    """
    if not isinstance(space, spaces.Box):
        divergence = joint("kl", student["logits"], teacher["logits"])
        same = same_actions(student["logits"].argmax(-1), teacher["logits"].argmax(-1))
        return {"agreement": same.float().mean().item(), "kl": divergence.item()}
    student_actions, teacher_actions = (
        np.clip(outputs["mean"].numpy(), space.low, space.high) for outputs in (student, teacher)
    )
    difference = np.abs(student_actions - teacher_actions) / (space.high - space.low)
    metrics = {"agreement": 1 - float(np.mean(difference))}
    if "log_std" in student and "log_std" in teacher:
        divergence = losses.gaussian_kl(student["mean"], student["log_std"], teacher["mean"], teacher["log_std"])
        metrics["kl"] = divergence.item()
    return metrics


def random_metrics(environment: str, action_space: spaces.Space, episodes: int) -> dict[str, Any]:
    """`return_metrics` of random actions."""
    return return_metrics(returns_of(random_actions(action_space), environment, episodes, TEST_SEED)[0])


def random_warning(name: str, teacher: dict[str, Any], random: dict[str, Any]) -> str | None:
    """The warning for a teacher that is no better than random actions, from the `return_metrics` of both."""
    score, chance = teacher["return_mean"], random["return_mean"]
    error = sum(metrics["return_std"] ** 2 / metrics["episodes"] for metrics in (teacher, random)) ** 0.5
    if score <= chance or chance_warning(name, "mean return", score, chance, "random actions", error) is None:
        return chance_warning(name, "mean return", score, chance, "random actions")
    return (
        f"teacher {name} is not clearly better than random actions: its mean return is {score:.4g}, that of random "
        f"actions {chance:.4g}, in {teacher['episodes']} episodes; the standard error of the difference is {error:.3g}"
    )


def return_warning(name: str, stated: float, teacher: dict[str, Any], random: float) -> str | None:
    """The warning for a teacher whose mean return differs from `stated` by more than a tenth of the distance to random
    actions and by more than two standard errors.
    """
    difference = abs(teacher["return_mean"] - stated)
    error = teacher["return_std"] / teacher["episodes"] ** 0.5
    if difference <= max(abs(stated - random) / 10, 2 * error):
        return None
    return (
        f"teacher {name} has a mean return of {teacher['return_mean']:.4g} here, and --teacher_return is {stated:g}: "
        "check --environment and its version, --vecnormalize, --env_kwargs and --wrapper"
    )


def report(
    run: PolicyRun,
    method: str,
    environment: str,
    evaluations: dict[str, PolicyEvaluation],
    random: float,
    student_stage: str | None = None,
    folder: Path | None = None,
    teacher_environment: str | None = None,
) -> None:
    """Writes the report for one environment to `folder` (default: that of the run) and prints its table.

    Args:
        evaluations: results of `evaluate` by role: teacher, student, ... The last mean return in the log of each role
            is added as the split `validation`.
        random: mean return of random actions.
        student_stage: the stage of the student, which is copied to `folder/student`.
        teacher_environment: the environment of the teacher, if the student observes otherwise.
    """
    folder, models = folder or run.folder, {role: evaluation.entry for role, evaluation in evaluations.items()}
    history = _history(run, environment)
    for role in models.keys() & history.keys():
        models[role]["metrics"]["validation"] = {"return_mean": history[role][-1]["eval_return_mean"]}
    teacher = models["teacher"]["metrics"]["test"]
    for entry in models.values():
        metrics = entry["metrics"]["test"]
        metrics["normalized_return"] = normalized_return(metrics["return_mean"], random, teacher["return_mean"])
    work = {role: {name: log[-1][name] for name in WORK if name in log[-1]} for role, log in history.items()}
    extra: dict[str, Any] = {"work": {role: done for role, done in work.items() if role in models and done}}
    sizes = {role: entry["actor_parameters"] for role, entry in models.items()}
    extra["actors"] = {
        role: {"parameters": size, "share_of_the_teacher": size / sizes["teacher"]} for role, size in sizes.items()
    }
    statistics = models["teacher"]["observation_statistics"]
    if run.notes:
        extra["inferred"] = "; ".join(run.notes)
    if teacher_environment and (observed := view(teacher_environment, environment)):
        extra |= {"teacher_environment": teacher_environment, "student_observation": observed}
    results = run.results(
        domain="reinforcement-learning",
        task=environment,
        method=method,
        data={
            "train": work.get("student", {}).get("observations"),
            "validation": run.args.eval_episodes,
            "test": teacher["episodes"],
            "fingerprint": fingerprint(environment),
            "units": {"train": "observations", "validation": "episodes", "test": "episodes"},
        },
        models=models,
        split="test",
        metric="return_mean",
        measurements={role: evaluation.measurement for role, evaluation in evaluations.items()},
        floor=random,
        chance=random,
        return_of_random_actions=random,
        selection="the policy after the last update; no evaluation chose anything",
        **extra,
        teacher_observation_statistics=statistics if statistics != "none" else "observations are not normalized",
    )
    if student_stage:
        _save_student(run, student_stage, folder / "student", results)
    write_report(folder, results, history, progress="environment_steps")
    run.show(results, folder)


def _save_student(run: PolicyRun, stage: str, folder: Path, results: dict[str, Any]) -> None:
    environment = results["task"]
    with writing_folder(folder) as partial:
        shutil.copy(run.folder / "stages" / stage / folder_name(environment) / MODEL, partial / "student.zip")
        teacher_environment = results.get("teacher_environment", environment)
        write_text(partial / CARD, model_card(results, _card_of(run, environment, teacher_environment)))


def _card_of(run: PolicyRun, environment: str, teacher_environment: str) -> Card:
    modules = "".join(f"import {module}\n" for module in run.argument("import_module"))
    imports = modules + registration_code(environment) + (BOTTLENECK_IMPORT if run.argument("codebooks") else "")
    teachers = dict(zip(run.argument("environment"), run.argument("teacher"), strict=True))
    names = [teachers[teacher_environment], *run.argument("ensemble_teachers")]
    return Card(
        USAGE.format(imports=imports, environment=environment_code(environment)),
        library_name="stable-baselines3",
        pipeline_tag="reinforcement-learning",
        origins=[name for name in names if name != "train"],
        tags=["deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", environment],
    )


def _history(run: PolicyRun, environment: str) -> dict[str, list[dict[str, Any]]]:
    """The logs of one environment, with its mean return as `eval_return_mean`, which is plotted."""
    name = run.curve_name(environment)
    logs = {stage: [entry for entry in log if name in entry] for stage, log in run.history.items()}
    return {stage: [entry | {"eval_return_mean": entry[name]} for entry in log] for stage, log in logs.items() if log}
