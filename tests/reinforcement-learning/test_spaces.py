"""Dict, Discrete, MultiDiscrete and MultiBinary observations, frames with the channels last, and actions of several
components, compared with Stable-Baselines3.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import maybe_transpose, preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize
from torch.distributions import kl_divergence as kl

from kd.common.export.onnx import OnnxModel, load_program
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data.environments import Environments, to_environment, training_environments
from kd.reinforcement_learning.data.observations import BoxObservation, box_space, from_box, to_box
from kd.reinforcement_learning.student_model.evaluation import policy_agreement
from kd.reinforcement_learning.student_model.matching import joint
from kd.reinforcement_learning.student_model.ppd import PPD, _distribution
from kd.reinforcement_learning.teacher_model.files import TeacherFiles
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork, greedy, sampled_actions
from kd.reinforcement_learning.teacher_model.recipes import training_recipe
from kd.reinforcement_learning.teacher_model.saved_policy import _check_space
from kd.reinforcement_learning.teacher_model.teacher import Agent
from kd.reinforcement_learning.teacher_model.training import new_teacher
from kd_testing.known_answer import KnownAnswerSpaces
from kd_testing.paths import REPO
from kd_testing.readmes import run_readme, run_readme_alone
from kd_testing.scripts import run_script

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
SPACES = KnownAnswerSpaces.OBSERVATIONS
VECTORS = [kind for kind in SPACES if kind != "frames"]


def extracted(space: gym.Space, observations) -> np.ndarray:
    """The features that the policy of Stable-Baselines3 computes from a batch of observations."""
    batch = (
        {key: torch.as_tensor(values) for key, values in observations.items()}
        if isinstance(space, Dict)
        else torch.as_tensor(observations)
    )
    extractor = CombinedExtractor(space) if isinstance(space, Dict) else FlattenExtractor(space)
    return extractor(preprocess_obs(batch, space)).numpy()


def twins(id: str, count: int, mode: AutoresetMode) -> tuple[Environments, gym.vector.VectorEnv]:
    """Our environments, and the original ones with the same seeds."""
    original = gym.make_vec(id, count, "sync", {"autoreset_mode": mode})
    return Environments(id, count, 7, autoreset=mode), original


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP])
@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_are_those_of_stable_baselines3(kind, mode):
    environments, original = twins(f"{kind}Discrete-v0", 3, mode)
    observations, _ = original.reset(seed=7)
    assert environments.original_space == original.single_observation_space == SPACES[kind]
    space = environments.observation_space
    assert space == box_space(SPACES[kind]) and len(space.shape) == 1
    assert space.dtype == (np.float32 if kind == "Dict" else np.uint8)
    for _ in range(25):
        expected = extracted(SPACES[kind], observations)
        np.testing.assert_array_equal(environments.observations, expected)
        assert environments.observations.dtype == space.dtype
        assert all(row in space for row in environments.observations)
        actions = original.action_space.sample()
        step = environments.step(actions)
        observations, rewards, _, truncated, infos = original.step(actions)
        np.testing.assert_array_equal(step.rewards, rewards)
        if mode == SAME_STEP and truncated.any():
            final = (
                [np.stack([one[key] for one in infos["final_obs"]]) for key in SPACES[kind]] if kind == "Dict" else []
            )
            batch = dict(zip(SPACES["Dict"], final, strict=True)) if final else np.stack(infos["final_obs"])
            np.testing.assert_array_equal(step.final_observations, extracted(SPACES[kind], batch))


@pytest.mark.parametrize("id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1"])
def test_discrete_observations_of_gymnasium(id):
    environments, original = twins(id, 2, NEXT_STEP)
    observations, _ = original.reset(seed=7)
    np.testing.assert_array_equal(environments.observations.argmax(1), observations)
    np.testing.assert_array_equal(environments.observations.sum(1), 1)


def test_tuple_observations_are_flattened_by_the_wrapper_that_the_error_names():
    environments = Environments("Blackjack-v1+gymnasium.wrappers:FlattenObservation", 2)
    assert environments.observations.shape == (2, 32 + 11 + 2) and environments.original_space.dtype == np.int64


def test_frames_with_channels_last():
    environments, original = twins("framesDiscrete-v0", 2, SAME_STEP)
    observations, _ = original.reset(seed=7)
    assert environments.observation_space == Box(0, 255, (3, 40, 36), np.uint8)
    for _ in range(10):
        np.testing.assert_array_equal(
            environments.observations, maybe_transpose(observations, environments.observation_space)
        )
        step = environments.step([0, 1])
        observations, *_, infos = original.step(np.array([0, 1]))
    final = maybe_transpose(np.stack(infos["final_obs"]), environments.observation_space)
    np.testing.assert_array_equal(step.final_observations, final)


@pytest.mark.parametrize("kind", SPACES)
def test_batches_are_converted_and_back(kind):
    observations = sampled(kind)
    tensors = (
        {key: torch.as_tensor(part) for key, part in observations.items()}
        if isinstance(observations, dict)
        else torch.as_tensor(observations)
    )
    rows = to_box(tensors, SPACES[kind])
    torch.testing.assert_close(rows, as_box(kind, observations), rtol=0, atol=0)
    again = from_box(rows.numpy(), SPACES[kind])
    pairs = [(again, observations)] if kind != "Dict" else [(again[key], observations[key]) for key in SPACES[kind]]
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == expected.dtype


def test_vector_entry_point_with_other_observations_is_not_used(monkeypatch):
    monkeypatch.setattr(gym.registry["DictDiscrete-v0"], "vector_entry_point", vectorized)
    assert isinstance(Environments("DictDiscrete-v0", 2).vector.envs[0], BoxObservation)


def vectorized(num_envs: int, **kwargs) -> gym.vector.VectorEnv:
    return gym.vector.SyncVectorEnv([lambda: KnownAnswerSpaces("Dict", "Discrete")] * num_envs)


# Policies of Stable-Baselines3


def original(kind: str, actions: str) -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make(f"{kind}{actions}-v0")] * 2)


def sampled(kind: str, rows: int = 30) -> Any:
    """A batch of observations of the original environment."""
    environment = gym.make_vec(f"{kind}Discrete-v0", rows, "sync")
    return environment.reset(seed=5)[0]


def as_box(kind: str, observations: Any) -> torch.Tensor:
    if kind == "frames":
        return torch.as_tensor(maybe_transpose(observations, box_space(SPACES[kind])))
    return torch.as_tensor(extracted(SPACES[kind], observations))


ALGORITHMS = {"ppo": PPO, "a2c": A2C, "dqn": DQN, "sac": SAC, "td3": TD3}
ALGORITHMS |= {"trpo": TRPO, "maskable ppo": MaskablePPO, "tqc": TQC, "qrdqn": QRDQN, "crossq": CrossQ}
POLICY = {"Dict": "MultiInputPolicy", "frames": "CnnPolicy"}
SMALL = {"net_arch": [16]}


def untrained(
    algorithm: str, kind: str, actions: str, environments: VecEnv | None = None, **kwargs: Any
) -> BaseAlgorithm:
    environments = environments or original(kind, actions)
    chosen: Any = ALGORITHMS[algorithm]
    kwargs |= {"buffer_size": 10} if issubclass(chosen, OffPolicyAlgorithm) else {}
    return chosen(
        POLICY.get(kind, "MlpPolicy"), environments, policy_kwargs=dict(SMALL), device="cpu", seed=1, **kwargs
    )


def load(path: Path, kind: str, actions: str, statistics: Path | None = None) -> Agent:
    return Agent.load(TeacherFiles(path, statistics), SPACES[kind], KnownAnswerSpaces.ACTIONS[actions])


@pytest.mark.parametrize(
    ("algorithm", "kind", "actions"),
    [
        *(("ppo", kind, "Discrete") for kind in VECTORS),
        ("dqn", "Discrete", "Discrete"),
        ("dqn", "Dict", "Discrete"),
        ("a2c", "Dict", "Box"),
        ("sac", "Dict", "Box"),
        ("td3", "Dict", "Box"),
        ("tqc", "Dict", "Box"),
        ("crossq", "MultiBinary", "Box"),
        ("qrdqn", "MultiDiscrete", "Discrete"),
        ("maskable ppo", "Dict", "MultiDiscrete"),
        ("trpo", "MultiBinary", "MultiBinary"),
        ("ppo", "frames", "Discrete"),
        *(
            (algorithm, "Dict", actions)
            for algorithm in ("ppo", "a2c")
            for actions in ("MultiDiscrete", "MultiBinary")
        ),
    ],
)
def test_loaded_policy_acts_as_in_stable_baselines3(algorithm, kind, actions, tmp_path):
    model = untrained(algorithm, kind, actions)
    model.save(tmp_path / "model.zip")
    network = load(tmp_path / "model.zip", kind, actions).network()
    observations = sampled(kind)
    expected, _ = model.predict(observations, deterministic=True)
    ours = to_environment(greedy(network)(as_box(kind, observations)), KnownAnswerSpaces.ACTIONS[actions])
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("continuous", [False, True])
def test_agents_of_goals_act_as_in_stable_baselines3(continuous, tmp_path):
    """Hindsight experience replay, with Dict observations of a goal."""
    environment = BitFlippingEnv(n_bits=4, continuous=continuous)
    chosen: Any = SAC if continuous else DQN
    kwargs = {
        "replay_buffer_class": HerReplayBuffer,
        "buffer_size": 100,
        "policy_kwargs": dict(SMALL),
        "device": "cpu",
    }
    model = chosen("MultiInputPolicy", environment, **kwargs)
    model.save(tmp_path / "model.zip")
    agent = Agent.load(TeacherFiles(tmp_path / "model.zip", None), environment.observation_space, model.action_space)
    for _ in range(8):
        observation = environment.observation_space.sample()
        rows = np.concatenate([observation[key] for key in ("achieved_goal", "desired_goal", "observation")])
        ours = greedy(agent.network())(torch.as_tensor(rows, dtype=torch.float32)[None])[0]
        np.testing.assert_allclose(ours, model.predict(observation, deterministic=True)[0], atol=1e-5)


def test_statistics_of_keys_are_those_of_vec_normalize(tmp_path):
    """With statistics of one key, as saved by the environment, and the clip reached."""
    environments = VecNormalize(original("Dict", "Discrete"), norm_obs_keys=["position"], clip_obs=0.5)
    model = untrained("ppo", "Dict", "Discrete", environments, n_steps=8, batch_size=8)
    model.learn(32)
    model.save(tmp_path / "model.zip"), environments.save(str(tmp_path / "vecnormalize.pkl"))
    agent = load(tmp_path / "model.zip", "Dict", "Discrete", tmp_path / "vecnormalize.pkl")
    observations = sampled("Dict")
    normalized = environments.normalize_obs(observations)
    assert (np.abs(normalized["position"]) == 0.5).any()
    tensors, _ = model.policy.obs_to_tensor(normalized)
    logits = agent.network()(as_box("Dict", observations)).logits
    expected = model.policy.get_distribution(tensors).distribution.logits
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "written",
    [
        "{'a': Discrete(3), 'goal': Box([-1. -1.], [1.\n 1.], (2,), float32), 'm': MultiDiscrete([2 3])}",
        "OrderedDict([('a', Discrete(3)), ('goal', Box(-1.0, 1.0, (2,), float32)), ('m', MultiDiscrete([2 3]))])",
        "OrderedDict([('a', Discrete(3)), ('goal', Box(2,)), ('m', MultiDiscrete([2 3]))])",
    ],
    ids=["gymnasium", "gym", "old gym"],
)
def test_written_dicts_of_all_versions_are_compared(written):
    space = Dict({"m": MultiDiscrete([2, 3]), "goal": Box(-9, 9, (2,)), "a": Discrete(3)})
    saved = {":type:": "<class 'gym.spaces.dict.Dict'>", "spaces": written}
    _check_space(Path("model.zip"), "observations", saved, space)
    for other in Dict({**space, "goal": Box(-9, 9, (3,))}), Dict({**space, "m": MultiDiscrete([3, 3])}):
        with pytest.raises(UserError, match="was trained for observations Dict a: Discrete"):
            _check_space(Path("model.zip"), "observations", saved, other)


def test_agent_of_other_keys_raises_an_error(tmp_path):
    untrained("ppo", "Dict", "Discrete").save(tmp_path / "model.zip")
    spaces = {
        "position": Box(0, 1, (1, 3)),
        **{key: part for key, part in SPACES["Dict"].items() if key != "position"},
    }
    with pytest.raises(
        UserError, match=r"low: MultiBinary\(1\).*position: Box\(1, 2\), but the environment has Dict .*1, 3"
    ):
        Agent.load(TeacherFiles(tmp_path / "model.zip", None), Dict(spaces), Discrete(3))
    with pytest.raises(UserError, match=r"observations Dict .* but the environment has Discrete 6"):
        load(tmp_path / "model.zip", "Discrete", "Discrete")


@pytest.mark.parametrize("kind", ["Dict", "Discrete"])
def test_teacher_with_vec_normalize_is_trained_and_loaded(kind, tmp_path):
    """Its zip and its statistics are those of the vector."""
    changes = {"steps": 32, "environments": 2, "n_steps": 8, "batch_size": 8, "normalize": True}
    model = new_teacher(f"{kind}Discrete-v0", training_recipe("ppo", "Any-v0", changes), seed=0)
    model.learn(32)
    agent = Agent.trained("teacher", model)
    agent.save_pretrained(tmp_path)
    again = load(tmp_path / "model.zip", kind, "Discrete", tmp_path / "vecnormalize.pkl")
    rows = as_box(kind, sampled(kind))
    logits = agent.network()(rows).logits
    torch.testing.assert_close(again.network()(rows).logits, logits)
    normalized = torch.as_tensor(model.get_vec_normalize_env().normalize_obs(rows.numpy()))
    expected = model.policy.get_distribution(normalized).distribution.logits
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SPACES)
def test_saved_models_act_on_the_original_observations(kind, tmp_path):
    """Also after the training here, and after another one in Stable-Baselines3."""
    environments = training_environments(f"{kind}Discrete-v0", 2, 0)
    kwargs = {"n_steps": 8, "batch_size": 8, "n_epochs": 1}
    policy = "CnnPolicy" if kind == "frames" else "MlpPolicy"
    model = PPO(policy, environments, policy_kwargs=dict(SMALL), device="cpu", seed=0, **kwargs)
    model.learn(16)
    agent = Agent.trained("teacher", model)
    agent.save_pretrained(tmp_path)
    loaded = PPO.load(tmp_path / "model.zip", original(kind, "Discrete"), device="cpu")
    assert loaded.observation_space == (box_space(SPACES[kind]) if kind == "frames" else SPACES[kind])
    observations = sampled(kind)
    ours = greedy(agent.network())(as_box(kind, observations))
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], ours)
    again = load(tmp_path / "model.zip", kind, "Discrete")
    torch.testing.assert_close(greedy(again.network())(as_box(kind, observations)), ours)
    before = loaded.policy.state_dict()["action_net.weight"].clone()
    loaded.learn(16)
    assert not torch.equal(loaded.policy.state_dict()["action_net.weight"], before)


# Actions of several components


COMPONENTS = ("MultiDiscrete", "MultiBinary")


def policies(actions: str, *seeds: int) -> list[ActorCriticPolicy]:
    """Untrained policies with clear preferences."""
    space = KnownAnswerSpaces.ACTIONS[actions]
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        policy = ActorCriticPolicy(box_space(SPACES["Discrete"]), space, lambda _: 0.0)
        torch.nn.init.normal_(policy.action_net.get_parameter("weight"))
        found.append(policy)
    return found


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.eye(6).repeat(5, 1) + torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) / 4


@pytest.mark.parametrize("actions", COMPONENTS)
def test_distribution_is_that_of_stable_baselines3(actions, rows):
    """Probabilities, entropy and KL of the joint distribution."""
    first, second = policies(actions, 0, 1)
    ours, other = (PolicyNetwork(policy)(rows) for policy in (first, second))
    theirs, their_other = (policy.get_distribution(rows) for policy in (first, second))
    sampled = theirs.sample()
    with torch.no_grad():
        torch.testing.assert_close(_distribution(ours).log_prob(sampled), theirs.log_prob(sampled))
        torch.testing.assert_close(_distribution(ours).entropy(), theirs.entropy())
        expected = kl_divergence(their_other, theirs)
        expected = expected if expected.dim() == 1 else expected.sum(-1)
        torch.testing.assert_close(kl(_distribution(other), _distribution(ours)), expected)
        torch.testing.assert_close(joint("kl", ours.logits, other.logits), expected.mean())
        greedy_ones = their_other.mode()
        torch.testing.assert_close(joint("nll", ours.logits, other.logits), -theirs.log_prob(greedy_ones).mean())
        same = (first._predict(rows, True) == greedy_ones).all(1).float().mean()
    metrics = policy_agreement(*({"logits": outputs.logits.detach()} for outputs in (ours, other)), first.action_space)
    assert metrics == pytest.approx({"agreement": same.item(), "kl": expected.mean().item()})
    assert 0 < same < 1


@pytest.mark.parametrize("actions", COMPONENTS)
def test_sampled_actions_have_the_probabilities_of_the_components(actions, rows):
    (policy,) = policies(actions, 0)
    outputs = PolicyNetwork(policy)(rows[:1].repeat(20_000, 1))
    found = sampled_actions(outputs, torch.Generator().manual_seed(0))
    expected = policy.get_distribution(rows[:1])
    assert len(np.unique(found.numpy(), axis=0)) > 3
    for action in KnownAnswerSpaces.ACTIONS[actions].sample()[None], *found[:3, None].numpy():
        share = (found == torch.as_tensor(action)).all(1).float().mean()
        probability = expected.log_prob(torch.as_tensor(action).float()).exp()[0]
        assert share == pytest.approx(probability.item(), abs=0.015)


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_padding_and_temperature_do_not_change_the_regression_of_logits(loss, rows):
    """Components have 3 and 2 categories."""
    first, second = policies("MultiDiscrete", 0, 1)
    teacher = PolicyNetwork(second)
    teacher.temperature = 3.0
    found = joint(loss, PolicyNetwork(first)(rows).logits, teacher(rows).logits)
    plain = [policy.action_net(policy.mlp_extractor.forward_actor(rows)) for policy in (first, second)]
    function = torch.nn.functional.mse_loss if loss == "mse" else torch.nn.functional.huber_loss
    torch.testing.assert_close(found, function(plain[0], plain[1] / 3))


@pytest.mark.parametrize("actions", COMPONENTS)
def test_ppd_without_teacher_weight_is_ppo(actions):
    """The same weights and entropies as PPO after two rollouts."""
    id, settings = f"Dict{actions}-v0", {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "ent_coef": 0.1, "seed": 0}
    ppo = PPO("MlpPolicy", training_environments(id, 2, 0), device="cpu", **settings).learn(64)
    teacher = PolicyNetwork(PPO("MlpPolicy", training_environments(id, 1, 0), device="cpu").policy)
    ppd = PPD(
        "MlpPolicy", training_environments(id, 2, 0), teacher=teacher, teacher_weight=0.0, device="cpu", **settings
    )
    ppd.learn(64)
    for name, value in ppo.policy.state_dict().items():
        torch.testing.assert_close(value, ppd.policy.state_dict()[name], rtol=0, atol=1e-6)
    found, expected = (model.logger.name_to_value["train/entropy_loss"] for model in (ppd, ppo))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("onnx_operators_once")
@pytest.mark.parametrize(
    ("kind", "actions", "format"),
    [
        ("Dict", "MultiDiscrete", "onnx"),
        ("Discrete", "MultiBinary", "onnx"),
        pytest.param("MultiDiscrete", "Discrete", "onnx", marks=pytest.mark.slow),
        pytest.param("MultiBinary", "Box", "onnx", marks=pytest.mark.slow),
        pytest.param("frames", "Discrete", "onnx", marks=pytest.mark.slow),
        pytest.param("Dict", "MultiBinary", "torch.export", marks=pytest.mark.slow),
        pytest.param("Discrete", "MultiDiscrete", "torch.export", marks=pytest.mark.slow),
    ],
)
def test_export_maps_original_observations_to_the_actions_of_predict(kind, actions, format, tmp_path, capsys):
    model = untrained("ppo", kind, actions)
    layers = "action_net" if kind == "frames" else ("action_net", "mlp_extractor.policy_net")
    for name, weight in model.policy.named_parameters():  # so that the actions depend on the observations
        if name.startswith(layers) and name.endswith("weight"):
            torch.nn.init.normal_(weight)
    model.save(tmp_path / "model.zip")
    task = f"kd_testing.known_answer:{kind}{actions}-v0"
    words = ["--domain", "reinforcement-learning", "--task", task, "--format", format]
    run_script("common/export/__main__.py", tmp_path / "model.zip", *words)
    observations = sampled(kind)
    named = observations if kind == "Dict" else {"observations": observations}
    tensors = {name: torch.as_tensor(part) for name, part in named.items()}
    if format == "onnx":
        found = OnnxModel(tmp_path / "export" / "model.onnx").predict(**tensors).numpy()
    else:
        found = load_program(tmp_path / "export" / "model.pt2")(*tensors.values()).detach().numpy()
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(found, axis=0)) > 1
    capsys.readouterr()
    assert run_readme(tmp_path / "export", "stable_baselines3")["actions"].shape == (2, *expected.shape[1:])


# Runs


SHORT = (
    "--steps 600 --rounds 2 --updates 60 --episodes 10 --eval_episodes 2 --num_envs 4 --student 16 --report_to none"
)
TEACHER = ["--teacher_steps", 512, "--hyperparameters", '{"environments": 4, "n_steps": 32, "batch_size": 32}']


def distill(*words: object) -> dict[str, Any]:
    """The results of a run in the folder `run`."""
    script = "reinforcement-learning/scripts/distill_policy.py"
    run_script(script, *SHORT.split(), "--output_dir", "run", *words)
    return read_json("run/results.json")


@pytest.mark.parametrize(
    ("kind", "actions", "words"),
    [
        ("Dict", "MultiDiscrete", ["--no_control"]),
        pytest.param("Dict", "MultiBinary", ["--method", "ppd"], marks=pytest.mark.slow),
        pytest.param("Dict", "Discrete", ["--codebooks", 4, "--no_control"], marks=pytest.mark.slow),
        pytest.param("MultiDiscrete", "MultiBinary", ["--loss", "mse", "--no_control"], marks=pytest.mark.slow),
        pytest.param("MultiBinary", "Box", ["--no_control"], marks=pytest.mark.slow),
        pytest.param("frames", "MultiDiscrete", ["--channels", 4, 4, 4, "--no_control"], marks=pytest.mark.slow),
    ],
)
def test_student_of_a_run_acts_on_the_original_observations(kind, actions, words, tmp_path, monkeypatch):
    """In Stable-Baselines3, by the code of its model card, and in evaluate.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO / "tests"))
    environment, modules = f"{kind}{actions}-v0", ["--import_module", "kd_testing.known_answer"]
    results = distill("--environment", environment, "--student", 16, *modules, *TEACHER, *words)
    test = results["models"]["student"]["metrics"]["test"]
    assert 0 < test["agreement"] <= 1 and (test["kl"] >= 0 or actions == "Box")
    student = PPO.load("run/student/student.zip", original(kind, actions), device="cpu")
    observations = sampled(kind)
    acting, _ = student.predict(observations, deterministic=True)
    assert acting.shape == (30, *student.action_space.shape)
    agent = load(Path("run/student/student.zip"), kind, actions)
    ours = to_environment(greedy(agent.network())(as_box(kind, observations)), student.action_space)
    np.testing.assert_allclose(ours, acting, atol=1e-5)
    mean, _ = evaluate_policy(student, VecMonitor(original(kind, actions)), n_eval_episodes=80)
    assert mean == pytest.approx(test["return_mean"], abs=1.5)
    evaluate = "reinforcement-learning/scripts/evaluate.py"
    run_script(evaluate, "run", *modules, "--episodes", 10, "--json", "again.json")
    assert read_json("again.json")["metrics"]["test"]["return_mean"] == pytest.approx(test["return_mean"])
    if "--method" in words:  # in a new process
        run_readme_alone(Path("run/student"), f"assert actions.shape == {(1, *acting.shape[1:])}")
    elif "--codebooks" not in words:
        assert run_readme(Path("run/student"))["actions"].shape == (1, *acting.shape[1:])


