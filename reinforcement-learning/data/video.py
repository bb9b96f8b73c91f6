"""Writes a video of an episode, as mp4 or gif."""

import logging
import os
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3
import numpy as np
import torch
from einops import rearrange, repeat

from kd.common.utils.errors import UserError
from kd.common.utils.files import check_writable, write_bytes
from kd.reinforcement_learning.data.environments import Environments, to_environment
from kd.reinforcement_learning.data.observations import with_box_observations
from kd.reinforcement_learning.data.rollouts import Act
from kd.reinforcement_learning.data.specs import find_spec, time_limit

SCALE = 4  # the frames of an Atari game are 84 pixels wide
MAX_FRAMES = 3_000  # they are in memory until the video is written
logger = logging.getLogger(__name__)


def check_video(path: str) -> None:
    """Raises UserError for a file that cannot be written or is neither mp4 nor gif."""
    file = Path(path)
    if file.suffix not in (".mp4", ".gif"):
        raise UserError(f"--video writes an mp4 or a gif: pass {file.stem or 'episode'}.mp4, not {path}")
    if file.is_dir():
        raise UserError(f"--video {path} is a folder: pass the name of a file")
    check_writable(file, "--video")


def write_video(act: Act, environment: str, path: str, seed: int) -> Path:
    """Plays one episode and writes its video, or a gif of the same name if an mp4 cannot be written. Returns the path
    of the file, which is never incomplete.
    """
    frames, per_second = (
        _atari_frames(act, environment, seed) if environment.startswith("ALE/") else _frames(act, environment, seed)
    )
    file, gif = Path(path), Path(path).with_suffix(".gif")
    if file.suffix == ".mp4":
        try:
            _write_mp4(file, frames, per_second)
            return file
        except Exception as error:  # ffmpeg failed or is missing
            if gif.exists():
                raise UserError(
                    f"cannot write {file} ({_line(error)}), and {gif} exists: pass --video a gif"
                ) from None
            logger.warning("cannot write %s (%s): writing a gif instead", file, _line(error))
    content = imageio.v3.imwrite("<bytes>", frames, extension=".gif", duration=1000 / per_second, loop=0)
    try:
        write_bytes(gif, content)
    except OSError as error:
        raise UserError(f"cannot write {gif} ({error.strerror}): choose another --video, or leave it out") from None
    return gif


def _write_mp4(file: Path, frames: np.ndarray, per_second: float) -> None:
    partial = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        imageio.v3.imwrite(partial, frames, plugin="FFMPEG", fps=per_second, macro_block_size=2)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _has_room(frames: list[Any]) -> bool:
    if len(frames) == MAX_FRAMES:
        logger.warning("the video ends after %d frames, before the end of the episode", MAX_FRAMES)
    return len(frames) < MAX_FRAMES


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _frames(act: Act, environment: str, seed: int) -> tuple[np.ndarray, float]:
    """Frames (steps, height, width, 3) that the environment renders, and the frames per second."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory and needs no screen
    try:
        spec = find_spec(environment)
        one = with_box_observations(gymnasium.make(spec, render_mode="rgb_array", **time_limit(spec)))
        observation, _ = one.reset(seed=seed)
        frames, ended = [one.render()], False
    except Exception as error:
        raise UserError(f"{environment} cannot be rendered here ({_line(error)}): leave out --video") from error
    while not ended and _has_room(frames):
        action = to_environment(act(rearrange(torch.as_tensor(observation), "... -> 1 ...")), one.action_space)[0]
        observation, _, terminated, truncated, _ = one.step(action)
        frames.append(one.render())
        ended = terminated or truncated
    one.close()
    return np.stack(frames), float(one.metadata.get("render_fps", 30))  # type: ignore[arg-type]


def _atari_frames(act: Act, environment: str, seed: int) -> tuple[np.ndarray, float]:
    """The newest of the four grey frames that the policy observes, enlarged, and the frames per second."""
    one = Environments(environment, 1, seed)
    frames, ended = list[Any](), False
    while not ended and _has_room(frames):
        frames.append(one.observations[0, -1].copy())
        step = one.step(to_environment(act(torch.as_tensor(one.observations)), one.action_space))
        ended = bool(step.terminated[0] or step.truncated[0])
    one.close()
    enlarged = repeat(np.stack(frames), "step h w -> step (h a) (w b) rgb", a=SCALE, b=SCALE, rgb=3)
    return enlarged, 15.0
