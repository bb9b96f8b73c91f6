"""Training from reward alone: of a teacher, and of the control that a distilled student is compared with."""

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.environments.sb3 import training_environments
from kd.reinforcement_learning.teacher_model.recipes import ALGORITHMS, TrainingRecipe, check_steps


def recipe_environments(environment: str, recipe: TrainingRecipe, seed: int, norm_obs: bool = True) -> VecEnv:
    """The environments of a training from reward, behind VecNormalize where the recipe says so; without `norm_obs`
    that normalizes rewards only.
    """
    environments: VecEnv = training_environments(environment, recipe.environments, seed)
    if recipe.normalize:
        return VecNormalize(environments, norm_obs=norm_obs, gamma=recipe.keywords.get("gamma", 0.99))
    return environments


def new_teacher(environment: str, recipe: TrainingRecipe, seed: int) -> BaseAlgorithm:
    """An untrained teacher in its environments, with the networks of its algorithm. Raises UserError for
    hyper-parameters that the algorithm refuses.
    """
    try:
        check_steps(recipe)
    except ValueError as error:
        raise UserError(str(error)) from None
    environments = recipe_environments(environment, recipe, seed)
    frames = is_image_space(environments.observation_space)
    algorithm: Any = ALGORITHMS[recipe.algorithm]
    device = "cpu" if recipe.algorithm == "ppo" and not frames else "auto"  # networks so small are faster there
    policy = "CnnPolicy" if frames else "MlpPolicy"
    try:
        model: BaseAlgorithm = algorithm(policy, environments, seed=seed, device=device, **recipe.keywords)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        environments.close()
        raise UserError(f"{recipe.algorithm} refuses these hyper-parameters: {error}") from error
    return model