@pytest.mark.slow
def test_grid_of_gymnasium_from_the_teacher_to_a_video(tmp_path, monkeypatch):
    """With a DQN, of which the student is a table: one logit for each state and action."""
    monkeypatch.chdir(tmp_path)
    changes = '{"environments": 4, "buffer_size": 1000, "learning_starts": 100, "policy_kwargs": {"net_arch": [16]}}'
    words = ["--algorithm", "dqn", "--teacher_steps", 600, "--hyperparameters", changes, "--no_control"]
    results = distill("--environment", "FrozenLake-v1", *words, "--student", "--student_value", "--learning_rate", 0.1)
    models = results["models"]
    assert models["student"]["parameters"] == 16 * 4 + 4 + 16 + 1
    assert models["student"]["metrics"]["test"]["agreement"] > 0.9
    student = PPO.load("run/student/student.zip", device="cpu")
    teacher = DQN.load("run/stages/teacher/FrozenLake-v1/model.zip", device="cpu")
    assert student.observation_space == teacher.observation_space == Discrete(16)
    assert run_readme(Path("run/student"))["actions"].shape == (1,)
    run_script("reinforcement-learning/scripts/evaluate.py", "run", "--episodes", 2, "--video", "lake.gif")
    assert Path("lake.gif").stat().st_size > 0
