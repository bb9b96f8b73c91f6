"""An episode as a moving picture, in an mp4 or a gif."""

import logging
import os
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3
import numpy as np
import torch

from common.utils.errors import UserError
from reinforcement_learning.data.playing import Act
from reinforcement_learning.environments.vector import Environments
from reinforcement_learning.teacher_model.policies import environment_actions

ENLARGED = 4  # times: what a policy sees of an Atari game is 84 pixels wide
logger = logging.getLogger(__name__)


def check_video(path: str) -> None:
    """Raises UserError for a file name that says neither mp4 nor gif."""
    if Path(path).suffix not in (".mp4", ".gif"):
        raise UserError(f"--video writes an mp4 or a gif: give {Path(path).stem or 'episode'}.mp4, not {path}")


def write_video(act: Act, environment: str, path: str, seed: int) -> Path:
    """Plays one episode and writes it; where an mp4 cannot be written, a gif beside it. Returns the file's path."""
    frames, per_second = (
        _atari_frames(act, environment, seed) if environment.startswith("ALE/") else _frames(act, environment, seed)
    )
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mp4":
        try:
            imageio.v3.imwrite(file, frames, plugin="FFMPEG", fps=per_second, macro_block_size=2)
            return file
        except Exception as error:  # whatever this machine's ffmpeg, or its absence, leads to
            logger.warning("cannot write %s (%s): writing a gif instead", file, error)
            file = file.with_suffix(".gif")
    imageio.v3.imwrite(file, frames, duration=1000 / per_second, loop=0)
    return file


def _frames(act: Act, environment: str, seed: int) -> tuple[np.ndarray, float]:
    """Pictures (steps, height, width, 3) of the environment's own renderer, and how many make a second."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory and needs no screen
    try:
        one: gymnasium.Env[Any, Any] = gymnasium.make(environment, render_mode="rgb_array")
        observation, _ = one.reset(seed=seed)
        frames, ended = [one.render()], False
    except Exception as error:
        raise UserError(f"{environment} cannot be drawn here ({error}): leave out --video") from error
    while not ended:
        action = environment_actions(act(torch.as_tensor(observation).unsqueeze(0)), one.action_space)[0]
        observation, _, terminated, truncated, _ = one.step(action)
        frames.append(one.render())
        ended = terminated or truncated
    one.close()
    return np.stack(frames), float(one.metadata.get("render_fps", 30))  # type: ignore[arg-type]


def _atari_frames(act: Act, environment: str, seed: int) -> tuple[np.ndarray, float]:
    """What the policy sees: the newest of its four grey frames."""
    one = Environments(environment, 1, seed)
    frames, ended = [], False
    while not ended:
        frames.append(one.observations[0, -1].copy())
        step = one.step(environment_actions(act(torch.as_tensor(one.observations)), one.action_space))
        ended = bool(step.terminated[0] or step.truncated[0])
    one.close()
    grey = np.stack(frames).repeat(ENLARGED, 1).repeat(ENLARGED, 2)  # (steps, height, width)
    return np.stack([grey] * 3, -1), 15.0
