"""Training: arguments, the trainer, the folder and the stages of a run, teacher outputs."""
