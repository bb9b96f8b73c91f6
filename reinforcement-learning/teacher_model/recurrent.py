"""RecurrentPPO of sb3-contrib: an actor with an LSTM, built from its weights alone.

The state of its LSTMs, zero at the start of an episode, follows the observation in each row of observations that the
network gets. So its outputs are a function of the row, as those of other policies are. `Environments` keep the states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from kd.common.outputs import Outputs
from kd.reinforcement_learning.teacher_model.networks import ActorCritic


class RecurrentPolicy(ActorCriticPolicy):
    """A policy with the weights of sb3-contrib's RecurrentActorCriticPolicy: an LSTM before the actor's layers, and
    before the critic's an LSTM, the actor's LSTM, or a linear layer.
    """

    def __init__(
        self,
        *args: Any,
        lstm_hidden_size: int,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        **kwargs: Any,
    ) -> None:
        self.lstm_hidden_size = lstm_hidden_size
        super().__init__(*args, **kwargs)
        width = self.features_dim
        self.lstm_actor = nn.LSTM(width, lstm_hidden_size, n_lstm_layers)
        self.lstm_critic = nn.LSTM(width, lstm_hidden_size, n_lstm_layers) if enable_critic_lstm else None
        self.critic = None if shared_lstm or enable_critic_lstm else nn.Linear(width, lstm_hidden_size)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = MlpExtractor(self.lstm_hidden_size, self.net_arch, self.activation_fn, self.device)


class RecurrentActorCritic(ActorCritic):
    """RecurrentPPO: the outputs of ActorCritic after a step of the LSTMs from their states (batch, state_size)."""

    policy: RecurrentPolicy

    def __init__(self, policy: RecurrentPolicy) -> None:
        super().__init__(policy)
        self.sizes = [2 * lstm.num_layers * lstm.hidden_size for lstm in self._lstms()]
        self.state_size = sum(self.sizes)

    def forward(self, observations: Tensor, value: bool = True, state: Tensor | None = None) -> Outputs:
        assert state is not None, "the state follows the observation in each row"
        actor, critic = self._features(observations, value)
        states = state.float().split(self.sizes, -1)
        remembered, _ = lstm_step(self.policy.lstm_actor, actor, states[0])
        if critic is None:
            return self._outputs(remembered, None)
        if self.policy.lstm_critic is not None:
            return self._outputs(remembered, lstm_step(self.policy.lstm_critic, critic, states[1])[0])
        return self._outputs(remembered, remembered if self.policy.critic is None else self.policy.critic(critic))

    def next_state(self, observations: Tensor, state: Tensor) -> Tensor:
        """The states of the LSTMs after a step (batch, state_size)."""
        features, states = self._features(observations, value=True), state.float().split(self.sizes, -1)
        steps = zip(self._lstms(), features, states, strict=False)
        return torch.cat([lstm_step(lstm, part, before)[1] for lstm, part, before in steps if part is not None], -1)

    def _lstms(self) -> list[nn.LSTM]:
        """The LSTM of the actor and, if it has one, that of the critic."""
        return [lstm for lstm in (self.policy.lstm_actor, self.policy.lstm_critic) if lstm is not None]


def lstm_step(lstm: nn.LSTM, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997) for inputs (batch, width): its outputs (batch, hidden) and
    its state (batch, 2 * layers * hidden), the hidden states of all layers and then their cells.

    Unlike calling the module, it uses the parameters by name, so that `functional_call` can replace them.
    """
    hidden, cells = rearrange(state, "batch (two layer size) -> two layer batch size", two=2, layer=lstm.num_layers)
    after: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in range(lstm.num_layers):
        weights = [getattr(lstm, f"{kind}_l{layer}") for kind in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        gates = F.linear(inputs, *weights[:2]) + F.linear(hidden[layer], *weights[2:])
        write, keep, new, read = gates.chunk(4, -1)
        cell = keep.sigmoid() * cells[layer] + write.sigmoid() * new.tanh()
        inputs = read.sigmoid() * cell.tanh()
        after[0].append(inputs)
        after[1].append(cell)
    states = torch.stack([torch.stack(part) for part in after])
    return inputs, rearrange(states, "two layer batch size -> batch (two layer size)")
