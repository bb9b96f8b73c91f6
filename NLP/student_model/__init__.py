"""Text students, what ships with them, and the steps of their distillation."""
