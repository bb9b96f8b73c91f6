"""The teacher-student pairs of the CIFAR-100 tables, with the method arguments published for them.

README.md has the published accuracies. A method that is not listed keeps its defaults, which are those of
ResNet32x4 -> ResNet8x4.
"""

SMALL_LEARNING_RATE = 0.01  # for MobileNetV2 and the ShuffleNets in every protocol
PAIRS: dict[tuple[str, str], list[str]] = {  # (teacher, student): methods with their arguments
    ("resnet32x4", "resnet8x4"): [],
    ("resnet32x4", "shufflenetv1"): ["catkd:weight=600:size=4:normalized=true"],
    ("resnet32x4", "shufflenetv2"): [
        "mlkd_ls:weight=6",
        "reviewkd:weight=8",
        "catkd:weight=600:size=4:normalized=true",
    ],
    ("resnet32x4", "shufflenetv2x1.5"): [],
    ("resnet32x4", "vgg8"): [],
    ("wrn_40_2", "wrn_16_2"): ["dkd:beta=6", "dkd_ls:alpha=12:beta=24", "catkd:weight=12"],
    ("wrn_40_2", "wrn_40_1"): ["dkd:beta=6", "dkd_ls:alpha=12:beta=24", "catkd:weight=1.5"],
    ("wrn_40_2", "resnet8x4"): ["dkd_ls:alpha=18:beta=36"],
    ("wrn_40_2", "shufflenetv1"): ["catkd:weight=80:size=4:normalized=true"],
    ("vgg13", "vgg8"): [
        "dkd:beta=6",
        "lskd:temperature=3",
        "dkd_ls:alpha=15:beta=30",
        "mlkd_ls:weight=6",
        "catkd:weight=4.5",
    ],
    ("vgg13", "mobilenetv2"): [
        "dkd:beta=6",
        "lskd:temperature=3",
        "dkd_ls:temperature=3:alpha=9:beta=18",
        "mlkd_ls:weight=6",
        "catkd:weight=15:normalized=true",
    ],
    ("resnet50", "mobilenetv2"): [
        "lskd:temperature=3:weight=1",
        "dkd_ls:alpha=15:beta=30",
        "catkd:weight=40:normalized=true",
    ],
    ("resnet50", "vgg8"): [],
    ("resnet56", "resnet20"): [
        "dkd:beta=2",
        "dkd_ls:temperature=3:alpha=18:beta=36",
        "reviewkd:weight=0.6",
        "catkd:weight=0.7",
    ],
    ("resnet110", "resnet20"): ["lskd:temperature=4:weight=12", "dkd_ls:alpha=15:beta=30"],
    ("resnet110", "resnet32"): ["dkd:beta=2", "dkd_ls:alpha=15:beta=30", "reviewkd:weight=1", "catkd:weight=1.8"],
}
PAIRS_BY_NAME = {f"{teacher}_{student}": (teacher, student) for teacher, student in PAIRS}


def learning_rate(student: str) -> float | None:
    """The learning rate for a student, or None if the protocol sets it."""
    return SMALL_LEARNING_RATE if student.startswith(("mobilenet", "shufflenet")) else None
