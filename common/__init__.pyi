from kd.common import losses as losses
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck as DiscreteKeyValueBottleneck
from kd.common.distillation.distill import distill as distill
from kd.common.methods import Method as Method
from kd.common.objective import Objective as Objective
from kd.common.training.trainer import KDTrainer as KDTrainer
