"""Students: training, evaluation, export."""
