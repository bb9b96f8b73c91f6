"""Entry points for text models: one Python script per job, recipes (YAML), and shell scripts that run a recipe."""
