"""Arguments of on-policy distillation. Nothing here imports torch or transformers."""

from dataclasses import dataclass, field

from kd.common.cli import reject_unused
from kd.common.utils.ranges import Count, Positive, Share, ShareAbove0, ShareBelow1
from kd.nlp.student_model.arguments import GenerativePairArguments

OF_SAMPLES = ("on_policy_start", "sampling_temperature", "top_p", "max_new_tokens", "prompt_length")


@dataclass
class OnPolicyArguments(GenerativePairArguments):
    """On-policy distillation."""

    on_policy_share: Share = field(default=0.0, metadata={"help": "Share of updates on the student's samples."})
    on_policy_start: ShareBelow1 = field(
        default=0.0, metadata={"help": "Share of the updates before the first samples."}
    )
    sampling_temperature: Positive = field(default=1.0, metadata={"help": "Temperature of the samples."})
    top_p: ShareAbove0 = field(default=1.0, metadata={"help": "Sample from the tokens with this total probability."})
    max_new_tokens: Count | None = field(default=None, metadata={"help": "Maximum length of a sample."})

    def check_unused_flags(self) -> None:
        super().check_unused_flags()
        if not self.on_policy_share:
            reject_unused("--on_policy_share is 0", self, *OF_SAMPLES)
        elif self.on_policy_share == 1 and not self.on_policy_start:
            reject_unused("--on_policy_share 1 uses no labels", self, "alpha")
